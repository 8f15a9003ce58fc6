"""``reasonalloc plan``: the exact memory of a cache, before anything is loaded."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from reasonalloc.cli import options as o
from reasonalloc.cli import output
from reasonalloc.config import CompressionConfig
from reasonalloc.errors import UsageError

Batch = Annotated[int, typer.Option("--batch", help="Sequences.", min=1)]
Tokens = Annotated[
    int, typer.Option("--tokens", help="Context length to compare at, in tokens.", min=1)
]
PromptTokens = Annotated[
    int,
    typer.Option(
        "--prompt-tokens",
        help="Tokens of the prompt, which --prompt pin keeps on top of the budget.",
        min=0,
    ),
]
Memory = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Memory for the cache (24GiB, 800MB): print the largest batch that fits.",
    ),
]


@o.takes(model=o.MODEL_CONFIG, config=o.compression_options("attention", "step"))
def command(
    context: typer.Context,
    model: o.ModelChoice,
    config: CompressionConfig | None,
    batch: Batch = 1,
    tokens: Tokens = 32768,
    prompt_tokens: PromptTokens = 0,
    memory: Memory = None,
    as_json: o.Json = False,
) -> None:
    """Exact bytes of the KV cache before the first token, compressed and full.

    Only the model's configuration is read, not its weights.
    """
    size = None if memory is None else output.parse_size(memory)
    if config is None:
        raise UsageError(
            f"--arm {context.params['arm']} has no budget to plan: choose an arm that compresses, "
            "the full cache is printed beside it"
        )
    from reasonalloc.planning.model_plan import plan_config

    if (config.prompt == "pin") != (prompt_tokens > 0):
        raise UsageError(
            f"--prompt-tokens {prompt_tokens} with --prompt {config.prompt}: give the tokens of "
            "the prompt with --prompt pin, and only then"
        )
    if prompt_tokens > tokens:
        raise UsageError(
            f"--prompt-tokens {prompt_tokens} is more than --tokens {tokens}, which count the "
            "prompt too: give more tokens"
        )
    plan = plan_config(
        model.load_config(), config, batch, tokens, model.dtype, model.name, prompt_tokens
    )
    limit = getattr(plan.text_config, "max_position_embeddings", None)
    if isinstance(limit, int) and tokens > limit:
        output.note(f"--tokens {tokens} is more than the {limit} positions that the model has")
    if as_json:
        output.print_json(plan.report(size))
    else:
        plan.show(size)
