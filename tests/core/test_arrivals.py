"""How many datagrams of strangers are looked at."""

from meshmax.core.arrivals import BURST, MAX_SOURCES, RATE_PER_S, TOTAL_BURST, Arrivals


def test_a_source_gets_its_burst_and_then_its_rate() -> None:
    arrivals = Arrivals(0.0)
    assert sum(arrivals.take("a", 0.0) for _ in range(1000)) == BURST
    assert sum(arrivals.take("a", 1.0) for _ in range(1000)) == RATE_PER_S
    assert arrivals.take("b", 1.0)


def test_all_sources_together_are_bounded() -> None:
    arrivals = Arrivals(0.0)
    assert sum(arrivals.take(str(n), 0.0) for n in range(10_000)) == TOTAL_BURST


def test_a_larger_node_takes_more() -> None:
    arrivals = Arrivals(0.0, scale=4.0)
    assert sum(arrivals.take("a", 0.0) for _ in range(1000)) == 4 * BURST


def test_sources_remembered_are_bounded() -> None:
    arrivals = Arrivals(0.0)
    for number in range(MAX_SOURCES + 500):
        arrivals.take(str(number), float(number))
    assert len(arrivals._sources) == MAX_SOURCES


def test_what_was_refused_is_counted() -> None:
    arrivals = Arrivals(0.0)
    for _ in range(int(BURST) + 7):
        arrivals.take("a", 0.0)
    assert arrivals.refused == 7


def test_a_flood_of_made_up_addresses_takes_nothing_from_who_has_proven_his() -> None:
    arrivals = Arrivals(0.0)
    for number in range(10_000):
        arrivals.take(f"spoofed {number}", 0.0)
    assert not arrivals.take("newcomer", 0.0)
    assert arrivals.take("known", 0.0, proven=True)
