"""The packed form with shared prompts computes what the model itself computes, one sample at a time."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rlkd.algorithms.grpo import GRPO
from rlkd.core.batch import MicroBatch, Totals, microbatch, pack
from rlkd.core.errors import PreflightError
from rlkd.core.prefix import Span, layout
from rlkd.core.types import TRAINED, Group, Origin
from rlkd.engines import attention
from rlkd.engines.agreement import check_agreement
from rlkd.engines.attention import PaddedAttention, VarlenAttention, blocks
from rlkd.engines.model import ModelOptions, Policy
from tests.learner_help import KINDS, VOCABULARY, random_groups, tiny_model

CPU = torch.device("cpu")


def policy(kind: str = "llama", seed: int = 0, **options: Any) -> Policy:
    return Policy.of(tiny_model(kind, seed), ModelOptions(kind, **options))


def batch(groups: Sequence[Group]) -> MicroBatch:
    return pack(groups, 1, 10_000)[0][0]


def naive(model: Any, x: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probs of all tokens, entropies), by the model's own forward pass on each sample; NaN at first tokens."""
    logps, entropies = [], []
    for i in range(x.samples):
        tokens = x.tokens[x.segment == i].long()
        table = (model(tokens[None]).logits[0, :-1] / temperature).log_softmax(-1)
        first = table.new_full((1,), torch.nan)
        logps += [first, table.gather(1, tokens[1:, None])[:, 0]]
        entropies += [first, -(table.exp() * table).sum(-1)]
    return torch.cat(logps), torch.cat(entropies)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 2e-5) -> None:
    """Relative to the largest entry of the whole gradient, and to each parameter's own norm."""
    assert found.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, g in expected.items():
        assert float((found[name] - g).abs().max()) <= bound * largest, name


@settings(max_examples=16, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 1000),
    groups=st.integers(1, 4),
    samples=st.integers(1, 5),
    share=st.booleans(),
    temperature=st.sampled_from([1.0, 0.7]),
    checkpointing=st.booleans(),
)
def test_packed_is_the_model_itself(
    kind: str, seed: int, groups: int, samples: int, share: bool, temperature: float, checkpointing: bool
) -> None:
    packed = policy(
        kind, seed, share_prompt=share, temperature=temperature, head_rows=4, gradient_checkpointing=checkpointing
    )
    plain = tiny_model(kind, seed).eval()
    x = batch(random_groups(seed, groups, samples, mixed=True, shortest=0))
    trained = x.mask(TRAINED) & (layout(x).source >= 0)
    weights = torch.randn(2, len(x.tokens), generator=torch.Generator().manual_seed(seed))

    out = packed.output(x)
    logp, entropy = naive(plain, x, temperature)
    assert torch.equal(~out.logp.isnan(), trained)
    assert torch.equal(~out.entropy.isnan(), trained)
    torch.testing.assert_close(out.logp[trained], logp[trained], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(out.entropy[trained], entropy[trained], rtol=1e-4, atol=2e-5)

    def loss(logp: Tensor, entropy: Tensor) -> Tensor:
        values = weights[0] * logp + 0.3 * weights[1] * entropy
        return torch.where(trained, values, 0.0).sum()

    found = gradients(packed.model, loss(out.logp, out.entropy))
    assert all(g.isfinite().all() for g in found.values()), "NaN of untrained tokens reached a gradient"
    assert_same_gradients(found, gradients(plain, loss(logp, entropy)))


def test_other_tokens_at_the_same_places() -> None:
    packed, plain = policy(seed=3, temperature=0.8, head_rows=2), tiny_model(seed=3).eval()
    x = batch(random_groups(3, 2, 3, mixed=True))
    trained = x.mask(TRAINED) & (layout(x).source >= 0)
    ids = torch.randint(0, VOCABULARY, (len(x.tokens), 4), generator=torch.Generator().manual_seed(0))
    tables = []
    for i in range(x.samples):
        tokens = x.tokens[x.segment == i].long()
        table = (plain(tokens[None]).logits[0] / 0.8).log_softmax(-1)
        tables.append(torch.cat([torch.full_like(table[:1], torch.nan), table[:-1]]))
    expected = torch.cat(tables).gather(1, ids)
    found = packed.output(x).at(ids)
    assert torch.equal(~found.isnan(), trained[:, None].expand(-1, 4))
    torch.testing.assert_close(found[trained], expected[trained], rtol=1e-4, atol=2e-5)
    assert_same_gradients(
        gradients(packed.model, found[trained].square().sum()),
        gradients(plain, expected[trained].square().sum()),
    )


def test_a_shared_prompt_is_computed_once() -> None:
    """Negative control: without sharing the trunk sees every token."""
    x = batch(random_groups(5, 2, 6, prompt=5, answer=4))
    for share in (True, False):
        p = policy(share_prompt=share)
        seen: list[int] = []
        embed = p.model.base_model.embed_tokens
        embed.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].numel()))
        p.output(x)
        assert seen == [len(layout(x, share).computed)]
        assert (seen[0] < len(x.tokens)) == share


def test_a_micro_batch_without_trained_tokens_has_zero_gradients() -> None:
    groups = random_groups(2, 1, 2)
    sample = groups[0].samples[0]
    x = batch([replace(groups[0], samples=(replace(sample, origin=np.full_like(sample.origin, Origin.PROMPT)),))])
    p = policy()
    out = p.output(x)
    assert out.logp.isnan().all()
    found = gradients(p.model, x.mean(out.logp, Origin.POLICY))
    assert all((g == 0).all() for g in found.values())


# --- the gradient of a step does not depend on how it is laid out


def step_gradient(groups: Sequence[Group], ranks: int, max_tokens: int, algorithm: GRPO) -> dict[str, Tensor]:
    """The sum over all turns and ranks, through the path that the learner takes."""
    p = policy(seed=1)
    p.model.zero_grad()
    for turn in pack(groups, ranks, max_tokens, algorithm.whole_groups):
        for x in turn:
            (algorithm.loss(p.output(x), x, {}).value * x.weight).backward()
    return {name: q.grad.clone() for name, q in p.model.named_parameters() if q.grad is not None}


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 1000),
    ranks=st.integers(1, 4),
    max_tokens=st.integers(16, 80),
    norm=st.sampled_from(["token", "sequence", "sequence-sum"]),
    order=st.randoms(use_true_random=False),
)
def test_split_order_and_ranks_leave_the_gradient_alone(
    seed: int, ranks: int, max_tokens: int, norm: Any, order: Any
) -> None:
    algorithm = GRPO(norm=norm, entropy=0.01)
    groups = [algorithm.credit(g) for g in random_groups(seed, 3, 4)]
    expected = step_gradient(groups, 1, 10_000, algorithm)
    shuffled = [replace(g, samples=tuple(order.sample(g.samples, len(g.samples)))) for g in groups]
    order.shuffle(shuffled)
    assert_same_gradients(step_gradient(shuffled, ranks, max_tokens, algorithm), expected, bound=5e-5)


# --- attention


def flash_reference(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, softmax_scale: float | None, causal: bool, window_size: tuple[int, int], softcap: float,
) -> Tensor:  # fmt: skip
    """What flash-attn documents: bottom-right causal, window (left, right), softcap 0 for none; in float64."""
    assert causal
    outputs, dtype = [], q.dtype
    q, k, v = (x.double() for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    for i in range(len(cu_seqlens_q) - 1):
        a, b, c, d = (int(e[i + j]) for e in (cu_seqlens_q, cu_seqlens_k) for j in (0, 1))
        assert b - a <= max_seqlen_q
        assert d - c <= max_seqlen_k
        keys, values = (x[c:d].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        place = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        left = window_size[0] if window_size[0] >= 0 else d - c
        scores = scores.masked_fill(~((place >= 0) & (place <= left)), float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(outputs).to(dtype)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    groups=st.integers(1, 4),
    samples=st.integers(1, 5),
    window=st.sampled_from([None, 1, 4, 9, 100]),
    softcap=st.sampled_from([None, 2.0]),
    longest_piece=st.sampled_from([2, 5, 256]),
    free_padding=st.sampled_from([0, 30, 4096]),
)
def test_both_forms_of_attention_agree(
    seed: int, groups: int, samples: int, window: int | None, softcap: float | None, longest_piece: int,
    free_padding: int,
) -> None:  # fmt: skip
    spans = layout(batch(random_groups(seed, groups, samples, answer=14, shortest=0))).spans
    u = sum(s.length for s in spans)
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(u, h, 8, generator=g, requires_grad=True) for h in (4, 2, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "LONGEST_PIECE", longest_piece)
        patch.setattr(attention, "FREE_PADDING", free_padding)
        padded = PaddedAttention.of(spans, CPU)
    varlen = VarlenAttention.of(spans, CPU, flash_reference)
    results = [form(q, k, v, 0.3, window, softcap) for form in (padded, varlen)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(r.square().sum(), (q, k, v)) for r in results]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-5)


def test_padding_stays_within_its_bound() -> None:
    lengths = [3, 40, 41, 44, 90, 200, 201, 800]
    spans, at = [Span(0, 50)], 50
    for n in lengths:
        spans.append(Span(at, n, 0, 50))
        at += n
    found = blocks(spans)
    for block in found:
        pairs = block.filled.sum(1) * (block.context + block.filled.sum(1))
        padded = block.queries.shape[0] * block.queries.shape[1] * block.keys.shape[1]
        assert padded - int(pairs.sum()) <= max(attention.FREE_PADDING, attention.PADDING * padded)
    tokens = torch.cat([b.queries[b.filled] for b in found])
    assert torch.equal(tokens.sort().values, torch.arange(at)), "every computed token is a query once"
    assert max(b.queries.shape[1] for b in found) <= attention.LONGEST_PIECE


def test_flash_where_there_is_none_is_one_clear_error() -> None:
    with pytest.raises(PreflightError, match="needs a GPU and the package flash-attn"):
        attention.attention([Span(0, 2)], "flash", CPU)


# --- what is refused


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_supported_models_agree_with_themselves(kind: str) -> None:
    assert check_agreement(policy(kind, seed=2, temperature=0.9)) < 1e-5


def test_a_model_that_does_something_else_is_refused() -> None:
    """Granite divides its logits: nothing in its config's layer types says so, the check of agreement does."""
    p = policy()
    own = p.model.forward
    p.model.forward = lambda *a, **k: _scaled(own(*a, **k))
    with pytest.raises(PreflightError, match="packed log-probs are off"):
        check_agreement(p)


def _scaled(out: Any) -> Any:
    out.logits = out.logits / 8
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.config, "layer_types", ["linear_attention"]), "linear_attention"),
        (lambda m: setattr(type(m), "_supports_attention_backend", False), "attention cannot be replaced"),
        (lambda m: m.set_output_embeddings(nn.Identity()), "head is a Identity"),
    ],
)
def test_unsupported_models_are_refused(change: Any, message: str) -> None:
    model = tiny_model()
    model.__class__ = type("Own", (type(model),), {})  # so that a changed class stays here
    if "Identity" in message:
        model.lm_head = nn.Identity()
    else:
        change(model)
    with pytest.raises(PreflightError, match=message):
        Policy.of(model, ModelOptions("somewhere"))


def test_attention_features_that_are_not_computed_are_refused() -> None:
    p = policy()
    x = batch(random_groups(0))
    own = p.model.base_model.forward
    p.model.base_model.forward = lambda **k: own(**k, s_aux=torch.zeros(4))
    with pytest.raises(PreflightError, match="s_aux"):
        p.output(x)


def test_dropout_is_off() -> None:
    model = tiny_model(attention_dropout=0.5)
    p = Policy.of(model, ModelOptions("x"))
    x = batch(random_groups(1))
    assert p.training
    torch.testing.assert_close(p.output(x).logp, p.output(x).logp, equal_nan=True, rtol=0, atol=0)


def test_a_missing_folder_is_one_clear_error(tmp_path: Any) -> None:
    with pytest.raises(PreflightError, match="the model cannot be loaded") as error:
        Policy.load(ModelOptions(str(tmp_path / "nothing")))
    assert str(tmp_path / "nothing") in str(error.value)


def test_tied_weights_stay_tied() -> None:
    p = policy("llama")
    assert p.model.get_output_embeddings().weight is p.model.get_input_embeddings().weight
    x = microbatch(random_groups(4)[0].samples, [0, 0, 0], Totals.of(random_groups(4)[0].samples))
    p.model.zero_grad()
    x.mean(p.output(x).logp, Origin.POLICY).backward()
    assert "lm_head.weight" not in dict(p.model.named_parameters())
