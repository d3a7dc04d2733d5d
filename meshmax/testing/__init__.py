"""Public fakes: in-memory transport and network, simulated nodes, contract suites."""
