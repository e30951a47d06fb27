"""Checkpoints: bytes, seconds, the interval, and the notice a platform must give."""

import json
import math
from pathlib import Path

import pytest

from rlkd.core.interval import interval_s
from rlkd.plan import saving
from rlkd.plan.saving import Grace, checkpoint, grace, measured, save_seconds
from rlkd.store.store import Store
from rlkd.train.checkpoint import Checkpoints
from tests.plan_help import recipe, shape


def test_bytes_of_a_checkpoint() -> None:
    """SmolLM2-135M in float32: 1.6 GB of state and 0.54 GB of model, as `du` says of one."""
    found = checkpoint(134_515_008, 4)
    assert found.learner == 12 * 134_515_008
    assert found.total == pytest.approx(2.15e9, rel=0.01)


def test_ranks_write_at_once_but_rank_0_the_model() -> None:
    one, many = save_seconds(10**9, 1), save_seconds(10**9, 64)
    assert many < one
    assert many > 4e9 / saving.WRITE_BYTES_PER_S


def test_youngs_interval_is_that_of_the_run(tmp_path: Path) -> None:
    assert interval_s(2.0, 14400.0) == pytest.approx(math.sqrt(2 * 2 * 4 * 3600))

    saves = Checkpoints(Store(tmp_path), None, 14400.0)
    saves.save_s = 7.0
    assert saves.interval_s == interval_s(7.0, 14400.0)


@pytest.mark.parametrize(
    ("drain", "save", "upload", "expected"),
    [(0.0, 0.0, 0.0, 60), (30.0, 1.1, 0.0, 60), (100, 41, 0, 230), (10, 10, 30, 100)],
)
def test_grace_is_rounded_up_to_ten_and_at_least_sixty(drain: float, save: float, upload: float, expected: int) -> None:
    found = Grace(float(drain), float(save), float(upload), 10.0)
    assert found.total_s == expected
    assert isinstance(found.total_s, int)


def test_a_remote_store_gets_its_time() -> None:
    config = recipe("grpo-smollm2", checkpoint__remote="s3://bucket/folder")
    assert grace(config, shape()).upload_s == config.checkpoint.upload_wait_s
    assert grace(recipe("grpo-smollm2"), shape()).upload_s == 0


def test_a_large_model_needs_more() -> None:
    small, large = (
        grace(recipe(learner__ranks=8, learner__zero_stage=3), shape(m)) for m in ("Qwen2.5-1.5B", "Qwen2.5-32B")
    )
    assert large.total_s > small.total_s
    assert large.total_s > 180


def test_what_was_measured_wins(tmp_path: Path) -> None:
    assert measured(tmp_path) == saving.Measured()
    events = [{"kind": "checkpoint", "seconds": 41.0}, {"kind": "checkpoint"}, {"kind": "store", "seconds": 900.0}]
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, events)) + "\nhalf a li")
    (tmp_path / "metrics.jsonl").write_text(
        '{"seconds/learn": 20.0}\n{"seconds/learn": 25.0}\n{"seconds/learn": null}\n'
    )
    assert measured(tmp_path) == saving.Measured(41.0, 25.0)
    found = grace(recipe(), shape(), run=tmp_path)
    assert (found.save_s, found.drain_s, found.measured) == (41.0, 25.0, True)
    assert found.total_s == 110  # 1.5 × 66 + 10
