"""Machines: what one device computes, moves and holds.

Peaks are of the makers' data sheets: dense bfloat16 with float32 sums (never the sparse figure), memory bandwidth, the
bandwidth of one direction between two devices of a node. Memory is what the driver reports. The network is what such
machines usually come with, divided over a node's devices; it is assumed. Prices are nobody's data sheet: `--price`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rlkd.core.errors import ConfigError, nearest

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One device. FLOP/s, bytes/s, bytes, shares of the peak that are reached, seconds."""

    name: str
    kind: str  # gpu, cpu
    flops: float  # of matrix products, all cores of a CPU together
    bandwidth: float  # of its memory
    memory: float  # bytes; of a CPU: of the machine
    per_node: int  # devices
    link: float  # bytes/s to another device of the node, one direction
    network: float  # bytes/s to another node
    train: float = 0.40  # of `flops` in forward and backward; performance.md §2.4
    prefill: float = 0.55  # of `flops` in a forward pass alone; performance.md §2.4
    decode: float = 0.50  # of `flops` in decoding; performance.md §2.4
    reach: float = 0.75  # of `bandwidth`; performance.md §2.4
    floor_s: float = 1.5e-3  # of one decoding step, whatever the model; performance.md §2.2
    layer_s: float = 0.0  # of one decoding step, per layer
    sequence_s: float = 0.0  # of one decoding step, per sequence
    overlaps: bool = True  # whether moving memory and multiplying go on at once

    @property
    def gpu(self) -> bool:
        return self.kind == "gpu"


def _gpu(
    name: str, tera: float, tb: float, gib: float, link_gb: float, network_gb: float, per_node: int = 8
) -> Hardware:
    return Hardware(name, "gpu", tera * 1e12, tb * 1e12, gib * GIB, per_node, link_gb * 1e9, network_gb * 1e9)


# NVIDIA's data sheets: A100 (312 TFLOPS), H100 SXM (989), H200 (989), B200 (2,250, half of DGX B200's 36 PFLOPS FP8
# by 16), L40S (362), Ada whitepaper for RTX 4090 (165 with float32 sums).
GPUS: Mapping[str, Hardware] = {
    h.name: h
    for h in (
        _gpu("H100", 989.0, 3.35, 79.6, 450.0, 50.0),
        _gpu("H200", 989.0, 4.8, 140.4, 450.0, 50.0),
        _gpu("B200", 2250.0, 8.0, 179.0, 900.0, 50.0),
        _gpu("A100-80", 312.0, 2.04, 79.3, 300.0, 25.0),
        _gpu("A100-40", 312.0, 1.56, 39.4, 300.0, 25.0),
        _gpu("L40S", 362.0, 0.864, 44.5, 32.0, 3.0),
        _gpu("RTX4090", 165.0, 1.01, 23.6, 32.0, 1.5),
    )
}
CPU = "cpu"


def cpu(memory: float, cores: int, flops: float | None = None, bandwidth: float | None = None) -> Hardware:
    """This machine, from what was measured on it; else as two cores of a server were measured (performance.md §2.3:
    115 GFLOP/s a core in float32, 19.5 GB/s). One `device`: its processes share cores and memory."""
    return Hardware(
        name=CPU,
        kind="cpu",
        flops=115e9 * cores if flops is None else flops,
        bandwidth=19.5e9 if bandwidth is None else bandwidth,
        memory=memory,
        per_node=1,
        link=1e9,  # gloo over the machine's own network stack
        network=0.1e9,
        train=0.5,
        prefill=0.75,
        decode=0.75,
        reach=1.0,
        floor_s=2.5e-3,
        layer_s=0.4e-3,
        sequence_s=50e-6,
        overlaps=False,
    )


def of(name: str, here: Hardware) -> Hardware:
    """By name, without regard to case, `-`, `_` and blanks; `cpu` is `here`. ConfigError if there is none."""
    plain = {_plain(known): hardware for known, hardware in {**GPUS, CPU: here}.items()}
    if _plain(name) in plain:
        return plain[_plain(name)]
    close = nearest(_plain(name), list(plain))
    meant = f"did you mean {plain[close].name}?  " if close else ""
    raise ConfigError(
        "RLKD-C430",
        f"--hardware {name}: unknown",
        where="command line",
        fix=f"{meant}known: {', '.join([*GPUS, CPU])}",
    )


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
