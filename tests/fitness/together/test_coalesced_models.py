"""Models and environments that do more than compute, in plain functions of all members together."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from coalescing_oracle import (
    CHUNK,
    UNDONE,
    Fitness,
    N,
    Net,
    Run,
    X,
    assert_coalesced,
    compare,
    loss,
    made,
    own_method,
    plain,
    untouched,
)
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer

# Models that do more than compute.


class StoresState(Net):
    h: Tensor

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.h = self.body(x)
        return self.head(self.h)


class Counts(Net):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls += 1
        self.seen.append(x)
        return super().act(x) * self.calls * len(self.seen)


class Branches(Net):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        output = self.act(x)
        return output if output.sum() > 0 else -2 * output


class RawWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2))
        self.weights = [self.w]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weights[0] + self.b

    def act(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w) + self.b


class Recurrent(nn.Module):
    h: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(4, 6), nn.Linear(6, 2)

    def act(self, x: Tensor) -> Tensor:
        self.h = self.cell(x, self.h)
        return self.head(self.h)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.weight = self.a.weight
        self.blocks = nn.ModuleList([self.a, self.b, self.a])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x)


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Any:
        return {"out": self.inner(x), "n": 3, "none": None, "pair": (x, [x.mean()])}


def twice(model: Any) -> float:
    return loss(model(X)) + loss(model(X))


def episode(model: Any) -> float:
    return sum(loss(model.act(X * t)) for t in range(1, 4))


def tied_changed(model: Any) -> float:
    first = loss(model(X))
    with torch.no_grad():
        model.a.weight.mul_(2)
    assert model.b.weight is model.a.weight
    return first + loss(model(X)) + loss(model.head(model.b(X)))


def normalised(model: Any) -> float:
    output = model.eval()(X)
    assert output["n"] == 3 and output["none"] is None and output["pair"][0].shape == X.shape
    return loss(output["out"])


def array_input(model: Any) -> float:
    return loss(model(X.numpy()))


class TakesArrays(Net):
    def forward(self, x: Any, scale: float = 1.0) -> Tensor:
        return self.act(torch.as_tensor(x))


def reads_state(model: Any) -> float:
    model(X)
    return loss(model.head(model.h))


MODELS: list[tuple[Any, Fitness]] = [
    (StoresState, reads_state), (StoresState, twice), (Counts, twice), (Branches, twice), (RawWeights, plain),
    (RawWeights, own_method), (Recurrent, episode), (Tied, plain), (Tied, tied_changed), (Compiled, normalised),
    (TakesArrays, array_input), (lambda: torch.compile(Net(), backend="eager"), plain),
    (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Linear(6, 2)), twice),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # from torch's own compiler, at its import
@pytest.mark.parametrize(("make", "fitness"), MODELS, ids=lambda value: getattr(value, "__name__", ""))
def test_models_that_do_more_than_compute(make: Any, fitness: Fitness) -> None:
    run = compare(make, fitness)
    assert sum(UNDONE not in message for message in run.messages) <= 1, "one warning says why"


def test_recurrent_methods_are_batched_call_by_call() -> None:
    run = compare(Recurrent, episode)
    assert run.messages == []
    # One more, before it shows that members set an attribute.
    names = ["GRUCell", *["GRUCell", "Linear"] * 3]
    assert run.forwards[:7] == [(name, CHUNK) for name in names]
    assert run.forwards[7:] == [
        (name, members) for members in (N - CHUNK, CHUNK, N - CHUNK) for name in ["GRUCell", "Linear"] * 3
    ]


# Environments.


class Environment:
    def __init__(self) -> None:
        self.t = 0

    def reset(self) -> Tensor:
        self.t = 0
        return X

    def step(self, action: Tensor) -> Tensor:
        self.t += 1
        return X * (1 + self.t) + action.mean()


def rollout(environment: Environment, model: Any) -> float:
    observation, total = environment.reset(), 0.0
    for _ in range(3):
        action = model(observation)
        total += loss(action)
        observation = environment.step(action)
    return total


ENVIRONMENT = Environment()


def test_an_environment_of_all_is_stepped_by_one_member_at_a_time() -> None:
    run = compare(Net, lambda model: rollout(ENVIRONMENT, model))
    assert [members for _, members in run.forwards] == [CHUNK] * 3, "checked in the first chunk"
    assert len(run.messages) == 1 and "3rd call member 0 was given another input" in run.messages[0]


def test_environments_of_their_own_are_stepped_together() -> None:
    assert_coalesced(compare(Net, lambda model: rollout(Environment(), model)), 3)


# What cannot be served, and what goes wrong.


def test_batch_norm_in_training_mode_runs_alone() -> None:
    run = compare(Compiled, lambda model: loss(model(X)["out"]))
    assert len(run.messages) == 2 and UNDONE in run.messages[1] and "inner.1.running_mean" in run.messages[1]


def test_dropout_is_each_members_own_and_follows_the_seed() -> None:
    def scores(seed: int) -> Tensor:
        return Run(lambda: nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5)), plain, coalesce=True, seed=seed).scores

    assert torch.equal(scores(5), scores(5)) and not torch.equal(scores(5), scores(6))
    # Almost no perturbation: members differ by their masks alone.
    run = Run(lambda: nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5)), plain, coalesce=True, sigma=1e-9)
    assert len(run.scores.round(decimals=6).unique()) > N


def test_scripted_models_run_one_at_a_time() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted: Any = torch.jit.script
        run = compare(lambda: scripted(nn.Sequential(nn.Linear(4, 2))), plain)
    assert len(run.messages) == 1 and "TorchScript" in run.messages[0]


def test_an_exception_ends_all_members_in_order() -> None:
    values: list[float] = []
    ended: list[bool] = []
    failing = True

    def fitness(model: Any) -> float:
        try:
            with torch.no_grad():
                value = loss(model(X))
                if failing and abs(value - bad) < 1e-9:
                    raise KeyError("no such thing")
                return value + loss(model(2 * X))
        finally:
            ended.append(torch.is_grad_enabled())

    def trainer() -> EGGROLLTrainer:
        return EGGROLLTrainer(model=made(Net), fitness_fn=fitness, population_size=N, noise_reuse=2, seed=5)

    first = trainer()
    first._start_generation()
    for i in range(N):
        with first._evaluator.population(0, N).holding(i), torch.no_grad():
            values.append(loss(first.model(X)))
    bad = values[3]
    with untouched(first.model), pytest.raises(KeyError, match="no such thing") as raised:
        first.step()
    assert "member 3 of generation 1" in str(getattr(raised.value, "__notes__", raised.value))
    assert ended == [True] * (N + 1), "their blocks were left, and their modes with them; one ran alone as well"
    failing = False
    second = trainer()
    for run in (first, second):
        run.train(2, verbose=False)
    assert first.history == second.history and torch.equal(first.current_params, second.current_params)
