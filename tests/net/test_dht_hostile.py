"""What hostile nodes try against the DHT, and that it goes on working: in memory, in virtual time."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import trio

from meshmax.base.errors import ManifestInvalid
from meshmax.base.model import Signed
from meshmax.base.providers import MAX_PROVIDERS, MAX_RECORD_BYTES, ProviderRecord
from meshmax.core.arrivals import BURST
from meshmax.net.dht import make_node_id
from meshmax.net.dht_endpoint import CLOCK_TOLERANCE_S, MAX_SEEN
from meshmax.net.dht_protocol import CONFIRM_AFTER_S, MAX_CANDIDATES, MAX_UNPROVEN, Membership
from meshmax.testing.memory_datagrams import Address
from meshmax.wire.dht import (
    Body,
    Contact,
    Envelope,
    Find,
    Found,
    Introduce,
    Ping,
    Pong,
    Store,
    Stored,
    pack_contact,
    padded,
)
from meshmax.wire.provider_records import DOMAIN, encode_record, sign_record
from meshmax.wire.signed import canonical
from tests.net.dht_site import Crowd, Stranger, key_of, open_crowd, unix_now

KEY = key_of("llama")


def record_of(signer: Any, *, key: bytes = KEY, sequence: int = 1, issued_s: float = 0, ttl_s: int = 3600) -> Signed:
    issued = int(unix_now() + issued_s)
    word = ProviderRecord(key, signer.peer_id, sequence, issued, issued + ttl_s, ("/ip4/11.9.9.9/tcp/1",))
    return sign_record(word, signer.sign)


def answering(found: Found) -> Callable[[Envelope, Body, Address], Body | None]:
    """Always the same answer to who looks something up."""
    return lambda _envelope, body, _sender: Pong() if isinstance(body, Ping) else found


async def cookie_of(stranger: Stranger, crowd: Crowd, index: int = 0) -> bytes:
    (pong,) = await stranger.say(padded(Ping()), crowd.nodes[index], crowd.ports[index].address)
    assert isinstance(pong, Pong)
    return pong.cookie


async def store(stranger: Stranger, crowd: Crowd, encoded: bytes) -> list[Body]:
    cookie = await cookie_of(stranger, crowd)
    return await stranger.say(Store(encoded, cookie), crowd.nodes[0], crowd.ports[0].address)


# --- records ---------------------------------------------------------------------------------------------------------


async def test_a_good_record_of_a_stranger_is_kept(autojump_clock: Any) -> None:
    async with open_crowd(1) as crowd:
        stranger = Stranger(crowd.net, crowd.signer(900))
        assert await store(stranger, crowd, encode_record(record_of(stranger.signer))) == [Stored(True)]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("forged", {}),
        ("expired", {"issued_s": -7200, "ttl_s": 3600}),
        ("future", {"issued_s": 3600}),
        ("living too long", {"ttl_s": 30 * 86400}),
    ],
)
async def test_a_record_that_is_not_valid_is_not_kept(autojump_clock: Any, name: str, fault: dict[str, Any]) -> None:
    async with open_crowd(1) as crowd:
        await trio.sleep(7200)
        stranger = Stranger(crowd.net, crowd.signer(900))
        encoded = encode_record(record_of(stranger.signer, **fault))
        if name == "forged":
            encoded = encoded[:-1] + bytes([encoded[-1] ^ 1])
        assert await store(stranger, crowd, encoded) == [Stored(False)]
        assert len(crowd.nodes[0].protocol.storage.records) == 0


async def test_an_oversized_record_is_not_kept(autojump_clock: Any) -> None:
    async with open_crowd(1) as crowd:
        stranger = Stranger(crowd.net, crowd.signer(900))
        now_s = int(unix_now())
        payload = canonical([KEY, 1, now_s, now_s + 60, ["/ip4/1.2.3.4/" + "x" * 180] * 4])
        encoded = stranger.public_key + stranger.signer.sign(DOMAIN + payload) + payload
        assert len(encoded) > MAX_RECORD_BYTES
        assert await store(stranger, crowd, encoded) == [Stored(False)]


async def test_nobody_can_store_a_record_in_anothers_name(autojump_clock: Any) -> None:
    async with open_crowd(1) as crowd:
        stranger, victim = Stranger(crowd.net, crowd.signer(900)), crowd.signer(901)
        signed = record_of(stranger.signer)
        stolen = encode_record(Signed(victim.peer_id, signed.payload, signed.signature))
        assert await store(stranger, crowd, stolen) == [Stored(False)]


async def test_a_replayed_older_record_replaces_nothing(autojump_clock: Any) -> None:
    async with open_crowd(1) as crowd:
        stranger, provider = Stranger(crowd.net, crowd.signer(900)), crowd.signer(901)
        old, new = (encode_record(record_of(provider, sequence=n)) for n in (1, 2))
        assert await store(stranger, crowd, new) == [Stored(True)]
        assert await store(stranger, crowd, old) == [Stored(False)]
        (kept,) = crowd.nodes[0].protocol.storage.records.records(KEY, unix_now())
        assert kept.sequence == 2


async def test_a_record_without_a_cookie_is_not_even_looked_at(autojump_clock: Any) -> None:
    async with open_crowd(1) as crowd:
        stranger = Stranger(crowd.net, crowd.signer(900))
        encoded = encode_record(record_of(stranger.signer))
        answers = await stranger.say(Store(encoded), crowd.nodes[0], crowd.ports[0].address)
        assert [type(answer) for answer in answers] == [Introduce]
        assert len(crowd.nodes[0].protocol.storage.records) == 0


async def test_who_answers_with_records_of_another_key_or_forged_ones_is_not_believed(autojump_clock: Any) -> None:
    async with open_crowd(6) as crowd:
        liar = Stranger(crowd.net, crowd.signer(900))
        other = encode_record(record_of(liar.signer, key=key_of("another")))
        forged = encode_record(record_of(liar.signer))[:-1] + b"x"
        for lie in (other, forged):
            liar.answer = answering(Found((), (lie,)))
            await crowd.nodes[0].protocol.call_hello(liar.port.address)
            assert crowd.nodes[0].protocol.router.get(liar.node_id)
            assert await crowd.nodes[0].find(KEY) == ()
            assert crowd.nodes[0].protocol.router.get(liar.node_id) is None


async def test_announcing_what_is_not_valid_is_refused_here(autojump_clock: Any) -> None:
    async with open_crowd(2) as crowd:
        for fault in ({"issued_s": 3600}, {"issued_s": -7200.0}, {"ttl_s": 30 * 86400}):
            with pytest.raises(ManifestInvalid):
                await crowd.nodes[0].announce(record_of(crowd.signers[0], **fault))


# --- datagrams -------------------------------------------------------------------------------------------------------


async def test_a_datagram_whose_signature_is_wrong_is_not_answered(autojump_clock: Any) -> None:
    async with open_crowd(1) as crowd:
        stranger, dht = Stranger(crowd.net, crowd.signer(900)), crowd.nodes[0]
        data = bytearray(stranger.datagram(padded(Ping()), dht.endpoint.node_id))
        for place in (20, 50, 70, 78, 90, len(data) - 1):  # key, receiver, time, request, body, signature
            broken = bytearray(data)
            broken[place] ^= 1
            stranger.port.send(bytes(broken), crowd.ports[0].address)
        await trio.sleep(1)
        assert stranger.heard == []


async def test_a_datagram_for_another_receiver_is_not_answered(autojump_clock: Any) -> None:
    async with open_crowd(2) as crowd:
        stranger = Stranger(crowd.net, crowd.signer(900))
        captured = stranger.datagram(padded(Find(KEY)), crowd.nodes[0].endpoint.node_id)
        stranger.port.send(captured, crowd.ports[1].address)
        await trio.sleep(1)
        assert stranger.heard == []
        assert crowd.nodes[1].endpoint.counts["misdirected"] == 1


@pytest.mark.parametrize("skew_s", [-CLOCK_TOLERANCE_S - 10, CLOCK_TOLERANCE_S + 10])
async def test_a_datagram_of_another_time_is_not_answered(autojump_clock: Any, skew_s: float) -> None:
    async with open_crowd(1) as crowd:
        stranger = Stranger(crowd.net, crowd.signer(900))
        data = stranger.datagram(padded(Ping()), crowd.nodes[0].endpoint.node_id, time_s=unix_now() + skew_s)
        stranger.port.send(data, crowd.ports[0].address)
        await trio.sleep(1)
        assert stranger.heard == []


async def test_a_captured_datagram_is_answered_once(autojump_clock: Any) -> None:
    async with open_crowd(1) as crowd:
        stranger = Stranger(crowd.net, crowd.signer(900))
        captured = stranger.datagram(padded(Ping()), crowd.nodes[0].endpoint.node_id)
        for _ in range(3):
            stranger.port.send(captured, crowd.ports[0].address)
        await trio.sleep(1)
        assert len(stranger.heard) == 1
        assert crowd.nodes[0].endpoint.counts["replayed"] == 2


async def test_a_captured_datagram_sent_from_elsewhere_moves_nobody_in_the_table(autojump_clock: Any) -> None:
    async with open_crowd(3) as crowd:
        captured: list[bytes] = []
        crowd.net.taps.append(
            lambda data, sender, to: captured.append(data) if (sender, to) == (ports[1], ports[0]) else None
        )
        ports = [port.address for port in crowd.ports]
        await crowd.nodes[1].find(key_of("x"))
        crowd.nodes[0].endpoint._seen.clear()  # even if it were forgotten that they were seen
        thief = crowd.net.open()
        for data in captured:
            crowd.net.spoof(data, thief.address, ports[0])
        await trio.sleep(900)
        node = crowd.nodes[0].protocol.router.get(crowd.nodes[1].endpoint.node_id)
        assert node is not None
        assert node.contact.address == ports[1]


async def test_an_answer_that_was_not_asked_for_changes_nothing(autojump_clock: Any) -> None:
    async with open_crowd(2) as crowd:
        stranger = Stranger(crowd.net, crowd.signer(900))
        before = crowd.nodes[0].contacts
        fake = Found((pack_contact(stranger.contact),), (encode_record(record_of(stranger.signer)),))
        await stranger.say(fake, crowd.nodes[0], crowd.ports[0].address)
        assert crowd.nodes[0].contacts == before
        assert crowd.nodes[0].endpoint.counts["unasked"] == 1


async def test_noise_at_the_port_hurts_nobody(autojump_clock: Any) -> None:
    chance = random.Random(3)
    async with open_crowd(3) as crowd:
        for size in (1, 2, 79, 143, 144, 500, 1200, 1201, 9000):
            crowd.net.spoof(b"\xd8" + chance.randbytes(size), ("11.99.0.1", 1), crowd.ports[0].address)
        await trio.sleep(1)
        await crowd.nodes[1].announce(crowd.encoded(1, KEY))
        assert len(await crowd.nodes[0].find(KEY)) == 1


# --- amplification and floods ----------------------------------------------------------------------------------------


async def test_an_answer_to_an_unproven_address_is_never_longer_than_the_question(autojump_clock: Any) -> None:
    async with open_crowd(25) as crowd:
        for index in range(20):
            await crowd.nodes[0].announce(crowd.encoded(index, KEY))
        to, dht = crowd.ports[0].address, crowd.nodes[0]
        record = encode_record(record_of(crowd.signer(900)))
        questions: list[Any] = [Ping(), Ping(pad=bytes(8)), Find(KEY), Find(KEY[:20]), Store(record), Store(b"")]
        questions += [Find(KEY, pad=bytes(n)) for n in range(0, 1000, 50)] + [Find(KEY, cookie=b"guessed!")]
        for index, question in enumerate(questions):
            victim = Stranger(crowd.net, crowd.signer(2000 + index))
            data = victim.datagram(question, dht.endpoint.node_id)
            crowd.net.spoof(data, victim.port.address, to)
            await trio.sleep(0.2)
            assert sum(size for _, _, size in victim.heard) <= len(data)


async def test_who_has_proven_his_address_gets_a_full_answer(autojump_clock: Any) -> None:
    async with open_crowd(25) as crowd:
        stranger = Stranger(crowd.net, crowd.signer(900))
        cookie = await cookie_of(stranger, crowd)
        (found,) = await stranger.say(Find(KEY, cookie=cookie), crowd.nodes[0], crowd.ports[0].address)
        assert isinstance(found, Found)
        assert len(found.contacts) >= 15
        elsewhere = Stranger(crowd.net, crowd.signer(900), said=100)  # the cookie is worth nothing at another address
        (short,) = await elsewhere.say(Find(KEY, cookie=cookie), crowd.nodes[0], crowd.ports[0].address)
        assert isinstance(short, Found)
        assert len(short.contacts) <= 1


async def test_a_flood_of_one_address_is_cut_off_before_signatures_are_checked(autojump_clock: Any) -> None:
    async with open_crowd(3) as crowd:
        stranger = Stranger(crowd.net, crowd.signer(900))
        for number in range(1000):
            data = stranger.datagram(Ping(), crowd.nodes[0].endpoint.node_id, number.to_bytes(8, "big"))
            stranger.port.send(data, crowd.ports[0].address)
        await trio.sleep(0.5)
        assert BURST <= len(stranger.heard) <= BURST + 30
        assert crowd.nodes[0].endpoint.counts["throttled"] >= 800
        await crowd.nodes[1].announce(crowd.encoded(1, KEY))
        assert len(await crowd.nodes[2].find(KEY)) == 1


async def test_a_flood_of_spoofed_senders_costs_bounded_memory_and_no_tasks(autojump_clock: Any) -> None:
    async with open_crowd(2) as crowd:
        dht, tasks = crowd.nodes[0], trio.lowlevel.current_statistics().tasks_living
        for number in range(6000):
            signer = crowd.signer(5000 + number % 50)
            data = Stranger.datagram(
                Stranger(crowd.net, signer, port=crowd.ports[1]),
                Ping(),
                dht.endpoint.node_id,
                number.to_bytes(8, "big"),
            )
            crowd.net.spoof(data, (f"12.{number >> 8}.{number & 255}.1", 7), crowd.ports[0].address)
        await trio.sleep(0.06)
        assert trio.lowlevel.current_statistics().tasks_living <= tasks + 2
        assert len(dht.protocol.candidates) <= MAX_CANDIDATES
        assert len(dht.endpoint._seen) <= MAX_SEEN
        assert dht.endpoint.counts["throttled"] > 0
        assert dht.endpoint._pending == {}


def spoof(crowd: Crowd, number: int, dht_index: int = 0, **options: Any) -> None:
    """A signed greeting of a made-up identity from a made-up address."""
    signer, dht = crowd.signer(5000 + number), crowd.nodes[dht_index]
    speaker = Stranger(crowd.net, signer, port=crowd.ports[0])
    data = speaker.datagram(options.get("body", Ping()), dht.endpoint.node_id, number.to_bytes(8, "big"))
    crowd.net.spoof(data, (f"12.{number >> 8}.{number & 255}.1", 7), crowd.ports[dht_index].address)


async def test_spoofed_senders_do_not_keep_those_who_are_there_out_of_the_table(autojump_clock: Any) -> None:
    async with open_crowd(2) as crowd:
        dht = crowd.nodes[0]
        for number in range(2 * MAX_CANDIDATES):
            spoof(crowd, number)
        await trio.sleep(1)
        assert len(dht.protocol.candidates) == MAX_UNPROVEN
        stranger = Stranger(crowd.net, crowd.signer(900))
        stranger.answer = lambda _envelope, body, _sender: Pong() if isinstance(body, Ping) else None
        cookie = await cookie_of(stranger, crowd)
        await stranger.say(Ping(cookie=cookie), dht, crowd.ports[0].address)
        await trio.sleep(CONFIRM_AFTER_S + 30)
        assert dht.protocol.router.get(stranger.node_id) is not None


async def test_a_flood_of_spoofed_senders_does_not_keep_known_nodes_from_being_answered(autojump_clock: Any) -> None:
    async with open_crowd(3) as crowd:
        await crowd.nodes[1].announce(crowd.encoded(1, KEY))
        for number in range(2000):
            spoof(crowd, number)
        await trio.sleep(0.05)
        assert crowd.nodes[0].endpoint.counts["throttled"] > 0
        contact = Contact(crowd.nodes[0].endpoint.public_key, *crowd.ports[0].address)
        assert await crowd.nodes[2].protocol.call_find(contact, KEY) is not None


async def test_strangers_do_not_make_a_node_of_a_private_mesh_forget_its_members(autojump_clock: Any) -> None:
    rules = Membership(lambda _peer, chain: chain == b"member", lambda: b"member")
    async with open_crowd() as crowd:
        one = await crowd.add(1, membership=rules)
        await crowd.add(2, membership=rules, join=[crowd.ports[0].address])
        known = dict(one.protocol._peers)
        for number in range(50):
            spoof(crowd, number, body=Ping(chain=b"forged"))
        await trio.sleep(1)
        assert dict(one.protocol._peers) == known


async def test_nobody_elsewhere_has_us_send_datagrams_into_our_own_network(autojump_clock: Any) -> None:
    async with open_crowd(3) as crowd:
        liar, sent = Stranger(crowd.net, crowd.signer(900)), set()
        inside = [Contact(bytes([n]) * 32, ip, 53) for n, ip in enumerate(("192.168.1.1", "127.0.0.1", "fd00::1"), 1)]
        liar.answer = answering(Found(tuple(pack_contact(contact) for contact in inside)))
        await crowd.nodes[0].protocol.call_hello(liar.port.address)
        crowd.net.taps.append(lambda _data, _sender, to: sent.add(to[0]))
        await crowd.nodes[0].find(KEY)
        assert liar.port.address[0] in sent
        assert not sent & {contact.ip for contact in inside}


# --- nodes that lie --------------------------------------------------------------------------------------------------


def inventions(chance: random.Random, count: int) -> list[Contact]:
    return [
        Contact(
            chance.randbytes(32), f"13.{chance.randrange(256)}.{chance.randrange(256)}.1", 1 + chance.randrange(65535)
        )
        for _ in range(count)
    ]


async def test_a_node_that_answers_with_garbage_is_dropped_and_the_look_up_succeeds(autojump_clock: Any) -> None:
    chance = random.Random(4)
    async with open_crowd(12) as crowd:
        await crowd.nodes[3].announce(crowd.encoded(3, KEY))
        liar = Stranger(crowd.net, crowd.signer(900))
        for garbage in (
            Found((chance.randbytes(38),) * 2),
            Found((chance.randbytes(32) + bytes(6),)),
            Found((chance.randbytes(45),)),
            Found((), (chance.randbytes(300),)),
        ):
            liar.answer = answering(garbage)
            await crowd.nodes[0].protocol.call_hello(liar.port.address)
            assert len(await crowd.nodes[0].find(KEY)) == 1
            assert crowd.nodes[0].protocol.router.get(liar.node_id) is None


async def test_a_node_that_names_contacts_without_end_does_not_hold_a_look_up(autojump_clock: Any) -> None:
    chance = random.Random(5)
    async with open_crowd(12) as crowd:
        await crowd.nodes[3].announce(crowd.encoded(3, KEY))
        liar = Stranger(crowd.net, crowd.signer(900))

        def answer(_envelope: Envelope, body: Body, _sender: Any) -> Body:
            return Pong() if isinstance(body, Ping) else Found(tuple(map(pack_contact, inventions(chance, 20))))

        liar.answer = answer
        await crowd.nodes[0].protocol.call_hello(liar.port.address)
        started_s, sent = trio.current_time(), crowd.net.sent
        assert len(await crowd.nodes[0].find(KEY)) == 1
        assert trio.current_time() - started_s < 5
        assert crowd.net.sent - sent < 200


async def test_a_node_that_names_honest_nodes_at_wrong_addresses_hides_none_of_them(autojump_clock: Any) -> None:
    chance = random.Random(6)
    async with open_crowd(30) as crowd:
        await crowd.nodes[3].announce(crowd.encoded(3, KEY))
        honest = [node.endpoint.public_key for node in crowd.nodes]

        def answer(_envelope: Envelope, body: Body, _sender: Any) -> Body:
            wrong = [Contact(key, f"13.1.{chance.randrange(256)}.1", 9) for key in chance.sample(honest, 20)]
            return Pong() if isinstance(body, Ping) else Found(tuple(map(pack_contact, wrong)))

        for seed in (900, 901, 902):
            liar = Stranger(crowd.net, crowd.signer(seed))
            liar.answer = answer
            await crowd.nodes[0].protocol.call_hello(liar.port.address)
        assert len(await crowd.nodes[0].find(KEY)) == 1


async def test_who_only_asked_is_in_no_table_until_he_answered_later(autojump_clock: Any) -> None:
    async with open_crowd(3) as crowd:
        stranger = Stranger(crowd.net, crowd.signer(900))
        await stranger.say(padded(Find(KEY)), crowd.nodes[0], crowd.ports[0].address)
        await trio.sleep(60)
        assert crowd.nodes[0].protocol.router.get(stranger.node_id) is None
        stranger.answer = lambda _e, body, _a: Pong() if isinstance(body, Ping) else None
        await trio.sleep(200)
        assert crowd.nodes[0].protocol.router.get(stranger.node_id) is not None


async def test_a_client_asks_and_announces_and_is_in_no_table(autojump_clock: Any) -> None:
    async with open_crowd(8) as crowd:
        client = await crowd.add(900, join=[crowd.ports[0].address], client=lambda: True)
        assert await client.announce(crowd.encoded(8, KEY)) >= 5
        await trio.sleep(1500)
        assert all(node.protocol.router.get(client.endpoint.node_id) is None for node in crowd.nodes[:8])
        assert len(await crowd.nodes[5].find(KEY)) == 1


async def test_one_subnet_fills_neither_bucket_nor_table(autojump_clock: Any) -> None:
    async with open_crowd(1) as crowd:
        for number in range(40):
            liar = Stranger(crowd.net, crowd.signer(900 + number), ip=f"14.0.0.{number + 1}")
            liar.answer = lambda _e, _b, _a: Pong()
            await crowd.nodes[0].protocol.call_hello(liar.port.address)
        assert crowd.nodes[0].contacts <= 10
        assert all(len(bucket) <= 2 for bucket in crowd.nodes[0].protocol.router.buckets)


async def test_nodes_that_invent_providers_without_end_do_not_crowd_out_those_that_others_tell(
    autojump_clock: Any,
) -> None:
    seeds = iter(range(10_000, 20_000))

    async with open_crowd(12, cheap=True) as crowd:

        def invent(_envelope: Envelope, body: Body, _sender: Address) -> Body | None:
            invented = [encode_record(record_of(crowd.signer(next(seeds)), issued_s=200)) for _ in range(2)]
            return Pong() if isinstance(body, Ping) else Found((), tuple(sorted(invented, key=make_node_id)), more=True)

        await crowd.nodes[3].announce(crowd.encoded(3, KEY))
        for number in range(4):
            liar = Stranger(crowd.net, crowd.signer(900 + number))
            liar.answer = invent
            await crowd.nodes[0].protocol.call_hello(liar.port.address)
        crowd.nodes[0].protocol.storage.records.sweep(unix_now() + 86400)  # so that it has to ask
        found = await crowd.nodes[0].find(KEY)
        assert len(found) == MAX_PROVIDERS
        assert crowd.signers[3].peer_id in {record.peer_id for record in found}
