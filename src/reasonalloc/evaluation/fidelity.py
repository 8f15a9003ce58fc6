"""How far arms move a model's predictions on known texts, from Python: ``fidelity``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from reasonalloc.config import Arm, CompressionConfig, PinOverflow, Prompt
from reasonalloc.errors import UsageError
from reasonalloc.evaluation.arm_files import (
    File,
    arm_digest,
    as_settings,
    choose_files,
    list_files,
    tell_shipped,
)
from reasonalloc.evaluation.arms import check_decoding, list_budgets, read_arms
from reasonalloc.evaluation.batch import FULL, Job, Settings
from reasonalloc.evaluation.chunks import ModelSpec
from reasonalloc.evaluation.completions import complete_missing, tell_no_end, turn_ends
from reasonalloc.evaluation.facts import weights_hash
from reasonalloc.evaluation.fidelity_result import FidelityResult
from reasonalloc.evaluation.kv_share import kv_sizes
from reasonalloc.evaluation.loaded import architecture, find_model
from reasonalloc.evaluation.progress import Observer, make_observer
from reasonalloc.evaluation.records import ResultFile
from reasonalloc.evaluation.replay import full_logits, measure_fidelity
from reasonalloc.files import as_path, lock
from reasonalloc.integrations.hf import attach_config
from reasonalloc.integrations.hf.replay import check_text
from reasonalloc.loading import load_model
from reasonalloc.planning.memory import MemoryPlan
from reasonalloc.texts import Trajectory, as_trajectory, check_several, load_trajectories
from reasonalloc.whole import whole_number


def fidelity(
    model: Any,
    texts: File | Iterable[Any],
    *,
    arms: str | Arm | Iterable[str | Arm] = ("rkv", "streaming_llm", "random"),
    budgets: int | str | Iterable[int | str] = (128,),
    tokenizer: Any = None,
    out: File | None = None,
    profile: File | Sequence[File] | None = None,
    interval: int = 128,
    window: int = 8,
    n_sink: int = 0,
    prompt: Prompt = "evict",
    pin_limit: int | None = None,
    pin_overflow: PinOverflow = "refuse",
    protect_prompt: bool = False,
    kv_dtype: str = "auto",
    attention: str = "auto",
    generate: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Observer | bool | None = None,
) -> FidelityResult:
    """Compare arms with the full cache by exact replay, as ``reasonalloc fidelity`` does.

    Args:
        model: hub name, folder or ``.gguf`` file; or a loaded transformers model, which must not
            be attached to anything.
        texts: JSON lines with ``prompt_ids``, ``prompt`` or ``messages``, and ``completion_ids``,
            ``completion`` or an answer that ends ``messages``; texts get their end of turn by the
            chat template. Or a list of such objects, or of ``texts.Trajectory``.
        arms: presets, ``"policy/layers/heads"`` or ``Arm`` objects; texts may hold several,
            separated by commas. Ratios are to the first.
        budgets: mean tokens kept per layer and KV head, or bytes of a sequence (``"64MiB"``,
            ``"25%@8192"``), each arm at each; texts may hold several, separated by commas.
        tokenizer: of a loaded model; not needed for trajectories, but without it there is no
            ``kl_by_kind``.
        out: a file for the results as JSON lines. The same call, or the command, goes on with it.
        profile: calibrated files for the arms that read one, of different kinds.
        interval: generated tokens between two compressions.
        window: most recent tokens that are always kept.
        n_sink: first tokens that are always kept.
        prompt: ``evict``: it competes; ``protect``: it stays, inside the budget; ``pin``: it stays
            on top of the budget.
        pin_limit, pin_overflow: longest prompt that is pinned; what happens to longer ones.
        protect_prompt: another name of ``prompt="protect"``.
        kv_dtype: older keys and values in fewer bits, see ``CompressionConfig``.
        attention: backend, see ``CompressionConfig``.
        generate: complete prompts by so many tokens with the full cache, greedily; the end of a
            turn is kept.
        dtype, device, trust_remote_code: how a model is loaded by its name.
        progress: None or True: a bar of tqdm; False: nothing; or an ``Observer``.

    Returns:
        KL divergence (nats), top-1 agreement and added NLL (nats) per predicted token, the last
        also at end-of-turn tokens, with ``summary``, ``table()``, ``to_pandas()`` and ``plot()``.

    Raises:
        UsageError: anything that cannot be run, before it runs; names the field and a remedy.
        UnsupportedError: a model that cannot work under a budget.
    """
    check_several(texts)
    observer = make_observer(progress)
    shared: dict[str, Any] = {
        "interval": interval,
        "window": window,
        "n_sink": n_sink,
        "attention": attention,
    }
    storage: dict[str, Any] = {
        "prompt": prompt,
        "pin_limit": pin_limit,
        "pin_overflow": pin_overflow,
        "protect_prompt": protect_prompt,
        "kv_dtype": kv_dtype,
    }
    options = ModelSpec("", dtype, device, trust_remote_code)
    source, loaded = find_model(model, tokenizer, options)
    names, sizes = _compressing(arms, attention), list_budgets(budgets)
    files = choose_files(names, list_files(profile), partial(architecture, source, loaded))
    tell_shipped(files, observer.note)
    settings = Settings(**as_settings(files), **shared, **storage)
    configs = [settings.config(Job(name, size)) for size in sizes for name in names]
    generate = None if generate is None else whole_number("generate", generate, 2)
    with observer.busy("Loading the model"):
        network, words = loaded or load_model(
            source.name, dtype, device, trust_remote_code=trust_remote_code
        )
    plans = []
    for config in configs:  # a wrong arm is refused before anything runs
        with attach_config(network, config) as attached:
            plans.append(attached.plan())
    trajectories = _load_texts(network, words, texts, generate, observer)
    ends = turn_ends(network, words)
    tell_no_end(trajectories, ends, observer.note)
    manifest = {
        "model": source.name,
        "config_hash": architecture(source, (network, words)),
        "dtype": str(network.dtype),
        "weights_hash": weights_hash(network),
        **shared,
        **settings.in_manifest,
    }
    held = _sizes(configs, plans, trajectories)
    results = _Results(out, manifest, configs, held)
    with closing(results), observer.counted("Replaying") as tell:
        _replay(network, trajectories, configs, results, tell)
    jobs = tuple((str(config.arm), config.given_budget) for config in configs)
    return FidelityResult(
        source.name, tuple(trajectories), jobs, interval, tuple(results.rows), words, ends
    )


def _compressing(arms: Any, attention: str) -> list[str]:
    """The names of the arms, if all of them can be replayed."""
    names = read_arms(arms)
    if FULL in names:
        raise UsageError("arm 'full' is what all arms are compared with: leave it out")
    check_decoding("eager", attention)
    return names


def _load_texts(
    model: Any,
    tokenizer: Any,
    texts: File | Iterable[Any],
    generate: int | None,
    observer: Observer,
) -> list[Trajectory]:
    """Texts with their completions.

    Raises:
        UsageError: none, one that cannot be read, or one that does not suit the model.
    """
    if isinstance(texts, str | os.PathLike):
        name = f"trajectories={os.fspath(texts)!r}"
        if tokenizer is None:
            raise UsageError(f"{name} needs the model's tokenizer: add tokenizer=")
        trajectories = load_trajectories(os.fspath(texts), tokenizer)
    else:
        name = "texts"
        trajectories = [_as_trajectory(i, text, tokenizer) for i, text in enumerate(texts)]
    if not trajectories:
        raise UsageError("texts is empty: give at least one trajectory")
    for trajectory in trajectories:
        check_text(model, trajectory)
    with observer.busy("Generating completions"):
        return complete_missing(model, trajectories, generate, name, observer.note)


def _as_trajectory(index: int, text: Any, tokenizer: Any) -> Trajectory:
    if tokenizer is None and not isinstance(text, Trajectory):
        raise UsageError(f"texts, number {index}, needs the model's tokenizer: add tokenizer=")
    return as_trajectory(text, tokenizer, f"texts, number {index}")[0]


#: A measurement: fingerprint of the text, arm, budget.
_Key = tuple[str, str, int | str]


def _sizes(
    configs: Sequence[CompressionConfig],
    plans: Sequence[MemoryPlan],
    trajectories: Sequence[Trajectory],
) -> dict[_Key, dict[str, Any]]:
    """What every row says of its KV bytes, also rows of older versions."""
    found = {}
    for config, plan in zip(configs, plans, strict=True):
        for text in trajectories:
            whole = replace(plan, pinned=config.pinned(len(text.prompt_ids)))
            tokens = len(text.prompt_ids) + len(text.completion_ids) - 1  # the last is never fed
            found[text.key, str(config.arm), config.given_budget] = kv_sizes(whole, tokens)
    return found


class _Results:
    """Rows of this run and of earlier ones with the same settings, in a file if one was named."""

    def __init__(
        self,
        out: File | None,
        manifest: dict[str, Any],
        configs: list[CompressionConfig],
        sizes: dict[_Key, dict[str, Any]],
    ) -> None:
        self._file, self._sizes = None, sizes
        self._lock: int | None = None
        if out is not None:
            path = as_path("out", out)
            free = ("attention",)  # results depend on it by rounding alone
            # Files of older versions do not say which weights.
            old_files = {"weights_hash": manifest["weights_hash"]}
            self._lock = _locked(path)
            try:
                self._file = ResultFile(path, manifest, free=free, absent=old_files)
                if not os.path.samestat(os.fstat(self._lock), path.stat()):  # written anew
                    before, self._lock = self._lock, _locked(path)
                    os.close(before)
            except BaseException:
                self.close()
                raise
        # Another content of a file under the same name is another arm.
        self._digests = {str(c.arm): arm_digest(c) for c in configs}
        old = [] if self._file is None else self._file.rows
        # A row whose arm read files of another content stays in the file and is not looked at.
        own = [r for r in old if r["files"] == self._digests.get(r["arm"], r["files"])]
        self._done = {_key(row) for row in own}
        self.rows = [row | sizes.get(_key(row), {}) for row in own]

    def close(self) -> None:
        """Let other runs use the file."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def has(self, trajectory: Trajectory, config: CompressionConfig) -> bool:
        """Whether a measurement is there."""
        return (trajectory.key, str(config.arm), config.given_budget) in self._done

    def add(
        self, trajectory: Trajectory, config: CompressionConfig, values: dict[str, Any]
    ) -> None:
        """Add a measurement."""
        arm = str(config.arm)
        row: dict[str, Any] = {"trajectory": trajectory.key, "arm": arm}
        row |= {"budget": config.given_budget}
        row |= values | self._sizes[_key(row)] | {"files": self._digests[arm]}
        self.rows.append(row)
        self._done.add(_key(row))
        if self._file is not None:
            self._file.add(row)


def _locked(path: Path) -> int:
    try:
        return lock(
            path,
            f"out={str(path)!r} is being written by another run: wait for it, or give another file",
        )
    except OSError as error:
        raise UsageError(f"out={str(path)!r} cannot be used: {error.strerror}") from None


def _key(row: dict[str, Any]) -> _Key:
    return row["trajectory"], row["arm"], row["budget"]


def _replay(
    model: Any,
    trajectories: Sequence[Trajectory],
    configs: Sequence[CompressionConfig],
    results: _Results,
    tell: Callable[[int, int], None],
) -> None:
    """Measure everything that is not there yet."""
    total, finished = len(trajectories) * len(configs), 0
    for trajectory in trajectories:
        left = [config for config in configs if not results.has(trajectory, config)]
        finished += len(configs) - len(left)
        if not left:
            continue
        tell(finished, total)
        full = full_logits(model, trajectory)
        for config in left:
            measured = measure_fidelity(model, trajectory, full, config)
            results.add(trajectory, config, asdict(measured))
            finished += 1
            tell(finished, total)
