"""The command ``eggroll``."""

from __future__ import annotations

import importlib
import shlex
import sys

_USAGE = """usage: eggroll rl ENV_ID [options]
       eggroll llm MODEL --data FILE --reward MODULE:FUNCTION [options]

  rl    train a policy in a Gymnasium environment; eggroll rl HalfCheetah-v5 --help lists the options
  llm   train a language model by a reward of its completions; eggroll llm --help lists the options
"""

_COMMANDS = ("rl", "llm")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    command, *rest = arguments
    if command not in _COMMANDS:
        print(f"eggroll: unknown command {command!r}\n{_USAGE}", end="", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(f".{command}.command", __package__)
    except ImportError as error:
        print(
            f"eggroll {command} needs a package that is not installed: {error}\n"
            f"pip install 'eggroll_trainer[{command}]'",
            file=sys.stderr,
        )
        return 1
    try:
        status: int = module.main(rest)
    except KeyboardInterrupt:
        again = shlex.join([*(argument for argument in rest if argument != "--resume"), "--resume"])
        print(f"\nstopped; go on with: eggroll {command} {again}", file=sys.stderr)
        return 130
    return status
