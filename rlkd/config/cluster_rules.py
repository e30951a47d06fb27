"""What of the settings about several nodes contradicts itself."""

from collections.abc import Iterator

from rlkd.config.finding import Finding, Given
from rlkd.config.schema import Config


def cluster(given: Given) -> Iterator[Finding]:
    sampler, sync = given.config.sampler, given.config.sync
    if sync.kind != "disk" and sync.path is not None:
        what = f"sync.path={sync.path} is used by sync.kind=disk only, and sync.kind={sync.kind}"
        yield Finding(("sync.path", "sync.kind"), what, "sync.kind=disk, or leave the path out")
    if sampler.min_workers is not None and sampler.min_workers > sampler.workers:
        what = f"sampler.min_workers={sampler.min_workers} is more than sampler.workers={sampler.workers}"
        yield Finding(("sampler.min_workers", "sampler.workers"), what, f"at most {sampler.workers}, or more workers")
    if sampler.max_workers is not None and sampler.max_workers < sampler.workers:
        what = f"sampler.max_workers={sampler.max_workers} is less than sampler.workers={sampler.workers}"
        yield Finding(("sampler.max_workers", "sampler.workers"), what, f"at least {sampler.workers}, or fewer workers")
    if given.config.ray.share_gpus and sampler.tensor_parallel > 1:
        what = f"with ray.share_gpus a worker has a part of one GPU, and tensor_parallel is {sampler.tensor_parallel}"
        yield Finding(("ray.share_gpus", "sampler.tensor_parallel"), what, "one of the two")
    if given.config.ray.share_gpus:
        yield from _sharing(given.config)


def _sharing(config: Config) -> Iterator[Finding]:
    """Everybody is beside a learner rank: more of one role would be two on one GPU."""
    ranks, sampler = config.learner.ranks, config.sampler
    most = "sampler.max_workers" if sampler.max_workers is not None else "sampler.workers"
    counts = {most: sampler.max_workers or sampler.workers, "reference.workers": config.reference.workers}
    counts |= {f"teachers.{name}.workers": t.workers for name, t in config.teachers.items() if t.endpoint is None}
    for key, workers in counts.items():
        if workers > ranks:
            what = f"with ray.share_gpus each is beside a rank, and {key}={workers} is more than learner.ranks={ranks}"
            yield Finding((key, "learner.ranks", "ray.share_gpus"), what, f"at most {ranks}, or more learner.ranks")
