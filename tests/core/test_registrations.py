"""What a rendezvous node remembers: pages, cookies, expiry, and who gives way to whom."""

import random

from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.ids import PeerId
from meshmax.core.registrations import MAX_PER_PEER, Registrations
from meshmax.wire import rendezvous
from meshmax.wire.rendezvous import Discover, DiscoverResponse, Register, RegisterResponse

SECRET = bytes(32)
HERE = ("/ip4/10.0.0.1/tcp/1",)


def peer(number: int) -> PeerId:
    return PeerId(f"peer{number}")


def register(
    table: Registrations,
    number: int,
    namespace: str = "ns",
    *,
    group: str = "",
    sequence: int = 1,
    addresses: tuple[str, ...] = HERE,
    ttl_s: int | None = None,
    now: float = 0.0,
    record: bytes = b"",
) -> RegisterResponse:
    request = Register(namespace, record or b"record %d %d" % (number, sequence), ttl_s)
    return table.register(request, peer(number), sequence, addresses, group or f"net{number}", now)


def status(response: RegisterResponse | DiscoverResponse) -> int:
    return response.status


def records(table: Registrations, namespace: str = "ns", now: float = 0.0) -> list[bytes]:
    found: list[bytes] = []
    cookie = b""
    while True:
        page = table.discover(Discover(namespace, None, cookie), now)
        assert page.status == rendezvous.OK
        if not page.registrations:
            return found
        found += [registration.record for registration in page.registrations]
        cookie = page.cookie


def holders(table: Registrations, namespace: str = "ns", now: float = 0.0) -> set[int]:
    return {int(record.split()[1]) for record in records(table, namespace, now)}


# --- requests --------------------------------------------------------------------------------------------------------


def test_who_registered_is_told_to_who_asks_with_the_time_that_is_left() -> None:
    table = Registrations(SECRET)
    assert register(table, 1, ttl_s=7200) == RegisterResponse(rendezvous.OK, "", 7200)
    page = table.discover(Discover("ns"), 200.0)
    assert page.registrations == (Register("ns", b"record 1 1", 7000),)


def test_without_a_ttl_the_default_is_granted() -> None:
    assert register(Registrations(SECRET), 1).ttl_s == rendezvous.DEFAULT_TTL_S


def test_a_namespace_or_a_ttl_outside_of_the_bounds_is_refused() -> None:
    table = Registrations(SECRET)
    assert status(register(table, 1, "")) == rendezvous.E_INVALID_NAMESPACE
    assert status(register(table, 1, "n" * 256)) == rendezvous.E_INVALID_NAMESPACE
    assert status(register(table, 1, "é" * 128)) == rendezvous.E_INVALID_NAMESPACE
    assert status(register(table, 1, ttl_s=7199)) == rendezvous.E_INVALID_TTL
    assert status(register(table, 1, ttl_s=72 * 3600 + 1)) == rendezvous.E_INVALID_TTL
    assert status(register(table, 1, ttl_s=0)) == rendezvous.E_INVALID_TTL
    assert len(table) == 0


def test_nobody_is_told_who_is_in_all_namespaces() -> None:
    table = Registrations(SECRET)
    register(table, 1)
    assert table.discover(Discover(""), 0.0) == DiscoverResponse(
        status=rendezvous.E_INVALID_NAMESPACE, text="name one, of at most 255 bytes"
    )


def test_a_registration_ends_with_its_ttl_told_or_not() -> None:
    table = Registrations(SECRET)
    register(table, 1, ttl_s=7200)
    assert holders(table, now=7199.0) == {1}
    assert holders(table, now=7200.0) == set()
    table.expire(7200.0)
    assert (len(table), table.namespaces()) == (0, 0)


def test_registering_again_renews_and_the_newest_record_wins() -> None:
    table = Registrations(SECRET)
    register(table, 1, sequence=1, now=0.0)
    register(table, 1, sequence=3, now=3600.0)
    assert status(register(table, 1, sequence=2)) == rendezvous.E_INVALID_SIGNED_PEER_RECORD
    assert records(table, now=9000.0) == [b"record 1 3"]
    assert len(table) == 1
    assert status(register(table, 1, sequence=2, now=3600.0 + 7200.0)) == rendezvous.OK  # the other one has expired


def test_who_unregisters_is_gone_from_that_namespace_alone() -> None:
    table = Registrations(SECRET)
    register(table, 1)
    register(table, 1, "other")
    table.unregister("ns", peer(1))
    table.unregister("ns", peer(1))
    table.unregister("nowhere", peer(1))
    assert (holders(table), holders(table, "other")) == (set(), {1})


# --- pages and cookies -----------------------------------------------------------------------------------------------


def test_answers_come_in_pages_that_together_tell_all_once() -> None:
    table = Registrations(SECRET)
    for number in range(250):
        register(table, number)
    sizes, cookie = [], b""
    for _ in range(4):
        page = table.discover(Discover("ns", None, cookie), 0.0)
        sizes.append(len(page.registrations))
        cookie = page.cookie
    assert sizes == [100, 100, 50, 0]
    assert records(table) == [b"record %d 1" % number for number in range(250)]


def test_a_page_is_bounded_by_what_is_asked_by_count_and_by_bytes() -> None:
    table = Registrations(SECRET)
    for number in range(150):
        register(table, number, record=bytes(2048 - 8) + b"%8d" % number)
    assert len(table.discover(Discover("ns", 7), 0.0).registrations) == 7
    assert len(table.discover(Discover("ns", 10**18), 0.0).registrations) == rendezvous.MAX_PAGE_BYTES // 2048


def test_a_cookie_asks_for_news_and_a_renewal_without_new_addresses_is_none() -> None:
    table = Registrations(SECRET)
    for number in range(3):
        register(table, number)
    cookie = table.discover(Discover("ns"), 0.0).cookie
    register(table, 0, sequence=2)
    assert table.discover(Discover("ns", None, cookie), 0.0).registrations == ()
    register(table, 1, sequence=2, addresses=("/ip4/10.0.0.9/tcp/1",))
    register(table, 5)
    news = table.discover(Discover("ns", None, cookie), 0.0)
    assert [registration.record for registration in news.registrations] == [b"record 1 2", b"record 5 1"]
    assert table.discover(Discover("ns", None, news.cookie), 0.0) == DiscoverResponse((), news.cookie)


def test_a_cookie_that_is_forged_or_of_another_namespace_or_time_is_refused() -> None:
    table = Registrations(SECRET)
    register(table, 1)
    cookie = table.discover(Discover("ns"), 0.0).cookie
    flipped = bytes([cookie[0] ^ 1]) + cookie[1:]
    for namespace, wrong in (("ns", flipped), ("ns", cookie[:-1]), ("ns", bytes(256)), ("other", cookie)):
        assert status(table.discover(Discover(namespace, None, wrong), 0.0)) == rendezvous.E_INVALID_COOKIE
    later = Registrations(bytes([1]) * 32)
    assert status(later.discover(Discover("ns", None, cookie), 0.0)) == rendezvous.E_INVALID_COOKIE


# --- bounds and fairness ---------------------------------------------------------------------------------------------


def test_a_peer_is_in_a_bounded_number_of_namespaces() -> None:
    table = Registrations(SECRET)
    for number in range(MAX_PER_PEER):
        assert status(register(table, 1, f"ns{number}")) == rendezvous.OK
    assert status(register(table, 1, "more")) == rendezvous.E_UNAVAILABLE
    assert status(register(table, 1, "ns0", sequence=2)) == rendezvous.OK
    table.unregister("ns0", peer(1))
    assert status(register(table, 1, "more")) == rendezvous.OK


def test_a_flood_from_one_subnet_in_a_namespace_keeps_nobody_else_out() -> None:
    table = Registrations(SECRET, space_limit=50)
    for number in range(10):
        assert status(register(table, number)) == rendezvous.OK
    answers = [status(register(table, 1000 + number, group="flood")) for number in range(100)]
    assert answers.count(rendezvous.OK) == 40
    for number in range(10, 30):
        assert status(register(table, number)) == rendezvous.OK
    assert set(range(30)) <= holders(table)
    assert len(table) == 50


def test_a_flood_of_namespaces_from_one_subnet_keeps_nobody_else_out() -> None:
    table = Registrations(SECRET, limit=100)
    for number in range(10):
        register(table, number)
    for number in range(200):
        register(table, 1000 + number, f"flood{number}", group="flood")
    assert len(table) == 100
    for number in range(10, 40):
        assert status(register(table, number)) == rendezvous.OK
    assert holders(table) == set(range(40))
    assert len(table) == 100


def test_a_flood_under_one_namespace_from_many_subnets_keeps_no_other_namespace_out() -> None:
    table = Registrations(SECRET, limit=100)
    for number in range(10):
        register(table, number, "home")
    for number in range(200):
        register(table, 1000 + number, "flood")
    for number in range(10, 30):
        assert status(register(table, number, "home")) == rendezvous.OK
    assert holders(table, "home") == set(range(30))
    assert len(table) == 100


def test_where_all_crowds_are_alike_newcomers_are_refused_and_nobody_is_pushed_out() -> None:
    table = Registrations(SECRET, space_limit=20)
    for number in range(20):
        register(table, number)
    assert status(register(table, 20)) == rendezvous.E_UNAVAILABLE
    assert holders(table) == set(range(20))
    assert status(register(table, 3, sequence=2, addresses=("/ip4/10.0.0.9/tcp/1",))) == rendezvous.OK


def test_what_has_expired_makes_room_first() -> None:
    table = Registrations(SECRET, space_limit=20)
    for number in range(20):
        register(table, number)
    assert status(register(table, 20, now=8000.0)) == rendezvous.OK
    assert holders(table, now=8000.0) == {20}


def test_more_than_half_full_only_the_shortest_ttl_is_granted() -> None:
    table = Registrations(SECRET, limit=10)
    granted = [register(table, number, f"ns{number}", ttl_s=72 * 3600).ttl_s for number in range(8)]
    assert granted == [72 * 3600] * 5 + [rendezvous.MIN_TTL_S] * 3


@given(st.integers(0, 2**32), st.integers(1, 400))
def test_whatever_comes_the_bounds_hold_and_the_counts_are_right(seed: int, steps: int) -> None:
    chance = random.Random(seed)
    table = Registrations(SECRET, limit=30, space_limit=12)
    now = 0.0
    for _ in range(steps):
        now += chance.choice((0.0, 1.0, 1000.0))
        number, namespace = chance.randrange(60), f"ns{chance.randrange(4)}"
        match chance.randrange(8):
            case 0:
                table.unregister(namespace, peer(number))
            case 1:
                table.expire(now)
            case _:
                register(
                    table,
                    number,
                    namespace,
                    group=f"net{chance.randrange(5)}",
                    sequence=chance.randrange(4),
                    addresses=(f"/ip4/10.0.0.{chance.randrange(3)}/tcp/1",),
                    now=now,
                )
    table.expire(now)
    told = [records(table, f"ns{number}", now) for number in range(4)]
    assert sum(map(len, told)) == len(table) <= 30
    assert all(len(each) <= 12 and len(each) == len(set(each)) for each in told)
    table.expire(now + rendezvous.MAX_TTL_S)
    assert (len(table), table.namespaces()) == (0, 0)
    assert not table._groups and not table._pairs and not table._peers
