"""One contract for every trainer, and what the options of trainers promise."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import randn
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR

from eggroll_trainer import EGGROLLTrainer, ESTrainer, Population, VanillaESTrainer, batched

X = randn(40, 6)
Y = X[:, :2] * X[:, 2:4]


class Custom(ESTrainer):
    """The example of the documents."""

    def sample_perturbations(self, population_size: int) -> Tensor:
        return torch.randn(population_size, self.current_params.shape[0], device=self.device) * self.sigma

    def compute_update(self, perturbations: Tensor, fitnesses: Tensor) -> Tensor:
        weights = (fitnesses - fitnesses.mean()) / (fitnesses.std() + 1e-8)
        return (weights[:, None] * perturbations).mean(dim=0)


TRAINERS: dict[str, Callable[..., ESTrainer]] = {
    "custom": functools.partial(Custom, learning_rate=2.0),
    "vanilla": functools.partial(VanillaESTrainer, learning_rate=0.5),
    "vanilla pairs": functools.partial(VanillaESTrainer, learning_rate=0.5, noise_reuse=2),
    "eggroll": functools.partial(EGGROLLTrainer, learning_rate=0.5),
    "eggroll pairs": functools.partial(EGGROLLTrainer, learning_rate=0.5, noise_reuse=2),
    "eggroll rank 2": functools.partial(EGGROLLTrainer, learning_rate=0.5, rank=2),
    "eggroll rademacher": functools.partial(EGGROLLTrainer, learning_rate=0.5, noise="rademacher", noise_reuse=2),
    "eggroll ranks": functools.partial(EGGROLLTrainer, learning_rate=2.0, shaping="centered_ranks", noise_reuse=2),
    "eggroll signs": functools.partial(EGGROLLTrainer, learning_rate=0.5, shaping="antithetic_sign", noise_reuse=2),
    "eggroll groups": functools.partial(EGGROLLTrainer, learning_rate=0.5, group_size=20),
    "eggroll matrices": functools.partial(EGGROLLTrainer, learning_rate=0.5, freeze_nonlora=True),
    "eggroll adam": functools.partial(EGGROLLTrainer, learning_rate=0.02, optimizer=torch.optim.Adam),
}


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))


def fitness(model: nn.Module) -> float:
    return -(model(X) - Y).square().mean().item()


@batched
def population_fitness(population: Population) -> Tensor:
    return -(population(X) - Y).square().mean((1, 2))


def make(name: str = "eggroll", **options: Any) -> ESTrainer:
    defaults: dict[str, Any] = {
        "fitness_fn": fitness,
        "population_size": 40,
        "sigma": 0.1,
        "seed": 1,
        "model": network(),
    }
    return TRAINERS[name](**{**defaults, **options})


@pytest.mark.parametrize("name", TRAINERS)
class TestEveryTrainer:
    def test_learns(self, name: str) -> None:
        trainer = make(name)
        before = trainer.evaluate_fitness(trainer.model)
        trainer.train(100, verbose=False)
        # A trainer that goes the wrong way or nowhere stays at the whole of the error or above; those here end between
        # a tenth and eight tenths of it, where 100 steps of gradient descent at 0.1 end at half.
        assert trainer.evaluate_fitness(trainer.model) > 0.85 * before

    def test_metrics_and_history_agree(self, name: str) -> None:
        trainer = make(name)
        metrics = [trainer.step() for _ in range(4)]
        assert [m["generation"] for m in metrics] == [1, 2, 3, 4]
        for key, values in trainer.history.items():
            assert values == [m[key] for m in metrics]
        assert trainer.history["best_fitness"] == [max(trainer.history["fitness"][: i + 1]) for i in range(4)]
        assert all(m["update_norm"] > 0 and m["std_fitness"] > 0 and m["num_nonfinite"] == 0 for m in metrics)

    def test_same_seed_same_run(self, name: str) -> None:
        runs = [make(name, chunk_size=10) for _ in range(2)]
        for run in runs:
            run.train(5, verbose=False)
        assert torch.equal(runs[0].current_params, runs[1].current_params)
        assert runs[0].history == runs[1].history
        other = make(name, seed=2)
        other.train(5, verbose=False)
        assert other.history["fitness"] != runs[0].history["fitness"]

    def test_chunks_change_nothing_but_rounding(self, name: str) -> None:
        whole, parts = (
            make(name, model=network().double(), fitness_fn=double_fitness),
            make(name, model=network().double(), fitness_fn=double_fitness, chunk_size=8),
        )
        for trainer in (whole, parts):
            trainer.train(3, verbose=False)
        torch.testing.assert_close(whole.current_params, parts.current_params, rtol=1e-9, atol=1e-12)

    def test_plain_and_batched_functions_agree(self, name: str) -> None:
        plain, written = make(name), make(name, fitness_fn=population_fitness)
        for a, b in zip(plain.step().values(), written.step().values(), strict=True):
            assert a == pytest.approx(b, rel=1e-4)
        torch.testing.assert_close(plain.current_params, written.current_params, rtol=1e-4, atol=1e-5)

    def test_update_norm_is_the_length_of_the_step(self, name: str) -> None:
        trainer = make(name)
        before = trainer.current_params
        norm = trainer.step()["update_norm"]
        assert norm == pytest.approx((trainer.current_params - before).norm().item(), rel=1e-5)

    def test_best_model_earned_its_score(self, name: str) -> None:
        trainer = make(name)
        trainer.train(6, verbose=False)
        best = trainer.get_best_model()
        assert best is not trainer.model and type(best) is nn.Sequential
        assert trainer.evaluate_fitness(best) == pytest.approx(max(trainer.history["fitness"]), rel=1e-5)

    def test_trains_the_model_in_place(self, name: str) -> None:
        model = network()
        trainer = make(name, model=model)
        before = copy.deepcopy(model.state_dict())
        trainer.step()
        assert trainer.model is model
        assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), make_flat(trainer, model))
        assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())


def double_fitness(model: nn.Module) -> float:
    return -(model(X.double()) - Y.double()).square().mean().item()


def make_flat(trainer: ESTrainer, model: nn.Module) -> Tensor:
    trained = {name for group in trainer.param_groups for name in group["names"]}
    flat, current, at = [], trainer.current_params, 0
    for name, p in model.named_parameters():
        if name in trained:
            flat.append(current[at : at + p.numel()])
            at += p.numel()
        else:
            flat.append(p.detach().flatten())
    return torch.cat(flat)


@pytest.mark.parametrize(
    "factory",
    [
        torch.optim.Adam,
        functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
        functools.partial(torch.optim.AdamW, weight_decay=0.1),
        torch.optim.RMSprop,
        None,
    ],
    ids=["adam", "momentum", "adamw", "rmsprop", "default"],
)
def test_optimizers_get_the_negated_estimate(factory: Any) -> None:
    trainer = make(optimizer=factory, learning_rate=0.05)
    shadow = trainer.current_params.requires_grad_()
    optimizer = (factory or torch.optim.SGD)([shadow], lr=0.05)
    for generation in range(4):
        assert isinstance(trainer, EGGROLLTrainer)
        perturbations = trainer.sample_perturbations(40)
        scores = trainer._evaluator.evaluate(0, 40).scores
        shadow.grad = -trainer.compute_update(perturbations, scores).to(shadow)
        optimizer.step()
        assert trainer.step()["generation"] == generation + 1
        torch.testing.assert_close(trainer.current_params, shadow.detach(), rtol=1e-4, atol=1e-6)


def test_schedulers_drive_the_learning_rate() -> None:
    own = make(lr_scheduler=functools.partial(CosineAnnealingLR, T_max=10))
    theirs = make()
    schedule = CosineAnnealingLR(theirs, T_max=10)
    for _ in range(10):
        assert own.learning_rate == theirs.learning_rate == own.param_groups[0]["lr"]
        assert own.step()["learning_rate"] == theirs.step()["learning_rate"]
        schedule.step()
    assert own.learning_rate == pytest.approx(0) and torch.equal(own.current_params, theirs.current_params)


def test_schedulers_drive_sigma() -> None:
    trainer = make(sigma_scheduler=functools.partial(ExponentialLR, gamma=0.5), sigma=0.4)
    spreads = []
    for sigma in (0.4, 0.2, 0.1):
        assert trainer.sigma == pytest.approx(sigma)
        spreads.append(trainer.sample_perturbations(40).std().item())
        trainer.step()
    assert spreads[0] / spreads[2] == pytest.approx(4, rel=0.2)
    warm = make(sigma_scheduler=lambda optimizer: LambdaLR(optimizer, lambda generation: generation + 1), sigma=0.1)
    warm.train(3, verbose=False)
    assert warm.history["sigma"] == pytest.approx([0.1, 0.2, 0.3])


def test_settings_are_live() -> None:
    trainer = make()
    trainer.learning_rate, trainer.sigma = 0.0, 0.7
    assert trainer.param_groups[0]["lr"] == 0.0 and trainer.param_groups[0]["sigma"] == 0.7
    before = trainer.current_params
    trainer.step()
    assert torch.equal(trainer.current_params, before)
    trainer.param_groups[0]["lr"] = 0.3
    assert trainer.learning_rate == 0.3
    with pytest.raises(ValueError, match="sigma must be a finite number above 0, got 0.0"):
        trainer.sigma = 0


def test_parameters_that_are_not_given_stay_frozen() -> None:
    model = network()
    trainer = EGGROLLTrainer(model[0].parameters(), model=model, fitness_fn=fitness, seed=0)
    before = [p.clone() for p in model[2].parameters()]
    trainer.train(3, verbose=False)
    assert all(map(torch.equal, before, model[2].parameters()))
    assert len(trainer.current_params) == 6 * 16 + 16


def test_named_parameters_and_one_tensor_are_taken_as_torch_optim_does() -> None:
    model = network()
    for params in (
        model.named_parameters(),
        [{"params": model[0].weight}, {"params": [("x", model[2].weight)], "lr": 0.0}],
    ):
        EGGROLLTrainer(params, model=model, fitness_fn=fitness, seed=0).step()


def test_freeze_nonlora_moves_matrices_only() -> None:
    trainer = make("eggroll matrices")
    assert [name for group in trainer.param_groups for name in group["names"]] == ["0.weight", "2.weight"]


def test_ties_are_counted() -> None:
    trainer = make(fitness_fn=lambda model: 1.0)
    before = trainer.current_params
    assert trainer.step()["num_tied"] == 40
    assert torch.equal(trainer.current_params, before)


def test_evaluate_fitness_can_be_overridden() -> None:
    class Doubled(EGGROLLTrainer):
        def evaluate_fitness(self, model: nn.Module) -> float:
            return 2 * super().evaluate_fitness(model)

    plain = EGGROLLTrainer(model=network(), fitness_fn=fitness, seed=0).step()
    assert Doubled(model=network(), fitness_fn=fitness, seed=0).step()["fitness"] == 2 * plain["fitness"]


def test_overriding_a_dense_method_takes_effect() -> None:
    class Backwards(EGGROLLTrainer):
        def compute_update(self, perturbations: Tensor, fitnesses: Tensor) -> Tensor:
            return -super().compute_update(perturbations, fitnesses)

    there, back = (cls(model=network(), fitness_fn=fitness, seed=0) for cls in (EGGROLLTrainer, Backwards))
    start = there.current_params
    there.step()
    back.step()
    torch.testing.assert_close(back.current_params - start, start - there.current_params, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # from torch's own compiler, at its import
def test_compiled_models_are_trained_inside_their_wrapper() -> None:
    model = network()
    trainer = make(model=torch.compile(model))
    assert trainer.model is model
    trainer.step()


def test_fitness_may_look_at_the_generation() -> None:
    seen = []

    def watching(model: nn.Module) -> float:
        seen.append(trainer.generation)
        return fitness(model)

    trainer = make(fitness_fn=watching, coalesce="unchecked")
    trainer.train(2, verbose=False)
    assert seen == [0] * 40 + [1] * 40


def test_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    make().train(3, verbose=False)
    assert capfd.readouterr() == ("", "")
    trainer = make()
    trainer.train(3)
    shown = capfd.readouterr().err
    assert "3/3" in shown and f"best={trainer.best_fitness:.4g}" in shown and "mean=" in shown


def test_callback_and_return_value() -> None:
    calls: list[tuple[int, int]] = []
    trainer = make()
    final = trainer.train(7, verbose=False, log_every=3, callback=lambda g, history: calls.append((g, len(history))))
    assert calls == [(3, 3), (6, 6), (7, 7)]
    assert final["generation"] == 7 and final["fitness_history"] == trainer.history["mean_fitness"]
    assert final["best_fitness"] == trainer.best_fitness == max(trainer.history["fitness"])
    again = trainer.train(2, verbose=False, log_every=3, callback=lambda g, history: calls.append((g, len(history))))
    assert calls[3:] == [(9, 9)] and again["generation"] == 9
    assert make().train(0, verbose=False)["fitness_history"] == []


def test_seed_is_drawn_if_not_given() -> None:
    first, second = make(seed=None), make(seed=None)
    assert first.seed != second.seed
    again = make(seed=first.seed)
    assert first.step() == again.step()
