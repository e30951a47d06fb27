"""What a teacher's feedback must look like, and what is taken of it. Pure, on text."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlkd.core.ports import Tokenizer


@dataclass(frozen=True)
class Tags:
    """The names of the three blocks, in their order, and what the first may say."""

    opinion: str = "opinion"
    reason: str = "reason"
    phrase: str = "phrase"
    opinions: tuple[str, ...] = ("correct", "incorrect")

    @property
    def names(self) -> tuple[str, str, str]:
        return self.opinion, self.reason, self.phrase

    @property
    def marks(self) -> tuple[str, ...]:
        return tuple(mark for name in self.names for mark in (f"<{name}>", f"</{name}>"))


@dataclass(frozen=True)
class Remark:
    """Feedback that has the form: whether the answer is right, what goes through the teacher's mind, how it goes on."""

    opinion: str
    reason: str
    phrase: str

    def text(self, tags: Tags) -> str:
        parts = zip(tags.names, (self.opinion, self.reason, self.phrase), strict=True)
        return "\n".join(f"<{name}>{part}</{name}>" for name, part in parts)


def parse(text: str, tags: Tags) -> Remark | None:
    """The three blocks in order and nothing else but space between them; else None.

    No block may be blank, and none may hold one of the tags: `<reason>` twice is not the form.
    """
    opinion, reason, phrase = (re.escape(name) for name in tags.names)
    said = "|".join(re.escape(o) for o in tags.opinions)
    form = (
        rf"\s*<{opinion}>\s*({said})\s*</{opinion}>"
        rf"\s*<{reason}>(.*?)</{reason}>"
        rf"\s*<{phrase}>(.*?)</{phrase}>\s*"
    )
    found = re.fullmatch(form, text, re.DOTALL)
    if found is None:
        return None
    remark = Remark(found[1], found[2].strip(), found[3].strip())
    inside = remark.reason + remark.phrase
    if not remark.reason or not remark.phrase or any(mark in inside for mark in tags.marks):
        return None
    return remark


def shortened(text: str, tokenizer: Tokenizer, limit: int) -> str:
    """The text of its first `limit` tokens."""
    ids, places = tokenizer.spans(text)
    return text if len(ids) <= limit else text[: int(places[limit - 1, 1])]


def within(remark: Remark, text: str, kept: str, tags: Tags) -> Remark | None:
    """What is left of a remark when only the beginning `kept` of its `text` is used.

    A phrase that does not come to its end is left out, as in the released code; None if the reason does not either.
    """
    if kept == text or f"</{tags.phrase}>" in kept:
        return remark
    return replace(remark, phrase="") if f"</{tags.reason}>" in kept else None


def says(decoded: str, text: str) -> bool:
    """Whether decoded tokens still say the text: all but spaces and the choice among equal Unicode forms. A character
    that has no token became an unknown one, which decodes to nothing."""
    return _bare(decoded) == _bare(text)


def _bare(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def joined(parts: Sequence[str], separator: str) -> str:
    """What is put behind the student's text: each part that is there, the separator before it."""
    return "".join(separator + part for part in parts if part)
