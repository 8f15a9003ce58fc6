"""``reasonalloc lm-eval``: the lm-evaluation-harness with the model ``reasonalloc``."""

from __future__ import annotations

import importlib.util
import sys

import typer

from reasonalloc.cli import output
from reasonalloc.errors import UsageError


def command(context: typer.Context) -> None:
    """Run the lm-evaluation-harness under a KV budget; takes lm_eval's own arguments.

    Example: reasonalloc lm-eval --model_args pretrained=Qwen/Qwen3-0.6B,budget=512,arm=rkv --tasks
    gsm8k --batch_size 8. Model arguments are those of lm-eval's model 'hf' (peft=ADAPTER and so on)
    and budget, arm, interval, window, n_sink, prompt, profile, seed, attention and step
    (step=compile: faster on a CPU, step=graph: on a GPU). All options: lm_eval run --help.
    """
    for package in ("lm_eval", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"lm-eval needs the package {package!r}: pip install 'reasonalloc[lm-eval]'"
            )
    arguments = list(context.args)
    if not arguments:
        raise UsageError("no arguments: give at least --model_args and --tasks (see --help)")
    if arguments[0].startswith("-"):
        arguments.insert(0, "run")
    named = any(a.partition("=")[0] in ("--model", "-M") for a in arguments)
    if arguments[0] == "run" and not named:
        arguments[1:1] = ["--model", "reasonalloc"]
    from lm_eval.__main__ import cli_evaluate

    import reasonalloc.integrations.lm_eval  # noqa: F401 (registers the model)

    own, sys.argv = sys.argv, ["lm_eval", *arguments]  # the only way in that it has
    try:
        cli_evaluate()
    except UsageError:
        raise
    except (ValueError, OSError, ImportError) as error:  # an unknown task, no data, no package
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"lm-eval: {lines[0]}") from error
    except TypeError as error:  # of another model than ours
        if "unexpected keyword argument" not in str(error):
            raise
        raise UsageError(
            f"lm-eval: {error} (budget, arm and the like are for --model reasonalloc)"
        ) from error
    except KeyboardInterrupt:  # typer would leave without a word
        output.note("interrupted; lm-eval writes results at the end only (see its --use_cache)")
        raise typer.Exit(130) from None
    except SystemExit as error:
        if error.code:
            raise typer.Exit(error.code if isinstance(error.code, int) else 1) from None
    finally:
        sys.argv = own
