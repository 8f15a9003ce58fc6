"""Measure a model once with its full cache: one call for every objective."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from reasonalloc.calibrated.objectives import (
    CalibrationConfig,
    check_target,
    without_effect,
)
from reasonalloc.calibration.jobs import Calibrated, OnProgress, prepare
from reasonalloc.errors import UsageError
from reasonalloc.texts import (
    check_several,
    check_tokenizer,
    load_kinds,
    load_prompts,
)


def calibrate(
    model: Any,
    tokenizer: Any,
    texts: Any,
    *,
    objective: str = "attention-mass",
    out: str | os.PathLike[str] | None = None,
    progress: OnProgress | bool | None = None,
    tell: Callable[[str], None] | None = None,
    **options: Any,
) -> Calibrated:
    """Measure a model once with its full cache.

    Args:
        model: a decoder-only transformers model, not attached to anything.
        tokenizer: of the model.
        texts: from no test set; the path of a JSON-lines file, or a list. For ``attention-mass``
            and ``statistics`` prompts: texts, conversations, or token ids [1, n]. For ``kl`` and
            ``fisher`` texts with completions: ``Trajectory`` objects, or objects as in the file
            (``reasonalloc calibrate --help``); with ``generate=N`` prompts are completed.
            Texts get their end of turn by the chat template.
        objective: ``attention-mass`` (a demand profile), ``statistics``, or what holding a head to
            a budget costs: ``fisher`` (estimated from gradients) or ``kl`` (exact, slow).
        out: file to write; it is replaced once everything is measured.
        progress: called with finished and all steps; None, True: a bar of tqdm; False: nothing.
        tell: called with what the measurement will take and what to know of the texts; None: it is
            printed on stderr.
        options: of the objective, see ``CalibrationConfig``.

    Returns:
        What was measured, with ``save(path)`` and ``show()``. Of several policies the one with the
        least KL in the check is kept.

    Raises:
        UsageError: a wrong argument, unreadable texts, or a file that cannot be written.
        UnsupportedError: a model that cannot run under a budget.
    """
    for name in without_effect(objective):
        if name in options:
            raise UsageError(f"{name} has no effect with objective={objective!r}: leave it out")
    if progress not in (None, True, False) and not callable(progress):
        raise UsageError(f"progress={progress!r} must be True, False, None or a function")
    watch: OnProgress = progress if callable(progress) else lambda done, total: None
    if tell is not None and not callable(tell):
        raise UsageError(f"tell={tell!r} must be a function of a text, or None")
    check_tokenizer(tokenizer)
    check_several(texts)
    target = None if out is None else check_target(out, objective, texts)
    tell = _print if tell is None else tell
    job = prepare(model, tokenizer, texts, CalibrationConfig(objective, **options), tell=tell)
    if announced := job.announce():
        tell(announced)
    with _bar() if progress in (None, True) else contextlib.nullcontext(watch) as advance:
        measured = job.run(advance)
    if measured.note:
        tell(measured.note)
    if target is not None:
        measured.calibrated.save(target)
    return measured.calibrated


def check_texts(path: str, config: CalibrationConfig, name: str = "texts") -> None:
    """Refuse a file of texts, before a model is loaded, as far as it can be read without one.

    Raises:
        UsageError: it cannot be read; says where.
    """
    if config.chosen.reads_texts:
        load_kinds(path, name)
    else:
        load_prompts(path, config.count, name)


def _print(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


@contextlib.contextmanager
def _bar() -> Iterator[OnProgress]:
    from tqdm.auto import tqdm

    with tqdm(desc="Calibrating") as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance
