"""Every test and doctest starts from the same state of the global generators, so that what passes once passes again."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

# Another start, to find tests and examples that pass by luck: EGGROLL_TEST_SEED=7 make test
SEED = int(os.environ.get("EGGROLL_TEST_SEED", "0"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed the generators of torch, NumPy and the standard library."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
