"""Bytes to words and back: frames, messages of each protocol, signed records. Every limit on input is here."""
