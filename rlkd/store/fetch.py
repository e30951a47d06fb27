"""A checkpoint from the remote store, into a draft, verified before it gets its name."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from rlkd.core.errors import CheckpointError
from rlkd.store.manifest import Manifest, OtherFormat, problems, written
from rlkd.store.names import of_step
from rlkd.store.remote import Remote

TRIES = 3  # of one request, or download
SLOWEST_RETRY_S = 10.0  # between two of them


@dataclass
class Fetched:
    """A verified draft and its manifest, or None; and what was found damaged on the way, by name."""

    draft: Path | None = None
    manifest: Manifest | None = None
    damaged: dict[str, list[str]] = field(default_factory=dict)


def fetch(
    remote: Remote, newer_than: int, draft: Callable[[int, int], Path], discard: Callable[[Path], None]
) -> Fetched:
    """The newest whole checkpoint there after step `newer_than`. `draft(step, bytes)` makes a folder for it.

    OSError if the store does not answer, or the disk here has no room.
    """
    fetched = Fetched()
    retrying = Retrying(
        stop=stop_after_attempt(TRIES),
        wait=wait_random_exponential(multiplier=0.5, max=SLOWEST_RETRY_S),
        retry=retry_if_exception_type(OSError),
        reraise=True,
    )
    for step in reversed(retrying(remote.steps)):
        if step <= newer_than:
            break
        name = f"{remote.url}/{of_step(step)}"
        try:
            manifest = retrying(remote.manifest, step)
        except OtherFormat:
            raise
        except CheckpointError as e:
            fetched.damaged[name] = [e.problems[0].what]
            continue
        wrong = [f"its manifest is of step {manifest.step}"] if manifest.step != step else []
        if wrong := wrong or retrying(remote.problems, manifest):
            fetched.damaged[name] = wrong
            continue
        folder = draft(step, manifest.size)
        try:
            retrying(remote.download, manifest, folder)
            whole = set(written(folder, step, manifest.facts).files) == set(manifest.files)
        except BaseException:
            discard(folder)
            raise
        if whole:
            fetched.draft, fetched.manifest = folder, manifest
            break
        fetched.damaged[name] = problems(folder, manifest)
        discard(folder)
    return fetched
