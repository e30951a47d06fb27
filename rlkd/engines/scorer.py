"""A frozen model that scores: the reference, or a teacher. Packed like the learner, prompts computed once, no gradient.

Calls are computed one after the other, in a thread of their own; what a call shares is found by looking: the longest
beginning that all its sequences have in common.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32, Int32
from torch import Tensor

from rlkd.core.batch import MicroBatch, Totals, microbatch
from rlkd.core.errors import DataError
from rlkd.core.ports import WeightRef
from rlkd.core.prefix import layout
from rlkd.core.types import Origin, Sample, TopK
from rlkd.engines.agreement import check_agreement
from rlkd.engines.model import ModelOptions, Policy

Sequences = Sequence[Int32[np.ndarray, "_"]]


@dataclass(frozen=True)
class ScorerOptions:
    """How a scorer is made; names as in the recipe's `model` and `reference`."""

    path: str
    context: int | None = None  # longest sequence; None: what the model's config says
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["auto", "sdpa", "flash"] = "auto"
    trust_remote_code: bool = False
    temperature: float = 1.0  # of the sampler, so that policy and scorer are compared at the same one
    head_rows: int = 128
    max_tokens: int = 16384  # computed in one forward pass
    threads: int | None = None


HEAD_CHUNKS = 8  # of head_rows rows each: so many the head computes between two signs of progress


class Scored:
    """Tokens scored since the start. A forward pass counts by parts, a module of the trunk or some rows of the head
    each: one over many tokens may take minutes on a CPU, and must not look as if it hung."""

    def __init__(self) -> None:
        self.tokens = self._whole = self._each = 0.0

    def begin(self, tokens: int, parts: int) -> None:
        self._whole, self._each = self.tokens + tokens, tokens / parts

    def part(self, *_: Any) -> None:
        """A part is computed. It is also a forward hook of modules."""
        self.tokens = min(self.tokens + self._each, self._whole)

    def end(self) -> None:
        self.tokens = self._whole


class Scorer:
    """`start` it before use. A worker may call its async methods at any time; they queue."""

    def __init__(self, options: ScorerOptions) -> None:
        self.options = options
        self._thread = ThreadPoolExecutor(1, "scorer")
        self._busy = 0
        self._scored = Scored()

    @classmethod
    def create(cls, **options: Any) -> "Scorer":
        """With ScorerOptions given by name: how workers make engines."""
        return cls(ScorerOptions(**options))

    def start(self) -> None:
        """Load the model. PreflightError if it cannot be loaded."""
        self._thread.submit(self._load).result()

    def _load(self) -> None:
        o = self.options
        if o.threads:
            torch.set_num_threads(o.threads)
        model = ModelOptions(
            o.path, o.dtype, o.device, o.attention, o.trust_remote_code, o.temperature, o.head_rows
        )  # fmt: skip
        self.policy = Policy.load(model).requires_grad_(False)
        check_agreement(self.policy)
        trunk = [part for part in self.policy.model.base_model.modules() if not any(part.children())]
        for part in trunk:
            part.register_forward_hook(self._scored.part)
        self._modules = len(trunk)
        config = self.policy.model.config.get_text_config()
        self.context: int = o.context or config.max_position_embeddings

    # --- what workers call

    async def logp(self, sequences: Sequences) -> list[Float32[np.ndarray, "_"]]:
        """log p(token | tokens before it); NaN at the first token, which nothing predicts."""
        return [logp for logp, _ in await self._queued(sequences, 0)]

    async def topk(self, sequences: Sequences, k: int) -> list[TopK]:
        """The k likeliest tokens at each place, likeliest first; at the first token ids are 0 and log-probs NaN."""
        return [top for _, top in await self._queued(sequences, k)]

    async def load(self, ref: WeightRef) -> str:
        raise ValueError("a scorer is frozen: it takes no weights")

    async def abort(self) -> int:
        return 0  # nothing is written here

    def status(self) -> tuple[int, str, int]:
        """(version 0, no digest, sequences under way)."""
        return 0, "", self._busy

    @property
    def written(self) -> int:
        """Tokens scored since the start: what grows while the scorer gets anywhere."""
        return int(self._scored.tokens)

    async def _queued(self, sequences: Sequences, k: int) -> list[tuple[np.ndarray, TopK]]:
        self._busy += len(sequences)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self.score, sequences, k)
        finally:
            self._busy -= len(sequences)

    # --- the work

    @torch.inference_mode()
    def score(self, sequences: Sequences, k: int = 0) -> list[tuple[Float32[np.ndarray, "_"], TopK]]:
        """(log-probs [n], the k likeliest [n k]) of each sequence. DataError for one that cannot be scored."""
        for tokens in sequences:
            self._check(tokens)
        shared = common_beginning(sequences)
        scored: list[tuple[np.ndarray, TopK]] = []
        for part in self._parts(sequences, shared):
            scored += self._score(part, shared, k)
        return scored

    def _check(self, tokens: Int32[np.ndarray, "_"]) -> None:
        largest = min(self.context, self.options.max_tokens)
        vocabulary = self.policy.vocabulary
        if 0 < len(tokens) <= largest and tokens.min() >= 0 and tokens.max() < vocabulary:
            return
        what = f"a sequence of {len(tokens)} tokens"
        if len(tokens):
            what += f", ids {tokens.min()} … {tokens.max()}"
        raise DataError(
            "RLKD-D610",
            f"{what} cannot be scored: 1 … {largest} tokens with ids below {vocabulary} can",
            where=self.options.path,
            fix="it must share the policy's vocabulary; for longer sequences raise its max_tokens and model.context",
        )

    def _parts(self, sequences: Sequences, shared: int) -> Iterator[list[Int32[np.ndarray, "_"]]]:
        """Runs of sequences of which one forward pass computes at most max_tokens."""
        part: list[np.ndarray] = []
        cost = shared
        for tokens in sequences:
            own = len(tokens) - shared
            if part and cost + own > self.options.max_tokens:
                yield part
                part, cost = [], shared
            part.append(tokens)
            cost += own
        if part:
            yield part

    def _score(self, part: Sequences, shared: int, k: int) -> list[tuple[np.ndarray, TopK]]:
        """One forward pass. Each (state, next token) is asked for once, however many sequences share it."""
        x = _as_batch(part, shared).to(next(self.policy.parameters()).device)
        where = layout(x)
        self._scored.begin(len(x.tokens), self._modules + self._pieces(len(where.computed)) * (2 if k else 1))
        hidden = self.policy.hidden(x.tokens, where)
        source = where.source.to(hidden.device)
        asked = (source >= 0).nonzero()[:, 0]
        logp = torch.full((len(x.tokens),), torch.nan, device=hidden.device)
        pairs = source[asked] * self.policy.vocabulary + x.tokens[asked]
        distinct, back = pairs.unique(return_inverse=True)
        states = hidden.index_select(0, distinct // self.policy.vocabulary)
        logp[asked] = self._by_rows(self.policy.logp, states, distinct % self.policy.vocabulary)[0][back].float()
        ids, likeliest = self._likeliest(hidden, source, k)
        self._scored.end()
        ends = np.cumsum([len(s) for s in part])[:-1]
        rows = (np.split(a.cpu().numpy(), ends) for a in (logp, ids, likeliest))
        return [(own, TopK(i, p)) for own, i, p in zip(*rows, strict=True)]

    def _likeliest(self, hidden: Tensor, source: Tensor, k: int) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(source), k, dtype=torch.int32, device=hidden.device)
        logp = torch.full((len(source), k), torch.nan, device=hidden.device)
        if k:
            asked = (source >= 0).nonzero()[:, 0]
            states, back = source[asked].unique(return_inverse=True)
            found, likely = self._by_rows(lambda h: self.policy.likeliest(h, k), hidden.index_select(0, states))
            ids[asked], logp[asked] = found[back].int(), likely[back].float()
        return ids, logp

    def _by_rows(self, ask: Callable[..., Any], *rows: Tensor) -> list[Tensor]:
        """What `ask` answers to these rows (a tensor or several), asked piece by piece, each a sign of progress."""
        answers = []
        for piece in zip(*(r.split(self._piece) for r in rows), strict=True):
            answer = ask(*piece)
            answers.append(answer if isinstance(answer, tuple) else (answer,))
            self._scored.part()
        return [torch.cat(parts) for parts in zip(*answers, strict=True)]

    @property
    def _piece(self) -> int:
        return HEAD_CHUNKS * self.options.head_rows

    def _pieces(self, rows: int) -> int:
        return -(-rows // self._piece)


def common_beginning(sequences: Sequences) -> int:
    """How many leading tokens all sequences share; none for a single one, which has nobody to share them with."""
    if len(sequences) < 2:
        return 0
    n = min(len(s) for s in sequences)
    differ = np.any([s[:n] != sequences[0][:n] for s in sequences], axis=0)
    return int(differ.argmax()) if differ.any() else n


def _as_batch(sequences: Sequences, shared: int) -> MicroBatch:
    samples = []
    for tokens in sequences:
        origin = np.repeat(np.array([Origin.PROMPT, Origin.TEACHER], np.uint8), [shared, len(tokens) - shared])
        samples.append(Sample(tokens.astype(np.int32), origin, np.full(len(tokens), np.nan, np.float32), (0, 0)))
    return microbatch(samples, [0] * len(samples), Totals.of(samples))
