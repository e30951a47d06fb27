"""The benchmarks that need Ray, short: what they measure is not looked at, but what is left behind is."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from benchmarks import control_plane, verifier

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def test_hostile_answers_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier, "CASES", [verifier.CASES[-1]])
    verifier.main(["--groups", "7", "--timeout-s", "0.5", "--results", str(tmp_path)])
    (row,) = (line for line in (tmp_path / "verifier.md").read_text().splitlines() if line.startswith("| hostile"))
    assert row.endswith("| 1 of 1 | 0 | 0 | 0 |")


def test_the_control_plane_runs_without_models(tmp_path: Path) -> None:
    control_plane.main(["--steps", "4", "--groups", "2", "--results", str(tmp_path)])
    assert "| groups/s" in (tmp_path / "control_plane.md").read_text()
