"""KL of transformers' quantised caches, which evict nothing, from the full cache.

    python benchmarks/fidelity/quantised_caches.py MODEL test.jsonl --out quantised.jsonl \\
        [--caches hqq4-axis1,quanto4,fp8] [--piece 128]

A cache is ``hqq`` or ``quanto`` with the bits, on transformers' axes (``hqq4``) or on another one
(``hqq4-axis1``); ``fp8``; or ``kv-`` and a ``kv_dtype`` of this library with nothing evicted
(``kv-int8:int4``). A run goes on where the file ends. ``compare_bytes.py`` makes the tables.

Needs ``hqq`` and ``optimum-quanto`` for those backends.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import QuantizedCache

from reasonalloc.config import Arm, CompressionConfig
from reasonalloc.evaluation.records import ResultFile
from reasonalloc.evaluation.replay import divergence, full_logits, measure_fidelity
from reasonalloc.loading import load_model
from reasonalloc.planning.memory import row_bytes
from reasonalloc.planning.shapes import layer_shapes, text_config
from reasonalloc.texts import Trajectory, load_trajectories

CACHES = "hqq4-axis1,quanto4,fp8,hqq4"
INTERVAL, WINDOW = 64, 8
WIDE = 2  # bytes of a number that is not coded: the tables count 16 bits


def make_cache(name: str, config: Any) -> Any:
    """Return an empty cache; what the name does not say is transformers' default.

    Raises:
        SystemExit: no such cache.
    """
    if name == "fp8":
        return QuantizedCache("fp8", config)
    found = re.fullmatch(r"(hqq|quanto)(\d)(?:-axis(-?\d))?", name)
    if not found:
        raise SystemExit(f"--caches: no cache is called {name!r}")
    backend, bits, axis = found.groups()
    options = {} if axis is None else {"axis_key": int(axis), "axis_value": int(axis)}
    return QuantizedCache(backend, config, nbits=int(bits), **options)


def stored(held: Any) -> Iterator[Tensor]:
    """All plain tensors of quantised states: codes, scales and offsets."""
    if isinstance(held, dict):
        held = tuple(held.values())
    if isinstance(held, tuple):
        for part in held:
            yield from stored(part)
    elif hasattr(held, "__tensor_flatten__"):  # a subclass that is made of other tensors
        for name in held.__tensor_flatten__()[0]:
            yield from stored(getattr(held, name))
    elif isinstance(held, Tensor):
        yield held


def count_bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes with 16 bits for every number that is wider."""
    return sum(
        t.numel() * (min(t.itemsize, WIDE) if t.is_floating_point() else t.itemsize)
        for t in tensors
    )


def measure_quantised(
    model: Any, text: Trajectory, full: Tensor, name: str, piece: int
) -> dict[str, Any]:
    """Feed a text through a quantised cache; return KL per token and bytes at the end.

    A layer codes its residual when that reaches ``residual_length``, and what is fed sees the
    residual and itself in full precision. So pieces that divide this length give what token by
    token decoding gives.

    Args:
        model: not attached to anything.
        text: its prompt is fed at once, as generation does.
        full: log probabilities of the full cache for all completion tokens but the first.
        name: see ``make_cache``.
        piece: tokens that are fed at once.
    """
    cache = make_cache(name, model.config)
    residual = getattr(cache.layers[0], "residual_length", 0)
    if residual % piece:
        raise SystemExit(f"--piece {piece} does not divide the residual length {residual}")
    fed = torch.tensor([text.completion_ids[:-1]], device=model.device)
    prompt = torch.tensor([text.prompt_ids], device=model.device)
    model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    kl = []
    for start in range(0, fed.shape[1], piece):
        logits = model(fed[:, start : start + piece], past_key_values=cache).logits[0]
        kl.append(divergence(full[start : start + piece], logits.float().log_softmax(-1)))
    coded = plain = 0
    for layer in cache.layers:
        coded += count_bytes(stored((layer._quantized_keys, layer._quantized_values)))
        # fp8 keeps no residual: its ``keys`` stay empty
        plain += count_bytes(stored((layer.keys, layer.values)))
    length = cache.get_seq_length()
    left = cache.layers[0].keys.shape[-2] if plain else 0
    return {
        "kl": torch.cat(kl).tolist(),
        "kv_bytes": coded + plain,
        "coded_bytes": coded,  # of the tokens that are coded
        "coded": length - left,
        "period": residual or 1,  # tokens between two codings
        "uncoded": 0,  # newest tokens that a coding leaves
        "prompt_coded": True,
    }


def measure_own(model: Any, text: Trajectory, full: list[Tensor], kv_dtype: str) -> dict[str, Any]:
    """The same of this library's formats, with a budget that evicts nothing.

    Bytes are those of the tokens that are held; the room for the rest of the budget is left out.
    """
    length = len(text.prompt_ids) + len(text.completion_ids)
    config = CompressionConfig(
        length + INTERVAL,
        arm=Arm("rkv", "uniform", "uniform"),
        interval=INTERVAL,
        window=WINDOW,
        kv_dtype=kv_dtype,
    )
    measured = measure_fidelity(model, text, full, config)
    shapes = layer_shapes(text_config(model), "the model")
    token = sum(shape.kv_heads * row_bytes(shape, kv_dtype, WIDE) for shape in shapes)
    wide = sum(shape.full_bytes(1, 1, WIDE) for shape in shapes)
    coded = length - 1 - WINDOW - (len(text.completion_ids) - 1) % INTERVAL
    return {
        "kl": measured.kl,
        "kv_bytes": coded * token + (length - 1 - coded) * wide,
        "coded_bytes": coded * token,
        "coded": coded,
        "period": INTERVAL,
        "uncoded": WINDOW,
        "prompt_coded": False,
    }


@torch.inference_mode()
def main() -> None:
    """Measure what the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("texts")
    parser.add_argument("--caches", default=CACHES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--piece", type=int, default=128)
    parser.add_argument("--every", type=int, default=1, help="each so-manieth text alone")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, "float32", "cpu")
    texts = load_trajectories(args.texts, tokenizer)[:: args.every]
    wide = sum(s.full_bytes(1, 1, WIDE) for s in layer_shapes(text_config(model), args.model))
    manifest = {"model": args.model, "dtype": str(model.dtype), "token_bytes": wide}
    results = ResultFile(args.out, manifest)
    done = {(row["trajectory"], row["cache"]) for row in results.rows}
    for number, text in enumerate(texts):
        left = [c for c in args.caches.split(",") if (text.key, c) not in done]
        if not left:
            continue
        full = full_logits(model, text)
        true = torch.cat(full).float().log_softmax(-1)
        for name in left:
            began = time.process_time()
            if name.startswith("kv-"):
                values = measure_own(model, text, full, name.removeprefix("kv-"))
            else:
                values = measure_quantised(model, text, true, name, args.piece)
            took = time.process_time() - began
            row = {"trajectory": text.key, "cache": name, "prompt": len(text.prompt_ids)}
            results.add(row | values)
            mean = sum(values["kl"]) / len(values["kl"])
            print(f"{number} {name}: {mean:.4f}, {took:.0f} s of processor", flush=True)


if __name__ == "__main__":
    main()
