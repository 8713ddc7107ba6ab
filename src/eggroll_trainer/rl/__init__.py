"""Reinforcement learning: policies, and simulators that step one environment for every member of a population."""

from importlib.util import find_spec

if find_spec("gymnasium") is None:
    raise ImportError("eggroll_trainer.rl needs Gymnasium: pip install 'eggroll_trainer[rl]'")
