"""A worker's environment keeps oneDNN from holding on to products of sizes that never come again."""

import os
import subprocess
import sys

import pytest

from rlkd.workers.threads import environment

pytestmark = [pytest.mark.stack, pytest.mark.long]
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
MANY_SIZES = """
import ctypes, torch
from rlkd.core.matmul import on_onednn, product
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (*"abcdefg", "used", *"ij")]
libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype = Info
weight = torch.randn(128, 96)
def pass_(rows):
    product(torch.randn(rows, 128), weight)
for rows in range(100, 200):
    pass_(rows)
before = libc.mallinfo2().used
for rows in range(200, 1000):
    pass_(rows)
print(int(on_onednn(weight)), libc.mallinfo2().used - before)
"""


def grown(variables: dict[str, str]) -> int:
    """Bytes that stay allocated after products of 800 sizes."""
    done = subprocess.run([sys.executable, "-c", MANY_SIZES], env=variables, check=True, capture_output=True, text=True)
    onednn, size = map(int, done.stdout.split())
    if not onednn:
        pytest.skip("products are not oneDNN's here")
    return size


def test_products_of_new_sizes_do_not_pile_up() -> None:
    here = {**os.environ, **environment(1)}
    kept = grown(here)
    assert kept < 8 * 2**20
    assert grown({k: v for k, v in here.items() if k not in CACHES}) > 4 * max(kept, 2**20)  # they would
