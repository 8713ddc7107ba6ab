"""Helpers that all packages use: validation, interrupts, warnings, memory."""
