"""Rewards by name, and a user's own: from a function, a class, a module, a file; how they travel to the jail."""

import ast
import subprocess
import sys
import textwrap
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import rlkd.rewards
from rlkd.core.errors import ConfigError
from rlkd.core.types import Answer, Finish
from rlkd.engines.jail import Jail
from rlkd.rewards.table import find, pack, unpack
from tests.rewards_help import prompt

PATHOLOGICAL = str(Path(__file__).parent / "pathological.py")


def test_an_unknown_name_has_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'math'"):
        find("maths")
    with pytest.raises(ConfigError, match="did you mean 'raises'"):
        find(f"{PATHOLOGICAL}:raise")


def test_the_docstrings_example_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How to write a reward, as rlkd/rewards/__init__.py says: run it as it stands there, in the jail."""
    documented = rlkd.rewards.__doc__
    assert documented
    start = documented.index("    def short")
    source = textwrap.dedent(documented[start : documented.index("\n\n", start)])
    assert len(ast.parse(source).body) == 1
    (tmp_path / "my_rewards.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    made = find("my_rewards.py:short")
    assert [f.name for f in fields(made)] == ["weight", "words"]
    configured = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(made), {"weight": 0.5, "words": 2}))
    jail = Jail(pack({"short": configured}), timeout_s=5.0)
    try:
        monkeypatch.chdir("/")  # the file's path was made absolute
        verdicts = jail.score(prompt(), [Answer(t, Finish.STOP, 1) for t in ("one two", "one two three")])
    finally:
        jail.close()
    assert [v.scores for v in verdicts] == [{"short": 1.0}, {"short": 0.0}]


@pytest.mark.faults("F42")
@pytest.mark.parametrize(
    ("source", "code", "says"),
    [
        ("def f(prompt): return 1.0", "C303", "takes (prompt)"),
        ("def f(prompt, answer, more): return 1.0", "C303", "further parameters need a default"),
        ("async def f(prompt, answer): return 1.0", "C303", "no plain function"),
        ("def f(prompt, answer, weight=2.0, many=[]): return 1.0", "C303", "cannot be options"),
        ("f = 3", "C303", "no plain function"),
        ("class f:\n    def score(self, prompt, answers): return []", "C303", "must be a dataclass"),
        ("import nowhere_at_all", "C302", "No module named 'nowhere_at_all'"),
        ("def f(prompt, answer: return", "C302", "SyntaxError"),
        ("raise SystemExit(3)", "C302", "SystemExit"),
        ("def g(prompt, answer): return 1.0", "C302", "nothing named 'f'"),
    ],
)
def test_an_own_reward_that_is_none_is_one_clear_error(tmp_path: Path, source: str, code: str, says: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(source)
    with pytest.raises(ConfigError) as caught:
        find(f"{file}:f")
    assert code in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.faults("F42")
def test_own_rewards_from_nowhere() -> None:
    with pytest.raises(ConfigError, match="cannot be imported: ModuleNotFoundError"):
        find("no_such_package.rewards:f")
    with pytest.raises(ConfigError, match="there is no file"):
        find("no_such_file.py:f")


def test_a_class_of_a_module_is_found_as_well() -> None:
    assert find("rlkd.rewards.exact:Exact") is find("exact")


def test_rewards_travel_with_their_options() -> None:
    rewards = {"a": find("overlong")(weight=0.3, buffer=7), "b": find(f"{PATHOLOGICAL}:eats_memory")(mib=3)}
    back = unpack(pack(rewards))
    assert list(back) == ["a", "b"]
    assert back["a"] == rewards["a"]
    assert back["b"].mib == 3  # type: ignore[attr-defined]

    @dataclass(frozen=True)
    class Local:
        weight: float = 1.0

    with pytest.raises(ConfigError, match="cannot be imported by the verifier"):
        pack({"local": Local()})


def test_scoring_is_light() -> None:
    """A child must not pay for torch: nothing it imports brings it in."""
    code = (
        "import rlkd.engines.jailed, rlkd.rewards.table, sys; print(*(m for m in ('torch', 'ray') if m in sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == ""
