"""The device that the tests run on: ``EGGROLL_TEST_DEVICE=cuda make test``."""

from __future__ import annotations

import os

import torch

DEVICE = os.environ.get("EGGROLL_TEST_DEVICE")
if DEVICE is not None:
    # Before the test modules make their data.
    torch.set_default_device(DEVICE)
