"""Sets of chunks as integers, and the choice of the rarest."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.model import Haves
from meshmax.core.fetch_chunks import Rarity, bits_of, lowest

COUNT = 40
SETS = st.integers(0, (1 << COUNT) - 1)


def test_haves_become_a_set_and_stray_bits_are_dropped() -> None:
    assert bits_of(Haves.all(10)) == 0b11_1111_1111
    assert bits_of(Haves.none(10)) == 0
    assert bits_of(Haves(10, b"\x01\xff")) == 0b11_0000_0001
    assert lowest(0b1010_0000) == 5


@given(st.lists(SETS, max_size=12), SETS, st.integers(0, 1 << 30))
def test_the_choice_is_among_those_that_fewest_sources_have(sources: list[int], among: int, seed: int) -> None:
    rarity = Rarity(COUNT, random.Random(seed))
    for chunks in sources:
        rarity.add(chunks)
    holders = {i: sum(chunks >> i & 1 for chunks in sources) for i in range(COUNT) if among >> i & 1}
    chosen = rarity.choose(among)
    if not holders:
        assert chosen is None
    else:
        assert chosen is not None
        assert holders[chosen] == min(holders.values())


@given(st.lists(SETS, max_size=12), st.integers(0, 1 << 30))
def test_what_was_added_and_taken_away_leaves_no_trace(sources: list[int], seed: int) -> None:
    rarity = Rarity(COUNT, random.Random(seed))
    for chunks in sources:
        rarity.add(chunks)
    for chunks in sources:
        rarity.remove(chunks)
    assert rarity.unheld() == (1 << COUNT) - 1


def test_every_one_of_equally_rare_chunks_is_chosen_now_and_then() -> None:
    rarity = Rarity(COUNT, random.Random(1))
    chosen = Counter(rarity.choose((1 << COUNT) - 1) for _ in range(2000))
    assert len(chosen) == COUNT
    assert max(chosen.values()) < 150
