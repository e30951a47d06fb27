"""New weights into a running vLLM, on its workers, through vLLM's own layer-by-layer reload.

The reload is the same from vLLM 0.24 to 0.32, and works on CPU and in the middle of generation. (vLLM's weight transfer
classes stand on it too; their interface changed in between, and their base class wants an accelerator.)
"""

import logging
from collections.abc import Iterator

import torch

from rlkd.core.errors import InfrastructureError
from rlkd.core.ports import WeightRef
from rlkd.engines.weights import read


class Extension:
    """Methods that vLLM adds to its worker class (`worker_extension_cls`); `self` is a vLLM Worker."""

    def load_published(self, version: int, where: str, digest: str) -> None:
        """Load the weights of a WeightRef, whose bytes were verified. InfrastructureError if any are missing."""
        from vllm.config import set_current_vllm_config

        with torch.inference_mode(), set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
            reload(self.model_runner, WeightRef(version, where, digest))  # type: ignore[attr-defined]


def reload(runner: object, ref: WeightRef) -> None:
    """Put the weights into a model runner's model, one layer at a time, and pack them as at start."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model, config = runner.get_model(), runner.model_config  # type: ignore[attr-defined]
    expected = {name for name, _ in model.named_parameters()}  # tied ones once
    tied = getattr(config.hf_text_config, "tie_word_embeddings", False)
    # It warns of tied heads and rotary tables at every update; what is really missing is an error here.
    logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
    initialize_layerwise_reload(model)
    loaded = model.load_weights(_wanted(ref, tied))
    missing = sorted(expected - set(loaded)) if loaded is not None else []
    if missing:
        raise InfrastructureError(
            "RLKD-I602",
            f"weights of version {ref.version} lack {len(missing)} of the model's {len(expected)} parameters: "
            + ", ".join(missing[:4]),
            where=ref.where,
            fix="learner and sampler must be the same model: see model.path",
        )
    finalize_layerwise_reload(model, config)
    if next(model.parameters()).device.type == "cpu":
        refresh_heads(model)
    else:
        torch.accelerator.synchronize()


def _wanted(ref: WeightRef, tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors but a tied head: vLLM's models share the embedding themselves, and some refuse the second name."""
    for name, tensor in read(ref, verify=False):
        if not (tied and name.endswith("lm_head.weight")):
            yield name, tensor


def refresh_heads(model: torch.nn.Module) -> None:
    """Pack every LM head's weight again. On CPU vLLM packs the head's weight at load; a reload packs again only the
    modules that weights came in for, and for tied embeddings that is the embedding: the head would go on serving the
    old weights (log-prob error 0.42 after four updates)."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
