"""Whether two tokenizers mean the same by their token ids, which is what log-probs of another model need.

Compared are the maps from token to id, not their sizes: the same words are padded to different sizes (151,936 and
152,064 rows), and different words may have the same size.
"""

from collections.abc import Mapping

from rlkd.core.errors import Problem
from rlkd.data.chat import HFTokenizer

SHOWN = 5  # differing ids in a message
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
        fix="take a teacher with the policy's vocabulary (its family), or a method that uses a teacher's text: ampo, "
        "luffy, sft, thinktuning",
    )


def _by_id(ids: Ids) -> dict[int, str]:
    return {i: token for token, i in ids.items()}


def _shown(token: str | None) -> str:
    return "nothing" if token is None else repr(token)
