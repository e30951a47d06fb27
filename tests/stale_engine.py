"""vLLM without the refresh of the tied LM head after a weight update: the stack without our protection."""

from rlkd.engines import vllm_weights
from rlkd.engines.engine import EngineOptions
from rlkd.engines.vllm import VLLMEngine


class StaleHead(VLLMEngine):
    def __init__(self, options: EngineOptions) -> None:
        vllm_weights.refresh_heads = lambda _: None
        super().__init__(options)
