"""The parts that are measured: head, packed model, weights on their way, learner step."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu.shapes import Shape
from rlkd.core.batch import MicroBatch, pack
from rlkd.core.logprob import Head, token_logp
from rlkd.core.types import Group, Origin, Prompt, Sample
from rlkd.engines import weights
from rlkd.engines.attention import flash_installed
from rlkd.engines.model import ModelOptions, Policy

if TYPE_CHECKING:
    from benchmarks.gpu.__main__ import Bench

FLOAT32 = 2e-4  # nats; sums in another order
BFLOAT16 = 0.1  # nats, mean of the tokens; its own rounding is 2⁻⁸ of a logit


def head(bench: "Bench", _: Path) -> None:
    """Log-probs in chunks against the naive form, both with their gradients."""
    s = bench.shape
    low = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    hidden = torch.randn(s.rows, s.width, device=bench.device, dtype=low)
    matrix = (torch.randn(s.vocabulary, s.width, device=bench.device) / s.width**0.5).to(low)
    targets = torch.randint(s.vocabulary, (s.rows,), device=bench.device)

    def ours() -> tuple[Tensor, ...]:
        h, w = hidden.detach().requires_grad_(), matrix.detach().requires_grad_()
        logp, entropy, _ = token_logp(h, w, None, targets, Head())
        logp.mean().backward()
        assert h.grad is not None
        assert w.grad is not None
        return logp.detach(), entropy.detach(), h.grad, w.grad

    def naive() -> tuple[Tensor, ...]:
        h, w = hidden.detach().requires_grad_(), matrix.detach().requires_grad_()
        logp = (h @ w.T).float().log_softmax(1)
        entropy = -(logp.exp() * logp).sum(1)
        chosen = logp.gather(1, targets[:, None])[:, 0]
        chosen.mean().backward()
        assert h.grad is not None
        assert w.grad is not None
        return chosen.detach(), entropy.detach(), h.grad, w.grad

    mine, plain = ours(), naive()
    most = FLOAT32 if low is torch.float32 else BFLOAT16
    bench.bound("head", "log p, ours − naive, mean absolute (nats)", mean_gap(mine[0], plain[0]), most)
    bench.bound("head", "gradient to hidden, relative", relative(mine[2], plain[2]), most)
    bench.bound("head", "gradient to weight, relative", relative(mine[3], plain[3]), most)
    for name, call in (("ours", ours), ("naive", naive)):
        seconds, peak = bench.timed(call)
        what = f"forward and backward, {s.rows:,} × {s.vocabulary:,}, {name}"
        bench.say("head", what, f"{seconds * 1e3:.1f} ms, {peak:.2f} GiB")


def packed(bench: "Bench", folder: Path) -> None:
    """The packed model, prompts once, against transformers' padded forward of the same samples."""
    path, groups = saved_model(bench.shape, folder), made_groups(bench.shape)
    (micro,) = (turn[0] for turn in pack(groups, 1, 10**7))
    micro = micro.to(bench.device)
    kinds = ["sdpa"] + (["flash"] if bench.device.type == "cuda" and flash_installed() else [])
    dtypes = ["float32"] + (["bfloat16"] if bench.device.type == "cuda" else [])
    exact = padded_logp(path, groups, bench.device, torch.float32)
    for dtype in dtypes:
        for kind in kinds:
            if (kind, dtype) == ("flash", "float32"):
                continue  # flash-attn has no float32
            policy = load(path, bench, dtype, kind)
            with torch.no_grad():
                rows, logp, *_ = policy(micro)
            gap = (logp.cpu().double() - in_order(exact, micro, rows, groups)).abs().mean().item()
            bench.bound("model", f"log p, packed {dtype} {kind} − padded float32, mean absolute", gap,
                        FLOAT32 if dtype == "float32" else BFLOAT16)  # fmt: skip
            seconds, peak = bench.timed(lambda policy=policy: trained(policy, micro))  # type: ignore[misc]
            tokens = sum(len(s.tokens) for g in groups for s in g.samples)
            what = f"forward and backward, {tokens:,} tokens of {len(groups)} groups, packed {dtype} {kind}"
            bench.say("model", what, f"{tokens / seconds:,.0f} tokens/s, {peak:.2f} GiB")
            del policy
        seconds, peak = bench.timed(padded_step(path, groups, bench.device, getattr(torch, dtype)))
        bench.say("model", f"the same, padded {dtype}, whole logits (transformers)",
                  f"{tokens / seconds:,.0f} tokens/s, {peak:.2f} GiB")  # fmt: skip


def publish(bench: "Bench", folder: Path) -> None:
    """Weights through shared memory, with their digest."""
    policy = load(saved_model(bench.shape, folder), bench, "float32", "sdpa")
    named = [(n, p.detach()) for n, p in policy.model.named_parameters()]
    size = sum(p.numel() * p.element_size() for _, p in named) / 2**30
    publisher = weights.Publisher(str(folder / "published"))
    seconds, _ = bench.timed(lambda: publisher.publish(1, named))
    ref = publisher.publish(2, named)
    bench.say("weights", f"published, {size:.2f} GiB", f"{seconds:.2f} s, {size / seconds:.2f} GiB/s")
    seconds, _ = bench.timed(lambda: weights.verify(ref))
    bench.say("weights", "verified by a reader", f"{seconds:.2f} s, {size / seconds:.2f} GiB/s")
    publisher.close()


ALL = (head, packed, publish)

# --- what they need


def saved_model(shape: Shape, folder: Path) -> Path:
    path = folder / "model"
    if not path.exists():
        torch.manual_seed(0)
        config = AutoConfig.for_model("qwen2", tie_word_embeddings=True, **shape.model)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def made_groups(shape: Shape) -> list[Group]:
    draw, (least, most) = np.random.default_rng(0), shape.answers
    found = []
    for g in range(shape.groups):
        prompt = draw.integers(3, shape.model["vocab_size"], shape.prompt).astype(np.int32)
        members = []
        for n in np.geomspace(least, most, shape.samples).astype(int):  # a long tail
            tokens = np.concatenate([prompt, draw.integers(3, shape.model["vocab_size"], n)]).astype(np.int32)
            origin = np.array([Origin.PROMPT] * len(prompt) + [Origin.POLICY] * int(n), np.uint8)
            behavior = np.where(origin == Origin.POLICY, np.float32(-1.0), np.float32(np.nan))
            members.append(Sample(tokens, origin, behavior, (0, 0), advantage=np.ones(len(tokens), np.float32)))
        found.append(Group(Prompt(f"p{g}", prompt, ""), tuple(members)))
    return found


def load(path: Path, bench: "Bench", dtype: str, kind: str) -> Policy:
    return Policy.load(ModelOptions(str(path), dtype, bench.device.type, kind))  # type: ignore[arg-type]


def trained(policy: Policy, micro: MicroBatch) -> None:
    policy.zero_grad()
    _, logp, *_ = policy(micro)
    logp.mean().backward()


def padded(groups: list[Group]) -> tuple[Tensor, Tensor]:
    """Token ids [n, t] and which of them are tokens."""
    rows = [torch.from_numpy(s.tokens.astype(np.int64)) for g in groups for s in g.samples]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    there = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    return ids, there


def plain_model(path: Path, device: torch.device, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").to(device)


def padded_logp(path: Path, groups: list[Group], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """log p of every token after the first, of each sample alone."""
    model, found = plain_model(path, device, dtype), []
    for sample in (s for g in groups for s in g.samples):
        ids = torch.from_numpy(sample.tokens.astype(np.int64)).to(device)
        with torch.no_grad():
            logp = model(ids[None]).logits[0, :-1].float().log_softmax(1)
        found.append(logp.gather(1, ids[1:, None])[:, 0].cpu().double())
    return found


def in_order(exact: list[Tensor], micro: MicroBatch, rows: Tensor, groups: list[Group]) -> Tensor:
    """Those of the micro-batch's trained tokens, in its order: samples are told apart by their tokens."""
    known = {s.tokens.tobytes(): e for s, e in zip((s for g in groups for s in g.samples), exact, strict=True)}
    tokens, segment = micro.tokens.cpu().numpy(), micro.segment.cpu()
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(segment).cumsum(0)])
    found = []
    for row in rows.cpu():
        a, b = starts[segment[row]], starts[segment[row] + 1]
        found.append(known[tokens[a:b].tobytes()][row - a - 1])
    return torch.stack(found)


def padded_step(path: Path, groups: list[Group], device: torch.device, dtype: torch.dtype) -> Any:
    model = plain_model(path, device, dtype)
    ids, there = (x.to(device) for x in padded(groups))

    def step() -> None:
        model.zero_grad()
        logp = model(ids, attention_mask=there).logits[:, :-1].float().log_softmax(2)
        chosen = logp.gather(2, ids[:, 1:, None])[..., 0]
        (chosen * there[:, 1:]).sum().backward()

    return step


def mean_gap(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().mean().item()


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
