"""Fitness: runs a fitness function for a population, and turns its scores into weights."""
