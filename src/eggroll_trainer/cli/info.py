"""``eggroll info``: shows versions, devices, and what is fast on this machine. It needs no extra."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .machine import everything


def main(arguments: list[str]) -> int:
    """Run the command and return the exit status."""
    # Not with tyro, as this command must work without extras.
    parser = argparse.ArgumentParser(
        "eggroll info", description="Show versions, devices, installed extras, and what is fast on this machine."
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(arguments)
    machine = everything()
    print(json.dumps(machine, indent=1) if options.json else as_text(machine))
    return 0


def as_text(machine: dict[str, Any]) -> str:
    """Return the report as text."""
    cpu = machine["processor"]
    lines = ["versions   " + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())]
    features = ", ".join(cpu["features"]) or ("none of note" if cpu["features_known"] else "unknown")
    lines.append(f"processor  {cpu['name']} ({cpu['system']}), {cpu['cores']} cores, {cpu['threads']} threads of torch")
    lines.append(f"           instruction sets: {features}; torch uses {cpu['torch_uses']}")
    shown = [f"{d['device']} {d['name']}" + (f", {d['gib']} GiB" if "gib" in d else "") for d in machine["devices"]]
    lines.append("devices    " + ("; ".join(shown) or "no GPU"))
    lines.append(f"compiler   {machine['compiler'] or 'none'}")
    for extra, packages in machine["extras"].items():
        missing = [name for name, version in packages.items() if version is None]
        state = f"missing {', '.join(missing)}: pip install 'eggroll_trainer[{extra}]'" if missing else "installed"
        lines.append(f"extra      {extra}: {state}")
    lines += [f"speed      {sentence}" for sentence in machine["advice"]]
    return "\n".join(lines)
