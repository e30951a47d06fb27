"""Machines of the clouds that `ray up` starts. Sizes as the clouds publish them; the choice is ours, edit it freely."""

from collections.abc import Mapping
from dataclasses import dataclass

from rlkd.core.errors import ConfigError

CLOUDS = ("aws", "gcp")


@dataclass(frozen=True)
class Instance:
    name: str
    cpus: int
    gpus: int


AWS = (
    Instance("m7i.2xlarge", 8, 0),
    Instance("g6e.4xlarge", 16, 1),  # L40S
    Instance("g6e.12xlarge", 48, 4),
    Instance("p5.48xlarge", 192, 8),  # H100
)
GCP = (
    Instance("n2-standard-8", 8, 0),
    Instance("g2-standard-16", 16, 1),  # L4
    Instance("g2-standard-48", 48, 4),
    Instance("a3-highgpu-8g", 208, 8),  # H100
)
INSTANCES: Mapping[str, tuple[Instance, ...]] = {"aws": AWS, "gcp": GCP}


def instance(cloud: str, gpus: int) -> Instance:
    """The smallest that has so many GPUs. ConfigError RLKD-C442 if none has."""
    found = next((i for i in INSTANCES[cloud] if i.gpus >= gpus), None)
    if found is None:
        most = INSTANCES[cloud][-1]
        what = f"no machine of {cloud} here has {gpus} GPUs; {most.name} has {most.gpus}"
        raise ConfigError("RLKD-C442", what, where="--gpus-per-node", fix=f"--gpus-per-node {most.gpus}, or less")
    return found
