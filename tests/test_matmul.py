"""Products by oneDNN equal torch's, whatever the strides, with the same gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.core import matmul
from rlkd.core.matmul import linear, on_onednn, product


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 40), k=st.integers(1, 40), n=st.integers(1, 40), seed=st.integers(0, 99), turned=st.booleans())
def test_product(m: int, k: int, n: int, seed: int, turned: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(k, m, generator=g).T if turned else torch.randn(m, k, generator=g)
    b = torch.randn(n, k, generator=g).T if turned else torch.randn(k, n, generator=g)
    torch.testing.assert_close(product(a, b), a @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8), (1, 1, 4, 8), (0, 8)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_and_its_gradients(shape: tuple[int, ...], with_bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight, bias = torch.randn(*shape, generator=g), torch.randn(6, 8, generator=g), torch.randn(6, generator=g)
    outputs, gradients = [], []
    for function in (linear, torch.nn.functional.linear):
        leaves = [t.clone().requires_grad_() for t in ([x, weight, bias] if with_bias else [x, weight])]
        y = function(*leaves)
        y.square().sum().backward()
        outputs.append(y.detach())
        gradients.append([t.grad for t in leaves])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_frozen_weights_get_no_gradient() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(6, 8)
    linear(x, weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_torchs(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 8, dtype=dtype), torch.randn(6, 8, dtype=dtype)
    assert not on_onednn(x)
    torch.testing.assert_close(linear(x, weight), torch.nn.functional.linear(x, weight), rtol=0, atol=0)
    torch.testing.assert_close(product(x, weight.T), x @ weight.T, rtol=0, atol=0)


def test_a_torch_without_the_operator_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*_: object) -> None:
        raise RuntimeError("expected 4 arguments")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", other, raising=False)
    matmul._has_onednn.cache_clear()
    try:
        x, weight = torch.randn(3, 8), torch.randn(6, 8)
        assert not on_onednn(x)
        torch.testing.assert_close(linear(x, weight), torch.nn.functional.linear(x, weight), rtol=0, atol=0)
    finally:
        matmul._has_onednn.cache_clear()
