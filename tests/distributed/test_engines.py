"""Every engine gives the bits of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_cases
import pytest
import torch
from engine_cases import CASES, make
from launching import in_group, on_two_nodes, python, run_script, torchrun
from ray_cluster import Cluster

from eggroll_trainer import EGGROLLTrainer
from eggroll_trainer.distributed import Chunk, Engine, LocalEngine, ProcessGroupEngine, make_engine

SCRIPT = engine_cases.__file__


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("local") / "out.json"
    python(SCRIPT, out, "local")
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("run", "processes", "engine"), [(torchrun, 2, "scores"), (in_group, 3, "sums"), (in_group, 4, "auto")]
)
def test_processes_give_the_bits_of_one(
    run: Callable[..., Any], processes: int, engine: str, expected: Any, tmp_path: Path
) -> None:
    run(processes, SCRIPT, tmp_path / "out.json", engine)
    assert json.loads((tmp_path / "out.json").read_text()) == expected


def test_two_nodes_give_the_bits_of_one(expected: Any, tmp_path: Path) -> None:
    names = list(CASES)[:2]
    on_two_nodes(SCRIPT, tmp_path / "out.json", "auto", *names)
    assert json.loads((tmp_path / "out.json").read_text()) == {name: expected[name] for name in names}


@pytest.mark.parametrize(
    "workers", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_ray_gives_the_bits_of_one(workers: int, expected: Any, cluster: Cluster, tmp_path: Path) -> None:
    body = f"""
import engine_cases
ENGINE.workers = {workers}
engine_cases.run({str(tmp_path / "out.json")!r}, ENGINE)
"""
    cluster.run(tmp_path, body)
    assert json.loads((tmp_path / "out.json").read_text()) == expected


def test_the_cases_differ(expected: dict[str, Any]) -> None:
    assert set(expected) == set(CASES)
    assert len({result[0] for result in expected.values()}) == len(CASES)


def test_shares_are_consecutive_and_complete() -> None:
    engine = ProcessGroupEngine.__new__(ProcessGroupEngine)
    for count in range(1, 12):
        chunks = [Chunk(4 * i, 4) for i in range(count)]
        for size in range(1, 6):
            engine.size = size
            shares = [engine.share(chunks, rank) for rank in range(size)]
            assert [chunk for share in shares for chunk in share] == chunks
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_what_processes_begin_with_is_the_first_ones(tmp_path: Path) -> None:
    said = run_script(
        2,
        tmp_path,
        """
torch.manual_seed(rank)
model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
trainer = EGGROLLTrainer(model=model, fitness_fn=plain, chunk_size=10)
trainer.train(3, verbose=False)
say(trainer.engine.size, trainer.seed, trainer.checksum())
""",
    )
    assert said[0] == said[1] and said[0][0].startswith("2 ")


def test_an_error_in_one_process_reaches_all_and_training_goes_on(tmp_path: Path) -> None:
    said = run_script(
        2,
        tmp_path,
        """
calls = 0
@batched
def fitness(population):
    global calls
    calls += 1
    if rank == 1 and calls == 5:
        raise KeyError("broken")
    return at_once(population)
trainer = make(EGGROLLTrainer, None, fitness_fn=fitness)
trainer.step()
try:
    trainer.step()
except Exception as error:
    say(type(error).__name__, error)
assert trainer.generation == 1
trainer.train(2, verbose=False)
say(trainer.checksum())
""",
    )
    assert said[1][0].startswith("KeyError") and "process 1 failed in generation 2: KeyError" in said[0][0]
    quiet = make(EGGROLLTrainer, LocalEngine())
    quiet.train(3, verbose=False)
    assert said[0][-1] == said[1][-1] == str(quiet.checksum())


def test_processes_must_score_on_the_same_tasks(tmp_path: Path) -> None:
    said = run_script(
        2,
        tmp_path,
        """
trainer = make(EGGROLLTrainer, None)
before = trainer.checksum()

@batched
def fitness(population):
    return tasks_at_once(population)[:, : 4 - rank]
trainer.fitness_fn = fitness
try:
    trainer.step()
except ValueError as error:
    say(error)
assert trainer.checksum() == before
""",
    )
    expected = (
        "in generation 1 the fitness function returned 4 scores for each of members 0-11 and 3 scores for each of"
        " members 24-35: all members of a generation must be scored on the same tasks"
    )
    assert said == [[expected], [expected]]


def test_a_process_that_evaluates_alone_takes_the_others_along(tmp_path: Path) -> None:
    # Where it finds that out, what it has for scores is not of as many tasks.
    said = run_script(
        2,
        tmp_path,
        """
import warnings
warnings.simplefilter("ignore")
calls = 0

def fitness(model):
    # Members who take turns count each other's calls.
    global calls
    calls = 0
    scores = tasks(model)
    calls += 1
    return scores - calls if rank == 1 else scores - 1

trainer, twin = make(EGGROLLTrainer, None, fitness_fn=fitness), make(EGGROLLTrainer, None, fitness_fn=fitness)
twin.coalesce = False
trainer.step()
twin.step()
say(*trainer.last_generation.scores.shape, trainer.checksum() == twin.checksum(), trainer._findings.alone)
""",
    )
    assert all(line.startswith("56 4 True") and "earned" in line for (line,) in said)


def test_processes_that_disagree_are_named(tmp_path: Path) -> None:
    said = run_script(
        3,
        tmp_path,
        """
def nudge(trainer):
    trainer.model[0].weight.data[3, 2] += 1e-6

for change in (
    lambda trainer: setattr(trainer, "sigma", 0.2),
    nudge,
    lambda trainer: setattr(trainer, "seed", 7),
    lambda trainer: setattr(trainer, "chunk_size", 14),
):
    trainer = make(EGGROLLTrainer, ProcessGroupEngine(check_every=1))
    trainer.step()
    before = trainer.checksum()
    if rank == 2:
        change(trainer)
    try:
        trainer.step()
    except RuntimeError as error:
        say(error)
    assert rank == 2 or trainer.checksum() == before
""",
    )
    for lines in said:
        for line, what in zip(lines, ("options", "parameters", "seed", "chunk_size"), strict=True):
            assert f"do not agree on {what} in generation 2: processes [2] differ from process 0" in line


def test_the_first_process_calls_back_and_the_others_follow(tmp_path: Path) -> None:
    said = run_script(
        2,
        tmp_path,
        """
trainer = make(EGGROLLTrainer, None)
def callback(generation, history):
    say("called", generation)
    trainer.sigma *= 0.5
    if generation == 3:
        raise LookupError("enough")
try:
    trainer.train(5, verbose=False, callback=callback)
except LookupError as error:
    say(trainer.generation, trainer.sigma, trainer.checksum(), error)
""",
    )
    assert said[0][:3] == ["called 1", "called 2", "called 3"] and len(said[1]) == 1
    # The change before the exception is the first process's alone.
    first, second = said[0][3].split(), said[1][0].split()
    assert first[0] == second[0] == "3" and first[2:] == second[2:]


# Only the last members' inputs make the model one that cannot be batched, and only the first member has no score.
WARNS = """
import warnings

class Moody(nn.Linear):
    def forward(self, x):
        return super().forward(x) + (self.weight.sum().item() if x.sum() < 0 else 0.0)

@batched
def fitness(population):
    last = population.members.start > 0
    scores = population(-torch.ones(1) if last else torch.ones(1)).flatten()
    return scores if last else scores.clone().index_fill_(0, torch.tensor([0]), torch.nan)

def given(engine):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = EGGROLLTrainer(model=Moody(1, 1), fitness_fn=fitness, engine=engine, population_size=8, chunk_size=4)
        for _ in range(3):
            trainer.step()
    return [str(warning.message).split(",")[0] for warning in caught if "eggroll" in warning.filename]
"""
GIVEN = [
    "the model is run once for each member",
    "a fitness that is not finite counts as the worst finite one of its generation; see num_nonfinite in the metrics",
]


def test_the_first_process_gives_the_warnings_of_all(tmp_path: Path) -> None:
    said = run_script(2, tmp_path, WARNS + "for warning in ['begin', *given(None)]:\n    say(warning)")
    assert said == [["begin", *GIVEN], ["begin"]]


def test_the_script_gives_the_warnings_of_rays_workers(cluster: Cluster, tmp_path: Path) -> None:
    body = "from engine_cases import *\n" + WARNS + "for warning in given(ENGINE):\n    print(warning)"
    assert cluster.run(tmp_path, body) == GIVEN


def test_processes_without_work_are_warned_of(tmp_path: Path) -> None:
    said = run_script(
        2,
        tmp_path,
        """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    trainer = make(EGGROLLTrainer, None, population_size=8, chunk_size=8)
    trainer.train(2, verbose=False)
say("begin", *(warning.message for warning in caught if "work" in str(warning.message)))
""",
    )
    warning = "there is work for only 1 of 2 processes, as a chunk has 8 of the 8 members; set a smaller chunk_size"
    assert said == [[f"begin {warning}"], ["begin"]]


# Small tensors that stay, between large ones that come and go, would keep the C library from using memory again: with
# 2^18 members that was gigabytes.
WATCHED = """
import weakref

class Watched(EGGROLLTrainer):
    scores = []

    def evaluate_chunk(self, chunk):
        assert all(scores() is None for scores in self.scores[:-1]), "an earlier chunk's scores are still there"
        outcome = super().evaluate_chunk(chunk)
        self.scores.append(weakref.ref(outcome.scores))
        return outcome
"""


def test_no_chunk_leaves_scores_of_its_own(tmp_path: Path) -> None:
    said = run_script(
        2,
        tmp_path,
        WATCHED
        + """
for engine in (make_engine("local"), None):
    for fitness in (at_once, tasks_at_once):
        trainer = make(Watched, engine, population_size=48, chunk_size=6, fitness_fn=fitness)
        Watched.scores.clear()
        trainer.step()
        say(len(Watched.scores), *trainer.last_generation.scores.shape)
""",
    )
    assert said == [["8 48", "8 48 16", "4 48", "4 48 16"]] * 2


def test_nothing_keeps_the_group_alive(tmp_path: Path) -> None:
    # Its threads would abort a process that ends, now and then.
    said = run_script(
        2,
        tmp_path,
        """
import weakref
import torch.distributed as dist
from eggroll_trainer.distributed import process_group
trainer = make(EGGROLLTrainer, None)
trainer.step()
group = weakref.ref(dist.group.WORLD)
process_group._leave_group()
say(group() is None)
""",
    )
    assert said == [["True"], ["True"]]


def test_bytes_that_travel(tmp_path: Path) -> None:
    said = run_script(
        2,
        tmp_path,
        """
@batched
def single(population):
    return at_once(population).float()

for exchange in ("scores", "sums"):
    for population in (512, 4096):
        for fitness in (single, at_once):
            engine = ProcessGroupEngine(exchange=exchange)
            options = dict(fitness_fn=fitness, population_size=population, chunk_size=256)
            trainer = make(EGGROLLTrainer, engine, **options)
            trainer.train(2, verbose=False)
            say(exchange, population, fitness is single, engine.bytes_sent / 2, len(trainer.current_params))
""",
    )
    for lines in said:
        for line in lines:
            exchange, population, single, sent, parameters = line.split()
            # Each of the two sends the scores of its half: as float32 where they are such numbers, else as float64.
            expected = int(population) / 2 * (4 if single == "True" else 8)
            if exchange == "sums":
                expected += 8 * int(parameters)
            assert expected < float(sent) < expected + 800


@pytest.mark.parametrize("name", [None, "local"])
def test_names_of_engines(name: str | None) -> None:
    assert isinstance(make_engine(name), LocalEngine)
    engine: Engine = LocalEngine()
    assert make_engine(engine) is engine


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: make_engine("cluster"), ValueError, "engine must be 'local', 'torch', 'ray'"),
        (lambda: make_engine(3), TypeError, "got int"),  # type: ignore[arg-type]
        (lambda: make_engine("torch"), RuntimeError, "start the script with torchrun"),
        (lambda: ProcessGroupEngine(exchange="all"), ValueError, "exchange must be one of"),  # type: ignore[arg-type]
        (lambda: LocalEngine(timeout=0), ValueError, "timeout"),
        (lambda: LocalEngine(retries=-1), ValueError, "retries"),
    ],
)
def test_bad_arguments(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_a_copy_of_a_trainer_goes_on_alike() -> None:
    import copy

    trainer = CASES["everything"](LocalEngine())
    trainer.train(3, verbose=False)
    other = copy.deepcopy(trainer)
    assert other.model is not trainer.model
    for _ in range(3):
        assert other.step() == trainer.step()
    assert torch.equal(other.current_params, trainer.current_params)
