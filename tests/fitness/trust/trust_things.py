"""Things with a state that the calls of a fitness function share: simulators, generators, meters, iterators, files."""

from __future__ import annotations

import collections
import functools
import itertools
import queue
import random
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from trust_oracle import X, loss


class Thing:
    """What the calls share: it gives the model's inputs, and may add to the score."""

    def reset(self) -> None:
        """Forget all that has happened."""

    def next(self, action: Tensor | None) -> Tensor:
        """Return the model's next input, given its last output."""
        raise NotImplementedError

    def total(self) -> float:
        return 0.0


def play(model: Any, thing: Thing, reset: bool = True) -> float:
    """The fitness function of this file: three steps."""
    if reset:
        thing.reset()
    score, x = 0.0, thing.next(None)
    for _ in range(3):
        action = model(x)
        score += loss(action)
        x = thing.next(action)
    return score + thing.total()


def go_on(model: Any, thing: Thing) -> float:
    return play(model, thing, reset=False)


# What is shared: simulators


class CountingSimulator(Thing):
    """A simulator that knows the time."""

    time = 0

    def reset(self) -> None:
        self.time = 0

    def next(self, action: Tensor | None) -> Tensor:
        self.time += 1
        return X * (1 + 0.1 * self.time)


class ArraySimulator(Thing):
    """A simulator whose state is a NumPy array, changed in place and given away as it is."""

    def __init__(self) -> None:
        self.state = np.zeros((6, 4))

    def reset(self) -> None:
        self.state[:] = 0

    def next(self, action: Tensor | None) -> Tensor:
        self.state += 0.1 if action is None else float(action.detach().tanh().mean())
        return X + torch.from_numpy(self.state)


class TensorSimulator(Thing):
    """A simulator that writes its state into one tensor, which is the model's input."""

    def __init__(self) -> None:
        self.state = X.clone()

    def reset(self) -> None:
        self.state.copy_(X)

    def next(self, action: Tensor | None) -> Tensor:
        if action is not None:
            self.state[:, :2] += action.detach().tanh()
        return self.state


class RewardingSimulator(Thing):
    """A simulator that always shows the same, and adds rewards up."""

    reward = 0.0

    def reset(self) -> None:
        self.reward = 0.0

    def next(self, action: Tensor | None) -> Tensor:
        self.reward = 0.5 * self.reward + (1.0 if action is None else action.mean().item())
        return X

    def total(self) -> float:
        return self.reward


class ThreadedSimulator(Thing):
    """A simulator in a thread of its own, behind two queues."""

    def __init__(self) -> None:
        self.asked: queue.Queue[Any] = queue.Queue()
        self.given: queue.Queue[Tensor] = queue.Queue()
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        simulator = ArraySimulator()
        while True:
            action = self.asked.get()
            if isinstance(action, str):
                simulator.reset()
            else:
                self.given.put(simulator.next(action))

    def reset(self) -> None:
        self.asked.put("reset")

    def next(self, action: Tensor | None) -> Tensor:
        self.asked.put(None if action is None else action.detach())
        return self.given.get()


class FrameStack(Thing):
    """The mean of the last three observations."""

    def __init__(self) -> None:
        self.frames: collections.deque[Tensor] = collections.deque([X], maxlen=3)

    def reset(self) -> None:
        self.frames.clear()

    def next(self, action: Tensor | None) -> Tensor:
        self.frames.append(X if action is None else X + action.detach().mean())
        return torch.stack(list(self.frames)).mean(0)


# Generators of random numbers


class TorchGenerator(Thing):
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def reset(self) -> None:
        self.generator.manual_seed(1)

    def next(self, action: Tensor | None) -> Tensor:
        return X + torch.randn(6, 4, generator=self.generator, dtype=torch.float64)


class NumPyGenerator(Thing):
    def __init__(self) -> None:
        self.generator = np.random.default_rng(1)
        self.start = self.generator.bit_generator.state

    def reset(self) -> None:
        self.generator.bit_generator.state = self.start

    def next(self, action: Tensor | None) -> Tensor:
        return X + torch.from_numpy(self.generator.normal(size=(6, 4)))


class NumPyRandomState(Thing):
    def __init__(self) -> None:
        self.generator = np.random.RandomState(1)

    def reset(self) -> None:
        self.generator.seed(1)

    def next(self, action: Tensor | None) -> Tensor:
        return X + torch.from_numpy(self.generator.normal(size=(6, 4)))


class PythonRandom(Thing):
    def __init__(self) -> None:
        self.generator = random.Random(1)

    def reset(self) -> None:
        self.generator.seed(1)

    def next(self, action: Tensor | None) -> Tensor:
        return X * self.generator.random()


# Meters and caches


class Meter(Thing):
    """A mean that is read at the end."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def reset(self) -> None:
        self.sum, self.count = 0.0, 0

    def next(self, action: Tensor | None) -> Tensor:
        self.sum += 0.0 if action is None else loss(action)
        self.count += 1
        return X

    def total(self) -> float:
        return self.sum / self.count


class TensorMeter(Thing):
    """A metric that adds up in a tensor in place."""

    def __init__(self) -> None:
        self.sum = torch.zeros(2, dtype=torch.float64)

    def reset(self) -> None:
        self.sum.zero_()

    def next(self, action: Tensor | None) -> Tensor:
        if action is not None:
            self.sum += action.detach().mean(0)
        return X

    def total(self) -> float:
        return self.sum.square().sum().item()


class ListOfOutputs(Thing):
    """All outputs, scored at the end."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def reset(self) -> None:
        self.outputs.clear()

    def next(self, action: Tensor | None) -> Tensor:
        if action is not None:
            self.outputs.append(action)
        return X * (1 + len(self.outputs) % 5)

    def total(self) -> float:
        return torch.stack(self.outputs).mean().item()


class Cache(Thing):
    """A cache of what was computed from the first output."""

    def __init__(self) -> None:
        self.cache: dict[str, Tensor] = {}

    def reset(self) -> None:
        self.cache = {}

    def next(self, action: Tensor | None) -> Tensor:
        if action is None:
            return X
        if "offset" not in self.cache:
            self.cache["offset"] = action.detach().mean()
        return X + self.cache["offset"]


class OneCell(Thing):
    """A counter in an array, as ``global`` would be."""

    def __init__(self) -> None:
        self.cell = [0]

    def reset(self) -> None:
        self.cell[0] = 0

    def next(self, action: Tensor | None) -> Tensor:
        self.cell[0] += 1
        return X + 0.1 * self.cell[0]


# Iterators and files


class IteratorOfInputs(Thing):
    """An iterator that never ends, kept between calls."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.iterator = self.start()

    def start(self) -> Iterator[Tensor]:
        return itertools.cycle([X * (1 + 0.2 * i) for i in range(5)])

    def next(self, action: Tensor | None) -> Tensor:
        return next(self.iterator)


class Counting(IteratorOfInputs):
    def start(self) -> Iterator[Tensor]:
        return (X + 0.1 * i for i in itertools.count())


class GeneratorFunction(IteratorOfInputs):
    """A coroutine that is sent the actions."""

    def start(self) -> Any:
        def simulate() -> Any:
            x = X
            while True:
                action = yield x
                x = x + (0.1 if action is None else action.detach().tanh().mean())

        generator = simulate()
        next(generator)
        return generator

    def next(self, action: Tensor | None) -> Tensor:
        return self.iterator.send(action)  # type: ignore[attr-defined]


class Batches(IteratorOfInputs):
    """The iterator of a DataLoader, begun again at its end."""

    def __init__(self) -> None:
        self.loader = DataLoader(TensorDataset(torch.cat([X * (1 + 0.2 * i) for i in range(5)])), batch_size=6)
        super().__init__()

    def start(self) -> Any:
        return itertools.chain.from_iterable(self.loader for _ in itertools.count())

    def next(self, action: Tensor | None) -> Tensor:
        return next(self.iterator)[0]


@functools.cache
def loader_with_a_worker() -> Any:
    """Return a DataLoader whose worker process stays: a second to start and to end, so there is one for all."""
    return DataLoader(Batches().loader.dataset, batch_size=6, num_workers=1, persistent_workers=True)


class BatchesOfAWorker(Batches):
    """The iterator of a DataLoader that is one and the same object for all epochs."""

    def reset(self) -> None:
        self.loader = loader_with_a_worker()
        super().reset()


class OpenFile(Thing):
    """A file of numbers that stays open, read line by line."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.file.writelines(f"{1 + 0.01 * i}\n" for i in range(400))
        self.reset()

    def reset(self) -> None:
        self.file.seek(0)

    def next(self, action: Tensor | None) -> Tensor:
        return X * float(self.file.readline())


class WrittenFile(Thing):
    """A file that is written and read back at the end."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile("w+")  # noqa: SIM115

    def reset(self) -> None:
        self.file.seek(0)
        self.file.truncate()

    def next(self, action: Tensor | None) -> Tensor:
        if action is not None:
            self.file.write(f"{action.mean().item()!r}\n")
        return X

    def total(self) -> float:
        self.file.seek(0)
        return sum(float(line) for line in self.file)


THINGS: list[type[Thing]] = [
    CountingSimulator, ArraySimulator, TensorSimulator, RewardingSimulator, ThreadedSimulator, FrameStack,
    TorchGenerator, NumPyGenerator, NumPyRandomState, PythonRandom,
    Meter, TensorMeter, ListOfOutputs, Cache, OneCell,
    IteratorOfInputs, Counting, GeneratorFunction, Batches, OpenFile, WrittenFile,
]  # fmt: skip
