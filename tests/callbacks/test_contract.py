"""What every callback does, whatever happens to the run that it watches."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from watching import CASES, Case, Spy, generations, interrupting, make_trainer, raising

from eggroll_trainer import EGGROLLTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow"),
    pytest.mark.filterwarnings("ignore::FutureWarning:mlflow"),
]


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    found = CASES[request.param]
    pytest.importorskip(found.needs)
    return found


def logged(case: Case, folder: Path, metric: str = "mean_fitness") -> list[tuple[int, float]] | None:
    return None if case.read is None else case.read(folder, metric)


def check(case: Case, folder: Path, trainer: EGGROLLTrainer, *expected: int) -> None:
    """Check that these generations were written down, once each, with what they had."""
    values = logged(case, folder)
    if values is not None:
        assert generations(values) == list(expected)
        means = trainer.fitness_history
        assert [value for _, value in values] == pytest.approx([means[g - 1] for g in expected], rel=1e-6)


def test_it_sees_every_generation_and_any_number(case: Case, tmp_path: Path) -> None:
    def add(trainer: Any, metrics: dict[str, Any]) -> None:
        metrics |= {"accuracy": 0.5, "layers": {"0.weight": 2}, "status": "green", "advice": "go on", "tensor": [1, 2]}

    trainer = make_trainer()
    callback = case.make(tmp_path)
    # `log_every` is for functions alone.
    result = trainer.train(3, verbose=False, log_every=2, callback=[Spy([], always=add), callback])
    assert result["stopped_by"] is None and type(callback).__name__ in repr(callback)
    check(case, tmp_path, trainer, 1, 2, 3)
    if case.read is not None:
        assert case.read(tmp_path, "accuracy") == [(1, 0.5), (2, 0.5), (3, 0.5)]
        assert case.read(tmp_path, "layers/0.weight") == [(1, 2), (2, 2), (3, 2)]


def test_an_exception_in_another_callback_loses_nothing(case: Case, tmp_path: Path) -> None:
    trainer = make_trainer()
    calls: list[Any] = []
    faulty = Spy(calls, at_2=raising(LookupError("mine")))
    callback = case.make(tmp_path)
    with pytest.raises(LookupError, match="mine"):
        trainer.train(5, verbose=False, callback=[faulty, callback])
    assert calls[-1] == ("", "end", 2)
    # What was written can be read, and the same object goes on.
    check(case, tmp_path, trainer, 1, 2)
    trainer.train(2, verbose=False, callback=callback)
    check(case, tmp_path, trainer, 1, 2, 3, 4)


def test_ctrl_c_leaves_whole_generations(case: Case, tmp_path: Path) -> None:
    trainer = make_trainer(interrupting(3))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(5, verbose=False, callback=case.make(tmp_path))
    assert trainer.generation == 2
    check(case, tmp_path, trainer, 1, 2)
    trainer.train(1, verbose=False, callback=case.make(tmp_path))
    check(case, tmp_path, trainer, 1, 2, 3)


class Struck:
    """A number at whose reading a Ctrl-C comes: in the middle of whatever writes it down."""

    ndim = 0

    def item(self) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return 1.0


def test_ctrl_c_does_not_tear_what_is_being_written(case: Case, tmp_path: Path) -> None:
    if case.read is None:
        pytest.skip("it writes nothing")
    trainer = make_trainer()
    strike = Spy([], at_2=lambda trainer, metrics: metrics.update(struck=Struck()))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(5, verbose=False, callback=[strike, case.make(tmp_path)])
    check(case, tmp_path, trainer, 1, 2)
    assert case.read(tmp_path, "struck") == [(2, 1.0)]


def test_a_resumed_run_appends(case: Case, tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.train(2, verbose=False, callback=case.make(tmp_path))
    trainer.save(tmp_path / "run.pt")
    trainer.train(2, verbose=False, callback=case.make(tmp_path))
    again = make_trainer()
    again.load(tmp_path / "run.pt")
    again.train(3, verbose=False, callback=case.make(tmp_path))
    check(case, tmp_path, again, 1, 2, 3, 4, 5)
