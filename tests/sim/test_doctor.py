"""The doctor of real nodes in virtual time: good health, being alone, a clock that is off."""

import dataclasses
from pathlib import Path

import pytest
import trio
import trio.testing

from meshmax.base.doctor import Diagnosis
from meshmax.node import Node, open_node
from tests.sim.site import online, open_site, until


async def nobody(_words: str) -> None:
    await trio.lowlevel.checkpoint()


def codes(diagnosis: Diagnosis) -> set[str]:
    """Of what is not well, but for what is this machine's own: it may have no network, and little room."""
    own = {"no_network", "disk_low", "disk_full", "engine_missing", "clock_went_back"}
    return {finding.code for finding in diagnosis.findings if finding.severity != "ok"} - own


async def visit(node: Node) -> Diagnosis:
    with trio.fail_after(10):
        return await node.doctor.visit(nobody)


async def test_two_peers_that_see_each_other_are_well(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        a, b = await site.node("a"), await site.node("b")
        await until(lambda: online(a) == {"b"} and online(b) == {"a"})
        for node, other in ((a, "b"), (b, "a")):
            diagnosis = await visit(node)
            assert codes(diagnosis) == set()
            assert diagnosis.facts.peer is not None
            (told,) = diagnosis.facts.peer.looked_back
            assert told.name == other
            assert {seen.rung for seen in told.ours} == {seen.rung for seen in told.theirs} == {"mdns"}


async def test_a_peer_alone_is_told_what_to_do(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        assert codes(await visit(await site.node("a"))) == {"alone"}


@pytest.mark.parametrize("off_s", [10_800.0, -10_800.0])
async def test_a_clock_that_is_off_is_told_by_both(
    autojump_clock: trio.testing.MockClock, tmp_path: Path, off_s: float
) -> None:
    async with open_site(tmp_path) as site:
        a = await site.node("a")
        config, world = site.parts("b")
        right = world.unix_now
        async with open_node(config, dataclasses.replace(world, unix_now=lambda: right() + off_s)) as b:
            await until(lambda: online(a) == {"b"} and online(b) == {"a"})
            for node in (a, b):
                diagnosis = await visit(node)
                assert codes(diagnosis) == {"clock_off"}
                assert any("3 h" in finding.sentence for finding in diagnosis.findings)


async def test_a_clock_that_is_off_against_most_is_this_machines(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with open_site(tmp_path) as site:
        others = [await site.node(name) for name in ("a", "b", "c")]
        config, world = site.parts("d")
        right = world.unix_now
        async with open_node(config, dataclasses.replace(world, unix_now=lambda: right() - 10_800.0)) as slow:
            await until(lambda: online(slow) == {"a", "b", "c"} and all(len(online(node)) == 3 for node in others))
            diagnosis = await visit(slow)
            assert codes(diagnosis) == {"clock_off_here"}
            assert "3 h slow: 3 of 3 peers say so" in diagnosis.findings[0].sentence
