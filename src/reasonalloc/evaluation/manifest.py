"""What all samples of a folder share, as its first line says it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from reasonalloc.evaluation.arm_files import fingerprints
from reasonalloc.evaluation.chunks import Facts
from reasonalloc.evaluation.samples import decoding
from reasonalloc.evaluation.spec import EvaluationSpec
from reasonalloc.version import __version__


def manifest(spec: EvaluationSpec, facts: Facts) -> dict[str, Any]:
    """Return what must stay the same when a run goes on. Arms, budgets and samples may grow."""
    settings = spec.settings
    shared = {
        "kind": "eval",
        "task": spec.task,
        "data_hash": spec.problems.hash,
        "model": spec.model.name,
        "config_hash": facts.config_hash,
        "weights_hash": facts.weights_hash,
        "template_hash": facts.template_hash,
        "dtype": facts.dtype,
        "device": facts.device,
        "protocol": spec.protocol,
        **asdict(spec.rules.sampling),
        "samples": spec.rules.samples,
        "max_new_tokens": spec.rules.max_new_tokens,
        "seed": settings.seed,
        "interval": settings.interval,
        "window": settings.window,
        "n_sink": settings.n_sink,
        **settings.in_manifest,
        "profiles": spec.files,
        "arm_files": fingerprints(spec.jobs, settings),
        "version": __version__,
        "code": {code_hash(): __version__},
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    return shared | _of_engine(spec)


def _of_engine(spec: EvaluationSpec) -> dict[str, Any]:
    """What depends on the engine, on the processes and on the task."""
    more: dict[str, Any] = {}
    if spec.model.engine == "vllm":
        from reasonalloc.integrations.vllm.patches import version as vllm_version

        more |= {"engine": "vllm", "vllm": vllm_version()}
    else:  # samples depend on it by rounding alone
        more["decoding"] = {decoding(spec.settings.step, spec.settings.attention): __version__}
    if spec.model.tp_plan is not None:  # heads trade tokens inside a process only
        more["tp_size"] = int(os.environ["WORLD_SIZE"])
    return more | ({"math_verify": version("math-verify")} if spec.kind.needs_math else {})


def code_hash() -> str:
    """Fingerprint of this package's modules: 16 hex digits. Versions change less often."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()} ".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
