"""Copied identities: told from restarts, told to both, and taken back."""

from meshmax.base.ids import peer_id_of
from meshmax.base.model import Signed
from meshmax.base.status import PeerStatus, vitals_of, with_vitals
from meshmax.core.clones import AGAIN_S, KEPT_S, Clones

WHO = peer_id_of(bytes(range(32)))
HERE, THERE = "/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.9/tcp/1"


def word(instance: str, sequence: int, changed: int | None = None, address: str = HERE) -> PeerStatus:
    changed = sequence if changed is None else changed
    return PeerStatus(WHO, sequence, 0, "x", "0", instance=instance, changed=changed, addresses=(address,))


def signed(status: PeerStatus) -> Signed:
    return Signed(WHO, f"{status.instance} {status.sequence}".encode(), bytes(64))


def hear(clones: Clones, before: PeerStatus | None, status: PeerStatus, now: float) -> PeerStatus:
    clones.on_status(before, signed(before) if before else None, status, signed(status), now)
    return status


def test_a_peer_that_was_started_again_is_no_copy() -> None:
    clones = Clones("own")
    latest = hear(clones, None, word("a", 1), 0.0)
    latest = hear(clones, latest, word("b", 5), 10.0)
    latest = hear(clones, latest, word("b", 6), 11.0)
    hear(clones, latest, word("c", 9), 20.0)
    assert not clones.is_copied(WHO, 20.0)
    assert clones.twins(WHO, 20.0) == ()


def test_two_instances_that_speak_by_turns_are_copies_until_one_is_silent() -> None:
    clones = Clones("own")
    first = hear(clones, None, word("a", 1), 0.0)
    second = hear(clones, first, word("b", 5), 10.0)
    clones.on_vitals(second, vitals_of(with_vitals(word("a", 9), vitals_of(word("a", 9)))), 15.0)
    assert clones.is_copied(WHO, 15.0)
    assert {each.payload for each in clones.twins(WHO, 15.0)} == {b"a 1", b"b 5"}
    assert clones.copied(15.0) == (WHO,)
    assert not clones.is_copied(WHO, 11.0 + KEPT_S + 5.0)


def test_our_own_copy_is_known_by_a_later_word_and_our_former_self_is_not_taken_for_one() -> None:
    clones = Clones("now")
    clones.on_issued(word("now", 100))
    assert not clones.on_own(word("former", 90), 1.0)
    assert not clones.on_own(word("now", 101), 1.0)
    assert clones.problem(1.0) == ""
    assert clones.on_own(word("other", 120, address=THERE), 2.0)
    assert THERE in clones.problem(2.0)
    assert clones.problem(2.1 + KEPT_S) == ""


def test_only_notices_of_words_that_we_never_said_are_foreign() -> None:
    clones = Clones("now")
    assert not clones.is_foreign(5)
    clones.on_issued(word("now", 100))
    clones.on_issued(word("now", 110))
    assert [clones.is_foreign(changed) for changed in (90, 100, 105, 110, 111)] == [False, False, True, False, True]


def test_our_identity_announced_twice_at_addresses_that_were_never_ours_is_a_problem() -> None:
    clones = Clones("now")
    clones.on_issued(word("now", 100, address=HERE))
    clones.on_own_sighting([HERE, THERE], 0.0)
    assert clones.problem(0.0) == ""
    clones.on_own_sighting([HERE, THERE], AGAIN_S)
    assert THERE in clones.problem(AGAIN_S)
    clones.on_issued(word("now", 101, address=THERE))  # it was ours after all: the cable was just plugged in
    assert clones.problem(AGAIN_S) == ""
