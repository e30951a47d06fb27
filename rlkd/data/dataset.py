"""From a source to prompts: read, check, tokenise, measure. No prompt is cut or left out unseen.

A row goes through three stages, and the funnel counts them: read → valid (a prompt, an answer, an id of its own, taken
by the chat template) → fit (at most `Rules.max_prompt_tokens`).
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

import numpy as np
from jaxtyping import Int32

from rlkd.core.errors import ConfigError
from rlkd.core.types import Demonstration, Prompt
from rlkd.data.chat import HFTokenizer, Message, TemplateRefusal
from rlkd.data.demonstrations import Demonstrations, digest_of
from rlkd.data.funnel import Funnel, TakenId, Tally, empty_error, rows_error, too_long_error
from rlkd.data.rows import BadRow, Columns, Question, question
from rlkd.data.sources import Opened, SourceSettings, opened

BATCH = 1024  # prompts tokenised at once
CUTS = 8  # tries to cut a prompt: what is left may be other tokens than it was

Tokenised = tuple[Question, str, Int32[np.ndarray, "_"]]  # with the text that the tokens were made of
TooLongRule = Literal["drop", "fail", "truncate_left"]


@dataclass(frozen=True)
class Rules:
    """What becomes of rows."""

    max_prompt_tokens: int
    too_long: TooLongRule = "drop"
    bad_rows: Literal["fail", "drop"] = "fail"
    max_bad_fraction: float = 0.1  # with drop
    chat: bool = True  # put prompts through the chat template
    system: str | None = None  # a system message before every prompt that does not bring its own
    max_answer_tokens: int | None = None  # of a demonstration, its end token included; None: no limit


@dataclass(frozen=True)
class Dataset:
    """At least one prompt, in the source's order, each with an id of its own."""

    prompts: tuple[Prompt, ...]
    fingerprint: str  # of ids, tokens, answers, metadata, demonstrations: the same in every process
    funnel: Funnel
    warnings: tuple[str, ...] = ()


def load(source: SourceSettings, tokenizer: HFTokenizer, rules: Rules, setting: str = "data.train") -> Dataset:
    """The source's prompts; `setting` is how messages call it.

    Raises ConfigError (settings), DataError (all bad rows or duplicate ids at once; nothing left), PreflightError (no
    chat template).
    """
    if rules.chat:
        tokenizer.require_chat()
    elif rules.system is not None:
        raise ConfigError(
            "RLKD-C404",
            "a system message needs the chat template, but data.chat is off",
            where="model.system",
            fix="say data.chat=true, or leave model.system out",
        )
    found = opened(source, setting)
    worked = Demonstrations(tokenizer, found.columns.demonstrations, source.traces, rules.max_answer_tokens)
    if rules.bad_rows == "fail":
        worked.check_rows(f"{setting}.traces ({source.traces})")
    return _Reading(tokenizer, rules, found, setting, worked).dataset(source.path or source.kind)


@dataclass
class _Reading:
    """One pass over a source's rows."""

    tokenizer: HFTokenizer
    rules: Rules
    source: Opened
    setting: str
    worked: Demonstrations
    tally: Tally = field(init=False)
    ids: dict[str, str] = field(default_factory=dict)  # id → where it was first
    taken: list[TakenId] = field(default_factory=list)
    numbered: int = 0
    unknown: int = 0  # prompts with something the tokenizer has no token for

    def __post_init__(self) -> None:
        self.tally = Tally(self.rules.max_prompt_tokens)

    def dataset(self, path: str) -> Dataset:
        kept: list[Prompt] = []
        where: list[str] = []
        digest = hashlib.blake2b(digest_size=16)
        for batch in self._tokenised():
            fit = self._fitting(batch)
            helped = self.worked.of_batch([(asked, text) for asked, text, _ in fit])
            for (asked, _, tokens), demonstrations in zip(fit, helped, strict=True):
                kept.append(self._prompt(asked, tokens, demonstrations))
                where.append(asked.where)
                for part in (asked.id.encode(), tokens.tobytes(), asked.digest, *digest_of(demonstrations)):
                    digest.update(hashlib.blake2b(part, digest_size=16).digest())
        funnel = replace(self.tally.funnel(), demonstrations=self.worked.kept, helped=self.worked.helped)
        self._check(funnel, f"{self.setting} ({path})")
        warnings = [*funnel.lines(), *self.worked.lines(), *self._warnings(len(kept)), *_repeated(kept, where)]
        return Dataset(tuple(kept), digest.hexdigest(), funnel, tuple(f"{self.setting}: {w}" for w in warnings))

    def _prompt(
        self, asked: Question, tokens: Int32[np.ndarray, "p"], demonstrations: tuple[Demonstration, ...]
    ) -> Prompt:
        if self.tokenizer.unknown is not None and self.tokenizer.unknown in tokens:
            self.unknown += 1
        return Prompt(
            id=asked.id,
            tokens=tokens,
            answer=asked.answer,
            text=asked.text,
            messages=self._messages(asked),
            demonstrations=demonstrations,
            metadata=asked.metadata,
            source=self.source.name,
        )

    def _questions(self) -> Iterator[Question]:
        """The usable rows; the others are counted. Ids are compared before anything else is asked of a prompt."""
        for row in self.source.rows:
            self.tally.read += 1
            asked = row if isinstance(row, BadRow) else question(row, self.source.columns, self.source.name)
            if isinstance(asked, BadRow):
                self.tally.reject(asked)
                continue
            first = self.ids.setdefault(asked.id, asked.where)
            if first != asked.where:
                self.taken.append(TakenId(asked.id, first, asked.where))
            self.numbered += asked.numbered
            yield asked

    def _tokenised(self) -> Iterator[list[Tokenised]]:
        """Questions, batch by batch, with the text their tokens were made of."""
        for batch in _batches(self._questions(), BATCH):
            if self.rules.chat:
                rendered = [(asked, text) for asked in batch if (text := self._render(asked)) is not None]
            else:
                rendered = [(asked, asked.text) for asked in batch if self._plain(asked)]
            tokens = self.tokenizer.encode_many([text for _, text in rendered], special=not self.rules.chat)
            for (asked, _), ids in zip(rendered, tokens, strict=True):
                if not len(ids):
                    self.tally.reject(BadRow(asked.where, "no tokens", "the tokenizer makes no token of the prompt"))
            yield [(asked, text, ids) for (asked, text), ids in zip(rendered, tokens, strict=True) if len(ids)]

    def _fitting(self, batch: Sequence[Tokenised]) -> list[Tokenised]:
        """Those that are short enough, and those that were made so."""
        fit = []
        for one in batch:
            where, length, cut = one[0].where, len(one[2]), None
            if self.tally.measure(length):
                fit.append(one)
                continue
            if self.rules.too_long == "truncate_left":
                cut = self._cut(one[0], length - self.rules.max_prompt_tokens)
            self.tally.is_long(where, length, cut is not None)
            if cut is not None:
                fit.append(cut)
        return fit

    def _cut(self, asked: Question, over: int) -> Tokenised | None:
        """The question without its first `over` tokens, or a few more; the chat template stands whole around it. None
        if too little would be left, and for a row's own list of messages: which of them to cut is not for us to say."""
        if asked.messages is not None:
            return None
        ids, places = self.tokenizer.spans(asked.text)
        for _ in range(CUTS):
            if over >= len(ids):
                return None
            shorter = replace(asked, text=asked.text[places[over][0] :])
            try:
                text = self.tokenizer.render(self._messages(shorter)) if self.rules.chat else shorter.text
            except TemplateRefusal:
                return None
            (tokens,) = self.tokenizer.encode_many([text], special=not self.rules.chat)
            if 0 < len(tokens) <= self.rules.max_prompt_tokens:
                return shorter, text, tokens
            over += max(1, len(tokens) - self.rules.max_prompt_tokens)
        return None

    def _messages(self, asked: Question) -> tuple[Message, ...]:
        messages = asked.messages or ({"role": "user", "content": asked.text},)
        if self.rules.system is not None and messages[0]["role"] != "system":
            messages = ({"role": "system", "content": self.rules.system}, *messages)
        return messages

    def _render(self, asked: Question) -> str | None:
        try:
            return self.tokenizer.render(self._messages(asked))
        except TemplateRefusal as refusal:
            what = f"the chat template does not take it: {str(refusal)[:200]}"
            self.tally.reject(BadRow(asked.where, "refused by the chat template", what))
            return None

    def _plain(self, asked: Question) -> bool:
        if asked.messages is None:
            return True
        what = "the prompt is a list of chat messages, but data.chat is off"
        self.tally.reject(BadRow(asked.where, "chat messages without chat", what, "say data.chat=true"))
        return False

    def _check(self, funnel: Funnel, where: str) -> None:
        share = 0.0 if self.rules.bad_rows == "fail" else self.rules.max_bad_fraction
        error = rows_error(funnel, self.taken, where, share)
        if error is not None:
            raise error
        if funnel.valid > funnel.fit and self.rules.too_long == "fail":
            raise too_long_error(funnel, where)
        if not funnel.fit:
            raise empty_error(funnel, where)
        self.worked.check(where)

    def _warnings(self, kept: int) -> Iterator[str]:
        column = self.source.columns.id
        if column != Columns().id and self.numbered:
            yield f"{self.numbered:,} rows have no id in `{column}`, and were numbered"
        if self.unknown:
            yield f"{self.unknown:,} of {kept:,} prompts hold characters that the tokenizer does not know"


def _batches(questions: Iterable[Question], size: int) -> Iterator[list[Question]]:
    iterator = iter(questions)
    while batch := list(islice(iterator, size)):
        yield batch


def _repeated(prompts: Sequence[Prompt], where: Sequence[str]) -> list[str]:
    """A warning if the same tokens are asked more than once."""
    first: dict[bytes, str] = {}
    again = []
    for prompt, place in zip(prompts, where, strict=True):
        before = first.setdefault(prompt.tokens.tobytes(), place)
        if before != place:
            again.append((place, before))
    if not again:
        return []
    return [f"{len(again):,} of {len(prompts):,} prompts repeat an earlier one, as {again[0][0]} repeats {again[0][1]}"]
