"""What a budget does to a request, computed from its token counts; nothing is reported back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from reasonalloc.integrations.vllm.budget import EngineBudget
from reasonalloc.integrations.vllm.layout import Layout
from reasonalloc.tables import Table, human


@dataclass(frozen=True)
class Account:
    """One request, when it is finished.

    An *entry* is one token of one KV head of a layer under the budget; those of all ranks and
    stages count.

    Attributes:
        kept: entries that are in the cache at the end.
        evicted: entries that were in the cache and are not any more.
        compressions: boundaries at which some layer was compressed.
        held_bytes: of its blocks at the end, all ranks together.
        full_bytes: of the blocks that it would hold without a budget.
    """

    kept: int
    evicted: int
    compressions: int
    held_bytes: int
    full_bytes: int


@dataclass(frozen=True)
class Accounting:
    """Sizes of an engine under a budget.

    Attributes:
        plan: the budget.
        block_size: tokens of a block.
        itemsize: bytes of one number of the cache.
    """

    plan: EngineBudget
    block_size: int
    itemsize: int

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """One per process."""
        return self.plan.layouts(self.block_size)

    @property
    def block_bytes(self) -> int:
        """Keys and values of one block, all heads of all ranks.

        A block holds tokens of all layers; where some have sliding windows, of as many layers as
        vLLM has in a group.
        """
        shape = self.plan.shapes[0]  # of all layers
        numbers = self.plan.groups.layers * 2 * shape.kv_heads * shape.head_dim
        return numbers * self.block_size * self.itemsize

    @property
    def rank_bytes(self) -> int:
        """Of a block, what the process (the GPU) holds that holds most layers of it."""
        layers, bytes_ = self.plan.groups.layers, self.block_bytes // self.plan.ranks
        most = max(b - a for a, b in self.plan.stages or ((0, layers),))
        return bytes_ * most // layers

    @property
    def blocks(self) -> int:
        """Blocks of a sequence from its first compression on, its windows full."""
        reserve = self.layouts[0].reserve
        return reserve.blocks + reserve.windows.decode(1 << 30)

    def peak(self, start: int, last: int) -> int:
        """Most blocks of a sequence with a prefill of ``start`` tokens and ``last`` in all."""
        reserve = self.layouts[0].reserve
        return reserve.peak(start, last) + reserve.windows.peak(start, last)

    def plain(self, tokens: int) -> int:
        """Blocks of a sequence of ``tokens`` tokens without a budget."""
        reserve = self.layouts[0].reserve
        return -(-tokens // self.block_size) + reserve.windows.held(tokens)

    def fits(self, memory: int, last: int) -> int:
        """Sequences with prompts inside the budget that a process's KV memory holds at their peak.

        Args:
            memory: bytes for the KV cache of one process (of one GPU).
            last: most tokens of a sequence.
        """
        pool = memory // self.rank_bytes - 1  # vLLM keeps a null block
        return max(pool, 0) // self.peak(1, last)

    def account(self, prompt: int, generated: int) -> Account:
        """What became of a request.

        Args:
            prompt: its tokens.
            generated: its tokens; the last one was never fed and is not in the cache.
        """
        tokens = prompt + max(generated, 1) - 1
        reserve = self.layouts[0].reserve
        kept = sum(
            layout.held(layer, prompt, tokens)
            for layout in self.layouts
            for layer in range(len(layout.totals))
        )
        compressed = tokens >= reserve.first_event(prompt)
        plain = held = self.plain(tokens)
        if compressed:
            held = reserve.held(prompt) + reserve.windows.held(tokens)
        return Account(
            kept=kept,
            evicted=self.plan.kv_heads * len(self.plan.totals) * tokens - kept,
            compressions=reserve.compressions(prompt, tokens),
            held_bytes=held * self.block_bytes,
            full_bytes=plain * self.block_bytes,
        )


def accounting_table(sizes: Accounting, last: int, memory: int | None) -> Table:
    """Return the blocks and the bytes of a sequence, beside those without a budget.

    Args:
        sizes: of the engine.
        last: most tokens of a sequence.
        memory: bytes for the KV cache of one GPU, to say how many sequences fit; or None.
    """
    config, per_gpu = sizes.plan.config, sizes.rank_bytes
    blocks, plain = sizes.peak(1, last), sizes.plain(last)
    rows = [
        ("arm", f"{config.arm}, budget {config.budget}, interval {config.interval}"),
        (
            "a sequence, its prompt besides" if sizes.layouts[0].reserve.pin else "a sequence",
            f"{blocks} blocks of {sizes.block_size} tokens, {human(blocks * per_gpu)}",
        ),
        (f"  without a budget, {last} tokens", f"{plain} blocks, {human(plain * per_gpu)}"),
    ]
    if memory is not None:
        pool = max(memory // per_gpu - 1, 0)
        rows.append(
            (
                f"sequences in {human(memory)}",
                f"{sizes.fits(memory, last)}, without a budget {pool // plain} of that length",
            )
        )
    title = f"KV cache of {sizes.plan.name}"
    return Table(title + (", of each GPU" if len(sizes.layouts) > 1 else ""), [], rows)
