"""What a run reads before anything is started: the model's folder, the tokenizer, the prompts. Needs no Ray, no GPU."""

from collections.abc import Mapping
from dataclasses import dataclass

from rlkd.config.load import check as check_config
from rlkd.config.schema import Config
from rlkd.core.errors import ConfigError
from rlkd.core.ports import Sampling
from rlkd.data import Data, HFTokenizer, load_data
from rlkd.model_folder import model_config, own_context
from rlkd.teachers import Frozen, known


@dataclass(frozen=True)
class Inputs:
    """A recipe's tokenizer and prompts, checked against each other and against the model."""

    tokenizer: HFTokenizer
    data: Data
    context: int  # tokens of prompt + answer
    frozen: Mapping[str, Frozen]  # the reference and the local teachers that the algorithm asks, by name

    @property
    def longest_prompt(self) -> int:
        prompts = [*self.data.train.prompts, *(self.data.holdout.prompts if self.data.holdout else ())]
        return max(len(p.tokens) for p in prompts)

    def sampling(self, config: Config) -> Sampling:
        """How the policy writes while it is trained."""
        s = config.sampler
        return Sampling(s.max_tokens, s.temperature, s.top_p, self.tokenizer.stop_tokens, s.min_tokens)


def read(config: Config, teachers: bool = True) -> Inputs:
    """Everything the recipe names on disk, without the `teachers` where they are not asked (evaluation).

    PreflightError, DataError or ConfigError say what is wrong with it.
    """
    context = model_context(config)
    tokenizer = HFTokenizer.load(config.model.path, config.model.chat_template, config.model.trust_remote_code)
    check_config(config, model_context=context)
    frozen = known(config, tokenizer) if teachers else {}
    data = load_data(config.data, tokenizer, context, config.sampler.max_tokens, config.model.system)
    inputs = Inputs(tokenizer, data, context, frozen)
    check_config(config, model_context=context, longest_prompt=inputs.longest_prompt)
    return inputs


def model_context(config: Config) -> int:
    """Tokens the model can take: its own limit, or the recipe's smaller one."""
    own = own_context(model_config(config.model.path))
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
