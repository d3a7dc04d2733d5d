"""Decisions, sans-IO: classes fed with events and time that return actions. Playable at any speed, on any machine.

A core reads no clock (``now`` is passed in, monotonic seconds), holds no randomness (a ``Random`` is passed in) and does
no I/O; `tick(now)` returns what is due and `deadline()` says when to call it next.
"""
