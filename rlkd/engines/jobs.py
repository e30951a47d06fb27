"""What is asked of an engine, and what it can be asked."""

import json
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32

from rlkd.core.errors import DataError, PreflightError
from rlkd.core.ports import Sampling


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is made; the names are those of the recipe's `model` and `sampler`."""

    path: str
    context: int | None = None  # tokens of prompt + answer; None: what the model's config says
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trust_remote_code: bool = False
    max_num_seqs: int = 256
    tensor_parallel: int = 1
    kv_cache_gib: float = 1.0
    gpu_memory_utilization: float = 0.5
    block_size: int | None = None
    prefix_caching: bool = True
    enforce_eager: bool | None = None
    threads: int | None = None  # None: what OMP_NUM_THREADS says

    def check(self) -> None:
        """PreflightError if `path` is no model folder, or the model's context is shorter than `context`."""
        config = Path(self.path) / "config.json"
        if not config.is_file():
            raise PreflightError(
                "RLKD-E605",
                "this is no model: it has no config.json",
                where=self.path,
                fix="model.path must be a Hugging Face folder; `rlkd model get` makes one",
            )
        content = json.loads(config.read_text())
        longest = content.get("text_config", content).get("max_position_embeddings")
        if self.context is not None and longest is not None and self.context > longest:
            raise PreflightError(
                "RLKD-E606",
                f"model.context={self.context} is more than the {longest} tokens this model was made for",
                where=str(config),
                fix=f"model.context={longest} at most",
            )


@dataclass(eq=False)
class Job:
    """Something asked of the model in `count` independent parts; the future is done when all are."""

    id: int
    count: int
    future: "Future[list[Any]]" = field(default_factory=Future)
    results: dict[int, Any] = field(default_factory=dict)

    def finish(self, part: int, result: Any) -> bool:
        """Keep one part's result; True with the last one."""
        self.results[part] = result
        if len(self.results) < self.count:
            return False
        with suppress(InvalidStateError):  # the caller may have given up in this very moment
            self.future.set_result([self.results[k] for k in range(self.count)])
        return True


@dataclass(eq=False, kw_only=True)
class Writing(Job):
    """`count` samples after one prompt. Parts are Completions."""

    tokens: list[int]
    seeds: list[int]
    sampling: Sampling


@dataclass(eq=False, kw_only=True)
class Scoring(Job):
    """The log-probs of whole sequences, and those of the k likeliest tokens. Parts are (logp, TopK)."""

    sequences: list[list[int]]
    k: int


@dataclass(frozen=True)
class Limits:
    """What fits into a model."""

    path: str  # of the model, for messages
    context: int  # tokens of prompt + answer
    vocabulary: int
    scored: int  # tokens of a sequence that is scored

    def check(self, tokens: Int32[np.ndarray, "_"]) -> None:
        """DataError unless these tokens can be given to the model."""
        if len(tokens) == 0:
            raise DataError(
                "RLKD-D601", "an empty sequence was given to the model", fix="prompts need at least a token"
            )
        if tokens.min() < 0 or tokens.max() >= self.vocabulary:
            raise DataError(
                "RLKD-D602",
                f"token {int(tokens.min() if tokens.min() < 0 else tokens.max())} is not in the model's vocabulary of "
                f"{self.vocabulary}",
                where=self.path,
                fix="prompts must be written with this model's own tokenizer",
            )

    def check_scoring(self, tokens: Int32[np.ndarray, "_"]) -> None:
        """DataError unless this sequence can be scored."""
        self.check(tokens)
        if len(tokens) > self.scored:
            raise self._too_long(f"a sequence of {len(tokens)} tokens to be scored", self.scored)

    def check_sampling(self, tokens: Int32[np.ndarray, "_"], n: int, sampling: Sampling) -> None:
        """DataError unless the prompt and its answer fit; ValueError for what no recipe can ask."""
        self.check(tokens)
        if n < 1 or sampling.max_tokens < 1 or not 0 <= sampling.min_tokens <= sampling.max_tokens:
            raise ValueError(f"nothing to write: n={n}, {sampling}")
        if sampling.temperature < 0 or not 0 < sampling.top_p <= 1:
            raise ValueError(f"no distribution: {sampling}")
        if len(tokens) + sampling.max_tokens > self.context:
            what = f"a prompt of {len(tokens)} tokens and an answer of up to {sampling.max_tokens}"
            raise self._too_long(what, self.context)

    def _too_long(self, what: str, room: int) -> DataError:
        return DataError(
            "RLKD-D603",
            f"{what}: the model has room for {room} tokens",
            where=self.path,
            fix="lower data.max_prompt_tokens or sampler.max_tokens, or raise model.context if the model allows it",
        )


def seed_of(seed: int, k: int) -> int:
    """63 bits for sample k of a group; the same whatever the number of samples."""
    return int(np.random.SeedSequence([seed % 2**64, k]).generate_state(1, np.uint64)[0] >> np.uint64(1))
