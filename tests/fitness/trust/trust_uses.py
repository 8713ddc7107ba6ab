"""Variations: fitness functions with hooks, modes, control flow of their own, copies, and changed weights."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import decimal
import functools
import io
import itertools
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.overrides import TorchFunctionMode
from trust_oracle import Build, Fitness, Kind, Variation, X, Y, loss, of
from trust_outer import penalty, twice

# Hooks


def hook_that_collects(model: Any) -> float:
    seen: list[Tensor] = []
    handle = model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    score = twice(model)
    handle.remove()
    return score + sum(output.mean().item() for output in seen)


def hook_with_a_state(model: Any) -> float:
    """Scales the outputs of the first layer by how often it was called."""
    calls = itertools.count(1)
    with model[0].register_forward_hook(lambda module, args, output: output * next(calls)):
        return twice(model)


def pre_hook(model: Any) -> float:
    with model.register_forward_pre_hook(lambda module, args: (args[0] * 2,)):
        return twice(model)


def global_hook(model: Any) -> float:
    calls: list[str] = []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module).__name__)):
        return twice(model) + len(calls)


def hook_left_on(model: Any) -> float:
    model[2].register_forward_hook(lambda module, args, output: output * 2)
    return twice(model)


def hook_that_stops(model: Any) -> float:
    """Leaves the forward by an exception, as feature extractors do."""
    features: list[Tensor] = []

    def stop(module: nn.Module, args: Any, output: Tensor) -> None:
        features.append(output)
        raise StopIteration

    with model[1].register_forward_hook(stop), contextlib.suppress(StopIteration):
        model(X)
    return loss(features[0][:, :2])


def outer_hook(model: nn.Module) -> Fitness:
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))  # type: ignore[index]

    def fitness(model: Any) -> float:
        seen.clear()
        return twice(model) + sum(output.mean().item() for output in seen)

    return fitness


def outer_hook_that_counts(model: nn.Module) -> Fitness:
    calls = itertools.count(1)
    model[1].register_forward_hook(lambda module, args, output: output / next(calls))  # type: ignore[index]
    return twice


# Modes and contexts that are on while the model is called, by all members at once


def in_context(make: Callable[[], Any]) -> Fitness:
    """A call inside and one outside a context."""

    def fitness(model: Any) -> float:
        with make():
            first = model(X)
        return loss(first) + loss(model(torch.cat([first, X[:, :2]], 1)))

    return fitness


@torch.no_grad()
def no_grad_decorator(model: Any) -> float:
    return twice(model)


@torch.inference_mode()
def inference_mode_decorator(model: Any) -> float:
    return twice(model)


def modes_by_member(model: Any) -> float:
    """Which mode is on depends on the member."""
    score = loss(model(X))
    with torch.no_grad() if int(-1000 * score) % 2 else torch.enable_grad():
        enabled = torch.is_grad_enabled()
        score += loss(model(2 * X))
        assert torch.is_grad_enabled() == enabled
        return score + enabled


def grad_left_off(model: Any) -> float:
    enabled = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    return twice(model) + enabled


def default_dtype_in_between(model: Any) -> float:
    torch.set_default_dtype(torch.float64)
    try:
        return twice(model) + torch.zeros(()).element_size()
    finally:
        torch.set_default_dtype(torch.float32)


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is torch.tanh else result


def precision(model: Any) -> float:
    """A decimal context of the member's own."""
    with decimal.localcontext() as context:
        context.prec = 5 + int(-10 * loss(model(X))) % 5
        score = loss(model(2 * X))
        return float(decimal.Decimal(score) + 0)


VARIABLE: contextvars.ContextVar[float] = contextvars.ContextVar("VARIABLE", default=1.0)


def context_variable(model: Any) -> float:
    token = VARIABLE.set(loss(model(X)))
    score = loss(model(2 * X)) * VARIABLE.get()
    VARIABLE.reset(token)
    return score + VARIABLE.get()


def environment_variable(model: Any) -> float:
    """An environment variable for the time of the call."""
    os.environ["EGGROLL_SCALE"] = repr(loss(model(X)))
    return loss(model(2 * X)) * float(os.environ.pop("EGGROLL_SCALE"))


def warnings_caught(model: Any) -> float:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        score = loss(model(X))
        warnings.warn("low" if score < -1 else "high", stacklevel=1)
        score += loss(model(2 * X))
    return score + len(caught)


def printed(model: Any) -> float:
    """Reads back what it has printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print(loss(model(X)))
        print(loss(model(2 * X)))
    return sum(float(line) for line in out.getvalue().split())


CONTEXTS: dict[str, Fitness] = {
    "no_grad": in_context(torch.no_grad),
    "inference_mode": in_context(torch.inference_mode),
    "enable_grad": in_context(torch.enable_grad),
    "function_mode": in_context(Doubling),
    "fork_rng": in_context(torch.random.fork_rng),
    "autocast": in_context(lambda: torch.autocast("cpu", torch.bfloat16)),
    "device": in_context(lambda: torch.device("cpu")),
    "saved_tensors": in_context(lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)),
    "errstate": in_context(lambda: np.errstate(all="raise")),
}


# Control flow, copies and changed weights


class Over(Exception):
    """The episode is over."""


def ends_by_exception(model: Any) -> float:
    def step(t: int) -> float:
        score = loss(model(X * (1 + t)))
        if score < -1.0 or t == 4:
            raise Over(t, score)
        return score

    total = 0.0
    try:
        for t in itertools.count():
            total += step(t)
    except Over as over:
        return total + over.args[0] + over.args[1]
    raise AssertionError


def wrong_shape_is_caught(model: Any) -> float:
    try:
        return loss(model(X[:, :3]))
    except RuntimeError:
        return twice(model)


def in_a_generator(model: Any) -> float:
    def scores() -> Iterator[float]:
        for t in range(1, 4):
            yield loss(model(X * t))

    return max(scores()) + sum(scores())


def by_recursion(model: Any, depth: int = 3) -> float:
    score = loss(model(X * depth))
    return score if depth == 0 or score < -3 else score + by_recursion(model, depth - 1)


def in_an_event_loop(model: Any) -> float:
    async def score(t: int) -> float:
        await asyncio.sleep(0)
        return loss(model(X * t))

    async def scores() -> float:
        return sum(await asyncio.gather(*(score(t) for t in range(1, 4))))

    return asyncio.run(scores())


def in_threads(model: Any) -> float:
    with ThreadPoolExecutor(2) as pool:
        return sum(map(loss, pool.map(model, [X, 2 * X])))


def exception_at_first(model: nn.Module) -> Fitness:
    """Fails at times, and tries again."""
    attempts = 0

    def fitness(model: Any) -> float:
        nonlocal attempts
        attempts = 0
        while True:
            try:
                attempts += 1
                score = loss(model(attempts * X))
                if attempts == 1:
                    raise Over
                return score
            except Over:
                continue

    return fitness


def deep_copy(model: Any) -> float:
    clone = copy.deepcopy(model)
    clone[2].weight.data.add_(1)
    return loss(clone(X)) + 2 * loss(model(X))


def deep_copy_of_a_weight_norm(model: Any) -> float:
    return loss(copy.deepcopy(model)(X)) + loss(model(2 * X))


def weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 2))


def state_dict(model: Any) -> float:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict({key: 2 * value for key, value in before.items()})
    score = loss(model(X))
    model.load_state_dict(before)
    return score + 2 * loss(model(X))


def saved(model: Any) -> float:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return loss(model(X)) + sum(value.sum().item() for value in torch.load(file, weights_only=True).values())


def pickled(model: Any) -> float:
    return twice(pickle.loads(pickle.dumps(model)))


def as_a_vector(model: Any) -> float:
    before = parameters_to_vector(model.parameters())
    with torch.no_grad():
        vector_to_parameters(before * 0.5, model.parameters())
        score = loss(model(X))
        vector_to_parameters(before, model.parameters())
        return score + 2 * loss(model(X)) + before.norm().item()


def weights_clipped(model: Any) -> float:
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.3, 0.3)
    return twice(model)


def trained_inside(model: Any) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(model(X), Y).backward()
        optimizer.step()
    return loss(model(X))


def gradient_of_the_input(model: Any) -> float:
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.mse_loss(model(x), Y), x)
    return gradient.square().sum().item() + loss(model(X))


def requires_grad_toggled(model: Any) -> float:
    frozen = [p.requires_grad_(False) for p in model[0].parameters()]
    output = model(X)
    trainable = sum(p.requires_grad for p in model.parameters())
    for p in frozen:
        p.requires_grad_(True)
    return loss(output) + trainable + output.requires_grad


def penalties(model: Any) -> float:
    return loss(model(X)) + penalty(model.parameters()) + penalty(model[2].parameters())


def parts(model: Any) -> float:
    return loss(model[2](model[:2](X))) + loss(model[2](model[0](X).relu()))


def vmapped(model: Any) -> float:
    return loss(torch.vmap(model)(X))


def jacobian(model: Any) -> float:
    return loss(model(X)) + torch.func.jacrev(model)(X[0]).square().sum().item()


def input_changed_in_place(model: Any) -> float:
    x, score = X.clone(), 0.0
    for _ in range(3):
        x[:, :2] = model(x).detach().tanh_()
        score += loss(x[:, :2])
    return score


def table_of_positions(model: nn.Module) -> Fitness:
    """A cache of what does not depend on weights."""

    @functools.lru_cache
    def positions(scale: float) -> Tensor:
        return scale * torch.arange(6, dtype=torch.float64)[:, None]

    return lambda model: loss(model(X + positions(0.1))) + loss(model(X + positions(0.2)))


def best_so_far(model: nn.Module) -> Fitness:
    """Keeps the best model, and returns what has nothing to do with it."""
    best: dict[str, Any] = {"score": -float("inf")}

    def fitness(model: Any) -> float:
        score = twice(model)
        if score > best["score"]:
            best.update(score=score, model=copy.deepcopy(model))
        return score

    return fitness


USES: list[Fitness] = [
    hook_that_collects, hook_with_a_state, pre_hook, global_hook, hook_that_stops, no_grad_decorator,
    inference_mode_decorator, modes_by_member, default_dtype_in_between, precision, context_variable,
    environment_variable, warnings_caught, printed, ends_by_exception, wrong_shape_is_caught, in_a_generator,
    by_recursion, in_an_event_loop, in_threads, deep_copy, state_dict, saved, pickled, as_a_vector, weights_clipped,
    trained_inside, gradient_of_the_input, requires_grad_toggled, penalties, parts, vmapped, jacobian,
    input_changed_in_place,
]  # fmt: skip
BUILDS: list[Build] = [outer_hook, exception_at_first, table_of_positions, best_so_far]

VARIATIONS = {
    **{build.__name__: Variation(build) for build in BUILDS},
    **{use.__name__: of(use) for use in USES},
    **{f"in_{name}": of(use) for name, use in CONTEXTS.items()},
    "deep_copy_of_a_weight_norm": of(deep_copy_of_a_weight_norm, make=weight_norm),
    "hook_left_on": of(hook_left_on, Kind.HISTORY),
    "outer_hook_that_counts": Variation(outer_hook_that_counts, Kind.HISTORY),
    "grad_left_off": of(grad_left_off),
}
