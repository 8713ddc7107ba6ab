"""A training run of a language model: a folder with its settings, metrics, completions, checkpoints and exports."""

from __future__ import annotations

import copy
import json
import re
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from .._utils.importing import function_named
from .._utils.interrupts import delayed_interrupt, exit_on_sigterm
from .._utils.memory import freed_memory_kept
from ..callbacks import Checkpoints
from ..callbacks.logger import record, scores_of
from ..callbacks.run_folder import METRICS, RunFolder, RunWriter
from ..distributed import Engine, make_engine
from ..trainers.from_settings import trainer_from
from ..trainers.keyed import KeyedESTrainer
from .inputs import check_rewards, check_settings, examples_of
from .loading import load
from .objectives import Evaluated, make_objective
from .parameters import ALL_LINEAR, trainable_parameters
from .settings import Settings

EVALUATIONS, COMPLETIONS = "evaluations.jsonl", "completions.jsonl"

# Settings that may differ when a run is resumed.
_FREE = {"generations", "save_every", "show", "adapter_rank", "engine", "device"}


class Run:
    """A training run, in one process or in several under ``torchrun``, of which the first one writes files.

    Args:
        settings: The settings. With ``resume``, the run in its folder is continued.

    Attributes:
        folder: Folder of the run.
        trainer: The trainer.
        metrics: One dictionary for each generation.
        evaluations: One dictionary for each evaluation of the centre, in the first process.

    Raises:
        FileExistsError: The folder contains a run, and ``resume`` is not set.
        FileNotFoundError: There is no run to resume, or no data.
        OSError: The model cannot be loaded.
        ValueError: A setting, the data or the model cannot be used, or the run to resume has other settings.
    """

    def __init__(self, settings: Settings) -> None:
        check_settings(settings)
        self.settings = settings
        engine = make_engine(settings.engine)
        self.is_main = engine.rank == 0
        # A function may return different data in each process: all use the first process's.
        train, self.eval_examples = engine.from_main(lambda: examples_of(settings))
        functions = [function_named("--reward", name) for name in settings.reward]
        check_rewards(settings, functions, train, self.eval_examples)
        self.folder = settings.out or Path("runs") / f"{Path(settings.model).name}-{settings.seed}"
        data = zlib.crc32(json.dumps([train, self.eval_examples], default=str).encode())
        self._files = RunFolder(
            self.folder, settings, _FREE, (METRICS, EVALUATIONS, COMPLETIONS), {"data_checksum": data}
        )
        engine.from_main(self._files.open)
        self.tokenizer, model = load(settings.model, settings.dtype, settings.device)
        compared = settings.kl_penalty > 0 or settings.report_kl
        reference = copy.deepcopy(model) if compared else None
        self.objective = make_objective(settings, self.tokenizer, train, functions, reference)
        self.trainer = make_trainer(settings, model, self.objective.fitness, engine)
        # A checkpoint contains the trained weights three times, so we keep only the one that is needed to resume.
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", every=settings.save_every, keep_last=1, keep_best=False
        )
        self.metrics: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        if settings.resume:
            self.checkpoints.restore(self.trainer)
            if self.is_main:
                self._cut_records()
        engine.from_main(lambda: self.checkpoints.begin(self.trainer))

    def train(self) -> None:
        """Train for the number of generations in the settings. After a Ctrl-C or SIGTERM, the run can be resumed."""
        trainer, last = self.trainer, self.settings.generations
        bar = tqdm(total=last, initial=trainer.generation, unit="gen", desc=self.folder.name, disable=not self.is_main)
        try:
            writing = self._files.writing(self.is_main, trainer.generation)
            with freed_memory_kept(), exit_on_sigterm(), writing as writer, bar:
                self._evaluate(writer, bar)
                while trainer.generation < last:
                    line = self._step()
                    # Write a completed generation before an interrupt ends the run.
                    with delayed_interrupt():
                        self.metrics.append(line)
                        writer.metrics(line, line["generation"])
                        writer.histogram("scores", scores_of(trainer), line["generation"])
                        self.checkpoints.after_generation(trainer)
                    bar.update()
                    self._evaluate(writer, bar)
                    bar.set_postfix_str(self._shown(line))
        finally:
            # Without its records, a generation is not saved: a resumed run makes it again.
            if self.metrics and self.metrics[-1]["generation"] == trainer.generation:
                self.checkpoints.save(trainer)

    def _step(self) -> dict[str, Any]:
        """Run a generation and return its metrics."""
        fitness, start = self.objective.fitness, time.perf_counter()
        before = getattr(fitness, "tokens", 0)
        result = self.trainer.step()
        seconds = time.perf_counter() - start
        line = {
            # All diagnostics.
            **{key: value for key, value in record(result).items() if "fitness" not in key},
            "generation": result["generation"],
            **getattr(fitness, "metrics", {}),
            "mean_fitness": result["mean_fitness"],
            "best_fitness": result["fitness"],
            "std_fitness": result["std_fitness"],
            "seconds": seconds,
        }
        if hasattr(fitness, "tokens"):
            line |= {"tokens": fitness.tokens, "tokens_per_second": (fitness.tokens - before) / seconds}
        return line

    def _evaluate(self, writer: RunWriter, bar: Any) -> None:
        """Evaluate the centre if it is due, and store the results."""
        generation, settings = self.trainer.generation, self.settings
        due = generation % settings.eval_every == 0 or generation >= settings.generations
        if not (self.is_main and due) or any(line["generation"] == generation for line in self.evaluations):
            return
        found = self.objective.evaluate(self.trainer.model, self.eval_examples)
        line = {"generation": generation, **found.figures}
        with delayed_interrupt():
            # The evaluation is written last: without it, its completions are removed when the run is resumed.
            writer.append(COMPLETIONS, *({"generation": generation, **shown} for shown in found.completions))
            writer.append(EVALUATIONS, line)
            writer.scalars(found.figures, generation, "eval/")
            if found.completions:
                writer.text("completions", _markdown(found), generation)
            self.evaluations.append(line)
        bar.write(f"generation {generation}: {found.summary}")

    def _shown(self, line: dict[str, Any]) -> str:
        """Return the text of the progress bar for a generation."""
        centre = [f"centre {self.evaluations[-1][self.objective.figure]:.4g}"] if self.evaluations else []
        return ", ".join([f"mean {line['mean_fitness']:.4g}", f"best {line['best_fitness']:.4g}", *centre])

    def _cut_records(self) -> None:
        generation = self.trainer.generation
        self.metrics = self._files.cut(METRICS, lambda i, line: i < generation)
        self.evaluations = self._files.cut(EVALUATIONS, lambda i, line: line["generation"] <= generation)
        kept = {line["generation"] for line in self.evaluations}
        self._files.cut(COMPLETIONS, lambda i, line: line["generation"] in kept)


def make_trainer(settings: Settings, model: nn.Module, fitness: Any, engine: Engine) -> KeyedESTrainer:
    """Return the trainer that the settings describe."""
    params = trained_parameters(settings, model)
    return trainer_from(
        settings, params=params, model=model, fitness_fn=fitness, anchor_decay=settings.anchor_decay, engine=engine
    )


def trained_parameters(settings: Settings, model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that the settings choose.

    Raises:
        ValueError: A pattern matches nothing, or no parameter is left.
    """
    targets = [".*"] if settings.target_modules == ("all",) else settings.target_modules
    excluded = _patterns(settings.exclude_modules) or None
    parameters = trainable_parameters(model, _patterns(targets), exclude_modules=excluded)
    if settings.freeze_nonlora:
        parameters = [p for p in parameters if p.ndim > 1]
    if not parameters:
        raise ValueError(
            f"target_modules={' '.join(targets)} has no matrices, and freeze_nonlora trains nothing else: leave it out,"
            " or choose other modules"
        )
    return parameters


def _patterns(names: Sequence[str]) -> str | list[str]:
    """Return names of modules as a list, but ``all-linear`` or a regular expression as a string."""
    if len(names) == 1 and (names[0] == ALL_LINEAR or re.fullmatch(r"[\w.-]+", names[0]) is None):
        return names[0]
    return list(names)


def _markdown(found: Evaluated) -> str:
    """Return completions as Markdown, for TensorBoard."""
    parts = []
    for shown in found.completions:
        prompt = (
            shown["prompt"] if isinstance(shown["prompt"], str) else json.dumps(shown["prompt"], ensure_ascii=False)
        )
        rewards = shown.get("rewards", [None] * len(shown["completions"]))
        for text, reward in zip(shown["completions"], rewards, strict=True):
            end = "" if reward is None else f"\n\nreward {reward:.4g}"
            # Indented by four spaces, as Markdown does not format code blocks.
            parts.append(f"{_block(prompt)}\n\n→\n\n{_block(text)}{end}")
    return "\n\n---\n\n".join(parts)


def _block(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))
