"""A local teacher that writes: a pool of engines behind the port `Writer`, with the teacher's own words and chat."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int32

from rlkd.core.errors import DataError, WorkerLost
from rlkd.core.ports import Model, Sampling, Tokenizer, Written
from rlkd.core.types import Finish

Message = Mapping[str, str]


@dataclass(frozen=True)
class LocalWriter:
    """Any vocabulary: messages go in as text and a text comes out.

    Messages that leave no room for an answer in the teacher's context give an empty text with finish LENGTH, and
    `report` is told: they are one prompt's trouble, not the run's. A text is cut where the context ends.
    """

    name: str
    model: Model
    tokenizer: Tokenizer  # the teacher's own
    sampling: Sampling  # with its own end tokens
    context: int  # tokens of messages and text
    chat: bool = True  # the teacher's chat template; else the messages' contents, an empty line between them
    system: str | None = None  # where a call brings none
    report: Callable[[str, str], None] = lambda *_: None

    async def write(self, messages: Sequence[Message], seed: int = 0) -> Written:
        """WorkerLost if the teacher's worker is; DataError if its chat template does not take the messages."""
        tokens = self._tokens(messages)
        room = self.context - len(tokens)
        if room < 1:
            self.report("teacher", f"{self.name}: messages of {len(tokens)} tokens leave no room in {self.context}")
            return Written("", Finish.LENGTH, 0)
        most = min(self.sampling.max_tokens, room)
        sampling = replace(self.sampling, max_tokens=most, min_tokens=min(self.sampling.min_tokens, most))
        (written,) = await self.model.generate(tokens, 1, seed, sampling)
        if written.finish is Finish.ABORTED:
            raise WorkerLost(f"{self.name}: the text was aborted")
        return Written(self.tokenizer.decode(written.tokens), written.finish, len(written.tokens))

    def _tokens(self, messages: Sequence[Message]) -> Int32[np.ndarray, "_"]:
        if self.system is not None and not any(m["role"] == "system" for m in messages):
            messages = [{"role": "system", "content": self.system}, *messages]
        if not self.chat:
            return self.tokenizer.encode("\n\n".join(m["content"] for m in messages))
        try:
            return self.tokenizer.chat(messages)
        except ValueError as refusal:
            roles = ", ".join(m["role"] for m in messages)
            raise DataError(
                "RLKD-D710",
                f"{self.name}: its chat template does not take messages of {roles}: {refusal}",
                where=f"{self.name}.writer",
                fix="say writer.chat=false to give the messages as plain text, or take another teacher",
            ) from refusal
