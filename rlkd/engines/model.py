"""A Hugging Face causal language model over micro-batches: packed, prompts computed once, logits never whole.

This is the one place that knows about the shift by one: the hidden state of token t's predecessor predicts token t.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from rlkd.core.batch import MicroBatch
from rlkd.core.errors import PreflightError
from rlkd.core.logprob import Head, likeliest, token_logp, tokens_at
from rlkd.core.matmul import linear
from rlkd.core.ports import PolicyOutput
from rlkd.core.prefix import Layout, layout
from rlkd.core.types import TRAINED
from rlkd.engines.attention import Attention, attention
from rlkd.engines.device import pick_device, pick_dtype

NAME = "rlkd"  # of the attention function below, as transformers knows it
LAYER_TYPES = {"full_attention", "sliding_attention"}
UNSUPPORTED = ("s_aux", "position_bias", "indices", "block_indices", "output_attentions")


@dataclass(frozen=True)
class ModelOptions:
    """Which model, where and how; names as in the recipe's `model`, `sampler` and `learner`."""

    path: str
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["auto", "sdpa", "flash"] = "auto"
    trust_remote_code: bool = False
    temperature: float = 1.0  # of the sampler: what is trained is the distribution that was sampled from
    head_rows: int = 128
    share_prompt: bool = True
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class _Question:
    """What the head is asked instead of logits."""

    ask: Callable[[Tensor, Tensor, Tensor | None], Any]  # hidden, weight, bias


class Policy(nn.Module):
    """The trunk and the head.

    The trunk runs once over the computed tokens of a micro-batch. The head module is called for log-probs, not for
    logits, so that DeepSpeed's hooks gather its weight (and a tied embedding stays one parameter).
    """

    def __init__(self, model: Any, options: ModelOptions) -> None:
        super().__init__()
        self.model = model
        self.options = options
        self.vocabulary: int = model.get_output_embeddings().weight.shape[0]
        softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.head = Head(options.temperature, softcap, options.head_rows)
        _answer_questions(model.get_output_embeddings())

    @classmethod
    def load(cls, options: ModelOptions, hold: str | None = None) -> "Policy":
        """From a folder. PreflightError if it cannot be loaded or computed as it should be.

        The weights are put on the device, or where `hold` says.
        """
        device = pick_device(options.device)
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                options.path,
                dtype=pick_dtype(options.dtype, device),
                trust_remote_code=options.trust_remote_code,
                local_files_only=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise PreflightError(
                "RLKD-E141",
                f"the model cannot be loaded: {type(error).__name__}: {str(error).strip().splitlines()[0:1]}",
                where=options.path,
                fix="model.path must be a folder that transformers' AutoModelForCausalLM loads",
            ) from error
        return cls.of(model.to(hold or device), options)

    @classmethod
    def of(cls, model: Any, options: ModelOptions) -> "Policy":
        """Around a model in memory, which is changed: its attention, no dropout, checkpointing if asked for."""
        check_supported(model, options)
        _without_dropout(model)
        _with_fast_products(model)
        model.set_attn_implementation(NAME)
        if options.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return cls(model.train(), options)

    def forward(self, x: MicroBatch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(rows, log p, entropy, log Z, hidden) at the micro-batch's trained tokens; `rows` says which those are.

        Tensors only, as DeepSpeed's hooks need it; `output` makes of them what algorithms see.
        """
        where = layout(x, self.options.share_prompt)
        source = where.source.to(x.tokens.device)
        rows = (x.mask(TRAINED) & (source >= 0)).nonzero()[:, 0]
        states = self.hidden(x.tokens, where).index_select(0, source[rows])
        targets = x.tokens[rows].long()
        logp, entropy, log_z = self._ask(states, lambda h, w, b: token_logp(h, w, b, targets, self.head))
        return rows, logp, entropy, log_z, states

    def output(self, x: MicroBatch, run: Callable[[MicroBatch], Any] | None = None) -> PolicyOutput:
        """What algorithms see. `run` is what is called instead of this module (the DeepSpeed engine around it)."""
        rows, logp, entropy, log_z, states = (run or self)(x)

        def at(ids: Int[Tensor, "t k"]) -> Float[Tensor, "t k"]:
            picked = ids[rows].long()
            return spread(self._ask(states, lambda h, w, b: tokens_at(h, w, b, picked, log_z, self.head)))

        def spread(values: Tensor) -> Tensor:
            """Rows back to tokens; NaN where nobody trains. Those NaN are constants: no gradient comes from them."""
            full = values.new_full((len(x.tokens), *values.shape[1:]), torch.nan)
            return full.index_put((rows,), values)

        return PolicyOutput(spread(logp), spread(entropy), at)

    @contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """Another temperature for a while."""
        own, self.head = self.head, replace(self.head, temperature=temperature)
        try:
            yield
        finally:
            self.head = own

    def hidden(self, tokens: Int32[Tensor, "t"], where: Layout) -> Float[Tensor, "u h"]:
        """The trunk's last hidden state of each computed token."""
        device = tokens.device
        out = self.model.base_model(
            input_ids=tokens[where.computed.to(device)].long()[None],
            position_ids=where.position.to(device)[None],
            use_cache=False,
            rlkd_attention=attention(where.spans, self.options.attention, device),
        )
        return out.last_hidden_state[0]

    def likeliest(self, hidden: Float[Tensor, "r h"], k: int) -> tuple[Int[Tensor, "r k"], Float[Tensor, "r k"]]:
        """The k likeliest next tokens after each hidden state, and their log-probs. Without gradient."""
        ids, logp = self._ask(hidden, lambda h, w, b: likeliest(h, w, b, k, self.head))
        return ids, logp

    def logp(self, hidden: Float[Tensor, "r h"], targets: Int[Tensor, "r"]) -> Float[Tensor, "r"]:
        """log p of one next token after each hidden state."""
        logp: Tensor = self._ask(hidden, lambda h, w, b: token_logp(h, w, b, targets, self.head)[0])
        return logp

    def _ask(self, hidden: Tensor, question: Callable[[Tensor, Tensor, Tensor | None], Any]) -> Any:
        return self.model.get_output_embeddings()(hidden, _Question(question))


def _answer_questions(head: nn.Linear) -> None:
    """Let the head module answer a `_Question` about its distribution; with hidden states alone it gives logits."""
    logits = head.forward

    def forward(hidden: Tensor, question: _Question | None = None) -> Any:
        return logits(hidden) if question is None else question.ask(hidden, head.weight, head.bias)

    head.forward = forward  # type: ignore[assignment]


def _with_fast_products(model: Any) -> None:
    """The trunk's linear layers by core.matmul; on a GPU and in bfloat16 that is torch's own."""
    for part in model.modules():
        if type(part) is nn.Linear and part is not model.get_output_embeddings():
            part.forward = partial(_linear, part)  # type: ignore[method-assign]


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def _without_dropout(model: Any) -> None:
    """The sampler has none: a ratio of probabilities would otherwise compare two different functions."""
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name in ("attention_dropout", "dropout", "attn_dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)


def check_supported(model: Any, options: ModelOptions) -> None:
    """PreflightError for a model that the packed form would compute wrongly, as far as its config and class say so."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    unknown = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    why = None
    if options.temperature <= 0:
        why = f"sampler.temperature={options.temperature:g} has no distribution to train"
    elif not getattr(model, "_supports_attention_backend", False):
        why = "its attention cannot be replaced (no transformers attention backend)"
    elif unknown:
        why = f"it has layers of the kind {', '.join(sorted(unknown))}, which packed samples would leak through"
    elif not isinstance(head, nn.Linear):
        why = f"its head is a {type(head).__name__}, not a linear layer"
    if why:
        raise PreflightError(
            "RLKD-E142",
            f"{type(model).__name__} cannot be trained here: {why}",
            where=options.path,
            fix="take another model; computing it anyway would be silently wrong",
        )


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    rlkd_attention: Attention | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1 h u d], key and value [1 k u d] → [1 u h d].

    It has no mask function beside it, so transformers builds no mask: the layout says who sees whom.
    """
    if rlkd_attention is None:
        raise ValueError("attention 'rlkd' needs the micro-batch's layout: call the model through Policy")
    odd = [name for name in UNSUPPORTED if rest.get(name) is not None and rest[name] is not False]
    if dropout:
        odd.append("dropout")
    if attention_mask is not None:
        odd.append("attention_mask")
    if not getattr(module, "is_causal", True) or rest.get("is_causal") is False:
        odd.append("is_causal=False")
    if odd:
        raise PreflightError(
            "RLKD-E140",
            f"{type(module).__name__} uses {', '.join(odd)}, which packed attention does not compute",
            where="model.path",
            fix="take another model; computing it without would be silently wrong",
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return rlkd_attention(q, k, v, scaling, sliding_window, softcap)[None], None


AttentionInterface.register(NAME, attend)
