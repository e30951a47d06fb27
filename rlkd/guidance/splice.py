"""A teacher's tokens behind a student's. Pure, on token ids: what the student wrote is never tokenised again."""

from dataclasses import replace

import numpy as np
from jaxtyping import Int32

from rlkd.core.ports import Completion
from rlkd.core.types import Finish, Origin, Sample


def is_finished(sample: Sample, eos: int) -> bool:
    """Whether the answer came to its end: exactly one end token, its last.

    A model may have several end tokens; the one that ended this answer counts, and the tokenizer's own.
    """
    answer = sample.tokens[sample.origin != Origin.PROMPT]
    if sample.finish != Finish.STOP or not len(answer):
        return False
    return not np.isin(answer[:-1], [eos, answer[-1]]).any()


def opened(sample: Sample, feedback: Int32[np.ndarray, "f"]) -> Sample:
    """The student's tokens without the end token, then the feedback's: TEACHER, behavior_logp NaN. Not judged yet."""
    return replace(
        sample,
        tokens=np.concatenate([sample.tokens[:-1], feedback]).astype(np.int32),
        origin=np.append(sample.origin[:-1], np.full(len(feedback), Origin.TEACHER)).astype(np.uint8),
        behavior_logp=np.append(sample.behavior_logp[:-1], np.full(len(feedback), np.nan)).astype(np.float32),
        reward=float("nan"),
        scores={},
    )


def spliced(sample: Sample, feedback: Int32[np.ndarray, "f"]) -> Sample:
    """A finished answer with feedback before its end token. The end token is the teacher's from then on."""
    return opened(sample, np.append(feedback, sample.tokens[-1]).astype(np.int32))


def continued(sample: Sample, completion: Completion) -> Sample:
    """What the policy wrote on behind an opened sample: POLICY, with its behavior_logp."""
    versions = (sample.versions, completion.versions)
    return replace(
        sample,
        tokens=np.concatenate([sample.tokens, completion.tokens]).astype(np.int32),
        origin=np.append(sample.origin, np.full(len(completion.tokens), Origin.POLICY)).astype(np.uint8),
        behavior_logp=np.concatenate([sample.behavior_logp, completion.logp]).astype(np.float32),
        versions=(min(v[0] for v in versions), max(v[1] for v in versions)),
        finish=completion.finish,
    )


def all_guided(sample: Sample) -> Sample:
    """Every token after the prompt counts as the teacher's."""
    written = sample.origin != Origin.PROMPT
    return replace(
        sample,
        origin=np.where(written, Origin.TEACHER, sample.origin).astype(np.uint8),
        behavior_logp=np.where(written, np.nan, sample.behavior_logp).astype(np.float32),
    )


def cut(sample: Sample, answer_tokens: int) -> Sample:
    """The first `answer_tokens` tokens of the answer; finish LENGTH, for its end token is gone."""
    n = len(sample.tokens) - sample.answer_tokens + answer_tokens
    return replace(
        sample,
        tokens=sample.tokens[:n],
        origin=sample.origin[:n],
        behavior_logp=sample.behavior_logp[:n],
        finish=Finish.LENGTH,
    )
