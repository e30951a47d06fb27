"""Feedback of a teacher, put behind the student's own answer (ThinkTuning).

For each prompt k of the finished answers are chosen, whatever their reward. A teacher writes what it thinks of each and
how it would go on; that text takes the place of the answer's end:

    prompt · student's tokens without the end token · separator · reason · separator · phrase · end token

The row is judged again as a whole. Any step that fails leaves the student's row as it was, and is reported: feedback
not in the asked form, too long, with an end token inside; a row over its limit; one that nobody could judge. A lost
writer is not such a failure: WorkerLost goes to the loop, which asks the whole stage again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from rlkd.core.errors import ConfigError
from rlkd.core.ports import Knobs, Services, Tokenizer, Writer, Written
from rlkd.core.together import together
from rlkd.core.types import Finish, Group, Origin, Prompt, Sample
from rlkd.guidance import feedback_form, splice
from rlkd.guidance.feedback_prompts import FeedbackPrompts, load
from rlkd.guidance.teaching import how_many

PCT = "feedback_pct"  # the knob: share of a prompt's finished answers that get feedback
STREAM = 2  # of prompt.seed: which rows, and their seeds


@dataclass(frozen=True)
class Feedback:
    """`form: worked` is rlkd's own simplification for teachers that cannot follow the asked form: the teacher is asked
    the question itself, sees no answer of the student, and its whole text is the phrase."""

    teacher: str | None = None  # the name of the one that writes; None: the first
    form: Literal["tagged", "worked"] = "tagged"
    prompts: str | None = None  # a yaml file that replaces texts, tags and examples (feedback_prompts.py)
    separator: str = "\n\n"
    max_feedback_tokens: int = 512  # of the teacher's text in the student's tokens; what is beyond is cut off
    max_tokens: int | None = None  # of the answer with feedback; None: sampler.max_tokens
    over_long: Literal["leave", "cut"] = "leave"  # a row over max_tokens: left as it was, or cut, end token and all
    mask_scope: Literal["guide_only", "row"] = "guide_only"  # what counts as TEACHER: the feedback, or the whole answer
    continue_after: bool = False  # the student writes on after the feedback

    def problems(self) -> list[str]:
        found = []
        if self.max_feedback_tokens < 1:
            found.append(f"max_feedback_tokens={self.max_feedback_tokens} must be at least 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            found.append(f"max_tokens={self.max_tokens} must be at least 1, or null for that of the sampler")
        if self.over_long == "cut" and self.max_tokens is None:
            found.append("over_long=cut needs max_tokens")
        if self.continue_after and self.mask_scope == "row":
            found.append("mask_scope=row counts the whole answer as the teacher's, which continue_after contradicts")
        try:
            load(self.prompts)
        except ConfigError as e:
            found.append(f"prompts={self.prompts}: {e.problems[0].what}")
        return found

    async def __call__(self, group: Group, ask: Services, knobs: Knobs) -> Group:
        if not knobs[PCT] or not group.samples:
            return group
        if ask.tokenizer is None:
            raise ValueError("feedback is spliced in as the policy's tokens, and there is no tokenizer")
        places, seeds = self.chosen(group, ask.tokenizer, knobs[PCT])
        if not places:
            return group
        writer = self.writer(ask)
        work = [self._row(group, i, seed, writer, ask) for i, seed in zip(places, seeds, strict=True)]
        rows = {i: row for i, row in zip(places, await together(work), strict=True) if row is not None}
        if not rows:
            return group
        helped = {}
        for i, judged in zip(rows, await ask.verify(group.prompt, tuple(rows.values())), strict=True):
            if np.isnan(judged.reward):
                ask.report("feedback", _stays(group.prompt, i, "nobody could judge it with the feedback"))
            else:
                helped[i] = judged
        samples = tuple(helped.get(i, s) for i, s in enumerate(group.samples))
        return replace(group, samples=samples, replaced=(*group.replaced, *(group.samples[i] for i in helped)))

    def chosen(self, group: Group, tokenizer: Tokenizer, pct: float) -> tuple[list[int], list[int]]:
        """k = max(1, ⌊E·pct⌋) of the E finished answers, uniform without replacement; their places, and a seed each."""
        finished = [i for i, s in enumerate(group.samples) if splice.is_finished(s, tokenizer.eos)]
        rng = np.random.default_rng([group.prompt.seed, STREAM])
        k = how_many(len(finished), pct)
        places = sorted(finished[i] for i in rng.choice(len(finished), k, replace=False)) if k else []
        return places, rng.integers(2**63, size=k).tolist()

    def writer(self, ask: Services) -> Writer:
        """The teacher that writes. ConfigError if there is none, or none of that name."""
        name = self.teacher if self.teacher is not None else next(iter(ask.writers), None)
        if name is not None and name in ask.writers:
            return ask.writers[name]
        what = "no teacher writes" if name is None else f"no teacher named `{name}` writes"
        known = ", ".join(ask.writers) or "none does"
        fix = f"add it to `teachers`, or name one that writes ({known})"
        raise ConfigError("RLKD-C011", what, "algorithm.guidance.teacher", fix)

    def messages(self, prompt: Prompt, sample: Sample, tokenizer: Tokenizer) -> Sequence[Mapping[str, str]]:
        """What the teacher is told: never the right answer."""
        if self.form == "worked":
            return prompt.conversation
        question = prompt.text or "\n\n".join(m["content"] for m in prompt.messages if m["role"] == "user")
        answer = sample.tokens[sample.origin != Origin.PROMPT]
        return load(self.prompts).messages(question, tokenizer.decode(answer[:-1]))

    def taken(self, written: Written, tokenizer: Tokenizer) -> tuple[str, str] | str:
        """Reason and phrase of the teacher's text; or, as one sentence, why none of it is used."""
        if written.finish != Finish.STOP:
            return "the teacher's text did not come to its end"
        kept = feedback_form.shortened(written.text, tokenizer, self.max_feedback_tokens)
        if self.form == "worked":
            whole = kept == written.text
            phrase = written.text.strip()
            return ("", phrase) if whole and phrase else "the teacher's text is empty" if whole else _CUT
        prompts: FeedbackPrompts = load(self.prompts)
        remark = feedback_form.parse(written.text, prompts.tags)
        if remark is None:
            return "the teacher's text is not of the asked form"
        remark = feedback_form.within(remark, written.text, kept, prompts.tags)
        return _CUT if remark is None else (remark.reason, remark.phrase)

    async def _row(self, group: Group, i: int, seed: int, writer: Writer, ask: Services) -> Sample | None:
        """Row i with feedback, not judged yet; None if it stays as it is, which is reported."""
        row = await self._guided(group.prompt, group.samples[i], seed, writer, ask)
        if isinstance(row, Sample):
            return row
        ask.report("feedback", _stays(group.prompt, i, row))
        return None

    async def _guided(self, prompt: Prompt, sample: Sample, seed: int, writer: Writer, ask: Services) -> Sample | str:
        """The answer with feedback; or, as one sentence, why it gets none."""
        tokenizer = ask.tokenizer
        assert tokenizer is not None
        written = await writer.write(self.messages(prompt, sample, tokenizer), seed)
        taken = self.taken(written, tokenizer)
        if isinstance(taken, str):
            return taken
        text = feedback_form.joined(taken, self.separator)
        feedback, _ = tokenizer.spans(text)
        if np.isin(feedback, [tokenizer.eos, sample.tokens[-1]]).any():
            return "the teacher's text has an end token inside"
        if not feedback_form.says(tokenizer.decode(feedback), text):
            return "the policy's tokenizer has no tokens for the teacher's text"
        if not self.continue_after:
            return self._fitted(splice.spliced(sample, feedback), ask)
        return await self._continued(splice.opened(sample, feedback), seed, ask)

    def _limit(self, ask: Services) -> int | None:
        return ask.sampling.max_tokens if self.max_tokens is None and ask.sampling is not None else self.max_tokens

    def _fitted(self, row: Sample, ask: Services) -> Sample | str:
        """A spliced row, marked as `mask_scope` says and within its limit."""
        row, limit = splice.all_guided(row) if self.mask_scope == "row" else row, self._limit(ask)
        if limit is None or row.answer_tokens <= limit:
            return row
        return splice.cut(row, limit) if self.over_long == "cut" else _TOO_LONG

    async def _continued(self, row: Sample, seed: int, ask: Services) -> Sample | str:
        """The policy writes on within what is left of the limit."""
        if ask.sampling is None:
            raise ValueError("continue_after must know how the policy is sampled (Services.sampling)")
        limit = self._limit(ask)
        assert limit is not None  # the sampler's, if no other
        left = limit - row.answer_tokens
        if left < 1:
            return _TOO_LONG
        how = replace(ask.sampling, max_tokens=left, min_tokens=0)
        return splice.continued(row, (await ask.policy.generate(row.tokens, 1, seed, how))[0])


_CUT = "what is within max_feedback_tokens of the teacher's text is of no use"
_TOO_LONG = "with the feedback it would be too long"


def _stays(prompt: Prompt, i: int, why: str) -> str:
    return f"prompt {prompt.id}, answer {i} stays as it is: {why}"
