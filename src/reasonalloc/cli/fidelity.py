"""``reasonalloc fidelity``: arms against the full cache on known texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from reasonalloc.cli import eval_options as e
from reasonalloc.cli import options as o
from reasonalloc.cli import output
from reasonalloc.config import CompressionConfig, preset_name
from reasonalloc.errors import UsageError

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
    shared = {
        "interval": interval,
        "window": window,
        "n_sink": n_sink,
        "protect_prompt": protect_prompt,
    }
    jobs = _jobs(budgets, arms, profile or [], {**shared, "attention": attention})
    from reasonalloc.cli.prompts import complete_texts
    from reasonalloc.evaluation.fidelity import check_text
    from reasonalloc.integrations.hf import attach_config
    from reasonalloc.loading import load_model
    from reasonalloc.texts import load_trajectories

    with output.stderr().status("Loading the model"):
        loaded, tokenizer = load_model(name, dtype, device, trust_remote_code=trust_remote_code)
    for job in jobs:  # a wrong arm is refused before anything runs
        with attach_config(loaded, job):
            pass
    trajectories = load_trajectories(texts, tokenizer)
    for trajectory in trajectories:
        check_text(loaded, trajectory)
    trajectories = complete_texts(loaded, trajectories, generate, f"trajectories={texts!r}")
    rows = _run(loaded, trajectories, jobs, name, {**shared, "attention": attention}, out)
    from reasonalloc.evaluation.fidelity_summary import summarise

    summary = summarise(rows, trajectories, [(str(c.arm), c.budget) for c in jobs], tokenizer)
    if as_json:
        output.print_json({"model": name, "trajectories": len(trajectories), "results": summary})
    else:
        _show(summary, len(trajectories), interval)


def _jobs(
    budgets: str, arms: str, paths: list[str], shared: dict[str, Any]
) -> list[CompressionConfig]:
    from reasonalloc.cli.eval_files import as_settings, choose_files
    from reasonalloc.evaluation.batch import FULL, Job, Settings

    sizes = dict.fromkeys(o.parse_budgets(budgets))
    names = o.read_arms(arms)
    if FULL in names:
        raise UsageError("arm 'full' is what all arms are compared with: leave it out")
    o.check_decoding("eager", shared["attention"])
    settings = Settings(**as_settings(choose_files(names, paths)), **shared)
    return [settings.config(Job(name, size)) for size in sizes for name in names]


def _digest(config: CompressionConfig) -> str | None:
    """Fingerprint of the files that an arm reads: another content is another arm."""
    from reasonalloc.planning.files import files_read

    return o.files_digest(files_read(config))


def _run(
    model: Any,
    trajectories: list[Any],
    jobs: list[CompressionConfig],
    name: str,
    settings: dict[str, Any],
    out: str | None,
) -> list[dict[str, Any]]:
    """Everything that is not in the result file yet; all rows, old and new."""
    from dataclasses import asdict

    from reasonalloc.calibrated.demand import config_hash
    from reasonalloc.evaluation.fidelity import fidelity, full_logits
    from reasonalloc.evaluation.records import ResultFile
    from reasonalloc.planning.shapes import text_config

    manifest = {
        "model": name,
        "config_hash": config_hash(text_config(model).to_dict()),
        "dtype": str(model.dtype),
        **settings,
    }
    file = (
        None
        if out is None
        else ResultFile(
            Path(out).expanduser(),
            manifest,
            free=("attention",),  # results depend on it by rounding alone
        )
    )
    rows: list[dict[str, Any]] = [] if file is None else list(file.rows)
    digests = {str(config.arm): _digest(config) for config in jobs}
    # A row whose arm read files of another content stays in the file and is not looked at.
    rows = [row for row in rows if row["files"] == digests.get(row["arm"], row["files"])]
    done = {(row["trajectory"], row["arm"], row["budget"]) for row in rows}
    total, finished = len(trajectories) * len(jobs), 0
    with output.progress("Replaying") as tell:
        for trajectory in trajectories:
            left = [c for c in jobs if (trajectory.key, str(c.arm), c.budget) not in done]
            finished += len(jobs) - len(left)
            if not left:
                continue
            tell(finished, total)
            full = full_logits(model, trajectory)
            for config in left:
                found = fidelity(model, trajectory, full, config)
                row = {"trajectory": trajectory.key, "arm": str(config.arm)}
                row |= {"budget": config.budget, **asdict(found)}
                done.add((trajectory.key, str(config.arm), config.budget))
                row["files"] = digests[str(config.arm)]
                rows.append(row)
                if file is not None:
                    file.add(row)
                finished += 1
                tell(finished, total)
    return rows


def _show(summary: list[dict[str, Any]], texts: int, interval: int) -> None:
    rows = []
    for item in summary:
        low, high = item["kl_interval"]
        ratio = item["kl_ratio_to_first"]
        rows.append(
            (
                str(item["budget"]),
                preset_name(item["arm"]),
                f"{item['kl']:.4f}",
                f"{low:.4f}-{high:.4f}",
                f"{ratio['value']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})",
                f"{item['top1']:.3f}",
                f"{item['added_nll']:+.3f}",
            )
        )
    titles = ("budget", "arm", "KL", "95 %", "ratio", "top-1", "NLL")
    columns = [(title, title != "arm") for title in titles]
    heading = f"Per token, {texts} trajectories, compressed every {interval} tokens"
    console = output.stdout()
    console.print(output.grid(columns, rows, heading))
    for item in summary:
        if not item["compressions"]:
            arm = preset_name(item["arm"])
            console.print(f"{arm} at budget {item['budget']}: never compressed, texts fit.")
    console.print(
        "KL(full || compressed) in nats; ratio: of the first arm's KL, paired; NLL: added. "
        "Intervals: 95 %, bootstrap over trajectories"
        + (", which says little with so few." if texts < 10 else ".")
    )
