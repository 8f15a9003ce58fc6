"""What a vLLM engine is asked to do: read from its configuration or the environment, validated."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from reasonalloc.config import Arm, CompressionConfig, parse_arm
from reasonalloc.errors import UsageError, unknown_name

KEY = "reasonalloc"
VARIABLE = "REASONALLOC_VLLM"
_PROFILE = "reasonalloc_profile"  # beside it
_PLUGINS = "VLLM_PLUGINS"
_PARTS = ("policy", "layers", "heads")
_PLAIN = ("budget", "interval", "window", "n_sink", "prompt", "kv_dtype", "seed", "profile")


def find_settings(additional_config: Any) -> CompressionConfig | None:
    """The settings of an engine, or None if it is to run without a budget.

    Args:
        additional_config: vLLM's ``additional_config``; its entry ``reasonalloc`` goes before the
            environment variable ``REASONALLOC_VLLM``, which holds the same as JSON.

    Raises:
        UsageError: an unknown field or a wrong value.
    """
    given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    owner = "additional_config['reasonalloc']"
    if given is None and os.environ.get(VARIABLE):
        owner = VARIABLE
        try:
            given = json.loads(os.environ[VARIABLE])
        except ValueError:
            raise UsageError(
                f"{VARIABLE} is no JSON: write {VARIABLE}='{{\"budget\": 1024}}'"
            ) from None
    if given is None:
        _check_place(additional_config)
        return None
    if not isinstance(given, Mapping):
        raise UsageError(f'{owner} must be an object, such as {{"budget": 1024, "arm": "rkv"}}')
    return _read(owner, dict(given))


def _check_place(additional_config: Any) -> None:
    """Refuse settings of ours that are not where they belong, and would be ignored.

    Raises:
        UsageError: says where to write them.
    """
    names = set(additional_config) if isinstance(additional_config, Mapping) else set()
    meant = difflib.get_close_matches(KEY, [str(name) for name in names - {_PROFILE}], 1, 0.8)
    if meant:
        raise UsageError(f"additional_config[{meant[0]!r}]: did you mean {KEY!r}? write that")
    if "budget" in names and names <= {"arm", *_PARTS, *_PLAIN}:
        raise UsageError(
            f"additional_config has the settings of a budget, but not under {KEY!r}: write "
            f'additional_config={{"{KEY}": {{"budget": ...}}}}'
        )


def with_settings(additional_config: Any, settings: CompressionConfig) -> Any:
    """``additional_config`` with the settings in it, wherever they were found.

    vLLM carries it to every machine and tells compiled graphs apart by it; the environment
    variable it does neither. Beside them is a digest of the profile: a file that was written anew
    is another one, while an engine that runs keeps what it read.
    """
    if not isinstance(additional_config, Mapping):
        return additional_config
    digest = None if settings.profile is None else _digest(settings.profile)
    kept = {name: value for name, value in additional_config.items() if name != _PROFILE}
    return {KEY: as_json(settings), **kept, **({_PROFILE: digest} if digest else {})}


def profile_digest(additional_config: Any) -> str | None:
    """What ``with_settings`` noted of the profile; None without one."""
    return additional_config.get(_PROFILE) if isinstance(additional_config, Mapping) else None


def _digest(path: str | os.PathLike[str]) -> str | None:
    """Of a file's content; None if it cannot be read, which is said where it is used."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return None


def allow_plugin(environment: MutableMapping[str, str]) -> None:
    """Have vLLM load this plugin, too, where a user names those that it may load.

    Without it a budget would be asked for and nobody would hear.
    """
    chosen = environment.get(_PLUGINS)
    if chosen is not None and KEY not in chosen.split(","):
        environment[_PLUGINS] = f"{chosen},{KEY}"


def _read(owner: str, given: dict[str, Any]) -> CompressionConfig | None:
    known = ("arm", *_PARTS, *_PLAIN)
    for name in given:
        if name not in known:
            raise unknown_name(f"field of {owner}", name, known)
    if "budget" not in given:
        raise UsageError(
            f"{owner}: budget is missing: give the tokens that a KV head keeps, or bytes"
        )
    plain = {name: given[name] for name in _PLAIN if name in given}
    parts = {name: given[name] for name in _PARTS if name in given}
    if "arm" not in given:
        return CompressionConfig(arm=Arm(**parts), **plain)
    if parts:
        raise UsageError(f"{owner}: arm and {next(iter(parts))} are both given: give one of them")
    arm = parse_arm(given["arm"])
    return None if arm is None else CompressionConfig(arm=arm, **plain)


def as_json(config: CompressionConfig) -> dict[str, Any]:
    """What ``find_settings`` reads back as these settings, from any folder."""
    arm = config.arm
    values = {name: getattr(config, name) for name in _PLAIN if name != "profile"}
    values |= {
        "budget": config.given_budget,
        "policy": arm.policy,
        "layers": arm.layers,
        "heads": arm.heads,
    }
    for name, default in (("prompt", "evict"), ("kv_dtype", "auto")):
        if values[name] == default:
            del values[name]
    if config.profile is not None:
        values["profile"] = str(Path(config.profile).resolve())
    return values
