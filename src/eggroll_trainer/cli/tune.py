"""``eggroll tune MODULE:FACTORY``: finds a sigma and a learning rate for the user's model and fitness function."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path

import tyro

from .._utils.settings_file import HELP, read_settings, without_config
from ..tuning import Tuning, tune
from .model import FACTORY, ModelSettings, UsageError, is_ours, make_trainer

DESCRIPTION = f"""Find a sigma and a learning rate for your model and fitness function, by short trials.

{FACTORY}

Examples:
  eggroll tune my_model.py:make
  eggroll tune my_model.py:make --budget 100 --out tuned.json
  eggroll train --config tuned.json

{HELP}"""


@dataclasses.dataclass(frozen=True)
class Settings(ModelSettings):
    """What is tuned, and how."""

    budget: int = 50
    """Largest number of generations for the search, at least 20."""
    plot: Path | None = Path("tuned.png")
    """File of the plot of the trials."""
    out: Path | None = None
    """File of the settings, for eggroll train --config; only with factories that return no trainer."""


def main(arguments: list[str]) -> int:
    """Run the command and return the exit status."""
    try:
        file, arguments = without_config(arguments)
        fields = {field.name for field in dataclasses.fields(Settings)}
        values = {} if file is None else read_settings(file, Settings, ignored=_of_training())
        default = Settings(**{"factory": tyro.MISSING, **{k: v for k, v in values.items() if k in fields}})
    except ValueError as error:
        print(f"eggroll tune: {error}", file=sys.stderr)
        return 2
    settings = tyro.cli(Settings, args=arguments, default=default, prog="eggroll tune", description=DESCRIPTION)
    try:
        # Exceptions of the user's factory keep their traceback.
        trainer, is_own = make_trainer(settings)
        if is_own and settings.out is not None:
            raise UsageError(
                f"{settings.factory} returns a trainer, which has its own settings, and --out writes those of eggroll"
                " train: leave out --out"
            )
    except UsageError as error:
        print(f"eggroll tune: {error}", file=sys.stderr)
        return 2
    try:
        found = tune(trainer, settings.budget)
    except (TypeError, ValueError) as error:
        if not is_ours(error):
            raise
        print(f"eggroll tune: {error}", file=sys.stderr)
        return 1
    if trainer.is_main:
        _finish(settings, found, is_own)
    return 0


def _of_training() -> set[str]:
    """Return the names of settings that the file of a training run has in addition."""
    from .train import Settings as Training

    return {field.name for field in dataclasses.fields(Training)} - {
        field.name for field in dataclasses.fields(Settings)
    }


def _finish(settings: Settings, found: Tuning, is_own: bool) -> None:
    """Write the settings and the plot, and print the results and the next steps.

    ``is_own`` is True if the factory returned the trainer.
    """
    print(found)
    if settings.plot is not None:
        try:
            found.plot(settings.plot)
            print(f"plot: {settings.plot}")
        except (ImportError, OSError, ValueError) as error:
            print(f"no plot: {error}", file=sys.stderr)
    if is_own:
        print(f"next: set sigma={found.sigma:.4g} and learning_rate={found.learning_rate:.4g} in {settings.factory}")
        return
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(ModelSettings)}
    values |= {"sigma": found.sigma, "learning_rate": found.learning_rate}
    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(values, indent=1) + "\n")
        print(f"next: eggroll train --config {shlex.quote(str(settings.out))}")
        return
    options = f"--sigma {found.sigma:.4g} --learning-rate {found.learning_rate:.4g}"
    print(f"next: eggroll train {shlex.quote(settings.factory)} {options}")
