"""What every station uses: validation, interrupts, warnings, memory."""
