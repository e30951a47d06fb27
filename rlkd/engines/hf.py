"""The same engine on plain transformers: for tests and for machines without vLLM. Right rather than fast.

Groups are written one after the other, the samples of a group together, a token at a time with a key/value cache; in
between, calls are served, so weights can be exchanged and samples aborted in the middle, as with vLLM.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rlkd.core.errors import InfrastructureError
from rlkd.core.ports import Completion, Sampling, WeightRef
from rlkd.core.types import Finish, TopK
from rlkd.engines.device import pick_device, pick_dtype
from rlkd.engines.engine import Engine
from rlkd.engines.jobs import EngineOptions, Job, Limits, Scoring, Writing
from rlkd.engines.weights import read


class HFEngine(Engine):
    """Of the options it uses path, context, dtype, device, trust_remote_code and threads; the others are vLLM's."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._model: Any = None
        self._work: dict[int, Iterator[None]] = {}  # by job, in the order they came
        self._drafts: dict[int, _Draft] = {}

    def _build(self) -> Limits:
        from transformers import AutoModelForCausalLM

        o = self.options
        if o.threads:
            torch.set_num_threads(o.threads)
        device = pick_device(o.device)
        model = AutoModelForCausalLM.from_pretrained(
            o.path, dtype=pick_dtype(o.dtype, device), trust_remote_code=o.trust_remote_code, local_files_only=True
        )
        self._model = model.eval().requires_grad_(False).to(device)
        config = model.config.get_text_config()
        context = o.context or config.max_position_embeddings
        return Limits(o.path, context, config.vocab_size, scored=context)

    def _shutdown(self) -> None:
        self._model = None

    def _add(self, job: Job) -> None:
        if isinstance(job, Writing):
            draft = self._drafts[job.id] = _Draft(job, self._model.device, self.version)
            self._work[job.id] = self._write(draft)
        else:
            assert isinstance(job, Scoring)
            self._work[job.id] = self._read(job)

    def _drop(self, job: Job) -> dict[int, Completion]:
        self._work.pop(job.id, None)
        draft = self._drafts.pop(job.id, None)
        return {} if draft is None else {k: draft.completion(k, Finish.ABORTED) for k in list(draft.rows)}

    @torch.inference_mode()
    def _step(self) -> None:
        job, work = next(iter(self._work.items()))
        if next(work, self) is self:
            self._work.pop(job, None)
            self._drafts.pop(job, None)

    # --- writing

    def _write(self, draft: "_Draft") -> Iterator[None]:
        """One token of every unfinished sample at a time. The prompt is computed once for all of them."""
        prompt = torch.tensor([draft.job.tokens], device=self._model.device)
        out = self._model(prompt, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        cache.batch_repeat_interleave(draft.job.count)
        logits = out.logits[:, -1].repeat(draft.job.count, 1)
        while True:
            tokens = draft.append(logits, self.version)
            self.written += len(draft.rows)
            alive = draft.alive()
            for row, sample in enumerate(draft.rows):
                if not alive[row]:
                    self._finish(draft.job, sample, draft.completion(sample))
            if not any(alive):
                return
            if not all(alive):
                keep = torch.tensor([row for row, a in enumerate(alive) if a], device=tokens.device)
                cache.batch_select_indices(keep)
                tokens, draft.rows = tokens[keep], [s for s, a in zip(draft.rows, alive, strict=True) if a]
            yield
            out = self._model(tokens[:, None], past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[:, -1]

    # --- scoring

    def _read(self, job: Scoring) -> Iterator[None]:
        for part, sequence in enumerate(job.sequences):
            self._finish(job, part, self._score_one(sequence, job.k))
            yield

    def _score_one(self, sequence: list[int], k: int) -> tuple[np.ndarray, TopK]:
        tokens = torch.tensor([sequence], device=self._model.device)
        every = self._model(tokens).logits[0, :-1].float().log_softmax(-1)
        logp = np.full(len(sequence), np.nan, np.float32)
        logp[1:] = every.gather(1, tokens[0, 1:, None])[:, 0].cpu().numpy()
        ids, likeliest = np.zeros((len(sequence), k), np.int32), np.full((len(sequence), k), np.nan, np.float32)
        if k:
            top = every.topk(k, dim=-1)
            ids[1:], likeliest[1:] = top.indices.cpu().numpy(), top.values.cpu().numpy()
        return logp, TopK(ids, likeliest)

    # --- weights

    @torch.inference_mode()
    def _load(self, ref: WeightRef) -> None:
        """Copy into the model's parameters. A tied head may come under either name or both."""
        found = dict(self._model.named_parameters(remove_duplicate=False))
        missing = {id(p): name for name, p in found.items()}
        for name, tensor in read(ref, verify=False):
            if name in found:
                found[name].copy_(tensor)
                missing.pop(id(found[name]), None)
        if missing:
            raise InfrastructureError(
                "RLKD-I602",
                f"weights of version {ref.version} lack {len(missing)} of the model's parameters: "
                + ", ".join(sorted(missing.values())[:4]),
                where=ref.where,
                fix="learner and sampler must be the same model: see model.path",
            )


@dataclass(eq=False)
class _Draft:
    """What is written so far of a group; `rows` are the samples that are still written, in the order of the batch."""

    job: Writing
    device: torch.device
    version: int  # of the weights when it was taken up
    rows: list[int] = field(init=False)
    tokens: list[list[int]] = field(init=False)
    logp: list[list[float]] = field(init=False)
    versions: list[list[int]] = field(init=False)  # of each token
    random: list[torch.Generator] = field(init=False)

    def __post_init__(self) -> None:
        n = self.job.count
        self.rows = list(range(n))
        self.tokens = [[] for _ in range(n)]
        self.logp = [[] for _ in range(n)]
        self.versions = [[] for _ in range(n)]
        self.random = [torch.Generator(self.device).manual_seed(s) for s in self.job.seeds]

    def append(self, logits: Float[Tensor, "r v"], version: int) -> Int64[Tensor, "r"]:
        """Draw the next token of every row; all rows are equally long."""
        sampling = self.job.sampling
        logp = processed(logits.float(), sampling, written=len(self.tokens[self.rows[0]]))
        tokens = logp.argmax(-1) if sampling.temperature == 0 else self._draw(logp)
        drawn = logp.gather(1, tokens[:, None])[:, 0].tolist()
        for sample, token, value in zip(self.rows, tokens.tolist(), drawn, strict=True):
            self.tokens[sample].append(token)
            self.logp[sample].append(value)
            self.versions[sample].append(version)
        return tokens

    def _draw(self, logp: Float[Tensor, "r v"]) -> Int64[Tensor, "r"]:
        """argmax p/e with exponential e is a draw from p; each row's numbers come from its own generator."""
        noise = torch.stack([torch.empty_like(logp[0]).exponential_(generator=self.random[s]) for s in self.rows])
        return (logp - noise.log()).argmax(-1)

    def alive(self) -> list[bool]:
        """Per row, whether the sample goes on."""
        return [self.end(sample) is None for sample in self.rows]

    def end(self, sample: int) -> Finish | None:
        sampling, tokens = self.job.sampling, self.tokens[sample]
        if tokens[-1] in sampling.stop_tokens:
            return Finish.STOP
        return Finish.LENGTH if len(tokens) >= sampling.max_tokens else None

    def completion(self, sample: int, finish: Finish | None = None) -> Completion:
        versions = self.versions[sample] or [self.version]
        return Completion(
            np.array(self.tokens[sample], np.int32),
            np.array(self.logp[sample], np.float32),
            finish or self.end(sample) or Finish.ABORTED,
            (min(versions), max(versions)),
        )


def processed(logits: Float[Tensor, "r v"], sampling: Sampling, written: int) -> Float[Tensor, "r v"]:
    """Log-probs of the distribution the next token is drawn from, as vLLM computes them: no end before `min_tokens`,
    then temperature, then the smallest set of tokens that holds `top_p`. At temperature 0: of temperature 1."""
    if written < sampling.min_tokens and sampling.stop_tokens:
        logits = logits.index_fill(1, torch.tensor(sampling.stop_tokens, device=logits.device), float("-inf"))
    if sampling.temperature == 0:
        return logits.log_softmax(-1)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        ascending, order = logits.sort(-1)
        outside = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        outside[:, -1] = False
        logits = logits.masked_fill(outside.scatter(1, order, outside), float("-inf"))
    return logits.log_softmax(-1)
