"""A training run: a folder with its configuration, metrics, checkpoints, policy, curve and video."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .._utils.interrupts import delayed_interrupt, exit_on_sigterm
from .._utils.memory import freed_memory_kept
from ..callbacks import Checkpoints
from ..callbacks.logger import record, scores_of
from ..callbacks.run_folder import METRICS, RunFolder
from ..trainers.from_settings import trainer_from
from ..trainers.keyed import KeyedESTrainer
from .budget import with_compile
from .policies import GRUPolicy, LinearPolicy, MLPPolicy, Policy
from .rollout import EpisodeReturn, growing
from .settings import Settings

# Settings that may differ when a run is resumed.
_FREE = {"steps", "video", "threads", "save_every", "engine"}

# Growing episodes have their full length after this share of the training.
_GROWN = 0.7


class Run:
    """A training run, in one process or in several under ``torchrun``, of which the first one writes files.

    Args:
        settings: The settings. With ``resume``, the run in its folder is continued.

    Attributes:
        folder: Folder of the run.
        trainer: The trainer.
        metrics: One dictionary for each generation.

    Raises:
        FileExistsError: The folder contains a run, and ``resume`` is not set.
        FileNotFoundError: There is no run to resume.
        ValueError: The environment is unknown, or the run to resume has other settings.
    """

    def __init__(self, settings: Settings) -> None:
        self.folder = settings.out or Path("runs") / f"{settings.env.replace('/', '-')}-{settings.seed}"
        self.settings = settings = with_compile(settings, self.folder)
        self._files = RunFolder(self.folder, settings, _FREE)
        self.fitness = EpisodeReturn(
            settings.env,
            episodes=settings.episodes,
            max_steps=episode_limit(settings),
            share=2 if settings.antithetic else 1,
            survival_bonus=settings.survival_bonus,
            threads=settings.threads,
        )
        # The run reports the centre policy, so the best member need not be evaluated again.
        self.fitness.noisy = False
        self.policy = make_policy(settings, *self.fitness.spaces())
        self.trainer = make_trainer(settings, self.policy, self.fitness)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", every=settings.save_every)
        self.metrics: list[dict[str, Any]] = []
        engine, self.is_main = self.trainer.engine, self.trainer.is_main
        engine.from_main(self._files.open)
        if settings.resume:
            self.checkpoints.restore(self.trainer)
            if self.is_main:
                self.metrics = self._files.cut(METRICS, lambda i, line: i < self.trainer.generation)
        engine.from_main(lambda: self.checkpoints.begin(self.trainer))

    @property
    def steps(self) -> int:
        """Environment steps taken so far."""
        return self.fitness.steps

    def train(self) -> None:
        """Train for the number of steps in the settings. After a Ctrl-C or SIGTERM, the run can be resumed."""
        settings = self.settings
        bar = tqdm(
            total=settings.steps,
            initial=self.steps,
            unit="step",
            unit_scale=True,
            desc=settings.env,
            disable=not self.is_main,
        )
        try:
            writing = self._files.writing(self.is_main, self.steps)
            with freed_memory_kept(), exit_on_sigterm(), writing as writer, bar:
                bar.set_postfix_str(self._progress())
                self.fitness.on_steps = bar.update
                while self.steps < settings.steps:
                    line = self._step()
                    # Write a completed generation before an interrupt ends the run.
                    with delayed_interrupt():
                        self._evaluate(line)
                        writer.metrics(line, line["steps"])
                        writer.histogram("returns", scores_of(self.trainer), line["steps"])
                        self.checkpoints.after_generation(self.trainer)
                    # Include the steps of other processes.
                    bar.update(line["steps"] - bar.n)
                    bar.set_postfix_str(self._progress())
        finally:
            self.fitness.on_steps = None
            self.save()
            self.fitness.close()

    def save(self) -> None:
        """Write a checkpoint and the policy."""
        self.checkpoints.save(self.trainer)
        if self.is_main:
            torch.save(self.policy.state_dict(), self.folder / "policy.pt")

    def _step(self) -> dict[str, Any]:
        """Run a generation and return its metrics."""
        settings, start, before = self.settings, time.perf_counter(), self.steps
        if settings.final_learning_rate is not None:
            done = min(1.0, before / settings.steps)
            self.trainer.learning_rate = (1 - done) * settings.learning_rate + done * settings.final_learning_rate
        result = self.trainer.step()
        seconds = time.perf_counter() - start
        return {
            # All diagnostics.
            **{key: value for key, value in record(result).items() if "fitness" not in key},
            "generation": result["generation"],
            "steps": self.steps,
            "mean_return": result["mean_fitness"],
            "best_return": result["fitness"],
            "std_return": result["std_fitness"],
            "seconds": seconds,
            "steps_per_second": (self.steps - before) / seconds,
        }

    def _evaluate(self, line: dict[str, Any]) -> None:
        """Add the return of the centre policy to a generation's metrics if it is due, and store the metrics."""
        settings = self.settings
        last, before = self.steps >= settings.steps, self.metrics[-1]["steps"] if self.metrics else 0
        tenth = 10 * self.steps // settings.steps > 10 * before // settings.steps
        if self.is_main and (last or tenth or line["generation"] % settings.eval_every == 0):
            returns = self.fitness.evaluate(self.policy, settings.eval_episodes, settings.seed * 2**32 + self.steps)
            line |= {"eval_return": float(returns.mean()), "eval_std": float(returns.std())}
        self.metrics.append(line)

    def _progress(self) -> str:
        """Return the text of the progress bar next to the steps."""
        if not self.metrics:
            return "first generation"
        line = self.metrics[-1]
        evaluated = next((line for line in reversed(self.metrics) if "eval_return" in line), None)
        centre = "not evaluated yet" if evaluated is None else rounded(evaluated["eval_return"])
        return (
            f"generation {line['generation']}, mean {rounded(line['mean_return'])}, best"
            f" {rounded(line['best_return'])}, centre {centre}"
        )

    def improvement(self) -> str | None:
        """Return a message if the centre policy is no better than before training, else None.

        Both play the same episodes: those of the last evaluation.
        """
        settings = self.settings
        if settings.eval_episodes < 2 or not self.metrics:
            return None
        seed = settings.seed * 2**32 + self.steps
        untrained = make_policy(settings, *self.fitness.spaces()).to(self.trainer.device)
        before, after = (
            self.fitness.evaluate(policy, settings.eval_episodes, seed) for policy in (untrained, self.policy)
        )
        self.fitness.close()
        gain = after - before
        error = gain.std(ddof=1) / len(gain) ** 0.5
        # False for NaN, if something was not finite.
        if gain.mean() > 2 * error:
            return None
        return (
            f"the centre policy has not improved: {rounded(before.mean())} before training, {rounded(after.mean())}"
            f" after it, on the same {len(gain)} episodes. Train longer (--steps), with a larger --sigma if members all"
            " earned the same (std_return in metrics.jsonl), or with another --learning-rate"
        )


def episode_limit(settings: Settings) -> int | Callable[[int], int] | None:
    """Return the step limit of episodes in training: None, a number, or a function of the environment steps so far.

    Raises:
        ValueError: Episodes are to grow, but there is no final limit.
    """
    if settings.first_max_steps is None:
        return settings.max_steps
    first, last = settings.first_max_steps, settings.max_steps or gymnasium.spec(settings.env).max_episode_steps
    if last is None:
        raise ValueError(f"first_max_steps needs max_steps, as {settings.env} has no step limit of its own")
    return growing(first, last, round(_GROWN * settings.steps))


def make_policy(settings: Settings, observation_space: Any, action_space: Any) -> Policy:
    """Return the policy that the settings describe, with the same initial weights every time."""
    options: dict[str, Any] = {
        "normalize": settings.normalize,
        "sample": settings.sample,
        "observed": settings.observed,
    }
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        if settings.policy == "linear":
            return LinearPolicy(observation_space, action_space, **options)
        if settings.policy == "gru":
            return GRUPolicy(observation_space, action_space, settings.hidden[0], **options)
        return MLPPolicy(observation_space, action_space, settings.hidden, **options)


def make_trainer(settings: Settings, policy: nn.Module, fitness: EpisodeReturn) -> KeyedESTrainer:
    """Return the trainer that the settings describe."""
    return trainer_from(settings, model=policy, fitness_fn=fitness, compile=settings.compile)


def rounded(value: float) -> str:
    """Return a return as it is shown: whole from 1,000 on, else to three digits.

    Example:
        >>> rounded(6117.3), rounded(35.25), rounded(-0.125)
        ('6117', '35.2', '-0.125')
    """
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def plot(run: Run) -> Path:
    """Plot the learning curve of a run, and return the path of the file."""
    # Not with pyplot, which would choose a window system for the process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [line["steps"] for line in run.metrics]
    axes.plot(steps, [line["mean_return"] for line in run.metrics], alpha=0.4, label="mean of the population")
    evaluated = [line for line in run.metrics if "eval_return" in line]
    mean = np.array([line["eval_return"] for line in evaluated])
    deviation = np.array([line["eval_std"] for line in evaluated])
    at = [line["steps"] for line in evaluated]
    axes.plot(at, mean, label=f"centre policy, {run.settings.eval_episodes} episodes")
    axes.fill_between(at, mean - deviation, mean + deviation, alpha=0.2)
    axes.set(title=f"{run.settings.env}, seed {run.settings.seed}", xlabel="environment steps", ylabel="return")
    axes.legend()
    axes.grid(alpha=0.3)
    path = run.folder / "curve.png"
    figure.savefig(path, dpi=110)
    return path
