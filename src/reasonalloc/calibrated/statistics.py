"""Calibrated statistics: a safetensors file, validated on load and bound to its model."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from reasonalloc.calibrated.demand import check_fingerprint
from reasonalloc.calibrated.reading import check_texts, check_version
from reasonalloc.errors import UsageError
from reasonalloc.files import replacing
from reasonalloc.rotary import Rope
from reasonalloc.tables import Shown, Table

SCHEMA_VERSION = 1
_HEADER = "reasonalloc.statistics"
_TEXTS = ("model_id", "config_hash", "no_queries")
_REMEDY = "make it with 'reasonalloc calibrate --objective statistics'"


@dataclass(frozen=True, eq=False)
class Statistics(Shown):
    """What the full cache's attention looks like, layer by layer (docs/method.md, "Offline").

    Layer-wise numbers are means over samples (window attention at every so many generated tokens)
    and then over prompts.

    Attributes:
        model_id: name of the model, for messages.
        config_hash: the model's fingerprint (``calibrated.demand.config_hash``).
        steps: generated tokens per prompt, at most.
        window: queries per sample.
        prompt_hashes: SHA-256 of each calibration prompt.
        layers: indices of the layers that are under a budget.
        entropy: [layers] float64, of the window's attention to earlier keys, in nats, summed over
            queries and query heads.
        variance: [layers] float64, over the window's queries, summed over keys and query heads.
        tops: rising numbers of tokens per (layer, query head).
        top_share: [tops, layers] float64, how much of the ``top`` highest attentions per layer and
            head, pooled over all layers, each layer holds; rows sum to 1.
        rope: the model's rotary embedding, or None if queries cannot be averaged under it.
        query_mean: [layers, query_heads, features] complex64, mean of the queries before rotation;
            None without ``rope``.
        query_norm: [layers, query_heads, features] float32, mean of their absolute values.
        no_queries: why there are no query statistics, or "".
    """

    model_id: str
    config_hash: str
    steps: int
    window: int
    prompt_hashes: list[str]
    layers: list[int]
    entropy: Tensor
    variance: Tensor
    tops: list[int]
    top_share: Tensor
    rope: Rope | None = None
    query_mean: Tensor | None = None
    query_norm: Tensor | None = None
    no_queries: str = ""
    kind: ClassVar[str] = "statistics"

    def shard(self, rank: int, size: int) -> Statistics:
        """Statistics with the queries of part ``rank`` of ``size`` equal parts of the heads."""
        queries = {
            name: each.unflatten(1, (size, -1))[:, rank]
            for name in ("query_mean", "query_norm")
            if (each := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **queries)

    def summary(self) -> dict[str, Any]:
        """Return the numbers per layer as plain JSON values."""
        return {
            "layers": self.layers,
            "entropy": self.entropy.tolist(),
            "variance": self.variance.tolist(),
            "top_share": dict(zip(map(str, self.tops), self.top_share.tolist(), strict=True)),
            "no_queries": self.no_queries or None,
        }

    def tables(self) -> list[Table]:
        """Return a row per layer."""
        middle = len(self.tops) // 2
        names = ("layer", "entropy", "variance", f"share of the top {self.tops[middle]}")
        numbers = zip(
            self.layers,
            self.entropy.tolist(),
            self.variance.tolist(),
            self.top_share[middle].tolist(),
            strict=True,
        )
        rows = [
            (str(layer), f"{entropy:.4g}", f"{variance:.3g}", f"{share:.1%}")
            for layer, entropy, variance, share in numbers
        ]
        title = f"Window attention of each layer, {len(self.prompt_hashes)} prompts"
        return [Table(title, [(name, True) for name in names], rows)]

    def notes(self) -> list[str]:
        """Return why there are no query statistics, if there are none."""
        return [f"For cake and dynamickv alone: {self.no_queries}"] if self.no_queries else []

    def check_model(self, model_id: str, fingerprint: str, layers: int) -> None:
        """Refuse the statistics of another model.

        Raises:
            UsageError: the layer count or the configuration's fingerprint differs.
        """
        if len(self.layers) != layers:
            raise UsageError(
                f"statistics: made for {self.model_id!r} with {len(self.layers)} layers, but "
                f"{model_id!r} has {layers} compressible layers: calibrate this model"
            )
        check_fingerprint("statistics", self.model_id, self.config_hash, model_id, fingerprint)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, replacing ``path`` only once everything is written."""
        header = {
            "version": SCHEMA_VERSION,
            "model_id": self.model_id,
            "config_hash": self.config_hash,
            "steps": self.steps,
            "window": self.window,
            "prompt_hashes": self.prompt_hashes,
            "layers": self.layers,
            "tops": self.tops,
            "no_queries": self.no_queries,
            "rope": None,
        }
        tensors = {"entropy": self.entropy, "variance": self.variance, "top_share": self.top_share}
        if self.rope is not None and self.query_mean is not None and self.query_norm is not None:
            header["rope"] = {"scaling": self.rope.scaling, "head_dim": self.rope.head_dim}
            tensors["rope_frequencies"] = torch.tensor(
                self.rope.frequencies, dtype=torch.float64, device="cpu"
            )
            tensors["query_mean_real"] = self.query_mean.real.contiguous()
            tensors["query_mean_imag"] = self.query_mean.imag.contiguous()
            tensors["query_norm"] = self.query_norm
        with replacing(Path(path)) as partial:
            partial.write_bytes(save(tensors, metadata={_HEADER: json.dumps(header)}))


def load_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Read and validate a statistics file.

    Raises:
        UsageError: the file is missing, is of another kind or breaks the schema; says what.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"statistics {str(path)!r} cannot be read: {reason}") from None
    except SafetensorError:
        raise UsageError(
            f"{str(path)!r} is no safetensors file with statistics: {_REMEDY}"
        ) from None
    if text is None:
        raise UsageError(f"{str(path)!r} holds tensors, but no statistics: {_REMEDY}")
    try:
        return _validated(json.loads(text), tensors)
    except UsageError as error:
        raise UsageError(f"statistics {str(path)!r} are broken: {error}; calibrate again") from None
    except ValueError as error:
        raise UsageError(
            f"statistics {str(path)!r} are broken: the header is not valid JSON: {error}; "
            "calibrate again"
        ) from None


def _validated(header: Any, tensors: dict[str, Tensor]) -> Statistics:
    if not isinstance(header, dict):
        raise UsageError("the header must be an object")
    check_version(header, SCHEMA_VERSION)
    check_texts(header, _TEXTS)
    for name in ("steps", "window"):
        if not _counts([header.get(name)], 1):
            raise UsageError(f"{name}={header.get(name)!r} must be a positive whole number")
    for name, least in (("layers", 0), ("tops", 1)):
        if not _counts(header.get(name), least):
            raise UsageError(f"{name} must be a rising list of whole numbers")
    hashes = header.get("prompt_hashes")
    if not isinstance(hashes, list) or not hashes or not all(isinstance(h, str) for h in hashes):
        raise UsageError("prompt_hashes must be a list of text")
    layers, tops = len(header["layers"]), len(header["tops"])
    shares = _tensor(tensors, "top_share", (tops, layers))
    if bool((shares.sum(dim=1) - 1).abs().max() > 1e-6):
        raise UsageError("top_share: rows must sum to 1")
    rope, mean, norm = _queries(header.get("rope"), tensors, layers)
    return Statistics(
        model_id=header["model_id"],
        config_hash=header["config_hash"],
        steps=header["steps"],
        window=header["window"],
        prompt_hashes=hashes,
        layers=header["layers"],
        entropy=_tensor(tensors, "entropy", (layers,)),
        variance=_tensor(tensors, "variance", (layers,)),
        tops=header["tops"],
        top_share=shares,
        rope=rope,
        query_mean=mean,
        query_norm=norm,
        no_queries=header["no_queries"],
    )


def _counts(values: Any, least: int) -> bool:
    """Return whether values are a strictly rising list of whole numbers, at least ``least``."""
    if not isinstance(values, list) or not values or not all(type(v) is int for v in values):
        return False
    return values[0] >= least and all(a < b for a, b in itertools.pairwise(values))


def _queries(
    rope: Any, tensors: dict[str, Tensor], layers: int
) -> tuple[Rope | None, Tensor | None, Tensor | None]:
    if rope is None:
        return None, None, None
    if not isinstance(rope, dict) or not _counts([rope.get("head_dim")], 1):
        raise UsageError("rope must name head_dim, a positive whole number")
    if not isinstance(rope.get("scaling"), float) or not rope["scaling"] > 0:
        raise UsageError(f"rope scaling={rope.get('scaling')!r} must be a positive number")
    frequencies = _tensor(tensors, "rope_frequencies", (-1,))
    rotary = Rope(tuple(frequencies.tolist()), rope["scaling"], rope["head_dim"])
    if not 0 < 2 * rotary.pairs <= rotary.head_dim:
        raise UsageError(f"rope_frequencies: {rotary.pairs} pairs in {rotary.head_dim} dimensions")
    shape = (layers, -1, rotary.features)
    norm = _tensor(tensors, "query_norm", shape)
    shape = (layers, norm.shape[1], rotary.features)
    real, imaginary = (_tensor(tensors, f"query_mean_{p}", shape, False) for p in ("real", "imag"))
    return rotary, torch.complex(real.float(), imaginary.float()), norm.float()


def _tensor(
    tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], positive: bool = True
) -> Tensor:
    """Return a finite tensor of this shape (-1: any size), not negative if ``positive``."""
    if name not in tensors:
        raise UsageError(f"missing {name}")
    tensor = tensors[name]
    expected = tuple(t if s == -1 else s for s, t in zip(shape, tensor.shape, strict=False))
    if tensor.dim() != len(shape) or tuple(tensor.shape) != expected:
        raise UsageError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
        raise UsageError(f"{name} must hold finite numbers")
    if positive and bool((tensor < 0).any()):
        raise UsageError(f"{name} must not be negative")
    return tensor
