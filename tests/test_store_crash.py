"""A process dies at each point of the commit: what is found then is the checkpoint before or the new one, whole."""

import os
import re
from pathlib import Path

import pytest

import rlkd.store
from rlkd.core.errors import CheckpointError
from rlkd.store.retention import Keep
from rlkd.store.store import Store
from tests.store_help import Told, child, fill, is_of, saved

BEFORE = [  # the new checkpoint does not exist
    "commit.file",
    "commit.file:2",
    "commit.before_manifest",
    "commit.after_part",
    "commit.after_manifest",
    "commit.before_rename",
]
AFTER = ["commit.after_rename", "commit.before_latest", "commit.after_latest"]  # it does
SWAPPED = """
import os, sys
from pathlib import Path
from rlkd.store import manifest, store
from tests.store_help import saved
def publish(self, draft, found):  # the wrong way round
    os.rename(draft, self.path(found.step))
    manifest.save(self.path(found.step), found)
store.Store._publish = publish
saved(store.Store(Path(sys.argv[1])), int(sys.argv[2]))
"""


def test_every_fault_point_of_the_commit_is_tried() -> None:
    source = "".join(p.read_text() for p in Path(rlkd.store.__path__[0]).glob("*.py"))
    points = set(re.findall(r'fault\("(commit\.\w+)"\)', source))
    assert points == {p.partition(":")[0] for p in [*BEFORE, *AFTER]} | {"commit.trash"}


@pytest.mark.faults("F23", "F25")
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
@pytest.mark.parametrize("point", [*BEFORE, *AFTER])
def test_a_crash_leaves_the_one_before_or_the_new_one(tmp_path: Path, point: str, first: bool) -> None:
    """The one checkpoint there should be is found, nobody is told of damage, and the run can go on and save again."""
    told = Told()
    store = Store(tmp_path, tell=told)
    step = 1 if first else 2
    if not first:
        saved(store, 1)
    assert child(tmp_path, step, faults=f"{point}=exit") == 9
    store.clean()
    assert not [name for name in os.listdir(tmp_path) if name.startswith((".tmp", ".trash"))]
    expected = step if point in AFTER else step - 1
    found = store.newest()
    assert (found.manifest.step if found else 0) == expected
    assert found is None or is_of(found.path, expected)
    assert told.events == []
    assert not (tmp_path / ".bad").exists()
    saved(store, expected + 1)
    newest = store.newest()
    assert newest is not None
    assert is_of(newest.path, expected + 1)


@pytest.mark.faults("F23", "F29")
def test_a_crash_while_an_old_one_is_deleted(tmp_path: Path) -> None:
    assert child(tmp_path, 1, 2, 3, 4, faults="commit.trash=exit") == 9
    store = Store(tmp_path, tell=Told())
    assert store.steps().keys() == {2, 3}  # 1 has no name any more, 4 was not begun
    assert [name.startswith(".trash-step-000001") for name in store.clean()] == [True]
    found = store.newest()
    assert found is not None
    assert is_of(found.path, 3)


@pytest.mark.faults("F23")
@pytest.mark.parametrize("at_s", [0.0, 0.01, 0.03, 0.1])
def test_a_process_that_is_killed_at_no_particular_point(tmp_path: Path, at_s: float) -> None:
    """SIGKILL while it saves one checkpoint after the other: what is found is whole, and one of the newest."""
    import signal
    import subprocess
    import sys
    import time

    script = (
        "import sys; from pathlib import Path; from tests.store_help import saved; from rlkd.store.store import Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        "for step in range(1, 10**6): saved(store, step); print(step, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = int(process.stdout.readline())
    time.sleep(at_s)
    process.send_signal(signal.SIGKILL)
    last = max([last, *map(int, process.stdout.read().split())])
    process.wait()
    told = Told()
    store = Store(tmp_path, tell=told)
    store.clean()
    found = store.newest()
    assert found is not None
    assert found.manifest.step in (last, last + 1)  # it may have died before it could say so
    assert is_of(found.path, found.manifest.step)
    assert told.events == []


@pytest.mark.faults("F23")
def test_negative_control_renamed_before_the_manifest_half_a_checkpoint_is_seen(tmp_path: Path) -> None:
    told = Told()
    store = Store(tmp_path, tell=told)
    saved(store, 1)
    assert child(tmp_path, 2, faults="commit.after_part=exit", script=SWAPPED) == 9
    assert store.there() == [1, 2]  # in the right order this cannot be, at any point
    found = store.newest()
    assert found is not None
    assert found.manifest.step == 1
    assert "step-000002 is damaged" in told.text


@pytest.mark.faults("F23", "F24")
def test_never_a_fresh_start_after_all_were_lost(tmp_path: Path) -> None:
    """Asked again, it still refuses: what was moved to .bad is remembered."""
    told = Told()
    store = Store(tmp_path, Keep(last=3), told)
    for step in (1, 2):
        (saved(store, step) / "driver.json").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="RLKD-K016") as caught:
            store.newest()
        assert caught.value.exit_code == 7
        assert ".bad/step-000001" in str(caught.value)
        assert ".bad/step-000002" in str(caught.value)
    assert told.text.count("driver.json: is missing; there is none to use instead") == 2


def test_the_draft_of_another_step_is_not_in_the_way(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one, two = fill(store.draft(1), 1), fill(store.draft(1), 1)
    assert one != two
    store.commit(two, 1, {})
    store.discard(one)
    found = store.newest()
    assert found is not None
    assert is_of(found.path, 1)
