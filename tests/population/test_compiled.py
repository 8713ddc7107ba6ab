"""Compiled forwards: the same numbers, few recompilations, and eager forwards where compiling fails."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from forwards import Several, population
from helpers import NEEDS_COMPILER, X, fitness, goes_on, make, population_fitness
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from eggroll_trainer.population import forward


@NEEDS_COMPILER
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

    @pytest.mark.slow
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

    @pytest.mark.slow
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
