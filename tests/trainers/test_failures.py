"""What fails in the middle of a generation: the run goes on as if it had not happened, to the bit."""

from __future__ import annotations

import math
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
    Custom,
    assert_same,
    fitness,
    global_generator_untouched,
    goes_on,
    make,
    population_fitness,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    LambdaLR,
)

from eggroll_trainer import EGGROLLTrainer, ESTrainer, VanillaESTrainer, batched


class Faulty:
    """The fitness function, until ``fault`` is set: then it makes the result of member ``member``, or of all."""

    def __init__(self, form: Callable[..., Any] = fitness) -> None:
        self.form = form
        self.fault: Callable[[Any], Any] | None = None
        self.member: int | None = None
        self.calls = 0

    def __call__(self, model: nn.Module) -> Any:
        member, self.calls = self.calls, self.calls + 1
        # Called before the fault, so that the others wait for this member when it strikes.
        score = self.form(model)
        if self.fault is not None and self.member in (None, member):
            return self.fault(score)
        return score

    def strike(self, fault: Callable[[Any], Any], member: int | None = None) -> None:
        self.fault, self.member, self.calls = fault, member, 0

    def mend(self) -> None:
        self.fault = None


WAYS: dict[str, dict[str, Any]] = {
    # Faults strike by the number of the call, which a check would count as well.
    "coalesced": {"coalesce": "unchecked"},
    "one by one": {"coalesce": False},
    "in chunks": {"coalesce": "unchecked", "chunk_size": 2},
    "custom": {"coalesce": "unchecked", "cls": Custom},
}


def pair(way: str, **options: Any) -> tuple[ESTrainer, ESTrainer, Faulty]:
    faulty = Faulty()
    options = {**WAYS[way], **options}
    trainer, twin = make(**options, fitness_fn=faulty), make(**options)
    goes_on(trainer, twin)
    return trainer, twin, faulty


RESULTS: dict[str, tuple[Callable[[float], Any], type[Exception], str]] = {
    "None": (
        lambda s: None,
        TypeError,
        "must return a float, a 0-d tensor or a NumPy scalar (higher is better), got None",
    ),
    "string": (lambda s: "good", TypeError, "got str 'good'"),
    "list": (lambda s: [s], TypeError, "got list ["),
    "dict": (lambda s: {"fitness": s}, TypeError, "got dict {'fitness'"),
    "tuple": (lambda s: (s, 1), TypeError, "got tuple ("),
    "complex": (lambda s: complex(s, 1), TypeError, "got complex ("),
    "complex tensor": (lambda s: torch.tensor(complex(s, 1)), TypeError, "got complex ("),
    "tensor [1]": (
        lambda s: torch.tensor([s]),
        ValueError,
        "got a Tensor of shape [1]; reduce it, for example with .m",
    ),
    "tensor [24, 2]": (lambda s: torch.ones(24, 2), ValueError, "got a Tensor of shape [24, 2]; reduce it"),
    "array [0]": (lambda s: np.ones(0), ValueError, "got a ndarray of shape [0]; reduce it"),
    "tasks": (
        lambda s: np.ones(3),
        ValueError,
        "and 3 scores for member 3: all members of a generation must be scored",
    ),
    "complex tasks": (lambda s: torch.ones(3, dtype=torch.complex64), TypeError, "got a Tensor of torch.complex64"),
    "words": (lambda s: np.array(["good", "bad"]), TypeError, "must return real numbers, got a ndarray of <U4"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row", RESULTS)
def test_results(row: str, way: str) -> None:
    fault, error, text = RESULTS[row]
    trainer, twin, faulty = pair(way)
    faulty.strike(fault, 3)
    with pytest.raises(error, match=re.escape(text)) as caught:
        trainer.step()
    assert notes(caught.value) == ["in the fitness of member 3 of generation 3"]
    faulty.mend()
    goes_on(trainer, twin)


class Peculiar(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(f"{reason} ({code})")
        self.code = code


def raising(error: BaseException) -> Callable[[Any], Any]:
    def fault(score: Any) -> Any:
        raise error

    return fault


def notes(error: BaseException) -> list[str]:
    # Python 3.10 has none, and they are in the message.
    return getattr(error, "__notes__", re.findall(r"\((in the fitness [^)]*)\)", str(error)))


ERRORS: dict[str, Callable[[], BaseException]] = {
    "RuntimeError": lambda: RuntimeError("the simulator is gone"),
    "KeyError": lambda: KeyError("x"),
    "of the user": lambda: Peculiar(7, reason="peculiar"),
    "AssertionError": AssertionError,
    "Ctrl-C": KeyboardInterrupt,
    "SystemExit": lambda: SystemExit(3),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row", ERRORS)
def test_exceptions_in_a_member(row: str, way: str) -> None:
    trainer, twin, faulty = pair(way)
    error = ERRORS[row]()
    faulty.strike(raising(error), 3)
    with pytest.raises(type(error)) as caught:
        trainer.train(5, verbose=False)
    assert caught.value is error
    assert notes(error) == ["in the fitness of member 3 of generation 3"]
    assert trainer.generation == 2 and len(trainer.history["fitness"]) == 2
    faulty.mend()
    goes_on(trainer, twin)


BATCHED_RESULTS: dict[str, tuple[Callable[[Tensor], Any], type[BaseException], str]] = {
    "None": (
        lambda s: None,
        TypeError,
        "one score for each of its 8 members, a tensor of shape [8]; got NoneType None",
    ),
    "wrong shape": (lambda s: s[:3], ValueError, "a tensor of shape [8], or [8, K] for K tasks; got shape [3]"),
    "one number": (lambda s: s.mean(), ValueError, "a tensor of shape [8], or [8, K] for K tasks; got shape []"),
    "no column": (lambda s: s[:, None][:, :0], ValueError, "for K tasks; got shape [8, 0]"),
    "row": (lambda s: s[None], ValueError, "for K tasks; got shape [1, 8]"),
    "complex": (lambda s: s.to(torch.complex64), TypeError, "real numbers; got torch.complex64"),
    "strings": (lambda s: ["a"] * 8, TypeError, "a tensor of shape [8]; got list ['a'"),
    "dict": (lambda s: {"fitness": s}, TypeError, "a tensor of shape [8]; got dict"),
    "all NaN": (
        lambda s: s * NAN,
        ValueError,
        "no member of generation 3 has a finite fitness (NaN or inf from all 8)",
    ),
    "exception": (raising(RuntimeError("gone")), RuntimeError, "gone"),
    "interrupt": (raising(KeyboardInterrupt()), KeyboardInterrupt, ""),
}


@pytest.mark.parametrize("row", BATCHED_RESULTS)
def test_batched_results(row: str) -> None:
    fault, error, text = BATCHED_RESULTS[row]
    faulty = Faulty(population_fitness)
    trainer, twin = make(fitness_fn=batched(faulty)), make(fitness_fn=population_fitness)
    goes_on(trainer, twin)
    faulty.strike(fault)
    with pytest.raises(error, match=re.escape(text) or None) as caught:
        trainer.step()
    if row not in ("all NaN", "interrupt"):
        assert notes(caught.value) == ["in the fitness of members 0-7 of generation 3"]
    faulty.mend()
    goes_on(trainer, twin)


NOT_FINITE = {"NaN": NAN, "+inf": INF, "-inf": -INF, "tensor": torch.tensor(NAN), "NumPy": np.float32(INF)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", NOT_FINITE)
def test_scores_that_are_not_finite_count_as_the_worst(kind: str, way: str) -> None:
    def worst_is(value: Any) -> Callable[[nn.Module], Any]:
        calls = iter(range(10**6))

        def function(model: nn.Module) -> Any:
            member = next(calls) % POPULATION
            score = fitness(model)
            # The same scores for all: members 1 and 6 are the ones that fail, and member 4 is worst.
            return value if member in (1, 6) else -50.0 if member == 4 else score

        return function

    trainer = make(**WAYS[way], fitness_fn=worst_is(NOT_FINITE[kind]))
    twin = make(**WAYS[way], fitness_fn=worst_is(-50.0))
    with pytest.warns(RuntimeWarning, match="counts as the worst finite one of its generation; see num_nonfinite"):
        metrics = trainer.step()
    expected = twin.step()
    assert metrics["num_nonfinite"] == 2 and expected["num_nonfinite"] == 0
    assert trainer.history["num_nonfinite"] == [2] and metrics["num_tied"] == 3
    assert {**metrics, "num_nonfinite": 0} == expected
    # No second warning, as warnings are errors here.
    trainer.step()
    twin.step()
    assert torch.equal(trainer.current_params, twin.current_params)
    assert_same(trainer.get_best_model().state_dict(), twin.get_best_model().state_dict())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", NOT_FINITE)
def test_no_finite_score(kind: str, way: str) -> None:
    trainer, twin, faulty = pair(way)
    faulty.strike(lambda score: NOT_FINITE[kind])
    with pytest.raises(
        ValueError, match="no member of generation 3 has a finite fitness .* parameters were not changed"
    ):
        trainer.step()
    faulty.mend()
    goes_on(trainer, twin)


@pytest.mark.parametrize("shaping", ["zscore", "raw"])
def test_scores_too_large_to_shape(shaping: str) -> None:
    # Their sum overflows float64.
    trainer, twin, faulty = pair("coalesced", shaping=shaping)
    faulty.strike(lambda score: 1.7e308 * math.exp(score / 1000))
    with pytest.raises(ValueError, match="the update is not finite; the parameters were not changed"):
        trainer.step()
    faulty.mend()
    goes_on(trainer, twin)


def test_steps_too_large_for_the_weights() -> None:
    trainer, twin, faulty = pair("coalesced", optimizer=None, shaping="raw")
    faulty.strike(lambda score: 1e4 * score)
    trainer.learning_rate = 3e38
    with pytest.raises(
        ValueError, match="the step leads to weights that are not finite; they were not changed. Lower l"
    ):
        trainer.step()
    trainer.learning_rate = 0.1
    faulty.mend()
    goes_on(trainer, twin)


def test_sigma_may_be_changed_after_a_failure() -> None:
    trainer, _, faulty = pair("coalesced")
    faulty.strike(raising(RuntimeError()))
    with pytest.raises(RuntimeError):
        trainer.step()
    faulty.mend()
    state = trainer.state_dict()
    trainer.sigma = 0.3
    trainer.step()
    fresh = make(coalesce="unchecked")
    fresh.load_state_dict(state)
    fresh.sigma = 0.3
    fresh.step()
    assert_same(trainer.state_dict(), fresh.state_dict())


# What users hand in to be called at other places of a generation.


class Failing(torch.optim.Adam):
    """Fails in the third step, half of the work done."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        if self.steps == 3:
            group = self.param_groups[0]["params"]
            for p in group[1:]:
                p.grad = None
            super().step()
            raise RuntimeError("out of memory")
        return super().step()


def failing_once(at: int, error: Exception, value: Callable[[int], float]) -> Callable[[int], float]:
    """Return a function of the generation that raises the first time it is asked for generation ``at``."""
    done: list[int] = []

    def function(generation: int) -> float:
        if generation == at and not done:
            done.append(at)
            raise error
        return value(generation)

    return function


def halving(generation: int) -> float:
    return 0.5**generation


def lambda_lr(function: Callable[[int], float]) -> Callable[[Any], LambdaLR]:
    return lambda optimizer: LambdaLR(optimizer, function)


LATE: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "optimizer raises": ({"optimizer": Failing}, {"optimizer": ADAM}, RuntimeError, "out of memory"),
    "lr_scheduler raises": (
        {"lr_scheduler": lambda_lr(failing_once(3, OSError("gone"), halving))},
        {"lr_scheduler": lambda_lr(halving)},
        OSError,
        "gone",
    ),
    "sigma_scheduler raises": (
        {"lr_scheduler": lambda_lr(halving), "sigma_scheduler": lambda_lr(failing_once(3, OSError("gone"), halving))},
        {"lr_scheduler": lambda_lr(halving), "sigma_scheduler": lambda_lr(halving)},
        OSError,
        "gone",
    ),
}


@pytest.mark.parametrize("row", LATE)
def test_failures_in_the_update(row: str) -> None:
    options, sound, error, text = LATE[row]
    trainer, twin = make(**options), make(**sound)
    for _ in range(2):
        assert trainer.step() == twin.step()
    before = trainer.state_dict()
    with pytest.raises(error, match=text):
        trainer.step()
    assert_same(trainer.state_dict(), before)
    for _ in range(2):
        assert trainer.step() == twin.step()
    assert torch.equal(trainer.current_params, twin.current_params)


@pytest.mark.parametrize("cls", [EGGROLLTrainer, VanillaESTrainer, Custom])
def test_a_history_that_cannot_be_added_to(cls: type[ESTrainer]) -> None:
    trainer, twin = make(cls), make(cls)
    goes_on(trainer, twin)
    trainer.history["std_fitness"] = tuple(trainer.history["std_fitness"])
    before = trainer.state_dict()
    with pytest.raises(AttributeError):
        trainer.step()
    assert_same(trainer.state_dict(), before)
    trainer.history["std_fitness"] = list(trainer.history["std_fitness"])
    goes_on(trainer, twin)


JUNK: dict[str, Callable[[Tensor], Any]] = {
    "None": lambda s: None,
    "shape": lambda s: s[:2],
    "scalar": lambda s: s.mean(),
    "NaN": lambda s: s * NAN,
    "list": lambda s: s.tolist(),
    "array": lambda s: s.numpy(),
}


@pytest.mark.parametrize("row", JUNK)
def test_junk_from_a_shaper(row: str) -> None:
    def shaper(broken: list[bool]) -> Callable[[Tensor], Any]:
        return lambda scores: JUNK[row](scores) if broken else scores - scores.mean()

    broken: list[bool] = []
    trainer, twin = make(shaping=shaper(broken)), make(shaping=shaper([]))
    goes_on(trainer, twin)
    broken.append(True)
    with pytest.raises(ValueError, match="shaping must return a tensor of 8 finite weights, got"):
        trainer.step()
    broken.clear()
    goes_on(trainer, twin)


class Breakable(Custom):
    """A custom trainer of which one method is broken on demand."""

    broken: tuple[str, Callable[[Tensor], Any]] | None = None

    def _pass(self, method: str, value: Tensor) -> Any:
        return self.broken[1](value) if self.broken is not None and self.broken[0] == method else value

    def sample_perturbations(self, population_size: int) -> Tensor:
        return self._pass("sample_perturbations", super().sample_perturbations(population_size))

    def compute_update(self, perturbations: Tensor, fitnesses: Tensor) -> Tensor:
        return self._pass("compute_update", super().compute_update(perturbations, fitnesses))


METHODS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "None": (lambda v: None, TypeError, "got NoneType"),
    "array": (lambda v: v.numpy(), TypeError, "got ndarray"),
    "too short": (lambda v: v[..., :-1], ValueError, "got shape ["),
    "too many dimensions": (lambda v: v[None], ValueError, "got shape [1, "),
    "NaN": (lambda v: v.log(), ValueError, "returned values that are not finite real numbers"),
    "inf": (lambda v: v / 0, ValueError, "returned values that are not finite real numbers"),
    "complex": (lambda v: v.to(torch.complex64), ValueError, "returned values that are not finite real numbers"),
    "exception": (raising(LookupError("no such thing")), LookupError, "no such thing"),
}


@pytest.mark.parametrize("method", ["sample_perturbations", "compute_update"])
@pytest.mark.parametrize("row", METHODS)
def test_custom_methods(row: str, method: str) -> None:
    fault, error, text = METHODS[row]
    trainer, twin = make(Breakable), make(Breakable)
    goes_on(trainer, twin)
    trainer.broken = (method, fault)
    with global_generator_untouched(), pytest.raises(error, match=re.escape(text)) as caught:
        trainer.step()
    if row in ("None", "array", "too short", "too many dimensions"):
        shape = "[8, 58]" if method == "sample_perturbations" else "[58]"
        assert f"{method} must return a tensor of shape {shape}" in str(caught.value)
    trainer.broken = None
    goes_on(trainer, twin)


def test_a_callback_that_raises_comes_after_a_whole_generation() -> None:
    def callback(generation: int, history: list[float]) -> None:
        if generation == 2:
            raise LookupError

    trainer, twin = make(), make()
    with pytest.raises(LookupError):
        trainer.train(5, verbose=False, callback=callback)
    twin.train(2, verbose=False)
    goes_on(trainer, twin)


@pytest.mark.parametrize("cls", [EGGROLLTrainer, VanillaESTrainer, Custom])
def test_history_may_be_emptied(cls: type[ESTrainer]) -> None:
    trainer = make(cls)
    trainer.step()
    trainer.history.clear()
    trainer.step()
    assert trainer.history["generation"] == [2]
