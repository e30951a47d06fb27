"""What a run reads before anything is started: the model's folder, the tokenizer, the prompts. Needs no Ray, no GPU."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkd.config.load import check as check_config
from rlkd.config.schema import Config
from rlkd.core.errors import ConfigError, PreflightError
from rlkd.core.ports import Sampling
from rlkd.data import Data, HFTokenizer, load_data
from rlkd.data.files import suggestion


@dataclass(frozen=True)
class Inputs:
    """A recipe's tokenizer and prompts, checked against each other and against the model."""

    tokenizer: HFTokenizer
    data: Data
    context: int  # tokens of prompt + answer

    @property
    def longest_prompt(self) -> int:
        prompts = [*self.data.train.prompts, *(self.data.holdout.prompts if self.data.holdout else ())]
        return max(len(p.tokens) for p in prompts)

    def sampling(self, config: Config) -> Sampling:
        """How the policy writes while it is trained."""
        s = config.sampler
        return Sampling(s.max_tokens, s.temperature, s.top_p, self.tokenizer.stop_tokens, s.min_tokens)


def read(config: Config) -> Inputs:
    """Everything the recipe names on disk. PreflightError, DataError or ConfigError say what is wrong with it."""
    context = model_context(config)
    tokenizer = HFTokenizer.load(config.model.path, config.model.chat_template, config.model.trust_remote_code)
    check_config(config, model_context=context)
    data = load_data(config.data, tokenizer, context, config.sampler.max_tokens, config.model.system)
    inputs = Inputs(tokenizer, data, context)
    check_config(config, model_context=context, longest_prompt=inputs.longest_prompt)
    return inputs


def model_context(config: Config) -> int:
    """Tokens the model can take: its own limit, or the recipe's smaller one."""
    own = _own_context(model_config(config.model.path))
    wanted = config.model.context
    if wanted is None:
        return own
    if wanted > own:
        raise ConfigError(
            "RLKD-C410",
            f"model.context={wanted:,} is more than the model's {own:,} tokens",
            where="model.context",
            fix=f"at most {own:,}",
        )
    return wanted


def model_config(path: str) -> dict[str, Any]:
    """The folder's config.json. PreflightError if there is no such folder, or it holds no model."""
    folder = Path(path)
    if not folder.is_dir():
        known = {"tiny", "smollm2", "gemma3-270m"} & {folder.name}
        made = f"`rlkd model get {known.pop()} {path}` makes it" if known else suggestion(folder)
        raise PreflightError("RLKD-E110", f"no such model folder: {path}", where="model.path", fix=made)
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
    if not any(folder.glob("*.safetensors")):
        raise PreflightError(
            "RLKD-E119",
            "this model folder holds no weights",
            where=str(folder),
            fix="it needs *.safetensors; convert other formats with transformers' save_pretrained",
        )
    return content


def _own_context(content: dict[str, Any]) -> int:
    text = content.get("text_config", content)
    limit = text.get("max_position_embeddings")
    if not isinstance(limit, int):
        raise PreflightError(
            "RLKD-E120",
            "the model's config does not say how many tokens it takes (max_position_embeddings)",
            where="model.path",
            fix="add it to config.json",
        )
    return limit
