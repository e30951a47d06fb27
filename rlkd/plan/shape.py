"""The shape of a model, from its config.json alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkd.core.errors import PreflightError
from rlkd.plan.known import KNOWN


@dataclass(frozen=True)
class Family:
    """What config.json does not say of a dense decoder with gated MLPs: it is in transformers' modeling files."""

    qkv_bias: bool | None = None  # None: `attention_bias`
    output_bias: bool | None = None  # None: `attention_bias`
    qk_norm: bool = False  # a norm of head_dim weights on queries and one on keys
    norms: int = 2  # of `hidden` weights, per layer


FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(qkv_bias=False, output_bias=False),
    "phi3": Family(qkv_bias=False, output_bias=False),
    "smollm3": Family(),
    "qwen2": Family(qkv_bias=True, output_bias=False),
    "qwen3": Family(qk_norm=True),
    "gemma": Family(),
    "gemma2": Family(norms=4),
    "gemma3_text": Family(qk_norm=True, norms=4),
}


@dataclass(frozen=True)
class Shape:
    """Sizes, in elements. A tied head is the embedding, and counts once."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    tied: bool
    family: Family = Family()
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def parts(self) -> dict[str, int]:
        """Parameters by part; their sum is the model's."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        f = self.family
        qkv_bias = self.attention_bias if f.qkv_bias is None else f.qkv_bias
        output_bias = self.attention_bias if f.output_bias is None else f.output_bias
        attention = self.hidden * (2 * q + 2 * kv) + qkv_bias * (q + 2 * kv) + output_bias * self.hidden
        mlp = 3 * self.hidden * self.intermediate + self.mlp_bias * (2 * self.intermediate + self.hidden)
        norms = f.norms * self.hidden + f.qk_norm * 2 * self.head_dim
        table = self.vocabulary * self.hidden
        return {
            "embedding": table,
            "attention": self.layers * attention,
            "mlp": self.layers * mlp,
            "norms": self.layers * norms + self.hidden,
            "head": 0 if self.tied else table,
        }

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())

    @property
    def trunk(self) -> int:
        """Parameters that multiply every token: without the embedding, which is looked up, and without the head."""
        parts = self.parts
        return parts["attention"] + parts["mlp"] + parts["norms"]

    @property
    def head(self) -> int:
        """Elements of the head's matrix, tied or not: what a scored token is multiplied with."""
        return self.vocabulary * self.hidden

    @property
    def largest_layer(self) -> int:
        """Parameters that ZeRO-3 gathers at once: a layer, or the embedding."""
        parts = self.parts
        return max(parts["embedding"], (parts["attention"] + parts["mlp"] + parts["norms"]) // self.layers)

    def kv_bytes(self, element: int) -> int:
        """Of one token's keys and values, `element` bytes each. Sliding windows are not counted as a saving."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element


def shape_of(path: str, where: str = "model.path") -> Shape:
    """Of the folder's config.json; of a published model of that folder's name where there is no such file yet.

    PreflightError RLKD-E180 if neither is known, RLKD-E181 for a kind of model that is not planned.
    """
    return read(config_of(path, where), Path(path).name, where)


def config_of(path: str, where: str = "model.path") -> dict[str, Any]:
    """What config.json says. PreflightError as `shape_of`."""
    file = Path(path) / "config.json"
    if not file.is_file():
        found = published(Path(path).name)
        if found is None:
            raise PreflightError(
                "RLKD-E180",
                f"the shape of the model is unknown: there is no {file}",
                where=where,
                fix=f"put its config.json there (no weights are needed); known by name: {', '.join(KNOWN)}",
            )
        return found
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError) as e:
        raise PreflightError("RLKD-E180", f"cannot read the model's config: {e}", where=str(file)) from e
    return content


def published(name: str) -> dict[str, Any] | None:
    """config.json of the published model that a folder of this name holds, as far as it is known here.

    The longest name that it contains, without regard to case: Qwen2.5-7B-Instruct is a Qwen2.5-7B.
    """
    low = name.lower()
    found = max((known for known in KNOWN if known.lower() in low), key=len, default=None)
    return None if found is None else dict(KNOWN[found])


def read(content: Mapping[str, Any], name: str, where: str) -> Shape:
    """The shape that a config.json says. PreflightError RLKD-E181 if it is of a kind that is not planned."""
    text: Mapping[str, Any] = content.get("text_config", content)
    kind = str(text.get("model_type", content.get("model_type", "")))
    experts = next((k for k in ("num_experts", "num_local_experts", "n_routed_experts") if text.get(k)), None)
    if kind not in FAMILIES or experts is not None:
        what = f"a model of experts ({experts}={text[experts]})" if experts else f"a model of the kind `{kind}`"
        raise PreflightError(
            "RLKD-E181",
            f"{what} is not planned here",
            where=where,
            fix=f"dense models are: {', '.join(FAMILIES)}; `rlkd train` does not need a plan",
        )
    try:
        hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
        return Shape(
            name=name,
            hidden=hidden,
            intermediate=int(text["intermediate_size"]),
            layers=int(text["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(text.get("num_key_value_heads") or heads),
            head_dim=int(text.get("head_dim") or hidden // heads),
            vocabulary=int(text["vocab_size"]),
            context=int(text["max_position_embeddings"]),
            tied=bool(text.get("tie_word_embeddings", content.get("tie_word_embeddings", kind.startswith("gemma")))),
            family=FAMILIES[kind],
            attention_bias=bool(text.get("attention_bias", False)),
            mlp_bias=bool(text.get("mlp_bias", False)),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise PreflightError(
            "RLKD-E180", f"the model's config lacks a size: {e}", where=where, fix="complete its config.json"
        ) from e
