"""Logs to TensorBoard, which shows a run while it goes on."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._utils.validation import check_int, check_real
from .callback import Metrics, Trainer
from .extras import needs
from .logger import Logger, numbers, scores_of, settings_of, texts

# Metrics that count steps, and get no curve.
COUNTERS = ("generation", "steps")


class TensorBoard(Logger):
    """Writes curves of all numbers of the metrics, histograms of the members' fitness, and the settings.

    ``tensorboard --logdir FOLDER`` shows them while the run goes on. Your own callbacks can add more with
    :meth:`scalars`, :meth:`text`, :meth:`image` and :meth:`video`.

    Args:
        folder: Folder of the events. A run that resumes from a checkpoint continues them; TensorBoard hides events of
            later generations.
        histogram_every: Number of generations between histograms; 0 for none.
        flush_every: Seconds until events are written to the file.

    Raises:
        ImportError: TensorBoard is not installed.

    Example:
        >>> import tempfile, torch
        >>> from eggroll_trainer import EGGROLLTrainer
        >>> trainer = EGGROLLTrainer(model=torch.nn.Linear(3, 1), fitness_fn=lambda m: m(torch.ones(1, 3)).item())
        >>> board = TensorBoard(tempfile.mkdtemp())
        >>> _ = trainer.train(2, verbose=False, callback=board)
    """

    def __init__(self, folder: str | PathLike[str], *, histogram_every: int = 1, flush_every: float = 2.0) -> None:
        needs("torch.utils.tensorboard", "TensorBoard", "tensorboard")
        self.folder = Path(folder)
        self.histogram_every = check_int("histogram_every", histogram_every, 0)
        self.flush_every = check_real("flush_every", flush_every, positive=True)
        self._writer: Any = None
        self._texts: dict[str, str] = {}
        self.step = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r})"

    def open(self, step: int = 0) -> None:
        """Begin to write.

        Args:
            step: The step at which the run resumes. TensorBoard hides earlier events of later steps.
        """
        from torch.utils.tensorboard import SummaryWriter

        self.step = step
        self._writer = SummaryWriter(
            str(self.folder), purge_step=step + 1 if step else None, flush_secs=math.ceil(self.flush_every)
        )

    def close(self) -> None:
        """Write waiting events, and close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def on_start(self, trainer: Trainer) -> None:
        """Begin to write; for a new run, write its settings."""
        self.open(trainer.generation)
        if trainer.generation == 0:
            self.hyperparameters(settings_of(trainer))

    def on_end(self, trainer: Trainer) -> None:
        """Write waiting events, and close the file."""
        self.close()

    def on_generation(self, trainer: Trainer, metrics: Metrics) -> None:
        """Write a generation."""
        # The step for what other callbacks add.
        self.step = trainer.generation
        super().on_generation(trainer, metrics)

    def log(self, trainer: Trainer, metrics: Mapping[str, Any]) -> None:
        """Write the numbers, texts that have changed, and the histogram."""
        step = trainer.generation
        self.scalars(metrics, step)
        for tag, text in texts(metrics).items():
            if self._texts.get(tag) != text:
                self.text(tag, text, step)
                self._texts[tag] = text
        if self.histogram_every and step % self.histogram_every == 0:
            self.histogram("scores", scores_of(trainer), step)

    def scalars(self, values: Mapping[str, Any], step: int | None = None, prefix: str = "") -> None:
        """Add the numbers among some values to the curves.

        Args:
            values: Values by name. Only numbers are used.
            step: Their generation; the current one if None.
            prefix: Prefix of each name.
        """
        for key, value in numbers(values).items():
            if key not in COUNTERS:
                self._opened().add_scalar(prefix + key, value, self._at(step))

    def histogram(self, tag: str, values: Any, step: int | None = None) -> None:
        """Add a histogram of the finite numbers among some values.

        Args:
            tag: Name of the histogram.
            values: A tensor, an array or a list of numbers; None adds nothing.
            step: Its generation; the current one if None.
        """
        if values is None:
            return
        finite = torch.as_tensor(values).detach().double().cpu().flatten()
        finite = finite[finite.isfinite()]
        if len(finite):
            # TensorBoard shows 30 bins. Writing its default of 1,500 takes longer than a small generation.
            self._opened().add_histogram(tag, finite.numpy(), self._at(step), bins=60)

    def text(self, tag: str, markdown: str, step: int | None = None) -> None:
        """Add a text.

        Args:
            tag: Name of the text.
            markdown: The text, in Markdown.
            step: Its generation; the current one if None.
        """
        self._opened().add_text(tag, markdown, self._at(step))

    def image(self, tag: str, image: Any, step: int | None = None) -> None:
        """Add an image.

        Args:
            tag: Name of the image.
            image: ``[height, width, 3]`` or ``[height, width]``, in uint8 or as floats from 0 to 1; or a matplotlib
                figure.
            step: Its generation; the current one if None.
        """
        if hasattr(image, "savefig"):
            buffer = io.BytesIO()
            image.savefig(buffer, format="png")
            self._encoded(tag, buffer.getvalue(), _pixels_of(image), step)
            return
        pixels = _pixels(image)
        self._encoded(tag, _encode([pixels], 1.0, "PNG"), pixels.shape, step)

    def video(self, tag: str, frames: Sequence[Any], fps: float = 30.0, step: int | None = None) -> None:
        """Add a video, as an animated GIF.

        Args:
            tag: Name of the video.
            frames: Images, as for :meth:`image`.
            fps: Frames per second, shown at 50 at most.
            step: Its generation; the current one if None.

        Raises:
            ValueError: There are no frames, or ``fps`` is not above 0.
        """
        check_real("fps", fps, positive=True)
        shown = [_pixels(frame) for frame in frames]
        if not shown:
            raise ValueError("frames must have at least one image, got none")
        self._encoded(tag, _encode(shown, fps, "GIF"), shown[0].shape, step)

    def hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Add settings to TensorBoard's page HPARAMS, which compares runs."""
        from torch.utils.tensorboard.summary import hparams

        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in values.items()}
        for summary in hparams(plain, {"mean_fitness": 0.0, "best_fitness": 0.0}):
            self._opened().file_writer.add_summary(summary)

    def _encoded(self, tag: str, data: bytes, shape: Sequence[int], step: int | None) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        image = Summary.Image(height=shape[0], width=shape[1], colorspace=3, encoded_image_string=data)
        self._opened().file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), self._at(step))

    def _at(self, step: int | None) -> int:
        return self.step if step is None else step

    def _opened(self) -> Any:
        if self._writer is None:
            raise RuntimeError("the TensorBoard writes while a run goes on: pass it to train(callback=…), or open() it")
        return self._writer


def _pixels(image: Any) -> np.ndarray[Any, Any]:
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.ndim == 2:
        array = array[:, :, None].repeat(3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"an image must be [height, width, 3] or [height, width], got {list(array.shape)}")
    if array.dtype != np.uint8:
        array = (np.clip(array, 0, 1) * 255).round().astype(np.uint8)
    return array


def _pixels_of(figure: Any) -> tuple[int, int]:
    width, height = (figure.get_size_inches() * figure.dpi).round().astype(int)
    return int(height), int(width)


def _encode(frames: list[np.ndarray[Any, Any]], fps: float, kind: str) -> bytes:
    from PIL import Image

    first, *others = (Image.fromarray(frame) for frame in frames)
    buffer = io.BytesIO()
    animated: dict[str, Any] = {}
    if kind == "GIF":
        animated = {"save_all": True, "append_images": others, "duration": max(20, round(1000 / fps)), "loop": 0}
    first.save(buffer, kind, **animated)
    return buffer.getvalue()
