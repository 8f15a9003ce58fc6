"""``reasonalloc run``: generate under a budget, streaming."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Optional

import typer

from reasonalloc.cli import options as o
from reasonalloc.cli import output
from reasonalloc.config import CompressionConfig


def _prompt(*names: str, **keywords: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Prompt (one of)", **keywords)


def _sampling(*names: str, **keywords: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Generation", **keywords)


Prompt = Annotated[
    Optional[str],  # noqa: UP045
    _prompt("--prompt", metavar="TEXT", help="The prompt."),
]
PromptFile = Annotated[
    Optional[str],  # noqa: UP045
    _prompt("--prompt-file", metavar="FILE", help="A text file with the prompt; - is stdin."),
]
Chat = Annotated[
    Optional[str],  # noqa: UP045
    _prompt(
        "--chat", metavar="FILE", help='A JSON list of {"role": ..., "content": ...}; - is stdin.'
    ),
]
NoTemplate = Annotated[
    bool, _prompt("--no-chat-template", help="Give the prompt to the model as it is.")
]
MaxNew = Annotated[int, _sampling("--max-new-tokens", help="Most tokens to generate.", min=1)]
Temperature = Annotated[float, _sampling("--temperature", help="0 is greedy.", min=0.0)]
TopP = Annotated[
    float,
    _sampling(
        "--top-p",
        help="Share of probability to sample from; needs a temperature.",
        min=0.0,
        max=1.0,
    ),
]
Seed = Annotated[
    int,
    _sampling(
        "--seed",
        help="Of the sampling and of the policy 'random'.",
        min=0,
        max=2**32 - 1,  # what generators take
    ),
]


@o.takes(model=o.MODEL, config=o.compression_options(prompt_mode=o.PromptModeAlone))
def command(
    *,
    model: o.ModelChoice,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    chat: Chat = None,
    no_chat_template: NoTemplate = False,
    config: CompressionConfig | None,
    max_new_tokens: MaxNew = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    as_json: o.Json = False,
) -> None:
    """Generate under a KV budget; the text goes to stdout, progress and summary to stderr."""
    from reasonalloc.cli.prompts import encode, fit_length, read_messages
    from reasonalloc.temperature import check_effect, check_temperature, check_top_p

    check_temperature(temperature)
    check_top_p(top_p)
    check_effect(temperature, top_p)
    messages = read_messages(prompt, prompt_file, chat)
    if seed and not temperature and (config is None or config.arm.policy != "random"):
        output.note(f"--seed {seed} changes nothing: --temperature 0 is greedy")
    from reasonalloc.integrations.hf.watch import Sampling, watched

    loaded, tokenizer = _load(model, config)
    tokens = encode(tokenizer, messages, chat is not None, not no_chat_template)
    max_new_tokens = fit_length(loaded.config, int(tokens.shape[1]), max_new_tokens)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    from reasonalloc.cli.live import Screen

    with Screen(not as_json) as screen:
        result = watched(
            loaded,
            tokenizer,
            tokens,
            sampling,
            config,
            lambda progress, text: screen.update(progress.line(), text),
        )
    if not as_json and not sys.stdout.isatty() and not result.text.endswith("\n"):
        print(flush=True)
    if as_json:
        output.print_json({"model": model.name, **result.report()})
    else:
        from reasonalloc.integrations.hf.watch_table import watch_table

        output.stderr().print()
        output.stderr().print(watch_table(result).rich())
    if result.stopped == "interrupted":
        raise typer.Exit(130)


def _load(model: o.ModelChoice, config: CompressionConfig | None) -> tuple[Any, Any]:
    """Return model and tokenizer; what cannot work is refused before the weights are loaded."""
    from reasonalloc.planning.model_plan import plan_config
    from reasonalloc.planning.shapes import layer_shapes, text_config

    model_config = model.load_config()
    if config is None:
        layer_shapes(text_config(model_config), model.name)
    else:
        plan_config(model_config, config, dtype=model.dtype, name=model.name)
    return model.load(model_config)
