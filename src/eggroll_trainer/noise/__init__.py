"""Noise: random numbers as a pure function of a key (seed, generation, parameter name, member)."""
