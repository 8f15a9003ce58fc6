"""The commands; their modules load torch only when they run, so that ``--help`` is quick."""

from __future__ import annotations

from typing import Annotated, Any

import typer
import typer.core

from reasonalloc.cli import (
    bench,
    calibrate,
    demo,
    doctor,
    eval,
    fidelity,
    lm_eval,
    ls,
    models,
    plan,
    profile,
    profiles,
    report,
    run,
    serve,
)
from reasonalloc.version import __version__


class _Group(typer.core.TyperGroup):
    """Ctrl-C ends a command with a message: newer versions of typer would end it in silence."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Abort from None


app = typer.Typer(
    cls=_Group,
    name="reasonalloc",
    help="Keep the KV cache of reasoning language models inside a fixed budget while decoding.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"reasonalloc {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Keep the KV cache of reasoning language models inside a fixed budget while decoding."""


app.command("run")(run.command)
app.command("plan")(plan.command)
app.command(
    "serve",
    cls=serve.Command,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(serve.command)
app.command("calibrate")(calibrate.command)
app.command("eval")(eval.command)
app.add_typer(profile.app, name="profile")
app.command("models")(models.command)
app.command("profiles")(profiles.command)
app.command("fidelity")(fidelity.command)
app.command("report")(report.command)
app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(lm_eval.command)
app.command("bench")(bench.command)
app.command("ls")(ls.command)
app.command("doctor")(doctor.command)
app.command("demo")(demo.command)
