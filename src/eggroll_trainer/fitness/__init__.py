"""Fitness: how a fitness function is run for a population, and how its scores become weights."""
