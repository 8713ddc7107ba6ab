"""The benchmarks: what is compared with what."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, Population, batched

from . import measure, peers, workloads
from .workloads import Naive, Workload


@dataclasses.dataclass
class Table:
    """The results of a suite.

    Attributes:
        title: Its heading.
        text: What was measured.
        columns: Of the table.
        rows: By column.
        bars: What is drawn, with its values.
        unit: Of the bars.
        scale: Of the axis.
    """

    title: str
    text: str
    columns: list[str]
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    bars: dict[str, float] = dataclasses.field(default_factory=dict)
    unit: str = "ms"
    scale: str = "linear"

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _times_table(title: str, text: str, seconds: dict[str, list[float]], against: str | None = None) -> Table:
    """Return medians with their ratio to inference and, if named, to another entry."""
    medians = measure.medians(seconds)
    columns = ["what", "median ms", "fastest ms", "runs", "of inference"]
    table = Table(title, text, [*columns, f"times as fast as {against}"] if against else columns)
    for name, median in medians.items():
        row = {
            "what": name,
            "median ms": f"{median * 1e3:.1f}",
            "fastest ms": f"{min(seconds[name]) * 1e3:.1f}",
            "runs": len(seconds[name]),
            "of inference": f"{medians['inference'] / median:.2f}",
        }
        if against:
            row[f"times as fast as {against}"] = f"{medians[against] / median:.1f}"
        table.rows.append(row)
    table.bars = {name: median * 1e3 for name, median in medians.items()}
    table.scale = "log" if max(medians.values()) > 20 * min(medians.values()) else "linear"
    return table


def inference(workload: Workload, size: int, *, compiled: bool = False) -> Callable[[], Tensor]:
    """Return pure batched inference: all members' rows through the unperturbed model."""
    model, rows = workload.make(), workload.rows(size)
    function: Any = torch.compile(model, dynamic=False) if compiled else model

    @torch.inference_mode()
    def run() -> Tensor:
        return function(rows)

    return run


def forward(workload: Workload, size: int, **options: Any) -> Callable[[], Tensor]:
    """Return the forward of all members, their noise at hand."""
    trainer = workload.trainer(size, chunk_size=size, **options)
    population = Population(trainer.model, trainer._method.perturbations(0, size), forwards=trainer._forwards)

    @torch.no_grad()
    def run() -> Tensor:
        return workload.call(population)

    return run


def generation(workload: Workload, size: int, **options: Any) -> Callable[[], Any]:
    """Return a whole generation: noise, forward, shaping, update."""
    return workload.trainer(size, **options).step


def ours(workload: Workload, size: int) -> dict[str, Callable[[], object]]:
    """Return forward and generation, eager and compiled."""
    return {
        "forward": forward(workload, size),
        "forward, compiled": forward(workload, size, compile=True),
        "generation": generation(workload, size),
        "generation, compiled": generation(workload, size, compile=True),
    }


def w1(quick: bool) -> Table:
    """W1: small rows through a small network, where every overhead shows."""
    size, workload = (128 if quick else 1024), workloads.mlp()
    runs = {
        "inference": inference(workload, size),
        "inference, compiled": inference(workload, size, compiled=True),
        **ours(workload, size),
        "generation, Rademacher": generation(workload, size, noise="rademacher"),
        "generation, compiled, Rademacher": generation(workload, size, compile=True, noise="rademacher"),
        "generation, bf16": generation(workload, size, evaluation_dtype=torch.bfloat16),
        "generation, compiled, bf16": generation(workload, size, compile=True, evaluation_dtype=torch.bfloat16),
        "plain function, coalesced": generation(workload, size, fitness_fn=workloads.mlp_fitness),
        "plain function, coalesced, compiled": generation(
            workload, size, fitness_fn=workloads.mlp_fitness, compile=True
        ),
        "naive, one by one": _naive(workload, size),
    }
    return _times_table(
        f"W1: MLP 32-256-256-256-8 on 16 rows, N = {size}",
        "Rank 1, antithetic pairs.",
        measure.interleaved(runs, 3 if quick else 31, {"naive, one by one": 1 if quick else 5}),
        "naive, one by one",
    )


def peers_on_w1(quick: bool) -> Table:
    """W1 with other libraries. Apart, as each of them brings threads and memory pools of its own into the process."""
    size, workload = (128 if quick else 1024), workloads.mlp()
    task = peers.Task(
        sizes=workloads.MLP_SIZES,
        x=workloads.MLP_INPUTS.numpy(),
        labels=workloads.MLP_LABELS.numpy(),
        population_size=size,
        sigma=0.1,
        learning_rate=0.01,
        threads=torch.get_num_threads(),
    )
    runs = {
        "inference": inference(workload, size),
        "ours, compiled": generation(workload, size, compile=True),
        "ours": generation(workload, size),
        "naive, one by one": _naive(workload, size),
    }
    for name, factory in peers.PEERS.items():
        try:
            runs[name] = factory(task)
        except ImportError as error:
            print(f"{name} is left out: {error}")
    seconds = measure.interleaved(runs, 1 if quick else 9)
    table = _times_table(
        f"Other libraries on W1, N = {size}",
        "One generation of each with Gaussian noise, antithetic where they can (see `benchmarks/peers.py`).",
        seconds,
    )
    medians = measure.medians(seconds)
    column = "times as long as ours, compiled"
    table.columns.append(column)
    for row in table.rows:
        row[column] = f"{medians[row['what']] / medians['ours, compiled']:.1f}"
    return table


def _naive(workload: Workload, size: int) -> Callable[[], object]:
    """Return a generation of W1 with full-rank noise, one model after the other."""
    return Naive(workload.make(), lambda model, _: workloads.mlp_fitness(model), size).step


def w2(quick: bool) -> Table:
    """W2: the paper's own measure."""
    size, width = (64, 256) if quick else (1024, 2048)
    workload = workloads.linear(width, size)

    def score(model: nn.Module, index: int) -> float:
        return -model(workload.inputs[index : index + 1]).square().mean().item()

    # A sixteenth of the population, as members cost the same each.
    part = Naive(workload.make(), score, size // 16)

    def naive() -> None:
        part.step()

    runs = {
        "inference": inference(workload, size),
        **ours(workload, size),
        "generation, compiled, Rademacher": generation(workload, size, compile=True, noise="rademacher"),
        "naive, one by one": naive,
    }
    seconds = measure.interleaved(runs, 3 if quick else 31, {"naive, one by one": 1 if quick else 3})
    seconds["naive, one by one"] = [16 * value for value in seconds["naive, one by one"]]
    return _times_table(
        f"W2: linear layer {width} → {width} without bias, one row a member, N = {size}",
        "Naive: timed with N/16 members, and multiplied by 16.",
        seconds,
        "naive, one by one",
    )


def w3(quick: bool) -> Table:
    """W3: a transformer."""
    size = 4 if quick else 64
    workload = workloads.transformer(size)
    runs = {
        "inference": inference(workload, size),
        "inference, compiled": inference(workload, size, compiled=True),
        **ours(workload, size),
    }
    return _times_table(
        f"W3: transformer of 4 layers, width 256, 64 tokens, 4 rows a member, N = {size}",
        "Rank 1, antithetic pairs, float32.",
        measure.interleaved(runs, 2 if quick else 7),
    )


def ranks(quick: bool) -> Table:
    """What a higher rank costs."""
    size, workload = (128 if quick else 1024), workloads.mlp()
    runs: dict[str, Callable[[], object]] = {"inference": inference(workload, size)}
    for rank in (1, 2, 4, 8):
        runs[f"generation, rank {rank}"] = generation(workload, size, rank=rank)
        runs[f"generation, compiled, rank {rank}"] = generation(workload, size, rank=rank, compile=True)
    return _times_table(f"Ranks, W1, N = {size}", "Antithetic pairs.", measure.interleaved(runs, 3 if quick else 15))


def conv(quick: bool) -> Table:
    """A convolutional network."""
    size, workload = (16 if quick else 128), workloads.conv_net()
    runs: dict[str, Callable[[], object]] = {
        "inference": inference(workload, size),
        "forward": forward(workload, size),
        "forward, compiled": forward(workload, size, compile=True),
    }
    for rank in (1, 2, 4, 8):
        runs[f"generation, rank {rank}"] = generation(workload, size, rank=rank)
    runs["generation, compiled, rank 1"] = generation(workload, size, compile=True)
    return _times_table(
        f"Convolutional network on 16 images of 28×28, N = {size}",
        "Two 3×3 convolutions (16 and 32 channels), two linear layers; 16 images that all members share.",
        measure.interleaved(runs, 2 if quick else 7),
    )


def memory(quick: bool) -> Table:
    """Peak memory and time of very large populations, each in a process of its own."""
    table = Table(
        "Very large populations: W1",
        "Batched, eager; most memory that a generation takes besides what the process holds before it.",
        ["N", "generation s", "µs a member", "peak MB"],
        unit="µs a member",
    )
    for exponent in (8, 10) if quick else (14, 16, 18):
        size = 2**exponent
        seconds, peak = map(float, measure.in_new_process("benchmarks.one_generation", size).split())
        micros = seconds / size * 1e6
        table.rows.append(
            {"N": f"2^{exponent}", "generation s": f"{seconds:.2f}", "µs a member": f"{micros:.1f}",
             "peak MB": f"{peak / 1e6:.0f}"}
        )  # fmt: skip
        table.bars[f"N = 2^{exponent}"] = micros
    return table


def sequences(quick: bool) -> Table:
    """An LSTM over ever longer sequences, the score added up as it goes, beside backpropagation through time."""
    size, lengths = (8, (64, 128)) if quick else (256, (64, 128, 256, 512, 1024, 2048, 4096))
    table = Table(
        f"LSTM 16-64 over long sequences, N = {size}",
        "The fitness feeds 64 steps at a time and keeps the state and a running sum. Backpropagation: the same network"
        f" and length with {size} sequences in a batch. Each in a process of its own.",
        ["length", "evolution s", "peak MB", "backpropagation s", "its peak MB"],
        unit="s a generation",
    )
    times = []
    for length in lengths:
        row: dict[str, Any] = {"length": length}
        for kind, columns in (
            ("evolution", ("evolution s", "peak MB")),
            ("backpropagation", ("backpropagation s", "its peak MB")),
        ):
            seconds, peak = map(float, measure.in_new_process("benchmarks.one_sequence", kind, size, length).split())
            row |= {columns[0]: f"{seconds:.2f}", columns[1]: f"{peak / 1e6:.0f}"}
            if kind == "evolution":
                times.append(seconds)
        table.rows.append(row)
        table.bars[f"length {length}"] = times[-1]
    slope, intercept, residual = _linear_fit(lengths, times)
    table.text += (
        f" Time of evolution: {intercept:.2f} s + {slope * 1e3:.2f} ms · length, off by at most {residual:.1%}."
    )
    return table


def _linear_fit(x: Any, y: list[float]) -> tuple[float, float, float]:
    """Return slope, intercept and the largest relative error of a line, relative errors weighing the same."""
    a = torch.tensor([[value, 1.0] for value in x], dtype=torch.float64)
    b = torch.tensor(y, dtype=torch.float64)
    slope, intercept = torch.linalg.lstsq(a / b[:, None], torch.ones(len(b), 1, dtype=torch.float64)).solution[:, 0]
    error = ((a @ torch.stack([slope, intercept]) - b) / b).abs().max()
    return float(slope), float(intercept), float(error)


def overhead(quick: bool) -> Table:
    """What coalescing costs besides the functions' own code and the forwards."""
    size, calls = (64, 8) if quick else (1024, 16)
    model = workloads.seeded(lambda: nn.Linear(1, 1, bias=False))
    x = torch.zeros(1, 1)

    def trainer(count: int) -> EGGROLLTrainer:
        def fitness(model: nn.Module) -> float:
            for _ in range(count):
                model(x)
            return 0.0

        return EGGROLLTrainer(model=model, fitness_fn=fitness, population_size=size, chunk_size=size, seed=0)

    @batched
    def together(population: Population) -> Tensor:
        for _ in range(calls):
            population(x)
        return torch.zeros(size)

    reference = EGGROLLTrainer(model=model, fitness_fn=together, population_size=size, chunk_size=size, seed=0)
    seconds = measure.medians(
        measure.interleaved(
            {
                "none": functools.partial(trainer(0)._evaluator.evaluate, 0, size),
                "some": functools.partial(trainer(calls)._evaluator.evaluate, 0, size),
                "batched": functools.partial(reference._evaluator.evaluate, 0, size),
            },
            3 if quick else 15,
        )
    )
    member = seconds["none"] / size
    call = (seconds["some"] - seconds["none"] - seconds["batched"]) / size / calls
    table = Table(
        "Coalescing: cost of a member and of a call",
        f"N = {size}. A function that does nothing, and one that calls the model {calls} times; the time of as many"
        " batched calls taken off.",
        ["what", "µs"],
        unit="µs",
    )
    for name, value in (("a member", member), ("a model call", call)):
        table.rows.append({"what": name, "µs": f"{value * 1e6:.1f}"})
        table.bars[name] = value * 1e6
    return table


def paper(quick: bool) -> Table:
    """The paper's figure: a linear layer in bf16, on an accelerator if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width, size = (8192, 1024) if device == "cuda" and not quick else (512, 64)
    workload = workloads.linear(width, size, torch.bfloat16, device)
    at_hand = forward(workload, size, compile=True)
    trainer = workload.trainer(size, chunk_size=size, compile=True)

    @torch.no_grad()
    def on_the_fly() -> None:
        trainer._method.begin_generation()
        workload.call(Population(trainer.model, trainer._method.perturbations(0, size), forwards=trainer._forwards))

    model, rows = workload.make(), workload.rows(size)

    def backward() -> None:
        model.zero_grad()
        outputs: Tensor = model(rows)
        outputs.float().square().mean().backward()

    centre = next(model.parameters()).detach()
    generator = torch.Generator(device)

    @torch.no_grad()
    def open_es() -> None:
        # Full-rank noise, one member after the other.
        for row in workload.inputs[: max(1, size // 64)]:
            noise = torch.empty_like(centre).normal_(generator=generator)
            torch.nn.functional.linear(row, centre + 0.1 * noise)

    runs: dict[str, Callable[[], object]] = {
        "inference": inference(workload, size),
        "forward, noise at hand": at_hand,
        "forward, noise on the fly": on_the_fly,
        "forward and backward": backward,
        "OpenES, forward": open_es,
    }
    seconds = measure.interleaved(runs, 3 if quick else 30)
    seconds["OpenES, forward"] = [value * size / max(1, size // 64) for value in seconds["OpenES, forward"]]
    return _times_table(
        f"The paper's figure: linear layer d = {width}, bf16, {size} rows, {device}",
        "OpenES: timed with N/64 members, and multiplied.",
        seconds,
    )


def rl(quick: bool) -> Table:
    """Environment steps a second of HalfCheetah, with a policy in the loop and without."""
    import gymnasium
    import numpy as np

    from eggroll_trainer.rl.policies import MLPPolicy
    from eggroll_trainer.rl.rollout import EpisodeReturn
    from eggroll_trainer.rl.simulators import make_simulator

    count, steps = (8, 10) if quick else (256, 100)
    env_id = "HalfCheetah-v5"
    simulator = make_simulator(env_id, count)
    vector = gymnasium.make_vec(env_id, count, vectorization_mode="sync")
    random = np.random.default_rng(0).uniform(-1, 1, (steps, count, 6)).astype(np.float32)
    # Contacts take time to simulate, so what a step costs depends on the actions: who is compared with a generation
    # gets the actions that one played.
    played: list[Any] = []

    def alone(actions: Any) -> None:
        simulator.reset(range(count))
        for action in actions:
            simulator.step(action, np.ones(count, bool))

    def peer(actions: Any) -> None:
        vector.reset(seed=0)
        for action in actions:
            vector.step(action)

    def population(*hidden: int) -> tuple[EGGROLLTrainer, EpisodeReturn]:
        episodes = EpisodeReturn(env_id, max_steps=steps)
        policy = MLPPolicy(*episodes.spaces(), hidden=hidden)
        options: dict[str, Any] = {"population_size": count, "noise_reuse": 2, "seed": 0, "compile": True}
        return EGGROLLTrainer(model=policy, fitness_fn=episodes, **options), episodes

    small, episodes = population(64, 64)
    small.train(2, verbose=False)
    recorded = episodes._simulator(count)
    step = recorded.step

    def record(actions: Any, active: Any) -> Any:
        played.append(actions)
        return step(actions, active)

    recorded.step = record  # type: ignore[method-assign]
    small.step()
    recorded.step = step  # type: ignore[method-assign]

    base, other = "simulator alone, a generation's actions", "Gymnasium's SyncVectorEnv, the same actions"
    runs: dict[str, Callable[[], object]] = {
        base: lambda: alone(played),
        "simulator alone, random actions": lambda: alone(random),
        "generation, MLP 2×64": small.step,
        "generation, MLP 3×256": population(256, 256, 256)[0].step,
        other: lambda: peer(played),
        "Gymnasium's SyncVectorEnv, random actions": lambda: peer(random),
    }
    seconds = measure.medians(measure.interleaved(runs, 2 if quick else 7))
    table = Table(
        f"HalfCheetah-v5, N = {count}",
        f"Episodes of {steps} steps, resets included; a generation has noise, policy, simulator, shaping and update."
        " What it is compared with plays the actions of one of its generations, as the simulator is faster with random"
        " ones.",
        ["what", "env-steps/s", "of the simulator alone", "times as fast as SyncVectorEnv"],
        unit="env-steps/s",
    )
    for name, value in seconds.items():
        rate = count * steps / value
        table.rows.append(
            {"what": name, "env-steps/s": f"{rate:,.0f}", "of the simulator alone": f"{seconds[base] / value:.2f}",
             "times as fast as SyncVectorEnv": f"{seconds[other] / value:.2f}"}
        )  # fmt: skip
        table.bars[name] = rate
    return table


SUITES: dict[str, Callable[[bool], Table]] = {
    "w1": w1,
    "w2": w2,
    "w3": w3,
    "ranks": ranks,
    "conv": conv,
    "overhead": overhead,
    "memory": memory,
    "sequences": sequences,
    "rl": rl,
    "paper": paper,
    "peers": peers_on_w1,
}
