"""The figure of a search for settings."""

from __future__ import annotations

from typing import Any


def figure_of(tuning: Any) -> Any:
    """Return a figure of a :class:`Tuning` with two panels: linear share over sigma, and fitness for each rate."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    sigmas = [trial.sigma for trial in tuning.sigmas]
    left.plot(sigmas, [trial.linear_share for trial in tuning.sigmas], "o-", label="linear share")
    left.plot(sigmas, [trial.ties for trial in tuning.sigmas], "s--", label="ties")
    left.axvline(tuning.sigma, color="0.5", linestyle=":")
    left.set(xscale="log", xlabel="sigma", ylim=(-0.05, 1.05))
    left.legend()
    colours = colormaps["viridis"]
    for i, trial in enumerate(tuning.rates):
        found = trial.learning_rate == tuning.learning_rate
        right.plot(
            range(1, len(trial.fitness) + 1),
            trial.fitness,
            color=colours(i / max(1, len(tuning.rates) - 1)),
            linestyle="-" if found else "--",
            linewidth=2.5 if found else 1.2,
            label=f"{trial.learning_rate:.2g}",
        )
    right.set(xlabel="generation", ylabel="mean fitness")
    right.legend(title="learning rate", fontsize="small")
    return figure
