"""The rung of discovery that meets at rendezvous nodes: registers us there, names whom they tell of. A ports.Discovery.

Each node has a task of its own, so a dead one delays no other. We visit as a guest, and leave again where the next visit is
far off. What comes back is believed as sightings only: a record must be signed by the peer that it names, in the namespace
that was asked for; whether the peer is of our mesh, it proves itself when it is dialled. At an orderly end we unregister, also
at a node that is named no more. Which nodes there are is asked anew every CHECK_S and when told to look again.
Not here: when to visit (core.rendezvous), bytes (wire.rendezvous, wire.peer_record), what the other side does
(services.rendezvous_server).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final, NoReturn, TypeVar

import msgspec
import trio

from meshmax.base.discovery import BOOTSTRAP_OUTSIDE, REFUSED_ADDRESS
from meshmax.base.errors import ManifestInvalid, MeshmaxError, PeerGone, Refused, RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.base.membership import MeshId
from meshmax.core.backoff import Random
from meshmax.core.rendezvous import Due, Known, Schedule, Told, told_addresses
from meshmax.ports import Sighting, Signer, Swarm
from meshmax.services.rendezvous_stream import RendezvousStream
from meshmax.telemetry.log import get_logger
from meshmax.wire import rendezvous
from meshmax.wire.multiaddr import peer_id_bytes
from meshmax.wire.peer_record import open_record, seal_record
from meshmax.wire.protocols import RENDEZVOUS
from meshmax.wire.rendezvous import Discover, DiscoverResponse, Message, Register, RegisterResponse, Unregister

_log = get_logger("rendezvous")

MAX_NODES: Final = 16  # that are visited; each costs a task and now and then a connection
CHECK_S: Final = 5.0  # between looks at our mesh and our addresses; who is told of changes calls look_again
VISIT_S: Final = 20.0  # for a whole visit; an honest one needs a second
IDLE_S: Final = 20.0  # a guest's connection, of which a node has few, is given up where the next visit is further off
GOODBYE_S: Final = 1.0  # for unregistering everywhere, at the end
MAX_PAGES: Final = 48  # in one visit; the largest namespace of a node of ours has 41
MAX_TOLD: Final = 4096  # registrations looked at in one visit
VERIFIED_AT_ONCE: Final = 32  # signatures, 5 ms, before others have their turn
SHOWN_PROBLEMS: Final = 3  # nodes, in a sentence for people

T = TypeVar("T")


class _Node:
    """One rendezvous node: how it is reached, and how it stands with us."""

    def __init__(self, peer_id: PeerId, addresses: tuple[str, ...], random: Random) -> None:
        self.peer_id, self.addresses = peer_id, addresses
        self.schedule = Schedule(random, trio.current_time())
        self.known = Known()
        self.woken = trio.Event()
        self.scope = trio.CancelScope()  # of its visits; cancelled when it is named no more
        self.namespace = ""  # under which we are registered there
        self.why = ""  # the last visit failed
        self.why_not = ""  # our registration was refused

    def wake(self) -> None:
        self.woken.set()
        self.woken = trio.Event()


class NodeView(msgspec.Struct, frozen=True):
    """A rendezvous node for people. ``problem`` '' where all is well; ``peers``: whom it told of that are still registered."""

    peer_id: PeerId
    address: str
    registered: bool
    peers: int
    problem: str


class Rendezvous:
    """See the module. ``own``: our multiaddrs that our mesh may know. ``mesh``: which it is.

    ``nodes``: multiaddrs by PeerId of now, the first MAX_NODES of which are visited; ``none``: a sentence, why there are none.
    ``in_use``: a node's connection serves somebody else, too, and must stay.
    """

    name = "rendezvous"

    def __init__(
        self,
        swarm: Swarm,
        signer: Signer,
        nodes: Callable[[], Mapping[PeerId, tuple[str, ...]]],
        own: Callable[[], tuple[str, ...]],
        mesh: Callable[[], MeshId],
        unix_now: Callable[[], float],
        random: Random,
        in_use: Callable[[PeerId], bool] = lambda peer_id: False,
        none: Callable[[], str] = lambda: "no rendezvous node is known",
    ) -> None:
        self._swarm, self._signer, self._own, self._mesh, self._in_use = swarm, signer, own, mesh, in_use
        self._named, self._none = nodes, none
        self._unix_now, self._random = unix_now, random
        self._nodes: tuple[_Node, ...] = ()
        self._nursery: trio.Nursery | None = None  # of visits, while the rung is climbed
        self._sequence = 0
        self._seen: tuple[str, tuple[str, ...]] = ("", ())
        self._news = trio.Event()

    # --- what is -----------------------------------------------------------------------------------------------------

    @property
    def off(self) -> str:
        """Why nothing is done, in a sentence; '' while there is a node to visit."""
        if not self._places():
            return self._none()
        return BOOTSTRAP_OUTSIDE if self._nodes and all(n.why == BOOTSTRAP_OUTSIDE for n in self._nodes) else ""

    @property
    def problem(self) -> str:
        """What is wrong, in a sentence; '' while one node at least does what it should."""
        failing = [(node.addresses[0], node.why or node.why_not) for node in self._nodes if node.why or node.why_not]
        if not failing or len(failing) < len(self._nodes):
            return ""
        return "no rendezvous node serves us: " + "; ".join(f"{at}: {why}" for at, why in failing[:SHOWN_PROBLEMS])

    @property
    def nodes(self) -> tuple[NodeView, ...]:
        """Each node as it stands."""
        return tuple(
            NodeView(n.peer_id, n.addresses[0], bool(n.namespace), len(n.known), n.why or n.why_not)
            for n in self._nodes
        )

    def look_again(self) -> None:
        """See ports.LooksAgain. Call it when our mesh or our addresses have changed, too."""
        self.check()
        for node in self._nodes:
            node.schedule.on_look_again(trio.current_time())
            node.known.name_all_again()
            node.wake()
        self._tell()

    # --- what goes on ------------------------------------------------------------------------------------------------

    async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
        """See ports.Discovery."""
        self._seen = self._namespace_and_addresses()
        try:
            async with trio.open_nursery() as self._nursery:
                self._follow_names(self._nursery)
                self._nursery.start_soon(self._run_checks)
                self._nursery.start_soon(self._run_sightings, found)
        finally:
            self._nursery = None
            with trio.CancelScope(deadline=trio.current_time() + GOODBYE_S, shield=True):
                async with trio.open_nursery() as nursery:
                    for node in self._nodes:
                        nursery.start_soon(self._leave, node)
            self._nodes = ()

    async def _run_checks(self) -> NoReturn:
        """See when the nodes, our namespace or our addresses change."""
        while True:
            await trio.sleep(CHECK_S)
            self.check()

    def check(self) -> None:
        """The nodes, our mesh or our addresses may be others: if so, follow at once. Cheap; call it freely."""
        if self._nursery is not None:
            self._follow_names(self._nursery)
        before, self._seen = self._seen, self._namespace_and_addresses()
        if before == self._seen:
            return
        for node in self._nodes:
            elsewhere = before[0] != self._seen[0]
            if elsewhere:
                node.known.clear()
            node.schedule.on_record_changed(trio.current_time(), elsewhere)
            node.wake()

    def _places(self) -> dict[PeerId, tuple[str, ...]]:
        """The nodes to visit: those that are named now, without ourselves."""
        named = [(peer_id, addresses) for peer_id, addresses in self._named().items() if peer_id != self._swarm.peer_id]
        return dict(named[:MAX_NODES])

    def _follow_names(self, nursery: trio.Nursery) -> None:
        """Leave nodes that are named no more, visit new ones, and use the addresses of now."""
        places, known = self._places(), {node.peer_id: node for node in self._nodes}
        for node in self._nodes:
            if node.peer_id not in places:
                node.scope.cancel()
        self._nodes = tuple(
            known.get(peer_id) or _Node(peer_id, addresses, self._random) for peer_id, addresses in places.items()
        )
        for node in self._nodes:
            node.addresses = places[node.peer_id]
            if node.peer_id not in known:
                nursery.start_soon(self._run_node, node)

    def _namespace_and_addresses(self) -> tuple[str, tuple[str, ...]]:
        return rendezvous.namespace_of(self._mesh()), self._own()

    async def _run_sightings(self, found: trio.MemorySendChannel[Sighting]) -> None:
        """Name whom the nodes told of. Apart from the visits, so that a slow reader holds up none."""
        while True:
            news, namespace = self._news, self._seen[0]
            for node in self._nodes:
                others = [other.known for other in self._nodes if other is not node]
                for told in node.known.take_due(trio.current_time(), others):
                    if namespace == self._seen[0]:  # else we went to another mesh meanwhile
                        await found.send(Sighting(told.peer_id, told.addresses, "rendezvous"))
            with trio.move_on_after(CHECK_S):
                await news.wait()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def _run_node(self, node: _Node) -> None:
        with node.scope:
            await self._visit_on(node)
        with trio.move_on_after(GOODBYE_S):
            await self._leave(node)
        await self._drop(node)

    async def _visit_on(self, node: _Node) -> None:
        while True:
            if due := node.schedule.due(trio.current_time()):
                await self._try_visit(node, due)
                if node.schedule.deadline() - trio.current_time() > IDLE_S:
                    await self._drop(node)
            woken = node.woken
            with trio.CancelScope(deadline=node.schedule.deadline()):
                await woken.wait()

    # --- one visit ---------------------------------------------------------------------------------------------------

    async def _try_visit(self, node: _Node, due: Due) -> None:
        why = f"it did not answer within {VISIT_S:g} s"
        with trio.move_on_after(VISIT_S):
            try:
                try:
                    await self._visit(node, due)
                except PeerGone:  # others use the connection, too, and may have ended it as we came
                    await self._visit(node, due)
                why = ""
            except MeshmaxError as error:
                why = error.message
                if why.count(REFUSED_ADDRESS) >= len(node.addresses):
                    why = BOOTSTRAP_OUTSIDE
        if not why:
            node.schedule.on_visited(trio.current_time())
        else:
            log = _log.debug if node.why else _log.info  # once for people; what follows is only the same again
            said = "a bootstrap node is not used" if why == BOOTSTRAP_OUTSIDE else "a rendezvous node does not serve us"
            log(said, address=node.addresses[0], why=why)
            node.schedule.on_failed(trio.current_time())
            await self._drop(node)
        node.why = why

    async def _visit(self, node: _Node, due: Due) -> None:
        await self._swarm.dial(node.peer_id, node.addresses, guest=True)
        if due.register:
            await self._register(node)
        if due.discover:
            await self._discover(node)

    async def _register(self, node: _Node) -> None:
        node.schedule.on_registering()
        namespace, own = self._seen
        if node.namespace and node.namespace != namespace:
            await self._say(node, self._unregister(node.namespace))
            node.namespace = ""
        addresses = told_addresses(own, node.addresses)
        if not addresses:
            node.why_not = "we have no address that others could use"
            node.schedule.on_nothing_to_register(trio.current_time())
            return
        self._sequence = max(self._sequence + 1, int(self._unix_now() * 1000))
        record = seal_record(self._signer.peer_id, self._sequence, addresses, self._signer.sign)
        answer = await self._ask_to_register(node, Register(namespace, record, rendezvous.DEFAULT_TTL_S))
        if answer.status == rendezvous.OK:
            node.namespace, node.why_not = namespace, ""
            ttl_s = min(max(answer.ttl_s, 1), rendezvous.MAX_TTL_S)
            node.schedule.on_registered(ttl_s, trio.current_time())
        else:
            node.why_not = f"it did not register us: {answer.text or 'no reason given'} ({answer.status})"
            node.schedule.on_register_refused(trio.current_time())

    async def _ask_to_register(self, node: _Node, request: Register) -> RegisterResponse:
        answer = await self._ask(node, request)
        if isinstance(answer, RegisterResponse) and answer.status == rendezvous.E_INVALID_SIGNED_PEER_RECORD:
            # It may hold a record from when our clock was ahead; that one we can take back.
            await self._say(node, self._unregister(request.namespace))
            answer = await self._ask(node, request)
        if not isinstance(answer, RegisterResponse):
            raise RemoteProtocolError("the rendezvous node gave another answer than to our registration")
        return answer

    async def _discover(self, node: _Node) -> None:
        namespace = self._seen[0]
        cookie, told = node.schedule.on_discovering(), 0
        for _ in range(MAX_PAGES):
            page = await self._ask(node, Discover(namespace, rendezvous.MAX_PAGE, cookie))
            if not isinstance(page, DiscoverResponse):
                raise RemoteProtocolError("the rendezvous node gave another answer than to our question")
            if page.status == rendezvous.E_INVALID_COOKIE and cookie:
                cookie = b""  # it was started anew, so it does not know us either
                node.schedule.on_register_lost(trio.current_time())
                continue
            if page.status != rendezvous.OK:
                raise Refused(f"it does not tell who is there: {page.text or 'no reason given'} ({page.status})")
            if namespace != self._seen[0]:
                return  # we went to another mesh meanwhile
            await self._take(node, namespace, page)
            told += len(page.registrations)
            if not page.registrations or page.cookie in (b"", cookie) or told >= MAX_TOLD:
                cookie = page.cookie
                break
            cookie = page.cookie
        node.schedule.on_discovered(cookie, not self._swarm.connections(), trio.current_time())

    async def _take(self, node: _Node, namespace: str, page: DiscoverResponse) -> None:
        verified = 0
        for registration in page.registrations:
            left_s = min(registration.ttl_s or rendezvous.DEFAULT_TTL_S, rendezvous.MAX_TTL_S)
            expires_at = trio.current_time() + left_s
            if registration.namespace != namespace or node.known.renew(registration.record, expires_at):
                continue
            verified += 1
            if verified % VERIFIED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            try:
                record = open_record(registration.record)
            except ManifestInvalid:
                continue  # of a stack that does not sign, or made up
            if record.peer_id != self._signer.peer_id and record.addresses:
                told = Told(record.peer_id, registration.record, record.sequence, record.addresses, expires_at)
                node.known.add(told)
        self._tell()

    async def _ask(self, node: _Node, request: Message) -> Message:
        """One request on a stream of its own, as some stacks want it. Raises PeerGone, RemoteProtocolError and others."""
        return await self._on_stream(node, request, RendezvousStream.receive)

    async def _say(self, node: _Node, message: Message) -> None:
        """Send what has no answer."""
        await self._on_stream(node, message, _no_answer)

    async def _on_stream(self, node: _Node, message: Message, then: Callable[[RendezvousStream], Awaitable[T]]) -> T:
        stream = await self._swarm.open_stream(node.peer_id, RENDEZVOUS)
        try:
            messages = RendezvousStream(stream, rendezvous.MAX_RESPONSE_BYTES)
            await messages.send(message)
            answer = await then(messages)
            await stream.aclose()
            return answer
        finally:
            with trio.CancelScope(shield=True):  # does not block
                await stream.reset()

    def _unregister(self, namespace: str) -> Unregister:
        return Unregister(namespace, peer_id_bytes(self._signer.peer_id))

    # --- ends --------------------------------------------------------------------------------------------------------

    async def _drop(self, node: _Node) -> None:
        """Give the connection up, unless it is a member's or serves somebody else."""
        if node.peer_id not in self._swarm.connections() and not self._in_use(node.peer_id):
            await self._swarm.disconnect(node.peer_id)

    async def _leave(self, node: _Node) -> None:
        if not node.namespace:
            return
        namespace, node.namespace = node.namespace, ""
        try:
            await self._swarm.dial(node.peer_id, node.addresses, guest=True)
            await self._say(node, self._unregister(namespace))
        except MeshmaxError as error:
            _log.debug("not unregistered", address=node.addresses[0], why=error.message)


async def _no_answer(_messages: RendezvousStream) -> None:
    await trio.lowlevel.checkpoint()
