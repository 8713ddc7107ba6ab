"""An evaluator of members in another process: finds their weights in a folder, and leaves their scores there."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from helpers import fitness, network


def work(folder: str) -> None:
    """Evaluate the members of a generation that lie in a folder, one after the other, and leave their scores there."""
    path = Path(folder)
    while True:
        for member in sorted(path.glob("member-*.pt")):
            done = path / f"{member.stem}.json"
            if not done.exists():
                model = network()
                model.load_state_dict(torch.load(member))
                part = path / f"{member.stem}.part"
                part.write_text(json.dumps(fitness(model)))
                part.rename(done)
                print(member.stem, flush=True)
        if (path / "over").exists():
            return
