"""What importing the package costs, and what it leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys

EXTRAS = ("gymnasium", "matplotlib", "mujoco", "peft", "ray", "sklearn", "tensorboard", "transformers", "tyro", "wandb")
SCRIPT = f"""
import json, sys, time
import numpy, torch, torch.utils._pytree, torch.distributed, tqdm, greenlet
before, start = set(sys.modules), time.process_time()
import eggroll_trainer
seconds = time.process_time() - start
print(json.dumps([seconds, [name for name in {EXTRAS} if name in set(sys.modules) - before]]))
"""


def test_import_is_quick_and_needs_no_extra() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    seconds, extras = json.loads(result.stdout)
    assert extras == []
    # In processor seconds, which a busy machine does not change: about 0.1.
    assert seconds < 0.5
