"""Batched forwards in tiles: the same numbers, within memory, and smaller tiles where memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from forwards import Several, population
from helpers import X, fitness, make, network, population_fitness
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, Population, VanillaESTrainer, batched
from eggroll_trainer._utils.memory import Budget, device_memory, live_bytes
from eggroll_trainer.population import forward

CPU = torch.device("cpu")


class TestTiles:
    @pytest.mark.parametrize("size", [1, 2, 3, 7, 33])
    @pytest.mark.parametrize("own", [False, True])
    def test_any_budget_gives_the_same(self, size: int, own: bool) -> None:
        model = Several().double()
        x = torch.randn(size, 5, 4, dtype=torch.float64) if own else X[:5].double()
        results = []
        for budget in (2, 20_000, None):
            members = population(model, size, budget=budget)
            results.append(members.each(x) if own else members(x))
        for result in results:
            for i in range(size):
                expected = members.member(i)(x[i] if own else x)
                torch.testing.assert_close(result["y"][i], expected["y"], rtol=0, atol=1e-12)
                torch.testing.assert_close(result["rest"][0][i], expected["rest"][0], rtol=0, atol=0)
                torch.testing.assert_close(result["rest"][2][0][i], expected["rest"][2][0], rtol=0, atol=1e-12)
            assert result["rest"][1] is None and result["rest"][2][1:] == ["text", 3]
            result["rest"][0][0] = -1
            assert size == 1 or result["rest"][0][1, 1] == 1, "members share memory"

    def test_a_call_stays_within_its_budget(self) -> None:
        model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        x = torch.randn(32, 4)
        members = population(model, 256)
        # One member's activations take 32 rows · 64 · 4 bytes = 8 kB, of which two or three are alive at a time.
        assert live_bytes(lambda: members(x)) > 256 * 2 * 8192
        for budget in (2**20, 2**22):
            bounded = population(model, 256, budget=budget)
            bounded(x)
            # Half of it is for calls; the results of all tiles come on top.
            assert budget // 8 < live_bytes(lambda b=bounded: b(x)) <= budget // 2 + 2 * 256 * 32 * 4  # type: ignore[misc]

    def test_dropout_is_independent_and_reproducible(self) -> None:
        model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5)).train()
        results = []
        for _ in range(2):
            torch.manual_seed(0)
            results.append(population(model, 16, budget=8192)(X) == 0)
        assert torch.equal(*results)
        assert len({tuple(row.flatten().tolist()) for row in results[0]}) == 16

    def test_counting_leaves_the_global_generator_alone(self) -> None:
        model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5)).train()
        members = population(model, 16)
        torch.manual_seed(0)
        first = members(X)
        torch.manual_seed(0)
        assert torch.equal(members(X), first)

    def test_memory_runs_out_in_a_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes: list[int] = []
        original = forward.batched

        def limited(call: forward.Call) -> Callable[..., Any]:
            function = original(call)

            def run(counter: Tensor, *rest: Any) -> Any:
                sizes.append(len(counter))
                if len(counter) > 4:
                    raise torch.OutOfMemoryError("no more")
                return function(counter, *rest)

            return run

        trainer, twin = (
            make(fitness_fn=population_fitness, population_size=32),
            make(fitness_fn=population_fitness, population_size=32),
        )
        monkeypatch.setattr(forward, "batched", limited)
        trainer.step()
        trainer.step()
        # Counted with 1 and 2 members; then halves until it fits, and never again.
        assert sizes == [1, 2, 32, 16, 8, *[4] * 8, *[4] * 8]
        monkeypatch.undo()
        twin.step(), twin.step()
        torch.testing.assert_close(trainer.current_params, twin.current_params)

    def test_numbers_are_measured_until_one_makes_no_difference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes: list[int] = []
        original = forward.batched

        def counted(call: forward.Call) -> Callable[..., Any]:
            function = original(call)
            return lambda counter, *rest: (sizes.append(len(counter)), function(counter, *rest))[1]  # type: ignore[func-returns-value]

        monkeypatch.setattr(forward, "batched", counted)
        members = population(Several(), 8)
        for i in range(10):
            members(X, scale=i / 7)
        assert sizes == [1, 2, 8, 1, 2, *[8] * 9]

        class Repeats(nn.Linear):
            def forward(self, x: Tensor, times: int = 1) -> Tensor:
                return super().forward(x).repeat(times, 1).sin()

        sizes.clear()
        members = population(Repeats(4, 3), 8, budget=20_000)
        for times in (1, 20, 4, 20):
            members(X, times)
        assert sizes == [1, 2, 8, 1, 2, *[1] * 8, 1, 2, *[2] * 4, *[1] * 8]

    def test_counting_forks_the_generators_of_the_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever they are: torch asks CUDA's module unless told."""
        forked: list[Any] = []
        original = torch.random.fork_rng

        def fork(devices: Any = (), **options: Any) -> Any:
            forked.append((list(devices), options.get("device_type")))
            return original([], device_type="cuda")

        members = population(network(), 4, budget=1000)
        monkeypatch.setattr(torch.random, "fork_rng", fork)
        monkeypatch.setattr(forward.Call, "devices", lambda self: [torch.device("xpu", 1)])
        members(X)
        assert forked == [([], "cuda"), ([torch.device("xpu", 1)], "xpu")]


class TestMemory:
    def test_live_bytes(self) -> None:
        x = torch.zeros(1000)

        def steps() -> Tensor:
            y = x + 1  # 4 kB
            z = torch.cat([y, y])  # 8 kB more
            del y
            return z[:500].view(5, 100) * 2  # and 2 kB

        assert live_bytes(steps) == 12_000
        # In place, and views of what was there before, cost nothing.
        assert live_bytes(lambda: x.add_(1).view(10, 100)[3]) == 0

    def test_budget(self) -> None:
        total, free = device_memory(CPU)
        assert 0 < free <= total
        default = Budget()
        assert max(default.chunk_bytes(CPU), default.kept_bytes(CPU), default.call_bytes(CPU)) <= free
        small = Budget(1000)
        assert small.chunk_bytes(CPU) + small.kept_bytes(CPU) + small.call_bytes(CPU) <= 1000

    def test_every_accelerator_is_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Module:
            def mem_get_info(self, device: torch.device) -> tuple[int, int]:
                assert device == torch.device("xpu", 1)
                return 300, 1000

            def memory_reserved(self, device: torch.device) -> int:
                return 200

            def memory_allocated(self, device: torch.device) -> int:
                return 50

        monkeypatch.setattr(torch, "get_device_module", lambda device: Module())
        assert device_memory(torch.device("xpu", 1)) == (1000, 450)
        # One that shares the system's memory has nothing to tell.
        monkeypatch.setattr(torch, "get_device_module", lambda device: object())
        assert device_memory(torch.device("mps"))[0] == device_memory(CPU)[0]

    @pytest.mark.parametrize("make_trainer", [EGGROLLTrainer, VanillaESTrainer])
    def test_chunks_follow_the_budget(self, make_trainer: Any) -> None:
        model = nn.Linear(100, 100)
        trainers = [
            make_trainer(
                model=model, fitness_fn=fitness, population_size=4096, noise_reuse=2, memory_budget=budget, seed=0
            )
            for budget in (None, 2**24, 2**20, 1)
        ]
        sizes = [next(iter(trainer._evaluator.chunks()))[1] for trainer in trainers]
        assert sizes[0] == 1024 and sizes[-1] == 2 and sorted(sizes, reverse=True) == sizes
        per_member = 4 * 300 * 1.5 if make_trainer is EGGROLLTrainer else 4 * 10_100 * 1.5
        assert sizes[2] == pytest.approx(2**18 / per_member, rel=0.2)

    @pytest.mark.parametrize("form", ["plain", "batched"])
    def test_memory_runs_out_in_a_chunk(self, form: str) -> None:
        seen: list[int] = []

        @batched
        def limited(members: Population) -> Tensor:
            seen.append(len(members))
            if len(members) > 6:
                raise torch.OutOfMemoryError("no more")
            return population_fitness(members)

        def plain(model: nn.Module) -> float:
            seen.append(1)
            if len(seen) == 20:
                raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")
            return fitness(model)

        options: dict[str, Any] = {"population_size": 24, "noise_reuse": 2}
        trainer = make(fitness_fn=limited if form == "batched" else plain, **options)
        with pytest.warns(RuntimeWarning, match="memory ran out with 24 members at a time"):
            trainer.step()
        trainer.step()
        if form == "batched":
            assert seen == [24, 12, *[6] * 4, *[6] * 4]
        twin = make(fitness_fn=population_fitness if form == "batched" else fitness, chunk_size=6, **options)
        twin.train(2, verbose=False)
        assert trainer.history["mean_fitness"] == pytest.approx(twin.history["mean_fitness"])

    def test_a_chunk_size_of_the_users_is_kept(self) -> None:
        @batched
        def hungry(members: Population) -> Tensor:
            raise torch.OutOfMemoryError("no more")

        for trainer in (make(fitness_fn=hungry, chunk_size=4), make(fitness_fn=hungry, noise_reuse=8)):
            with pytest.raises(torch.OutOfMemoryError, match="no more"):
                trainer.step()

    @pytest.mark.parametrize("make_trainer", [EGGROLLTrainer, VanillaESTrainer])
    def test_noise_kept_or_drawn_again_is_the_same(self, make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        trainers: list[Any] = [make(make_trainer, chunk_size=4, population_size=16, noise_reuse=2) for _ in range(3)]
        for trainer, kept in zip(trainers, (2**30, 0, 600), strict=True):
            monkeypatch.setattr(trainer._budget, "kept_bytes", lambda device, kept=kept: kept)
            trainer.train(3, verbose=False)
        assert torch.equal(trainers[0].current_params, trainers[1].current_params)
        assert torch.equal(trainers[0].current_params, trainers[2].current_params)


class TestEvaluationDtype:
    @pytest.mark.parametrize("form", [fitness, population_fitness], ids=["plain", "batched"])
    @pytest.mark.parametrize("options", [{}, {"coalesce": False}, {"compile": True}], ids=str)
    def test_scores_are_those_under_autocast(
        self, form: Any, options: dict[str, Any], eager_backend: list[Any]
    ) -> None:
        trainer = make(fitness_fn=form, evaluation_dtype=torch.bfloat16, population_size=32, **options)
        wide = make(fitness_fn=form, population_size=32)
        members = Population(wide.model, wide._method.perturbations(0, 32))
        with torch.autocast("cpu", torch.bfloat16):
            expected = torch.tensor([fitness(members.member(i)) for i in range(32)], dtype=torch.float64)
        scores = trainer._evaluator.evaluate(0, 32).scores
        # bf16 keeps 8 bits; a dense member rounds its weights, a low-rank one its factors.
        torch.testing.assert_close(scores, expected, rtol=0.05, atol=0.02)
        assert not torch.equal(scores, wide._evaluator.evaluate(0, 32).scores)
        assert not torch.is_autocast_enabled("cpu")

    def test_weights_and_update_stay_wide(self) -> None:
        trainer = make(evaluation_dtype=torch.bfloat16, fitness_fn=population_fitness, population_size=256, sigma=0.1)
        twin = make(fitness_fn=population_fitness, population_size=256, sigma=0.1)
        before = trainer.current_params
        trainer.step(), twin.step()
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        steps = trainer.current_params - before, twin.current_params - before
        assert torch.nn.functional.cosine_similarity(*steps, dim=0) > 0.9

    def test_learns(self) -> None:
        trainer = make(evaluation_dtype=torch.bfloat16, model=network(), fitness_fn=population_fitness,
                       population_size=256, learning_rate=0.05)  # fmt: skip
        trainer.train(30, verbose=False)
        history = trainer.history["mean_fitness"]
        assert history[-1] > 0.5 * history[0]

    @pytest.mark.parametrize(
        ("value", "error"), [("bfloat16", TypeError), (torch.float32, ValueError), (torch.int8, ValueError)]
    )
    def test_bad_values(self, value: Any, error: type[Exception]) -> None:
        with pytest.raises(error, match="evaluation_dtype must be"):
            make(evaluation_dtype=value)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-5, ValueError), (1.5, TypeError), ("1GB", TypeError)])
def test_bad_budgets(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="memory_budget must be"):
        make(memory_budget=value)
