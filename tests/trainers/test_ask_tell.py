"""Members that are evaluated elsewhere: ``ask`` and ``tell`` make the steps that ``step`` makes."""

from __future__ import annotations

import copy
import json
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import POPULATION, Custom, X, assert_same, goes_on, make, network, start_python
from torch import nn

from eggroll_trainer import Population, VanillaESTrainer
from eggroll_trainer.trainers.told import ToldScores

KINDS: dict[str, dict[str, Any]] = {
    "low rank": {"noise_reuse": 2},
    "chunks": {"noise_reuse": 2, "chunk_size": 2},
    "groups": {"group_size": 4, "shaping": "centered_ranks"},
    "vanilla": {"cls": VanillaESTrainer},
    "custom": {"cls": Custom},
}


def scores_of(trainer: Any) -> list[float]:
    """The scores of all members as ``step`` would find them."""
    population = trainer.ask()
    return [trainer.evaluate_fitness(population.member(i)) for i in range(len(population))]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_step(kind: str) -> None:
    # Evaluated alone, a member's score is that of its dense copy to the bit.
    options = {**KINDS[kind], "coalesce": False}
    asking, stepping = make(**options), make(**options)
    for _ in range(3):
        told = asking.tell(scores_of(asking))
        assert told == stepping.step()
    goes_on(asking, stepping)
    assert_same(asking.get_best_model().state_dict(), stepping.get_best_model().state_dict())


def test_scores_come_in_any_order_and_in_parts() -> None:
    asking, stepping = make(coalesce=False), make(coalesce=False)
    scores = scores_of(asking)
    assert asking.tell(scores[5:7], members=[5, 6]) is None
    assert asking.tell([scores[0], 99.0], members=[0, 1]) is None, "one that is told of again gets the new score"
    order = [7, 1, 3, 2, 4]
    assert asking.tell(torch.tensor([scores[i] for i in order], dtype=torch.float64), members=order) == stepping.step()


def test_failed_members_are_nan() -> None:
    trainer = make()
    scores = scores_of(trainer)
    scores[3] = float("nan")
    with pytest.warns(RuntimeWarning, match="counts as the worst finite one"):
        metrics = trainer.tell(scores)
    assert metrics is not None and metrics["num_nonfinite"] == 1


def test_members_asked_for_again_are_the_same() -> None:
    trainer = make(noise_reuse=2)
    first = [trainer.ask().member_parameters(i) for i in range(POPULATION)]
    again = [trainer.ask().member_parameters(i) for i in range(POPULATION)]
    assert_same(first, again)
    with trainer.ask().holding(3):
        assert_same({name: p.detach() for name, p in trainer.model.named_parameters()}, first[3])


def test_a_generation_survives_save_and_load(tmp_path: Path) -> None:
    trainer, twin = make(coalesce=False), make(coalesce=False)
    trainer.step()
    twin.step()
    scores = scores_of(trainer)
    trainer.tell(scores[:3], members=range(3))
    trainer.save(tmp_path / "run.pt")
    other = make(coalesce=False)
    other.load(tmp_path / "run.pt")
    with pytest.raises(RuntimeError, match=r"call ask\(\) first"):
        other.tell(scores)
    other.ask()
    assert other.tell(scores[3:], members=range(3, POPULATION)) == twin.step()
    goes_on(other, twin)


def test_what_was_told_of_other_members_is_forgotten() -> None:
    trainer = make()
    trainer.ask()
    trainer.tell([1.0], members=[0])
    trainer.sigma = 0.3
    with pytest.raises(ValueError, match=r"since ask\(\): the scores are of other members"):
        trainer.tell([1.0], members=[1])
    trainer.ask()
    assert trainer._told is None
    trainer.learning_rate = 0.5
    assert trainer.tell(range(POPULATION)) is not None, "the learning rate is of the step alone"


def test_a_step_in_between_begins_anew() -> None:
    trainer, twin = make(), make()
    population = trainer.ask()
    trainer.tell([1.0], members=[0])
    assert trainer.step() == twin.step()
    with pytest.raises(RuntimeError, match="without ask"):
        trainer.tell([1.0], members=[0])
    with pytest.raises(RuntimeError, match="generation 1 is over"):
        population.member(0)


@pytest.mark.parametrize("chunk_size", [None, 2, 6])
def test_the_population_is_called_chunk_by_chunk(chunk_size: int | None) -> None:
    trainer = make(chunk_size=chunk_size, noise_reuse=2)
    population = trainer.ask()
    assert isinstance(population, Population) and len(population) == POPULATION
    assert [i for chunk in trainer.ask().chunks() for i in chunk.members] == list(range(POPULATION))
    dense = [population.member(i) for i in range(POPULATION)]
    with torch.no_grad():
        torch.testing.assert_close(population(X), torch.stack([model(X) for model in dense]))
        xs = torch.stack([X + i for i in range(POPULATION)])
        expected = torch.stack([model(x) for model, x in zip(dense, xs, strict=True)])
        torch.testing.assert_close(population.each(xs), expected)
        torch.testing.assert_close(population.each(xs.movedim(0, 1), in_dims=1), expected)
        shared = torch.stack([model(X) for model in dense])
        torch.testing.assert_close(population.each(X, in_dims=[None]), shared)
    with pytest.raises(ValueError, match=f"one input for each of the {POPULATION} members"):
        population.each(xs[:3])
    with pytest.raises(IndexError):
        population.member(POPULATION)


@pytest.mark.parametrize("sent", [copy.deepcopy, lambda chunk: pickle.loads(pickle.dumps(chunk))])
@pytest.mark.parametrize("used", [False, True])
def test_chunks_are_sent_to_other_processes(sent: Any, used: bool) -> None:
    trainer = make(chunk_size=4, model=network(dropout=0.5))
    for chunk in trainer.ask().chunks():
        chunk.eval()
        before = chunk(X) if used else None
        received = sent(chunk)
        assert received.members == chunk.members and received.model is not chunk.model
        torch.testing.assert_close(received(X), chunk(X) if before is None else before)
        assert_same(received.member(3).state_dict(), chunk.member(3).state_dict())
    with pytest.raises(TypeError, match=r"send its chunks\(\), or population\.member\(i\)"):
        sent(trainer.ask())


def test_a_member_as_adapters() -> None:
    trainer = make(noise_reuse=2, rank=1, model=nn.Sequential(nn.Linear(4, 16), nn.Conv1d(16, 3, 2)))
    population = trainer.ask()
    for i in (0, 1, 5):
        dense, adapters = population.member_parameters(i), population.lora(i)
        assert set(adapters) == {"0.weight", "1.weight"}
        for name, (A, B, scale) in adapters.items():
            centre = dict(trainer.model.named_parameters())[name].detach()
            assert A.shape == (centre.shape[0], 1) and B.shape == (centre[0].numel(), 1)
            torch.testing.assert_close(dense[name], centre + (scale * A @ B.T).view_as(centre))


def test_training_modes_reach_the_chunks() -> None:
    trainer = make(model=network(dropout=0.5), chunk_size=4)
    trainer.model.train()
    population = trainer.ask().eval()
    assert torch.equal(population(X), population(X)) and not population.member(0).training


BAD: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "too few": ([1.0], None, ValueError, "each of 8 members, or [8, K] for K tasks, got shape [1]"),
    "no column": (torch.zeros(8, 0), None, ValueError, "got shape [8, 0]"),
    "a row": (torch.zeros(1, 8), None, ValueError, "got shape [1, 8]"),
    "words": (["good"] * 8, None, TypeError, "scores must be numbers"),
    "complex": (torch.zeros(8, dtype=torch.complex64), None, TypeError, "real numbers"),
    "no such member": ([1.0], [8], ValueError, "members must be below population_size=8, got 8"),
    "negative": ([1.0], [-1], ValueError, "members must be at least 0, got -1"),
}


@pytest.mark.parametrize("row", BAD)
def test_bad_scores(row: str) -> None:
    scores, members, error, text = BAD[row]
    trainer, twin = make(), make()
    trainer.ask()
    with pytest.raises(error) as caught:
        trainer.tell(scores, members)
    assert text in str(caught.value)
    goes_on(trainer, twin)


def test_no_finite_score_leaves_the_generation_to_be_told_again() -> None:
    trainer = make()
    trainer.ask()
    with pytest.raises(ValueError, match="no member of generation 1 has a finite fitness"):
        trainer.tell([float("nan")] * POPULATION)
    assert trainer.tell([float(i) for i in range(POPULATION)]) is not None


def test_told_scores_do_not_change_in_place() -> None:
    told = ToldScores(4, {})
    later = told.with_scores([1.0], [2])
    assert not told.known.any() and later.known.tolist() == [False, False, True, False] and not later.complete


def test_an_evaluator_in_another_process_is_killed_and_started_again(tmp_path: Path) -> None:
    asking, stepping = make(coalesce=False), make(coalesce=False)
    for generation in range(2):
        folder = tmp_path / str(generation)
        folder.mkdir()
        population = asking.ask()
        for i in range(POPULATION):
            torch.save(population.member(i).state_dict(), folder / f"member-{i}.pt")
        with start_python("evaluator.work", folder) as evaluator:
            assert evaluator.stdout is not None and evaluator.stdout.readline().startswith("member-")
            evaluator.send_signal(signal.SIGKILL)
        asking.save(tmp_path / "run.pt")
        asking = make(coalesce=False)
        asking.load(tmp_path / "run.pt")
        asking.ask()
        (folder / "over").touch()
        with start_python("evaluator.work", folder) as evaluator:
            assert evaluator.wait(60) == 0
        scores = [json.loads((folder / f"member-{i}.json").read_text()) for i in range(POPULATION)]
        assert asking.tell(scores) == stepping.step()
    assert_same(asking.state_dict(), stepping.state_dict())
