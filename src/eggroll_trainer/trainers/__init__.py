"""Trainers: the generation loop and the algorithms."""
