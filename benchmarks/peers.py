"""One generation of evolution strategies with other libraries: EvoTorch, evosax and EvoX.

    python benchmarks/peers.py

Every function of `PEERS` sets one library up for a `Task`, an MLP with ReLU between its layers whose fitness is minus
the mean cross-entropy, and returns a step that runs one whole generation: sample, evaluate all members in one batch,
update. All start from the same weights. Run as a script, it shows that every peer improves the fitness, and how fast.

A library is imported where it is used, so that the others can be measured without it. Each is run the fastest way found
that it documents; the comments say what was tried, on a CPU with one thread.
"""

# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy


@dataclasses.dataclass
class Task:
    sizes: list[int]
    x: numpy.ndarray  # float32 [rows, sizes[0]]
    labels: numpy.ndarray  # int64 [rows]
    population_size: int
    sigma: float
    learning_rate: float
    threads: int


@dataclasses.dataclass
class Peer:
    """A library set up for a task; a call runs one generation and returns when it is done."""

    run: Callable[[], object]
    centre: Callable[[], numpy.ndarray]  # float32 [D]: weight [out, in] and bias of one layer after the other

    def __call__(self) -> None:
        self.run()


def initial_layers(task: Task) -> list[tuple[numpy.ndarray, numpy.ndarray]]:
    """Return weight [out, in] and bias [out] of each layer, distributed as those of `torch.nn.Linear`."""
    generator = numpy.random.default_rng(0)
    layers = []
    for size_in, size_out in itertools.pairwise(task.sizes):
        draws = generator.uniform(-1, 1, (size_out, size_in + 1)).astype(numpy.float32) / numpy.float32(size_in**0.5)
        layers.append((draws[:, :-1].copy(), draws[:, -1].copy()))
    return layers


def flat(layers: list[tuple[numpy.ndarray, numpy.ndarray]]) -> numpy.ndarray:
    return numpy.concatenate([part.ravel() for layer in layers for part in layer])


def fitness(task: Task, centre: numpy.ndarray) -> float:
    """Return the fitness of one parameter vector, in NumPy: the same yardstick for all libraries."""
    h, start = task.x.astype(numpy.float64), 0
    for index, (size_in, size_out) in enumerate(itertools.pairwise(task.sizes)):
        h = numpy.maximum(h, 0) if index else h
        weight, start = centre[start : start + size_in * size_out], start + size_in * size_out
        bias, start = centre[start : start + size_out], start + size_out
        h = h @ weight.reshape(size_out, size_in).T + bias
    log_sums = numpy.log(numpy.exp(h - h.max(1, keepdims=True)).sum(1)) + h.max(1)
    return float((h[numpy.arange(len(h)), task.labels] - log_sums).mean())


def _torch_network(task: Task) -> Any:
    """Return the network as a PyTorch module, and give PyTorch the threads of the task."""
    import torch

    torch.set_num_threads(task.threads)
    modules: list[torch.nn.Module] = []
    for weight, bias in initial_layers(task):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight.data, linear.bias.data = torch.from_numpy(weight), torch.from_numpy(bias)
        modules += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*modules[:-1]).requires_grad_(False)


def evotorch_pgpe(task: Task) -> Peer:
    """Set up EvoTorch's PGPE: antithetic, fixed sigma, else its defaults (centred ranks, ClipUp)."""
    # The functional interface. Tried too: the class `PGPE` with a vectorised `Problem` (a few per cent slower), the
    # fitness with explicit `baddbmm` (as fast as the vmap), and `torch.compile` around the whole generation (no faster,
    # even with the random numbers of eager mode: the graph breaks in EvoTorch's decorators). Compiling the evaluation
    # alone helps a little; it is a tenth of the generation.
    import torch
    from evotorch.algorithms.functional import pgpe, pgpe_ask, pgpe_tell
    from evotorch.neuroevolution.net import make_functional_module

    network = make_functional_module(_torch_network(task), disable_autograd_tracking=True)
    x, labels = torch.from_numpy(task.x), torch.from_numpy(task.labels)

    def member(parameters: torch.Tensor) -> torch.Tensor:
        return -torch.nn.functional.cross_entropy(network(parameters, x), labels)

    evaluate = torch.compile(torch.func.vmap(member))
    state = pgpe(
        center_init=torch.from_numpy(flat(initial_layers(task))),
        center_learning_rate=task.learning_rate,
        stdev_learning_rate=0.0,
        stdev_init=task.sigma,
        objective_sense="max",
    )

    @torch.no_grad()
    def run() -> None:
        nonlocal state
        population = pgpe_ask(state, popsize=task.population_size)
        state = pgpe_tell(state, population, evaluate(population))

    return Peer(run, lambda: state.optimizer_state.center.numpy().copy())


def evosax_open_es(task: Task) -> Peer:
    """Set up evosax's Open_ES: antithetic, centred ranks (its default), SGD.

    JAX takes all CPUs, whatever the threads of the task and OMP_NUM_THREADS are; NPROC in the environment limits it.
    """
    # One jit around ask, evaluation and tell: 10 % faster than three. Random numbers are most of a generation. JAX's
    # default, Threefry that is "partitionable" among devices, takes 1.7 times as long to draw them as without, and one
    # device needs no partition. Tried too: the generators "rbg" and "unsafe_rbg" (a generation takes 2.5 times as
    # long), weights as [out, in] instead of [in, out] (a quarter longer), a flat vector as the solution instead of the
    # tree of layers, and donated buffers (both no faster).
    import jax
    import jax.numpy as jnp
    import optax
    from evosax.algorithms import Open_ES

    x, labels = jnp.asarray(task.x), jnp.asarray(task.labels)
    layers = [(jnp.asarray(weight.T), jnp.asarray(bias)) for weight, bias in initial_layers(task)]

    def loss(member: Any) -> Any:  # evosax minimises
        h = x
        for index, (weight, bias) in enumerate(member):
            h = (jax.nn.relu(h) if index else h) @ weight + bias
        return optax.softmax_cross_entropy_with_integer_labels(h, labels).mean()

    strategy = Open_ES(
        population_size=task.population_size,
        solution=layers,
        optimizer=optax.sgd(task.learning_rate),
        std_schedule=optax.constant_schedule(task.sigma),
    )
    params = strategy.default_params

    def generation(key: Any, state: Any) -> tuple[Any, Any]:
        key, ask_key, tell_key = jax.random.split(key, 3)
        population, state = strategy.ask(ask_key, state, params)
        state, _ = strategy.tell(tell_key, population, jax.vmap(loss)(population), state, params)
        return key, state

    key = jax.random.key(0)
    state = strategy.init(key, layers, params)
    with jax.threefry_partitionable(False):
        compiled = jax.jit(generation).lower(key, state).compile()

    def run() -> None:
        nonlocal key, state
        key, state = jax.block_until_ready(compiled(key, state))

    def centre() -> numpy.ndarray:
        return flat([(numpy.asarray(weight).T, numpy.asarray(bias)) for weight, bias in strategy.get_mean(state)])

    return Peer(run, centre)


def _evox(task: Task, algorithm: Any, problem: Any, solution_transform: Any = None) -> Peer:
    """Put an EvoX algorithm and problem into a compiled workflow."""
    # These algorithms do not shape: the fitness is z-scored by the workflow's transform. Compiled by default settings,
    # OpenES takes 2.5 times as long as eager, as inductor's own random numbers are slow on a CPU; `fallback_random`
    # draws those of eager mode, and both algorithms are 1.25 to 1.3 times as fast as eager. VirtualLoRAES reads its
    # sigma by `.item()`, which `capture_scalar_outputs` keeps from breaking the graph (5 % faster).
    import torch
    import torch._dynamo
    from evox.core import compile
    from evox.workflows import StdWorkflow

    class ZScore(torch.nn.Module):
        def forward(self, fitness: torch.Tensor) -> torch.Tensor:
            return (fitness - fitness.mean()) / fitness.std()

    workflow = StdWorkflow(algorithm, problem, solution_transform=solution_transform, fitness_transform=ZScore())
    step = compile(workflow.step, options={"fallback_random": True})

    @torch.no_grad()
    def run() -> None:
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            step()

    return Peer(run, lambda: workflow.algorithm.center.numpy().copy())


def evox_open_es(task: Task) -> Peer:
    """Set up EvoX's OpenES: mirrored sampling, plain gradient steps on z-scores."""
    # Tried too: EvoX's `SupervisedLearningProblem` in place of the problem below, as fast.
    import torch
    from evox.algorithms import OpenES
    from evox.core import Problem, vmap
    from evox.utils import ParamsAndVector

    network = _torch_network(task)
    x, labels = torch.from_numpy(task.x), torch.from_numpy(task.labels)

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:  # EvoX minimises
        return torch.nn.functional.cross_entropy(torch.func.functional_call(network, parameters, (x,)), labels)

    class Classification(Problem):
        def __init__(self) -> None:
            super().__init__()
            self.losses = vmap(loss)

        def evaluate(self, population: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.losses(population)

    centre = torch.from_numpy(flat(initial_layers(task)))
    algorithm = OpenES(task.population_size, centre, task.learning_rate, task.sigma, mirrored_sampling=True)
    return _evox(task, algorithm, Classification(), ParamsAndVector(network))


def evox_virtual_lora_es(task: Task) -> Peer:
    """Set up EvoX's low-rank evolution strategy at rank 1. It has no mirrored sampling."""
    # By module, as `evox.algorithms.VirtualLoRAES` and `evox.problems.neuroevolution.VirtualLoRAProblem` of 1.4.0 are
    # aliases of the full-rank `VirtualES` and `VirtualProblem`.
    import torch
    from evox.algorithms.so.es_variants.virtual_lora_es import VirtualLoRAES
    from evox.problems.neuroevolution.virtual_lora_problem import VirtualLoRAProblem

    rank = 1
    network = _torch_network(task)
    batches: Any = [(torch.from_numpy(task.x), torch.from_numpy(task.labels))]  # a list spares a DataLoader's cost
    criterion = torch.nn.CrossEntropyLoss(reduction="none")
    problem = VirtualLoRAProblem(network, batches, criterion, rank, n_batch_per_eval=-1)
    shapes = [tuple(parameter.shape) for parameter in network.parameters()]
    centre = torch.from_numpy(flat(initial_layers(task)))
    algorithm = VirtualLoRAES(shapes, rank, task.population_size, centre, task.learning_rate, task.sigma)
    return _evox(task, algorithm, problem)


PEERS: dict[str, Callable[[Task], Peer]] = {
    "EvoTorch PGPE": evotorch_pgpe,
    "evosax Open_ES": evosax_open_es,
    "EvoX OpenES": evox_open_es,
    "EvoX VirtualLoRAES": evox_virtual_lora_es,
}


def versions() -> dict[str, str]:
    """Return the versions of the peers, and of what they run on, that are installed."""
    installed = {}
    for name in ("evotorch", "evosax", "evox", "torch", "jax", "jaxlib"):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--population-size", type=int, default=1024)
    parser.add_argument("--generations", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    generator = numpy.random.default_rng(1)
    task = Task(
        sizes=[32, 256, 256, 256, 8],
        x=generator.standard_normal((16, 32)).astype(numpy.float32),
        labels=generator.integers(0, 8, 16),
        population_size=args.population_size,
        sigma=0.1,
        learning_rate=0.01,
        threads=args.threads,
    )
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"N = {task.population_size}, {args.generations} generations")
    print("| peer | fitness before | after | setup and first generation s | median ms |")
    print("|---|---|---|---|---|")
    for name, factory in PEERS.items():
        times = [time.perf_counter()]
        peer = factory(task)
        before = fitness(task, peer.centre())
        for _ in range(args.generations):
            peer()
            times.append(time.perf_counter())
        seconds = [b - a for a, b in itertools.pairwise(times)]
        last = statistics.median(seconds[1:][-7:] or seconds)
        after = fitness(task, peer.centre())
        print(f"| {name} | {before:.4f} | {after:.4f} | {seconds[0]:.1f} | {last * 1e3:.0f} |", flush=True)


if __name__ == "__main__":
    main()
