"""How a path came about, in a line."""

from meshmax.core.path_story import MAX_WORDS, Story


def test_a_peer_that_we_dialled_is_told_with_times_from_the_beginning() -> None:
    story = Story("relay", "bootstrap-1", 10.0, 10.09)
    assert story.told.via == "relay bootstrap-1 after 0.09 s"
    assert (story.told.connect_ms, story.told.direct_ms) == (90.0, None)
    story.on_path("punched-tcp", "", 10.31)
    assert story.told.via == "relay bootstrap-1 after 0.09 s, then TCP simultaneous open after 0.31 s"
    assert (story.told.connect_ms, story.told.direct_ms) == (90.0, 310.0)


def test_a_peer_that_came_to_us_is_told_as_such() -> None:
    story = Story("direct", "", None, 10.0)
    assert story.told.via == "it came to us: direct"
    assert (story.told.connect_ms, story.told.direct_ms) == (None, None)
    story.on_path("relay", "192.0.2.1", 130.0)
    assert story.told.via == "it came to us: direct, then relay 192.0.2.1 after 2 min"


def test_a_path_that_changes_without_end_is_told_in_a_few_words() -> None:
    story = Story("relay", "first", 0.0, 1.0)
    for second in range(2, 50):
        story.on_path("punched-udp" if second % 2 else "relay", "again", float(second))
    words = story.told.via.split(", then ")
    assert len(words) == MAX_WORDS
    assert (words[0], words[-1]) == ("relay first after 1.00 s", "UDP through both NATs after 49.00 s")
    assert story.told.via.isascii()
