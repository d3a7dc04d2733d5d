"""The words of meshmax: frozen types, errors, names and configuration. No I/O, no clock, no randomness."""
