"""``eggroll rl ENV_ID``: trains a policy, and writes a folder with the results of the run."""

from __future__ import annotations

import dataclasses
import sys

import tyro

from .._utils.settings_file import HELP, read_settings, without_config
from .budget import described
from .settings import TASKS, Settings, settings_for
from .training import Run, plot, rounded
from .video import record

DESCRIPTION = f"""Train a policy in a Gymnasium environment, and write a folder with the results of the run.

Examples:
  eggroll rl CartPole-v1
  eggroll rl HalfCheetah-v5 --seed 1 --out runs/second
  eggroll rl HalfCheetah-v5 --seed 1 --out runs/second --resume
  eggroll rl --config runs/second --seed 2

{HELP}"""


def parsed(arguments: list[str]) -> Settings:
    """Return the settings of a command line, with the tuned settings of its task as defaults.

    Raises:
        ValueError: The file of ``--config`` cannot be used.
    """
    file, arguments = without_config(arguments)
    # The task may be anywhere among the options; also used for --help.
    task = next((argument for argument in arguments if argument in TASKS), None)
    default = Settings(tyro.MISSING) if task is None else settings_for(task)
    if file is not None:
        default = dataclasses.replace(default, **read_settings(file, Settings))
    return tyro.cli(Settings, args=arguments, default=default, prog="eggroll rl", description=DESCRIPTION)


def main(arguments: list[str]) -> int:
    """Run the command and return the exit status."""
    try:
        settings = parsed(arguments)
    except ValueError as error:
        print(f"eggroll rl: {error}", file=sys.stderr)
        return 2
    try:
        run = Run(settings)
        if run.is_main:
            print(f"run: {run.folder}")
            print(described(run.settings))
        run.train()
    except (ValueError, FileNotFoundError, FileExistsError, RuntimeError) as error:
        print(f"eggroll rl: {error}", file=sys.stderr)
        return 1
    if not run.is_main:
        return 0
    last = run.metrics[-1] if run.metrics else {}
    if "eval_return" in last:
        mean, deviation = rounded(last["eval_return"]), rounded(last["eval_std"])
        print(f"centre policy: {mean} ± {deviation} over {settings.eval_episodes} episodes")
    worse = run.improvement()
    if worse is not None:
        print(worse)
    print(f"curve: {plot(run)}")
    if settings.video:
        path = run.folder / "video.mp4"
        try:
            print(f"video: {path}, return {rounded(record(run.policy, settings.env, path, seed=settings.seed))}")
        except RuntimeError as error:
            print(f"no video: {error}", file=sys.stderr)
    return 0
