"""Tasks of the reasoning-gym package, scored by the package itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rlkd.core.types import Answer, Prompt
from rlkd.rewards.extract import tagged


@dataclass(frozen=True)
class ReasoningGym:
    """The score in [0, 1] that the prompt's own task gives. It needs `metadata["reasoning_gym"]` = {"task", "entry"}
    of the data row, as rlkd's generator writes it; ValueError without.

    Scored is the last `<answer>…</answer>` if there is one, else the whole text; `tag: ""` always takes the whole.

    The scorers of four tasks (reasoning-gym 0.1.25) raise on text they cannot read. Such an answer scores 0, as an
    answer that cannot be read does elsewhere, if the scorer can score the row's own answer; if not, the row is at
    fault, and the exception stands.
    """

    weight: float = 1.0
    tag: str = "answer"

    def prepare(self) -> None:
        import reasoning_gym  # noqa: F401  # 1.2 s, once, before children are forked

    def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[float | None]:
        row = prompt.metadata.get("reasoning_gym")
        if not isinstance(row, Mapping) or "task" not in row or "entry" not in row:
            raise ValueError(
                f"prompt {prompt.id!r} has no metadata['reasoning_gym'] with 'task' and 'entry': "
                "the reward reasoning_gym goes with data of kind reasoning_gym"
            )
        judge = _scorer(row["task"])
        return [_score(judge, self._answer(a.text), row["entry"]) for a in answers]

    def _answer(self, text: str) -> str:
        inside = tagged(text, self.tag) if self.tag else None
        return (text if inside is None else inside).strip()


Scorer = Callable[[str, Mapping[str, Any]], float]


def _score(judge: Scorer, text: str, entry: Mapping[str, Any]) -> float:
    try:
        return float(judge(text, entry))
    except Exception:
        judge(str(entry.get("answer") or ""), entry)  # raises too if it is the row that cannot be scored
        return 0.0


@lru_cache(maxsize=256)
def _scorer(task: str) -> Scorer:
    from reasoning_gym import get_score_answer_fn

    scorer: Scorer = get_score_answer_fn(task)
    return scorer
