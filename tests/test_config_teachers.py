"""What a recipe may say of teachers, and every mistake in it found before anything is started."""

from pathlib import Path
from typing import ClassVar

import pytest

from rlkd import teachers
from rlkd.algorithms.grpo import GRPO
from rlkd.config.load import load, resolved
from rlkd.config.schema import Config, EndpointConfig, TeacherConfig
from rlkd.core.errors import ConfigError, Problem
from rlkd.core.types import Signal
from rlkd.submit.needs import needs

RECIPE = """\
name: a-run
model: {path: models/tiny}
algorithm: {name: "tests.test_config_teachers:NAME", rollout: {samples: 4}}
data: {train: {kind: arithmetic, size: 1000}, holdout: {kind: arithmetic, size: 50, split: holdout}}
rewards: {arithmetic: {}}
schedule: {steps: 10, groups_per_step: 4}
"""
ENDPOINT = "teachers={big: {endpoint: {url: 'http://host:80/v1', model: large}}}"


class Asking(GRPO):
    asks: ClassVar[frozenset[Signal]] = frozenset()

    @property
    def needs(self) -> frozenset[Signal]:
        return self.asks


class Scored(Asking):
    asks: ClassVar = frozenset({Signal.TEACHER})


class Topped(Asking):
    asks: ClassVar = frozenset({Signal.TEACHER_TOPK})


class Written(Asking):
    asks: ClassVar = frozenset({Signal.TEACHER_TEXT})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(folder: Path, algorithm: str = "Written") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("NAME", algorithm))
    return path


def problem(path: Path, *overrides: str) -> Problem:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    (one,) = caught.value.problems
    return one


def test_an_endpoint_and_a_local_teacher(folder: Path) -> None:
    big = "big: {endpoint: {url: 'http://host:80/v1', model: large, key_env: BIG_KEY}, writer: {temperature: 0.7}}"
    config = load(recipe(folder), [f"teachers={{{big}, small: {{path: models/s}}}}"])
    assert isinstance(config.teachers["big"], TeacherConfig)
    assert config.teachers["big"].endpoint == EndpointConfig("http://host:80/v1", "large", "BIG_KEY")
    assert config.teachers["big"].writer.temperature == 0.7
    assert config.teachers["small"].endpoint is None
    (folder / "again.yaml").write_text(resolved(config))
    assert load(folder / "again.yaml") == config


@pytest.mark.parametrize(
    ("algorithm", "words"), [("Scored", "{path: …}"), ("Topped", "{path: …}"), ("Written", "endpoint")]
)
def test_a_teacher_where_one_is_needed(folder: Path, algorithm: str, words: str) -> None:
    found = problem(recipe(folder, algorithm))
    assert "asks for a teacher, and there is none" in found.what
    assert words in (found.fix or "")


@pytest.mark.parametrize("algorithm", ["Scored", "Topped"])
def test_an_endpoint_has_no_log_probs(folder: Path, algorithm: str) -> None:
    found = problem(recipe(folder, algorithm), ENDPOINT)
    assert "teachers.big is an endpoint: it writes text" in found.what
    assert "ampo" in (found.fix or "")


def test_what_is_right_is_not_refused(folder: Path) -> None:
    assert isinstance(load(recipe(folder, "Scored"), ["teachers={big: {path: models/big}}"]), Config)
    assert isinstance(load(recipe(folder, "Asking"), [ENDPOINT]), Config)  # idle: `rlkd check` warns
    more = "teachers.big.endpoint.max_cost=1", "teachers.big.endpoint.price_out=3", "teachers.big.max_tokens=1"
    assert isinstance(load(recipe(folder), [ENDPOINT, *more]), Config)  # it has no forward pass to be too small


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("teachers.big.path=models/big", "has a path and an endpoint"),
        ("teachers.big.endpoint.url=host/v1", "must begin with http:// or https://"),
        ("teachers.big.endpoint.url=ftp://host/v1", "must begin with http:// or https://"),
        ("teachers.big.endpoint.url=http://host:x/v1", "is no address"),
        ("teachers.big.endpoint.url=http://me:secret@host/v1", "must hold no user, password or query"),
        ("teachers.big.endpoint.url=http://host/v1?api-key=secret", "must hold no user, password or query"),
        ("teachers.big.endpoint.model=", "teachers.big.endpoint.model is missing"),
        ("teachers.big.endpoint.key_env=sk-secret", "key_env is not the name of an environment variable"),
        ("teachers.big.endpoint.max_cost=5", "max_cost=5 is never reached without prices"),
        ("teachers.big.endpoint.max_total_tokens=1024", "is not enough for one text"),
        ("teachers.big.writer.context=512", "is of a local teacher"),
        ("teachers.big.endpoint.requests_per_minute=0", "above 0"),
        ("teachers.big.endpoint.at_once=0", "at least 1"),
        ("teachers.big.endpoint.retries=-1", "at least 0"),
        ("teachers.big.endpoint.timeout_s=0", "above 0"),
        ("teachers.big.endpoint.max_total_tokens=0", "at least 1"),
        ("teachers.big.endpoint.price_in=-1", "at least 0"),
        ("teachers.big.writer.temperature=-0.1", "at least 0"),
        ("teachers.big.writer.top_p=0", "above 0 and at most 1"),
        ("teachers.big.writer.top_p=1.1", "above 0 and at most 1"),
        ("teachers.big.writer.max_tokens=0", "at least 1"),
        ("teachers.big.writer.kv_cache_gib=0", "above 0"),
    ],
)
def test_a_mistake_in_a_teacher_is_refused(folder: Path, override: str, said: str) -> None:
    found = problem(recipe(folder), ENDPOINT, override)
    assert said in found.what
    assert "secret" not in found.what
    assert "secret" not in (found.fix or "")
    assert found.fix


@pytest.mark.parametrize("missing", ["url", "model"])
def test_an_endpoint_without_its_address_or_model(folder: Path, missing: str) -> None:
    parts = {"url": "url: 'http://host/v1'", "model": "model: large"}
    del parts[missing]
    found = problem(recipe(folder), f"teachers={{big: {{endpoint: {{{', '.join(parts.values())}}}}}}}")
    assert f"teachers.big.endpoint.{missing}" in found.what
    assert "missing" in found.what


def test_reference_is_no_name_for_a_teacher(folder: Path) -> None:
    assert "cannot be the name of a teacher" in problem(recipe(folder), "teachers={reference: {}}").what


TAUGHT = """\
model: {path: models/tiny}
algorithm: {name: kdrl}
data: {train: {kind: arithmetic, size: 1000}}
rewards: {arithmetic: {}}
schedule: {steps: 10, groups_per_step: 4}
evaluate: {at_start: false, at_end: false}
teachers: {big: {path: models/big}, small: {path: models/small}}
"""


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algorithm.teacher=bigg"], "names the teacher 'bigg', and there is none"),
        (["algorithm.combine=domain", "algorithm.domains={maths: big, '*': tiny}"], "names the teacher 'tiny'"),
        ([], "algorithm.combine=one, and there are 2 teachers (big, small)"),
    ],
)
def test_a_teacher_called_by_a_wrong_name(folder: Path, overrides: list[str], said: str) -> None:
    (folder / "taught.yaml").write_text(TAUGHT)
    assert said in problem(folder / "taught.yaml", *overrides).what


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.teacher=small"],
        ["algorithm.combine=mean"],
        ["algorithm.combine=domain", "algorithm.domains={'*': big}"],
    ],
)
def test_a_teacher_called_by_its_name(folder: Path, overrides: list[str]) -> None:
    (folder / "taught.yaml").write_text(TAUGHT)
    assert load(folder / "taught.yaml", overrides).algorithm.name == "kdrl"


def test_a_teacher_that_may_be_away(folder: Path) -> None:
    local = "teachers={big: {path: models/big, on_unavailable: skip_kd}}"
    assert isinstance(load(recipe(folder, "Scored"), [local]), Config)
    assert "is of log-probs" in problem(recipe(folder), local).what
    found = problem(recipe(folder), ENDPOINT, "teachers.big.on_unavailable=fail")
    assert "is of a local teacher" in found.what
    assert "teachers.big.endpoint.retries" in (found.fix or "")


def test_who_differs_in_what_is_said_with_a_call_only_is_served_by_the_same_workers(folder: Path) -> None:
    """The run, `submit`, `render` and a sweep's trials all count them so."""
    warm = "teachers={a: {path: models/s, workers: 2}, b: {path: models/s, workers: 2, writer: {temperature: 0.5}}}"
    config = load(recipe(folder), [warm])
    assert teachers.written_by(config) == {"a": "a", "b": "a"}
    assert teachers.workers_of(config) == {"writer:a": 2}
    assert [b.role for b in needs(config, gpu=False) if b.role.startswith("writer")] == ["writer:a-0", "writer:a-1"]


def test_scorers_share_a_pool_by_model_and_settings(folder: Path) -> None:
    models = "a: {path: models/s}, b: {path: models/s}, slow: {path: models/s, timeout_s: 7}, c: {path: models/t}"
    models += ", spare: {path: models/s, on_unavailable: skip_kd}"
    config = load(recipe(folder, "Scored"), [f"teachers={{{models}, most: {{path: models/s, workers: 3}}}}"])
    alone = {name: name for name in ("slow", "c", "spare", "most")}
    assert teachers.scored_by(config) == {"a": "a", "b": "a", **alone}
    assert teachers.workers_of(config)["teacher:most"] == 3
    assert "teacher:b" not in teachers.workers_of(config)
