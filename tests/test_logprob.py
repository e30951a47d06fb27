"""Chunked log-probs and entropies equal the naive log_softmax, and so do their gradients."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlkd.core import logprob
from rlkd.core.logprob import Head, likeliest, token_logp, tokens_at


def naive(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    """All log-probs [r, v], with the whole matrix in memory."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    return torch.log_softmax(logits / head.temperature, -1)


def inputs(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype, seed: int, bias: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=g, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randn(vocabulary, generator=g, dtype=dtype, requires_grad=True) if bias else None


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's vocabulary is so small that everything would be one chunk."""
    monkeypatch.setattr(logprob, "CHUNK_LOGITS", 1)


heads = st.builds(
    Head,
    temperature=st.sampled_from([1.0, 0.6, 1.7]),
    softcap=st.sampled_from([None, 5.0]),
    rows=st.integers(1, 6),
)


@settings(max_examples=60, deadline=None)
@given(heads, st.integers(0, 9), st.integers(2, 11), st.booleans(), st.integers(0, 2**31))
def test_equals_the_naive_form_with_its_gradients(head: Head, rows: int, v: int, bias: bool, seed: int) -> None:
    h, w, b = inputs(rows, 5, v, torch.float64, seed, bias)
    g = torch.Generator().manual_seed(seed + 1)
    targets, ids = torch.randint(0, v, (rows,), generator=g), torch.randint(0, v, (rows, 3), generator=g)
    weights = torch.randn(3, rows, generator=g, dtype=torch.float64)
    at_weights = torch.randn(rows, 3, generator=g, dtype=torch.float64)

    all_logp = naive(h, w, b, head)
    expected = (
        all_logp.gather(1, targets[:, None])[:, 0],
        -(all_logp.exp() * all_logp).sum(1),
        all_logp.gather(1, ids),
    )
    logp, entropy, log_z = token_logp(h, w, b, targets, head)
    found = (logp, entropy, tokens_at(h, w, b, ids, log_z, head))
    leaves = [x for x in (h, w, b) if x is not None]

    def gradients(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        total = (values[0] * weights[0]).sum() + (values[1] * weights[1]).sum() + (values[2] * at_weights).sum()
        return torch.autograd.grad(total, leaves)

    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found), gradients(expected))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_gradcheck(part: int, softcap: float | None) -> None:
    h, w, b = inputs(5, 3, 7, torch.float64, 0, bias=True)
    targets = torch.tensor([0, 6, 2, 2, 5])
    head = Head(temperature=0.8, softcap=softcap, rows=2)
    assert torch.autograd.gradcheck(lambda *x: token_logp(*x, targets, head)[part], (h, w, b))


def test_gradcheck_of_other_tokens() -> None:
    h, w, b = inputs(4, 3, 6, torch.float64, 1, bias=True)
    targets, ids = torch.tensor([0, 5, 2, 2]), torch.tensor([[0, 0], [1, 5], [3, 2], [4, 4]])
    head = Head(temperature=1.3, softcap=4.0, rows=3)

    def at(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return tokens_at(h, w, b, ids, token_logp(h, w, b, targets, head)[2], head)

    assert torch.autograd.gradcheck(at, (h, w, b))


@settings(max_examples=25, deadline=None)
@given(heads, st.integers(1, 40), st.floats(0.1, 8.0), st.integers(0, 2**31))
def test_float32_is_as_exact_as_the_naive_form(head: Head, rows: int, scale: float, seed: int) -> None:
    """Measured against float64: no worse than 4 × the naive float32 form, or 1e-5 of the largest value."""
    h, w, _ = inputs(rows, 16, 300, torch.float32, seed)
    hidden = (h * scale).detach().requires_grad_()
    targets = torch.randint(0, 300, (rows,), generator=torch.Generator().manual_seed(seed))

    def run(form: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        x = [hidden.detach().to(dtype).requires_grad_(), w.detach().to(dtype).requires_grad_()]
        value = form(*x)
        return [value.detach().double(), *(g.double() for g in torch.autograd.grad(value.sum(), x))]

    def plainly(h: Tensor, w: Tensor) -> Tensor:
        return naive(h, w, None, head).gather(1, targets[:, None])[:, 0]

    def chunked(h: Tensor, w: Tensor) -> Tensor:
        return token_logp(h, w, None, targets, head)[0]

    exact = run(plainly, torch.float64)
    for truth, usual, ours in zip(exact, run(plainly, torch.float32), run(chunked, torch.float32), strict=True):
        bound = max(4 * float((usual - truth).abs().max()), 1e-5 * float(truth.abs().max()))
        assert float((ours - truth).abs().max()) <= bound


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    h, w, _ = inputs(6, 8, 50, torch.float32, 2)
    targets = torch.arange(6)
    low = [x.detach().bfloat16().requires_grad_() for x in (h, w)]
    wide = [x.detach().float().requires_grad_() for x in low]
    logp, entropy, _ = token_logp(low[0], low[1], None, targets, Head(rows=4))
    reference = naive(wide[0], wide[1], None, Head())
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp, reference.gather(1, targets[:, None])[:, 0])
    logp.sum().backward()
    reference.gather(1, targets[:, None]).sum().backward()
    for x, y in zip(low, wide, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        assert x.grad.dtype == torch.bfloat16
        torch.testing.assert_close(x.grad, y.grad.bfloat16())


def test_a_second_backward_pass_gives_the_same_gradient() -> None:
    """The chunk kept from the forward pass is used up by the first one."""
    h, w, _ = inputs(5, 4, 9, torch.float64, 3)
    logp, entropy, _ = token_logp(h, w, None, torch.arange(5), Head(rows=2))
    total = logp.sum() + entropy.square().sum()
    first = torch.autograd.grad(total, (h, w), retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(total, (h, w)))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    h, w, _ = inputs(3, 4, 9, torch.float64, 4)
    still = h if frozen == "hidden" else w
    still.requires_grad_(False)
    token_logp(h, w, None, torch.arange(3), Head())[0].sum().backward()
    assert still.grad is None
    assert (w if frozen == "hidden" else h).grad is not None


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4, 0.0], [-1e4, 0.0]]).requires_grad_()
    weight = torch.eye(2).requires_grad_()
    logp, entropy, _ = token_logp(hidden, weight, None, torch.tensor([0, 0]), Head())
    (logp.sum() + entropy.sum()).backward()
    assert logp.tolist() == [0.0, -1e4]
    assert entropy.tolist() == [0.0, 0.0]
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_entropy_of_a_uniform_distribution_is_log_v() -> None:
    _, entropy, log_z = token_logp(
        torch.zeros(3, 4), torch.randn(10, 4), None, torch.zeros(3, dtype=torch.int64), Head()
    )
    torch.testing.assert_close(entropy, torch.full((3,), math.log(10.0)))
    torch.testing.assert_close(log_z, torch.full((3,), math.log(10.0)))


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_likeliest(rows: int) -> None:
    h, w, b = inputs(7, 4, 30, torch.float64, 5, bias=True)
    head = Head(temperature=0.7, softcap=6.0, rows=rows)
    ids, logp = likeliest(h, w, b, 5, head)
    expected = naive(h, w, b, head).topk(5, dim=1)
    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(logp, expected.values)


def test_never_holds_more_than_its_rows_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor made by forward and backward is one chunk. Negative control: rows = all."""
    largest = 0
    real = logprob.product

    def product(a: Tensor, b: Tensor) -> Tensor:
        nonlocal largest
        out = real(a, b)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(logprob, "product", product)
    monkeypatch.setattr(logprob, "on_onednn", lambda _: True)
    h, w, _ = inputs(64, 4, 1000, torch.float32, 6)
    for rows, bound in ((8, 8 * 1000), (64, 64 * 1000)):
        largest = 0
        logp, entropy, _ = token_logp(h, w, None, torch.zeros(64, dtype=torch.int64), Head(rows=rows))
        (logp + entropy).sum().backward()
        assert largest == bound


def test_a_small_vocabulary_is_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob, "CHUNK_LOGITS", 2**22)
    assert Head(rows=128).chunks(5000, 64) == [slice(0, 5000)]
    assert len(Head(rows=128).chunks(960, 49152)) == 8
    assert Head(rows=128).chunks(0, 64) == []
