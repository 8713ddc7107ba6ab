"""The oracle of trust: a score is what a loop over the members gives, with each one's weights in the user's own model.

A variation is a small model and a fitness function of one model. The function is run by a trainer, for all members in
whatever way the library sees fit, and by a plain loop that writes each member's weights into the model and calls the
function. The two are compared. Variations run in a process of their own, so that one that hangs can be ended.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from helpers import randn
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer
from eggroll_trainer.fitness.together import deadlock

N, GENERATIONS = 8, 2
# Seconds that a variation may take; each is a matter of milliseconds.
LIMIT = 20
X = randn(6, 4, dtype=torch.float64)
Y = torch.stack([X[:, 0] * X[:, 1], X[:, 2].sin()], 1)

Fitness = Callable[[Any], Any]
Build = Callable[[nn.Module], Fitness]


class Kind(Enum):
    """What decides a member's score, and so what is right."""

    # Its weights: the score is that of a loop, in whatever order.
    MEMBER = "member"
    # Its weights, and buffers that the evaluation changes: the score is that of a loop that puts them back.
    BUFFERS = "buffers"
    # Its weights, and numbers drawn from the global generators: the score is that of the members evaluated alone, and
    # the same seed gives the same.
    DRAWN = "drawn"
    # What earlier evaluations left behind: the score is that of a loop in order, or the library says something.
    HISTORY = "history"


class Variation(NamedTuple):
    """A fitness function to be judged.

    Attributes:
        build: From the user's model to the fitness function, with all that it shares between calls made afresh.
        kind: What decides a member's score.
        make: Returns the model, the same every time.
        chunk_size: How many members are evaluated at a time; all if None.
    """

    build: Build
    kind: Kind = Kind.MEMBER
    make: Callable[[], nn.Module] | None = None
    chunk_size: int | None = None


def of(fitness: Fitness, kind: Kind = Kind.MEMBER, make: Callable[[], nn.Module] | None = None) -> Variation:
    """Return the variation of a function that is made once, and shares what is global, if anything."""
    return Variation(lambda model: fitness, kind, make)


class Verdict(NamedTuple):
    """What a trainer made of a variation.

    Attributes:
        outcome: One of ``OUTCOMES``.
        detail: Scores that differ, or a traceback.
        warnings: What the library said.
    """

    outcome: str
    detail: str = ""
    warnings: tuple[str, ...] = ()


OUTCOMES = (
    "right",
    "right, with a warning",
    "wrong with a warning",
    "wrong silently",
    "raised",
    "hung",
    "bad variation",
)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def loss(output: Tensor) -> float:
    """Return a score of a model's output for ``X``."""
    return -(output - Y).square().mean().item()


def made(variation: Variation) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (variation.make or network)().double()


class Run:
    """Two generations of a variation under a trainer.

    Attributes:
        weights: All members' parameters in full, one ``[N, D]`` for each generation.
        scores: ``[generations · N]``.
        messages: The warnings.
    """

    def __init__(self, variation: Variation, *, coalesce: bool = True) -> None:
        model = made(variation)
        self.weights: list[Tensor] = []
        collected: list[Tensor] = []

        def shaping(scores: Tensor) -> Tensor:
            collected.append(scores.clone())
            return scores - scores.mean()

        trainer = EGGROLLTrainer(
            model=model,
            fitness_fn=variation.build(model),
            population_size=N,
            sigma=0.3,
            learning_rate=0.1,
            seed=5,
            shaping=shaping,
            chunk_size=variation.chunk_size,
            coalesce=coalesce,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(GENERATIONS):
                self.weights.append(trainer.current_params + trainer.sample_perturbations(N))
                trainer.step()
        self.messages = [str(warning.message) for warning in caught]
        self.scores = torch.cat(collected)


def loop(variation: Variation, weights: list[Tensor], *, undo: bool = True, backwards: bool = False) -> Tensor:
    """Return the scores of all members, ``[generations · N]``, called one after the other.

    Args:
        variation: The function.
        weights: As in :class:`Run`.
        undo: Whether to put the model back after each member; its weights are written anew in any case.
        backwards: Whether the last member of a generation comes first.
    """
    model = made(variation)
    fitness = variation.build(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    scores = torch.zeros(len(weights), N, dtype=torch.float64)
    for generation, members in enumerate(weights):
        for i in reversed(range(N)) if backwards else range(N):
            with _modes_kept(), _put_back(model) if undo else contextlib.nullcontext():
                with torch.no_grad():
                    for p, own in zip(trained, members[i].split([p.numel() for p in trained]), strict=True):
                        p.copy_(own.view_as(p))
                scores[generation, i] = float(fitness(model))
    return scores.flatten()


@contextlib.contextmanager
def _modes_kept() -> Iterator[None]:
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    yield
    torch.set_grad_enabled(grad)
    torch.set_default_dtype(dtype)


@contextlib.contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Put attributes, children, hooks, buffers and modes of a model back."""
    modules = list(model.modules())
    attributes = [(vars(module), dict(vars(module))) for module in modules]
    registers = [
        (value, dict(value)) for _, own in attributes for key, value in own.items() if _is_register(key, value)
    ]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    yield
    for live, saved in attributes + registers:
        live.clear()
        live.update(saved)
    for buffer, value in buffers:
        buffer.copy_(value)
    for p, requires_grad in frozen:
        p.requires_grad_(requires_grad).grad = None


def _is_register(key: str, value: Any) -> bool:
    return isinstance(value, dict) and (key.endswith("hooks") or key in ("_parameters", "_buffers", "_modules"))


def same(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-9, atol=1e-12)


def judge(variation: Variation) -> Verdict:
    """Run a variation under a trainer and in a loop, and compare."""
    try:
        run = Run(variation)
    except Exception:
        return Verdict("raised", traceback.format_exc(limit=-6))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            accepted = _accepted(variation, run)
        except Exception:
            return Verdict("bad variation", traceback.format_exc(limit=-6))
    unrelated = {str(warning.message) for warning in caught}
    said = tuple(message for message in run.messages if message not in unrelated)
    if any(same(run.scores, expected) for expected in accepted):
        return Verdict("right, with a warning" if said else "right", "", said)
    detail = f"{run.scores.tolist()} instead of {accepted[0].tolist()}"
    return Verdict("wrong with a warning" if said else "wrong silently", detail, said)


def _accepted(variation: Variation, run: Run) -> list[Tensor]:
    """Return the scores that are right; assert that the variation is of its kind."""
    if variation.kind is Kind.DRAWN:
        alone = Run(variation, coalesce=False).scores
        repeated = Run(variation).scores
        return [alone] if same(repeated, run.scores) else [torch.full_like(alone, torch.nan)]
    expected = loop(variation, run.weights)
    assert len(expected.unique()) > N // 2, f"few members differ: {expected.tolist()}"
    left = loop(variation, run.weights, undo=False)
    backwards = loop(variation, run.weights, backwards=True)
    if variation.kind is Kind.HISTORY:
        assert not same(expected, backwards) or not same(expected, left), "nothing is left behind by an evaluation"
        return [expected, left]
    assert same(expected, backwards), "the score of a member depends on others"
    if variation.kind is Kind.MEMBER:
        assert same(expected, left), "the score of a member depends on what others leave in the model"
    return [expected]


class Judge:
    """Judges variations in another process, which is replaced when it hangs.

    Args:
        table: Where the variations are, as ``module.attribute``.
    """

    def __init__(self, table: str) -> None:
        self.table = table
        self._process: Any = None
        self._connection: Any = None

    def __call__(self, name: str) -> Verdict:
        """Judge the variation of this name."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(self.table, theirs))
            self._process.start()
            theirs.close()
        self._connection.send(name)
        try:
            verdict: Verdict = self._connection.recv()
        except (EOFError, OSError):
            self.close()
            return Verdict("hung", f"ended after {LIMIT} s, or it crashed; see the traceback on stderr")
        return verdict

    def close(self) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.join(5)
            if self._process.is_alive():
                self._process.kill()
            self._process.join()
            self._process = None


def _serve(table: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    # Of a process in which nothing else computes.
    deadlock._PATIENCE = 0.5
    module, _, attribute = table.rpartition(".")
    variations: Mapping[str, Variation] = getattr(import_module(module), attribute)
    with contextlib.suppress(EOFError):
        while True:
            name = connection.recv()
            # Whatever hangs, in Python or below: a traceback, and the end of this process.
            faulthandler.dump_traceback_later(LIMIT, exit=True, file=2)
            verdict = judge(variations[name])
            faulthandler.cancel_dump_traceback_later()
            connection.send(verdict)


def count(verdicts: Mapping[str, Verdict]) -> dict[str, int]:
    """Return how many verdicts there are of each outcome."""
    counts = Counter(verdict.outcome for verdict in verdicts.values())
    return {outcome: counts[outcome] for outcome in OUTCOMES}
