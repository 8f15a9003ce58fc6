"""``reasonalloc fidelity``: arms against the full cache on known texts."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from reasonalloc.cli import eval_options as e
from reasonalloc.cli import options as o
from reasonalloc.cli import output

Texts = Annotated[
    str,
    typer.Option(
        "--trajectories",
        metavar="FILE",
        help="JSON lines: prompt_ids, prompt or messages; completion_ids or completion.",
    ),
]
Budgets = Annotated[str, typer.Option("--budgets", help="Budgets, separated by commas.")]
Arms = Annotated[
    str,
    typer.Option("--arms", help="Arms, separated by commas; ratios are to the first."),
]
Generate = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--generate", help="Complete prompts by so many tokens: full cache, in batches.", min=2
    ),
]
Out = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--out", metavar="FILE", help="Results as JSON lines; a second run goes on."),
]


def command(
    texts: Texts,
    model: o.ModelArgument = None,
    model_option: o.ModelOption = None,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    budgets: Budgets = "128",
    arms: Arms = "rkv,streaming_llm,random",
    interval: o.Interval = 128,
    window: o.Window = 8,
    n_sink: o.Sinks = 0,
    protect_prompt: o.ProtectPrompt = False,
    profile: e.Profiles = None,
    attention: o.Attention = "auto",
    generate: Generate = None,
    out: Out = None,
    as_json: o.Json = False,
) -> None:
    """KL divergence, top-1 agreement and added NLL of arms, by exact replay of known texts."""
    name = o.pick_model(model, model_option)
    from reasonalloc.cli.watch import Shown
    from reasonalloc.evaluation import fidelity

    result = fidelity.fidelity(
        name,
        texts,
        arms=arms,
        budgets=o.parse_budgets(budgets),
        out=out,
        profile=profile,
        interval=interval,
        window=window,
        n_sink=n_sink,
        protect_prompt=protect_prompt,
        attention=attention,
        generate=generate,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=Shown(),
    )
    if as_json:
        count = len(result.texts)
        output.print_json({"model": name, "trajectories": count, "results": result.summary})
    else:
        result.show()
