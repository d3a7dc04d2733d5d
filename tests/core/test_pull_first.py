"""Who fetches a model that nobody who could answer has: a table of meshes."""

import msgspec
import pytest

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.status import NO_ENGINE, Gpu, Load, ModelPresence, PeerStatus, PeerView
from meshmax.core.pull_first import not_here, plan_pull, who_could

MODEL = Sha256("ab" * 32)
GIB = 1 << 30
SIZE = 4 * GIB


def peer(
    name: str,
    has: str = "",
    *,
    engine: str = "echo",
    state: str = "online",
    gpu: int = 0,
    memory: int = 16,
    running: int = 0,
    rtt_s: float = 0.001,
    served: bool = False,
) -> PeerView:
    models = (ModelPresence(MODEL, ("m",), has, SIZE, served=served),) if has else ()  # type: ignore[arg-type]
    status = PeerStatus(
        PeerId(name),
        1,
        0,
        name,
        "0",
        engine=engine,
        models=models,
        gpus=(Gpu("card", 0, gpu * GIB),) if gpu else (),
        load=Load(running, 0, 4),
        memory_total_bytes=memory * GIB,
        draining=state == "draining",
    )
    return PeerView(PeerId(name), state, "self" if state == "self" else "direct", status, rtt_s=rtt_s)  # type: ignore[arg-type]


STORE = peer("store", "disk", engine=NO_ENGINE)
ME = peer("me", state="self", rtt_s=0.0)

TABLE = [
    ("ourselves at a tie", [peer("b"), ME, STORE], ["me", "b"]),
    ("a GPU that it fits goes before us", [ME, peer("b", gpu=8), STORE], ["b", "me"]),
    ("that goes before a GPU that it does not fit", [ME, peer("b", gpu=2), peer("c", gpu=8), STORE], ["c", "b", "me"]),
    ("who has some of it goes first among others", [peer("b", rtt_s=0.0005), peer("c", "partial"), STORE], ["c", "b"]),
    ("then who has less to do", [peer("b", running=2), peer("c"), STORE], ["c", "b"]),
    ("then who is nearer", [peer("b", rtt_s=0.2), peer("c"), STORE], ["c", "b"]),
    ("no peer without an engine", [peer("b", engine=NO_ENGINE), STORE], []),
    ("none whose memory it does not fit", [peer("b", memory=4), STORE], []),
    ("nor one that is drained or gone", [peer("b", state="draining"), peer("c", state="offline"), STORE], []),
    ("what does not tell its memory may be asked", [peer("b", memory=0), STORE], ["b"]),
]


@pytest.mark.parametrize(("views", "names"), [case[1:] for case in TABLE], ids=[case[0] for case in TABLE])
def test_takers_are_put_in_order(views: list[PeerView], names: list[str]) -> None:
    plan = plan_pull(views, MODEL, SIZE)
    assert [taker.name for taker in plan.takers] == names
    assert plan.given
    assert not plan.able


def test_nobody_has_to_fetch_what_somebody_can_answer_with() -> None:
    assert plan_pull([ME, peer("b", "disk")], MODEL, SIZE).able
    assert plan_pull([ME, peer("b", "loaded", served=True)], MODEL, SIZE).able


def test_a_drained_holder_gives_its_files_and_answers_nothing() -> None:
    plan = plan_pull([ME, peer("b", "loaded", state="draining")], MODEL, SIZE)
    assert (plan.able, plan.given, plan.drained) == (False, True, True)
    assert [taker.name for taker in plan.takers] == ["me"]


def test_what_an_engine_brings_along_cannot_be_fetched() -> None:
    plan = plan_pull([ME, peer("b", "loaded", served=True, state="draining")], MODEL, SIZE)
    assert (plan.able, plan.given) == (False, False)


def test_the_sentence_says_why_nobody_answers_who_could_and_what_to_type() -> None:
    plan = plan_pull([ME, peer("b"), STORE], MODEL, SIZE)
    assert who_could(plan, "m", SIZE) == (
        " (store only stores models (it has no engine)); me, b could hold it: `meshmax pull m` brings it to this peer"
    )
    plan = plan_pull([msgspec.structs.replace(STORE, state="self"), peer("b")], MODEL, SIZE)
    assert who_could(plan, "m", SIZE).endswith("b could hold it: `meshmax distribute m --to b` brings it to b")
    plan = plan_pull([STORE, peer("b", memory=1)], MODEL, SIZE)
    assert who_could(plan, "m", SIZE).endswith(", and no peer with an engine has room in memory for its 4.3 GB")
    plan = plan_pull([STORE], MODEL, SIZE)
    assert who_could(plan, "m", SIZE).endswith(
        ", and no peer that is here now runs models: start one with an engine (engine.kind)"
    )


@pytest.mark.parametrize(
    ("views", "sentence"),
    [
        (
            [ME, peer("b", "disk")],
            "which has no copy of 'm': `meshmax pull m` brings it here; by another policy b could answer",
        ),
        ([ME, STORE], "which has no copy of 'm': `meshmax pull m` brings it here"),
        ([ME, peer("b", "loaded", served=True)], "which has no copy of 'm'; by another policy b could answer"),
        (
            [msgspec.structs.replace(peer("me", memory=1), state="self"), STORE],
            "which has no copy of 'm', nor room in memory for its 4.3 GB",
        ),
        (
            [msgspec.structs.replace(STORE, state="self"), peer("b", "disk")],
            "which only stores models (it has no engine); by another policy b could answer",
        ),
        (
            [msgspec.structs.replace(peer("me", "disk", state="draining"), state="self"), peer("b", "disk")],
            "which is being drained: `meshmax undrain` ends that; by another policy b could answer",
        ),
    ],
)
def test_a_prompt_for_this_peer_alone_is_told_what_it_lacks_and_what_to_do(
    views: list[PeerView], sentence: str
) -> None:
    assert not_here(plan_pull(views, MODEL, SIZE), "m", SIZE).endswith(sentence)
