"""How many OpenMP threads each process gets.

Never more threads at work than cores, over all processes of a machine: two processes with two threads each on two cores
were measured 2–5 times slower than with one each. In a synchronous run sampler and learner work in turn, so each gets
all cores; once they overlap (staleness > 0) they share them. Scorers always work beside the samplers.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Threads:
    """Threads of one process of each role."""

    rollout: int
    learner: int
    scorer: int


def plan(cores: int, rollout_workers: int, learner_ranks: int, scorers: int, overlap: bool) -> Threads:
    """Threads per process on a machine with `cores`, when all these processes run on it. At least one each."""
    beside = max(cores - scorers, 1)  # what scorers leave to those they work beside
    sampling = learning = beside
    if overlap:  # half each, but no role less than one thread a process while there are cores for it
        learning = min(max(beside // 2, learner_ranks), max(beside - rollout_workers, 1))
        sampling = beside - learning
    return Threads(
        rollout=max(1, sampling // rollout_workers),
        learner=max(1, learning // learner_ranks),
        scorer=1,
    )


def environment(threads: int) -> dict[str, str]:
    """The environment of a process with this many threads. Must be set before torch is imported."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # a process that waits its turn must not spin on the other's cores
        "TOKENIZERS_PARALLELISM": "false",
        # glibc gives every large tensor back to the kernel, which hands out empty pages for the next one: up to a third
        # of a learner's step on a CPU. Freed memory is kept for the next tensor instead.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**34),
        "MALLOC_TOP_PAD_": str(2**26),
        # oneDNN and PyTorch's layer above it keep the last 1024 products each, one for every size; a learner's
        # micro-batches have ever new sizes: +0.9 GiB within 50 steps of the demo. A micro-batch has some 30 products.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
        "LRU_CACHE_CAPACITY": "64",
    }
