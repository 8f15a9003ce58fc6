"""What an evaluation refuses before anything runs."""

from __future__ import annotations

from reasonalloc.errors import UsageError, unknown_name
from reasonalloc.evaluation.batch import Settings
from reasonalloc.evaluation.chunks import Facts, ModelSpec


def check_parts(spec: ModelSpec, settings: Settings, remote: bool) -> None:
    """Refuse what does not go with a model that is divided among processes."""
    if spec.tp_plan is None:
        return
    if remote:
        raise UsageError(
            f"tp_plan={spec.tp_plan!r} divides one model among the processes of a torchrun, "
            "workers and ray_address start whole models: give one of the two"
        )
    if settings.step in ("graph", "compile"):
        raise UsageError(
            f"step={settings.step!r} runs a model that is whole, tp_plan={spec.tp_plan!r} divides "
            "it among processes: give --step eager or static"
        )


def check_engine(spec: ModelSpec, settings: Settings) -> None:
    """Refuse what goes with one engine only."""
    if spec.engine == "transformers":
        return
    if spec.engine != "vllm":
        raise unknown_name("engine", spec.engine, ("transformers", "vllm"))
    given = {
        "--device": spec.device != "auto",
        "--device-map": spec.device_map is not None,
        "--tp-plan": spec.tp_plan is not None,
        "--protect-prompt": settings.protect_prompt,
        "--prompt protect": settings.prompt == "protect",
        "--pin-limit": settings.pin_limit is not None,
    }
    for name, there in given.items():
        if there:
            raise UsageError(f"{name} cannot be used with --engine vllm yet: leave it out")
    for name in ("step", "attention"):
        value = getattr(settings, name)
        if value != getattr(type(settings), name):
            raise UsageError(
                f"--{name} {value} has no effect with --engine vllm, which has steps and kernels "
                "of its own: leave it out"
            )
    if spec.name.endswith(".gguf"):
        raise UsageError(
            f"model={spec.name!r}: --engine vllm takes a hub name or a folder, no .gguf file"
        )
    from reasonalloc.evaluation.vllm_solver import require_vllm

    require_vllm()


def check_length(facts: Facts, max_new_tokens: int) -> None:
    """Refuse more new tokens than the model has positions for."""
    room = None if facts.positions is None else facts.positions - facts.longest
    if room is not None and room < max_new_tokens:
        raise UsageError(
            f"max_new_tokens={max_new_tokens} does not fit: the model has {facts.positions} "
            f"positions and the longest prompt takes {facts.longest}: give --max-new-tokens "
            f"{max(room, 0)} or less"
        )
