"""The documents in `reference/` are the contract: their code runs as written and does what they say."""

import ast
import inspect
import re
from abc import ABC
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_blocks import BLOCKS, JOINED, NAMES, REFERENCE, TRAINERS, Block, cases, lines_of, spans
from torch import Tensor, nn

import eggroll_trainer
from eggroll_trainer import EGGROLLTrainer, ESTrainer, VanillaESTrainer

# The documented settings move a weight by a thousandth a generation.
pytestmark = pytest.mark.filterwarnings("ignore::eggroll_trainer.diagnostics.LearningWarning")

# A quadratic to climb: with inputs ± the unit vectors it is -(|W|² + 3|b|²), and its gradient is known.
INPUTS = torch.cat([torch.eye(3), -torch.eye(3)])
START = 0.4


def fitness_fn(model: nn.Module) -> float:
    return -model(INPUTS).square().sum().item() / 2


@pytest.fixture
def model() -> nn.Module:
    model = nn.Linear(3, 2)
    for parameter in model.parameters():
        nn.init.constant_(parameter, START)
    return model


@pytest.fixture
def custom() -> type[ESTrainer]:
    """The custom trainer of the API reference."""
    return BLOCKS["es_trainer_api.txt", "custom trainer"].run()["CustomESTrainer"]


@pytest.fixture
def trainer(model: nn.Module) -> ESTrainer:
    return EGGROLLTrainer(model.parameters(), model=model, fitness_fn=fitness_fn, population_size=16, seed=0)


# The blocks themselves


@pytest.mark.parametrize("document", NAMES)
def test_no_block_is_lost(document: str) -> None:
    found = spans(document)
    assert len(found) == len(NAMES[document])
    # Whatever looks like a statement stands inside a block.
    statement = re.compile(r"\s*(class \w+\(|def \w+\(|import |from \w+ import |return |pass$|\w+ = |[\w.]+\($)")
    for i, line in enumerate(lines_of(document)):
        if statement.match(line):
            assert any(start <= i < stop for start, stop in found), f"{document}:{i + 1}: {line}"


def test_every_document_is_read() -> None:
    assert {path.name for path in REFERENCE.iterdir()} == set(NAMES)


@cases()
def test_only_whitespace_is_restored(block: Block) -> None:
    restored = [line.strip() for line in block.source.splitlines()]
    written = [line.strip() for line in block.lines]
    if (block.document, block.name) == JOINED:
        restored, written = [" ".join(restored)], [" ".join(written)]
    assert restored == written


@cases()
def test_block_compiles(block: Block) -> None:
    compile(block.source, block.document, "exec")


# User guide, in both versions


@cases("required methods")
def test_the_two_methods_are_all_a_subclass_must_write(block: Block, model: nn.Module) -> None:
    namespace = block.run(ESTrainer=ESTrainer)
    defined = namespace.keys() - {"ESTrainer", "__name__", "__builtins__"}
    (stub,) = (namespace[name] for name in defined)
    trainer = stub(model.parameters(), model=model, fitness_fn=fitness_fn)
    assert isinstance(trainer, ESTrainer)
    for method in "sample_perturbations", "compute_update":
        unfinished = type("Unfinished", (stub,), {method: getattr(ESTrainer, method)})
        with pytest.raises(TypeError, match=method):
            unfinished(model.parameters(), model=model, fitness_fn=fitness_fn)


@cases("custom trainer")
def test_custom_trainer_climbs_a_quadratic(block: Block, model: nn.Module) -> None:
    population_size, learning_rate, sigma, generations = 50, 0.1, 0.1, 20
    trainer = block.run()["CustomESTrainer"](
        model.parameters(),
        model=model,
        fitness_fn=fitness_fn,
        population_size=population_size,
        learning_rate=learning_rate,
        sigma=sigma,
        seed=0,
    )
    before = fitness_fn(model)
    trainer.train(num_generations=generations, verbose=False)
    # z-scores make the expected update a step of σ along the gradient, which is 3.9 long at the start and
    # 2.9 after a path of 20·lr·σ = 0.2: a gain of 0.58 or more. Noise adds √20·lr·σ/√N = 0.006 to a
    # coordinate and 0.02 to the fitness (0.01 measured over 40 seeds, around a gain of 0.66). 0.4 lies nine
    # of these below the least gain: chance fails it with a probability under 1e-18.
    assert fitness_fn(model) - before > 0.4


@cases("vanilla usage", "eggroll usage")
def test_usage_trains(block: Block, model: nn.Module) -> None:
    before = fitness_fn(model)
    trainer = block.run(model=model, fitness_fn=fitness_fn)["trainer"]
    assert type(trainer) is (VanillaESTrainer if block.name == "vanilla usage" else EGGROLLTrainer)
    assert isinstance(trainer, ESTrainer) and isinstance(trainer, torch.optim.Optimizer)
    assert len(trainer.history["fitness"]) == 100
    # The expected step is √N·lr·σ long, 0.007 or more along a gradient of 3.9 at the start: a hundred of them
    # lead from -1.92 to -0.32 ± 0.007 (N = 50) or to the top (N = 256), far beyond half of the way.
    assert fitness_fn(model) > before / 2


@cases("basic training")
def test_basic_training(block: Block, trainer: ESTrainer) -> None:
    block.run(trainer=trainer)
    assert len(trainer.history["fitness"]) == 100
    block.run(trainer=trainer)
    assert len(trainer.history["fitness"]) == 200


@cases("progress tracking")
def test_progress_is_told_every_tenth_generation(
    block: Block, trainer: ESTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    block.run(trainer=trainer)
    told = re.findall(r"^Generation (\d+): Mean fitness = (-?\d+\.\d{4})$", capsys.readouterr().out, re.M)
    means = trainer.history["mean_fitness"]
    assert told == [(str(g), f"{means[g - 1]:.4f}") for g in range(10, 101, 10)]


@cases("history")
def test_history_is_accessible(block: Block, trainer: ESTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    trainer.train(num_generations=5, verbose=False)
    history = block.run(trainer=trainer)["history"]
    assert all(len(history[key]) == 5 for key in ("fitness", "mean_fitness", "best_fitness"))
    best_so_far = [max(history["fitness"][: i + 1]) for i in range(5)]
    assert history["best_fitness"] == best_so_far
    assert all(mean < best for mean, best in zip(history["mean_fitness"], history["fitness"], strict=True))
    assert f"Best fitness: {best_so_far[-1]}\n" in capsys.readouterr().out


@cases("best model")
def test_best_model_earned_the_best_score(block: Block, model: nn.Module, trainer: ESTrainer) -> None:
    trainer.train(num_generations=5, verbose=False)
    best_model = block.run(trainer=trainer)["best_model"]
    assert type(best_model) is type(model)
    assert not {p.data_ptr() for p in best_model.parameters()} & {p.data_ptr() for p in model.parameters()}
    # Alone or within its population a member's products are rounded differently, in float32.
    assert fitness_fn(best_model) == pytest.approx(max(trainer.history["fitness"]), rel=1e-5)


@pytest.mark.parametrize("document", TRAINERS)
def test_documented_defaults_of_eggroll(document: str) -> None:
    text = "\n".join(lines_of(document))
    documented = re.findall(r"^(?:#### )?`?(\w+)`? \((int|bool), default: (\w+)\)$", text, re.M)
    assert [name for name, _, _ in documented] == ["rank", "noise_reuse", "group_size", "freeze_nonlora"]
    parameters = inspect.signature(EGGROLLTrainer).parameters
    for name, kind, default in documented:
        assert repr(parameters[name].default) == default
        assert type(parameters[name].default).__name__ == kind


# API reference


@cases("signature")
def test_signature(block: Block, model: nn.Module, custom: type[ESTrainer]) -> None:
    (statement,) = ast.parse(block.source).body
    assert isinstance(statement, ast.Expr) and isinstance(call := statement.value, ast.Call)
    required = [ast.unparse(argument) for argument in call.args]
    defaults = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    assert len(required) == 3 and len(defaults) == 5
    for cls in ESTrainer, VanillaESTrainer:
        parameters = inspect.signature(cls).parameters
        assert list(parameters)[: len(required)] == required
        assert {name: parameters[name].default for name in defaults} == defaults

    block.run(ESTrainer=custom, params=model.parameters(), model=model, fitness_fn=fitness_fn)


def test_bases() -> None:
    assert issubclass(ESTrainer, torch.optim.Optimizer)
    assert issubclass(ESTrainer, ABC)
    assert ESTrainer.__abstractmethods__ == {"sample_perturbations", "compute_update"}


def documented_parameters(method: str) -> dict[str, str]:
    """Names and defaults in the parameter table of a method (`ESTrainer` for the constructor's)."""
    text = "\n".join(lines_of("es_trainer_api.txt"))
    _, _, section = re.split(rf"^({method}(?: |\nabstractmethod\n)¶)$", text, maxsplit=1, flags=re.M)
    section = re.split(r"^(?:Returns:|Source code in .*)$", section, maxsplit=1, flags=re.M)[0]
    _, _, table = section.partition("| Name | Type | Description | Default |\n|---|---|---|---|\n")
    cells = [cell.strip() for cell in table.split("|")]
    rows = [cells[i : i + 4] for i in range(0, len(cells) - 3, 4)]
    # A row without a type ends in an empty cell.
    return {name: default or third for name, _, third, default in rows}


@pytest.mark.parametrize(
    ("method", "count"),
    [
        ("ESTrainer", 8),
        ("compute_update", 2),
        ("evaluate_fitness", 1),
        ("get_best_model", 0),
        ("reset", 0),
        ("sample_perturbations", 1),
        ("step", 1),
        ("train", 2),
        ("zero_grad", 1),
    ],
)
def test_documented_parameters(method: str, count: int) -> None:
    documented = documented_parameters(method)
    assert len(documented) == count
    callee: Callable[..., Any] = ESTrainer if method == "ESTrainer" else getattr(ESTrainer, method)
    actual = [p for p in inspect.signature(callee).parameters.values() if p.name != "self"]
    assert [p.name for p in actual[:count]] == list(documented)
    for parameter in actual[count:]:
        assert parameter.default is not parameter.empty or parameter.kind is parameter.VAR_KEYWORD
    for parameter in actual[:count]:
        default = documented[parameter.name]
        if default != "required":
            assert parameter.default == ast.literal_eval(default)


def test_methods_of_the_abstract_section(model: nn.Module) -> None:
    methods = {}
    for name in "sample_perturbations", "compute_update":
        methods[name] = BLOCKS["es_trainer_api.txt", name].run(Tensor=Tensor)[name]
        documented = list(documented_parameters(name))
        assert list(inspect.signature(methods[name]).parameters) == ["self", *documented]
        assert inspect.getdoc(methods[name])
    stub = type("Stub", (ESTrainer,), methods)
    assert isinstance(stub(model.parameters(), model=model, fitness_fn=fitness_fn), ESTrainer)


def test_population_size_counts_the_models_evaluated(model: nn.Module, custom: type[ESTrainer]) -> None:
    evaluated = 0

    def counting(model: nn.Module) -> float:
        nonlocal evaluated
        evaluated += 1
        return fitness_fn(model)

    trainer = custom(
        model.parameters(), model=model, fitness_fn=counting, population_size=7, seed=0, coalesce="unchecked"
    )
    trainer.step()
    assert evaluated == 7


def test_evaluate_fitness(model: nn.Module, trainer: ESTrainer) -> None:
    fitness = trainer.evaluate_fitness(model)
    assert isinstance(fitness, float)
    assert fitness == fitness_fn(model)


def test_reset(model: nn.Module, trainer: ESTrainer) -> None:
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train(num_generations=3, verbose=False)
    first = list(trainer.history["fitness"])
    assert any(not torch.equal(value, initial[name]) for name, value in model.state_dict().items())
    trainer.reset()
    assert all(torch.equal(value, initial[name]) for name, value in model.state_dict().items())
    assert not trainer.history["fitness"]
    trainer.train(num_generations=3, verbose=False)
    assert trainer.history["fitness"] == first


def test_seed_makes_runs_reproducible(custom: type[ESTrainer]) -> None:
    def run(seed: int) -> list[float]:
        model = nn.Linear(3, 2)
        nn.init.constant_(model.weight, START)
        nn.init.constant_(model.bias, START)
        trainer = custom(model.parameters(), model=model, fitness_fn=fitness_fn, seed=seed)
        trainer.train(num_generations=3, verbose=False)
        return trainer.history["fitness"]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_step_ignores_its_closure_and_returns_metrics(trainer: ESTrainer) -> None:
    def closure() -> float:
        raise AssertionError("the closure was called")

    for generation, metrics in enumerate([trainer.step(), trainer.step(closure)], start=1):
        assert isinstance(metrics, dict)
        assert metrics["generation"] == generation
        assert metrics.keys() >= {"mean_fitness", "best_fitness", "std_fitness"}


def test_train_returns_the_final_state(trainer: ESTrainer) -> None:
    state = trainer.train(num_generations=3, verbose=False)
    assert isinstance(state, dict)
    assert state["generation"] == 3
    assert state["best_fitness"] == max(trainer.history["fitness"])
    assert len(state["fitness_history"]) == 3


def test_only_a_verbose_run_prints(trainer: ESTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    trainer.train(num_generations=2, verbose=False)
    assert capsys.readouterr() == ("", "")
    trainer.train(num_generations=2, verbose=True)
    assert any(capsys.readouterr())


@pytest.mark.parametrize("arguments", [{}, {"set_to_none": False}, {"set_to_none": True}], ids=str)
def test_zero_grad_is_a_no_op(arguments: dict[str, bool], model: nn.Module, trainer: ESTrainer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer.zero_grad(**arguments)
    for parameter in model.parameters():
        assert parameter.grad is not None and bool((parameter.grad == 1).all())


# Front page and core concepts


@cases("quick start")
def test_quick_start(block: Block) -> None:
    namespace = block.run()
    trainer, model = namespace["trainer"], namespace["model"]
    assert isinstance(trainer, EGGROLLTrainer)
    assert len(trainer.history["fitness"]) == 100
    # The fitness is N(0, 1), drawn anew by each of 256 members: its deviation is 1 ± 0.044 in any generation.
    # Two of the best scores agree to float32 in one run of a thousand, ten never do.
    assert min(trainer.history["std_fitness"]) > 0.5
    assert len(set(trainer.history["fitness"])) > 90
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@cases("low-rank formula")
def test_low_rank_formula(block: Block) -> None:
    m, n, r, sigma = 6, 5, 2, 0.1
    W = torch.zeros(m, n, dtype=torch.float64)
    perturbed = block.run(torch=torch, m=m, n=n, r=r, sigma=sigma, W=W)["W_perturbed"]
    assert perturbed.shape == W.shape
    assert torch.linalg.matrix_rank(perturbed - W, rtol=1e-5) == r


def test_public_names() -> None:
    assert {"ESTrainer", "VanillaESTrainer", "EGGROLLTrainer"} <= set(eggroll_trainer.__all__)
