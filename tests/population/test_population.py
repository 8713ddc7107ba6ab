"""A population is its members: every batched call equals a loop over dense copies of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._pytree import tree_flatten

from eggroll_trainer import EGGROLLTrainer, Population, VanillaESTrainer, batched
from eggroll_trainer._utils.memory import Budget

N = 6


def make_population(model: nn.Module, trainer: type = EGGROLLTrainer, **options: Any) -> Population:
    """Return the first generation's population of a trainer of ``model``."""
    made = trainer(model=model, fitness_fn=batched(len), population_size=N, sigma=0.3, seed=3, noise_reuse=2, **options)
    return Population(model, made._method.perturbations(0, N))


def assert_equal(batch: Any, single: list[Any]) -> None:
    leaves, spec = tree_flatten(batch)
    singles = [tree_flatten(value) for value in single]
    assert all(s == spec for _, s in singles)
    for leaf, column in zip(leaves, zip(*(values for values, _ in singles), strict=True), strict=True):
        if isinstance(leaf, Tensor):
            expected = torch.stack(list(column))
            assert leaf.shape == expected.shape and leaf.dtype == expected.dtype
            assert (leaf - expected).abs().max() <= 1e-10 * expected.abs().max()
        else:
            assert all(leaf == value for value in column)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.position = nn.Parameter(torch.randn(1, 5, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.layer(self.embed(tokens) + self.position, src_mask=self.mask)
        return F.linear(self.norm(hidden), self.embed.weight)  # a tied head


class Odd(nn.Module):
    """Uses its parameters in ways that no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(9, 9))
        self.cube = nn.Parameter(torch.randn(7, 7, 7))
        self.bilinear = nn.Bilinear(9, 9, 12)
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.kept = [self.W]

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = torch.einsum("bi,ij->bj", x, self.W) @ self.kept[0].softmax(0)
        return {
            "y": y * self.gain,
            "z": (self.bilinear(x, y), self.cube.sum(), self.W.norm()),
            "penalty": torch.stack([p.square().sum() for p in self.parameters()]).sum(),
            "constant": 3,
            "none": None,
        }


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(9, 20), nn.Tanh(), nn.LayerNorm(20), nn.Linear(20, 3, bias=False))


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=3),
        nn.GroupNorm(3, 12), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 5),
    )  # fmt: skip


def parametrised() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(9, 12)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(12, 9)),
    )


def shared() -> nn.Module:
    layer = nn.Linear(9, 9)
    return nn.Sequential(layer, nn.Tanh(), layer)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(4, 9)),
    "convolutional": (convolutional, lambda: torch.randn(3, 2, 6, 6)),
    "attention": (Attention, lambda: torch.randint(0, 11, (3, 5))),
    "odd": (Odd, lambda: torch.randn(4, 9)),
    "parametrised": (parametrised, lambda: torch.randn(4, 9)),
    "shared": (shared, lambda: torch.randn(4, 9)),
    "lstm": (lambda: nn.LSTM(9, 10, 2, batch_first=True), lambda: torch.randn(3, 5, 9)),
    "gru": (lambda: nn.GRU(9, 10, bidirectional=True), lambda: torch.randn(5, 3, 9)),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make, inputs = MODELS[name]
        x = inputs()
        return make().double().eval(), x.double() if x.is_floating_point() else x


@pytest.mark.parametrize(
    "options", [{}, {"rank": 2}, {"trainer": VanillaESTrainer}], ids=["rank 1", "rank 2", "vanilla"]
)
@pytest.mark.parametrize("name", MODELS)
class TestCallsEqualDenseMembers:
    def test_shared_input(self, name: str, options: dict[str, Any]) -> None:
        model, x = build(name)
        population = make_population(model, **options)
        with torch.no_grad():
            assert_equal(population(x), [population.member(i)(x) for i in range(N)])

    def test_input_of_each(self, name: str, options: dict[str, Any]) -> None:
        model, x = build(name)
        population = make_population(model, **options)
        xs = torch.stack([x.roll(i, 0) for i in range(N)])
        with torch.no_grad():
            assert_equal(population.each(xs), [population.member(i)(xs[i]) for i in range(N)])

    def test_model_is_left_alone(self, name: str, options: dict[str, Any]) -> None:
        model, x = build(name)
        before, identities = copy.deepcopy(model.state_dict()), [id(p) for p in model.parameters()]
        with torch.no_grad():
            expected = model(x)
        make_population(model, **options)(x)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert identities == [id(p) for p in model.parameters()]
        with torch.no_grad():
            assert str(model(x)) == str(expected)


class State(NamedTuple):
    h: Tensor
    steps: Tensor


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(9, 10)
        self.head = nn.Linear(10, 2)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        h = self.cell(x, None if state is None else state.h)
        return self.head(h), State(h, torch.zeros(()) if state is None else state.steps + 1)


def test_recurrent_state_goes_in_and_out() -> None:
    torch.manual_seed(0)
    model, x = Recurrent().double(), torch.randn(N, 7, 3, 9, dtype=torch.float64)
    population = make_population(model)
    state = None
    outputs = []
    for t in range(7):
        out, state = population.each(x[:, t], state)
        outputs.append(out)
    assert state is not None and state.h.shape == (N, 3, 10) and state.steps.tolist() == [6] * N
    # The same input for all, but the state of each.
    mixed, _ = population.each(x[0, 0], state, in_dims=(None, 0))
    with torch.no_grad():
        for i in range(N):
            member, own = population.member(i), None
            for t in range(7):
                out, own = member(x[i, t], own)
                assert (out - outputs[t][i]).abs().max() < 1e-10
            assert (member(x[0, 0], own)[0] - mixed[i]).abs().max() < 1e-10


def test_keyword_arguments_and_nested_inputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, inputs: dict[str, Tensor], *, scale: float, shift: Tensor) -> Tensor:
            return self.layer(inputs["a"]) * scale + shift

    population = make_population(Model().double())
    a, shift = torch.randn(N, 2, 4).double(), torch.randn(N, 4).double()
    out = population.each({"a": a}, scale=2.0, shift=shift)
    with torch.no_grad():
        assert_equal(out, [population.member(i)({"a": a[i]}, scale=2.0, shift=shift[i]) for i in range(N)])


def test_len_and_members() -> None:
    model = mlp()
    population = make_population(model)
    assert len(population) == N and population.members == range(N)
    first, second = population.member(0), population.member(1)
    assert type(first) is type(model) and first is not model
    # An antithetic pair lies symmetrically around the centre.
    for p, a, b in zip(model.parameters(), first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close((a + b) / 2, p)
        assert not torch.equal(a, p)
    with pytest.raises(IndexError, match="member 6 of a population of 6"):
        population.member(6)


class Keeping(nn.Module):
    """Keeps what it has computed, with its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = prune.l1_unstructured(nn.Linear(3, 4), "weight", 0.5)
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept = [self.layer(x)]
        return self.kept[0]


@pytest.mark.parametrize(("budget", "kept"), [(None, [0, 2, 5]), (4 * 240, [2, 5]), (1, [5])])
def test_dense_weights_are_remembered_as_the_budget_allows(budget: int | None, kept: list[int]) -> None:
    # 120 bytes of weights; a quarter of the budget is for a chunk, as for its perturbations.
    population = make_population(nn.Linear(4, 6))
    population.forwards.budget = Budget(budget)
    assert population.remember([0, 2, 5]) == kept
    with population.holding(5):
        held = dict(population.model.named_parameters())["weight"]
        assert torch.equal(held, dict(population.member(5).named_parameters())["weight"])
    population.close()


def test_members_of_a_model_that_keeps_computed_tensors() -> None:
    model, x = Keeping(), torch.randn(5, 3)
    kept = model(x)
    population = make_population(model)
    member = population.member(1)
    weight = member.get_parameter("layer.weight_orig")
    assert torch.equal(weight, population.member_parameters(1)["layer.weight_orig"])
    expected = F.linear(x, weight * model.layer.weight_mask, member.get_parameter("layer.bias"))
    assert torch.allclose(member(x), expected) and model.kept[0] is kept and kept.requires_grad


def test_each_refuses_another_number_of_members() -> None:
    population = make_population(mlp())
    with pytest.raises(ValueError, match=r"each of the 6 members in dimension 0, got a tensor of shape \[5, 9\]"):
        population.each(torch.randn(5, 9))
    with pytest.raises(ValueError, match="in_dims has 2 entries for 1"):
        population.each(torch.randn(N, 9), in_dims=(0, 0))


def test_wrong_input_raises_the_models_own_error() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        make_population(mlp())(torch.randn(4, 8))


def test_batch_norm_in_training_mode_is_refused() -> None:
    model = convolutional().train()
    population = make_population(model)
    x = torch.randn(3, 2, 6, 6)
    with pytest.raises(ValueError, match=r"BatchNorm2d '1' is in training mode .* Call model.eval\(\)"):
        population(x)
    assert population.eval()(x).shape == (N, 3, 5)
    assert model.training and model[1].training and model.state_dict()["1.num_batches_tracked"] == 0


def test_dropout_is_independent_and_reproducible() -> None:
    model = nn.Sequential(nn.Linear(50, 50), nn.Dropout(0.5))
    model[0].load_state_dict({"weight": torch.zeros(50, 50), "bias": torch.ones(50)})
    trainer = EGGROLLTrainer(model=model, fitness_fn=batched(len), population_size=N, sigma=1e-6, seed=3)
    population = Population(model, trainer._method.perturbations(0, N))
    torch.manual_seed(0)
    masks = population(torch.zeros(50)) > 1
    torch.manual_seed(0)
    assert torch.equal(masks, population(torch.zeros(50)) > 1)
    assert len(masks.unique(dim=0)) == N
    # 300 fair coins: 6 deviations, 2e-9.
    assert abs(masks.double().mean() - 0.5) < 3 / 300**0.5
    assert (population.eval()(torch.zeros(50)) > 0.9).all()


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        y = self.layer(x)
        return (y if y.sum() > 0 else -2 * y), y.mean().item()


def test_a_model_that_cannot_be_batched_runs_once_for_each_member() -> None:
    torch.manual_seed(0)
    population = make_population(Branching().double())
    x = torch.randn(N, 3, 4, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="once for each member, not batched: .*data-dependent"):
        y, means = population.each(x)
    with torch.no_grad():
        expected = [population.member(i)(x[i]) for i in range(N)]
    torch.testing.assert_close(y, torch.stack([out for out, _ in expected]), rtol=1e-10, atol=0)
    torch.testing.assert_close(
        means.double(), torch.tensor([mean for _, mean in expected], dtype=torch.float64), rtol=1e-6, atol=0
    )
    population.each(x)  # said once


class Remembering(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.h = torch.zeros(4)
        self.seen: list[Tensor] = []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, what: str) -> Tensor:
        y = self.layer(x)
        if what == "attribute":
            self.h = y
        elif what == "list":
            self.seen.append(y)
        elif what == "buffer":
            self.calls += 1
        return y


@pytest.mark.parametrize(
    ("what", "name"), [("attribute", "h of Remembering"), ("list", "seen of Remembering"), ("buffer", "buffer calls")]
)
def test_a_forward_that_changes_the_model_is_refused_and_undone(what: str, name: str) -> None:
    model = Remembering()
    population, h = make_population(model), model.h
    with pytest.raises(ValueError, match=f"forward changes {name}: it would be lost"):
        population(torch.randn(4), what)
    assert model.h is h and model.seen == [] and model.calls == 0
    assert population(torch.randn(4), "nothing").shape == (N, 4)
