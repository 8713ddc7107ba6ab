"""A change of what a generation depends on is the same in all processes, or an error."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_cases import make
from launching import python, run_script
from ray_cluster import Cluster

from eggroll_trainer import EGGROLLTrainer
from eggroll_trainer.distributed import LocalEngine

CHANGES = """
import engine_cases
from eggroll_trainer.fitness.shaping import centered_ranks

def module_level(scores):
    return centered_ranks(scores) ** 3
engine_cases.module_level = module_level
module_level.__module__, module_level.__qualname__ = "engine_cases", "module_level"

CHANGES = {
    "noise_reuse": lambda t: setattr(t, "noise_reuse", 4),
    "group_size": lambda t: setattr(t, "group_size", 8),
    "shaping": lambda t: setattr(t, "shaping", "raw"),
    "function": lambda t: setattr(t, "shaping", module_level),
    "chunk_size": lambda t: setattr(t, "chunk_size", 20),
    "population_size": lambda t: setattr(t, "population_size", 64),
    "noise": lambda t: setattr(t, "noise", "rademacher"),
    "coalesce": lambda t: setattr(t, "coalesce", False),
    "max_grad_norm": lambda t: setattr(t, "max_grad_norm", 0.05),
    "seed": lambda t: setattr(t, "seed", 9),
    "sigma": lambda t: setattr(t, "sigma", 0.2),
    "frozen": lambda t: t.model[0].requires_grad_(False),
}
"""

CALLBACKS = (
    CHANGES
    + """
for name, change in CHANGES.items():
    trainer = make(EGGROLLTrainer, ENGINE, noise_reuse=2, fitness_fn=plain)
    trainer.train(4, verbose=False, callback=lambda generation, history: generation == 2 and change(trainer))
    say(name, trainer.checksum())
"""
)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("local") / "script.py"
    path.write_text("from engine_cases import *\ntorch.set_num_threads(1)\nsay, ENGINE = print, 'local'\n" + CALLBACKS)
    return python(path).splitlines()


def test_what_a_callback_changes_reaches_all_processes(local: list[str], tmp_path: Path) -> None:
    said = run_script(2, tmp_path, "ENGINE = ProcessGroupEngine(check_every=1)\n" + CALLBACKS)
    assert said == [local, local]
    assert len({line.split()[1] for line in local}) == len(local) == 12


def test_what_a_callback_changes_reaches_rays_workers(local: list[str], cluster: Cluster, tmp_path: Path) -> None:
    assert cluster.run(tmp_path, "from engine_cases import *\nsay = print\n" + CALLBACKS) == local


def test_what_one_process_changes_is_an_error(tmp_path: Path) -> None:
    said = run_script(
        2,
        tmp_path,
        CHANGES
        + """
CHANGES["lambda"] = lambda t: setattr(t, "shaping", lambda scores: 2 * scores)
for name, change in CHANGES.items():
    trainer = make(EGGROLLTrainer, ProcessGroupEngine(check_every=0), noise_reuse=2, shaping=lambda scores: scores)
    trainer.step()
    if rank == 1:
        change(trainer)
    try:
        trainer.step()
    except RuntimeError as error:
        say(name, error)
    assert trainer.generation == 1
""",
    )
    names = {"function": "shaping", "lambda": "shaping", "sigma": "options"}
    for lines in said:
        assert len(lines) == 13
        for line in lines:
            name, _, message = line.partition(" ")
            assert f"do not agree on {names.get(name, name)} in generation 2" in message, line


def test_functions_that_cannot_be_sent(tmp_path: Path) -> None:
    said = run_script(
        2,
        tmp_path,
        """
trainer = make(EGGROLLTrainer, None)
try:
    trainer.train(2, verbose=False, callback=lambda *_: setattr(trainer, "shaping", lambda scores: scores))
except TypeError as error:
    say(trainer.generation, error)
""",
    )
    for lines in said:
        assert lines[0].startswith("1 shaping was set to __main__.<lambda>.<locals>") and "cannot be sent" in lines[0]


def test_the_numbers_are_those_of_one_process_with_the_same_settings() -> None:
    # A change in a callback is one between two calls of train.
    called, between = make(EGGROLLTrainer, LocalEngine()), make(EGGROLLTrainer, LocalEngine())

    def callback(generation: int, history: list[float]) -> None:
        if generation == 2:
            called.noise_reuse = 4

    called.train(3, verbose=False, callback=callback)
    between.train(2, verbose=False)
    between.noise_reuse = 4
    between.train(1, verbose=False)
    assert called.checksum() == between.checksum()
