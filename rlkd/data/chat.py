"""A model folder's tokenizer behind the port `core.ports.Tokenizer`, and its chat template."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from rlkd.core.errors import PreflightError
from rlkd.data.files import suggestion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]  # role, content


class TemplateRefusal(ValueError):
    """The chat template does not take these messages: roles out of order, no system message allowed."""


class HFTokenizer:
    """Token ids from text, text from token ids; never padded, never cut.

    `stop_tokens` end an answer: the tokenizer's end token and those of the folder's generation_config.json.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop_tokens: Sequence[int] = ()) -> None:
        """Raises PreflightError if neither the tokenizer nor `stop_tokens` says how an answer ends."""
        self._tokenizer = tokenizer
        own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        stops = list(dict.fromkeys([*own, *stop_tokens]))
        if not stops:
            raise PreflightError(
                "RLKD-E153",
                "the tokenizer has no end token: answers would never end",
                where=str(tokenizer.name_or_path) or None,
                fix="give eos_token in tokenizer_config.json, or eos_token_id in generation_config.json",
            )
        self.eos = stops[0]
        self.stop_tokens = tuple(sorted(stops))
        self.pad = self.eos if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        # What a character without a token becomes; None where such a token says other things too.
        self.unknown: int | None = None if tokenizer.unk_token_id in marks else tokenizer.unk_token_id

    @classmethod
    def load(cls, folder: str, chat_template: str | None = None, trust_remote_code: bool = False) -> "HFTokenizer":
        """From a folder on disk; `chat_template` is a Jinja file that replaces the folder's own.

        Raises PreflightError for a missing folder, files that make no tokenizer, or an unreadable template.
        """
        path = Path(os.path.expanduser(folder))
        if not os.path.isdir(path):
            raise PreflightError(
                "RLKD-E150",
                "no such model folder",
                where=str(path),
                fix=suggestion(path) or "models are folders on disk",
            )
        tokenizer = _auto_tokenizer(path, trust_remote_code)
        if chat_template is not None:
            tokenizer.chat_template = _template(Path(chat_template))
        return cls(tokenizer, _stop_tokens(path))

    @property
    def vocabulary(self) -> int:
        """How many token ids there are; the model's embedding may have more rows."""
        return len(self._tokenizer)

    def encode(self, text: str) -> Int32[np.ndarray, "_"]:
        """Plain text, with the leading token the tokenizer itself puts there (BOS), if it does."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str], special: bool = True) -> list[Int32[np.ndarray, "_"]]:
        """All at once, which is several times faster. `special=False` for text that a chat template has made."""
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=special,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )
        return [np.array(ids, np.int32) for ids in encoded["input_ids"]]

    def spans(self, text: str) -> tuple[Int32[np.ndarray, "n"], Int32[np.ndarray, "n 2"]]:
        """Token ids of plain text without BOS, and the characters [from, to) that each stands for.

        PreflightError for a tokenizer written in Python ("slow"), which does not know them.
        """
        if not self._tokenizer.is_fast:
            raise PreflightError(
                "RLKD-E159",
                "the tokenizer cannot say which characters a token stands for: it is no fast one",
                where=str(self._tokenizer.name_or_path) or None,
                fix="the model folder needs tokenizer.json, which a fast tokenizer's save_pretrained writes",
            )
        encoded = self._tokenizer(
            text, add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False
        )
        places = np.array(encoded["offset_mapping"], np.int32).reshape(-1, 2)
        return np.array(encoded["input_ids"], np.int32), places

    def decode(self, tokens: Int32[np.ndarray, "_"], special: bool = False) -> str:
        """The text as it is, spaces untouched; end tokens and their like only with `special`."""
        text = self._tokenizer.decode(
            tokens.tolist(), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def require_chat(self) -> None:
        """Raises PreflightError unless there is a chat template."""
        if not self._tokenizer.chat_template:
            raise PreflightError(
                "RLKD-E154",
                "the tokenizer has no chat template",
                where=str(self._tokenizer.name_or_path) or None,
                fix="give model.chat_template=FILE.jinja, or data.chat=false to use prompts as plain text",
            )

    def render(self, messages: Sequence[Message]) -> str:
        """The chat template's text, up to where the answer begins.

        Raises PreflightError without a template or with a broken one, TemplateRefusal if it does not take the messages.
        """
        from jinja2 import TemplateError, TemplateSyntaxError

        self.require_chat()
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(m) for m in messages], add_generation_prompt=True, tokenize=False
            )
        except TemplateSyntaxError as error:
            raise PreflightError(
                "RLKD-E155",
                f"the chat template is broken: line {error.lineno}: {error.message}",
                where=str(self._tokenizer.name_or_path) or None,
                fix="give a working one: model.chat_template=FILE.jinja",
            ) from error
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise TemplateRefusal(_first_line(error)) from error
        assert isinstance(text, str)
        return text

    def chat(self, messages: Sequence[Message]) -> Int32[np.ndarray, "_"]:
        """Token ids that end where the answer begins. Raises as `render` does."""
        return self.encode_many([self.render(messages)], special=False)[0]


def _auto_tokenizer(path: Path, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the libraries below raise whatever they meet: KeyError, JSONDecodeError, Exception
        raise PreflightError(
            "RLKD-E151",
            f"its tokenizer cannot be loaded: {type(error).__name__}: {_first_line(error)}",
            where=str(path),
            fix="the folder needs tokenizer.json and tokenizer_config.json of the model",
        ) from error
    # From a config.json alone, transformers makes a tokenizer without words for some kinds of model.
    if len(tokenizer.get_vocab()) <= len(tokenizer.get_added_vocab()):
        raise PreflightError(
            "RLKD-E152",
            "its tokenizer has no words but special tokens: the tokenizer's files are missing",
            where=str(path),
            fix="the folder needs tokenizer.json and tokenizer_config.json of the model",
        )
    return tokenizer


def _template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PreflightError(
            "RLKD-E156",
            f"the chat template cannot be read: {_first_line(error)}",
            where=str(path),
            fix=suggestion(path) or "model.chat_template is a Jinja file",
        ) from error


def _stop_tokens(folder: Path) -> list[int]:
    """`eos_token_id` of generation_config.json, else of config.json: a number, a list of numbers, or nothing.

    Raises PreflightError if the file says something else.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content: Any = json.loads(path.read_text(encoding="utf-8"))
            found = content.get("eos_token_id")
            ids = found if isinstance(found, list) else [] if found is None else [found]
            if not all(type(i) is int and i >= 0 for i in ids):
                raise ValueError(f"eos_token_id is {found!r}")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise PreflightError(
                "RLKD-E157",
                f"cannot tell the end tokens: {_first_line(error)}",
                where=str(path),
                fix="eos_token_id must be a token's number or a list of them",
            ) from error
        return list(ids)
    return []


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
