"""core.mirror: what is fetched when, of whom."""

from __future__ import annotations

import time

import pytest

from meshmax.base.config import MirrorRule
from meshmax.base.errors import ConfigError
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.names import parse_name
from meshmax.base.status import ModelPresence, PeerStatus, PeerView
from meshmax.core.mirror import MAX_RULES, MirrorPlan

OLD, NEW = Sha256("a" * 64), Sha256("b" * 64)
SITE_B = PeerId("12D3KooWsiteB")
MON, SUN = 0, 6
NOON, NIGHT = 12 * 60, 2 * 60


def peer(
    *names: str,
    digest: Sha256 = NEW,
    state: str = "disk",
    peer_id: PeerId = SITE_B,
    name: str = "site-b",
    online: str = "online",
) -> PeerView:
    full = tuple(parse_name(text).full for text in names)
    models = (ModelPresence(digest, full, state, 1),)  # type: ignore[arg-type]
    return PeerView(peer_id, online, "direct", PeerStatus(peer_id, 1, 1, name, "1", models=models))  # type: ignore[arg-type]


def names(
    plan: MirrorPlan, views: list[PeerView], local: dict[str, Sha256] | None = None, minute: int = NOON
) -> list[str]:
    here = {parse_name(text).key: digest for text, digest in (local or {}).items()}
    return [wanted.name for wanted in plan.wanted(views, here, MON, minute)]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*", ["hf.co/org/llama:q4", "llama3:latest", "mistral:7b", "team/Llama:x"]),
        ("llama*", ["llama3:latest"]),
        ("LLAMA3:*", ["llama3:latest"]),
        ("*llama*", ["hf.co/org/llama:q4", "llama3:latest", "team/Llama:x"]),
        ("mistral:7?", ["mistral:7b"]),
        ("registry.ollama.ai/library/*", ["llama3:latest", "mistral:7b"]),
        ("llama.*", []),
        ("", []),
    ],
)
def test_a_pattern_chooses_models_by_their_short_or_full_names(pattern: str, found: list[str]) -> None:
    plan = MirrorPlan([MirrorRule(pattern, "site-b")])
    view = peer("llama3", "mistral:7b", "team/Llama:x", "hf.co/org/llama:q4")
    assert sorted(names(plan, [view])) == found


def test_what_is_here_already_is_not_wanted_and_what_means_another_digest_here_is() -> None:
    plan = MirrorPlan([MirrorRule("*", "site-b")])
    assert names(plan, [peer("llama3")], {"llama3": NEW}) == []
    assert names(plan, [peer("llama3")], {"LLAMA3": NEW}) == []
    assert names(plan, [peer("llama3")], {"llama3": OLD}) == ["llama3:latest"]


def test_the_peer_is_known_by_its_name_or_id_and_must_be_there() -> None:
    for text in ("site-b", SITE_B):
        plan = MirrorPlan([MirrorRule("*", text)])
        assert names(plan, [peer("llama3")]) == ["llama3:latest"]
        assert names(plan, [peer("llama3", online="draining")]) == ["llama3:latest"]
        assert names(plan, [peer("llama3", online="offline")]) == []
    assert names(MirrorPlan([MirrorRule("*", "site-c")]), [peer("llama3")]) == []


def test_a_name_that_two_peers_bear_names_neither_and_an_id_still_does() -> None:
    views = [peer("llama3"), peer("evil", peer_id=PeerId("12D3KooWother"))]
    assert names(MirrorPlan([MirrorRule("*", "site-b")]), views) == []
    assert names(MirrorPlan([MirrorRule("*", SITE_B)]), views) == ["llama3:latest"]


def test_what_the_peer_has_only_in_parts_is_not_wanted() -> None:
    assert names(MirrorPlan([MirrorRule("*", "site-b")]), [peer("llama3", state="partial")]) == []


def test_nothing_is_wanted_outside_of_the_hours_and_days() -> None:
    plan = MirrorPlan([MirrorRule("*", "site-b", at="01:00-05:00", days="mon-fri")])
    here: dict[str, Sha256] = {}
    assert plan.wanted([peer("llama3")], here, MON, NIGHT)
    assert not plan.wanted([peer("llama3")], here, MON, NOON)
    assert not plan.wanted([peer("llama3")], here, SUN, NIGHT)
    assert plan.holds(0, MON, 60)
    assert not plan.holds(0, MON, 5 * 60)


def test_hours_past_midnight_belong_to_the_day_on_which_they_begin() -> None:
    plan = MirrorPlan([MirrorRule("*", "site-b", at="22:00-06:00", days="sun")])
    assert plan.holds(0, MON, NIGHT)
    assert not plan.holds(0, SUN, NIGHT)


def test_of_two_rules_the_first_that_matches_decides() -> None:
    other = PeerId("12D3KooWsiteC")
    views = [peer("llama3", digest=OLD), peer("llama3", "phi", peer_id=other, name="site-c")]
    plan = MirrorPlan([MirrorRule("llama*", "site-b"), MirrorRule("*", "site-c")])
    found = plan.wanted(views, {}, MON, NOON)
    assert [(w.name, w.digest, w.rule) for w in found] == [("llama3:latest", OLD, 0), ("phi:latest", NEW, 1)]


def test_a_name_that_is_none_costs_only_itself() -> None:
    view = peer("llama3")
    models = (ModelPresence(NEW, ("///", parse_name("llama3").full), "disk", 1),)
    assert view.status is not None
    broken = PeerView(SITE_B, "online", "direct", PeerStatus(SITE_B, 1, 1, "site-b", "1", models=models))
    assert names(MirrorPlan([MirrorRule("*", "site-b")]), [broken]) == ["llama3:latest"]


@pytest.mark.parametrize(
    "rule",
    [MirrorRule("*"), MirrorRule("*", "x", at="soon"), MirrorRule("*", "x", days="always"), MirrorRule("x" * 201, "x")],
)
def test_a_rule_that_makes_no_sense_is_a_configuration_error(rule: MirrorRule) -> None:
    with pytest.raises(ConfigError):
        MirrorPlan([rule])


def test_more_rules_than_a_person_writes_are_a_configuration_error() -> None:
    with pytest.raises(ConfigError):
        MirrorPlan([MirrorRule("*", "x")] * (MAX_RULES + 1))
    assert not MirrorPlan([])


def test_a_pattern_of_nothing_but_stars_is_quick() -> None:
    plan = MirrorPlan([MirrorRule("*" * 199 + "x", "site-b")])
    began = time.process_time()
    assert names(plan, [peer("a" * 80 + ":" + "a" * 80)]) == []
    assert time.process_time() - began < 5.0  # else it takes years
