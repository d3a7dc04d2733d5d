"""Who may use a relay, and how much."""

from meshmax.base.ids import PeerId
from meshmax.core import relay as module
from meshmax.core.relay import Circuit, Relay, RelayLimits, Reservation

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
NET = "192.0.2.0/24"
SMALL = RelayLimits(
    reservations=4, reservations_per_subnet=2, circuits=3, circuits_per_peer=2, circuits_per_subnet=2,
    duration_s=100, data_bytes=1000, rate_bytes_per_s=100, idle_s=30,
)  # fmt: skip


def relay(limits: RelayLimits = SMALL, *reserved: PeerId) -> Relay:
    made = Relay(limits)
    for number, peer in enumerate(reserved):
        assert isinstance(made.reserve(peer, f"net{number}", 0.0), Reservation)
    return made


def circuit(of: Relay, source: PeerId, target: PeerId, subnet: str = NET, now: float = 0.0) -> Circuit:
    made = of.connect(source, subnet, target, now)
    assert isinstance(made, Circuit)
    return made


def test_a_reservation_lasts_its_time_and_asking_again_renews_it() -> None:
    ours = relay()
    first = ours.reserve(A, NET, 0.0)
    assert isinstance(first, Reservation)
    assert first.expires_s == module.TTL_S
    renewed = ours.reserve(A, NET, 1000.0)
    assert isinstance(renewed, Reservation)
    assert renewed.expires_s == 1000.0 + module.TTL_S
    ours.expire(module.TTL_S + 1)
    assert ours.reserved() == (A,)
    ours.expire(1000.0 + module.TTL_S)
    assert ours.reserved() == ()


def test_reservations_are_bounded_in_all_and_by_subnet_but_never_for_who_has_one() -> None:
    ours = relay()
    taken = [ours.reserve(PeerId(f"p{n}"), f"net{n // 2}", 0.0) for n in range(4)]
    assert all(isinstance(place, Reservation) for place in taken)
    assert ours.reserve(PeerId("p9"), "net9", 0.0) == "reservations"
    ours.forget(PeerId("p0"))
    assert ours.reserve(PeerId("p9"), "net1", 0.0) == "reservations"
    assert isinstance(ours.reserve(PeerId("p2"), "net1", 0.0), Reservation)
    assert isinstance(ours.reserve(PeerId("p9"), "net0", 0.0), Reservation)


def test_a_circuit_needs_a_reservation_of_its_target_alone() -> None:
    ours = relay(SMALL, B)
    assert ours.connect(B, NET, A, 0.0) == "no reservation"
    assert ours.connect(B, NET, B, 0.0) == "itself"
    circuit(ours, A, B)
    assert ours.connect(A, NET, B, module.TTL_S) == "no reservation"


def test_circuits_are_bounded_by_peer_at_either_end() -> None:
    ours = relay(SMALL, A, B, C)
    first = circuit(ours, A, B, "x")
    circuit(ours, C, A, "y")
    assert ours.connect(PeerId("d"), "z", A, 0.0) == "circuits"
    assert ours.connect(A, "z", C, 0.0) == "circuits"
    ours.close(first)
    circuit(ours, PeerId("d"), A, "z")


def test_circuits_are_bounded_by_the_subnet_that_asks_and_in_all() -> None:
    ours = relay(SMALL, A, B, C)
    circuit(ours, PeerId("1"), A)
    circuit(ours, PeerId("2"), B)
    assert ours.connect(PeerId("3"), NET, C, 0.0) == "circuits"
    circuit(ours, PeerId("3"), C, "elsewhere")
    assert ours.circuits == 3
    assert ours.connect(PeerId("4"), "nowhere", C, 0.0) == "circuits"


def test_ending_one_circuit_leaves_another_of_the_same_peers_alone() -> None:
    ours = relay(SMALL, B)
    one, two = circuit(ours, A, B), circuit(ours, A, B)
    ours.close(one)
    ours.close(one)
    assert ours.circuits == 1
    assert two.carry("there", 10, 1.0) == 0.0
    ours.close(two)
    assert ours.circuits == 0
    circuit(ours, A, B)


def test_a_peer_that_is_forgotten_keeps_its_circuits() -> None:
    ours = relay(SMALL, B)
    one = circuit(ours, A, B)
    ours.forget(B)
    assert ours.circuits == 1
    assert one.carry("back", 10, 1.0) == 0.0
    assert ours.connect(A, NET, B, 1.0) == "no reservation"


def test_requests_are_paced_by_peer_and_by_subnet() -> None:
    ours = relay(SMALL, B)
    refused = [ours.connect(A, NET, PeerId("?"), 0.0) for _ in range(20)]
    assert refused.count("rate") == 20 - module.REQUESTS_BURST
    assert ours.connect(A, NET, PeerId("?"), 2.0) == "no reservation"
    assert [ours.reserve(PeerId(str(n)), NET, 2.0) for n in range(200)].count("rate") > 90
    assert ours.connect(C, "elsewhere", PeerId("?"), 3.0) == "no reservation"


def test_a_circuit_carries_so_much_each_way_and_no_more() -> None:
    one = circuit(relay(SMALL, B), A, B)
    assert one.carry("there", 600, 0.0) is not None
    assert one.carry("back", 1000, 0.0) is not None
    assert one.carry("there", 400, 0.0) is not None
    assert one.carry("there", 1, 0.0) is None
    assert one.carry("back", 1, 0.0) is None


def test_a_circuit_has_a_rate_each_way() -> None:
    one = circuit(relay(SMALL, B), A, B)
    waits = [one.carry("there", 50, 0.0) for _ in range(4)]
    assert waits[0] == 0.0
    assert waits[-1] is not None
    assert 1.0 < waits[-1] < 1.6
    assert one.carry("back", 50, 0.0) == 0.0


def test_a_circuit_ends_with_its_time_and_earlier_when_nothing_moves() -> None:
    one = circuit(relay(SMALL, B), A, B)
    assert one.deadline() == 30
    one.carry("there", 1, 20.0)
    assert one.deadline() == 50
    one.carry("there", 1, 90.0)
    assert one.deadline() == 100
    assert one.carry("there", 1, 100.0) is None


def test_one_subnet_does_not_take_all_circuits_to_a_peer() -> None:
    ours = relay(RelayLimits(circuits_per_peer=3, circuits_per_pair=2), B)
    first = circuit(ours, A, B)
    circuit(ours, C, B)
    assert ours.connect(PeerId("d"), NET, B, 0.0) == "circuits"
    circuit(ours, PeerId("e"), B, "198.51.100.0/24")
    ours.close(first)
    circuit(ours, PeerId("d"), B)
