"""Every prompt once an epoch, in an order of its own for each epoch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rlkd.core.errors import CheckpointError
from rlkd.core.types import Group, Prompt
from rlkd.curriculum.order import occurrence_seed, permutation


class Uniform:
    """The only state is `cursor`, how many places of the endless order are behind: epoch · n + position."""

    kind = "uniform"

    def __init__(self, prompts: Sequence[Prompt], fingerprint: str, seed: int) -> None:
        """`prompts` must not be empty (ValueError); `seed` is the run's."""
        if not prompts:
            raise ValueError("a curriculum needs at least one prompt")
        self.prompts = tuple(prompts)
        self.fingerprint, self.seed = fingerprint, seed
        self.cursor = 0
        self._order_of: tuple[int, np.ndarray] | None = None  # the epoch, and its order

    @property
    def epoch(self) -> int:
        return self.cursor // len(self.prompts)

    def draw(self) -> Prompt:
        index, seed = self._next()
        return replace(self.prompts[index], seed=seed)

    def observe(self, group: Group) -> None:
        """Nothing is learned from it."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "prompts": len(self.prompts),
            "seed": self.seed,
            "cursor": self.cursor,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError, and changes nothing, for the state of another curriculum, dataset or seed."""
        self._check(state)
        self.cursor = state["cursor"]

    def _next(self) -> tuple[int, int]:
        """The index of the prompt at the cursor and the seed of its occurrence; moves the cursor on."""
        epoch, position = divmod(self.cursor, len(self.prompts))
        if self._order_of is None or self._order_of[0] != epoch:
            self._order_of = (epoch, permutation(self.fingerprint, self.seed, epoch, len(self.prompts)))
        self.cursor += 1
        return int(self._order_of[1][position]), occurrence_seed(self.seed, epoch, position)

    def _check(self, state: Mapping[str, Any]) -> None:
        for name, here, fix in (
            ("kind", self.kind, "use the curriculum the run began with, or start with another name=…"),
            ("fingerprint", self.fingerprint, "use the data the run began with, or start with another name=…"),
            ("prompts", len(self.prompts), "use the data the run began with, or start with another name=…"),
            ("seed", self.seed, "use the seed the run began with, or start with another name=…"),
        ):
            if state.get(name) != here:
                what = f"the checkpoint's {name} is {state.get(name)!r}, but this run's is {here!r}"
                raise CheckpointError("RLKD-K101", f"{what}: it would go on with other prompts", "curriculum", fix)
        cursor = state.get("cursor")
        if type(cursor) is not int or cursor < 0:
            raise CheckpointError(
                "RLKD-K102",
                f"the checkpoint's cursor is {cursor!r}, not a number of prompts",
                where="curriculum",
                fix="move this checkpoint away to use the one before it",
            )
