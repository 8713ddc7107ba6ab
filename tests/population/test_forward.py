"""Batched forwards in tiles, compiled or not: the same numbers, within memory, and a way back where one is needed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import X, fitness, goes_on, make, network, population_fitness
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from eggroll_trainer import EGGROLLTrainer, Population, VanillaESTrainer, batched
from eggroll_trainer._utils.memory import Budget, device_memory, live_bytes
from eggroll_trainer.population import forward

CPU = torch.device("cpu")


@pytest.fixture
def eager_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """torch.compile without its code generation: what is traced, and how often, is the same, and takes no time."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(forward.Backend, "inner", staticmethod(backend))
    yield graphs
    torch._dynamo.reset()


def population(
    model: nn.Module, size: int, *, compile: bool = False, budget: int | None = None, **options: Any
) -> Population:
    trainer = EGGROLLTrainer(model=model, fitness_fn=fitness, population_size=size, sigma=0.3, seed=0, **options)
    forwards = forward.Forwards(compile=compile, budget=Budget(budget))
    return Population(model, trainer._method.perturbations(0, size), forwards=forwards)


class Several(nn.Module):
    """Returns more than a tensor, and what does not depend on the member."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("offset", torch.arange(3.0))
        self.factor = 2.0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Any:
        y = self.linear(x) * scale * self.factor + self.offset
        return {"y": y, "rest": (self.offset, None, [y.sum(-1), "text", 3])}


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


class TestCompiled:
    @pytest.mark.parametrize("form", [fitness, population_fitness], ids=["plain", "batched"])
    @pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
    def test_generated_code_gives_the_same(self, form: Any, noise: str) -> None:
        options: dict[str, Any] = {"fitness_fn": form, "population_size": 64, "noise_reuse": 2, "noise": noise}
        trainer, twin = make(compile=True, **options), make(**options)
        trainer.train(3, verbose=False)
        twin.train(3, verbose=False)
        torch.testing.assert_close(trainer.current_params, twin.current_params, rtol=1e-4, atol=1e-5)
        assert all(value is not None for value in trainer._forwards._compiled.values())

    @pytest.mark.parametrize("size", [1, 2, 3, 7, 33])
    @pytest.mark.parametrize("own", [False, True])
    def test_results_of_every_form(self, size: int, own: bool, eager_backend: list[Any]) -> None:
        model = Several().double()
        x = torch.randn(size, 5, 4, dtype=torch.float64) if own else X[:5].double()
        # For 20 kB the tiles have four or eight members, the last one partly those of the one before.
        members = population(model, size, compile=True, budget=20_000)
        for factor in (2.0, 3.0):
            model.factor = factor
            result = members.each(x, scale=0.5) if own else members(x, scale=0.5)
            for i in range(size):
                expected = members.member(i)(x[i] if own else x, scale=0.5)
                torch.testing.assert_close(result["y"][i], expected["y"], rtol=0, atol=1e-12)
                torch.testing.assert_close(result["rest"][2][0][i], expected["rest"][2][0], rtol=0, atol=1e-12)
            assert torch.equal(result["rest"][0], torch.arange(3.0).double().expand(size, 3))
            assert result["rest"][1] is None and result["rest"][2][1:] == ["text", 3]
        assert bool(eager_backend) == (size > 1)

    @pytest.mark.parametrize("budget", [None, 20_000])
    @pytest.mark.parametrize("reuse", [1, 2, 3])
    @pytest.mark.parametrize("rank", [1, 2])
    def test_members_that_share_draws(
        self, rank: int, reuse: int, budget: int | None, eager_backend: list[Any]
    ) -> None:
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6)).double()
        members = population(model, 42, compile=True, budget=budget, noise_reuse=reuse, rank=rank)
        x = X[:5].double()
        results = members(x)
        for i in range(42):
            torch.testing.assert_close(results[i], members.member(i)(x), rtol=0, atol=1e-12)
        assert len(eager_backend) == 1

    def test_called_in_inference_mode_first(self, eager_backend: list[Any]) -> None:
        members = population(Several(), 6)
        with torch.inference_mode():
            first = members(X)
        again = members(X)
        assert torch.equal(first["y"], again["y"]) and not again["y"].is_inference()

    def test_traced_once(self, eager_backend: list[Any]) -> None:
        trainer = make(compile=True, fitness_fn=population_fitness, chunk_size=4, population_size=14)
        trainer.train(2, verbose=False)
        assert len(eager_backend) == 1
        trainer.learning_rate, trainer.sigma = 0.5, 0.01
        trainer.train(2, verbose=False)
        trainer.reset()
        trainer.train(1, verbose=False)
        assert len(eager_backend) == 1

    def test_members_that_part_company(self, eager_backend: list[Any]) -> None:
        """Each call is made by another number of members."""

        def wandering(model: nn.Module) -> float:
            total = 0.0
            with torch.no_grad():
                for _ in range(6):
                    score = model(X[:1]).sum().item()
                    total += score
                    if score < 0:
                        break
            return total

        options: dict[str, Any] = {"fitness_fn": wandering, "population_size": 40, "sigma": 0.5}
        trainer, twin = make(compile=True, **options), make(**options)
        trainer.train(3, verbose=False)
        twin.train(3, verbose=False)
        assert trainer.history["mean_fitness"] == pytest.approx(twin.history["mean_fitness"], rel=1e-4)
        assert len(eager_backend) == 1

    def test_many_models_in_one_process(self, eager_backend: list[Any]) -> None:
        # torch.compile gives up on a function after eight versions of it.
        for width in range(3, 15):
            model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))
            make(model=model, compile=True, fitness_fn=population_fitness).step()
        assert len(eager_backend) == 12

    def test_what_cannot_be_traced_runs_eagerly(self) -> None:
        class Recurrent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lstm, self.head = nn.LSTM(4, 3), nn.Linear(3, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.lstm(x)[0])

        torch.manual_seed(0)
        model = Recurrent()
        trainer = make(model=model, compile=True, fitness_fn=population_fitness)
        with pytest.warns(RuntimeWarning, match="Recurrent is not compiled and runs eagerly: .*LSTM"):
            trainer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer.step()
        torch.manual_seed(0)
        twin = make(model=Recurrent(), fitness_fn=population_fitness)
        twin.train(2, verbose=False)
        torch.testing.assert_close(trainer.current_params, twin.current_params)

    def test_what_cannot_be_batched_has_one_warning(self, eager_backend: list[Any]) -> None:
        class Branching(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(4, 2)
                # Of an antithetic pair one is above it, the other below.
                self.limit = float(self.linear.weight.detach().sum())

            def forward(self, x: Tensor) -> Tensor:
                y = self.linear(x)
                return y if self.linear.weight.sum() > self.limit else -y

        trainer = make(model=Branching(), compile=True, fitness_fn=population_fitness)
        with pytest.warns(RuntimeWarning) as warned:
            trainer.train(2, verbose=False)
        assert [str(w.message).split(":")[0] for w in warned] == ["the model is run once for each member, not batched"]

    def test_an_endless_number_of_kinds(self, eager_backend: list[Any]) -> None:
        members = population(Several(), 4, compile=True)
        with pytest.warns(RuntimeWarning, match="called in more than 16 ways") as warned:
            for rows in range(1, 21):
                members(X[:rows])
        assert len(warned) == 1 and len(eager_backend) == 16

    @pytest.mark.parametrize("number", [float, int, complex])
    def test_a_number_that_never_comes_back(self, number: Any, eager_backend: list[Any]) -> None:
        members, x = population(Several().double(), 4, compile=True), X.double()
        with pytest.warns(RuntimeWarning, match=r"numbers that change.*Pass a number as a tensor") as warned:
            for i in range(40):
                # As for several chunks.
                for _ in range(2):
                    got = members(x, scale=number(i))["y"]
                torch.testing.assert_close(got[1], members.member(1)(x, scale=number(i))["y"])
        assert len(warned) == 1 and len(eager_backend) == 3

    def test_numbers_that_come_back_are_compiled(self, eager_backend: list[Any]) -> None:
        members = population(Several(), 4, compile=True)
        with pytest.warns(RuntimeWarning, match="numbers that change"):
            for _ in range(3):
                for task in range(10):
                    members(X, scale=task)
        assert len(eager_backend) == 10

    def test_a_number_in_a_tensor_is_compiled_once(self, eager_backend: list[Any]) -> None:
        members = population(Several(), 4, compile=True)
        for i in range(10):
            members(X, scale=torch.tensor(float(i)))
        assert len(eager_backend) == 1

    def test_compiled_for_the_largest_group(self, eager_backend: list[Any]) -> None:
        members = population(Several(), 256, compile=True)
        x = torch.randn(256, 5, 4)

        def run(count: int) -> list[int]:
            """The sizes for which it was traced."""
            eager_backend.clear()
            spec = tree_flatten(((x,), {}))[1]
            call = members._call_of(members.model, (x[:count],), {}, [0], range(count))
            result = members.forwards.run(call)
            torch.testing.assert_close(result["y"][count - 1], members.member(count - 1)(x[count - 1])["y"])
            assert call.spec == spec
            return [max(n.meta["example_value"].shape[0] for n in g.graph.nodes if n.op == "placeholder"
                        and n.meta["example_value"].shape[1:] == (5, 4)) for g in eager_backend]  # fmt: skip

        # Not for smaller groups, nor for one and a half times as many.
        assert [run(count) for count in (4, 2, 6, 7, 4)] == [[4], [], [], [], []]
        # Twice as many at first; then the factor doubles.
        assert [run(count) for count in (8, 16, 31, 256, 8, 255)] == [[8], [], [], [256], [], []]

    def test_what_is_remembered_is_bounded(self, eager_backend: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(forward, "_MAX_KINDS", 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for compile in (False, True):
                members = population(Several(), 3, compile=compile)
                for i in range(20):
                    members(X[: i + 1], scale=float(i))
                    members(X[:1], scale=float(i))
                    members.forwards.refused[i] = "why"
                remembered = members.forwards.__dict__.values()
                assert max(len(value) for value in remembered if isinstance(value, dict)) <= forward._MAX_COMPILED
                assert list(members.forwards.refused) == [16, 17, 18, 19]

    def test_dropout(self, eager_backend: list[Any]) -> None:
        members = population(nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5)).train(), 16, compile=True, budget=8192)
        zero = members(X) == 0
        assert len({tuple(row.flatten().tolist()) for row in zero}) == 16

    def test_resumes_to_the_bit(self, tmp_path: Any) -> None:
        trainer, twin = (make(compile=True, fitness_fn=population_fitness) for _ in range(2))
        trainer.train(2, verbose=False)
        trainer.save(tmp_path / "run.pt")
        twin.load(tmp_path / "run.pt")
        goes_on(trainer, twin)


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


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 5)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = self.cell(x, state)
        return state.sum(-1), state


class TestRepeated:
    @pytest.mark.parametrize("compile", [False, True])
    def test_calls_are_those_of_each_to_the_bit(self, compile: bool, eager_backend: list[Any]) -> None:
        members = population(Recurrent(), 6, compile=compile)
        xs = torch.randn(5, 6, 3, 4)
        state = expected_state = torch.zeros(6, 3, 5)
        with members.repeated() as each:
            for x in xs:
                y, state = each(x, state)
                expected, expected_state = members.each(x, expected_state)
                assert torch.equal(y, expected) and torch.equal(state, expected_state)

    @pytest.mark.parametrize("compile", [False, True])
    @pytest.mark.parametrize("chosen", [range(2, 5), (0, 3, 4), (5,), range(6)])
    def test_some_members(self, compile: bool, chosen: Any, eager_backend: list[Any]) -> None:
        members = population(Several().double(), 6, compile=compile)
        xs = torch.randn(3, 6, 5, 4, dtype=torch.float64)
        with members.repeated() as each:
            for x in xs:
                got, expected = each(x[list(chosen)], members=chosen), members.each(x)
                torch.testing.assert_close(got["y"], expected["y"][list(chosen)])
                torch.testing.assert_close(got["rest"][2][0], expected["rest"][2][0][list(chosen)])

    def test_only_the_graph_runs_again(self, eager_backend: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        members = population(network(), 6, compile=True)
        x, count = torch.randn(2, 6, 3, 4), []
        run = forward.Forwards.run
        monkeypatch.setattr(forward.Forwards, "run", lambda self, call: count.append(call) or run(self, call))  # type: ignore[func-returns-value]
        expected = members.each(x[1])
        with members.repeated() as each:
            count.clear()
            for _ in range(3):
                each(x[0])
            assert torch.equal(each(x[1]), expected) and len(count) == 1
            # Of another shape, and of other strides.
            each(x[0, :, :2])
            each(x.transpose(2, 3).contiguous()[0].mT)
            assert len(count) == 3
        with members.repeated() as each:
            each(x[0])
        # What a block knows is of that block alone.
        assert len(count) == 4

    def test_a_graph_that_fails_is_called_in_full(self, eager_backend: list[Any]) -> None:
        members = population(network(), 6, compile=True)
        x = torch.randn(6, 3, 4)
        with members.repeated() as each:
            expected = each(x)
            fails = [True]
            for graph in eager_backend:
                inner = graph.forward

                def forward_once(*args: Any, inner: Any = inner) -> Any:
                    if fails.pop() if fails else False:
                        raise RuntimeError("not enough")
                    return inner(*args)

                graph.forward = forward_once
            assert torch.equal(each(x), expected)

    def test_another_number_of_inputs(self) -> None:
        with (
            pytest.raises(ValueError, match=r"one input for each of 2 members, got shape \[6, 3, 4\]"),
            population(network(), 6).repeated() as each,
        ):
            each(torch.randn(6, 3, 4), members=range(2))

    @pytest.mark.parametrize("compile", [False, True])
    def test_a_change_of_the_model_is_reported_and_undone(self, compile: bool, eager_backend: list[Any]) -> None:
        members = population(Several(), 6, compile=compile)
        x = torch.randn(6, 3, 4)
        with pytest.raises(ValueError, match="changes buffer offset"), members.repeated() as each:
            each(x)
            members.model.get_buffer("offset").add_(1)
            each(x)
        assert torch.equal(members.model.get_buffer("offset"), torch.arange(3.0))

    def test_models_that_are_not_batched(self) -> None:
        class Branches(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) if x.sum() > 0 else -super().forward(x)

        members = population(Branches(4, 3), 6)
        x = torch.randn(6, 3, 4).abs() * torch.tensor([1.0, -1.0] * 3)[:, None, None]
        with members.repeated() as each:
            with pytest.warns(RuntimeWarning, match="not batched"):
                first = each(x[:2], members=(4, 1))
            assert torch.equal(each(x[:2], members=(4, 1)), first)
        torch.testing.assert_close(first[0], members.member(4)(x[0]))
        torch.testing.assert_close(first[1], members.member(1)(x[1]))
