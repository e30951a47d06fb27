"""Who may run code where: rewards that run untrusted code get the sandbox, or are refused before anything is judged."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlkd.core.errors import PreflightError
from rlkd.engines.sandbox import Found, Room, Session, Tier, probe

GIB = 1 << 30


@dataclass(frozen=True)
class Standing:
    """Where the code of this jail's rewards runs."""

    tier: Tier
    unsafe: bool = False  # below the tier that was asked for, because the recipe accepts it
    reason: str = ""  # why it is not a better tier


def equip(rewards: Mapping[str, Any], min_tier: str, accept_unsafe: bool) -> Standing | None:
    """Gives every reward with `runs_code` the best sandbox of this machine. None if there is no such reward, and then
    nothing is tried. PreflightError RLKD-E310 where the machine gives less than `min_tier`."""
    needy = {name: r for name, r in rewards.items() if getattr(r, "runs_code", False)}
    if not needy:
        return None
    found = probe()
    standing = allowed(list(needy), found, Tier(min_tier), accept_unsafe)
    for reward in needy.values():
        reward.equip(partial(_open, standing.tier))
    return standing


def allowed(names: list[str], found: Found, least: Tier, accept_unsafe: bool) -> Standing:
    """Where the code runs, or PreflightError RLKD-E310. Below the sandbox nothing runs unless the recipe accepts it in
    so many words: `min_tier: process` alone is a wish, not a consent."""
    wanted = max(least, Tier.SANDBOX, key=lambda t: t.rank)
    enough = found.tier.rank >= wanted.rank
    if not enough and not accept_unsafe:
        raise PreflightError(
            "RLKD-E310",
            f"the reward `{names[0]}` runs code that a model wrote, and this machine can keep it in tier "
            f"`{found.tier}` only, below `{wanted}`: {found.reason}",
            where="verifier.min_tier",
            fix="run where user namespaces and Landlock are allowed (`rlkd doctor` says what is missing); on a machine "
            "with nothing to lose, verifier.accept_unsafe_code=true",
        )
    return Standing(found.tier, not enough, found.reason)


def _open(
    tier: Tier, source: str, memory_gib: float, seconds: float, packages: bool
) -> AbstractContextManager[Session]:
    """A session with this source, to be entered."""
    closed = tier is Tier.SANDBOX
    return Session(source, Room(closed, int(memory_gib * GIB), int(seconds) + 1, packages=packages))
