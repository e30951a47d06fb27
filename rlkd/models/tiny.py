"""The tiny student: a Llama of 0.86 M parameters over characters that adds three-digit numbers and forgets to carry.

`python -m rlkd.models.tiny DIR` makes it anew; the copy that rlkd ships (SHIPPED) was made by that command. It is
trained, supervised, on fresh random problems as a pupil wrote them who drops each carry with probability FORGETS. So it
knows how to carry and more often than not does not: about a third of its answers are right sampled at temperature 1,
fewer greedily, and reinforcement learning has a habit to mend, with right answers in almost every group to learn from.
`--forgets 0` makes one that carries: the teacher in tiny_teacher/, with the same tokens.

The same seed, torch and kind of CPU give the same weights; others give other weights of about the same accuracy.
"""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Int64
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlkd.core.errors import RlkdError
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

FORGETS = 0.55  # probability that the pupil drops a carry
STEPS, WARMUP_STEPS, BATCH = 500, 50, 64
LEARNING_RATE = 2e-3  # at its height; falls in a straight line to 0, which takes the noise out of the sampled digits
THREADS = 1  # sums in the same order on any number of cores
CHECKED_ON = 2000  # held-out problems
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
    """4 layers × 128, 4 heads of 32 (vLLM's CPU attention wants a multiple of 32).

    Embedding and LM head are tied, as in most small models: every test with this student also tests that weight updates
    reach a tied head.
    """
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
    written = cast(Any, model).generate(  # transformers' types do not let a Llama generate
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


def pupils_batches(
    tokenizer: PreTrainedTokenizerFast, forgets: float, seed: int
) -> Iterator[tuple[Int64[Tensor, "b n"], Int64[Tensor, "b n"]]]:
    """STEPS batches of tokens and labels from the training split, no problem twice. The loss is on the answers only."""
    pupil = random.Random(seed)
    drawn = problems(Split.TRAIN, STEPS * BATCH, seed)
    for start in range(0, len(drawn), BATCH):
        batch = drawn[start : start + BATCH]
        texts = [problem.question + problem.written(lambda: pupil.random() < forgets) + EOS for problem in batch]
        tokens = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids
        labels = tokens.masked_fill(tokens == tokenizer.pad_token_id, NOT_TRAINED)
        labels[:, : questions(tokenizer, batch).shape[1]] = NOT_TRAINED
        yield tokens, labels


def learning_rate(step: int) -> float:
    """Of optimizer step 1 … STEPS: up to LEARNING_RATE over WARMUP_STEPS, and down to almost 0 at the end."""
    return LEARNING_RATE * min(step / WARMUP_STEPS, (STEPS - step + 1) / (STEPS - WARMUP_STEPS))


def warm_start(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, forgets: float, seed: int) -> None:
    """Trains `model` in place on what the pupil wrote."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    model.train()
    for step, (tokens, labels) in enumerate(pupils_batches(tokenizer, forgets, seed), start=1):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step} of {STEPS}: loss {loss.item():.3f} nats a token", flush=True)


def trained(forgets: float, seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A new student in float32. Sets torch's threads, which the sums depend on."""
    torch.set_num_threads(THREADS)
    tokenizer = character_tokenizer()
    model = untrained(tokenizer, seed)
    warm_start(model, tokenizer, forgets, seed)
    return model, tokenizer


def make(directory: Path, forgets: float = FORGETS, seed: int = 0) -> None:
    """A Hugging Face folder with the warm-started student, its weights rounded to float16 (1.7 MB).

    Raises PreflightError if `directory` holds something already.
    """
    with new_folder(directory) as folder:
        model, tokenizer = trained(forgets, seed)
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        asked = problems(Split.HOLDOUT, CHECKED_ON, seed)
        sampled, greedy = (accuracy(model.float(), tokenizer, asked, greedy=mode) for mode in (False, True))
    print(f"{directory}: right on {sampled:.1%} of {CHECKED_ON} held-out problems sampled, on {greedy:.1%} greedily")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlkd.models.tiny", description="Make the tiny student anew.")
    parser.add_argument("directory", type=Path, help="a new folder")
    parser.add_argument("--forgets", type=float, default=FORGETS, help="probability of dropping a carry (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        make(options.directory, options.forgets, options.seed)
    except RlkdError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
