"""Worked answers that come with the prompts, from a column of theirs or from a file of traces: text → tokens.

A demonstration continues its prompt: the policy's own tokens of the text, without BOS, and the policy's end token
once. It is whole or not there: nothing is cut. What cannot be used is left out, counted and told. One that fits into
sampler.max_tokens also fits beside its prompt: prompts leave that much of the context free.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from rlkd.core.errors import DataError, Problem
from rlkd.core.types import Demonstration
from rlkd.data import files
from rlkd.data.chat import HFTokenizer
from rlkd.data.funnel import LISTED, counted
from rlkd.data.rows import BadRow, Question, Worked, trace

THINK = "<think>\n"
RIGHT = 0.5  # a trace that was written down with its reward is right above this
# How the texts of common models end, where whoever wrote them down left that in.
ENDS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", "<end_of_turn>", "<|end|>",
    "<|return|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>",
)  # fmt: skip


def cleaned(text: str, prompt: str, ends: Sequence[str] = ENDS) -> str:
    """The text without end marks at its end, and without an opening `<think>` that the rendered prompt ends with."""
    while (mark := next((e for e in ends if e and text.rstrip().endswith(e)), None)) is not None:
        text = text.rstrip()[: -len(mark)]
    return text[len(THINK) :] if prompt.endswith(THINK) and text.startswith(THINK) else text


def digest_of(demonstrations: Sequence[Demonstration]) -> list[bytes]:
    """What a dataset's fingerprint takes of a prompt's demonstrations; nothing without any."""
    parts = [(d.teacher, d.tokens.tobytes(), repr(d.quality)) for d in demonstrations]
    return [repr(parts).encode()] if parts else []


@dataclass
class Demonstrations:
    """Makes the demonstrations of a source's prompts, and counts what becomes of them.

    DataError if `path` is no file of traces.
    """

    tokenizer: HFTokenizer
    column: str | None = None  # of the source
    path: str | None = None  # of a file of traces: {id, teacher, text, quality} a line
    max_tokens: int | None = None  # of a demonstration, its end token included
    traces: dict[str, list[Worked]] = field(default_factory=dict)  # by prompt id; given away as prompts come
    bad: list[BadRow] = field(default_factory=list)  # rows of the file of traces: the first of them
    bad_rows: int = 0
    wrong: int = 0  # traces that were written down as wrong or cut
    found: int = 0  # of prompts that fit
    kept: int = 0
    helped: int = 0  # prompts with at least one
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # where the first of each kind was
    first_prompt: str | None = None  # its id

    def __post_init__(self) -> None:
        stops = [np.array([t], np.int32) for t in self.tokenizer.stop_tokens]
        self.ends = tuple(dict.fromkeys([*(self.tokenizer.decode(t, special=True) for t in stops), *ENDS]))
        if self.path is not None:
            self._read(Path(os.path.expanduser(self.path)))

    def _read(self, path: Path) -> None:
        """Of several rows with the same text the last counts: rlkd writes a text again once it is judged."""
        last: dict[tuple[str, str, str], Worked | None] = {}
        for row in files.jsonl(path):
            made = row if isinstance(row, BadRow) else trace(row)
            wrong = not isinstance(row, BadRow) and _written_as_wrong(row.values)
            if not isinstance(made, BadRow):
                name, worked = made
                last[name, worked.teacher, worked.text] = None if wrong else worked
            elif wrong:
                self.wrong += 1  # and without a text
            else:
                self.bad_rows += 1
                self.bad += [made] if len(self.bad) < LISTED else []
        for (name, _, _), kept in last.items():
            if kept is None:
                self.wrong += 1
            else:
                self.traces.setdefault(name, []).append(kept)

    def of_batch(self, batch: Sequence[tuple[Question, str]]) -> list[tuple[Demonstration, ...]]:
        """Those of each question; beside it stands the text that its prompt's tokens were made of."""
        texts: list[tuple[int, Worked, str]] = []
        for i, (asked, rendered) in enumerate(batch):
            self.first_prompt = self.first_prompt or asked.id
            for worked in (*asked.demonstrations, *self.traces.pop(asked.id, ())):
                texts.append((i, worked, cleaned(worked.text, rendered, self.ends)))
        made: list[list[Demonstration]] = [[] for _ in batch]
        encoded = self.tokenizer.encode_many([text for _, _, text in texts], special=False)
        for (i, worked, _), ids in zip(texts, encoded, strict=True):
            why_not = self.why_not(ids)
            if why_not is None:
                tokens = np.append(ids, self.tokenizer.eos).astype(np.int32)
                made[i].append(Demonstration(worked.teacher, tokens, worked.quality))
            else:
                self.left_out[why_not] += 1
                self.examples.setdefault(why_not, worked.where)
        self.found += len(texts)
        self.kept += sum(len(m) for m in made)
        self.helped += sum(bool(m) for m in made)
        return [tuple(m) for m in made]

    def why_not(self, ids: Int32[np.ndarray, "_"]) -> str | None:
        """Why these tokens make no demonstration; None if they do."""
        if not len(ids):
            return "nothing but an end mark"
        if np.isin(ids, self.tokenizer.stop_tokens).any():
            return "an end token in the middle"
        if self.tokenizer.unknown is not None and self.tokenizer.unknown in ids:
            return "characters that the tokenizer does not know"
        if self.max_tokens is not None and len(ids) + 1 > self.max_tokens:
            return f"over {self.max_tokens:,} tokens"
        return None

    def lines(self) -> Iterator[str]:
        """What was left out, each kind with its count and first example."""
        if self.bad:
            first = f"as {self.bad[0].where}: {self.bad[0].what}"
            yield f"{counted(self.bad_rows, 'row')} of the file of traces left out, {first}"
        if self.wrong:
            yield f"{counted(self.wrong, 'trace')} left out: {self.path} says that they are wrong or were cut"
        for why_not, count in self.left_out.items():
            yield f"{counted(count, 'demonstration')} left out: {why_not}, as {self.examples[why_not]}"
        nobodys = [worked for several in self.traces.values() for worked in several]
        if nobodys:
            yield f"{counted(len(nobodys), 'trace')} of no prompt here, as {nobodys[0].where}"

    def check_rows(self, where: str) -> None:
        """DataError if the file of traces has rows that are no traces."""
        if not self.bad:
            return
        listed = f"; the first {LISTED} follow" if self.bad_rows > LISTED else ""
        head = Problem(
            "RLKD-D130",
            f"{counted(self.bad_rows, 'row')} of the file of traces cannot be used{listed}",
            where,
            'a row is {"id": …, "teacher": …, "text": …}; mend them, or leave them out with data.bad_rows=drop',
        )
        raise DataError.of([head, *(Problem("RLKD-D131", bad.what, bad.where, bad.fix) for bad in self.bad)])

    def check(self, where: str) -> None:
        """DataError if demonstrations were asked for and no prompt has one."""
        if self.kept or (self.column is None and self.path is None):
            return
        if self.found:
            what = f"none of {counted(self.found, 'demonstration')} can be used"
            fix = "; ".join(self.lines())
        else:
            what = "no prompt has a demonstration"
            fix = f"is `{self.column}` the column that holds them?" if self.column else self._other_ids()
        raise DataError("RLKD-D132", what, where, fix)

    def _other_ids(self) -> str:
        if not self.traces:
            return f"{self.path} has no trace that could be used"
        theirs = next(iter(self.traces))
        return f"traces are joined by id, and theirs (`{theirs}`) are not those of the prompts (`{self.first_prompt}`)"


def _written_as_wrong(values: Mapping[str, object]) -> bool:
    """Whether a trace came with a reward that is not right, or was cut before its end."""
    reward = values.get("reward")
    return values.get("finish") not in (None, "stop") or (isinstance(reward, int | float) and not reward > RIGHT)
