"""Plain fitness functions, run for all members together: the numbers of one dense copy per member, in few forwards."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coalescing_oracle import CHUNK, UNDONE, N, Net, Run, X, Y, assert_coalesced, compare, loss, made, untouched
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from eggroll_trainer import EGGROLLTrainer
from eggroll_trainer.fitness.together import deadlock

Fitness = Callable[[Any], Any]


# Functions that only call the model: each call is one batched forward, and nothing is said.


def plain(model: Any) -> float:
    return loss(model(X))


def numpy_scalar(model: Any) -> Any:
    return np.float32(loss(model(X)))


def zero_dimensional(model: Any) -> Tensor:
    return -(model(X) - Y).square().mean()


def loop_over_batches(model: Any) -> float:
    total = 0.0
    for start in range(0, 12, 4):
        total += F.mse_loss(model(X[start : start + 4]), Y[start : start + 4]).item()
    return -total


def data_loader(model: Any) -> float:
    batches = DataLoader(TensorDataset(X, Y), batch_size=6)
    return -sum(F.mse_loss(model(x), y).item() for x, y in batches)


def keyword_arguments(model: Any) -> float:
    return loss(model(x=X, scale=2.0))


def own_inputs(model: Any) -> float:
    first = model(X)
    return loss(first) + loss(model(torch.cat([first, X[:, :2]], 1)))


def output_changed_in_place(model: Any) -> float:
    output = model(X)
    output.add_(1)
    other = model(X)
    other[:, 0] = 0
    return loss(output) + loss(other)


def output_is_the_next_input(model: Any) -> float:
    x, total = X.clone(), 0.0
    for _ in range(3):
        y = model(x)
        x[:, :2] = y.tanh_()
        total += loss(y)
    return total


def no_grad(model: Any) -> float:
    with torch.no_grad():
        return loss(model(X))


def inference_mode(model: Any) -> float:
    with torch.inference_mode():
        assert torch.is_inference_mode_enabled()
        value = loss(model(X))
        assert torch.is_inference_mode_enabled()
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    return value


def evaluation_mode(model: Any) -> float:
    model.eval()
    assert not model.training and not model.body[0].training
    return loss(model(X))


CALLS: dict[Fitness, int] = {
    plain: 1, numpy_scalar: 1, zero_dimensional: 1, loop_over_batches: 3, data_loader: 2, keyword_arguments: 1,
    own_inputs: 2, output_changed_in_place: 2, output_is_the_next_input: 3, no_grad: 1, inference_mode: 1,
    evaluation_mode: 1,
}  # fmt: skip


@pytest.mark.parametrize(("fitness", "calls"), CALLS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_each_call_is_one_forward(fitness: Fitness, calls: int) -> None:
    assert_coalesced(compare(Net, fitness), calls)


# Functions that use the model as their own: the right number, however it comes about.


def parts(model: Any) -> float:
    return loss(model.head(model.body[2:](model.body[:2](X)))) + loss(
        model.head(model.body[1](model.body[0](X)[:, :6]))
    )


def own_method(model: Any) -> float:
    return loss(model.act(X))


def forward_itself(model: Any) -> float:
    return loss(model.forward(X))


def branching(model: Any) -> float:
    value = loss(model(X))
    if value > -1:
        value += loss(model(2 * X))
    for _ in range(int(-2 * value)):
        value += loss(model.head(model.body(X)))
    return value


def norm_penalty(model: Any) -> float:
    before = sum(p.square().sum().item() for p in model.parameters())
    value = loss(model(X))
    return value - 1e-3 * before - 1e-3 * sum(p.data.abs().sum().item() for p in model.parameters())


def device_of_the_model(model: Any) -> float:
    device = next(model.parameters()).device
    return loss(model.to(device)(X.to(device)))


def weights_changed_in_place(model: Any) -> float:
    before = loss(model(X))
    model.head.weight.data.add_(1.0)
    with torch.no_grad():
        model.body[0].bias.mul_(1.5)
    return before + loss(model(X))


def weights_loaded(model: Any) -> float:
    model.load_state_dict({key: 2 * value for key, value in model.state_dict().items()})
    return loss(model(X))


def trained_inside(model: Any) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(model(X), Y).backward()
        optimizer.step()
    return loss(model(X))


def gradient_of_an_input(model: Any) -> float:
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.mse_loss(model(x), Y), x)
    return gradient.square().sum().item()


def deep_copy(model: Any) -> float:
    clone = copy.deepcopy(model)
    assert type(clone) is Net
    clone.head.weight.data.add_(1)
    return loss(clone(X)) + loss(model(X))


def pickled(model: Any) -> float:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = made(Net)
    other.load_state_dict(torch.load(file, weights_only=True))
    clone = pickle.loads(pickle.dumps(model))
    assert type(clone) is Net and type(clone.head) is nn.Linear
    return loss(clone(X)) + loss(other(X))


def identity(model: Any) -> float:
    reference = made(Net)
    assert isinstance(model, Net) and type(model).__name__ == "Net" and isinstance(model.head, nn.Linear)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in reference.named_parameters()]
    assert list(model.state_dict()) == list(reference.state_dict())
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())
    return loss(model(X))


def hooks(model: Any) -> float:
    seen: list[Tensor] = []
    handle = model.body[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    value = loss(model(X))
    handle.remove()
    return value + seen[0].mean().item() + loss(model(X))


def attributes(model: Any) -> float:
    model.temperature = 3.0
    model.offset.add_(1)
    model.head = nn.Sequential(model.head, nn.Tanh())
    return loss(model(X)) + model.temperature


def one_child_trains(model: Any) -> float:
    model.eval()
    model.body[0].train()
    assert model.body[0].training and not model.head.training
    return loss(model(X))


def nested_modes(model: Any) -> float:
    state = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
    kind = int(100 * model(X).mean().item()) % 4
    blocks: list[Callable[[], Any]] = [
        torch.no_grad,
        torch.enable_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
    ]
    total = 0.0
    for depth in range(3):
        with contextlib.ExitStack() as stack:
            for level in range((kind + depth) % 4):
                stack.enter_context(blocks[(kind + level) % 4]())
            inside = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
            output = model(X)
            after = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
            assert inside == after
            # In bf16 a batch and a single model round differently.
            total += loss(output) if output.dtype == X.dtype else 0.0
        assert state == (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
    return total


def modes_left_on(model: Any) -> float:
    torch.set_grad_enabled(False)
    return loss(model(X))


def other_threads(model: Any) -> float:
    with ThreadPoolExecutor(2) as pool:
        return sum(map(loss, pool.map(model, [X, 2 * X])))


def event_loop(model: Any) -> float:
    async def score() -> float:
        await asyncio.sleep(0)
        return loss(model(X))

    return asyncio.run(score())


VARIABLE: contextvars.ContextVar[float] = contextvars.ContextVar("VARIABLE", default=0.0)


def context_variable(model: Any) -> float:
    value = loss(model(X))
    VARIABLE.set(value)
    value += loss(model(2 * X))
    return value + VARIABLE.get()


def default_device(model: Any) -> float:
    with torch.device("cpu"):
        return loss(model(X))


def caught_error(model: Any) -> float:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(X[:, :3])
    return loss(model(X))


def warnings_caught(model: Any) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = loss(model(X))
        warnings.warn("not to be seen", stacklevel=1)
    return value


def seeded(model: Any) -> float:
    torch.manual_seed(0)
    return sum(loss(model(torch.randn(12, 4, dtype=torch.float64))) for _ in range(3))


SHARED_ARRAY = np.zeros((12, 4))
SHARED_TENSOR = torch.zeros(12, 4, dtype=torch.float64)


def refilled_array(model: Any) -> float:
    total = 0.0
    for i in range(3):
        SHARED_ARRAY[:] = X.numpy() * (i + 1 + total)
        total += loss(model(torch.from_numpy(SHARED_ARRAY)))
    return total


def refilled_tensor(model: Any) -> float:
    total = 0.0
    for i in range(3):
        SHARED_TENSOR.copy_(X * (i + 1 + total))
        total += loss(model(SHARED_TENSOR))
    return total


LOCK = threading.Lock()


def locked(model: Any) -> float:
    with LOCK:
        return loss(model(X))


USES = [
    parts, own_method, forward_itself, branching, norm_penalty, device_of_the_model, weights_changed_in_place,
    weights_loaded, trained_inside, gradient_of_an_input, deep_copy, pickled, identity, hooks, attributes,
    one_child_trains, nested_modes, modes_left_on, other_threads, event_loop, context_variable, default_device,
    caught_error, warnings_caught, seeded, refilled_array, refilled_tensor, locked,
]  # fmt: skip


@pytest.mark.parametrize("fitness", USES)
def test_the_model_is_the_members_own(fitness: Fitness, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a deadlock where other threads, of the tests' own workers say, wait for something else.
    monkeypatch.setattr(deadlock, "_PATIENCE", 0.5)
    monkeypatch.setattr(deadlock, "_LONG_PATIENCE", 1.0)
    run = compare(Net, fitness)
    assert sum(UNDONE not in message for message in run.messages) <= 1, "one warning says why"


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
