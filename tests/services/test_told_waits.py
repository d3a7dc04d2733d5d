"""What peers tell of their waits decides at work, and a word that does not hold loses its weight."""

import msgspec
import trio
import trio.testing

from meshmax.base.status import Load, PeerView, Wait
from tests.services.infer_site import MODEL, WORDS, Site, ask, open_site, text_of

Clock = trio.testing.MockClock


async def answered_by(site: Site) -> str:
    async with site[0].router.open_answer(ask()) as answer:
        assert await text_of(answer.events) == WORDS
        return next(node.name for node in site.nodes if node.peer_id == answer.route.peer_id)


def tells(site: Site, number: int, load: Load, rtt_s: float = 0.001) -> None:
    def told(view: PeerView) -> PeerView:
        assert view.status is not None
        models = tuple(msgspec.structs.replace(model, state="loaded") for model in view.status.models)
        status = msgspec.structs.replace(view.status, load=load, models=models)
        return msgspec.structs.replace(view, rtt_s=rtt_s, status=status)

    site[number].change = told


async def test_the_peer_where_a_slot_is_soon_free_is_asked_whatever_their_counts(autojump_clock: Clock) -> None:
    async with open_site(3) as site:
        site[0].has.clear()
        tells(site, 1, Load(4, 0, 4, waits=(Wait(MODEL, 60.0),)))
        tells(site, 2, Load(4, 3, 4, waits=(Wait(MODEL, 0.5, 0, 3),)), rtt_s=0.1)
        assert await answered_by(site) == "peer2"


async def test_a_peer_with_a_free_slot_of_this_model_is_not_passed_over_for_what_others_do_there(
    autojump_clock: Clock,
) -> None:
    async with open_site(3) as site:
        site[0].has.clear()
        tells(site, 1, Load(4, 0, 4, waits=(Wait(MODEL, 0.0, 4),)))
        tells(site, 2, Load(4, 0, 4), rtt_s=0.002)
        assert await answered_by(site) == "peer1"


async def test_our_own_slots_are_looked_at_as_they_are(autojump_clock: Clock) -> None:
    async with open_site(2, parallel=1, echo_tokens_per_s=10.0) as site, trio.open_nursery() as nursery:
        site[1].has.clear()
        assert await answered_by(site) == "peer0"
        site[1].has.add(MODEL)
        tells(site, 1, Load(0, 0, 1, waits=(Wait(MODEL, 0.0, 1),)), rtt_s=0.3)
        nursery.start_soon(answered_by, site)
        await trio.sleep(0.1)
        assert site[0].residency.load().waits[0].wait_s > 1.0
        assert await answered_by(site) == "peer1"
