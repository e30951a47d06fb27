"""Tokens a second and memory of a learner's forward and backward pass (B4): padded, as transformers and TRL do it,
beside packed with the prompts once.

    python -m benchmarks.learner models/smollm2 models/tiny [--rounds 2] [--trl-python .venv-trl/bin/python]

Every form is in a process of its own; in each round one after the other takes the same new sequences: groups of eight
answers to one prompt. A token counts once for each sequence it is in (nominal), however often it is computed. Memory is
the most beyond weights and gradients, in the first step. The gradients of that step are compared. Without
`--trl-python` the form with TRL's own head is left out, and that is said.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import MIB, about, children, extra_bytes, ratio, seconds, spread, written
from rlkd.core.types import Group, Origin, Prompt, Sample

GROUPS, SAMPLES = 2, 8
PROMPT = (30, 50)  # tokens, least and most
ANSWER, SIGMA, LONGEST = 45, 0.8, 192  # median and σ of the lognormal lengths (mean 62), tokens at most
BUDGET = 4096  # computed tokens of a packed micro-batch: the default of learner.max_tokens
FORMS = {
    "padded": "padded, whole logits (transformers)",
    "trl": "padded, TRL's head in chunks",
    "packed": "packed, every prompt eight times",
    "rlkd": "packed, every prompt once (rlkd)",
}


def drawn(seed: int, vocabulary: int, lengths: str) -> list[Group]:
    """Groups of random tokens; `lengths`: "uniform" or "tail"."""
    draw = np.random.default_rng(seed)
    found = []
    for g in range(GROUPS):
        prompt = draw.integers(3, vocabulary, draw.integers(*PROMPT)).astype(np.int32)
        samples = []
        for _ in range(SAMPLES):
            n = 60 if lengths == "uniform" else int(np.clip(ANSWER * draw.lognormal(0, SIGMA), 2, LONGEST))
            tokens = np.concatenate([prompt, draw.integers(3, vocabulary, n)]).astype(np.int32)
            origin = np.repeat(np.array([Origin.PROMPT, Origin.POLICY], np.uint8), [len(prompt), n])
            behavior = np.where(origin == Origin.POLICY, np.float32(-1.0), np.float32(np.nan))
            samples.append(Sample(tokens, origin, behavior, (0, 0), advantage=np.ones(len(tokens), np.float32)))
        found.append(Group(Prompt(f"p{g}", prompt, ""), tuple(samples)))
    return found


# --- the sides: each loads the model and gives a function that does forward and backward of a step


def padded(path: str, trl: str | None = None) -> tuple[Any, Callable[[Sequence[Group]], tuple[int, int]]]:
    """transformers' model; a micro-batch is a group, as with TRL's per_device_train_batch_size=8. With `trl`, where TRL
    is installed, its trunk and TRL's head; without, whole logits of the answers."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").train()
    head = trl_head(trl) if trl else None

    def step(groups: Sequence[Group]) -> tuple[int, int]:
        trained = sum(s.answer_tokens for g in groups for s in g.samples)
        computed = rows = 0
        for group in groups:
            ids, there, answers = side_by_side(group)
            if head is None:
                logits = model(ids, attention_mask=there, logits_to_keep=answers.shape[1] + 1).logits[:, :-1]
                targets = ids[:, -answers.shape[1] :]
                chosen = logits.gather(2, targets[..., None])[..., 0]
                logp = torch.where(answers, chosen - torch.stack([row.logsumexp(-1) for row in logits]), 0.0)
                rows += targets.numel()
            else:
                hidden = model.base_model(ids, attention_mask=there).last_hidden_state
                states = hidden[:, -answers.shape[1] - 1 : -1][answers]
                logp = head(states, model.get_output_embeddings().weight, ids[:, -answers.shape[1] :][answers])
                rows += len(states)
            (-logp.sum() / trained).backward()
            computed += ids.numel()
        return computed, rows

    return model, step


def side_by_side(group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [8 t], which of them are tokens [8 t], which of the last places are answers [8 a]); padding on the right."""
    rows = [torch.from_numpy(s.tokens.astype(np.int64)) for s in group.samples]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    there = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    return ids, there, there[:, len(group.prompt.tokens) :].bool()


def trl_head(site: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """TRL's log-probs in chunks of the vocabulary, from where it is installed."""
    sys.path.append(site)
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    def logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        found = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, CHUNK, None, 1.0, ("entropy",))
        return found[0]  # type: ignore[no-any-return]

    return logp


def site_of(python: str | None) -> str | None:
    """Where that Python's packages are."""
    if python is None:
        return None
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()


def packed(path: str, share: bool) -> tuple[Any, Callable[[Sequence[Group]], tuple[int, int]]]:
    """rlkd's, as engines/deepspeed.py calls it (without DeepSpeed, which does nothing to one rank's two passes)."""
    from rlkd.core.batch import pack
    from rlkd.core.prefix import layout
    from rlkd.engines.model import ModelOptions, Policy

    policy = Policy.load(ModelOptions(path, "float32", "cpu", "sdpa", share_prompt=share))

    def step(groups: Sequence[Group]) -> tuple[int, int]:
        trained = sum(s.answer_tokens for g in groups for s in g.samples)
        computed = rows = 0
        for (x,) in pack(groups, 1, BUDGET):
            at, logp, *_ = policy(x)
            (-logp.sum() / trained).backward()
            computed += len(layout(x, share).computed)
            rows += len(at)
        return computed, rows

    return policy.model, step


def side(form: str, path: str, trl: str | None, folder: str) -> Callable[[list[Group]], dict[str, float]]:
    model, step = {
        "padded": partial(padded, path),
        "trl": partial(padded, path, trl),
        "packed": partial(packed, path, False),
        "rlkd": partial(packed, path, True),
    }[form]()
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.0)  # there before anything is measured
    gc.collect()
    first = True

    def work(groups: list[Group]) -> dict[str, float]:
        nonlocal first
        for p in model.parameters():
            p.grad.zero_()
        counts: list[tuple[int, int]] = []
        found = {}
        if first:
            found["extra"] = extra_bytes(lambda: counts.append(step(groups)))
            torch.save({n.removeprefix("model."): p.grad for n, p in model.named_parameters()}, f"{folder}/{form}.pt")
            first = False
        else:
            found["seconds"] = seconds(lambda: counts.append(step(groups)))
        found["computed"], found["rows"] = counts[0]
        return found

    return work


def gemm() -> Callable[[Any], float]:
    """Floating-point operations a second of the fastest product there is here, at the trunk's size."""
    from rlkd.core.matmul import product

    a, b = torch.randn(2048, 1536), torch.randn(1536, 1536)
    product(a, b)
    return lambda _: 2 * 2048 * 1536 * 1536 / min(seconds(lambda: product(a, b)) for _ in range(5))


# --- the rounds


def measured(path: Path, lengths: str, rounds: int, threads: int, trl: str | None) -> list[str]:
    """Rows of the table for a model and a kind of lengths."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    forms = [form for form in FORMS if form != "trl" or trl]
    found: dict[str, list[dict[str, float]]] = {form: [] for form in forms}
    nominal, speed = [], []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        makers: dict[str, Any] = {f: partial(side, f, str(path), trl, folder) for f in forms}
        with children({**makers, "gemm": gemm}, threads) as sides:
            for number in range(rounds + 1):  # the first one warms up, and is where memory and gradients are taken
                groups = drawn(number, config.vocab_size, lengths)
                nominal.append(sum(len(s.tokens) for g in groups for s in g.samples))
                for form in forms:
                    found[form].append(sides[form](groups))
                speed.append(sides["gemm"](None))
        errors = {form: error(Path(folder), form) for form in forms}
    rates = {form: [n / f["seconds"] for n, f in zip(nominal[1:], found[form][1:], strict=True)] for form in forms}
    peak, size = statistics.median(speed), sizes(config)
    rows = []
    for form in forms:
        timed = found[form][1:]
        computed = [f["computed"] / f["seconds"] for f in timed]
        used = [6 * (size[0] * f["computed"] + size[1] * f["rows"]) / f["seconds"] / peak for f in timed]
        rows.append(
            f"| {path.name} | {lengths} | {FORMS[form]} | {spread(rates[form])} | "
            f"{ratio(rates[form], rates['padded']):.2f} | {statistics.median(computed):.0f} | "
            f"{statistics.median(used):.0%} | {found[form][0]['extra'] / MIB:.0f} | {errors[form]:.1e} |"
        )
    return rows


def sizes(config: Any) -> tuple[int, int]:
    """Parameters of the trunk's matrices, and of the head's."""
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    trunk = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    return trunk, head.weight.numel()


def error(folder: Path, form: str) -> float:
    """‖gradient − that of the padded form‖ / ‖that of the padded form‖."""
    ours, theirs = (torch.load(folder / f"{name}.pt", mmap=True) for name in (form, "padded"))
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    gap = sum((ours[n].double() - theirs[n].double()).square().sum() for n in theirs)
    return float((gap / sum(t.double().square().sum() for t in theirs.values())).sqrt())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--lengths", nargs="+", default=["tail", "uniform"], choices=["tail", "uniform"])
    parser.add_argument("--trl-python", help="the Python of an environment with TRL (benchmarks/vs_trl.py)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    head = about("torch", "transformers")
    trl = site_of(options.trl_python)
    rows = [
        row
        for path in options.models
        for lengths in options.lengths
        for row in measured(path, lengths, options.rounds, options.threads, trl)
    ]
    written("learner.md", [
        "# The learner's two passes: padded and packed",
        "",
        f"`python -m benchmarks.learner MODEL …`, {head}",
        f"float32, {options.threads} threads, {options.rounds} rounds after one that warms up; {GROUPS} prompts of "
        f"{PROMPT[0]}–{PROMPT[1]} tokens × {SAMPLES} answers: *uniform* of 60 tokens, *tail* lognormal (median "
        f"{ANSWER}, σ {SIGMA}, at most {LONGEST}). No optimizer step." + ("" if trl else " TRL's head was not run."),
        "",
        "| model | lengths | form | nominal tokens/s | × padded | computed tokens/s | of the fastest product | "
        "MiB beyond weights and gradients | gradient, relative error |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        "*× padded*: median of the rounds' ratios. *Of the fastest product*: six operations for every weight of the "
        "trunk and computed token, and of the head and predicted token, beside what `core/matmul.py` does at "
        "2048 × 1536 × 1536, measured in the same rounds.",
    ], options.results)  # fmt: skip


if __name__ == "__main__":
    main()
