"""The check of scores: when it runs, what it says, and what follows."""

from __future__ import annotations

import os
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import POPULATION, X, Y, assert_same, fitness, make, network
from torch import Tensor, nn

from eggroll_trainer import Population, batched
from eggroll_trainer.fitness import check, evaluate
from eggroll_trainer.fitness.findings import Findings
from eggroll_trainer.fitness.record import aligned_copy
from eggroll_trainer.fitness.together import deadlock
from eggroll_trainer.population.agreement import disagreement

ALONE = "the fitness function is run for one member at a time"


class Simulator:
    """What a fitness function should make for itself."""

    def __init__(self) -> None:
        self.time = 0

    def reset(self) -> Tensor:
        self.time = 0
        return X

    def step(self, action: Tensor) -> Tensor:
        self.time += 1
        return X * self.time + action.mean()


def sharing(simulator: Simulator) -> Callable[[nn.Module], float]:
    """A fitness function, all calls of which step one simulator."""

    def shared(model: nn.Module) -> float:
        observation, total = simulator.reset(), 0.0
        with torch.no_grad():
            for _ in range(3):
                action = model(observation)
                total += action.square().mean().item()
                observation = simulator.step(action)
        return -total

    return shared


def messages(trainer: Any, generations: int = 1) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(generations, verbose=False)
    return [str(warning.message) for warning in caught]


# When it looks.


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Generation and member of every check."""
    seen: list[tuple[int, int]] = []
    original = check.difference

    def difference(population: Population, function: Any, index: int, *rest: Any) -> str | None:
        seen.append((population.generation + 1, population.first + index))
        return original(population, function, index, *rest)

    monkeypatch.setattr(evaluate, "difference", difference)
    yield seen


def test_three_members_are_checked_at_first_and_one_ever_more_rarely(checked: list[tuple[int, int]]) -> None:
    make(population_size=64, chunk_size=16).train(20, verbose=False)
    assert [generation for generation, _ in checked] == [1, 1, 1, 2, 4, 8, 16]
    first = [member for generation, member in checked if generation == 1]
    assert first[0] == 0 and first[-1] == 63 and 0 < first[1] < 63
    assert len({member for _, member in checked}) > 4, "another one each time"


@pytest.mark.parametrize(
    "change",
    [
        lambda trainer: setattr(trainer, "fitness_fn", lambda model: fitness(model)),
        lambda trainer: trainer.model.eval(),
        lambda trainer: trainer.load_state_dict(trainer.state_dict()),
    ],
    ids=["function", "mode", "resume"],
)
def test_a_change_begins_checks_anew(change: Callable[[Any], Any], checked: list[tuple[int, int]]) -> None:
    trainer = make(population_size=64)
    trainer.train(3, verbose=False)
    change(trainer)
    checked.clear()
    trainer.train(2, verbose=False)
    assert [generation for generation, _ in checked] == [4, 4, 4, 5]


def test_the_same_function_with_other_data_is_no_change(checked: list[tuple[int, int]]) -> None:
    trainer = make(population_size=64)
    for _ in range(4):
        x = torch.randn(8, 4)
        trainer.fitness_fn = lambda model, x=x: model(x).mean().item()
        trainer.step()
    assert [generation for generation, _ in checked] == [1, 1, 1, 2, 4]


def test_each_process_checks_something_of_its_own() -> None:
    findings = Findings()
    findings.begin_generation(0, fitness, network())
    assert findings.to_check(0, 16, 16, 4096) == [0] and findings.to_check(0, 32, 16, 4096) == []


@pytest.mark.parametrize("options", [{"coalesce": "unchecked"}, {"coalesce": False}])
def test_unchecked_functions_are_not_called_more_often(options: dict[str, Any], checked: list[Any]) -> None:
    calls = []

    def counting(model: nn.Module) -> float:
        calls.append(model)
        return fitness(model)

    trainer = make(fitness_fn=counting, **options)
    trainer.train(2, verbose=False)
    assert len(calls) == 2 * POPULATION and all(model is trainer.model for model in calls) and not checked


# What it finds, and what follows.


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_what_is_shared_is_named_and_members_run_alone(chunk_size: int | None) -> None:
    simulator = Simulator()
    trainer = make(fitness_fn=sharing(simulator), chunk_size=chunk_size)
    twin = make(fitness_fn=sharing(Simulator()), coalesce=False, chunk_size=chunk_size)
    said = messages(trainer, 2)
    twin.train(2, verbose=False)
    assert len(said) == 1 and said[0].startswith(ALONE)
    assert "in its 3rd call member 0 was given another input than when it is evaluated alone" in said[0]
    assert "share something, such as a simulator" in said[0]
    assert trainer.history == twin.history and torch.equal(trainer.current_params, twin.current_params)


def test_the_finding_is_resumed_and_forgotten_by_reset() -> None:
    trainer = make(fitness_fn=sharing(Simulator()))
    messages(trainer)
    resumed = make(fitness_fn=sharing(Simulator()))
    resumed.load_state_dict(trainer.state_dict())
    assert trainer.step() == resumed.step(), "without a warning, and alone from the beginning"
    trainer.reset()
    assert trainer._findings.alone is None


def test_another_function_gets_another_chance() -> None:
    trainer = make(fitness_fn=sharing(Simulator()))
    messages(trainer)
    trainer.fitness_fn = fitness
    trainer.step()
    assert trainer._findings.alone is None


def test_a_function_that_differs_from_itself_is_said_to_once() -> None:
    generator = np.random.default_rng(0)

    def noisy(model: nn.Module) -> float:
        return fitness(model) + generator.normal()

    said = messages(make(fitness_fn=noisy), 3)
    assert len(said) == 1 and "cannot be checked" in said[0] and 'coalesce="unchecked"' in said[0]
    assert messages(make(fitness_fn=noisy, coalesce="unchecked"), 3) == []


def test_a_function_that_fails_together_and_works_alone_runs_alone() -> None:
    in_use: list[None] = []

    def of_two_licences(model: nn.Module) -> float:
        if len(in_use) == 2:
            raise OSError("no licence is free")
        in_use.append(None)
        try:
            return fitness(model)
        finally:
            in_use.pop()

    trainer, twin = make(fitness_fn=of_two_licences), make(coalesce=False)
    said = messages(trainer)
    twin.step()
    assert len(said) == 1 and said[0].startswith(ALONE) and "no licence is free" in said[0]
    assert trainer.history == twin.history


@pytest.mark.parametrize("message", ["upgrade failed", "x.grad is None"])
def test_errors_of_any_wording_reach_the_user(message: str) -> None:
    def failing(model: nn.Module) -> float:
        if fitness(model) < 0:
            raise RuntimeError(message)
        return 0.0

    with pytest.raises(RuntimeError, match=message) as caught:
        make(fitness_fn=failing).step()
    assert "member 0 of generation 1" in str(getattr(caught.value, "__notes__", caught.value))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="deadlocks are found on Linux")
@pytest.mark.parametrize("reader", [False, True], ids=["", "a thread reads"])
def test_members_that_wait_for_each_other_are_found(reader: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Threads of other libraries, such as those of a notebook or of these tests' own workers, wait for other things.
    monkeypatch.setattr(deadlock, "_PATIENCE", 0.5)
    monkeypatch.setattr(deadlock, "_LONG_PATIENCE", 1.0)
    ends = os.pipe()
    thread = threading.Thread(target=os.read, args=(ends[0], 1))
    if reader:
        thread.start()
    lock = threading.Lock()

    def locked(model: nn.Module) -> float:
        with lock:
            return fitness(model)

    trainer, twin = make(fitness_fn=locked), make(coalesce=False)
    said = messages(trainer)
    twin.step()
    os.write(ends[1], b"x")
    if reader:
        thread.join()
    for end in ends:
        os.close(end)
    assert len(said) == 1 and "that another one holds" in said[0] and not lock.locked()
    assert trainer.history == twin.history


def test_a_forked_process_takes_no_part_in_the_turns() -> None:
    if not hasattr(os, "fork"):
        pytest.skip("no fork")

    def forks(model: nn.Module) -> float:
        read, write = os.pipe()
        process = os.fork()
        if process == 0:
            # Of the threads of the parent none is here.
            torch.set_num_threads(1)
            with os.fdopen(write, "w") as file:
                file.write(repr(fitness(model)))
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as file:
            value = float(file.read())
        os.waitpid(process, 0)
        return value + fitness(model)

    def twice(model: nn.Module) -> float:
        return fitness(model) + fitness(model)

    with warnings.catch_warnings():
        # Of a process with threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        trainer, twin = make(fitness_fn=forks), make(fitness_fn=twice)
        assert trainer.step()["mean_fitness"] == pytest.approx(twin.step()["mean_fitness"], rel=1e-5)


# Global generators.

DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: torch.rand(()).item(),
    "NumPy": lambda: float(np.random.rand()),
    "Python": lambda: random.random(),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("form", ["plain", "alone", "batched"])
def test_global_generators_follow_the_seed_and_are_put_back(draw: Callable[[], float], form: str) -> None:
    def plain(model: nn.Module) -> float:
        return draw() + fitness(model) + draw()

    @batched
    def at_once(population: Population) -> Tensor:
        return torch.tensor([draw() for _ in range(len(population))]) - (population(X) - Y).square().mean((1, 2))

    def run(seed: int) -> Any:
        trainer = make(fitness_fn=at_once if form == "batched" else plain, coalesce=form != "alone", seed=seed)
        before = torch.get_rng_state(), list(np.random.get_state(legacy=False)["state"]["key"]), random.getstate()
        trainer.train(2, verbose=False)
        assert torch.equal(torch.get_rng_state(), before[0]), "put back"
        assert (list(np.random.get_state(legacy=False)["state"]["key"]), random.getstate()) == before[1:], "put back"
        # Another run begins with generators in another state.
        draw()
        return trainer

    first, again = run(1), run(1)
    assert_same(first.state_dict(), again.state_dict())
    assert first.history["fitness"] != run(2).history["fitness"]
    if form == "plain":
        alone = make(fitness_fn=plain, coalesce=False)
        alone.train(2, verbose=False)
        assert alone.history["mean_fitness"] == pytest.approx(first.history["mean_fitness"], rel=1e-5)


# Batched functions.


class Wrong(nn.Sequential):
    """A model that does something else for many members: it looks whether it is batched."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if torch._C._functorch.maybe_current_level() is not None else 1.0)


@pytest.mark.parametrize("each", [False, True])
def test_outputs_of_batched_functions_are_compared(each: bool) -> None:
    @batched
    def at_once(population: Population) -> Tensor:
        outputs = population.each(X.expand(len(population), -1, -1)) if each else population(X)
        return -(outputs - Y).square().mean((1, 2))

    said = messages(trainer := make(fitness_fn=at_once, model=Wrong(*network())), 2)
    twin = make(model=Wrong(*network()), coalesce=False)
    twin.train(2, verbose=False)
    assert len(said) == 1 and "in call 1 of generation 1 the output of member 0" in said[0]
    assert trainer.history["mean_fitness"] == pytest.approx(twin.history["mean_fitness"], rel=1e-5)


def test_batched_functions_may_go_without() -> None:
    @batched(check=False)
    def at_once(population: Population) -> Tensor:
        return -(population(X) - Y).square().mean((1, 2))

    assert messages(make(fitness_fn=at_once, model=Wrong(*network()))) == []


# What is compared.


def test_a_threshold_reached_by_rounding_is_no_difference() -> None:
    """Outputs may lie on either side of a step; a wrong one lies on neither."""
    model = nn.Linear(4, 1, bias=False)

    def call() -> Tensor:
        return (model(X) > threshold).float()

    with torch.no_grad():
        threshold = model(X).flatten()[3]
        expected = call()
        other_side, wrong = expected.clone(), expected.clone()
        other_side[3] = 1 - other_side[3]
        wrong[4] = 1 - wrong[4]
        eps = torch.finfo(torch.float32).eps
        assert disagreement(model, call, expected, eps) is None
        assert disagreement(model, call, other_side, eps) is None
        assert disagreement(model, call, wrong, eps) is not None


def rounding(factor: float) -> Callable[..., Any]:
    """A backend of torch.compile whose code gives other numbers."""

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        return lambda *given: tuple(factor * value for value in graph.forward(*given))

    return backend


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # from torch's own compiler, at its import
def test_a_compiled_loss_may_round_differently_and_a_compiled_model_may_not_differ() -> None:
    def loss(output: Tensor) -> Tensor:
        return (output - Y).square().mean()

    compiled_loss = torch.compile(loss, backend=rounding(1 + 1e-6))
    compiled, eager = (make(fitness_fn=lambda model, f=f: -f(model(X)).item()) for f in (compiled_loss, loss))
    assert not messages(compiled, 3) and not messages(eager, 3)
    assert compiled.history == eager.history
    with torch.no_grad():
        assert compiled.evaluate_fitness(compiled.model) != eager.evaluate_fitness(eager.model)
    model = Wrapped()
    model.compile(backend=rounding(1.1))
    (found,) = messages(make(model=model))
    assert ALONE in found and "is not what the model gives with its weights" in found


@pytest.mark.parametrize("view", [lambda t: t[3:], lambda t: t.T, lambda t: t[:, 1:5:2], lambda t: t[:0], lambda t: t])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
def test_copies_lie_in_memory_as_the_original(view: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    original = view(torch.arange(60.0).view(10, 6).to(dtype))
    copy = aligned_copy(original)
    assert torch.equal(copy, original) and copy.stride() == original.stride() and not copy._is_view()
    assert original.numel() == 0 or (copy.data_ptr() - original.data_ptr()) % 64 == 0


# The best member.


class ByRegister(nn.Module):
    """Finds a part of itself in a register of the class, as no copy can know."""

    register: dict[str, nn.Module] = {}

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.register["net"] = self.net

    def forward(self, x: Tensor) -> Tensor:
        return self.register["net"](x)


@pytest.mark.parametrize("form", ["plain", "alone", "batched"])
def test_the_best_weights_in_the_users_own_model(form: str) -> None:
    @batched
    def at_once(population: Population) -> Tensor:
        return -(population(X).double() - Y).square().mean((1, 2))

    options: dict[str, Any] = {"fitness_fn": at_once if form == "batched" else fitness, "coalesce": form != "alone"}
    trainer = make(model=ByRegister(), **options)
    trainer.train(2, verbose=False)
    before = trainer.current_params
    with trainer.best_weights() as best:
        assert best is trainer.model
        assert fitness(best) == pytest.approx(trainer.best_fitness, rel=1e-5)
        with pytest.raises(RuntimeError, match="leave the block first"):
            trainer.step()
    assert torch.equal(trainer.current_params, before)
    with pytest.raises(RuntimeError, match=r"with trainer\.best_weights\(\) as model"):
        trainer.get_best_model()


def test_the_best_weights_before_the_first_generation_are_the_models_own() -> None:
    trainer = make()
    with trainer.best_weights() as best:
        assert torch.equal(nn.utils.parameters_to_vector(best.parameters()), trainer.initial_params)


# Arguments.


@pytest.mark.parametrize(("value", "error"), [("maybe", ValueError), (1, TypeError), (None, TypeError)])
def test_coalesce_is_validated(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r'coalesce must be True, False or "unchecked"'):
        make(coalesce=value)


def test_two_threads_take_turns() -> None:
    trainers = [make(seed=seed) for seed in (1, 2)]
    threads = [threading.Thread(target=t.train, args=(5,), kwargs={"verbose": False}) for t in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, trainer in zip((1, 2), trainers, strict=True):
        twin = make(seed=seed)
        twin.train(5, verbose=False)
        assert trainer.history == twin.history
