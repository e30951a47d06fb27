"""TRL's GRPOTrainer on the work that vs_trl.py describes. Runs in TRL's own environment; imports nothing of rlkd.

    python benchmarks/trl_side.py SPEC.json OUT.json

Every answer's length is forced (the end token is forbidden before it, generation of the row stops at it), so that both
sides write and train the same number of tokens.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class StopAtLengths(StoppingCriteria):
    """Ends row i once it has lengths[i] new tokens."""

    def __init__(self, prompt_tokens: int, lengths: list[int]) -> None:
        self.ends = torch.tensor(lengths) + prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.as_tensor(input_ids.shape[1] >= self.ends)


def force_lengths(model: Any, lengths_by_step: list[list[int]]) -> None:
    """Make model.generate write rows of the given lengths, step by step."""
    plain, calls = model.generate, iter(lengths_by_step)

    def generate(**kwargs: Any) -> Any:
        lengths, ids = next(calls), kwargs["input_ids"]
        assert ids.shape[0] == len(lengths), (ids.shape, len(lengths))
        kwargs["generation_config"].min_new_tokens = max(lengths)  # no end token by chance
        kwargs["stopping_criteria"] = [StopAtLengths(ids.shape[1], lengths)]
        return plain(**kwargs)

    model.generate = generate


class Clock(TrainerCallback):
    """Seconds of each optimizer step, generation included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not hasattr(self, "began"):
            self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.began)
        self.began = now


def main(spec_path: str, out_path: str) -> None:
    spec = json.loads(Path(spec_path).read_text())
    torch.set_num_threads(spec["threads"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    force_lengths(model, spec["lengths"])
    rows = [{"prompt": [{"role": "user", "content": text}]} for step in spec["prompts"] for text in step]
    samples = spec["samples"] * len(spec["prompts"][0])
    written: list[int] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        written.extend(len(c) for c in completion_ids)
        return [float(sum(c) % 2) for c in completion_ids]

    config = GRPOConfig(
        output_dir=str(Path(out_path).parent / "trl"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=spec["trl_batch"],
        gradient_accumulation_steps=samples // spec["trl_batch"],
        num_generations=spec["samples"],
        max_completion_length=max(max(step) for step in spec["lengths"]),
        max_steps=len(spec["prompts"]),
        learning_rate=spec["lr"],
        lr_scheduler_type="constant",
        beta=5e-3 if "teacher" in spec else 0.0,  # its reference is the model's start: the same work as a teacher
        temperature=1.0,
        loss_type="grpo",
        shuffle_dataset=False,
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        save_strategy="no",
        report_to=[],
        logging_steps=1000,
        disable_tqdm=True,
        seed=0,
    )
    clock = Clock()
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        callbacks=[clock],
    )
    trainer.train()
    Path(out_path).write_text(json.dumps({"seconds": clock.seconds, "written": written}))


if __name__ == "__main__":
    main(*sys.argv[1:])
