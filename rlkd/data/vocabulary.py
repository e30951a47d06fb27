"""Whether two tokenizers mean the same by their token ids, which is what log-probs of another model need.

Compared are the maps from token to id, not their sizes: the same words are padded to different sizes (151,936 and
152,064 rows), and different words may have the same size. Then both encode and decode one sample text (`retold`).
"""

from collections.abc import Mapping

import numpy as np

from rlkd.core.errors import Problem
from rlkd.data.chat import HFTokenizer

SHOWN = 5  # differing ids in a message
SAMPLE = "Let x² = 3.14159; naïve “quotes”, it's\n\n\tdef f(n):  return n + 1  # 你好 🙂 2024-01-31"
OTHERWISE = (
    "take a teacher with the policy's vocabulary (its family), or a method that uses a teacher's text: ampo, luffy, "
    "sft, thinktuning"
)
Ids = Mapping[str, int]


def ids_of(tokenizer: HFTokenizer) -> dict[str, int]:
    """Every token and its id, added ones too."""
    return dict(tokenizer._tokenizer.get_vocab())


def differing(one: Ids, other: Ids) -> list[tuple[int, str | None, str | None]]:
    """(id, its token in the one, in the other), by id, where they differ; None: no token has this id.

    Empty if the maps are the same, or one is the beginning of the other: all its ids below some number.
    """
    mine, theirs = _by_id(one), _by_id(other)
    common = min(max(mine, default=-1), max(theirs, default=-1)) + 1
    ids = sorted(i for i in mine.keys() | theirs.keys() if i < common)
    found = [(i, mine.get(i), theirs.get(i)) for i in ids if mine.get(i) != theirs.get(i)]
    if not found and not common and (mine or theirs):  # one has no tokens at all
        return [(i, mine.get(i), theirs.get(i)) for i in sorted(mine.keys() | theirs.keys())]
    return found


def mismatch(policy: Ids, teacher: Ids, name: str, method: str) -> Problem | None:
    """Why the teacher at the recipe's key `name` cannot give log-probs of the policy's tokens, as `method` asks it to;
    None if it can."""
    found = differing(policy, teacher)
    if not found:
        return None
    first = "; ".join(f"{i}: {_shown(mine)} and {_shown(theirs)}" for i, mine, theirs in found[:SHOWN])
    return Problem(
        "RLKD-C710",
        f"{method} asks {name} for log-probs, but {len(found):,} token ids mean other things to it than to the policy "
        f"(id: policy's and teacher's token): {first}",
        where=f"{name}.path",
        fix=OTHERWISE,
    )


def retold(policy: HFTokenizer, teacher: HFTokenizer, name: str, method: str) -> Problem | None:
    """Why tokenizers with the same map are not the same: other merges, normalisation or decoding, which show in a
    sample text. The teacher would be asked about runs of tokens that it has never read. None if they agree."""
    mine, theirs = (t.encode_many([SAMPLE], special=False)[0] for t in (policy, teacher))
    if np.array_equal(mine, theirs):
        if policy.decode(mine) == teacher.decode(mine):
            return None
        how = f"reads the policy's tokens of a sample text as {teacher.decode(mine)!r}"
    else:
        n = min(len(mine), len(theirs))
        first = int(np.argmin([*(mine[:n] == theirs[:n]), False]))
        how = (
            f"writes a sample text in other tokens, from place {first} on: "
            f"{mine[first : first + SHOWN].tolist()} are the policy's, {theirs[first : first + SHOWN].tolist()} its own"
        )
    return Problem(
        "RLKD-C710",
        f"{method} asks {name} for log-probs; its token ids mean what the policy's do, but it {how}",
        where=f"{name}.path",
        fix=OTHERWISE,
    )


def _by_id(ids: Ids) -> dict[int, str]:
    return {i: token for token, i in ids.items()}


def _shown(token: str | None) -> str:
    return "nothing" if token is None else repr(token)
