"""What is swept: never what is kept or the last copy, oldest first, and enough whenever that can be."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import ConfigError
from meshmax.base.ids import Sha256
from meshmax.core.sweep import ALONE, ENOUGH, SHARED, YOUNG, Budget, Candidate, Copy, PartialCopy, Sweep, parse_budget

GB = 10**9


def digest(name: str) -> Sha256:
    return Sha256((name.encode().hex() * 64)[:64])


def copy(name: str, last_use_s: float = 0.0, *, holders: int = 1, kept: str = "", blobs: Any = None) -> Copy:
    sizes = blobs if blobs is not None else {name: 10}
    pairs = tuple((digest(f"blob {blob}"), size) for blob, size in sizes.items())
    return Copy(digest(name), (name,), sum(size for _, size in pairs), pairs, last_use_s, kept, holders)


def run(sweep: Sweep, refuse: frozenset[str] = frozenset()) -> list[str]:
    """Everything that went, in order."""
    went = []
    while (step := sweep.next()) is not None:
        candidate, confirm = step
        name = name_of(candidate)
        if confirm and name in refuse:
            sweep.refuse(candidate, "nobody vouches for it")
        else:
            sweep.gone(candidate)
            went.append(name)
    return went


def name_of(candidate: Candidate) -> str:
    return candidate.names[0] if isinstance(candidate, Copy) else f"partial {candidate.digest[:4]}"


def reasons(sweep: Sweep) -> dict[str, str]:
    return {name_of(v.candidate): v.reason for v in sweep.verdicts() if v.action == "stays"}


def of(*copies: Copy, need: int, last_copies: bool = False) -> Sweep:
    return Sweep(copies, (), need, 1000.0, 100.0, last_copies=last_copies)


def test_the_one_used_longest_ago_goes_first_and_no_more_than_must() -> None:
    sweep = of(copy("new", 3), copy("old", 1), copy("middle", 2), need=15)
    assert run(sweep) == ["old", "middle"]
    assert sweep.freed == 20
    assert reasons(sweep) == {"new": ENOUGH}


def test_without_need_no_model_goes() -> None:
    sweep = of(copy("a"), copy("b", holders=0), need=0)
    assert run(sweep) == []
    assert set(reasons(sweep).values()) == {ENOUGH}


@pytest.mark.parametrize("last_copies", [False, True])
def test_what_is_kept_stays_and_says_why(last_copies: bool) -> None:
    sweep = of(copy("a", kept="it is pinned"), copy("b", kept="it is loaded"), need=100, last_copies=last_copies)
    assert run(sweep) == []
    assert reasons(sweep) == {"a": "it is pinned", "b": "it is loaded"}


def test_the_last_copy_stays_unless_that_is_allowed_and_then_goes_last() -> None:
    copies = copy("only", 1, holders=0), copy("doubted", 2), copy("shared", 3)
    sweep = of(*copies, need=100)
    assert run(sweep, frozenset({"doubted"})) == ["shared"]
    assert reasons(sweep) == {"only": ALONE, "doubted": "nobody vouches for it"}
    sweep = of(*copies, need=100, last_copies=True)
    assert run(sweep, frozenset({"doubted"})) == ["shared", "only", "doubted"]


def test_what_somebody_relies_on_stays_even_where_last_copies_may_go() -> None:
    sweep = of(copy("leased"), need=100, last_copies=True)
    step = sweep.next()
    assert step is not None
    sweep.refuse(step[0], "peer bob relies on this copy", for_good=True)
    assert sweep.next() is None
    assert reasons(sweep) == {"leased": "peer bob relies on this copy"}


def test_a_shared_blob_is_freed_with_the_last_model_that_names_it() -> None:
    a, b = copy("a", 1, blobs={"big": 100, "small": 1}), copy("b", 2, blobs={"big": 100, "other": 2})
    sweep = of(a, b, need=50)
    assert run(sweep) == ["a", "b"]
    assert [v.frees for v in sweep.verdicts()] == [1, 102]


def test_a_model_whose_going_frees_nothing_stays() -> None:
    pinned = copy("pinned", 5, kept="it is pinned", blobs={"big": 100})
    sweep = of(copy("alias", 1, blobs={"big": 100}), copy("linked", 2, blobs={"elsewhere": 0}), pinned, need=50)
    assert run(sweep) == []
    assert reasons(sweep) == {"alias": SHARED, "linked": SHARED, "pinned": "it is pinned"}


def test_old_partials_go_without_need_and_before_models_and_young_or_wanted_ones_stay() -> None:
    old, young = PartialCopy(digest("old"), 10, 0.0), PartialCopy(digest("young"), 10, 950.0)
    wanted = PartialCopy(digest("wanted"), 10, 0.0, "a pull needs it")
    sweep = Sweep([copy("m")], [young, old, wanted], 0, 1000.0, 100.0)
    assert run(sweep) == [name_of(old)]
    assert reasons(sweep) == {"m": ENOUGH, name_of(young): YOUNG, name_of(wanted): "a pull needs it"}
    sweep = Sweep([copy("m")], [old], 10, 1000.0, 100.0)
    assert run(sweep) == [name_of(old)]
    sweep = Sweep([copy("m")], [old], 10, 1000.0, 100.0)
    step = sweep.next()
    assert step is not None
    sweep.refuse(step[0], "it is being fetched")
    assert run(sweep) == ["m"]


@pytest.mark.parametrize(
    ("disk_budget", "keep_free", "used", "free", "coming", "excess"),
    [
        ("", "", 100 * GB, 0, 50 * GB, 0),
        ("200GB", "", 150 * GB, 500 * GB, 0, 0),
        ("200GB", "", 150 * GB, 500 * GB, 70 * GB, 20 * GB),
        ("200GB", "", 50 * GB, 10 * GB, 70 * GB, 60 * GB),
        ("", "5GB", 50 * GB, 4 * GB, 0, GB),
        ("", "5GB", 50 * GB, 10 * GB, 7 * GB, 2 * GB),
        ("200GB", "5GB", 230 * GB, 1 * GB, 0, 30 * GB),
    ],
)
def test_how_much_must_go(disk_budget: str, keep_free: str, used: int, free: int, coming: int, excess: int) -> None:
    assert parse_budget(disk_budget, keep_free).excess(used, free, coming) == excess


def test_a_budget_that_is_no_size_names_its_key() -> None:
    with pytest.raises(ConfigError, match=r"keep_free.*500MB"):
        parse_budget("", "much")
    assert parse_budget("", " ") == Budget(None, 0)
    assert not parse_budget("0", "0").is_set


copies_strategy = st.lists(
    st.builds(
        lambda number, last, holders, kept, blobs: copy(
            f"m{number}", last, holders=holders, kept="it is pinned" if kept else "", blobs=blobs
        ),
        st.integers(0, 10**6),
        st.integers(0, 50),
        st.integers(0, 2),
        st.booleans(),
        st.dictionaries(st.integers(0, 8).map(str), st.sampled_from([7]), min_size=1, max_size=4),
    ),
    max_size=8,
    unique_by=lambda one: one.names,
)


@given(copies_strategy, st.integers(0, 80), st.booleans(), st.frozensets(st.integers(0, 7)))
def test_for_any_store_the_rules_hold_and_enough_is_freed_if_that_can_be(
    copies: list[Copy], need: int, last_copies: bool, doubted: frozenset[int]
) -> None:
    refuse = frozenset(copies[at].names[0] for at in doubted if at < len(copies))
    sweep = of(*copies, need=need, last_copies=last_copies)
    went = run(sweep, refuse)
    by_name = {one.names[0]: one for one in copies}
    may_go = [one for one in copies if not one.kept and (last_copies or (one.holders and one.names[0] not in refuse))]
    assert {by_name[name].digest for name in went} <= {one.digest for one in may_go}
    assert len(went) == len(set(went))
    stays = {blob for one in copies if one.names[0] not in went for blob, _ in one.blobs}
    freed = sum(dict(pair for name in went for pair in by_name[name].blobs if pair[0] not in stays).values())
    assert sweep.freed == freed
    kept_blobs = {blob for one in copies if one not in may_go for blob, _ in one.blobs}
    most = sum(dict(pair for one in may_go for pair in one.blobs if pair[0] not in kept_blobs).values())
    assert sweep.freed >= min(need, most)
    first = [by_name[name].last_use_s for name in went if by_name[name].holders and name not in refuse]
    assert last_copies or first == sorted(first)
    assert len(sweep.verdicts()) == len(copies)


def test_a_store_of_a_thousand_models_is_swept_in_a_moment() -> None:
    copies = [copy(f"m{number}", number, blobs={"shared": 5, f"b{number}": 7}) for number in range(1000)]
    sweep = of(*copies, need=10**9)
    assert len(run(sweep)) == 1000
    assert sweep.freed == 7005
