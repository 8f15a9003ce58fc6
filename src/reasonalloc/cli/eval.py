"""``reasonalloc eval``: arms on a benchmark, resumable, on one device or many."""

from __future__ import annotations

from typing import cast

import typer

from reasonalloc.cli import eval_options as e
from reasonalloc.cli import options as o
from reasonalloc.cli import output


def command(
    task: e.TaskName,
    out: e.Out,
    model: o.ModelArgument = None,
    model_option: o.ModelOption = None,
    dtype: o.Dtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    arms: e.Arms = "full,rkv",
    budgets: e.Budgets = "1024",
    data: e.Data = None,
    limit: e.Limit = None,
    protocol: e.ProtocolName = "paper",
    samples: e.Samples = None,
    max_new_tokens: e.MaxNewTokens = None,
    temperature: e.Temperature = None,
    top_p: e.TopP = None,
    top_k: e.TopK = None,
    seed: e.Seed = 0,
    interval: o.Interval = 128,
    window: o.Window = 8,
    n_sink: o.Sinks = 0,
    protect_prompt: o.ProtectPrompt = False,
    profile: e.Profiles = None,
    attention: e.Attention = "auto",
    step: e.StepKind = "eager",
    batch_size: e.BatchSize = 8,
    engine: e.Engine = "transformers",
    device: o.Device = "auto",
    device_map: e.DeviceMap = None,
    tp_plan: e.TpPlan = None,
    workers: e.Workers = 1,
    ray_address: e.RayAddress = None,
    as_json: o.Json = False,
) -> None:
    """Accuracy of arms on a benchmark. Started again, it goes on where it was.

    Protocols: paper (temperature 0.6, top-p 0.95, 8 samples, 16384 tokens), greedy (1 sample, 16384
    tokens) and quick (greedy, 1 sample, 1024 tokens).
    """
    name = o.pick_model(model, model_option)
    from reasonalloc.cli.watch import Watcher
    from reasonalloc.config import Step
    from reasonalloc.evaluation.evaluate import evaluate
    from reasonalloc.evaluation.evaluation_result import LEGEND, Interrupted
    from reasonalloc.evaluation.sharded import first_rank
    from reasonalloc.tables import show

    watcher = Watcher()
    try:
        result = evaluate(
            name,
            task,
            arms=arms,
            budgets=o.parse_budgets(budgets),
            out=out,
            data=data,
            limit=limit,
            protocol=protocol,
            samples=samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            profile=profile,
            interval=interval,
            window=window,
            n_sink=n_sink,
            protect_prompt=protect_prompt,
            attention=attention,
            step=cast("Step", step),
            batch_size=batch_size,
            engine=engine,
            dtype=dtype,
            device=device,
            device_map=device_map,
            tp_plan=tp_plan,
            trust_remote_code=trust_remote_code,
            workers=workers,
            ray_address=ray_address,
            progress=watcher,
        )
    except Interrupted:  # the watcher said it
        raise typer.Exit(130) from None
    if not first_rank():  # it helped the first process of a torchrun
        return
    if as_json:
        problems = len(result.problems)
        output.print_json({"task": task, "problems": problems, "results": result.summary})
    else:
        show(result.tables(), notes=[LEGEND])
    for note in result.never_compressed():
        watcher.note(note)
