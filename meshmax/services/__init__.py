"""trio loops: each owns one core and its tasks."""
