"""The GPU benchmark's own code, on a CPU and small: what a session that is lent a GPU runs must not be broken."""

from pathlib import Path

import pytest

from benchmarks.gpu import parts
from benchmarks.gpu.__main__ import Bench, main


def test_it_runs_and_its_bounds_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--small", "--repeats", "1", "--results", str(tmp_path)]) == 0
    text = (tmp_path / "gpu-cpu.md").read_text()
    assert "DOES NOT HOLD" not in text
    for part in ("head", "model", "weights"):
        assert f"| {part} |" in text
    assert "flash-attn is not installed, and was not run." in text
    assert capsys.readouterr().out.endswith(text + "\n")


def test_a_bound_that_does_not_hold_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(bench: Bench, _: Path) -> None:
        bench.bound("head", "off", float("nan"), 1.0)

    monkeypatch.setattr(parts, "ALL", (wrong,))
    assert main(["--device", "cpu", "--small", "--results", str(tmp_path)]) == 1
    assert "DOES NOT HOLD" in (tmp_path / "gpu-cpu.md").read_text()


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([]) == 3
    assert "torch sees no GPU here" in capsys.readouterr().err
