"""The models and traces that benchmarks/papers.py needs, made once and kept in its work folder."""

import functools
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from papers_methods import CARRIES, HOLDOUT, MODELS, TRACES, TRAIN, Made

BATCH = 500  # answers written at once
_one_at_a_time = threading.Lock()  # torch's random state, and imports that are not safe in threads


def make_models(work: Path, at_once: int) -> None:
    """Each in a process of its own, a few minutes each. Those that are there stay. CalledProcessError if one fails."""

    def make(made: Made) -> None:
        if (work / made.name).exists():
            return
        print(f"making {made.name} ({made.about})", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "rlkd.models.tiny", "--forgets", str(made.forgets), "--seed", str(made.seed),
                   str(work / made.name)]  # fmt: skip
        subprocess.run(command, check=True, timeout=3600, stdout=sys.stderr)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(make, MODELS))  # raises what went wrong


def make_traces(work: Path) -> None:
    """One sampled answer of each teacher to each training problem, right or wrong, as `data.train.traces` reads them.

    No reward is written beside them: who uses them must find out which are right.
    """
    from rlkd.models.arithmetic import Split, problems
    from rlkd.report.files import replace_file

    missing = [name for name in TRACES if not (work / f"traces-{name}.jsonl").exists()]
    if not missing:
        return
    asked = problems(Split.TRAIN, TRAIN, 0, CARRIES)  # as the recipes' data source makes them
    rows: dict[str, list[str]] = {}
    for teacher in {made.name: made for name in missing for made in TRACES[name]}.values():
        print(f"{teacher.name} writes {TRAIN} traces", file=sys.stderr, flush=True)
        texts = written(work / teacher.name, [p.question for p in asked], seed=teacher.seed)
        rows[teacher.name] = [
            json.dumps({"id": f"arithmetic-train:{number}", "teacher": teacher.name, "text": text})
            for number, text in enumerate(texts, start=1)
        ]
    for name in missing:
        lines = [line for made in TRACES[name] for line in rows[made.name]]
        replace_file(work / f"traces-{name}.jsonl", "\n".join(lines) + "\n")


def written(folder: Path, questions: Sequence[str], seed: int | None) -> list[str]:
    """One answer to each question, sampled at temperature 1, or greedy with no seed."""
    with _one_at_a_time:
        return _written(folder, questions, seed)


def _written(folder: Path, questions: Sequence[str], seed: int | None) -> list[str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    from rlkd.models.arithmetic import LONGEST_WORKED

    disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(seed or 0)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    how = GenerationConfig(
        do_sample=seed is not None,
        top_k=None if seed is None else 0,
        max_new_tokens=LONGEST_WORKED + 16,  # as sampler.max_tokens: 48
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts: list[str] = []
    for start in range(0, len(questions), BATCH):
        tokens = torch.tensor([tokenizer(q).input_ids for q in questions[start : start + BATCH]])
        with torch.inference_mode():
            out = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=how)
        texts += tokenizer.batch_decode(out[:, tokens.shape[1] :], skip_special_tokens=True)
    return texts


def greedy(folder: Path) -> float:
    """The share of the held-out problems that the model of this folder answers right greedily."""
    from rlkd.models.arithmetic import Split, problems, score

    asked = problems(Split.HOLDOUT, HOLDOUT, 0, CARRIES)
    texts = written(folder, [p.question for p in asked], seed=None)
    return sum(score(text, p.answer) for text, p in zip(texts, asked, strict=True)) / len(asked)


@functools.cache
def right_traces(work: Path, name: str) -> dict[str, float]:
    """The share of right texts of each teacher, and under "any" of problems for which one of them is right."""
    from rlkd.models.arithmetic import Split, problems, score

    answers = {f"arithmetic-train:{n}": p.answer for n, p in enumerate(problems(Split.TRAIN, TRAIN, 0, CARRIES), 1)}
    right: dict[str, set[str]] = {}
    for line in (work / f"traces-{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        found = right.setdefault(row["teacher"], set())
        if score(row["text"], answers[row["id"]]):
            found.add(row["id"])
    shares = {teacher: len(ids) / TRAIN for teacher, ids in right.items()}
    return {**shares, "any": len(set().union(*right.values())) / TRAIN}
