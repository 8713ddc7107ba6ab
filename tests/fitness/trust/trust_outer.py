"""Variations: fitness functions that hold the model, or parts of it, besides being given it.

Each builder gets the user's own model and returns a function of a model, which is the same one.
"""

from __future__ import annotations

import copy
import functools
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trust_oracle import Build, Fitness, Variation, X, loss


def twice(model: Any) -> float:
    """Two calls, the second on what the first returned."""
    first = model(X)
    return loss(first) + loss(model(torch.cat([first, X[:, :2]], 1)))


def penalty(parameters: Any) -> float:
    return -1e-2 * sum(p.square().sum().item() for p in parameters)


def outer_model(model: nn.Module) -> Fitness:
    return lambda _: twice(model)


def outer_children(model: nn.Module) -> Fitness:
    first, act, last = model.children()
    return lambda _: loss(last(act(first(X))))


def outer_and_argument(model: nn.Module) -> Fitness:
    return lambda argument: loss(model(X)) + 2 * loss(argument(-X))


def bound_forward(model: nn.Module) -> Fitness:
    forward = model.forward
    return lambda _: loss(forward(X))


def bound_call(model: nn.Module) -> Fitness:
    call = model.__call__
    return lambda _: loss(call(X))


def partial_of_the_model(model: nn.Module) -> Fitness:
    call = functools.partial(model, X)
    return lambda _: loss(call())


def models_by_id(model: nn.Module) -> Fitness:
    modules = {id(module): module for module in model.modules()}
    return lambda argument: twice(modules[id(argument)])


def children_by_id(model: nn.Module) -> Fitness:
    scales = {id(child): 1.0 + i for i, child in enumerate(model.children())}
    return lambda argument: sum(scales[id(child)] for child in argument.children()) * loss(argument(X))


def modules_by_name(model: nn.Module) -> Fitness:
    modules = dict(model.named_modules())
    return lambda _: loss(modules["2"](modules["1"](modules["0"](X))))


def modules_as_keys(model: nn.Module) -> Fitness:
    names = {module: name for name, module in model.named_modules()}
    return lambda argument: loss(argument(X)) + len(names[argument[2]])


def identity(model: nn.Module) -> Fitness:
    return lambda argument: loss(argument(X)) + float(argument is model)


def kept_parameters(model: nn.Module) -> Fitness:
    W, b, V, c = model.parameters()
    return lambda _: loss(F.linear(torch.tanh(F.linear(X, W, b)), V, c))


def kept_penalty(model: nn.Module) -> Fitness:
    parameters = list(model.parameters())
    return lambda argument: loss(argument(X)) + penalty(parameters)


def penalty_of_the_outer_model(model: nn.Module) -> Fitness:
    return lambda argument: loss(argument(X)) + penalty(model.parameters())


def penalty_of_the_argument(model: nn.Module) -> Fitness:
    return lambda argument: loss(model(X)) + penalty(argument.parameters())


def parameters_of_an_optimizer(model: nn.Module) -> Fitness:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return lambda argument: loss(argument(X)) + penalty(optimizer.param_groups[0]["params"])


def functional_call(model: nn.Module) -> Fitness:
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    return lambda argument: loss(torch.func.functional_call(argument, parameters, X))


def weak_reference(model: nn.Module) -> Fitness:
    reference = weakref.ref(model)
    return lambda _: twice(reference())


def wrapped_in_a_module(model: nn.Module) -> Fitness:
    wrapped = nn.Sequential(nn.Tanh(), model, nn.Tanh())
    return lambda _: loss(wrapped(X))


def list_of_models(model: nn.Module) -> Fitness:
    models = [(0.5, model), (2.0, model)]
    return lambda _: loss(sum(weight * member(X) for weight, member in models))


def method_of_a_task(model: nn.Module) -> Fitness:
    class Task:
        def __init__(self) -> None:
            self.model = model

        def score(self, _: Any) -> float:
            return twice(self.model)

    return Task().score


def against_a_frozen_copy(model: nn.Module) -> Fitness:
    target = copy.deepcopy(model)
    return lambda argument: loss(argument(X) - target(X))


def data_parallel(model: nn.Module) -> Fitness:
    parallel = nn.DataParallel(model)
    return lambda _: loss(parallel(X))


OUTER: list[Build] = [
    outer_model, outer_children, outer_and_argument, bound_forward, bound_call, partial_of_the_model, models_by_id,
    children_by_id, modules_by_name, modules_as_keys, identity, kept_parameters, kept_penalty,
    penalty_of_the_outer_model, penalty_of_the_argument, parameters_of_an_optimizer, functional_call, weak_reference,
    wrapped_in_a_module, list_of_models, method_of_a_task, against_a_frozen_copy, data_parallel,
]  # fmt: skip

VARIATIONS = {build.__name__: Variation(build) for build in OUTER}
