"""Humanoid learns to run a few metres: a linear policy, a run folder, a curve and a video.

    python examples/humanoid.py --steps 20000000
    python examples/humanoid.py --resume            # goes on with it

This is ``eggroll rl Humanoid-v5``; ``examples/halfcheetah.py`` shows the pieces that such a run is made of.
"""

import sys

from eggroll_trainer.rl.command import main

if __name__ == "__main__":
    sys.exit(main(["Humanoid-v5", *sys.argv[1:]]))
