"""`rlkd plan`: what a recipe will need, from the command line."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rlkd.core.errors import ConfigError
from rlkd.terminal import Json, guarded, show_result


@guarded
def plan(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="A recipe; with --check: that of the run, if left out.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings on top, for example learner.ranks=8.")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", help="The fastest way to use so many; else as the recipe says."),
    ] = None,
    hardware: Annotated[
        str | None, typer.Option("--hardware", help="H100, H200, B200, A100-80, A100-40, L40S, RTX4090, or cpu: here.")
    ] = None,
    price: Annotated[float | None, typer.Option("--price", help="Of one GPU for an hour.")] = None,
    prompt: Annotated[
        float | None, typer.Option("--prompt-tokens", help="Mean of a prompt; read from the data if left out.")
    ] = None,
    answer: Annotated[
        float | None, typer.Option("--answer-tokens", help="Mean of an answer; half of the most if left out.")
    ] = None,
    scale: Annotated[bool, typer.Option("--scale", help="A table for 1 to 1024 GPUs.")] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Measure this machine, the first time (cpu).")
    ] = True,
    again: Annotated[bool, typer.Option("--again", help="Measure it again.")] = False,
    check: Annotated[
        Path | None, typer.Option("--check", metavar="RUN", help="Predicted beside measured, of this run.")
    ] = None,
    as_json: Json = False,
) -> int:
    """What a recipe will need: memory by part, seconds a step, hours, cost, checkpoints. Nothing is started.

    What cannot fit is refused (exit 3), with settings that would.
    """
    import rlkd.plan_command as command
    from rlkd.cli import _stages
    from rlkd.prove import config_of
    from rlkd.staged import run_folder

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    asked = command.Asked(gpus, hardware, price, prompt, answer, scale, calibrate, again)
    if check is not None:
        run = run_folder(check.resolve())
        stages = _stages(recipe or str(config_of(run)), overrides or ())
        config = next((stage.config for stage in stages if stage.name == run.name), stages[-1].config)
        return show_result(command.compare(config, run, asked, say), as_json)
    if recipe is None:
        raise ConfigError("RLKD-C433", "rlkd plan without a recipe", "command line", "rlkd plan RECIPE, or --check RUN")
    stages = _stages(recipe, overrides or ())
    results: list[dict[str, Any]] = [command.plan(stage.config, asked, say) for stage in stages]
    if len(results) == 1:
        return show_result(results[0], as_json)
    named = [(stage.name, result) for stage, result in zip(stages, results, strict=True)]
    text = "\n\n".join(f"stage {name}\n{result['text']}" for name, result in named)
    plans = {name: {k: v for k, v in result.items() if k != "text"} for name, result in named}
    return show_result({"stages": plans, "text": text}, as_json)
