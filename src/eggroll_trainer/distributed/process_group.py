"""An engine over ``torch.distributed``: several processes run the same script, as started by ``torchrun``."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import math
import os
import pickle
import secrets
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .._utils.memory import is_out_of_memory
from .._utils.validation import check_int
from ..fitness.scores import packed
from .engine import Chunk, Engine, Evaluator, Outcome

if dist.is_available():
    # Its functions take the current default group as a default argument. torch._dynamo imports it later, when there is
    # a group: it would be kept alive beyond its end, and its threads would abort the process.
    import torch.distributed.nn.functional  # noqa: F401

T = TypeVar("T")
Exchange = Literal["auto", "scores", "sums"]

# Estimated cost of an exchange of sums; a reduction sends and receives each byte about once.
_BYTES_PER_SECOND = 1e9
_SECONDS_OF_LATENCY = 1e-3

_engines: weakref.WeakSet[ProcessGroupEngine] = weakref.WeakSet()


class ProcessGroupEngine(Engine):
    """Distributes the chunks of a population among the processes of ``torch.distributed``'s default group.

    Every process has the model and makes the same steps. After the evaluation, all processes get all scores. With
    ``exchange="scores"``, each process then draws the noise of the whole population again and computes the update
    itself. With ``"sums"``, each process sums the contributions of its own chunks, and the sums are added; this sends
    eight more bytes for each parameter. Both give the same bits as a single process.

    Args:
        exchange: ``"scores"``, ``"sums"``, or ``"auto"`` for the one that is estimated to be faster.
        check_every: Number of generations between comparisons of the parameters of all processes; 0 for none.
        timeout: Seconds that the evaluation of a chunk may take. If it hangs in native code, the process ends, and
            ``torchrun`` starts the group again.
        retries: How often the evaluation of a chunk is repeated after a timeout.

    Attributes:
        bytes_sent: Bytes of scores, statistics and sums that this process has sent, each counted once.

    Raises:
        RuntimeError: There is no process group, and the environment variables to make one are not set.

    Example:
        A group with a single process; ``torchrun`` makes one with several.

        >>> import torch
        >>> from eggroll_trainer import EGGROLLTrainer
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> trainer = EGGROLLTrainer(
        ...     model=torch.nn.Linear(3, 1),
        ...     fitness_fn=lambda m: m(torch.ones(1, 3)).item(),
        ...     engine=ProcessGroupEngine(exchange="sums"),
        ... )
        >>> trainer.step()["generation"]
        1
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        *,
        exchange: Exchange = "auto",
        check_every: int = 10,
        timeout: float | None = None,
        retries: int = 3,
    ) -> None:
        super().__init__(timeout=timeout, retries=retries)
        if exchange not in get_args(Exchange):
            raise ValueError(f"exchange must be one of {', '.join(map(repr, get_args(Exchange)))}, got {exchange!r}")
        self.exchange = exchange
        self.check_every = check_int("check_every", check_every, 0)
        if not dist.is_initialized():
            if not is_launched():
                raise RuntimeError(
                    "there is no process group: start the script with torchrun, or call"
                    " torch.distributed.init_process_group first"
                )
            join_group()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # Scores and messages are on the CPU: use the default group (None) if it supports that, else a new group.
        self._host: Any = None if _backends().get("cpu") == "gloo" else dist.new_group(backend="gloo")
        _engines.add(self)
        self._sums = self._warned = False
        self.bytes_sent = 0

    def evaluate(self, trainer: Evaluator, chunks: Sequence[Chunk]) -> list[Outcome]:
        """Evaluate this process's share of the chunks, and return the outcomes of all chunks."""
        if len(chunks) < self.size and self.rank == 0 and not self._warned:
            self._warned = True
            warnings.warn(
                f"there is work for only {len(chunks)} of {self.size} processes, as a chunk has {chunks[0].size} of the"
                f" {sum(chunk.size for chunk in chunks)} members; set a smaller chunk_size",
                RuntimeWarning,
                stacklevel=2,
            )
        outcomes: list[Outcome] = []
        failure: BaseException | None = None
        try:
            outcomes = self._evaluate_here(trainer, self.share(chunks), exit_when_stuck=True)
        except BaseException as error:
            # Raised after the exchange below, as the other processes wait for it.
            failure = error
        fingerprint = self._fingerprint(trainer)
        reports: list[_Report] = self._gather(_Report.of(_digest(fingerprint), outcomes, failure))
        if failure is not None:
            raise failure
        _raise_first_failure(reports, trainer.generation + 1)
        if any(report.digest != reports[0].digest for report in reports):
            # Exchange whole fingerprints only if digests differ, to report the difference.
            _check_same(self._gather(fingerprint), trainer.generation + 1)
        return [outcome for report in reports for outcome in report.outcomes()]

    def share(self, chunks: Sequence[Chunk], rank: int | None = None) -> Sequence[Chunk]:
        """Return the consecutive chunks that a process evaluates.

        Args:
            chunks: All chunks, in order.
            rank: Index of the process; this one if None.
        """
        rank = self.rank if rank is None else rank
        return chunks[len(chunks) * rank // self.size : len(chunks) * (rank + 1) // self.size]

    def own_part(self, chunks: Sequence[Chunk], bytes_of_sums: int, seconds_of_noise: float) -> Sequence[Chunk]:
        """Return this process's chunks if sums are exchanged, else all chunks."""
        if self.exchange == "auto":
            saved = seconds_of_noise * (1 - 1 / self.size)
            self._sums = saved > _SECONDS_OF_LATENCY + bytes_of_sums / _BYTES_PER_SECOND
        else:
            self._sums = self.exchange == "sums"
        return self.share(chunks) if self._sums else chunks

    def add_up(self, totals: Mapping[str, Tensor]) -> None:
        """Add the totals of all processes, if sums are exchanged."""
        if not self._sums:
            return
        # One reduction for all parameters on a device saves rounds of communication.
        for device in {total.device for total in totals.values()}:
            group = [total for total in totals.values() if total.device == device]
            flat = torch.cat([total.flatten() for total in group])
            self.bytes_sent += flat.nbytes
            reduced = self._reduced(flat)
            for total, part in zip(group, reduced.split([total.numel() for total in group]), strict=True):
                total.copy_(part.view_as(total))

    def from_main(self, function: Callable[[], T]) -> T:
        """Run ``function`` in the first process, and return its result, or raise its exception, in all of them."""
        result: list[Any] = [None, None]
        failure: BaseException | None = None
        if self.rank == 0:
            try:
                result[0] = function()
            except BaseException as error:
                failure, result[1] = error, _portable(error)
        dist.broadcast_object_list(result, 0, group=self._host)
        if failure is not None:
            raise failure
        if result[1] is not None:
            raise result[1]
        return result[0]

    def copy_main(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with those of the first process."""
        for tensor in tensors:
            received = tensor.detach().cpu().contiguous()
            dist.broadcast(received, 0, group=self._host)
            if self.rank != 0:
                with torch.no_grad():
                    tensor.copy_(received)

    def _reduced(self, flat: Tensor) -> Tensor:
        if flat.device.type in _backends():
            dist.all_reduce(flat)
            return flat
        on_host = flat.cpu()
        dist.all_reduce(on_host, group=self._host)
        return on_host

    def _gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in the order of ranks."""
        payload = pickle.dumps(value)
        self.bytes_sent += len(payload)
        payloads: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(payloads, payload, group=self._host)
        except RuntimeError as error:
            raise RuntimeError(
                f"process {self.rank} of {self.size} could not exchange scores: another one has ended, or took longer"
                f" than the process group's timeout ({error}). See the output of the other processes"
            ) from error
        return [pickle.loads(payload) for payload in payloads]

    def _fingerprint(self, trainer: Evaluator) -> dict[str, Any]:
        fingerprint = {**trainer.fingerprint(), "exchange": self.exchange}
        if self.check_every and trainer.generation % self.check_every == 0:
            fingerprint["parameters"] = trainer.checksum()
        return fingerprint


class _Report(NamedTuple):
    """The results that a process sends to the others: its share of a generation."""

    digest: bytes
    shapes: list[tuple[int, ...]]
    scores: np.ndarray[Any, Any]
    statistics: list[np.ndarray[Any, Any] | None]
    warnings: list[tuple[tuple[str, str], ...]]
    alone: list[str | None]
    noise: bool
    failure: BaseException | None

    @staticmethod
    def of(digest: bytes, outcomes: Sequence[Outcome], failure: BaseException | None) -> _Report:
        if failure is not None:
            return _Report(digest, [], np.zeros(0), [], [], [], False, _portable(failure))
        scores = packed(torch.cat([o.scores.flatten() for o in outcomes] or [torch.zeros(0, device="cpu")]))
        statistics = [None if o.statistics is None else o.statistics.numpy() for o in outcomes]
        shapes, warned = [tuple(outcome.scores.shape) for outcome in outcomes], [o.warnings for o in outcomes]
        alone = [outcome.alone for outcome in outcomes]
        noise = any(outcome.noise for outcome in outcomes)
        return _Report(digest, shapes, scores, statistics, warned, alone, noise, None)

    def outcomes(self) -> list[Outcome]:
        parts = torch.from_numpy(self.scores.astype(np.float64)).split([math.prod(shape) for shape in self.shapes])
        scores = [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return [
            Outcome(chunk, None if values is None else torch.from_numpy(values), warned, alone, self.noise)
            for chunk, values, warned, alone in zip(scores, self.statistics, self.warnings, self.alone, strict=True)
        ]


def _digest(fingerprint: Mapping[str, Any]) -> bytes:
    return hashlib.blake2b(repr(sorted(fingerprint.items())).encode(), digest_size=16).digest()


def is_launched() -> bool:
    """Return whether the environment variables are those of several processes, as set by ``torchrun``."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return dist.is_available() and all(name in os.environ for name in needed) and int(os.environ["WORLD_SIZE"]) > 1


def join_group() -> None:
    """Make the default process group from the environment variables of ``torchrun``."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        dist.init_process_group(backend, store=_fresh_store(rank, size), rank=rank, world_size=size)
    else:
        dist.init_process_group(backend)
    atexit.register(_leave_group)


def _fresh_store(rank: int, size: int) -> dist.Store:
    """Return a new store for this start of the group.

    torchrun's store survives restarts, with the addresses of processes that have ended. New processes would try to
    connect to these (https://github.com/pytorch/pytorch/issues/135712). So we only use it to ask the first process for
    the port of a new store. Each question has a random key, which no earlier process can have answered.
    """
    host = os.environ["MASTER_ADDR"]
    shared = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False)
    if rank != 0:
        question = secrets.token_hex(16)
        shared.set(f"eggroll/question/{rank}", question)
        store = dist.TCPStore(host, int(shared.get(f"eggroll/answer/{question}")), is_master=False)
        store.add("joined", 1)
        return store
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    while store.add("joined", 0) < size - 1:
        for other in range(1, size):
            if shared.check([f"eggroll/question/{other}"]):
                question = shared.get(f"eggroll/question/{other}").decode()
                shared.set(f"eggroll/answer/{question}", str(store.port))
        time.sleep(0.01)
    return store


def local_device(device: torch.device) -> torch.device:
    """Return ``device``; without an index, the accelerator of this process on its machine.

    Example:
        >>> local_device(torch.device("cpu"))
        device(type='cpu')
    """
    if device.type != "cpu" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device(device.type, int(os.environ["LOCAL_RANK"]))
    return device


def _backends() -> dict[str, str]:
    """Return the backend of the default group for each type of device."""
    parts = (part.partition(":") for part in dist.get_backend_config().split(","))
    return {device: backend for device, _, backend in parts}


def _leave_group() -> None:
    # A group that is still referenced would live until the interpreter exits, and its threads would abort the process.
    for engine in _engines:
        engine._host = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _portable(error: BaseException) -> BaseException:
    """Return the exception, or a ``RuntimeError`` with its text if it cannot be pickled."""
    # Any error in here means that it cannot be pickled.
    with contextlib.suppress(Exception):
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def _raise_first_failure(reports: Sequence[_Report], generation: int) -> None:
    for rank, report in enumerate(reports):
        error = report.failure
        if error is None:
            continue
        if not isinstance(error, Exception):
            # KeyboardInterrupt or SystemExit.
            raise error
        message = f"process {rank} failed in generation {generation}: {type(error).__name__}: {error}"
        raise (torch.OutOfMemoryError if is_out_of_memory(error) else RuntimeError)(message) from error


def _check_same(fingerprints: Sequence[Mapping[str, Any]], generation: int) -> None:
    first = fingerprints[0]
    for key in first:
        values = [fingerprint.get(key) for fingerprint in fingerprints]
        others = [rank for rank, value in enumerate(values) if value != values[0]]
        if others:
            shown = ", ".join(f"{rank}: {values[rank]!r}" for rank in [0, *others][:5])
            raise RuntimeError(
                f"the processes do not agree on {key} in generation {generation}: processes {others} differ from"
                f" process 0 ({shown}). All must run the same script with the same arguments, on the same kind of"
                " device and with the same number of threads; the parameters were not changed in this generation"
            )
