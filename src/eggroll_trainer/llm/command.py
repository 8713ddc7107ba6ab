"""``eggroll llm MODEL``: trains a language model with a reward, and writes a folder with the results of the run."""

from __future__ import annotations

import dataclasses
import sys

import tyro
from torch import nn

from .._utils.settings_file import HELP, read_settings, without_config
from .export import changes_of, save_merged, write_update
from .presets import PRESETS
from .settings import Settings
from .training import Run

DESCRIPTION = f"""Train a language model with a reward, and write a folder with the results of the run.

Examples:
  eggroll llm MODEL --data prompts.jsonl --reward my_rewards.py:score
  eggroll llm MODEL --data prompts.jsonl --reward my_rewards.py:score --out runs/first --resume
  eggroll llm --config runs/first --seed 1

{HELP}"""


def main(arguments: list[str]) -> int:
    """Run the command and return the exit status."""
    try:
        settings = parsed(arguments)
    except ValueError as error:
        print(f"eggroll llm: {error}", file=sys.stderr)
        return 2
    try:
        run = Run(settings)
    except (TypeError, ValueError, OSError) as error:
        print(f"eggroll llm: {error}", file=sys.stderr)
        return 1
    if run.is_main:
        print(f"run: {run.folder}")
    # Exceptions of reward functions keep their traceback.
    run.train()
    if run.is_main:
        _finish(run)
    return 0


def parsed(arguments: list[str]) -> Settings:
    """Return the settings of a command line, with those of a preset as defaults if it names one.

    Raises:
        ValueError: The file of ``--config`` cannot be used.
    """
    file, arguments = without_config(arguments)
    # Also used for --help.
    named = _preset(arguments)
    values = next((values for preset, values in PRESETS.items() if preset == named), {})
    defaults = Settings(tyro.MISSING, tyro.MISSING, **values)
    if file is not None:
        # The file of a run also contains a checksum of its data.
        defaults = dataclasses.replace(defaults, **read_settings(file, Settings, ignored=("data_checksum",)))
    return tyro.cli(Settings, args=arguments, default=defaults, prog="eggroll llm", description=DESCRIPTION)


def _preset(arguments: list[str]) -> str:
    """Return the value of ``--preset``, or an empty string."""
    for i, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option == "--preset":
            return value or next(iter(arguments[i + 1 :]), "")
    return ""


def _finish(run: Run) -> None:
    """Write the exports, and print the results and the next steps."""
    first, last = run.evaluations[0], run.evaluations[-1]
    figure = run.objective.figure
    print(f"{figure} of the centre: {first[figure]:.4g} → {last[figure]:.4g} in {last['generation']} generations")
    # Save the weights that were evaluated, even if they are rounded copies of float32 masters.
    save_merged(run.trainer.model, run.folder / "model", tokenizer=run.tokenizer)
    print(f"model: {run.folder / 'model'}")
    _write_adapter(run)
    print(f"next: {_advice(run)}")


def _advice(run: Run) -> str:
    """Return advice on the next steps."""
    if run.metrics and all(line["std_fitness"] == 0 for line in run.metrics):
        return (
            "nothing was learnt, as all members had the same score in every generation; use a reward that distinguishes"
            " bad completions from worse ones, easier prompts, or a larger --sigma"
        )
    return (
        f'AutoModelForCausalLM.from_pretrained("{run.folder / "model"}") loads it; --resume --generations'
        f" {2 * max(1, run.trainer.generation)} continues; tensorboard --logdir {run.folder} shows the curves"
    )


def _write_adapter(run: Run) -> None:
    """Write the sum of all updates as an adapter, if possible, and print how much of it the adapter keeps."""
    changes, rank = changes_of(run.trainer), run.settings.adapter_rank
    if rank == 0 or not any(bool(change.any()) for change in changes.values()):
        return

    def score(model: nn.Module) -> float:
        return run.objective.evaluate(model, run.eval_examples).figures[run.objective.figure]

    folder = run.folder / "adapter"
    try:
        update = write_update(
            run.trainer.model,
            changes,
            folder,
            rank=rank,
            base_model=run.settings.model,
            full_rank="save",
            evaluate=score,
        )
    except ValueError as error:
        print(f"no adapter: {error}")
        return
    (folder / "energy.txt").write_text(f"{update}\n")
    kept = f"{update.total:.1%} of the change's energy and a score of {update.score_kept:.4g}"
    print(f"adapter: {folder}, of rank {rank}, which keeps {kept}")
