"""Secrets are in no text that leaves the program."""

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest

from rlkd.config import load as config_load
from rlkd.core.ports import Written
from rlkd.core.types import Finish
from rlkd.report import secrets
from rlkd.report.files import Lines, as_json, replace_file
from rlkd.report.isolated import Isolated
from rlkd.report.progress import Progress
from rlkd.report.secrets import Secrets, is_secret, pairs
from rlkd.report.sinks import Wandb
from rlkd.staff import Discreet

CANARY = 'hf_TESTSECRET/with+odd"characters\\é'


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Secrets:
    """The secrets of the process, for one test."""
    found = Secrets()
    monkeypatch.setattr(secrets, "KNOWN", found)
    return found


@pytest.mark.faults("F65")
@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True), ("WANDB_API_KEY", True), ("OPENAI_API_KEY", True), ("AWS_SECRET_ACCESS_KEY", True),
        ("AWS_SESSION_TOKEN", True), ("AWS_ACCESS_KEY_ID", True), ("PGPASSWORD", True), ("CLIENT_SECRET", True),
        ("RAY_AUTH_TOKEN", True), ("NAMED_BY_THE_RECIPE", True),
        ("TOKENIZERS_PARALLELISM", False), ("AWS_REGION", False), ("AWS_DEFAULT_REGION", False), ("AWS_PROFILE", False),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", False), ("KEYBOARD", False), ("MAX_TOKENS", False), ("PATH", False),
    ],
)  # fmt: skip
def test_which_variables_hold_a_secret(name: str, secret: bool) -> None:
    found = Secrets()
    found.learn_environment({name: "value-of-it"}, named=["NAMED_BY_THE_RECIPE"])
    assert found.without("the value-of-it!") == (f"the <redacted:{name}>!" if secret else "the value-of-it!")


def test_what_is_too_short_or_elsewhere_is_no_secret(tmp_path: Path) -> None:
    found = Secrets()
    values = ["short", "12345678", "${oc.env:HF_TOKEN}", "<redacted>", "", "   ", str(tmp_path)]
    for number, value in enumerate(values):
        found.learn_environment({f"V{number}_KEY": value})
    assert found.without(" ".join(values)) == " ".join(values)


@pytest.mark.parametrize(
    ("key", "secret"),
    [
        ("api_key", True), ("teachers.gpt.endpoint.api_key", True), ("openai-api-key", True), ("password", True),
        ("token", True), ("access_token", True), ("secret", True), ("credentials", True), ("apikey", True),
        ("cls_token", False), ("max_tokens", False), ("num_memory_tokens", False), ("eos_token", False),
        ("pad_token", False), ("key_env", False), ("sort_key", False), ("key", False), ("tokenizer", False),
    ],
)  # fmt: skip
def test_which_keys_of_a_recipe_hold_a_secret(key: str, secret: bool) -> None:
    assert is_secret(key) == secret
    last = key.rpartition(".")[2]
    there = bool(config_load.SECRET_KEY.search(last)) and not config_load.NO_SECRET.search(last)
    assert secret or not there, "what config.yaml leaves out is a secret here too"


def test_secrets_written_in_a_recipe_or_a_command() -> None:
    found = Secrets()
    found.learn_text(
        """
        teachers: {gpt: {api_key: 'sk-in single quotes', url: "https://me:hunter2hunter2@host/v1"}}
        "token": "sk-in-double-quotes"
        password: sk-plain-value   # token=sk-in-a-comment
        rewards.mine.api_key=sk-on-the-command-line
        eos_token: <|endoftext|>
        """
    )
    text = (
        "sk-in single quotes sk-in-double-quotes sk-plain-value sk-in-a-comment sk-on-the-command-line hunter2hunter2"
    )
    assert "sk-" not in found.without(text)
    assert "hunter2" not in found.without(text)
    assert found.without("<|endoftext|>") == "<|endoftext|>"
    assert list(pairs("a: 1")) == [("a", "1")]


def test_secrets_in_a_config() -> None:
    found = Secrets()
    found.learn({"rewards": [{"api_key": "sk-a-literal-key", "url": "https://x:pass-of-url@h/"}], "name": "demo-run-1"})
    assert (
        found.without("sk-a-literal-key pass-of-url demo-run-1") == "<redacted:api_key> <redacted:password> demo-run-1"
    )


@pytest.mark.faults("F65")
def test_a_value_is_found_however_it_is_written(known: Secrets) -> None:
    known.add("HF_TOKEN", CANARY)
    forms = [
        CANARY,
        json.dumps(CANARY),
        json.dumps(CANARY, ensure_ascii=False),
        "hf_TESTSECRET%2Fwith%2Bodd%22characters%5C%C3%A9",
    ]
    for form in forms:
        assert "TESTSECRET" not in secrets.without(f"x{form}y")


def test_a_secret_within_a_secret() -> None:
    found = Secrets()
    found.add("A", "12345-abc")
    found.add("B", "12345-abc-and-more")
    assert found.without("12345-abc-and-more 12345-abc") == "<redacted:B> <redacted:A>"


ROW = {"text": f"an endpoint said {CANARY}", CANARY: [{"error": ValueError(CANARY)}], "n": 3}


def every_sink(directory: Path) -> str:
    """A text through everything that writes; what was written, in all."""
    lines = Lines(directory / "events.jsonl")
    lines.write(ROW)
    lines.close()
    replace_file(directory / "config.source.yaml", f"api_key: {CANARY}\n")
    shown = io.StringIO()
    Progress(3, shown).say(f"[warning] {CANARY}")
    return "".join(p.read_text() for p in directory.iterdir()) + shown.getvalue() + as_json(ROW)


@pytest.mark.faults("F65")
def test_no_sink_lets_a_secret_through(tmp_path: Path, known: Secrets) -> None:
    known.add("HF_TOKEN", CANARY)
    written = every_sink(tmp_path)
    assert "TESTSECRET" not in written
    assert written.count("<redacted:HF_TOKEN>") == 8
    assert '"n": 3' in written


def test_the_sinks_are_what_is_tested(tmp_path: Path) -> None:
    """The negative control: unknown, it comes through everywhere."""
    assert every_sink(tmp_path).count("TESTSECRET") == 8


@pytest.mark.faults("F65")
def test_wandb_is_given_no_secret(tmp_path: Path, known: Secrets) -> None:
    pytest.importorskip("wandb")
    known.add("WANDB_API_KEY", "TESTSECRETof-wandb")
    settings: dict[str, Any] = {"endpoint": "TESTSECRETof-wandb", "lr": 1e-4}
    notes: list[str] = []
    sink = Isolated("wandb", Wandb(tmp_path, "p", "n", "offline", settings), notes.append)
    sink.write(1, {"loss": 1.0})
    sink.close(60.0)
    files = [p for p in (tmp_path / "wandb").rglob("*") if p.is_file()]
    content = [p.read_bytes() for p in files]
    assert not [n for n in notes if "off" in n.split()], notes
    assert any(b"redacted:WANDB_API_KEY" in c for c in content)
    assert not any(b"TESTSECRET" in c for c in content)


@pytest.mark.faults("F65")
def test_an_endpoint_that_sends_the_key_back(known: Secrets) -> None:
    """What it writes is kept in traces.jsonl and trained on."""

    class Echo:
        async def write(self, messages: Any, seed: int = 0) -> Written:
            return Written(f"I was sent Authorization: Bearer {CANARY}. 42", Finish.STOP, 9)

    known.add("OPENAI_API_KEY", CANARY)
    written = asyncio.run(Discreet(Echo()).write([]))
    assert CANARY not in written.text
    assert written == Written("I was sent Authorization: Bearer <redacted:OPENAI_API_KEY>. 42", Finish.STOP, 9)
