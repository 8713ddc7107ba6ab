"""Symptoms of runs that don't learn. Each message gives the evidence and what to change.

A symptom is a function that takes the :class:`Course` of a run and returns a message, or None without the symptom. A
trainer looks for all of them now and then, and warns about each only once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .course import Course
from .losses import loss_that_it_computes

Symptom = Callable[[Course], str | None]

# Advice that several symptoms give.
_START = "A fair start is sigma=0.1 with learning_rate=0.1, or with optimizer=torch.optim.Adam and learning_rate=0.03"
_ANSWERS = 'eggroll_trainer.tune(trainer) finds settings that learn, and learning_rate="auto" adapts it'


def constant(course: Course) -> str | None:
    """All members have the same fitness."""
    # The fitness of a single member has no spread.
    if course.members == 1 or course.generation < 3 or any(course.last("std_fitness", 3)) or course.gain(3, 3) > 2:
        return None
    told = (
        f"all {course.members} members have had the same fitness for 3 generations ({course.shown(course.scores[0])}),"
        " so there is nothing to learn from. "
    )
    probe = None if course.probe is None else course.probe()
    if probe is not None and min(probe.centre) > course.scores[0]:
        return (
            f"{told}The model without perturbation is better ({course.shown(probe.centre[0])}), so that"
            f" sigma={course.sigma:g} is too large. Lower it"
        )
    return (
        f"{told}Raise sigma, now {course.sigma:g}; or return a finer fitness, such as a loss instead of an accuracy; or"
        " check that the fitness function uses the model that it gets"
    )


def coarse(course: Course) -> str | None:
    """Many members tie."""
    tied = course.tie_probability
    # After it has learnt, members may tie because they are all good.
    if course.generation < 3 or tied < 0.3 or not all(course.last("std_fitness", 3)) or course.gain(3, 3) > 2:
        return None
    worst = float((course.scores == course.scores.min()).mean())
    if worst > 0.5:
        return (
            f"{worst:.0%} of the members have the worst fitness, {course.shown(course.scores.min())}. Either most of"
            f" them fail, and sigma={course.sigma:g} is too large; or none differs enough, and it is too small."
            f" {_ANSWERS}"
        )
    return (
        f"the fitness is too coarse for sigma={course.sigma:g}: two members tie with a probability of {tied:.0%}, and"
        " ties carry no information. Raise sigma, or return a finer fitness, such as a loss instead of an accuracy"
    )


def failing(course: Course) -> str | None:
    """Many members have no finite fitness."""
    share = course.mean("num_nonfinite", 3) / course.members
    if course.generation < 3 or share < 0.25:
        return None
    return (
        f"{share:.0%} of the scores were not finite in the last 3 generations. Lower sigma, now {course.sigma:g}, or"
        " fix the fitness function"
    )


def short_steps(course: Course) -> str | None:
    """The steps are so short that the run will not get anywhere."""
    if course.generation < 3 or course.planned is None or course.planned < 30 or not any(course.last("update_norm", 3)):
        return None
    step = course.step_in_sigmas
    # A schedule may end in short steps: what counts is how far the weights have come by then.
    if course.path_in_sigmas + step * (course.planned - course.generation) >= 2:
        return None
    size = course.last("relative_update")[0]
    needed = f"{1 / size:,.0f}" if size > 0 else "infinitely many"
    return (
        f"the steps are very short: a generation moves a weight by {step * course.sigma:.2g} on average, {step:.2g} of"
        f" sigma. To move the weights by their own size, it would take {needed} generations in the same direction, but"
        f" {course.planned} are planned. Raise learning_rate, now"
        f" {course.last('learning_rate')[0]:g}: {_ANSWERS}. {_START}"
    )


def persistent(course: Course) -> str | None:
    """Each estimate agrees so well with the step before that longer steps would do."""
    window = 20
    # Only for plain steps do we know how well they can agree with the next estimate.
    if (
        course.signal is None
        or course.optimizer != "SGD"
        or course.generation <= window
        or course.step_in_sigmas > 0.05
    ):
        return None
    possible = course.possible_agreement(window)
    agreement = course.mean("agreement", window)
    if possible < 6 * course.signal.split_half_error / math.sqrt(window) or agreement < 0.9 * possible:
        return None
    share = min(1.0, agreement / possible)
    factor = min(10.0, 0.5 / (1 - share)) if share < 1 else 10.0
    return (
        f"the steps could be longer: each estimate points the same way as the step before ({share:.0%} of what"
        f" its noise allows). A learning_rate about {factor:.0f} times as large, {factor:.0f} ×"
        f" {course.last('learning_rate')[0]:g}, would learn faster"
    )


def falling(course: Course) -> str | None:
    """In most generations the mean fitness is far below where it began."""
    if course.generation < 10:
        return None
    first, spread = course.means[0], course.history["std_fitness"][0]
    lately = course.means[-((course.generation + 1) // 2) :]
    if max(lately) >= first - spread:
        return None
    return (
        f"the mean fitness has {'fallen' if course.maximize else 'risen'} from {course.shown(first)} to"
        f" {course.shown(lately[-1])} in {course.generation} generations. The steps are too long: one"
        f" moves a weight by {course.step_in_sigmas:.2g} sigma on average. Lower learning_rate, now"
        f" {course.last('learning_rate')[0]:g}. {_START}"
    )


def loss_returned(course: Course) -> str | None:
    """The fitness looks like a loss, which training makes larger."""
    means = course.means
    if not course.maximize or course.generation < 5 or means.min() <= 0 or float(course.scores.min()) < 0:
        return None
    if means[-1] < max(1.0, 1.2 * means[0]) or course.gain(2, 3) < 3:
        return None
    loss = loss_that_it_computes(course.fitness_fn)
    if loss is None:
        return None
    return (
        f"the fitness function calls {loss}, its values are positive, and training, which maximises, has raised them"
        f" from {means[0]:.4g} to {means[-1]:.4g}. If it is a loss, return its negative, or pass maximize=False"
    )


def overshooting(course: Course) -> str | None:
    """Each step undoes the last one."""
    window = 10
    if course.signal is None or course.generation <= window:
        return None
    agreement = course.mean("agreement", window)
    possible = course.possible_agreement(window)
    if possible < 0.05 or agreement > -0.5 * possible or course.gain(3, 3) > 2:
        return None
    return (
        f"each step undoes the last one: the cosine between a step and the next estimate is {agreement:.2f} over"
        f" {window} generations, and the fitness does not improve. Lower learning_rate, now"
        f" {course.last('learning_rate')[0]:g}"
    )


def no_signal(course: Course) -> str | None:
    """After some time the update is still indistinguishable from noise."""
    window = 40
    if course.signal is None or course.generation < window or not any(course.last("std_fitness", window)):
        return None
    cosine, error = course.mean("split_half_cosine", window), course.signal.split_half_error / math.sqrt(window)
    if cosine > error / 2 or course.gain() > 2:
        return None
    found = (
        f"the update is indistinguishable from noise: in {window} generations the split-half cosine was"
        f" {cosine:.4f} ± {error:.4f}, and the mean fitness has not improved. "
    )
    spread = course.mean("std_fitness", window)
    probe = None if course.probe is None else course.probe()
    if probe is not None and probe.noise > spread / 4:
        return (
            f"{found}The fitness itself is noisy: the same model got {course.shown(probe.centre[0])} and"
            f" {course.shown(probe.centre[1])}, while members differ by {spread:.4g}. Average over more samples or"
            f" episodes, use the same ones for all members, or raise population_size, now {course.members}"
        )
    centre = None if probe is None else sum(probe.centre) / 2
    if centre is not None and centre > course.means[-window:].mean() + 2 * spread:
        return (
            f"{found}The model without perturbation is better than most members ({course.shown(centre)}, and"
            f" {course.shown(course.means[-window:].mean())} on average): sigma={course.sigma:g} is too large. Lower it"
        )
    return (
        f"{found}There are {course.members} members for {course.weights:,} weights, of which few may matter. Raise"
        " population_size, take antithetic pairs (noise_reuse=2), train fewer weights, or change sigma, now"
        f" {course.sigma:g}. {_ANSWERS}"
    )


SYMPTOMS: dict[str, Symptom] = {
    "constant": constant,
    "failing": failing,
    "coarse": coarse,
    "short_steps": short_steps,
    "loss_returned": loss_returned,
    "falling": falling,
    "overshooting": overshooting,
    "no_signal": no_signal,
    "persistent": persistent,
}


def is_time(generation: int) -> bool:
    """Return whether we look for symptoms after this generation: after the 3rd, the 5th, and every tenth."""
    return generation in (3, 5) or generation % 10 == 0
