"""The nodes of the Ray cluster: what they are called, what they have, and which of them stay.

Nodes that are not taken away carry the custom resource `stable` (`ray start --resources '{"stable": 1}'`). Where a
cluster has any, the learner's ranks go there, and everybody who can be replaced goes elsewhere.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ray

from rlkd.workers.aside import OneAtATime, aside

STABLE = "stable"
EVERY_S = 5.0  # between two looks at the cluster
ASK_S = 10.0  # for an answer from Ray


@dataclass(frozen=True)
class Node:
    """One that is alive."""

    id: str  # Ray's, in hex
    address: str
    total: Mapping[str, float]  # resources

    @property
    def stable(self) -> bool:
        return self.total.get(STABLE, 0.0) > 0

    @property
    def name(self) -> str:
        """For people: several nodes may have one address, in containers and in tests."""
        return f"{self.address} ({self.id[:8]}{', stable' if self.stable else ''})"


def alive() -> list[Node]:
    """The nodes that Ray takes for alive."""
    return [Node(n["NodeID"], n["NodeManagerAddress"], n["Resources"]) for n in ray.nodes() if n["Alive"]]


def in_words(where: Mapping[str, str], nodes: list[Node]) -> str:
    """Who is on which node: role -> id of its node, in a sentence."""
    names = {node.id: node.name for node in nodes}
    there: dict[str, list[str]] = {}
    for role, node in where.items():
        there.setdefault(names.get(node, f"{node[:8]} (gone)"), []).append(role)
    return "; ".join(f"{', '.join(roles)} on {name}" for name, roles in there.items())


async def watched(tell: Callable[[str, str], None], seen: Callable[[set[str]], None]) -> None:
    """Tell of nodes that come and go, as long as it runs; `seen` is given the ids of those alive after every look."""
    known, deaf, ask = {n.id: n for n in await aside(alive)}, False, OneAtATime(ASK_S)
    while True:
        await asyncio.sleep(EVERY_S)
        try:
            now = {n.id: n for n in await ask(alive)}
        except Exception as error:  # Ray's own errors of all kinds: its head restarts, the network is gone
            if not deaf:
                tell("nodes", f"Ray does not say which nodes there are: {type(error).__name__}: {error}")
            deaf = True
            continue
        deaf = False
        for node in [n for id, n in known.items() if id not in now]:
            tell("nodes", f"node {node.name} is gone; {len(now)} are left")
        for node in [n for id, n in now.items() if id not in known]:
            tell("nodes", f"node {node.name} has joined; there are {len(now)}")
        known = now
        seen(set(now))
