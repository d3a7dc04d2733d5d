"""The status protocol's messages: bounds, signatures, garbage."""

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshmax.base.errors import ManifestInvalid, RemoteProtocolError
from meshmax.base.ids import Sha256, peer_id_of
from meshmax.base.status import (
    MAX_ADDRESSES,
    MAX_DEMANDS,
    MAX_MODELS,
    MAX_WAIT_S,
    MAX_WAITS,
    Demand,
    Gpu,
    Load,
    ModelPresence,
    PeerStatus,
    Vitals,
    Wait,
    cold,
    lasting,
    vitals_of,
    with_vitals,
)
from meshmax.wire.signed import STATUS_DOMAIN, sign
from meshmax.wire.status import (
    BEAT,
    MAX_ALL_NAMES,
    MAX_CONTEXT,
    MAX_STATUSES,
    Beat,
    check_statuses,
    check_vitals,
    fitted,
    read_status,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
PEER = peer_id_of(KEY.public_key().public_bytes_raw())
MODEL = ModelPresence(Sha256("a" * 64), ("registry.ollama.ai/library/x:latest",), "disk", 98_000_000)
STATUS = PeerStatus(
    PEER, 1, 2, "kitchen", "0.1.0", addresses=("/ip4/10.0.0.1/tcp/1",), models=(MODEL,), gpus=(Gpu("H200"),)
)


def test_a_status_of_the_peer_itself_is_believed() -> None:
    assert read_status(sign(STATUS_DOMAIN, STATUS, PEER, KEY.sign)) == STATUS


def test_a_full_status_fits_a_message() -> None:
    models = tuple(msgspec.structs.replace(MODEL, digest=Sha256(f"{n:064x}")) for n in range(MAX_MODELS))
    signed = sign(STATUS_DOMAIN, msgspec.structs.replace(STATUS, models=models), PEER, KEY.sign)
    check_statuses((signed,))
    read_status(signed)
    BEAT.encode(Beat(1, (signed,)))


@pytest.mark.parametrize(
    "change",
    [
        {"name": "\x1b[2J" + "x" * 100},
        {"addresses": ("/ip4/10.0.0.1/tcp/1",) * 99},
        {"gpus": (Gpu("\n" * 300),) * 99},
        {"models": (MODEL,) * (MAX_MODELS + 1)},
        {"models": (msgspec.structs.replace(MODEL, names=("h/n/" + "x" * 290,) * 64),) * MAX_MODELS},
        {"models": (msgspec.structs.replace(MODEL, names=("x" * 10_000,)),)},
        {"models": (msgspec.structs.replace(MODEL, family="\0" * 9, parameter_size="x" * 999),)},
        {"models": (msgspec.structs.replace(MODEL, context_length=1 << 64, embedding_length=-1),)},
        {"models": (msgspec.structs.replace(MODEL, loaded_context=1 << 64),)},
        {"models": (msgspec.structs.replace(MODEL, loaded_context=-1),)},
        {"models": (msgspec.structs.replace(MODEL, capabilities=("\n",) * 99),)},
        {"models": (msgspec.structs.replace(MODEL, load_s=float("nan"), decode_per_s=float("inf")),)},
    ],
    ids=lambda change: str(change)[:60],
)
def test_whatever_we_have_to_tell_is_made_to_fit_what_peers_take(change: dict[str, object]) -> None:
    signed = sign(STATUS_DOMAIN, fitted(msgspec.structs.replace(STATUS, **change)), PEER, KEY.sign)
    assert read_status(signed).models  # something of it is left
    BEAT.encode(Beat(1, (signed,)))


def test_what_fits_is_told_as_it_is() -> None:
    assert fitted(STATUS) == STATUS


@pytest.mark.parametrize(
    "change",
    [
        {"name": "x" * 65},
        {"name": "\x1b[2J"},
        {"addresses": ("a",) * (MAX_ADDRESSES + 1)},
        {"addresses": ("x" * 201,)},
        {"sequence": -1},
        {"load": Load(-1)},
        {"load": Load(waits=(Wait(MODEL.digest, float("nan")),))},
        {"load": Load(waits=(Wait(MODEL.digest, float("inf")),))},
        {"load": Load(waits=(Wait(MODEL.digest, -0.1),))},
        {"load": Load(waits=(Wait(MODEL.digest, MAX_WAIT_S + 1),))},
        {"load": Load(waits=(Wait(MODEL.digest, 1.0, -1),))},
        {"load": Load(waits=(Wait(MODEL.digest, 1.0, 0, 1 << 62),))},
        {"load": Load(waits=(Wait(Sha256("no"), 1.0),))},
        {"load": Load(waits=(Wait(MODEL.digest),) * (MAX_WAITS + 1))},
        {"load": Load(capacity=0)},
        {"load": Load(capacity=1 << 2000)},
        {"gpus": (Gpu("H200", 1 << 100),)},
        {"gpus": (Gpu("H200", utilization_percent=float("nan")),)},
        {"cpu_percent": float("inf")},
        {"models": (msgspec.structs.replace(MODEL, digest=Sha256("../x")),)},
        {"models": (msgspec.structs.replace(MODEL, size=-1),)},
        {"models": (msgspec.structs.replace(MODEL, loaded_context=-1),)},
        {"models": (msgspec.structs.replace(MODEL, loaded_context=MAX_CONTEXT + 1),)},
        {"models": (msgspec.structs.replace(MODEL, decode_per_s=float("nan")),)},
        {"models": (msgspec.structs.replace(MODEL, names=("x",) * 65),)},
        {"gpus": (Gpu("\n"),)},
        {"demand": (Demand(Sha256("a" * 64), 1.0),) * (MAX_DEMANDS + 1)},
        {"demand": (Demand(Sha256("a" * 63), 1.0),)},
        {"demand": (Demand(Sha256("a" * 64), float("nan")),)},
        {"demand": (Demand(Sha256("a" * 64), -1.0),)},
        {"models": (msgspec.structs.replace(MODEL, names=("x",) * 64),) * (MAX_ALL_NAMES // 64 + 1)},
    ],
    ids=str,
)
def test_a_status_out_of_bounds_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ManifestInvalid):
        read_status(sign(STATUS_DOMAIN, msgspec.structs.replace(STATUS, **change), PEER, KEY.sign))


def test_a_peer_that_does_not_tell_the_context_of_a_loaded_model_and_one_that_tells_more_are_understood() -> None:
    words: tuple[tuple[dict[str, int], int], ...] = (
        ({}, 0),
        ({"loaded_context": 8192}, 8192),
        ({"loaded_context": 1, "newer": 2}, 1),
    )
    for told, loaded_context in words:
        fields = msgspec.to_builtins(STATUS)
        older = {name: value for name, value in fields["models"][0].items() if name != "loaded_context"}
        fields["models"] = [older | told]
        (model,) = read_status(sign(STATUS_DOMAIN, fields, PEER, KEY.sign)).models
        assert model == msgspec.structs.replace(MODEL, loaded_context=loaded_context)


def test_the_context_of_a_loaded_model_is_worth_being_told_anew_and_ends_with_a_restart() -> None:
    model = msgspec.structs.replace(MODEL, state="loaded", loaded_context=512)
    short, long = (
        msgspec.structs.replace(STATUS, models=(msgspec.structs.replace(model, loaded_context=tokens),))
        for tokens in (512, 1024)
    )
    assert lasting(short) != lasting(long)
    assert cold(short).models == (MODEL,)


def test_what_a_peer_tells_of_its_waits_comes_through() -> None:
    load = Load(2, 3, 2, 9, (Wait(MODEL.digest, 4.25, 0, 3), Wait(Sha256("b" * 64), free=2)))
    told = vitals_of(msgspec.structs.replace(STATUS, load=load))
    got = BEAT.decode(BEAT.encode(Beat(1, vitals=told))[4:]).vitals
    assert got is not None
    check_vitals(got)
    assert with_vitals(STATUS, got).load == load


def test_a_wait_of_a_peer_itself_that_is_out_of_bounds_is_refused() -> None:
    load = Load(waits=(Wait(MODEL.digest, float("nan")),))
    with pytest.raises(RemoteProtocolError):
        check_vitals(vitals_of(msgspec.structs.replace(STATUS, load=load)))


def test_a_status_that_another_peer_signed_is_refused() -> None:
    other = Ed25519PrivateKey.from_private_bytes(b"\1" * 32)
    signer = peer_id_of(other.public_key().public_bytes_raw())
    with pytest.raises(ManifestInvalid, match="by the peer that it describes"):
        read_status(sign(STATUS_DOMAIN, STATUS, signer, other.sign))


def test_a_message_with_too_many_statuses_is_refused() -> None:
    signed = sign(STATUS_DOMAIN, STATUS, PEER, KEY.sign)
    with pytest.raises(RemoteProtocolError, match="at most"):
        check_statuses((signed,) * (MAX_STATUSES + 1))


def test_vitals_tell_what_is_asked_for_within_bounds() -> None:
    demand = (Demand(Sha256("a" * 64), 2.5),)
    vitals = Vitals("i", 1, 2, demand=demand)
    check_vitals(vitals)
    assert with_vitals(STATUS, vitals).demand == demand
    assert vitals_of(msgspec.structs.replace(STATUS, demand=demand)).demand == demand
    with pytest.raises(RemoteProtocolError, match="out of bounds"):
        check_vitals(msgspec.structs.replace(vitals, demand=(Demand(Sha256("x"), 1.0),)))
