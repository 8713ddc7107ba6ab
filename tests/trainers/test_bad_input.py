"""Wrong arguments and settings: the error says what to mend, and leaves everything as it was."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    ADAM,
    INF,
    NAN,
    POPULATION,
    assert_same,
    global_generator_untouched,
    goes_on,
    make,
    network,
)
from torch import nn
from torch.optim.lr_scheduler import (
    CyclicLR,
    ExponentialLR,
    OneCycleLR,
    ReduceLROnPlateau,
)

from eggroll_trainer import VanillaESTrainer


class Closing(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        assert closure is not None, "needs a closure"
        return super().step(closure)


# Arguments of the constructor: what is given, the error, and what its message contains.

ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "population_size 0": ({"population_size": 0}, ValueError, "population_size must be at least 1, got 0"),
    "population_size negative": ({"population_size": -8}, ValueError, "population_size must be at least 1, got -8"),
    "population_size float": ({"population_size": 8.0}, TypeError, "population_size must be an integer, got float 8.0"),
    "population_size bool": ({"population_size": True}, TypeError, "population_size must be an integer, got bool True"),
    "population_size None": ({"population_size": None}, TypeError, "population_size must be an integer, got NoneType"),
    "population_size tensor": (
        {"population_size": torch.tensor(8.5)},
        TypeError,
        "population_size must be an integer, got Tensor tensor(8.5000)",
    ),
    "population_size odd with pairs": (
        {"population_size": 9, "noise_reuse": 2},
        ValueError,
        "population_size must be divisible by noise_reuse=2, got 9; the next one is 10",
    ),
    "population_size and noise_reuse": (
        {"population_size": 8, "noise_reuse": 3},
        ValueError,
        "population_size must be divisible by noise_reuse=3, got 8; the next one is 9",
    ),
    "population_size and group_size": (
        {"population_size": 8, "group_size": 5},
        ValueError,
        "population_size must be divisible by group_size=5, got 8; the next one is 10",
    ),
    "group_size too large": (
        {"population_size": 8, "group_size": 16},
        ValueError,
        "population_size must be divisible by group_size=16, got 8; the next one is 16",
    ),
    "group_size and noise_reuse": (
        {"population_size": 12, "group_size": 3, "noise_reuse": 2},
        ValueError,
        "group_size must be divisible by noise_reuse=2, got 3; the next one is 4",
    ),
    "group_size 1": ({"group_size": 1}, ValueError, "group_size must be at least 2"),
    "group_size negative": ({"group_size": -1}, ValueError, "group_size must be at least 0, got -1"),
    "noise_reuse negative": ({"noise_reuse": -2}, ValueError, "noise_reuse must be at least 0, got -2"),
    "noise_reuse bool": ({"noise_reuse": True}, TypeError, "noise_reuse must be an integer, got bool True"),
    "rank 0": ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
    "rank negative": ({"rank": -1}, ValueError, "rank must be at least 1, got -1"),
    "rank float": ({"rank": 1.0}, TypeError, "rank must be an integer, got float 1.0"),
    "sigma 0": ({"sigma": 0}, ValueError, "sigma must be a finite number above 0, got 0.0"),
    "sigma negative": ({"sigma": -0.1}, ValueError, "sigma must be a finite number above 0, got -0.1"),
    "sigma NaN": ({"sigma": NAN}, ValueError, "sigma must be a finite number above 0, got nan"),
    "sigma inf": ({"sigma": INF}, ValueError, "sigma must be a finite number above 0, got inf"),
    "sigma string": ({"sigma": "0.1"}, TypeError, "sigma must be a number, got str '0.1'"),
    "sigma None": ({"sigma": None}, TypeError, "sigma must be a number, got NoneType"),
    "sigma vector": ({"sigma": torch.ones(2)}, TypeError, "sigma must be a number, got Tensor"),
    "learning_rate negative": (
        {"learning_rate": -0.1},
        ValueError,
        "learning_rate must be a finite number of at least 0, got -0.1",
    ),
    "learning_rate NaN": ({"learning_rate": NAN}, ValueError, "learning_rate must be a finite number of at least 0"),
    "learning_rate complex": ({"learning_rate": 1j}, TypeError, "learning_rate must be a number, got complex 1j"),
    "seed float": ({"seed": 1.5}, TypeError, "seed must be an integer, got float 1.5"),
    "seed string": ({"seed": "1"}, TypeError, "seed must be an integer, got str '1'"),
    "chunk_size 0": ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
    "chunk_size float": ({"chunk_size": 2.0}, TypeError, "chunk_size must be an integer, got float 2.0"),
    "chunk_size and noise_reuse": (
        {"chunk_size": 3, "noise_reuse": 2},
        ValueError,
        "chunk_size must be divisible by noise_reuse=2, got 3; the next one is 4",
    ),
    "model None": ({"model": None}, TypeError, "model must be a torch.nn.Module, got NoneType"),
    "model class": ({"model": nn.Linear}, TypeError, "model must be a torch.nn.Module, got type"),
    "model without parameters": ({"model": nn.Tanh()}, ValueError, "Tanh has no trainable parameters"),
    "model frozen": (
        {"model": network().requires_grad_(False)},
        ValueError,
        "Sequential has no trainable parameters (none with requires_grad=True)",
    ),
    "model uninitialised": (
        {"model": nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2))},
        ValueError,
        "parameter '1.weight' has no shape yet: run the model once",
    ),
    "model complex": (
        {"model": nn.Linear(2, 2, dtype=torch.complex64)},
        ValueError,
        "parameter 'weight' of torch.complex64, torch.strided cannot be perturbed; freeze it",
    ),
    "model float8": (
        {"model": nn.ParameterList([nn.Parameter(torch.ones(4).to(torch.float8_e5m2))])},
        ValueError,
        "parameter '0' of torch.float8_e5m2, torch.strided cannot be perturbed; freeze it",
    ),
    "model sparse": (
        {"model": nn.ParameterList([nn.Parameter(torch.eye(3).to_sparse())])},
        ValueError,
        "parameter '0' of torch.float32, torch.sparse_coo cannot be perturbed; freeze it",
    ),
    "model meta": (
        {"model": nn.Linear(2, 2, device="meta")},
        ValueError,
        "parameter 'weight' is on the meta device and has no values",
    ),
    "model empty": (
        {"model": nn.ParameterList([nn.Parameter(torch.empty(0))])},
        ValueError,
        "there is nothing to train: all parameters are empty",
    ),
    "nothing but vectors": (
        {"model": nn.LayerNorm(4), "freeze_nonlora": True},
        ValueError,
        "freeze_nonlora=True leaves nothing to train: no parameter is a matrix",
    ),
    "device": ({"device": "gpu"}, ValueError, "device must be a torch device such as 'cpu' or 'cuda:0', got 'gpu'"),
    "fitness_fn None": ({"fitness_fn": None}, TypeError, "fitness_fn must be callable, got NoneType"),
    "fitness_fn number": ({"fitness_fn": 1.0}, TypeError, "fitness_fn must be callable, got float"),
    "shaping name": (
        {"shaping": "ranks"},
        ValueError,
        "shaping must be one of 'zscore', 'centered_ranks', 'antithetic_sign', 'raw' or callable, got 'ranks'",
    ),
    "shaping None": ({"shaping": None}, TypeError, "shaping must be a name or a callable, got NoneType"),
    "antithetic_sign without pairs": (
        {"shaping": "antithetic_sign"},
        ValueError,
        "shaping 'antithetic_sign' compares the members of a pair and needs noise_reuse=2, got 0",
    ),
    "noise name": ({"noise": "cauchy"}, ValueError, "noise must be one of 'gaussian', 'rademacher', got 'cauchy'"),
    "optimizer instance": (
        {"optimizer": torch.optim.SGD([torch.zeros(1)], lr=0.1)},
        TypeError,
        "optimizer must be a factory such as torch.optim.Adam or a functools.partial of it, got a SGD",
    ),
    "optimizer nonsense": (
        {"optimizer": lambda params, lr: 5},
        TypeError,
        "optimizer must make a torch.optim.Optimizer from (params, lr=…)",
    ),
    "optimizer of others": (
        {"optimizer": lambda params, lr: torch.optim.SGD([torch.zeros(1)], lr=lr)},
        ValueError,
        "optimizer must be made from the parameter groups that the factory is given",
    ),
    "optimizer that evaluates a loss": (
        {"optimizer": torch.optim.LBFGS},
        ValueError,
        "optimizer LBFGS cannot take the steps of a trainer, which has a dense gradient and no loss to evaluate again",
    ),
    "optimizer for sparse gradients": (
        {"optimizer": torch.optim.SparseAdam},
        ValueError,
        "Use another one, such as torch.optim.SGD, Adam or AdamW",
    ),
    "optimizer that wants a closure": (
        {"optimizer": Closing},
        ValueError,
        "optimizer Closing cannot take the steps of a trainer",
    ),
    "optimizer that maximises": (
        {"optimizer": functools.partial(ADAM, maximize=True)},
        ValueError,
        "optimizer must not have maximize=True",
    ),
    "lr_scheduler number": ({"lr_scheduler": 3}, TypeError, "lr_scheduler must make a torch.optim.lr_scheduler"),
    "lr_scheduler nonsense": ({"lr_scheduler": lambda o: o}, TypeError, "lr_scheduler must make a torch.optim.lr_sch"),
    "lr_scheduler instance": (
        {"lr_scheduler": ExponentialLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), 0.9)},
        TypeError,
        "lr_scheduler must make a torch.optim.lr_scheduler from an optimizer, such as functools.partial(",
    ),
    "lr_scheduler of another": (
        {"lr_scheduler": lambda o: ExponentialLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), 0.9)},
        ValueError,
        "lr_scheduler must make its scheduler for the optimizer that it is given",
    ),
    "lr_scheduler for losses": ({"lr_scheduler": ReduceLROnPlateau}, ValueError, "make it with mode='max'"),
    "lr_scheduler with momentum": (
        {"lr_scheduler": functools.partial(OneCycleLR, max_lr=0.1, total_steps=5)},
        ValueError,
        "lr_scheduler cycles a momentum, which a trainer does not have: make it with cycle_momentum=False",
    ),
    "lr_scheduler with cycles of momentum": (
        {"lr_scheduler": functools.partial(CyclicLR, base_lr=0.01, max_lr=0.1)},
        ValueError,
        "lr_scheduler cycles a momentum, which a trainer does not have: make it with cycle_momentum=False",
    ),
    "lr_scheduler without its arguments": (
        {"lr_scheduler": functools.partial(OneCycleLR, max_lr=0.1, cycle_momentum=False)},
        ValueError,
        "You must define either total_steps OR (epochs AND steps_per_epoch)",
    ),
    "sigma_scheduler nonsense": ({"sigma_scheduler": "cosine"}, TypeError, "sigma_scheduler must make a torch.optim"),
    "sigma_scheduler for losses": ({"sigma_scheduler": ReduceLROnPlateau}, ValueError, "sigma_scheduler: ReduceLROnPl"),
    "anchor_decay negative": ({"anchor_decay": -0.1}, ValueError, "anchor_decay must be a finite number of at least 0"),
    "anchor_decay text": ({"anchor_decay": "much"}, TypeError, "anchor_decay must be a number, got str 'much'"),
    "anchor_decay beyond the anchor": (
        {"anchor_decay": 3.0, "learning_rate": 0.5},
        ValueError,
        "anchor_decay must be at most 1 / learning_rate = 2, got 3",
    ),
    "max_grad_norm zero": ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be a finite number above 0, got 0"),
    "max_grad_norm text": ({"max_grad_norm": "1"}, TypeError, "max_grad_norm must be a number, got str '1'"),
    "max_grad_norm by another name": ({"clip_norm": 1.0}, TypeError, "did you mean max_grad_norm?"),
    "unknown": ({"momentum": 0.9}, TypeError, "no argument 'momentum'; did you mean optimizer"),
}


@pytest.mark.parametrize("row", ARGUMENTS)
def test_arguments(row: str) -> None:
    options, error, text = ARGUMENTS[row]
    model = options.get("model", network())
    before = {k: v.clone() for k, v in network().state_dict().items()}
    with global_generator_untouched(), pytest.raises(error, match=re.escape(text)):
        make(**{"model": model, **options})
    if "model" not in options:
        assert_same(dict(model.state_dict()), before)
        # The model can be given to a trainer all the same.
        goes_on(make(model=model), make())


def first(model: nn.Sequential) -> nn.Linear:
    assert isinstance(model[0], nn.Linear)
    return model[0]


PARAMS: dict[str, tuple[Callable[[nn.Sequential], Any], type[Exception], str]] = {
    "empty": (lambda m: [], ValueError, "params is empty: pass model.parameters(), or leave it out"),
    "empty group": (lambda m: [{"params": []}, {"params": m.parameters()}], ValueError, "a parameter group is empty"),
    "used up": (lambda m: [list(p := m.parameters()), p][1], ValueError, "params is empty"),
    "foreign": (lambda m: [nn.Parameter(torch.ones(2))], ValueError, "a parameter that is not one of the model's"),
    "duplicate": (lambda m: [*m.parameters(), m[0].weight], ValueError, "parameter '0.weight' is in params twice"),
    "in two groups": (
        lambda m: [{"params": m.parameters()}, {"params": first(m).parameters()}],
        ValueError,
        "parameter '0.weight' is in params twice",
    ),
    "tensor": (
        lambda m: [first(m).weight.detach()],
        TypeError,
        "params must contain parameters of the model, got Tens",
    ),
    "one tensor": (lambda m: first(m).weight, TypeError, "got a Parameter"),
    "string": (lambda m: "0.weight", TypeError, "got a str"),
    "number": (lambda m: 3, TypeError, "params must be an iterable of parameters such as model.parameters()"),
    "names": (lambda m: ["0.weight"], TypeError, "params must contain parameters of the model, got str"),
    "module": (lambda m: m, TypeError, "got a Sequential; a model is passed as model="),
    "modules": (lambda m: [m], TypeError, "params must contain parameters of the model, got Sequential"),
    "one group": (lambda m: {"params": m.parameters()}, TypeError, "or a list of groups, got a dict"),
    "state dict": (lambda m: m.state_dict(), TypeError, "or a list of groups, got a OrderedDict"),
    "set": (lambda m: set(m.parameters()), TypeError, "got a set"),
    "group without params": (lambda m: [{"lr": 0.1}], ValueError, "a parameter group has no 'params', only ['lr']"),
    "mixed": (
        lambda m: [{"params": first(m).parameters()}, m[3].weight],
        TypeError,
        "params mixes parameters and groups",
    ),
    "unknown option": (
        lambda m: [{"params": m.parameters(), "momentum": 0.9}],
        ValueError,
        "parameter group has unknown options ['momentum']; known are ['anchor_decay', 'lr', 'rank', 'sigma']",
    ),
    "option out of range": (lambda m: [{"params": m.parameters(), "sigma": 0.0}], ValueError, "sigma must be a finite"),
    "group's rate": (lambda m: [{"params": m.parameters(), "lr": "1"}], TypeError, "learning_rate must be a number"),
    "group's rank": (
        lambda m: [{"params": first(m).parameters()}, {"params": m[3].parameters(), "rank": 0}],
        ValueError,
        "rank must be at least 1, got 0",
    ),
    "all frozen": (
        lambda m: first(m).requires_grad_(False).parameters(),
        ValueError,
        "every parameter in params is frozen (requires_grad=False)",
    ),
}


@pytest.mark.parametrize("row", PARAMS)
def test_params(row: str) -> None:
    make_params, error, text = PARAMS[row]
    model = network()
    with pytest.raises(error, match=re.escape(text)):
        make(model=model, params=make_params(model))
    assert_same(dict(model.state_dict()), dict(network().state_dict()))


def test_ranks_above_some_matrices_only_are_full_there() -> None:
    # The matrices are 8x4 and 2x8: rank 3 is more than the second can have, and its factors would be larger than it.
    trainer = make(rank=3)
    trainer.step()
    perturbations = trainer._centre.unflatten(trainer.sample_perturbations(4))
    assert perturbations["3.weight"].shape == (4, 2, 8)
    assert all(torch.linalg.matrix_rank(p) == 2 for p in perturbations["3.weight"])


def test_ranks_above_all_matrices_are_full_rank() -> None:
    # The numbers of full-rank evolution strategies, to the bit.
    full = make(VanillaESTrainer)
    full.train(2, verbose=False)
    for rank in (3, 4, 9, 10**6):
        trainer = make(rank=rank)
        trainer.train(2, verbose=False)
        assert torch.equal(trainer.current_params, full.current_params) and trainer.history == full.history
    small = make(model=nn.Linear(2, 1), fitness_fn=lambda m: m(torch.ones(2)).item(), rank=2)
    small.rank = 5
    small.step()
    assert small.rank == 5


def test_integers_of_every_kind_are_taken() -> None:
    trainer = make(population_size=np.int64(8), seed=torch.tensor(1), rank=np.int32(1), chunk_size=np.uint8(8))
    goes_on(trainer, make(chunk_size=8))
    assert type(trainer.population_size) is type(trainer.seed) is type(trainer.rank) is int
    trainer = make(seed=2**100)
    trainer.load_state_dict(trainer.state_dict())
    assert trainer.seed == 2**100


# What goes wrong after construction, without the fitness function's doing.

CALLS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "num_generations negative": (lambda t: t.train(-1), ValueError, "num_generations must be at least 0, got -1"),
    "num_generations float": (lambda t: t.train(1.0), TypeError, "num_generations must be an integer, got float 1.0"),
    "num_generations bool": (lambda t: t.train(True), TypeError, "num_generations must be an integer, got bool True"),
    "log_every 0": (lambda t: t.train(2, log_every=0), ValueError, "log_every must be at least 1, got 0"),
    "callback": (lambda t: t.train(2, callback="print"), TypeError, "an object with on_start, on_generation or on_end"),
    "learning_rate": (lambda t: setattr(t, "learning_rate", -1.0), ValueError, "learning_rate must be a finite number"),
    "sigma": (lambda t: setattr(t, "sigma", NAN), ValueError, "sigma must be a finite number above 0, got nan"),
    "rank": (lambda t: setattr(t, "rank", 0), ValueError, "rank must be at least 1, got 0"),
    "seed": (lambda t: setattr(t, "seed", 0.5), TypeError, "seed must be an integer, got float 0.5"),
    "a group": (
        lambda t: t.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
        RuntimeError,
        "parameter groups are given at construction; make a new trainer to add one",
    ),
    "perturbations": (
        lambda t: t.sample_perturbations(-1),
        ValueError,
        "population_size must be at least 1, got -1",
    ),
    "loading None": (lambda t: t.load_state_dict(None), ValueError, "state_dict is not the state of a trainer"),
    "loading a model": (lambda t: t.load_state_dict(t.model.state_dict()), ValueError, "is not the state of a trainer"),
    "loading half": (
        lambda t: t.load_state_dict({"format": 1}),
        ValueError,
        "incomplete or damaged: KeyError('centre')",
    ),
    "loading nonsense": (
        lambda t: t.load_state_dict({**t.state_dict(), "param_groups": 5}),
        ValueError,
        "incomplete or damaged",
    ),
    "loading a newer format": (
        lambda t: t.load_state_dict({**t.state_dict(), "format": 99}),
        ValueError,
        "state_dict has format 99 and this version of eggroll_trainer reads format 1",
    ),
}


@pytest.mark.parametrize("row", CALLS)
def test_calls(row: str) -> None:
    call, error, text = CALLS[row]
    trainer, twin = make(), make()
    goes_on(trainer, twin)
    with pytest.raises(error, match=re.escape(text)):
        call(trainer)
    goes_on(trainer, twin)


def remove_weight(trainer: Any) -> None:
    trainer.kept = trainer.model[0].weight
    del trainer.model[0].weight


def replace_weight(trainer: Any) -> None:
    remove_weight(trainer)
    trainer.model[0].weight = nn.Parameter(torch.ones(8, 4))


def put_weight_back(trainer: Any) -> None:
    trainer.model[0].weight = trainer.kept


# Live settings: (change, change back, error, text), found when the next generation begins.

LIVE: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], type[Exception], str]] = {
    "lr": (
        lambda t: t.param_groups[0].update(lr=NAN),
        lambda t: t.param_groups[0].update(lr=0.1),
        ValueError,
        "learning_rate must be a finite number of at least 0, got nan",
    ),
    "lr string": (
        lambda t: t.param_groups[0].update(lr="fast"),
        lambda t: t.param_groups[0].update(lr=0.1),
        TypeError,
        "learning_rate must be a number, got str 'fast'",
    ),
    "sigma": (
        lambda t: t.param_groups[0].update(sigma=0.0),
        lambda t: t.param_groups[0].update(sigma=0.1),
        ValueError,
        "sigma must be a finite number above 0, got 0.0",
    ),
    "rank": (
        lambda t: t.param_groups[0].update(rank=0),
        lambda t: t.param_groups[0].update(rank=1),
        ValueError,
        "rank must be at least 1, got 0",
    ),
    "population_size": (
        lambda t: setattr(t, "population_size", 9),
        lambda t: setattr(t, "population_size", POPULATION),
        ValueError,
        "population_size must be divisible by noise_reuse=2, got 9; the next one is 10",
    ),
    "chunk_size": (
        lambda t: setattr(t, "chunk_size", 3),
        lambda t: setattr(t, "chunk_size", None),
        ValueError,
        "chunk_size must be divisible by noise_reuse=2, got 3; the next one is 4",
    ),
    "parameter replaced": (
        replace_weight,
        put_weight_back,
        RuntimeError,
        "parameter '0.weight' of the model was replaced, converted, moved or reshaped after this trainer was made",
    ),
    "parameter removed": (
        remove_weight,
        put_weight_back,
        RuntimeError,
        "parameter '0.weight' of the model was replaced, converted, moved or reshaped after this trainer was made",
    ),
    "parameter reshaped": (
        lambda t: setattr(t.model[0].weight, "data", t.model[0].weight.data.T),
        lambda t: setattr(t.model[0].weight, "data", t.model[0].weight.data.T),
        RuntimeError,
        "parameter '0.weight' of the model was replaced, converted, moved or reshaped after this trainer was made",
    ),
    "model converted": (
        lambda t: t.model.double(),
        lambda t: t.model.float(),
        RuntimeError,
        "parameter '0.weight' of the model was replaced, converted, moved or reshaped after this trainer was made",
    ),
}


@pytest.mark.parametrize("row", LIVE)
def test_live_settings(row: str) -> None:
    change, back, error, text = LIVE[row]
    trainer, twin = make(noise_reuse=2), make(noise_reuse=2)
    goes_on(trainer, twin)
    change(trainer)
    with pytest.raises(error, match=re.escape(text)):
        trainer.step()
    back(trainer)
    goes_on(trainer, twin)
