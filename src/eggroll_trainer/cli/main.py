"""The command ``eggroll``: its subcommands and exit statuses."""

from __future__ import annotations

import importlib
import shlex
import sys
from typing import NamedTuple

from .pipes import pipes_may_close


class _Command(NamedTuple):
    """A subcommand.

    Attributes:
        module: The module with its ``main(arguments)``.
        usage: Its arguments, as text.
        help: What it does, as text.
        extra: The extra with the packages that it needs.
        resumable: Whether its runs can be resumed.
    """

    module: str
    usage: str
    help: str
    extra: str
    resumable: bool = False


COMMANDS = {
    "demo": _Command(".demo", "", "train a network of on-off units, which has no gradient", "cli"),
    "rl": _Command("..rl.command", "ENV_ID", "train a policy in a Gymnasium environment", "rl", True),
    "llm": _Command(
        "..llm.command",
        "MODEL --data FILE --reward MODULE:FUNCTION",
        "train a language model by a reward of its completions",
        "llm",
        True,
    ),
    "train": _Command(".train", "MODULE:FACTORY", "train any model with your own fitness function", "cli", True),
    "tune": _Command(
        ".tune", "MODULE:FACTORY", "find a sigma and a learning rate for your model and fitness function", "cli"
    ),
    "plot": _Command(".plot", "RUN…", "plot runs, or compare them", "cli"),
    "bench": _Command(".bench", "", "measure generations per second on this machine", "cli"),
    "info": _Command(".info", "", "show versions, devices, and what is fast on this machine", "cli"),
}

EXAMPLES = (
    "eggroll demo",
    "eggroll rl CartPole-v1",
    "eggroll train my_model.py:make --generations 200",
    "eggroll plot runs/CartPole-v1-0 runs/CartPole-v1-1 --out compared.svg",
)


def usage() -> str:
    """Return the text of ``eggroll --help``."""
    commands = "\n".join(
        f"  eggroll {name} {command.usage}".rstrip() + f"\n      {command.help}" for name, command in COMMANDS.items()
    )
    examples = "\n".join(f"  {example}" for example in EXAMPLES)
    return (
        f"usage: eggroll COMMAND [options]\n\ncommands:\n{commands}\n\nexamples:\n{examples}\n\n"
        "eggroll COMMAND --help lists a command's options; eggroll --version shows the version.\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status.

    It is 0 for success, 1 for a failure, 2 for a wrong command line, and 130 after a Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    with pipes_may_close():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    name, *rest = arguments
    if name in ("-V", "--version"):
        from .. import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        print(f"eggroll: unknown command {name!r}{_meant(name)}\n\n{usage()}", end="", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    try:
        try:
            module = importlib.import_module(command.module, __package__)
        except ImportError as error:
            print(
                f"eggroll {name} needs a package that is not installed: {error}\n"
                f"pip install 'eggroll_trainer[{command.extra}]'",
                file=sys.stderr,
            )
            return 1
        status: int = module.main(rest)
    except KeyboardInterrupt:
        print(f"\nstopped{_how_to_go_on(name, rest) if command.resumable else ''}", file=sys.stderr)
        return 130
    return status


def _meant(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, COMMANDS, n=1)
    return f": did you mean {near[0]}?" if near else ""


def _how_to_go_on(name: str, arguments: list[str]) -> str:
    again = shlex.join([*(argument for argument in arguments if argument != "--resume"), "--resume"])
    return f"; continue with: eggroll {name} {again}"
