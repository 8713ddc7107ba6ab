"""Folded evaluation: rows of all members in one batch are what each member gives for its own rows."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, Population, batched
from eggroll_trainer.noise.keys import keyed_generator
from eggroll_trainer.population.audit import Audit

N, Q = 6, 2


@batched
def ranks(population: Population) -> Tensor:
    return torch.arange(float(len(population)))


def population_of(model: nn.Module, size: int = N, sigma: float = 0.3, chunk_size: int | None = None) -> Population:
    trainer = EGGROLLTrainer(
        model=model, fitness_fn=ranks, population_size=size, sigma=sigma, seed=0, chunk_size=chunk_size
    )
    return next(iter(trainer.ask().chunks()))


class Net(nn.Module):
    """A layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.first = nn.Linear(8, 16)
        self.scale = nn.Parameter(torch.ones(16))
        self.second = nn.Linear(16, 3)

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        x = self.norm(self.table(ids))
        if positions is not None:
            x = x + self.table(positions)
        return self.second(torch.tanh(self.first(x)) * self.scale)


class Cache:
    """What a recurrent model keeps between calls, filled by the model itself."""

    def __init__(self) -> None:
        self.layers: list[dict[str, Any]] = []
        self.steps = 0
        self.lengths: tuple[Tensor, ...] = ()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(8, 5)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        if cache is None:
            cache = Cache()
        if not cache.layers:
            cache.layers.append({"h": x.new_zeros(x.shape[0], 5)})
            cache.lengths = (torch.zeros(x.shape[0], 1, dtype=x.dtype),)
        layer = cache.layers[0]
        h = torch.tanh(self.step(torch.cat([x, layer["h"]], -1)))
        layer["h"] = h
        cache.steps += 1
        cache.lengths = (cache.lengths[0] + h.sum(-1, keepdim=True),)
        return h, cache


class Preallocated(Recurrent):
    """Writes into memory that it has made, as a static cache does."""

    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        cache = Cache() if cache is None else cache
        if not cache.layers:
            cache.layers.append({"h": torch.zeros(x.shape[0], 4, 5, dtype=x.dtype)})
        memory = cache.layers[0]["h"]
        before = memory[:, cache.steps - 1] if cache.steps else torch.zeros(x.shape[0], 5, dtype=x.dtype)
        memory[:, cache.steps] = torch.tanh(self.step(torch.cat([x, before], -1)))
        cache.steps += 1
        return memory.sum(1), cache


class Branching(Recurrent):
    """Looks at values, so that members cannot be run at once: of an antithetic pair one is above the centre."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = self.step.weight.detach().sum().item()

    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        if self.step.weight.sum() > self.limit:
            x = -x
        return super().forward(x, cache)


def rows_of(value: Tensor, member: int) -> Tensor:
    return value.unflatten(0, (N, -1))[member]


@pytest.mark.parametrize("k", [1, 3])
def test_rows_see_their_members_weights(k: int) -> None:
    members = population_of(Net().double())
    ids = torch.randint(0, 11, (N * Q * k, 4))
    with members.folded(rows=Q) as model:
        out = model(ids, positions=torch.arange(4))
    for i in range(N):
        with members.holding(i):
            expected = members.model(rows_of(ids, i), positions=torch.arange(4))
        torch.testing.assert_close(rows_of(out, i), expected.detach(), rtol=0, atol=1e-12)


def test_parts_of_the_model_can_be_called() -> None:
    members = population_of(Net().double())
    x = torch.randn(N * Q, 8, dtype=torch.float64)
    with members.folded(rows=Q) as model:
        out = model.get_submodule("second")(torch.tanh(model.get_submodule("first")(x)))
    for i in range(N):
        own = members.member(i)
        expected = own.get_submodule("second")(torch.tanh(own.get_submodule("first")(rows_of(x, i))))
        torch.testing.assert_close(rows_of(out, i), expected.detach(), rtol=0, atol=1e-12)


def run(model: nn.Module, x: Tensor, steps: int = 3) -> tuple[Tensor, Cache]:
    cache = None
    for _ in range(steps):
        out, cache = model(x, cache)
    assert isinstance(cache, Cache)
    return out, cache


@pytest.mark.parametrize("cls", [Recurrent, Preallocated, Branching])
def test_a_cache_goes_in_and_out(cls: type[Recurrent]) -> None:
    members = population_of(cls().double())
    x = torch.randn(N * Q, 3, dtype=torch.float64)
    with warnings.catch_warnings():
        if cls is Branching:
            warnings.filterwarnings("ignore", "in population.folded")
        with members.folded(rows=Q) as model:
            out, cache = run(model, x)
    assert cache.steps == 3 and cache.layers[0]["h"].shape[0] == N * Q
    for i in range(N):
        with members.holding(i), torch.no_grad():
            expected, own = run(members.model, rows_of(x, i))
        torch.testing.assert_close(rows_of(out, i), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(rows_of(cache.layers[0]["h"], i), own.layers[0]["h"], rtol=0, atol=1e-12)
        for ours, theirs in zip(cache.lengths, own.lengths, strict=True):
            torch.testing.assert_close(rows_of(ours, i), theirs, rtol=0, atol=1e-12)


def test_one_warning_says_that_members_run_one_by_one() -> None:
    members = population_of(Branching())
    with (
        pytest.warns(RuntimeWarning, match="one member after the other") as warned,
        members.folded(rows=1) as model,
    ):
        run(model, torch.randn(N, 3))
    assert len(warned) == 1


def test_the_check_compares_members_with_themselves() -> None:
    members = population_of(Recurrent())
    members.audit = Audit([1, 4])
    with members.folded(rows=Q) as model:
        run(model, torch.randn(N * Q, 3))
    assert members.audit.calls == 6 and members.audit.found is None


def test_the_check_finds_rows_of_other_members() -> None:
    class Regroups(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flip(0) if torch._C._functorch.maybe_current_level() else super().forward(x)

    members = population_of(Regroups(3, 2))
    members.audit = Audit([1])
    with members.folded(rows=Q) as model:
        model(torch.randn(N * Q, 3))
    assert members.audit.found is not None and "for member 1" in members.audit.found


class TestDraws:
    @pytest.mark.parametrize(
        "draw",
        [
            lambda p: torch.multinomial(p, 3),
            lambda p: p.multinomial(num_samples=2, replacement=True),
            lambda p: torch.rand_like(p),
            lambda p: torch.bernoulli(p),
            lambda p: torch.empty_like(p).exponential_(),
            lambda p: torch.rand(len(p), 3),
            lambda p: torch.randn([len(p), 2], dtype=torch.float64),
            lambda p: torch.randint(0, 50, (len(p), 2)),
            lambda p: torch.randint(50, size=(len(p), 2)),
            lambda p: nn.functional.gumbel_softmax(p),
        ],
    )
    def test_each_member_draws_what_it_draws_alone(self, draw: Any) -> None:
        members = population_of(Net())
        p = torch.rand(N * Q, 7)
        state = torch.get_rng_state()
        with members.folded(rows=Q):
            first, second = draw(p), draw(p)
        with torch.random.fork_rng():
            for i in range(N):
                torch.set_rng_state(keyed_generator(*members.member_key(i)).get_state())
                assert torch.equal(rows_of(first, i), draw(rows_of(p, i)))
                assert torch.equal(rows_of(second, i), draw(rows_of(p, i)))
        assert torch.equal(torch.get_rng_state(), state)

    def test_blocks_of_one_evaluation_go_on(self) -> None:
        draws = []
        members = population_of(Net())
        for _ in range(2):
            with members.folded(rows=1):
                draws.append(torch.rand(N, 4))
        assert not torch.equal(*draws)

    def test_they_do_not_depend_on_the_chunk(self) -> None:
        def draws(chunk_size: int) -> Tensor:
            trainer = EGGROLLTrainer(
                model=Net(), fitness_fn=ranks, population_size=N, seed=3, chunk_size=chunk_size, sigma=0.1
            )
            found = []
            for chunk in trainer.ask().chunks():
                with chunk.folded(rows=Q):
                    found.append(torch.rand(len(chunk) * Q, 4))
            return torch.cat(found)

        assert torch.equal(draws(2), draws(6))

    def test_what_is_nobodys(self) -> None:
        with population_of(Net()).folded(rows=Q), pytest.raises(ValueError, match="rand in .* multiple of 12"):
            torch.rand(5)

    def test_functions_that_are_not_known(self) -> None:
        with (
            pytest.raises(RuntimeError, match="cannot draw for each member"),
            population_of(Net()).folded(rows=Q),
        ):
            torch.randperm(5)

    def test_dropout_in_the_model(self) -> None:
        members = population_of(nn.Sequential(nn.Linear(3, 400), nn.Dropout()))
        with members.train().folded(rows=Q) as model:
            out = model(torch.ones(N * Q, 3))
        assert not torch.equal(out[0] == 0, out[2] == 0)

    def test_a_generator_of_the_users_is_used(self) -> None:
        with population_of(Net()).folded(rows=Q):
            drawn = torch.rand(5, generator=torch.Generator().manual_seed(0))
        assert torch.equal(drawn, torch.rand(5, generator=torch.Generator().manual_seed(0)))


class TestBadInput:
    def test_rows(self) -> None:
        members = population_of(Net())
        with pytest.raises(ValueError, match="rows must be at least 1"):
            members.folded(rows=0)
        with members.folded(rows=Q) as model, pytest.raises(ValueError, match="multiple of 12"):
            model(torch.zeros(N * Q + 1, 4, dtype=torch.int64))

    def test_a_vector_as_long_as_there_are_rows(self) -> None:
        members = population_of(Net().double())
        ids, positions = torch.randint(0, 11, (N * Q, N * Q)), torch.arange(N * Q) % 11
        with members.folded(rows=Q) as model, pytest.raises(ValueError, match="a vector of 12 numbers"):
            model(ids, positions)
        with members.folded(rows=Q) as model:
            model(ids[:, :5], positions[:5])
            out = model(ids, positions)
        for i in range(N):
            with members.holding(i):
                expected = members.model(rows_of(ids, i), positions).detach()
            torch.testing.assert_close(rows_of(out, i), expected, rtol=0, atol=1e-12)

    def test_a_parameter_outside_of_a_call(self) -> None:
        with population_of(Net()).folded(rows=Q) as model:
            assert next(model.parameters()).dtype == torch.float32
            with pytest.raises(RuntimeError, match=r"'second\.weight' is used outside"):
                nn.functional.linear(torch.zeros(N * Q, 16), model.get_parameter("second.weight"))

    def test_a_changed_buffer(self) -> None:
        class Counts(Recurrent):
            def forward(self, x: Tensor, cache: Cache | None = None) -> Any:
                self.get_buffer("seen").add_(1)
                return super().forward(x, cache)

        members = population_of(Counts())
        with pytest.raises(ValueError, match="buffer seen"), members.folded(rows=Q) as model:
            run(model, torch.randn(N * Q, 3))
        assert members.model.get_buffer("seen") == 0

    def test_state_that_differs_between_members(self) -> None:
        class Keeps(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                self.last = super().forward(x)
                return self.last

        with (
            pytest.raises(RuntimeError, match="changes last of Keeps"),
            population_of(Keeps(3, 2)).folded(rows=Q) as model,
        ):
            model(torch.randn(N * Q, 3))

    def test_another_thread(self) -> None:
        errors: list[BaseException] = []

        def call(model: nn.Module) -> None:
            try:
                model(torch.zeros(N * Q, 4, dtype=torch.int64))
            except RuntimeError as error:
                errors.append(error)

        with population_of(Net()).folded(rows=Q) as model:
            thread = threading.Thread(target=call, args=(model,))
            thread.start()
            thread.join()
        assert "another thread" in str(errors[0])

    def test_all_members_of_a_generation(self) -> None:
        trainer = EGGROLLTrainer(model=Net(), fitness_fn=ranks, population_size=N, seed=0)
        with pytest.raises(TypeError, match="of a chunk"):
            trainer.ask().folded(rows=2)

    def test_the_model_is_its_own_again_after_an_error(self) -> None:
        members = population_of(Net())
        before = {name: p.detach().clone() for name, p in members.model.named_parameters()}
        with pytest.raises(ZeroDivisionError), members.folded(rows=Q) as model:
            model(torch.zeros(N * Q, 4, dtype=torch.int64))
            raise ZeroDivisionError
        assert all(type(p) is nn.Parameter for p in members.model.parameters())
        assert all(torch.equal(p, before[name]) for name, p in members.model.named_parameters())
        assert members.model(torch.zeros(3, 4, dtype=torch.int64)).shape == (3, 4, 3)
