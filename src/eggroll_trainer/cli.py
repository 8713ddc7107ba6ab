"""The command ``eggroll``."""

from __future__ import annotations

import sys

_USAGE = """usage: eggroll rl ENV_ID [options]

  rl    train a policy in a Gymnasium environment; eggroll rl HalfCheetah-v5 --help lists the options
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if arguments[0] != "rl":
        print(f"eggroll: unknown command {arguments[0]!r}\n{_USAGE}", end="", file=sys.stderr)
        return 2
    try:
        from .rl.command import main as rl
    except ImportError as error:
        print(
            f"eggroll rl needs a package that is not installed: {error}\npip install 'eggroll_trainer[rl]'",
            file=sys.stderr,
        )
        return 1
    return rl(arguments[1:])
