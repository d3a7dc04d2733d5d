"""How often strangers are served."""

from meshmax.core.rates import Rates


def test_a_source_has_its_burst_and_then_its_rate() -> None:
    rates = Rates(per_s=2, burst=3, total_per_s=1000)
    assert [rates.take("a", 0.0) for _ in range(4)] == [True, True, True, False]
    assert [rates.take("a", 0.5), rates.take("a", 0.5)] == [True, False]
    assert [rates.take("a", 100.0) for _ in range(4)] == [True, True, True, False]


def test_one_source_takes_nothing_from_another() -> None:
    rates = Rates(per_s=1, burst=1, total_per_s=1000)
    assert rates.take("a", 0.0)
    assert not rates.take("a", 0.0)
    assert rates.take("b", 0.0)


def test_all_together_have_a_rate() -> None:
    rates = Rates(per_s=1, burst=5, total_per_s=10)
    assert sum(rates.take(str(n), 0.0) for n in range(100)) == 10
    assert sum(rates.take(str(n), 1.0) for n in range(100)) == 10


def test_what_is_refused_costs_others_nothing() -> None:
    rates = Rates(per_s=1, burst=1, total_per_s=2)
    assert [rates.take("a", 0.0) for _ in range(50)].count(True) == 1
    assert rates.take("b", 0.0)


def test_the_memory_of_sources_is_bounded_and_forgets_who_was_silent_longest() -> None:
    rates = Rates(per_s=1, burst=1, total_per_s=1000, max_sources=3)
    for source in ("a", "b", "c", "a", "d"):
        rates.take(source, 0.0)
    assert rates.sources == 3
    assert not rates.take("a", 0.0)  # remembered
    assert rates.take("b", 0.0)  # forgotten


def test_a_clock_that_goes_back_gives_nothing_away() -> None:
    rates = Rates(per_s=1, burst=1, total_per_s=10)
    assert rates.take("a", 10.0)
    assert not rates.take("a", 5.0)
