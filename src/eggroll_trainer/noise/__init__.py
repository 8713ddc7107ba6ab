"""Noise: from a key (seed, generation, parameter name, member) to random numbers, without any state."""
