"""What a GPU shows before a budget runs on it: toy requests, here and there, with the same result.

Two requests are stored, one is compressed, both decode: with the kernels on the device, from their
second token on as a CUDA graph with a row of padding, and with plain PyTorch on the CPU.
"""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch
import triton
from torch import Tensor
from transformers import LlamaConfig

from reasonalloc.config import CompressionConfig, parse_arm
from reasonalloc.errors import UnsupportedError
from reasonalloc.graphs import capture
from reasonalloc.integrations.vllm.budget import EngineBudget
from reasonalloc.integrations.vllm.compression import Due, PoolCompressor
from reasonalloc.integrations.vllm.pages import Coded
from reasonalloc.integrations.vllm.runs import QueryRows, Runs
from reasonalloc.integrations.vllm.steps import Step, Steps, cells
from reasonalloc.integrations.vllm.views import CodedPool, view_runs
from reasonalloc.planning.shapes import layer_shapes
from reasonalloc.version import __version__

_LAYERS, _HEADS, _WINDOW, _DECODED, _PADDED = 2, 2, 4, 4, 3
_SCALES = ((0.5, 0.25), (0.03, 2.0))  # of keys and values of each layer, if pages hold e4m3
_PROMPTS = (33, 9)  # the first is over its budget
_KINDS = "int8:int4"  # of older tokens, if they are kept in fewer bits
_LIMIT = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
_done: set[tuple[object, ...]] = set()


def check(
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    group: int,
    block_size: int,
    fp8: bool = False,
    bits: bool = False,
) -> None:
    """Compare a device with the CPU; once per process.

    Args:
        device: to be used.
        dtype: of queries, and of pages without ``fp8``.
        dim, group, block_size: head size, query heads per KV head, tokens of a page.
        fp8: pages hold e4m3 numbers.
        bits: older tokens are kept in fewer bits.

    Raises:
        UnsupportedError: they differ; the message is a report.
    """
    key = (device, dtype, dim, group, block_size, fp8, bits)
    if key in _done:
        return
    problems = compare(device, dtype, dim, group, block_size, fp8, bits)
    if problems:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise UnsupportedError(
            f"no KV budget can run on this {name}: its self-test failed ({'; '.join(problems)}). "
            "Please report this line: "
            f"reasonalloc {__version__}, torch {torch.__version__}, triton {triton.__version__}, "
            f"Python {platform.python_version()}, {dtype}, head size {dim}, group {group}, block "
            f"size {block_size}{', fp8 cache' if fp8 else ''}{', fewer bits' if bits else ''}"
        )
    _done.add(key)


@torch.inference_mode()
def compare(
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    group: int,
    block_size: int,
    fp8: bool,
    bits: bool,
) -> list[str]:
    """What a device does otherwise than the CPU; see ``check``."""
    plan = _plan(dim, group, dtype, _KINDS if bits else "auto")
    own, reference = (
        _Side(plan, place, dtype, dim, group, block_size, fp8)
        for place in (device, torch.device("cpu"))
    )
    random = torch.Generator(device="cpu").manual_seed(0)
    problems, before, new = [], [0, 0], list(_PROMPTS)
    for step in range(1 + _DECODED):
        tokens = sum(new)
        query, key, value = (
            torch.randn(tokens, heads, dim, generator=random, dtype=torch.float32, device="cpu")
            for heads in (_HEADS * group, _HEADS, _HEADS)
        )
        # Sizes of keys decide what is kept: none lies close to another.
        sizes = 1 + torch.randperm(tokens * _HEADS, generator=random, device="cpu").float() / 16
        key = torch.nn.functional.normalize(key, dim=-1) * sizes.view(tokens, _HEADS, 1)
        batch = [x.to(dtype) for x in (query, key, value)]
        found = own.by_kernels(before, new, *batch).cpu().float()
        expected = reference.by_hand(before, new, *batch).float()
        before = [a + b for a, b in zip(before, new, strict=True)]
        if step == 0:
            own.compress(before)
            reference.compress(before)
            new = [1, 1]
        worst = float((found - expected).abs().max()) if len(found) else 0.0
        if not worst <= _LIMIT[dtype]:
            problems.append(f"step {step}: attention differs by {worst:.3g}")
        problems += [f"step {step}: {name} differ" for name in own.differences(reference)]
    return problems


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def _plan(dim: int, group: int, dtype: torch.dtype, kinds: str) -> EngineBudget:
    arm = parse_arm("knorm/uniform/adakv")
    model = LlamaConfig(
        hidden_size=_HEADS * group * dim,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS * group,
        num_key_value_heads=_HEADS,
        head_dim=dim,
    )
    if arm is None:
        raise RuntimeError("an arm without a budget")
    config = CompressionConfig(24, arm, interval=8, window=_WINDOW, n_sink=1, kv_dtype=kinds)
    return EngineBudget(config, layer_shapes(model, "toy"), model, "toy", dtype=dtype)


class _Side:
    """The toy requests on one device."""

    def __init__(
        self,
        plan: EngineBudget,
        device: torch.device,
        dtype: torch.dtype,
        dim: int,
        group: int,
        block_size: int,
        fp8: bool,
    ) -> None:
        layout = plan.layouts(block_size)[0]
        width = max(layout.reserve.peak(start, start + _DECODED) for start in _PROMPTS)
        self._runs = Runs(layout, device, 2)
        blocks, self._scaling = 2 * width + 1, dim**-0.5
        shape = (blocks, _LAYERS, _HEADS, block_size, 2 * dim)
        memory = torch.zeros(shape, dtype=torch.uint8 if fp8 else dtype, device=device)
        coded = None
        if fp8:
            table = torch.tensor(_SCALES, dtype=torch.float32, device=device)
            coded = Coded("fp8", _SCALES, table)
        pages, pool = cells(list(memory.unbind(1)), coded)
        self._memory = memory
        self._runs.bind(pages)
        bits = None if layout.coding is None else CodedPool(layout.coding, pages, device)
        self._bits = bits
        self._queries = QueryRows(_LAYERS, _WINDOW)
        query = torch.zeros(_HEADS * group, dim, dtype=dtype, device=device)
        self._queries.prepare(2, query)
        self._compressor = PoolCompressor(
            plan, 0, self._runs, self._queries, self._scaling, None, coded=bits
        )
        order = torch.arange(2 * width, 0, -1, dtype=torch.int32, device="cpu")
        table = torch.zeros(_PADDED, width, dtype=torch.int32, device=device)
        table[:2] = order.view(width, 2).t()
        self._padded, self._blocks = table, table[:2]
        self._lengths = torch.zeros(_PADDED, dtype=torch.int32, device=device)
        self._graph: Callable[[], Tensor] | None = None
        wide = torch.zeros(3, _PADDED, _HEADS * group, dim, dtype=dtype, device=device)
        self._given = wide[0], wide[1, :, :_HEADS], wide[2, :, :_HEADS]
        self._tracked = [self._runs.track(str(i), start, 0) for i, start in enumerate(_PROMPTS)]
        for request in self._tracked:
            self._queries.lend(request)
        most = sum(_PROMPTS)
        self._steps = Steps(
            self._runs, self._queries, pool, query, _PADDED, most, self._scaling, 0.0, bits
        )

    def compress(self, tokens: list[int]) -> None:
        due = zip(self._tracked, tokens, strict=True)
        self._compressor.run([Due(r, row, n) for row, (r, n) in enumerate(due)], self._blocks)
        for request in self._tracked:
            self._queries.lend(request)

    def by_kernels(
        self, before: list[int], new: list[int], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """[tokens, query_heads, dim], of a step in which every request has one token."""
        device = self._runs.device
        query, key, value = (x.to(device) for x in (query, key, value))
        starts, after = [0, new[0], sum(new)], [a + b for a, b in zip(before, new, strict=True)]
        rows = [row for row, n in enumerate(new) for _ in range(n)]
        noted = [int(self._tracked[row].queries or 0) for row in rows]
        # Two tokens of a prompt could go to one place: only the last ones are wanted.
        last = [t for t, row in enumerate(rows) if t >= starts[row + 1] - _WINDOW]
        self._lengths[:2] = torch.tensor(after, dtype=torch.int32, device=device)
        decodes = max(new) == 1
        some = _PADDED if decodes else 2
        step = self._steps.next(
            [request.slot for request in self._tracked],
            before,
            starts,
            (last, [noted[t] for t in last]),
            self._padded[:some],
            self._lengths[:some],
        )
        if not decodes:
            return self._launched(step, query, key, value)[:0]
        for mine, theirs in zip(self._given, (query, key, value), strict=True):
            mine[:2] = theirs
        if self._graph is not None:
            return self._graph()[:2]
        out = self._launched(step, *self._given)[:2].clone()  # also warms up
        if _has_graphs(device):
            self._graph = capture(lambda: self._launched(step, *self._given), device)
        return out

    def _launched(self, step: Step, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[tokens, query_heads, dim], of the last layer."""
        out = torch.zeros_like(query)
        for layer in range(_LAYERS):
            self._steps.store(layer, query, key, value, step)
            self._steps.attend(layer, query, out, step)
        return out

    def by_hand(
        self, before: list[int], new: list[int], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """The same, by plain PyTorch."""
        runs, count = self._runs, torch.tensor(new, dtype=torch.int64, device="cpu")
        rows = torch.arange(2, device="cpu").repeat_interleave(count)
        own = [torch.arange(a, a + n, device="cpu") for a, n in zip(before, new, strict=True)]
        positions = torch.cat(own).int()
        tracked = self._tracked
        slots = torch.tensor([r.slot for r in tracked], dtype=torch.int64, device="cpu")
        places = runs.places(slots[rows], positions, self._blocks, rows)
        rings = [int(r.queries or 0) for r in tracked]
        lent = torch.tensor(rings, dtype=torch.int64, device="cpu")
        after = torch.tensor(before, dtype=torch.int64, device="cpu") + count
        last = (positions >= after[rows] - _WINDOW).nonzero()[:, 0]
        for layer in range(_LAYERS):
            runs.pages.put(places[layer], key, value, layer)
            ring_places = positions[last].long() % _WINDOW
            self._queries.note(layer, query, last, lent[rows[last]], ring_places)
        if max(new) > 1:
            return query[:0]
        numbered = [_LAYERS - 1] * 2
        layers = torch.tensor(numbered, dtype=torch.int64, device="cpu")
        longest = max(request.most(int(n)) for request, n in zip(tracked, after, strict=True))
        tables = (layers, slots, after)
        start = max(request.start for request in tracked)
        view = view_runs(runs, self._bits, numbered, tables, self._blocks, longest, start, True)
        keys, values = (view.numbers(part).float() for part in (0, 1))  # [rows, heads, tokens, dim]
        index = torch.arange(keys.shape[2], device="cpu")
        asked = query.float().unflatten(1, (_HEADS, -1)) * self._scaling
        logits = asked @ keys.transpose(-1, -2)
        hidden = index >= view.lengths[..., None, None]
        weights = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        return (weights @ values.masked_fill(hidden.transpose(-1, -2), 0.0)).flatten(1, 2)

    def differences(self, other: _Side) -> list[str]:
        """What is not the same to the bit, besides the null block."""
        mine, theirs = self._parts(), other._parts()
        return [name for name in mine if not torch.equal(mine[name].cpu(), theirs[name].cpu())]

    def _parts(self) -> dict[str, Tensor]:
        runs, per_block = self._runs, self._runs.layout.reserve.block_size * self._runs.per_block
        ring = [self._queries.ring(layer) for layer in range(_LAYERS)]
        return {
            "run tables": torch.stack([runs.first, runs.shift, runs.kept, runs.coded, runs.begin]),
            "plain pages": runs.plain,
            "keys and values": self._memory[1:].view(torch.uint8),
            "positions": runs.positions[per_block:],
            "queries": torch.stack([each for each in ring if each is not None]),
        }
