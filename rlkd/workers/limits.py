"""What a pool of workers puts up with, and how it ends when that is too much."""

from dataclasses import dataclass

from rlkd.core.errors import InfrastructureError, NoWorkers


@dataclass(frozen=True)
class Advice:
    """What to change in the recipe, in words; as said here, of the sampler."""

    memory: str = "lower sampler.max_num_seqs or sampler.kv_cache_gib (on GPU sampler.gpu_memory_utilization)"
    slow: str = "raise sampler.timeout_s or sampler.stall_s"
    nodes: str = "add nodes, or raise sampler.min_workers_timeout_s"
    engine: str = "sampler.engine=hf"


@dataclass(frozen=True)
class PoolOptions:
    """Deadlines in seconds, and how much may go wrong."""

    timeout_s: float = 600.0  # of one call
    start_s: float = 600.0  # until a new worker is ready for weights
    sync_s: float = 300.0  # until a worker has loaded them
    probe_s: float | None = None  # ask every worker for its vitals this often; one that does not answer is lost
    stall_s: float | None = None  # a worker that has work and gets nowhere for this long is lost; None: not watched
    patient: bool = True  # a call waits while every worker is being replaced; False: WorkerLost at once
    hedge: float | None = None  # what takes so many times the usual is asked of a second worker; None: nothing is
    hedge_floor_s: float = 10.0  # and nothing that takes less than this
    at_once: int | None = None  # calls under way on one worker; None: it queues by itself
    replacements: int = 3  # of one worker in a row, without an answer in between; 0: a lost one is not replaced
    window_s: float = 600.0
    in_window: int = 10  # replacements of one worker within the window, whatever it answered in between
    backoff_s: float = 1.0  # before the second replacement in a row; doubles from then on
    nobody_s: float = 600.0  # with fewer workers than `at_least`, then the run ends
    at_least: int = 1
    start_with: int | None = None  # so many must be there for the start; None: all
    status_s: float = 10.0  # between lines about that
    advice: Advice = Advice()


@dataclass(frozen=True)
class End:
    """Why nothing more comes from these workers."""

    text: str
    code: str = "RLKD-I611"
    fix: str = "the workers' logs (ray logs) say why"
    error: type[InfrastructureError] = NoWorkers
