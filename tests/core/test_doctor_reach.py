"""What follows for a person from how a machine stands to its NAT; the whole table of findings is test_doctor's."""

from __future__ import annotations

import msgspec
import pytest

from meshmax.base.doctor import BootstrapSeen, LookedBack, MachineFacts, PeerFacts
from meshmax.base.ids import PeerId
from meshmax.base.reachability import Behaviour, NatBehaviour, Reachability, ReachState
from meshmax.core.doctor_reach import SETTLE_S, is_translated, reach_findings

MACHINE = MachineFacts("/home/me/.meshmax", ("192.168.1.5",), disk_free_bytes=100 << 30)
RELAY = PeerId("12D3KooWRelay")
OTHER = LookedBack(
    PeerId("12D3KooWB"),
    "berlin",
    "in",
    ours=(),
    theirs=(),
    their_rungs=(),
    at="/ip4/11.22.33.20/tcp/40000",
    address="/ip4/11.22.33.10/tcp/35975",
)


def findings(peer: PeerFacts) -> dict[str, str]:
    return {each.code: each.severity for each in reach_findings(peer, MACHINE)}


def standing(state: ReachState, **more: object) -> PeerFacts:
    where = msgspec.structs.replace(Reachability(state, "x", external_ips=("11.22.33.10",)), **more)
    return PeerFacts((), online=1, mesh="home", reachability=where, bootstrap=(BootstrapSeen("/ip4/11.22.33.1/tcp/1"),))


@pytest.mark.parametrize("state", ["public", "mapped"])
def test_who_is_reached_is_well(state: ReachState) -> None:
    assert findings(standing(state)) == {"reachable": "ok"}


def test_behind_a_nat_a_relay_makes_up_for_what_is_not_reached() -> None:
    assert findings(standing("private", relays=(RELAY,))) == {"relayed_only": "ok"}
    assert findings(standing("private")) == {"unreachable": "warning"}


def test_it_is_an_error_only_where_nobody_at_all_can_be_met() -> None:
    alone = msgspec.structs.replace(standing("private"), online=0)
    assert findings(alone) == {"unreachable": "warning"}
    silent = msgspec.structs.replace(alone, bootstrap=(BootstrapSeen("/ip4/11.22.33.1/tcp/1", "it does not answer"),))
    assert findings(silent) == {"unreachable": "error"}


def test_a_direct_path_is_missed_only_after_there_was_time_for_one() -> None:
    dependent: Behaviour = "address-and-port-dependent"
    nat = NatBehaviour("open", dependent, dependent, dependent)
    for relayed_s, expected in ((SETTLE_S - 1, False), (SETTLE_S, True)):
        met = msgspec.structs.replace(OTHER, relayed_s=relayed_s, nat=nat)
        peer = msgspec.structs.replace(standing("private", relays=(RELAY,)), looked_back=(met,))
        told = [each for each in reach_findings(peer, MACHINE) if each.code == "no_direct_path"]
        assert bool(told) is expected
        assert all("berlin" in each.sentence and "another port for every destination" in each.sentence for each in told)


def test_a_nat_stands_between_where_we_are_seen_at_an_address_that_is_not_ours() -> None:
    peer = standing("private")
    assert is_translated(OTHER, peer, MACHINE)
    for address in ("/ip4/192.168.1.5/tcp/11435", "/ip4/127.0.0.1/tcp/1", ""):
        assert not is_translated(msgspec.structs.replace(OTHER, address=address), peer, MACHINE)
