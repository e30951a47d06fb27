"""What a model's folder says of itself, looked at before anything is loaded."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rlkd.core.errors import PreflightError
from rlkd.data.files import suggestion
from rlkd.models.get import MODELS


def model_config(path: str, where: str = "model.path") -> dict[str, Any]:
    """The folder's config.json. PreflightError if there is no such folder, or it holds no model, or half of one."""
    folder = Path(path)
    if not folder.is_dir():
        known = folder.name in MODELS
        made = f"`rlkd model get {folder.name} {path}` makes it" if known else suggestion(folder)
        raise PreflightError("RLKD-E110", f"no such model folder: {path}", where=where, fix=made)
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "model_type" not in content:
            raise ValueError("config.json names no model_type")
    except (OSError, ValueError) as e:
        raise PreflightError(
            "RLKD-E118",
            f"this folder holds no Hugging Face model: {e}",
            where=str(folder),
            fix="it needs config.json, the tokenizer's files and *.safetensors",
        ) from e
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise PreflightError(
            "RLKD-E119",
            "this model folder holds no weights",
            where=str(folder),
            fix="it needs *.safetensors; convert other formats with transformers' save_pretrained",
        )
    for file in files:
        _is_whole(file)
    return content


def _is_whole(file: Path) -> None:
    """PreflightError if this file of weights is cut off or is something else. Its header says how long it is."""
    try:
        with safe_open(file, framework="numpy") as content:
            content.keys()
    except (OSError, SafetensorError) as e:
        raise PreflightError(
            "RLKD-E121",
            f"this file of weights cannot be read: {e}",
            where=str(file),
            fix="it was not copied whole, or is a git-lfs pointer: get it again",
        ) from e


def own_context(content: dict[str, Any], where: str = "model.path") -> int:
    """Tokens the model of this config.json takes. PreflightError if it does not say."""
    text = content.get("text_config", content)
    limit = text.get("max_position_embeddings")
    if not isinstance(limit, int):
        raise PreflightError(
            "RLKD-E120",
            "the model's config does not say how many tokens it takes (max_position_embeddings)",
            where=where,
            fix="add it to config.json",
        )
    return limit


def vocabulary(content: dict[str, Any]) -> int:
    """Token ids the model of this config.json takes: rows of its embedding."""
    return int(content.get("text_config", content)["vocab_size"])
