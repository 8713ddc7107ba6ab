"""Callbacks under test: how each is made, and which generations it has written down."""

from __future__ import annotations

import importlib
import json
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from eggroll_trainer import EGGROLLTrainer
from eggroll_trainer.callbacks import (
    CSV,
    Callback,
    Diagnosis,
    EarlyStopping,
    JSONLines,
    MLflow,
    Progress,
    TensorBoard,
    TimeLimit,
    WeightAverage,
    WeightsAndBiases,
)


class Case(NamedTuple):
    """A callback: how it is made in a folder, and how what it wrote is read as ``{generation: value}``."""

    make: Callable[[Path], Any]
    # Values of a metric by generation; None for a callback that writes nothing.
    read: Callable[[Path, str], list[tuple[int, float]]] | None = None
    needs: str = "torch"


def make_trainer(fitness: Callable[[nn.Module], float] | None = None, **options: Any) -> EGGROLLTrainer:
    """A small trainer, the same every time."""
    model = nn.Linear(3, 1)
    nn.init.ones_(model.weight), nn.init.zeros_(model.bias)
    x = torch.ones(1, 3)
    fitness = fitness or (lambda module: -abs(module(x).item()))
    return EGGROLLTrainer(model=model, fitness_fn=fitness, population_size=8, seed=0, coalesce=False, **options)


def interrupting(generation: int) -> Callable[[nn.Module], float]:
    """A fitness function that a Ctrl-C meets in a generation, once."""
    left = [8 * (generation - 1) + 3]

    def fitness(module: nn.Module) -> float:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return -abs(module(torch.ones(1, 3)).item())

    return fitness


def json_lines(folder: Path, metric: str) -> list[tuple[int, float]]:
    return [(line["generation"], line[metric]) for line in JSONLines(folder / "run.jsonl").read() if metric in line]


def table(folder: Path, metric: str) -> list[tuple[int, float]]:
    return [(row["generation"], row[metric]) for row in CSV(folder / "run.csv").read() if metric in row]


def events(folder: Path, metric: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder / "board")).Reload()
    return [(e.step, e.value) for e in shown.Scalars(metric)] if metric in shown.Tags()["scalars"] else []


def wandb_files(folder: Path, metric: str) -> list[tuple[int, float]]:
    """What the server would have after all offline parts were sent: the first value for each step."""
    found: dict[int, float] = {}
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for record in _offline_run(path):
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            if metric in items:
                found.setdefault(int(items["generation"]), items[metric])
    return sorted(found.items())


def _offline_run(path: Path) -> list[Any]:
    """The records of an offline run, which a process of W&B's may still be writing."""
    wandb_internal_pb2: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")

    until = time.monotonic() + 30
    while True:
        records = [wandb_internal_pb2.Record.FromString(data) for data in _leveldb_log(path.read_bytes())]
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        assert time.monotonic() < until, "the run was not written to its end"
        time.sleep(0.02)


def _leveldb_log(data: bytes) -> Iterator[bytes]:
    """The records of a file in the format of LevelDB's log, which W&B keeps offline runs in."""
    at, block, parts = 7, 32768, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        # Whole, first, middle, last.
        if kind in (1, 4):
            yield parts
            parts = b""


def mlflow_runs(folder: Path, metric: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    client: Any = MlflowClient(_uri(folder))
    (run,) = client.search_runs([client.get_experiment_by_name("eggroll").experiment_id])
    return sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, metric))


def _uri(folder: Path) -> str:
    return f"file://{folder}/mlruns"


def _wandb(folder: Path) -> Callback:
    import wandb

    # No threads that watch the machine, nor copies of what is printed.
    quick = wandb.Settings(console="off", silent=True, x_disable_stats=True, x_disable_meta=True)
    return WeightsAndBiases("tests", id="run", mode="offline", dir=str(folder), settings=quick)


def _mlflow(folder: Path) -> Callback:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    return MLflow("run", tracking_uri=_uri(folder))


CASES: dict[str, Case] = {
    "json lines": Case(lambda folder: JSONLines(folder / "run.jsonl"), json_lines),
    "csv": Case(lambda folder: CSV(folder / "run.csv"), table),
    "tensorboard": Case(lambda folder: TensorBoard(folder / "board"), events, "tensorboard"),
    "wandb": Case(_wandb, wandb_files, "wandb"),
    "mlflow": Case(_mlflow, mlflow_runs, "mlflow"),
    "progress": Case(lambda folder: Progress(5)),
    "early stopping": Case(lambda folder: EarlyStopping(patience=1000)),
    "time limit": Case(lambda folder: TimeLimit(1000)),
    "weight average": Case(lambda folder: WeightAverage(0.5)),
    "diagnosis": Case(lambda folder: Diagnosis(2)),
}


class Spy(Callback):
    """Writes down what is called."""

    def __init__(self, calls: list[Any], name: str = "", **does: Any) -> None:
        self.calls, self.name, self.does = calls, name, does

    def on_start(self, trainer: Any) -> None:
        self.calls.append((self.name, "start", trainer.generation))
        self._do("start", trainer, None)

    def on_generation(self, trainer: Any, metrics: Any) -> Any:
        self.calls.append((self.name, metrics["generation"]))
        return self._do(metrics["generation"], trainer, metrics)

    def on_end(self, trainer: Any) -> None:
        self.calls.append((self.name, "end", trainer.generation))
        self._do("end", trainer, None)

    def _do(self, when: Any, trainer: Any, metrics: Any) -> Any:
        action = self.does.get(f"at_{when}", None if metrics is None else self.does.get("always"))
        return action(trainer, metrics) if action is not None else None


def raising(error: BaseException) -> Callable[..., Any]:
    def action(*_: Any) -> None:
        raise error

    return action


def generations(values: Sequence[tuple[int, float]]) -> list[int]:
    return [int(generation) for generation, _ in values]
