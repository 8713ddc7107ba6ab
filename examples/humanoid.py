"""Humanoid learns to walk: a linear policy, a run folder, a curve and a video.

    python examples/humanoid.py --steps 20000000
    python examples/humanoid.py --resume            # goes on with it

The same as ``eggroll rl Humanoid-v5``; the settings' defaults are those of the task.
"""

from __future__ import annotations

import tyro

from eggroll_trainer.rl.settings import Settings, settings_for
from eggroll_trainer.rl.training import Run, plot
from eggroll_trainer.rl.video import record


def main(settings: Settings) -> None:
    run = Run(settings)
    run.train()
    print(f"curve: {plot(run)}")
    record(run.policy, settings.env, run.folder / "video.mp4", seed=settings.seed)


if __name__ == "__main__":
    main(tyro.cli(Settings, default=settings_for("Humanoid-v5")))
