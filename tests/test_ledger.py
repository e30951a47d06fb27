"""The ledger: every ticket in exactly one place, whatever happens; what is broken is refused."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkd.core.errors import CheckpointError
from rlkd.core.types import Prompt
from rlkd.train.ledger import TRAINED, Ledger, Row
from tests.fakes import numbered


def row(ledger: Ledger, ticket: int, what: str = TRAINED) -> Row:
    p = ledger.pending[ticket]
    return Row(ticket, p.id, p.seed, what, 4 if what == TRAINED else 0)


def again(prompt_id: str, seed: int) -> Prompt:
    if prompt_id[0] != "p":
        raise KeyError(prompt_id)
    return replace(numbered(int(prompt_id[1:])), seed=seed)


@given(st.data())
def test_every_ticket_is_in_exactly_one_place_and_survives_a_checkpoint(data: st.DataObject) -> None:
    ledger, trained, away = Ledger(), set(), set()
    for step in range(1, data.draw(st.integers(1, 8))):
        for _ in range(data.draw(st.integers(0, 6))):
            ledger.admit(numbered(ledger.next_ticket))
        chosen = data.draw(st.lists(st.sampled_from(sorted(ledger.pending)), unique=True)) if ledger.pending else []
        whats = [data.draw(st.sampled_from([TRAINED, "all wrong"])) for _ in chosen]
        ledger.resolve(step, [row(ledger, t, w) for t, w in zip(chosen, whats, strict=True)])
        for ticket, what in zip(chosen, whats, strict=True):
            (trained if what == TRAINED else away).add(ticket)
        assert ledger.problems() == []
        if data.draw(st.booleans()):
            ledger = Ledger.load(json.loads(json.dumps(ledger.state_dict())), again)
    everything = {*ledger.pending, *trained, *away}
    assert everything == set(range(ledger.next_ticket))
    assert len(ledger.pending) + len(trained) + len(away) == ledger.next_ticket
    assert ledger.samples == 4 * len(trained)
    assert all(ledger.pending[t].seed == t for t in ledger.pending)


def filled() -> Ledger:
    ledger = Ledger()
    for i in range(6):
        ledger.admit(numbered(i))
    ledger.resolve(1, [row(ledger, t) for t in (0, 1, 3)])
    return ledger


@pytest.mark.parametrize("tickets", [[0], [6], [2, 2]])
def test_nothing_is_resolved_twice_or_without_having_been_admitted(tickets: list[int]) -> None:
    ledger = filled()
    with pytest.raises((RuntimeError, KeyError)):
        ledger.resolve(2, [Row(t, f"p{t}", t, TRAINED) for t in tickets])


@pytest.mark.parametrize(
    "change",
    [
        {"frontier": 1},  # a ticket would be asked again
        {"frontier": 3},  # a ticket would be skipped
        {"next_ticket": 7},
        {"pending": [[4, "p4", 4], [5, "p5", 5]]},
        {"pending": [[1, "p1", 1], [2, "p2", 2], [4, "p4", 4], [5, "p5", 5]]},
        {"beyond": []},
        {"counts": {"trained": 2}},
        {"pending": [[2, "q2", 2], [4, "p4", 4], [5, "p5", 5]]},
        {"pending": "p2"},
        {"samples": None},
        {"counts": [3]},
    ],
)
def test_a_broken_ledger_is_refused(change: dict[str, Any]) -> None:
    state = filled().state_dict()
    assert Ledger.load(state, again).state_dict() == state
    with pytest.raises(CheckpointError, match="ledger"):
        Ledger.load({**state, **change}, again)


def test_the_chain_tells_any_difference() -> None:
    chains = set()
    for step, what, ticket, seed in [(1, TRAINED, 0, 0), (2, TRAINED, 0, 0), (1, "away", 0, 0), (1, TRAINED, 1, 0)]:
        ledger = Ledger()
        for i in range(2):
            ledger.admit(numbered(i))
        ledger.resolve(step, [Row(ticket, f"p{ticket}", seed, what)])
        chains.add(ledger.chain)
    assert len(chains) == 4
