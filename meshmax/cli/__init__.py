"""The command line: the only place that writes to a terminal. Every command but `peer` talks HTTP to a running peer."""
