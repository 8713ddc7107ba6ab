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
from coalescing_oracle import (
    UNDONE,
    Fitness,
    Net,
    X,
    Y,
    assert_coalesced,
    compare,
    loss,
    made,
    own_method,
    plain,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from eggroll_trainer.fitness.together import deadlock

# Functions that only call the model: each call is one batched forward, and nothing is said.


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
