"""Whole generations on a device, as ``test_devices`` runs them in a process of their own."""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import Custom, X, Y, make, network
from pretend_device import set_up
from torch import Tensor, nn

from eggroll_trainer import EGGROLLTrainer, Population, VanillaESTrainer, batched
from eggroll_trainer.callbacks import Checkpoints, ScoreLog

Walk = Callable[[torch.device], Any]
WALKS: dict[str, Walk] = {}


def walk(function: Walk) -> Walk:
    WALKS[function.__name__] = function
    return function


def plain(device: torch.device) -> Callable[[nn.Module], float]:
    x, y = X.to(device), Y.to(device)
    return lambda model: -(model(x) - y).square().mean().item()


def of_population(device: torch.device) -> Callable[[Population], Tensor]:
    x, y = X.to(device), Y.to(device)

    @batched
    def fitness(population: Population) -> Tensor:
        return -(population(x) - y).square().mean((1, 2))

    return fitness


def moved(device: torch.device, **options: Any) -> Any:
    form = options.pop("form", of_population)
    with torch.device("cpu"):
        model = options.pop("model", network)()
    return make(fitness_fn=form(device), model=model, device=device, **options)


def trained(trainer: Any) -> list[float]:
    trainer.train(2, verbose=False)
    assert {p.device for p in trainer.model.parameters()} == {trainer.device}
    assert trainer.current_params.device == trainer.initial_params.device == trainer.device
    return [*trainer.history["mean_fitness"], *trainer.history["update_norm"]]


@walk
def batched_function(device: torch.device) -> Any:
    return trained(moved(device))


@walk
def plain_function(device: torch.device) -> Any:
    return trained(moved(device, form=plain))


@walk
def one_by_one(device: torch.device) -> Any:
    return trained(moved(device, form=plain, coalesce=False))


@walk
def several_chunks(device: torch.device) -> Any:
    return trained(moved(device, chunk_size=4, noise_reuse=2)), trained(moved(device, chunk_size=4, form=plain))


@walk
def small_tiles(device: torch.device) -> Any:
    return trained(moved(device, memory_budget=4000))


@walk
def vanilla(device: torch.device) -> Any:
    return [
        trained(moved(device, cls=VanillaESTrainer, noise_reuse=reuse, chunk_size=chunk))
        for reuse, chunk in ((0, None), (2, 4))
    ]


@walk
def custom_trainer(device: torch.device) -> Any:
    # Its numbers are those of the device's own generator.
    for form in (plain, of_population):
        trained(moved(device, cls=Custom, form=form, chunk_size=4))
    return []


@walk
def dense_subclass(device: torch.device) -> Any:
    class Scaled(EGGROLLTrainer):
        def compute_update(self, perturbations: Tensor, fitnesses: Tensor) -> Tensor:
            return 0.5 * super().compute_update(perturbations, fitnesses)

    return trained(moved(device, cls=Scaled, noise_reuse=2))


@walk
def options_of_the_estimator(device: torch.device) -> Any:
    return [
        trained(moved(device, **options))
        for options in (
            {"noise": "rademacher"},
            {"rank": 2, "group_size": 4, "noise_reuse": 4},
            {"shaping": "centered_ranks"},
            {"shaping": "antithetic_sign", "noise_reuse": 2},
            {"freeze_nonlora": True},
            {"optimizer": torch.optim.SGD},
            {"anchor_decay": 0.5},
            {"max_grad_norm": 0.01},
            {"sigma_scheduler": functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)},
            {"lr_scheduler": functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)},
        )
    ]


@walk
def bf16(device: torch.device) -> Any:
    def form(device: torch.device) -> Any:
        x, y = X.to(device, torch.bfloat16), Y.to(device)
        return batched(lambda population: -(population(x).float() - y).square().mean((1, 2)))

    return trained(moved(device, form=form, model=lambda: network().bfloat16(), chunk_size=4))


@walk
def checkpoints(device: torch.device) -> Any:
    trainer, twin = moved(device), moved(device)
    with tempfile.TemporaryDirectory() as folder:
        trained(trainer)
        trainer.save(Path(folder) / "run.pt")
        twin.load(Path(folder) / "run.pt")
        twin.load_state_dict(trainer.state_dict())
        assert torch.equal(trainer.current_params, twin.current_params)
        numbers = trained(trainer), trained(twin)
        assert numbers[0] == numbers[1]
        moved(device).train(2, verbose=False, checkpoints=Checkpoints(Path(folder) / "kept"))
        log, logged, replayed = ScoreLog(Path(folder) / "scores.jsonl"), moved(device), moved(device)
        log.begin(logged)
        logged.step()
        log.append(logged)
        assert log.replay(replayed) == 1
        assert torch.equal(replayed.current_params, logged.current_params)
    trainer.reset()
    return numbers, trained(trainer)


@walk
def best_model(device: torch.device) -> Any:
    trainer = moved(device, form=plain)
    numbers = trained(trainer)
    best = trainer.get_best_model()
    assert {p.device for p in best.parameters()} == {trainer.device}
    fitness = trainer.evaluate_fitness(best)
    assert abs(fitness - trainer.best_fitness) < 1e-5
    batch = moved(device)
    trained(batch)
    batch.evaluate_fitness(batch.model)
    return numbers, fitness


@walk
def language_models(device: torch.device) -> Any:
    from language_models import language_model, tokenizer

    from eggroll_trainer.llm import CompletionReward, LogLikelihood

    # Parameters that are tied come apart on the way to the pretend device.
    untied = functools.partial(language_model, tie_word_embeddings=False)
    with torch.device("cpu"):
        reference = untied(seed=1)
    sizes: dict[str, Any] = {"prompts_per_generation": 2, "max_new_tokens": 4}
    greedy = CompletionReward(
        tokenizer(),
        ["a b", "c"],
        lambda completion_ids: [sum(tokens) for tokens in completion_ids],
        reference=reference.to(device),
        kl_penalty=0.1,
        **sizes,
    )
    sampled = CompletionReward(
        tokenizer(), ["a b", "c"], lambda completions: [len(text) for text in completions], temperature=1.0, **sizes
    )
    likelihood = LogLikelihood(tokenizer(), [{"prompt": "a b", "answer": "c"}], prompts_per_generation=1)
    numbers = []
    for fitness in (greedy, sampled, likelihood):
        trainer = moved(device, form=lambda device, fitness=fitness: fitness, model=untied, chunk_size=4)
        # Sampled numbers are those of the device's own generator.
        numbers += trained(trainer) if fitness is not sampled else [0.0 * len(trained(trainer))]
        numbers.append(fitness.evaluate(trainer.model).rewards.mean().item() if fitness is greedy else 0.0)
    return numbers


@walk
def copies(device: torch.device) -> Any:
    """What processes that share a generation exchange."""
    import copy

    trainer = moved(device, chunk_size=4)
    trained(trainer)
    twin = copy.deepcopy(trainer)
    twin.set_working_state(trainer.working_state())
    assert twin.checksum() == trainer.checksum()
    return trained(twin)


@walk
def functions_of_many_calls(device: torch.device) -> Any:
    """Members that part company, read weights, change modes, and draw random numbers."""
    x = X.to(device)

    def wandering(model: nn.Module) -> float:
        total = 0.0
        model.eval()
        with torch.inference_mode():
            for i in range(4):
                score = model(x[i : i + 1]).sum().item()
                total += score
                if score < 0:
                    break
        return total + next(model.parameters()).sum().item()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trained(moved(device, form=lambda device: wandering))


@walk
def populations(device: torch.device) -> Any:
    """The calls of a population besides the plain one."""
    x = X.to(device)

    @batched
    def fitness(population: Population) -> Tensor:
        own = x.expand(len(population), *x.shape).contiguous()
        each = population.each(own).square().mean((1, 2))
        some = torch.stack([population.member(i)(x).square().mean() for i in range(len(population))])
        torch.testing.assert_close(each, some)
        with population.repeated() as repeated:
            repeated(own)
            repeated(own[:3], members=(0, 2, 5))
        return -each

    return trained(moved(device, form=lambda device: fitness))


@walk
def branching_model(device: torch.device) -> Any:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            return y if y.sum() > 0 else -y

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [trained(moved(device, model=Branching, form=form)) for form in (of_population, plain)]


@walk
def layers(device: torch.device) -> Any:
    """Rules for operations other than linear layers."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.bag = nn.Embedding(20, 8), nn.EmbeddingBag(20, 8, mode="mean")
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8, bias=False)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.gru = nn.GRU(8, 8, batch_first=True)
            self.cell, self.convolution = nn.LSTMCell(8, 8), nn.Conv1d(8, 8, 3, padding=1)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.norm(self.embedding(tokens) + self.bag(tokens)[:, None])
            x = x + self.convolution(x.mT).mT
            x = x + self.attention(x, x, x, need_weights=False)[0]
            x = self.gru(self.linear(x))[0]
            return self.cell(x[:, -1])[0]

    tokens = torch.arange(40, device="cpu").view(8, 5).remainder(20).to(device)

    # A fused kernel of the cell's, which the model by itself would take, has no form for the pretend device.
    @batched(check=False)
    def fitness(population: Population) -> Tensor:
        return population(tokens).mean((1, 2))

    def one(model: nn.Module) -> float:
        return model(tokens).mean().item()

    def model() -> nn.Module:
        torch.manual_seed(0)
        return Layers()

    options: dict[str, Any] = {"model": model, "coalesce": "unchecked"}
    return [trained(moved(device, form=lambda device, f=f: f, **options)) for f in (fitness, one)]


@walk
def episodes(device: torch.device) -> Any:
    try:
        import gymnasium
    except ImportError:
        return []
    from eggroll_trainer.rl.policies import Agent, GRUPolicy, MLPPolicy
    from eggroll_trainer.rl.rollout import EpisodeReturn

    numbers = []
    for kind in (MLPPolicy, GRUPolicy):
        environment = gymnasium.make("CartPole-v1")
        torch.manual_seed(0)
        hidden: Any = 8 if kind is GRUPolicy else (8,)
        with torch.device("cpu"):
            policy = kind(environment.observation_space, environment.action_space, hidden=hidden)
        fitness = EpisodeReturn("CartPole-v1", episodes=2, max_steps=6)
        trainer = EGGROLLTrainer(
            model=policy, fitness_fn=fitness, population_size=8, noise_reuse=2, chunk_size=4, seed=0, device=device
        )
        numbers.append(trained(trainer))
        assert policy.normalizer.count.item() == fitness.steps > 0  # type: ignore[operator]
        fitness.evaluate(policy, 2, 0)
        Agent(trainer.get_best_model(), environment.action_space)(environment.reset(seed=0)[0])
        fitness.close()
    return numbers


# Where the model is, and torch's default device: on ``meta`` there are no numbers.
SETTINGS = {"accelerator": ("pretend", None), "default": ("cpu", "meta")}


def run() -> None:
    """Print, for each walk, its numbers on the CPU and in each setting, or the traceback."""
    warnings.simplefilter("error")
    set_up()
    results: dict[str, dict[str, Any]] = {}
    for name, function in WALKS.items():
        results[name] = {"expected": _outcome(function, torch.device("cpu"))}
        for setting, (device, default) in SETTINGS.items():
            torch.set_default_device(default)
            results[name][setting] = _outcome(function, torch.device(device))
            torch.set_default_device(None)
    json.dump(results, sys.stdout)


def _outcome(function: Walk, device: torch.device) -> Any:
    try:
        return function(device)
    except Exception:
        return traceback.format_exc()


def mix() -> None:
    """Print what comes of operations on tensors of the pretend device and of the CPU."""
    pretend, x = set_up(), torch.arange(3.0)
    own = x.to(pretend)
    operations: dict[str, Callable[[], Any]] = {
        "elementwise": lambda: own + x,
        "in place": lambda: own.mul_(x),
        "product": lambda: torch.outer(own, x) @ torch.ones(3, 3),
        "gathered": lambda: torch.cat([own, x]),
        "chosen": lambda: own.index_select(0, torch.tensor([0, 1])),
        "under vmap": lambda: torch.vmap(lambda a: a + x)(own[None]),
        "numbers": lambda: (own + 1 + torch.tensor(2.0)).tolist(),
        "moved": lambda: (own + x.to(pretend)).cpu().tolist(),
        "copied": lambda: own.clone().copy_(x).tolist(),
    }
    results = {}
    for name, operation in operations.items():
        try:
            results[name] = operation()
        except RuntimeError as error:
            results[name] = "refused" if "on the same device" in str(error) else str(error)
    json.dump(results, sys.stdout, default=str)
