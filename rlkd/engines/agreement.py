"""Does the packed form compute what the model itself computes? Asked once, before anything is trained.

The model's own forward pass, with the plain ("eager") attention and one sample at a time, against the packed one with
prompts shared. A feature of some architecture that the packed form leaves out (a scaled logit, a state that leaks from
sample to sample) shows here, as one clear error instead of a run that learns nothing.
"""

import numpy as np
import torch
from torch import Tensor

from rlkd.core.batch import MicroBatch, Totals, microbatch
from rlkd.core.errors import PreflightError
from rlkd.core.types import Origin, Sample
from rlkd.engines.model import NAME, Policy

PROMPTS, ANSWERS = (5, 9), (7, 3, 12)  # tokens: each prompt gets each answer
BOUND = {torch.float32: 1e-2, torch.bfloat16: 0.2}  # of the mean |difference|; rounding is far below


def check_agreement(policy: Policy) -> float:
    """The mean difference of log-probs over random samples. PreflightError if it is no rounding."""
    x = _random_batch(policy.vocabulary).to(next(policy.parameters()).device)
    with torch.no_grad():
        packed = policy.output(x).logp
        own = _one_by_one(policy, x)
    trained = x.mask(Origin.POLICY)
    off = float((packed - own)[trained].abs().mean())
    bound = BOUND[next(policy.parameters()).dtype]
    if not off <= bound:
        raise PreflightError(
            "RLKD-E144",
            f"{type(policy.model).__name__}: packed log-probs are off by {off:.3g} on average from the model's own "
            f"(bound {bound:g})",
            where=policy.options.path,
            fix="this architecture computes something that the packed form leaves out; take another model",
        )
    return off


def _one_by_one(policy: Policy, x: MicroBatch) -> Tensor:
    """log p of every token by the model's own forward pass; NaN at first tokens."""
    policy.model.set_attn_implementation("eager")
    policy.model.eval()
    try:
        parts = []
        for i in range(x.samples):
            tokens = x.tokens[x.segment == i].long()
            logits = policy.model(tokens[None], use_cache=False).logits[0, :-1].float() / policy.head.temperature
            logp = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
            parts += [logp.new_full((1,), torch.nan), logp]
        return torch.cat(parts)
    finally:
        policy.model.set_attn_implementation(NAME)
        policy.model.train()


def probe_batch(vocabulary: int, length: int) -> MicroBatch:
    """One sample of `length` random tokens, always the same, of which all but the first are scored."""
    sample = _sample(np.random.default_rng(0).integers(0, vocabulary, length), 1)
    return microbatch([sample], [0], Totals.of([sample]))


def _random_batch(vocabulary: int) -> MicroBatch:
    draw = np.random.default_rng(0)
    samples, groups = [], []
    for group, prompt_length in enumerate(PROMPTS):
        prompt = draw.integers(0, vocabulary, prompt_length)
        for answer_length in ANSWERS:
            answer = draw.integers(0, vocabulary, answer_length)
            samples.append(_sample(np.concatenate([prompt, answer]), prompt_length))
            groups.append(group)
    return microbatch(samples, groups, Totals.of(samples))


def _sample(tokens: np.ndarray, prompt: int) -> Sample:
    origin = np.repeat(np.array([Origin.PROMPT, Origin.POLICY], np.uint8), [prompt, len(tokens) - prompt])
    return Sample(tokens.astype(np.int32), origin, np.full(len(tokens), np.nan, np.float32), (0, 0))
