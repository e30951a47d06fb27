"""The tiny student: a Llama of 0.86 M parameters over characters that adds three-digit numbers, and is often wrong.

`python -m rlkd.models.tiny DIR` makes it anew. The copy that rlkd ships (SHIPPED) was made by that command. Supervised
training on fresh random problems stops as soon as it is right on TARGET of them sampled at temperature 1: far enough
that reinforcement learning finds right answers to learn from, and early enough to leave it something to learn.
The same seed, threads, torch and kind of CPU give the same weights; others give other weights of the same accuracy.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Int64
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlkd.core.errors import InfrastructureError, RlkdError
from rlkd.models.arithmetic import LONGEST_WORKED, Problem, Split, problems, score
from rlkd.models.folder import new_folder

SHIPPED = Path(__file__).parent / "tiny_student"

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
CHARACTERS = "0123456789+=;# \n-*/()<>,.:?!"  # with the four above 32: no row of the embedding is without a token
CONTEXT = 256  # tokens
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)

BATCH = 64
LEARNING_RATE = 1e-3
WARMUP_STEPS = 50
MOST_STEPS = 600
TARGET = 0.30
CHECK_EVERY, CHECK_PROBLEMS = 10, 512
FIRST_CHECK = 150
THREADS = 2
NOT_TRAINED = -100  # label that the loss leaves out


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character. A character it does not know becomes <unk>; <bos> starts every text."""
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, UNKNOWN, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=CONTEXT,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def untrained(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """4 layers × 128, 4 heads of 32 (vLLM's CPU attention wants a multiple of 32); embedding and LM head are tied, as in
    most small models, so that every test with this student also tests that weight updates reach a tied head."""
    torch.manual_seed(seed)
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def questions(tokenizer: PreTrainedTokenizerFast, asked: Sequence[Problem]) -> Int64[Tensor, "n p"]:
    """The prompts' tokens; every question is equally long, so there is no padding."""
    return torch.tensor([tokenizer(problem.question).input_ids for problem in asked])


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: Sequence[Problem], *, greedy: bool = False
) -> float:
    """The share of problems answered right by one answer each, sampled at temperature 1 (torch's seed) or greedily."""
    prompts = questions(tokenizer, asked)
    was_training = model.training
    model.eval()
    written = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        generation_config=GenerationConfig(
            do_sample=not greedy,
            top_k=None if greedy else 0,
            max_new_tokens=LONGEST_WORKED + 8,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
    )
    model.train(was_training)
    texts = tokenizer.batch_decode(written[:, prompts.shape[1] :], skip_special_tokens=True)
    return sum(score(text, problem.answer) for text, problem in zip(texts, asked, strict=True)) / len(asked)


def worked_batches(
    tokenizer: PreTrainedTokenizerFast, seed: int
) -> Iterator[tuple[Int64[Tensor, "b n"], Int64[Tensor, "b n"]]]:
    """MOST_STEPS batches of tokens and labels from the training split, no problem twice. The loss is on the answer."""
    drawn = problems(Split.TRAIN, MOST_STEPS * BATCH, seed)
    for start in range(0, len(drawn), BATCH):
        batch = drawn[start : start + BATCH]
        texts = [problem.question + problem.worked + EOS for problem in batch]
        tokens = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids
        labels = tokens.masked_fill(tokens == tokenizer.pad_token_id, NOT_TRAINED)
        labels[:, : questions(tokenizer, batch).shape[1]] = NOT_TRAINED
        yield tokens, labels


def warm_start(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> int:
    """Trains `model` in place until it is right on TARGET of its own checks; the number of optimizer steps it took.

    The problems it is checked on come from the training split: the held-out ones play no part in the stop.
    Raises InfrastructureError if MOST_STEPS do not get it there.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    checks = problems(Split.TRAIN, CHECK_PROBLEMS, seed + 1)
    model.train()
    right = 0.0
    for step, (tokens, labels) in enumerate(worked_batches(tokenizer, seed), start=1):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, step / WARMUP_STEPS)
        model(input_ids=tokens, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step >= FIRST_CHECK and step % CHECK_EVERY == 0:
            right = accuracy(model, tokenizer, checks)
            print(f"step {step:3d}: right on {right:.0%} of {CHECK_PROBLEMS}, sampled", flush=True)
            if right >= TARGET:
                return step
    raise InfrastructureError(
        "RLKD-E702",
        f"the warm start reached {right:.0%} in {MOST_STEPS} steps, not {TARGET:.0%}",
        where="rlkd.models.tiny",
        fix="try another --seed, or use the student that rlkd ships: rlkd model get tiny DIR",
    )


def make(directory: Path, seed: int) -> None:
    """A Hugging Face folder with the warm-started student, its weights rounded to float16 (1.7 MB).

    Raises PreflightError if `directory` holds something already.
    """
    torch.set_num_threads(THREADS)
    with new_folder(directory) as folder:
        tokenizer = character_tokenizer()
        model = untrained(tokenizer, seed)
        steps = warm_start(model, tokenizer, seed)
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        held_out = problems(Split.HOLDOUT, 2000, seed)
        rounded = model.float()
        sampled, greedy = (accuracy(rounded, tokenizer, held_out, greedy=mode) for mode in (False, True))
    print(f"{directory}: {steps} steps; {len(held_out)} held-out problems: {sampled:.1%} sampled, {greedy:.1%} greedy")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlkd.models.tiny", description="Make the tiny student anew.")
    parser.add_argument("directory", type=Path, help="a new folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        make(options.directory, options.seed)
    except RlkdError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
