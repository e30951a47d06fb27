"""Every setting of a run, with its default in this one place. A recipe (yaml) says only what differs.

Three numbers make a batch: `schedule.groups_per_step` prompts × `algorithm.rollout.samples` answers each are one
optimizer step; `learner.max_tokens` bounds one micro-batch and never changes the gradient.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from rlkd.train.loop import Schedule


@dataclass(frozen=True)
class ModelConfig:
    """The policy's start. `path` is a Hugging Face folder (config, tokenizer, safetensors)."""

    path: str = "???"  # OmegaConf's mark for "must be given"
    context: int | None = None  # tokens of prompt + answer; None: what the model's config says
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32 on CPU, bfloat16 on GPU
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["auto", "sdpa", "flash"] = (
        "auto"  # of the learner and the scorers; auto: flash on GPU if installed
    )
    chat_template: str | None = None  # a Jinja file; None: the tokenizer's own
    system: str | None = None  # a system message put before every prompt
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Source:
    """Where prompts come from."""

    kind: Literal["jsonl", "parquet", "huggingface", "reasoning_gym", "arithmetic"] = "jsonl"
    path: str = ""  # a file, a dataset folder on disk, or a reasoning-gym task's name
    size: int | None = None  # rows to generate, or at most this many rows of a file; None: all (generators need it)
    seed: int = 0  # of a generator
    split: str = "train"  # of a Hugging Face dataset; "train" or "holdout" of the arithmetic task
    options: dict[str, Any] = field(default_factory=dict)  # the generator's own settings
    prompt: str = "prompt"  # column: a string, or a list of chat messages
    answer: str = "answer"  # column: what the verifier checks against
    id: str = "id"  # column; rows without one are numbered
    demonstrations: str | None = None  # column: worked answers, texts or {teacher, text, quality}; None: rows have none
    traces: str | None = None  # jsonl of worked answers by prompt: {id, teacher, text, quality}; the format rlkd writes


@dataclass(frozen=True)
class DataConfig:
    train: Source = field(default_factory=Source)
    holdout: Source | None = None  # for evaluation; never trained on
    max_prompt_tokens: int | None = None  # None: what is left of the context beside the answer
    # prompts over it: left out; an error; or cut on the left, within the chat template. Always counted and shown
    too_long: Literal["drop", "fail", "truncate_left"] = "drop"
    bad_rows: Literal["fail", "drop"] = "fail"
    max_bad_fraction: float = 0.1  # with drop: a larger share of a source's rows is an error all the same
    chat: bool = True  # put prompts through the chat template


@dataclass(frozen=True)
class CurriculumConfig:
    """Which prompt comes next: every one once an epoch, or those that are neither too easy nor too hard."""

    name: Literal["uniform", "difficulty"] = "uniform"
    low: float = 0.05  # difficulty: a prompt that passes less often is too hard for now
    high: float = 0.95  # difficulty: a prompt that passes more often is too easy
    recent: float = 0.5  # difficulty: weight of the newest group in a prompt's running pass rate
    again: int = 4  # difficulty: a prompt outside is tried again this many epochs after its last try


@dataclass(frozen=True)
class SamplerConfig:
    """The rollout workers: how the policy is sampled."""

    engine: Literal["vllm", "hf"] = "vllm"
    workers: int = 1
    min_workers: int | None = None  # the run starts with so many, and saves and ends with fewer for
    # min_workers_timeout_s; None: starts with all of `workers`, goes on while there is one
    max_workers: int | None = (
        None  # more are started while the cluster has room, also on nodes that join; None: workers
    )
    max_tokens: int = 256  # of an answer
    min_tokens: int = 0  # of an answer; the end token is forbidden before (benchmarks)
    temperature: float = 1.0
    top_p: float = 1.0
    max_num_seqs: int = 256  # sequences decoded at once by one worker
    tensor_parallel: int = 1
    kv_cache_gib: float = 1.0  # CPU; on GPU see gpu_memory_utilization
    gpu_memory_utilization: float = 0.5  # learner and sampler may share a GPU
    block_size: int | None = None  # None: 32 on CPU, so that prompts over 32 tokens are shared; vLLM's choice on GPU
    prefix_caching: bool = True
    enforce_eager: bool | None = None  # None: eager on CPU (compiling costs 97 s of start), graphs on GPU
    timeout_s: float = 600.0  # of one group's generation
    stall_s: float = 120.0  # a worker that has work and writes no token for this long is killed and replaced
    hedge: float | None = 3.0  # a group that takes so many times the usual is also asked of a worker that has time, and
    # the first answer is taken; null: never, and so with deterministic=true
    min_workers_timeout_s: float = 600.0  # with too few workers (or no node for the learner); then the run ends
    replacements: int = 3  # of one worker in a row without an answer in between, then it is out; all out: the run ends
    replacements_in_10_min: int = 10  # of one worker whatever it answered in between, then it is out
    threads: int | None = None  # None: planned (workers/threads.py)


@dataclass(frozen=True)
class ScorerConfig:
    """A frozen model that gives log-probs: the reference or a teacher."""

    path: str | None = None  # None: the policy's start
    workers: int = 1
    max_tokens: int = 16384  # of one forward pass
    timeout_s: float = 600.0
    stall_s: float = 120.0  # a worker that has work and gets nowhere for this long is killed and replaced: no layer
    # computed where it scores, no token where it writes
    threads: int | None = None


@dataclass(frozen=True)
class WriterConfig:
    """How a teacher writes, where an algorithm asks teachers for text."""

    engine: Literal["vllm", "hf"] = "vllm"  # of a local teacher
    max_tokens: int = 1024  # of one text
    context: int | None = None  # tokens of messages + text, of a local teacher; None: what its model's config says
    temperature: float = 0.0
    top_p: float = 1.0
    chat: bool = True  # put messages through the teacher's own chat template; else their contents follow one another
    system: str | None = None  # a system message, where a call brings none
    max_num_seqs: int = 64
    kv_cache_gib: float = 1.0
    gpu_memory_utilization: float = 0.5


@dataclass(frozen=True)
class EndpointConfig:
    """A teacher behind an OpenAI-compatible API: it writes text, and cannot score."""

    url: str = "???"  # up to and with /v1
    model: str = "???"
    key_env: str | None = None  # the environment variable that holds the API key; the key itself is in no file
    requests_per_minute: float | None = None
    at_once: int = 16  # requests under way
    retries: int = 5  # of one request, after 429, 5xx, a dropped connection or a timeout
    timeout_s: float = 120.0  # of one request
    max_total_tokens: int | None = None  # budget of the whole run: prompts and texts, resumed runs included
    max_cost: float | None = None  # budget of the whole run, in the currency of the prices
    price_in: float | None = None  # per million tokens
    price_out: float | None = None


@dataclass(frozen=True)
class TeacherConfig(ScorerConfig):
    """A frozen local model that scores or writes, whichever the algorithm asks for; or an endpoint that writes."""

    writer: WriterConfig = field(default_factory=WriterConfig)
    endpoint: EndpointConfig | None = None
    # When its workers are lost: replace them and ask again; end the run (saved, exit 6) when none is left; or go on
    # without its log-probs while there is none, which are then unknown, and counted (docs/reliability.md).
    on_unavailable: Literal["wait", "fail", "skip_kd"] = "wait"


@dataclass(frozen=True)
class VerifierConfig:
    """The reward workers: each runs verifiers in child processes that can be killed."""

    workers: int = 1
    processes: int = 1  # children per worker
    timeout_s: float = 10.0  # of one group
    memory_gib: float = 2.0  # of one child
    on_error: Literal["fail", "drop", "zero"] = (
        "fail"  # a reward that raises: stop, leave the sample out, or 0 by choice
    )
    max_error_fraction: float = 0.05  # stop above this share of unjudged samples (over at least 200), whatever on_error
    recheck_fraction: float = 0.0  # judge this share of the groups twice: does a reward contradict itself?
    min_tier: Literal["process", "userns+landlock"] = "userns+landlock"  # of rewards that run code a model wrote
    accept_unsafe_code: bool = False  # run such code even where this machine has no sandbox for it


@dataclass(frozen=True)
class LearnerConfig:
    ranks: int = 1
    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: float = 1.0
    zero_stage: Literal[0, 1, 2, 3] | None = None  # None: 0 on one rank, 1 on several
    offload: bool = False  # optimizer state to host memory (GPU)
    max_tokens: int = 4096  # of one micro-batch
    share_prompt: bool = True  # compute a group's prompt once
    head_rows: int = 128  # rows of logits held at once
    gradient_checkpointing: bool = False
    timeout_s: float = 1800.0  # of one optimizer step, and of collectives between ranks
    max_restarts: int = 3  # of all ranks, after one was lost, without a new checkpoint in between
    threads: int | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"  # a loss or gradient that is not finite: end, or leave that step out
    max_nonfinite: int = 3  # steps left out in a row with `skip`; one more ends the run


@dataclass(frozen=True)
class SyncConfig:
    """How weights reach the rollout workers.

    auto  those on the learner's node through its shared memory, those elsewhere through Ray's object store
    ray   all through Ray's object store    shm  everybody on one node    disk  files on a disk that every node sees
    """

    kind: Literal["auto", "ray", "shm", "disk"] = "auto"
    path: str | None = None  # disk: a directory every node sees; None: the run directory
    timeout_s: float = 300.0


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out evaluation: pass@k for the given k from `samples` answers a prompt (1 and temperature 0: greedy)."""

    every: int = 0  # steps; 0: only before the first and after the last step
    at_start: bool = True
    at_end: bool = True
    prompts: int | None = None  # at most this many held-out prompts
    samples: int = 1
    k: tuple[int, ...] = (1,)
    temperature: float = 0.0
    top_p: float = 1.0
    success: float = 0.5  # a sample is right if its reward is above this


@dataclass(frozen=True)
class CheckpointConfig:
    every: int | None = None  # steps; 0: only the last; null: by time, each √(2 · seconds of a save · the next one)
    between_failures_s: float = 14400.0  # mean time between two interruptions, for saving by time
    keep: int = 2  # the newest ones; the two newest whole ones are never deleted
    keep_every: int = 0  # keep each whose step is a multiple of this too; 0: none
    keep_best: int = 0  # keep as many with the best held-out result too
    remote: str | None = None  # copy them there in the background: s3://bucket/folder, or any URL that fsspec knows
    upload_wait_s: float = 60.0  # at the end of a run, for copies under way
    max_failed_saves: int = 2  # in a row (a full disk), then the run stops; the checkpoints before stand


@dataclass(frozen=True)
class PreemptConfig:
    """Machines that are taken away: how much notice there is, and one process at a time in a run's folder."""

    poll_s: float = 1.0  # how often Ray is asked which nodes are being drained
    coalesce_s: float = 5.0  # nodes that go within so many seconds of each other are one event: wait, then rebuild once
    grace_s: float | None = None  # from SIGTERM until the platform kills; None: RAY_JOB_STOP_WAIT_TIME_S, or unknown
    must_end_by: str | None = None  # save and end (exit 75) before: ISO time, or seconds after the start; None: never
    margin_s: float = 10.0  # before must_end_by, beside what a save takes
    lease_s: float = 60.0  # a process on another machine that gave no sign for so long no longer holds the run


@dataclass(frozen=True)
class HealthConfig:
    """What counts as ill, and what is done about it. Alarms only advise. 0 turns a number off."""

    on_stall: Literal["warn", "abort"] = "warn"  # nothing moves for schedule.stall_s: stacks and a warning, or the end
    canary_every: int = 10  # steps between two comparisons of learner and samplers on fixed tokens
    canary: float | None = None  # nats they may be apart on average; null: 0.01 in float32, 0.2 in bfloat16
    mismatch_warn: float | None = None  # nats, of the sampled tokens on average; null: 0.001 or 0.05
    mismatch_stop: float | None = None  # null: 0.1 or 0.5; one token may differ by 20 times either
    length_growth: float = 2.0  # alarm: answers this many times as long as in the first 10 steps
    entropy_share: float = 0.1  # alarm: entropy below this share of that of the first 10 steps
    repetition: float = 0.3  # alarm: share of an answer's 4-grams that it had before
    truncated: float = 0.2  # alarm: share of answers cut at sampler.max_tokens


@dataclass(frozen=True)
class ReportConfig:
    directory: str = "runs"
    samples_per_step: int = 4  # groups written out, readable
    tensorboard: bool = True
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "rlkd"


@dataclass(frozen=True)
class RayConfig:
    address: str | None = None  # None: a cluster in this machine, or the one RAY_ADDRESS names
    object_store_gib: float = 0.5  # of a cluster started here
    wait_s: float = 10.0  # for resources, then an error says what is missing
    share_gpus: bool = False  # sampler, learner and scorers on the same GPUs; see sampler.gpu_memory_utilization


@dataclass(frozen=True)
class Config:
    """The whole recipe. `algorithm` is the dataclass of `algorithm.name`, each of `rewards` that of its key."""

    model: ModelConfig
    algorithm: Any
    data: DataConfig
    rewards: dict[str, Any]
    schedule: Schedule
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    reference: ScorerConfig = field(default_factory=ScorerConfig)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    preempt: PreemptConfig = field(default_factory=PreemptConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    name: str = "run"
    seed: int = 0
    deterministic: bool = False  # the same run bit by bit, also when it is interrupted (float32 on CPU); slower
