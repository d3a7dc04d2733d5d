from meshmax.core.write_pace import FEW, MAX_PAUSE_S, PACE_S, pause_s


def test_few_streams_are_written_to_whenever_there_is_something() -> None:
    assert {pause_s(streams) for streams in range(FEW + 1)} == {0.0}


def test_many_streams_together_are_written_to_so_often_and_no_more() -> None:
    for streams in range(FEW + 1, int(MAX_PAUSE_S / PACE_S)):
        assert streams / pause_s(streams) <= 1.001 / PACE_S


def test_no_stream_waits_for_longer_than_a_person_sees() -> None:
    assert pause_s(100_000) == MAX_PAUSE_S
