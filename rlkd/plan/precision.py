"""What the learner makes of settings that the recipe leaves to it (engines/device.py, engines/deepspeed.py)."""

from rlkd.config.schema import Config


def zero_stage(config: Config, gpu: bool | None = None) -> int:
    """What the learner makes of `learner.zero_stage` (engines/deepspeed.py): bfloat16 needs a float32 copy, which
    ZeRO-0 has not. `gpu` as of `weight_size`."""
    stage = config.learner.zero_stage
    if stage is None:
        stage = 1 if config.learner.ranks > 1 else 0
    return 1 if stage == 0 and weight_size(config, gpu) == 2 else stage


def weight_size(config: Config, gpu: bool | None = None) -> int:
    """Bytes of one weight. `gpu`: whether the run gets GPUs, where the recipe says `auto`; None: it does, unless the
    recipe says cpu."""
    on_gpu = config.model.device != "cpu" if gpu is None else gpu
    dtype = config.model.dtype if config.model.dtype != "auto" else "bfloat16" if on_gpu else "float32"
    return 2 if dtype == "bfloat16" else 4
