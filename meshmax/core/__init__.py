"""Decisions, sans-IO: classes fed with events and time that return actions. Playable at any speed, on any machine."""
