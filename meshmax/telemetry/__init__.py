"""Logs, metrics, and the one place where a task's failure is contained (isolate)."""
