"""What context an ask wants: of its own node, of a peer's, and where memory is short."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.core.context import ANSWER_TOKENS, GROWTH_STEPS, Setting, Wish, grown, wish_of
from meshmax.core.memory import Need

PER_TOKEN = 10
FILE = 1000


def need(tokens: int) -> Need:
    return Need(FILE, PER_TOKEN * tokens)


def setting(loaded: int | None = None, fits: int | None = None, *, usual: int = 4096, trained: int = 32768) -> Setting:
    """``fits``: the largest context for which there is room."""
    return Setting(usual, trained, need, loaded, None if fits is None else need(fits).total)


def tokens(wish: Wish | None) -> tuple[int, int]:
    assert wish is not None
    assert wish.best.need == need(wish.best.tokens)
    assert wish.least.need == need(wish.least.tokens)
    return wish.best.tokens, wish.least.tokens


@pytest.mark.parametrize("loaded", [None, 512, 8192])
@pytest.mark.parametrize(("asked", "wanted"), [(8192, 8192), (100_000, 32768), (1, 64), (512, 512)])
def test_our_own_number_is_meant_within_what_the_model_was_trained_for(
    asked: int, wanted: int, loaded: int | None
) -> None:
    assert tokens(wish_of(asked, setting(loaded, 600), ours=True)) == (wanted, wanted)


@pytest.mark.parametrize("ours", [True, False])
def test_who_names_no_number_wants_the_usual_and_is_content_with_what_there_is(ours: bool) -> None:
    assert tokens(wish_of(None, setting(), ours=ours)) == (4096, 4096)
    assert tokens(wish_of(None, setting(8192), ours=ours)) == (4096, 4096)
    assert tokens(wish_of(None, setting(512), ours=ours)) == (4096, 512)
    assert tokens(wish_of(None, setting(512, 600), ours=ours)) == (512, 512)
    assert tokens(wish_of(None, setting(None, 600), ours=ours)) == (4096, 4096)


def test_to_load_a_model_without_a_number_is_done_where_it_is_loaded() -> None:
    assert tokens(wish_of(None, setting(512), ours=True, load_only=True)) == (512, 512)
    assert tokens(wish_of(None, setting(), ours=True, load_only=True)) == (4096, 4096)
    assert tokens(wish_of(1024, setting(512), ours=True, load_only=True)) == (1024, 1024)


@pytest.mark.parametrize(
    ("asked", "loaded", "fits", "wanted"),
    [
        (8192, None, None, (8192, 4096)),
        (8192, None, 8192, (8192, 4096)),
        (8192, None, 8191, (4096, 4096)),
        (32768, None, 10_000, (8192, 4096)),
        (512, None, None, (512, 512)),
        (512, None, 1, (512, 512)),
        (100_000, None, None, (32768, 4096)),
        (8192, 4096, None, (8192, 4096)),
        (8192, 4096, 5000, (4096, 4096)),
        (32768, 4096, 20_000, (16384, 4096)),
        (1024, 512, None, (1024, 512)),
        (1024, 2048, 1, (1024, 1024)),
    ],
)
def test_a_peers_number_counts_as_far_as_there_is_room_and_costs_no_answer(
    asked: int, loaded: int | None, fits: int | None, wanted: tuple[int, int]
) -> None:
    assert tokens(wish_of(asked, setting(loaded, fits), ours=False)) == wanted


def test_of_a_model_that_says_not_what_it_was_trained_for_peers_have_the_usual() -> None:
    assert tokens(wish_of(8192, setting(trained=0), ours=False)) == (4096, 4096)
    assert tokens(wish_of(8192, setting(512, trained=0), ours=False)) == (4096, 512)
    assert tokens(wish_of(8192, setting(trained=0), ours=True)) == (8192, 8192)
    assert grown(5000, None, setting(4096, trained=0)) is None


def test_numbers_of_peers_that_creep_up_cost_few_loads() -> None:
    loaded, loads = 512, 0
    for asked in range(513, 32769):
        wish = wish_of(asked, setting(loaded), ours=False)
        if wish.best.tokens > loaded:
            assert wish.best.tokens >= asked
            loaded, loads = wish.best.tokens, loads + 1
    assert loads <= GROWTH_STEPS * 6  # doublings


@pytest.mark.parametrize(
    ("needed", "limit", "fits", "wanted"),
    [
        (5000, None, None, (8192, 4096)),
        (8000, -1, None, (16384, 4096)),
        (8000, 100, None, (8192, 4096)),
        (8192 - ANSWER_TOKENS, None, None, (8192, 4096)),
        (30_000, 10_000, None, (32768, 4096)),
        (5000, None, 8192, (8192, 4096)),
    ],
)
def test_a_prompt_that_is_too_long_wants_room_for_itself_and_its_answer(
    needed: int, limit: int | None, fits: int | None, wanted: tuple[int, int]
) -> None:
    assert tokens(grown(needed, limit, setting(4096, fits))) == wanted


@pytest.mark.parametrize(("needed", "fits"), [(32768, None), (40_000, None), (5000, 8000), (100, None)])
def test_a_prompt_for_which_there_is_no_larger_context_has_none(needed: int, fits: int | None) -> None:
    assert grown(needed, None, setting(4096, fits)) is None


@given(
    st.none() | st.integers(-(1 << 70), 1 << 70),
    st.none() | st.integers(64, 32768),
    st.none() | st.integers(0, 40_000),
    st.integers(64, 32768),
    st.booleans(),
)
def test_whatever_is_asked_for_the_wish_is_within_bounds(
    asked: int | None, loaded: int | None, fits: int | None, usual: int, ours: bool
) -> None:
    here = msgspec.structs.replace(setting(loaded, fits), usual=usual)
    best, least = tokens(wish_of(asked, here, ours=ours))
    assert 64 <= least <= best <= 32768
    if not (asked and ours) and best > (usual if loaded is None else loaded):
        assert here.fits(best)  # a peer's wish, or the usual one, unloads nothing that works for what does not fit
    if not (asked and ours) and loaded is not None:
        assert least <= loaded  # and what there is does for it
