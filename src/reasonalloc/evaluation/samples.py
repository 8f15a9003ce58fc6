"""Reading what ``reasonalloc eval`` wrote: samples of one or several folders, grouped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reasonalloc.errors import UsageError
from reasonalloc.evaluation.endings import went_on
from reasonalloc.evaluation.kv_share import SIZES

SAMPLES, EVENTS = "samples.jsonl", "events.jsonl"
# What may differ between folders whose samples still answer the same question; versions and
# devices change a sample by rounding at most, but it is said when they differ.
_SAID = ("version", "torch", "transformers", "math_verify", "device")
_NO_PROTOCOL = frozenset(("samples", "profiles", "arm_files", "code", "decoding", *_SAID))


def decoding(step: str, attention: str) -> str:
    """How samples under a budget were decoded, as manifests say it."""
    return f"step={step}, attention={attention}"


#: Of manifests that do not say it.
OLD_DECODING = {decoding("eager", "auto"): "an older version"}
_WHOLE = [
    "sample",
    "prompt_tokens",
    "completion_tokens",
    "compressions",
    "kv_bytes",
    "full_kv_bytes",
    "batch",
]


@dataclass(frozen=True)
class Sample:
    """One graded completion, without its texts: those stay in the file.

    Attributes:
        arm, budget: what ran; ``budget`` is in tokens, the text of one in bytes, or None for the
            full cache.
        problem, sample: text that names the problem; number of the sample.
        correct: whether the answer is right.
        finish: ``stop``, or ``length`` if the cap on new tokens ended it.
        prompt_tokens, completion_tokens, compressions: counts.
        kv_bytes, full_kv_bytes: per sequence; of the full cache at the same length.
        batch, seconds: sequences in its batch and wall time of that batch.
        peak_bytes: most device memory, or None where nothing measures it.
        budget_tokens, compressed_kv_bytes, full_16bit_kv_bytes: see ``kv_sizes``; None in samples
            of older versions.
        went_on: whether it went on after its answer, see ``endings.went_on``.
        file, offset: where its line starts, in bytes.
    """

    arm: str
    budget: int | str | None
    problem: str
    sample: int
    correct: bool
    finish: str
    prompt_tokens: int
    completion_tokens: int
    compressions: int
    kv_bytes: int
    full_kv_bytes: int
    batch: int
    seconds: float
    peak_bytes: int | None
    file: Path = field(compare=False)
    offset: int = field(compare=False)
    budget_tokens: float | None = None
    compressed_kv_bytes: int | None = None
    full_16bit_kv_bytes: int | None = None
    went_on: bool = False

    @property
    def cut(self) -> bool:
        """Whether the cap on new tokens ended it."""
        return self.finish == "length"

    def row(self) -> dict[str, Any]:
        """The whole line again, texts included."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            row: dict[str, Any] = json.loads(file.readline())
        return row


@dataclass(frozen=True)
class Group:
    """Samples that may be compared: one model, one task, one protocol.

    Attributes:
        model, task: names.
        protocol: the other settings of the manifests that shape a sample.
        manifests: one per folder.
        folders: where the samples are from.
        samples: in the order of the files, none twice.
        notices: sentences on what was left out.
    """

    model: str
    task: str
    protocol: dict[str, Any]
    manifests: tuple[dict[str, Any], ...]
    folders: tuple[Path, ...]
    samples: tuple[Sample, ...]
    notices: tuple[str, ...]


def load_groups(folders: Sequence[str]) -> list[Group]:
    """Read folders; what must not be mixed is kept apart.

    Raises:
        UsageError: a folder without samples, or a file that is broken other than by a kill.
    """
    parts_by_key: dict[str, list[tuple[Path, dict[str, Any], list[Sample], bool]]] = {}
    titles: dict[str, tuple[str, str, dict[str, Any]]] = {}
    paths = {Path(name).expanduser().resolve(): name for name in reversed(folders)}
    read = [(Path(n).expanduser(), *_read(n, Path(n).expanduser())) for n in paths.values()]
    contents: dict[tuple[str, str], set[str]] = {}
    for _, manifest, _, _ in read:
        for arm, content in _arm_files(manifest).items():
            contents.setdefault((_model(manifest), arm), set()).add(content)
    for folder, manifest, tasks, cut in reversed(read):
        model = _model(manifest)
        rest = {k: v for k, v in manifest.items() if k not in _NO_PROTOCOL}
        protocol = {k: v for k, v in rest.items() if k not in ("model", "task")}
        # An arm that read another file is another arm.
        files = _arm_files(manifest)
        if any(len(seen) > 1 for (name, _), seen in contents.items() if name == model):
            protocol["arm_files"] = {a: f for a, f in files.items() if len(contents[model, a]) > 1}
        for task, samples in tasks.items():
            key = json.dumps([model, task, protocol], sort_keys=True)
            titles[key] = (model, task, protocol)
            parts_by_key.setdefault(key, []).append((folder, manifest, samples, cut))
    return [_group(*titles[key], parts) for key, parts in parts_by_key.items()]


def _model(manifest: dict[str, Any]) -> str:
    return str(manifest.get("model", "unknown model"))


def _arm_files(manifest: dict[str, Any]) -> dict[str, str]:
    """Fingerprints of the calibrated files that arms read."""
    files = manifest.get("arm_files")
    return files if isinstance(files, dict) else {}


def _group(
    model: str,
    task: str,
    protocol: dict[str, Any],
    parts: list[tuple[Path, dict[str, Any], list[Sample], bool]],
) -> Group:
    kept: dict[tuple[Any, ...], Sample] = {}
    twice = 0
    for _, _, samples, _ in parts:
        for sample in samples:
            key = (sample.arm, sample.budget, sample.problem, sample.sample)
            twice += key in kept
            kept.setdefault(key, sample)
    notices = []
    if twice:
        notices.append(f"{twice} samples are there twice; the first of each is used")
    if cut := [str(folder) for folder, _, _, broken in parts if broken]:
        notices.append(f"the last line of {', '.join(cut)} was cut off by a kill and is left out")
    for name in _SAID:
        if len(values := {str(part[1].get(name)) for part in parts}) > 1:
            notices.append(f"the folders differ in {name}: {', '.join(sorted(values))}")
    if len({code for part in parts for code in part[1].get("code", ())}) > 1:
        notices.append("the code changed between samples (see code in the settings)")
    if len({way for part in parts for way in part[1].get("decoding", OLD_DECODING)}) > 1:
        notices.append(
            "steps or attention changed between samples (see decoding in the settings): do not "
            "compare their speed"
        )
    return Group(
        model=model,
        task=task,
        protocol=protocol,
        manifests=tuple(part[1] for part in parts),
        folders=tuple(part[0] for part in parts),
        samples=tuple(kept.values()),
        notices=tuple(notices),
    )


def _read(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, list[Sample]], bool]:
    """Manifest, samples by task, and whether the last line was cut off."""
    if not folder.is_dir():
        raise UsageError(f"{name!r} is no folder: give a folder that 'reasonalloc eval' wrote")
    path = folder / SAMPLES
    if not path.is_file():
        raise UsageError(
            f"{name!r} has no {SAMPLES}: give a folder that 'reasonalloc eval' wrote (--out)"
        )
    tasks: dict[str, list[Sample]] = {}
    manifest: dict[str, Any] | None = None
    cut = False
    for number, offset, line in _lines(path):
        if not line.endswith(b"\n"):
            cut = True
            break
        try:
            row = json.loads(line)
            if manifest is None:
                manifest = row["manifest"]
                if not isinstance(manifest, dict):
                    raise TypeError("manifest is no object")
                continue
            task, sample = _sample(row, path, offset)
        except KeyError as error:
            raise UsageError(f"{str(path)!r}, line {number}: {error} is missing") from None
        except (ValueError, TypeError) as error:
            raise UsageError(f"{str(path)!r}, line {number} is broken: {error}") from None
        tasks.setdefault(task, []).append(sample)
    if manifest is None or not tasks:
        raise UsageError(f"{str(path)!r} holds no samples yet: run 'reasonalloc eval' to the end")
    return manifest, tasks, cut


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, byte offset and bytes of every line, one at a time: files may be gigabytes."""
    offset = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield number, offset, line
                offset += len(line)
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error.strerror}") from None


def _sample(row: Any, path: Path, offset: int) -> tuple[str, Sample]:
    if not isinstance(row, dict):
        raise TypeError("it is no object")
    for name in _WHOLE:
        if type(row[name]) is not int or row[name] < 0:
            raise TypeError(f"{name}={row[name]!r} must be a whole number >= 0")
    for name in ("budget", "peak_bytes", "compressed_kv_bytes", "full_16bit_kv_bytes"):
        value = row[name] if name in ("budget", "peak_bytes") else row.get(name)
        text = name == "budget" and isinstance(value, str)  # in bytes
        if value is not None and type(value) is not int and not text:
            raise TypeError(f"{name}={value!r} must be a whole number or null")
    if not isinstance(row.get("budget_tokens"), int | float | None):
        raise TypeError(f"budget_tokens={row['budget_tokens']!r} must be a number or null")
    if not isinstance(row["correct"], bool):
        raise TypeError(f"correct={row['correct']!r} must be true or false")
    if not isinstance(row["seconds"], int | float) or row["batch"] < 1:
        raise TypeError(f"seconds={row['seconds']!r}, batch={row['batch']!r} give no speed")
    return str(row["task"]), Sample(
        arm=str(row["arm"]),
        budget=row["budget"],
        problem=str(row["problem"]),
        sample=row["sample"],
        correct=row["correct"],
        finish=str(row["finish"]),
        prompt_tokens=row["prompt_tokens"],
        completion_tokens=row["completion_tokens"],
        compressions=row["compressions"],
        kv_bytes=row["kv_bytes"],
        full_kv_bytes=row["full_kv_bytes"],
        batch=row["batch"],
        seconds=float(row["seconds"]),
        peak_bytes=row["peak_bytes"],
        file=path,
        offset=offset,
        went_on=went_on(row.get("completion"), row["completion_tokens"]),
        **{name: row.get(name) for name in SIZES},
    )


def load_events(folder: Path) -> Iterator[dict[str, Any]]:
    """Head budgets over time, if the folder has any; lines that are no events are skipped.

    The file is an aid to the page, written beside the samples: a damaged one costs a picture only.
    """
    path = folder / EVENTS
    if not path.is_file():
        return
    for _, _, line in _lines(path):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("budgets"), list):
            yield row
