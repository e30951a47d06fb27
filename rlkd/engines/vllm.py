"""vLLM in the calling process: continuous batching, a seed per sample, weights exchanged in the middle of it.

In process, because an engine in a process of its own that dies leaves its caller hanging, and starts five times slower.
"""

import logging
import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlkd.core.errors import PreflightError, WorkerLost
from rlkd.core.ports import Completion, WeightRef
from rlkd.core.types import Finish, TopK
from rlkd.engines.device import pick_device, pick_dtype
from rlkd.engines.engine import Engine
from rlkd.engines.jobs import EngineOptions, Job, Limits, Scoring, Writing

PORTS, PORTS_EACH = range(20000, 32000), 30  # above Ray's for workers (10002 … 19999), below Linux's for anybody
CPU_BLOCK = 32  # tokens; vLLM's 128 on CPU never shares a prompt that is shorter than that


def environment(options: EngineOptions) -> dict[str, str]:
    """What must be in the environment before vLLM is imported. OMP_NUM_THREADS should be there before torch is."""
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_PORT": _first_port(),
    }
    if options.threads:
        wanted["OMP_NUM_THREADS"] = str(options.threads)
    if pick_device(options.device) == "cpu" and options.enforce_eager is not False:
        # vLLM compiles the ranks of log-probs even when it runs eagerly: a C++ compiler and seconds, for nothing here.
        wanted["TORCHDYNAMO_DISABLE"] = "1"
    return wanted


def _first_port() -> str:
    """vLLM takes the first free port from VLLM_PORT on. One that the system chose may be given to somebody else before
    vLLM opens it; these are below those it gives out, and processes of one machine begin at different ones. Kubernetes
    sets VLLM_PORT to a URL where a service is named vllm, which vLLM refuses."""
    own = os.environ.get("VLLM_PORT", "")
    return own if own.isdigit() else str(PORTS.start + os.getpid() % (len(PORTS) // PORTS_EACH) * PORTS_EACH)


def prepare(options: EngineOptions) -> None:
    """Set the environment. PreflightError when vLLM was imported before with other settings."""
    for name, value in environment(options).items():
        if "vllm" in sys.modules and name.startswith("VLLM_ENABLE") and os.environ.get(name) != value:
            raise PreflightError(
                "RLKD-E604",
                f"vllm was imported before {name}={value} was set",
                fix="construct the engine in a process of its own (a Ray actor)",
            )
        os.environ[name] = value


class VLLMEngine(Engine):
    """The engine of rollout workers. One per process: vLLM cannot be set up twice."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        prepare(options)
        self._engine: Any = None
        self._parts: dict[str, _Part] = {}  # by request id
        self._ended = self._seen = 0  # tokens of requests that ended; of these and of running ones, at the last step

    # --- the model

    def _build(self) -> Limits:
        if self.options.threads:
            torch.set_num_threads(self.options.threads)  # OpenMP counts threads per calling thread, and this is it
        # On an error vLLM prints every running request; the error itself comes to whoever waits.
        logging.getLogger("vllm.logging_utils.dump_input").setLevel(logging.CRITICAL)
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self._engine = LLMEngine.from_engine_args(EngineArgs(**self._arguments()))
        # The folder's own end tokens would be forbidden before min_tokens, beside those of `sampling`.
        self._engine.input_processor.generation_config_fields.pop("eos_token_id", None)
        config = self._engine.vllm_config.model_config
        self._mark_version()
        context = config.max_model_len
        return Limits(self.options.path, context, config.get_vocab_size(), scored=context - 1)

    def _arguments(self) -> dict[str, Any]:
        o = self.options
        device = pick_device(o.device)
        arguments: dict[str, Any] = {
            "model": o.path,
            "skip_tokenizer_init": True,  # token ids in, token ids out
            "generation_config": "vllm",  # not the model folder's own sampling defaults
            "trust_remote_code": o.trust_remote_code,
            "dtype": str(pick_dtype(o.dtype, device)).removeprefix("torch."),
            "max_num_seqs": o.max_num_seqs,
            "tensor_parallel_size": o.tensor_parallel,
            "enable_prefix_caching": o.prefix_caching,
            "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled from
            "max_logprobs": -1,  # as many as topk asks for
            "async_scheduling": False,  # a step in flight would get the label of weights it was not computed with
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "worker_extension_cls": "rlkd.engines.vllm_weights.Extension",
        }
        if o.context is not None:
            arguments["max_model_len"] = o.context
        if device == "cpu":
            arguments["enforce_eager"] = o.enforce_eager is not False
            arguments["block_size"] = o.block_size or CPU_BLOCK
            arguments["kv_cache_memory_bytes"] = int(o.kv_cache_gib * 2**30)
            # A prompt computed in two steps has vLLM rewind the sample's random numbers, which it cannot on CPU.
            arguments["enable_chunked_prefill"] = False
        else:
            arguments["enforce_eager"] = bool(o.enforce_eager)
            arguments["gpu_memory_utilization"] = o.gpu_memory_utilization
            if o.block_size is not None:
                arguments["block_size"] = o.block_size
        return arguments

    def _shutdown(self) -> None:
        if self._engine is not None:
            self._engine.engine_core.shutdown()

    # --- requests

    def _add(self, job: Job) -> None:
        for part in range(job.count):
            self._add_part(job, part)

    def _add_part(self, job: Job, part: int) -> None:
        from vllm.inputs.engine import tokens_input

        name = f"{job.id}.{part}"
        self._parts[name] = _Part(job, part, self.version)
        if isinstance(job, Writing):
            tokens, parameters = job.tokens, self._sampling(job, part)
        else:
            assert isinstance(job, Scoring)
            tokens, parameters = job.sequences[part], self._scoring(job.k)
        # The salt keeps a request from the prompt cache of other weights: while anything runs, vLLM cannot empty it.
        self._engine.add_request(name, tokens_input(tokens, cache_salt=self._salt()), parameters)

    def _salt(self) -> str:
        return f"{self.version}-{self.digest}"

    def _sampling(self, job: Writing, part: int) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        s = job.sampling
        return SamplingParams(
            temperature=s.temperature,
            top_p=s.top_p,
            seed=job.seeds[part],
            max_tokens=s.max_tokens,
            min_tokens=s.min_tokens,
            stop_token_ids=list(s.stop_tokens),
            ignore_eos=True,  # the tokens that end an answer are those of `sampling`, nobody else's
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _scoring(self, k: int) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        return SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=k, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )

    def status(self) -> tuple[int, str, int]:
        """As of every engine; WorkerLost too if a process of another rank of its tensors ended."""
        if getattr(getattr(self._engine, "model_executor", None), "is_failed", False):
            raise WorkerLost("VLLMEngine: a process of sampler.tensor_parallel ended")
        return super().status()

    def _step(self) -> None:
        for output in self._engine.step():
            if output.finished:
                part = self._parts.pop(output.request_id)
                self._finish(part.job, part.number, self._result(part, output))
        self._count()

    def _count(self) -> None:
        """Tokens written by now. vLLM says what a request has only at its end, but keeps it where it can be counted."""
        running = self._engine.output_processor.request_states.values()
        now = self._ended + sum(state.detokenizer.num_output_tokens() for state in running)
        self.written += max(0, now - self._seen)
        self._seen = now

    def _result(self, part: "_Part", output: Any) -> Any:
        if isinstance(part.job, Scoring):
            return _scores(output.prompt_logprobs, part.job.sequences[part.number], part.job.k)
        return self._completion(part, output.outputs[0])

    def _completion(self, part: "_Part", output: Any) -> Completion:
        tokens = np.asarray(output.token_ids, np.int32)
        self._ended += len(tokens)
        logp = [at[t].logprob for at, t in zip(output.logprobs or [], output.token_ids, strict=True)]
        finish = {"stop": Finish.STOP, "length": Finish.LENGTH, "abort": Finish.ABORTED}[output.finish_reason]
        spans = getattr(output, "weight_versions", None) or []  # vLLM 0.24 does not tell: then since it was taken up
        written = [int(span.version) for span in spans] or [part.version, self.version]
        return Completion(tokens, np.asarray(logp, np.float32), finish, (min(written), max(written)))

    def _drop(self, job: Job) -> dict[int, Completion]:
        names = [name for name, part in self._parts.items() if part.job is job]
        outputs = self._abort_requests(names)
        parts = {name: self._parts.pop(name) for name in names}
        if not isinstance(job, Writing):
            return {}
        return {parts[o.request_id].number: self._completion(parts[o.request_id], o.outputs[0]) for o in outputs}

    def _abort_requests(self, names: list[str]) -> list[Any]:
        """Abort requests; what each has so far. vLLM gives that to a request's queue, which in process it lacks."""
        outputs, wanted = _Outputs(), set(names)
        for state in self._engine.output_processor.request_states.values():
            if state.external_req_id in wanted:
                state.queue = outputs
        self._engine.abort_request(names)
        return outputs

    # --- weights

    def _load(self, ref: WeightRef) -> None:
        self._engine.collective_rpc("load_published", args=(ref.version, ref.where, ref.digest))
        self._forget_old()

    def _exchange(self, ref: WeightRef) -> None:
        super()._exchange(ref)
        self._mark_version()
        self._restart_unbegun()

    def _forget_old(self) -> None:
        """Empty the prompt cache. vLLM refuses while anything runs; then the salts alone keep old and new apart."""
        if not self._jobs and not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prompt cache after a weight update, though nothing was running")

    def _restart_unbegun(self) -> None:
        """Requests that wait for their first token begin again under the new version: with its salt, and without the
        old keys and values they may have."""
        states = self._engine.output_processor.request_states.values()
        names = [s.external_req_id for s in states if s.is_prefilling]
        self._engine.abort_request(names)
        for name in names:
            self._add_part(self._parts[name].job, self._parts[name].number)

    def _mark_version(self) -> None:
        if hasattr(self._engine, "set_weight_version"):
            self._engine.set_weight_version(str(self.version))


@dataclass(frozen=True)
class _Part:
    """One request of vLLM's."""

    job: Job
    number: int
    version: int  # of the weights when it was taken up


class _Outputs(list[Any]):
    """What vLLM takes for a request's queue."""

    put = list.append


def _scores(places: Any, tokens: list[int], k: int) -> tuple[np.ndarray, TopK]:
    """vLLM's prompt log-probs: a dict per place, with the token itself and the k likeliest; None at the first."""
    logp = np.full(len(tokens), np.nan, np.float32)
    ids = np.zeros((len(tokens), k), np.int32)
    likeliest = np.full((len(tokens), k), np.nan, np.float32)
    for place in range(1, len(tokens)):
        at = places[place]
        logp[place] = at[tokens[place]].logprob
        for token, found in at.items():
            if found.rank <= k:
                ids[place, found.rank - 1], likeliest[place, found.rank - 1] = token, found.logprob
    return logp, TopK(ids, likeliest)
