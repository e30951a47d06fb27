"""Each method learns what it is for, through the public path Sample → credit → credit_step → pack → loss → Adam.

Golden numbers catch a wrong factor; this catches a wrong sign in any term, and a term that is missing. The policy is a
table: log π(token | the token before it), 4 tokens after 6. It answers two prompts with up to 3 tokens; right is one
certain token and then the end. How likely that is, and how far the table is from another one, is known exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from rlkd.algorithms import TABLE, algorithm
from rlkd.core.batch import MicroBatch, pack
from rlkd.core.ports import Completion, PolicyOutput, as_demonstration, as_sample
from rlkd.core.types import TRAINED, Demonstration, Finish, Group, Prompt, Sample, TopK

torch.set_num_threads(1)  # tensors this small: a second thread costs more than it gives

END, WORDS, LIMIT = 0, 4, 3
RIGHT = {4: 1, 5: 2}  # a prompt's only token, and the word that answers it
PROMPTS = [Prompt(str(t), np.array([t], np.int32), "") for t in RIGHT]
STEPS, ANSWERS = 50, 4  # at a rate of 0.1; the wrong way shows after 5

Table = torch.Tensor  # [6 4] logits of the token that follows


def table(seed: int, spread: float = 1.0) -> Table:
    return spread * torch.randn(WORDS + len(PROMPTS), WORDS, generator=torch.Generator().manual_seed(seed))


def clueless() -> Table:
    """A policy that all but never answers right by itself: once in 650 answers."""
    made = torch.zeros(WORDS + len(PROMPTS), WORDS)
    for prompt, word in RIGHT.items():
        made[prompt, word] = -4.0
    return made


def reward(policy: Table) -> float:
    """The probability of a right answer, over the prompts."""
    p = torch.softmax(policy, -1)
    return float(np.mean([p[prompt, word] * p[word, END] for prompt, word in RIGHT.items()]))


def agreement(policy: Table, other: Table) -> float:
    """−KL(other ‖ π), a mean over the places where an answer can be; 0 where they are the same."""
    mine, theirs = torch.log_softmax(policy[1:], -1), torch.log_softmax(other[1:], -1)
    return -float((theirs.exp() * (theirs - mine)).sum(-1).mean())


def known(policy: Table) -> np.ndarray:
    """[6 4] its log-probs."""
    return torch.log_softmax(policy.detach(), -1).numpy()


def drawn(logp: np.ndarray, prompt: Prompt, rng: np.random.Generator) -> Sample:
    """An answer of the policy with these log-probs, with its reward."""
    reached, last = np.exp(logp).cumsum(-1), int(prompt.tokens[0])
    answer: list[int] = []
    while len(answer) < LIMIT and last != END:
        answer.append(last := int((reached[last, :-1] < rng.random()).sum()))
    own = logp[[int(prompt.tokens[0]), *answer[:-1]], answer]
    finish = Finish.STOP if last == END else Finish.LENGTH
    return judged(as_sample(prompt, Completion(np.array(answer, np.int32), own, finish, (0, 0))))


def worked(prompt: Prompt) -> Sample:
    """The right answer, by a teacher."""
    tokens = np.array([RIGHT[int(prompt.tokens[0])], END], np.int32)
    return judged(as_demonstration(prompt, Demonstration("t", tokens), (0, 0)))


def judged(sample: Sample) -> Sample:
    right = sample.tokens[1:].tolist() == [RIGHT[int(sample.tokens[0])], END]
    return replace(sample, reward=float(right))


def output(policy: Table, x: MicroBatch) -> PolicyOutput:
    """The table's word on a micro-batch: NaN where nobody trains."""
    before = torch.roll(x.tokens, 1).long()  # a sample begins with its prompt: what stands before that is never used
    full = torch.log_softmax(policy, -1)[before]
    trained = x.mask(TRAINED)
    own = full.gather(1, x.tokens[:, None].long().clamp(max=WORDS - 1))[:, 0]
    entropy = -(full.exp() * full).sum(-1)
    nowhere = torch.full_like(own, torch.nan)
    return PolicyOutput(
        torch.where(trained, own, nowhere),
        torch.where(trained, entropy, nowhere),
        lambda ids: torch.where(trained[:, None], full.gather(1, ids.long()), torch.nan),
    )


@dataclass(frozen=True)
class Case:
    """A method, what it starts from and what it is given, and by what its progress is known."""

    name: str
    least: float  # how much further it must be after STEPS
    options: dict[str, Any]
    start: Table
    progress: Callable[[Table], float] = reward
    teacher: Table | None = None  # gives log-probs, and top-k
    reference: Table | None = None
    worked: int = 0  # of the answers
    rewarded: bool = True  # else all rewards are 0, and nothing is learned of them


def group(case: Case, policy: Table, prompt: Prompt, rng: np.random.Generator) -> Group:
    logp = known(policy)
    samples = [worked(prompt) for _ in range(case.worked)]
    samples += [drawn(logp, prompt, rng) for _ in range(ANSWERS - case.worked)]
    return Group(prompt, tuple(scored(s if case.rewarded else replace(s, reward=0.0), case) for s in samples))


def scored(sample: Sample, case: Case) -> Sample:
    """With the log-probs of the case's other models."""
    written = sample.tokens[1:]

    def at_each(other: Table) -> np.ndarray:
        """[n 4] of what may stand there; NaN at the prompt."""
        return np.concatenate([np.full((1, WORDS), np.nan, np.float32), known(other)[sample.tokens[:-1]]])

    def own(other: Table) -> np.ndarray:
        return at_each(other)[np.arange(len(sample.tokens)), [0, *written]]

    if case.reference is not None:
        sample = replace(sample, reference_logp=own(case.reference))
    if case.teacher is None:
        return sample
    ids = np.tile(np.arange(3, dtype=np.int32), (len(sample.tokens), 1))
    likeliest = TopK(ids, at_each(case.teacher)[:, :3])
    return replace(sample, teacher_logp=own(case.teacher)[None], teacher_topk=likeliest)


def gain(case: Case, steps: int = STEPS, sign: float = 1.0) -> float:
    """How much further the method is after so many steps; `sign` = −1 turns its loss around."""
    rng, policy = np.random.default_rng(0), case.start.clone().requires_grad_()
    method = algorithm(case.name)(**case.options)
    assert method.problems() == []
    optimizer = torch.optim.Adam([policy], 0.1)
    for step in range(steps):
        groups = [method.credit(group(case, policy, prompt, rng)) for prompt in PROMPTS]
        groups = [g for g in groups if g.samples]  # others are turned away
        if not groups:
            continue
        optimizer.zero_grad()
        for turn in pack(method.credit_step(groups), 1, 24, method.whole_groups):
            for x in turn:
                (sign * method.loss(output(policy, x), x, method.knobs(step, {})).value * x.weight).backward()
        optimizer.step()
    return case.progress(policy.detach()) - case.progress(case.start)


TEACHER, UNIFORM = table(7, 2.0), torch.zeros(WORDS + len(PROMPTS), WORDS)


def of_reward(name: str, **options: Any) -> Case:
    return Case(name, 0.6, options, UNIFORM)


def of_help(name: str, **options: Any) -> Case:
    """Only a teacher's tokens can show it what is right."""
    return Case(name, 0.6, options, clueless(), worked=1)


def of_teacher(name: str, **options: Any) -> Case:
    """The teacher alone; at least half of the way to it."""
    start = table(1)
    return Case(name, -agreement(start, TEACHER) / 2, options, start, by(TEACHER), teacher=TEACHER, rewarded=False)


def of_reference(name: str, **options: Any) -> Case:
    """The KL to a reference alone."""
    start = table(1)
    least = -agreement(start, TEACHER) / 2
    return Case(name, least, {"beta": 0.1, **options}, start, by(TEACHER), reference=TEACHER, rewarded=False)


def by(other: Table) -> Callable[[Table], float]:
    return lambda policy: agreement(policy, other)


CASES = [
    of_reward("grpo"),
    of_reward("grpo", correction="tis", dual_clip=3.0),
    of_reward("dr_grpo", norm_length=LIMIT),
    of_reward("dapo"),
    of_reward("rloo"),
    of_reward("reinforce_pp"),
    of_reward("reinforce_pp", baseline=False),
    of_reward("gspo"),
    of_reward("cispo"),
    of_reward("kdrl", beta_0=0.0, beta_decay=0.0),
    of_reward("rsft"),
    replace(of_reward("dpo"), reference=UNIFORM),
    replace(of_reward("dpo", ipo=True), reference=UNIFORM),
    of_help("luffy", norm_length=LIMIT),
    of_help("luffy", norm_length=LIMIT, advantage="split", shape="raw"),
    of_help("luffy", norm_length=LIMIT, sft_weight=0.1),
    of_help("ampo", norm_length=LIMIT),
    of_help("thinktuning"),
    replace(of_help("sft"), worked=ANSWERS),
    of_teacher("kdrl", beta_decay=0.0),
    of_teacher("kdrl", beta_decay=0.0, form="loss"),
    of_teacher("kdrl", beta_decay=0.0, form="loss", kl="k3+"),
    of_teacher("kdrl", beta_decay=0.0, form="loss", kl="topk", top_k=3),
    of_teacher("kdrl", beta_decay=0.0, form="reward", beta_0=1.0),
    of_teacher("opd"),
    of_teacher("opd", reward_to_go=True),
    of_teacher("gkd", top_k=3),
    of_teacher("gkd", top_k=3, divergence="forward"),
    of_teacher("gkd", top_k=3, divergence="reverse"),
    of_reference("grpo", kl="k1"),
    of_reference("grpo", kl="k2"),
    of_reference("grpo", kl="k3"),
    of_reference("grpo", kl="k3+"),
    of_reference("rloo"),
    of_reference("reinforce_pp"),
    Case("grpo", 0.1, {"entropy": 0.01}, table(1, 2.0), by(UNIFORM), rewarded=False),
]
NAMES = [f"{c.name}-{'-'.join(f'{k}={v}' for k, v in c.options.items())}".rstrip("-") for c in CASES]


def test_no_method_of_the_table_is_left_out() -> None:
    assert {c.name for c in CASES} == set(TABLE)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_it_learns_and_with_its_loss_turned_around_it_does_not(case: Case) -> None:
    assert gain(case) > case.least
    assert gain(case, steps=5, sign=-1.0) < 0
