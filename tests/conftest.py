"""The device that the tests run on: ``EGGROLL_TEST_DEVICE=cuda make test``; ``pretend`` is a device without hardware."""

from __future__ import annotations

import os

import torch
from pretend_device import set_up

DEVICE = os.environ.get("EGGROLL_TEST_DEVICE")
if DEVICE is not None:
    # Before the test modules make their data.
    if DEVICE == "pretend":
        set_up()
    torch.set_default_device(DEVICE)
