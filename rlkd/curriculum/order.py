"""The order of an epoch and the seed of an occurrence: pure functions, the same in every process and version."""

import hashlib

import numpy as np
from jaxtyping import Int64


def permutation(fingerprint: str, seed: int, epoch: int, n: int) -> Int64[np.ndarray, "n"]:
    """The order in which epoch `epoch` asks the n prompts of the dataset with this fingerprint.

    Sorts Philox's raw output: numpy keeps a bit generator's stream for ever, but not what `Generator.permutation`
    makes of it (NEP 19).
    """
    key = int.from_bytes(_hash("order", fingerprint, seed, epoch, size=16), "little")
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable").astype(np.int64)


def occurrence_seed(seed: int, epoch: int, position: int) -> int:
    """63 bits for one occurrence of a prompt in the run."""
    return int.from_bytes(_hash("prompt", seed, epoch, position, size=8), "little") >> 1


def _hash(*parts: str | int, size: int) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=size).digest()
