"""What is not trained: frozen parameters, which may be freed again, and the rows of embeddings that are padding."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Custom, assert_same, goes_on, make, network, population_regression, regression
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, ESTrainer, Population, VanillaESTrainer, batched
from eggroll_trainer.callbacks import ScoreLog

CLASSES = [EGGROLLTrainer, VanillaESTrainer, Custom]
DTYPES = [torch.float32, torch.bfloat16]


def trainer(cls: Callable[..., ESTrainer] = EGGROLLTrainer, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """With an optimizer that moves whatever has a gradient, be it zero."""
    optimizer = functools.partial(torch.optim.AdamW, weight_decay=0.3)
    defaults = {"model": network(dtype), "fitness_fn": population_regression(dtype), "optimizer": optimizer}
    return make(cls, **{**defaults, **options})


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", CLASSES)
class TestFreezing:
    def test_from_the_next_generation_on(self, cls: Any, dtype: torch.dtype) -> None:
        run = trainer(cls, dtype)
        run.train(2, verbose=False)
        run.model[0].requires_grad_(False)
        before = values(run.model)
        seen: list[Tensor] = []

        @batched
        def watching(population: Population) -> Tensor:
            seen.append(
                torch.stack([population.member(i).get_parameter("0.weight").detach() for i in range(len(population))])
            )
            return population_regression(dtype)(population)

        run.fitness_fn = watching
        run.train(2, verbose=False)
        after = values(run.model)
        assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
        assert not torch.equal(after[2], before[2]) and not torch.equal(after[3], before[3])
        assert all(torch.equal(weight, before[0]) for generation in seen for weight in generation)
        best = values(run.get_best_model())
        if run.best_fitness in run.history["fitness"][2:]:
            assert torch.equal(best[0], before[0])

    def test_freed_again(self, cls: Any, dtype: torch.dtype) -> None:
        run = trainer(cls, dtype)
        run.train(2, verbose=False)
        state = copy.deepcopy(run._centre.optimizer.state[run._centre.masters["0.weight"]])
        run.model[0].requires_grad_(False)
        run.step()
        # The optimizer keeps what it knows of a parameter.
        assert_same(run._centre.optimizer.state[run._centre.masters["0.weight"]], state)
        run.model.requires_grad_(True)
        before = values(run.model)
        run.step()
        assert not any(map(torch.equal, values(run.model), before))
        steps = [int(s["step"]) for s in run._centre.optimizer.state_dict()["state"].values()]
        assert steps == [3, 3, 4, 4]

    def test_frozen_in_the_beginning_and_freed(self, cls: Any, dtype: torch.dtype, tmp_path: Path) -> None:
        def start() -> Any:
            model = network(dtype)
            model[0].requires_grad_(False)
            return trainer(cls, dtype, model=model)

        run, begun = start(), start()
        assert len(run.current_params) == 18
        before = values(run.model)
        run.train(2, verbose=False)
        assert all(map(torch.equal, values(run.model)[:2], before[:2]))
        run.model.requires_grad_(True)
        best = run.get_best_model()
        run.learning_rate = 0.0
        run.step()
        run.learning_rate = 0.1
        assert len(run.current_params) == len(run.initial_params) == 58
        assert torch.equal(run.initial_params, torch.cat([p.flatten().float() for p in before]))
        if run.history["fitness"][-1] < run.best_fitness:
            assert_same(values(run.get_best_model()), values(best))
        run.step()
        assert not any(map(torch.equal, values(run.model), before))
        # Gone on with by a script that begins as this one did, which freezes and frees nothing.
        run.save(tmp_path / "run.pt")
        begun.load(tmp_path / "run.pt")
        assert all(p.requires_grad for p in begun.model.parameters())
        goes_on(run, begun)
        # And back to the beginning.
        run.reset()
        assert_same(run.state_dict(), start().state_dict())
        goes_on(run, start())

    def test_resumed_in_any_state(self, cls: Any, dtype: torch.dtype) -> None:
        run = trainer(cls, dtype)
        states = []
        for frozen in ([], [0], [3], []):
            for i in (0, 3):
                run.model[i].requires_grad_(i not in frozen)
            run.step()
            states.append((run.state_dict(), copy.deepcopy(run)))
        for state, there in states:
            other = trainer(cls, dtype)
            other.model[3].requires_grad_(False)
            other.train(1, verbose=False)
            other.load_state_dict(state)
            goes_on(other, there)


def test_the_estimate_of_the_others_is_the_same() -> None:
    run, left_out = trainer(), trainer(params=None, model=frozen_at_first())
    run.model[0].requires_grad_(False)
    for _ in range(3):
        run.step()
        left_out.step()
    assert_same(values(run.model), values(left_out.model))


def frozen_at_first() -> nn.Module:
    model = network()
    model[0].requires_grad_(False)
    return model


def test_nothing_left_to_train() -> None:
    run, twin = trainer(), trainer()
    goes_on(run, twin)
    run.model.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter is frozen .* unfreeze some with requires_grad_"):
        run.step()
    run.model.requires_grad_(True)
    goes_on(run, twin)


def test_a_fitness_function_freezes_for_itself_only() -> None:
    def fitness(model: nn.Module) -> float:
        run.model.requires_grad_(False)
        return regression()(model)

    run, twin = trainer(fitness_fn=fitness, coalesce=False), trainer(fitness_fn=regression(), coalesce=False)
    goes_on(run, twin)
    assert all(p.requires_grad for p in run.model.parameters())


def test_a_fitness_function_that_freezes_in_one_chunk_only() -> None:
    @batched
    def fitness(population: Population) -> Tensor:
        # In the record that processes compare nothing is frozen.
        assert run.settings().frozen == []
        run.model[0].requires_grad_(False)
        return population_regression()(population)

    run, twin = trainer(chunk_size=4), trainer(chunk_size=4)
    run.fitness_fn = fitness
    for _ in range(2):
        assert run.step() == twin.step()
    assert_same(run.state_dict(), twin.state_dict())


def test_what_was_never_given_stays_frozen() -> None:
    model = network()
    run = trainer(model=model, params=model[3].parameters())
    before = values(model)
    model.requires_grad_(True)
    run.train(2, verbose=False)
    assert all(map(torch.equal, values(model)[:2], before[:2]))


def test_frozen_parameters_take_no_memory() -> None:
    model = network(torch.bfloat16)
    model[0].requires_grad_(False)
    run = trainer(dtype=torch.bfloat16, model=model)
    assert "0.weight" not in run._centre.masters
    assert "0.weight" not in run.state_dict()["centre"]["parameters"]
    model[0].requires_grad_(True)
    run.step()
    assert run._centre.masters["0.weight"].dtype == torch.float32


def test_optimizers_see_trained_parameters_only() -> None:
    class MatricesOnly(torch.optim.SGD):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, lr=lr, momentum=0.9)
            if any(p.ndim != 2 for group in self.param_groups for p in group["params"]):
                raise ValueError("only matrices")

    model = network()
    groups = [{"params": [model[i].weight, model[i].bias], "lr": 0.1 * (i + 1)} for i in (0, 3)]
    for i in (0, 3):
        model[i].bias.requires_grad_(False)
    model[3].weight.requires_grad_(False)
    run = trainer(model=model, params=groups, optimizer=MatricesOnly)
    run.step()
    momentum = run._centre.optimizer.state[model[0].weight]["momentum_buffer"].clone()
    before, state = values(model), run.state_dict()
    # One that the optimizer does not take cannot be freed, which changes nothing.
    model[3].bias.requires_grad_(True)
    with pytest.raises(ValueError, match="only matrices"):
        run.step()
    model[3].bias.requires_grad_(False)
    assert_same(run.state_dict(), state)
    model[3].weight.requires_grad_(True)
    run._follow_frozen()
    assert torch.equal(run._centre.optimizer.state[model[0].weight]["momentum_buffer"], momentum)
    run.step()
    changed = [not torch.equal(a, b) for a, b in zip(values(model), before, strict=True)]
    assert changed == [True, False, True, False]
    assert [group["lr"] for group in run._centre.optimizer.param_groups] == [0.1, 0.4]


def test_quantised_parameters_beside_trained_ones() -> None:
    model = network()
    model.table = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    run = trainer(model=model)
    run.step()
    assert "table" not in run.param_groups[0]["names"]


def test_a_replay_freezes_and_frees(tmp_path: Path) -> None:
    log, run = ScoreLog(tmp_path / "scores.jsonl"), trainer()
    for frozen in (False, True, True, False):
        run.model[0].requires_grad_(not frozen)
        log.begin(run)
        run.step()
        log.append(run)
    again = trainer()
    assert log.replay(again) == 4
    assert_same(again.state_dict(), run.state_dict())


# Padding.


class Embedded(nn.Module):
    def __init__(self, bag: bool = False, tied: bool = False, rows: int = 12, width: int = 8) -> None:
        super().__init__()
        self.embedding: Any = (nn.EmbeddingBag if bag else nn.Embedding)(rows, width, padding_idx=3)
        self.head = nn.Linear(width, rows, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        with torch.no_grad():
            self.embedding.weight[3] = 0.5

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens)).tanh()


TOKENS = torch.tensor([[1, 2, 3], [3, 3, 7], [11, 0, 3]])


def score(model: nn.Module) -> float:
    return model(TOKENS).double().sum().item()


@batched
def scores(population: Population) -> Tensor:
    return population(TOKENS).double().flatten(1).sum(1)


def embedded(**options: Any) -> Embedded:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Embedded(**options)


@pytest.mark.parametrize("shape", [{}, {"bag": True}, {"tied": True}, {"bag": True, "tied": True}])
@pytest.mark.parametrize("size", [{"rows": 12, "width": 8}, {"rows": 5, "width": 1}])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", CLASSES)
def test_padding_rows_stay(cls: Any, dtype: torch.dtype, size: dict[str, int], shape: dict[str, bool]) -> None:
    model = embedded(**size, **shape).to(dtype)
    tokens = TOKENS % size["rows"]

    @batched
    def fitness(population: Population) -> Tensor:
        for i in range(len(population)):
            weight = population.member_parameters(i)["embedding.weight"]
            assert torch.equal(weight[3], before[3]) and not torch.equal(weight, before)
        return population(tokens).double().flatten(1).sum(1)

    before = model.embedding.weight.detach().clone()
    run = trainer(cls, dtype, model=model, fitness_fn=fitness, chunk_size=4)
    run.step()
    after = model.embedding.weight.detach()
    assert torch.equal(after[3], before[3]) and not torch.equal(after, before)
    assert torch.equal(run.get_best_model().embedding.weight[3], before[3])


def test_padding_as_it_is_evaluated() -> None:
    """A batched forward and a plain function see the same row as a member's own model does."""
    for options in ({}, {"bag": True}, {"tied": True}):
        results = []
        for fitness, coalesce in ((scores, True), (score, True), (score, False)):
            run = make(model=embedded(**options).double(), fitness_fn=fitness, coalesce=coalesce, rank=1)
            run.step()
            results.append(run.current_params)
        assert torch.allclose(results[0], results[1], rtol=1e-9) and torch.allclose(results[0], results[2], rtol=1e-9)


def test_the_other_rows_are_perturbed_as_without_padding() -> None:
    with_padding, without = embedded(), embedded()
    without.embedding.padding_idx = None
    one, other = (make(model=model, fitness_fn=scores).sample_perturbations(4) for model in (with_padding, without))
    one, other = one[:, :96].view(4, 12, 8), other[:, :96].view(4, 12, 8)
    rows = [i for i in range(12) if i != 3]
    assert torch.equal(one[:, rows], other[:, rows])
    assert not one[:, 3].any() and other[:, 3].all()
