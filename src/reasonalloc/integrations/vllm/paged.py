"""Attention on GPUs: our kernels for requests with one token, vLLM's own backend for prompts.

A prompt is computed before its request is compressed for the first time, so its pages are those of
vLLM without a budget, and the backend that vLLM would choose reads them as they are.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheLayout

from reasonalloc.errors import UnsupportedError
from reasonalloc.integrations.vllm import selftest
from reasonalloc.integrations.vllm.budget import EngineBudget
from reasonalloc.integrations.vllm.builder import BudgetBuilder
from reasonalloc.integrations.vllm.metadata import Piece
from reasonalloc.integrations.vllm.pages import CODED
from reasonalloc.integrations.vllm.runs import NO_REQUEST, Batch, dummy_batch
from reasonalloc.integrations.vllm.spec import BudgetSpec, budget_spec
from reasonalloc.integrations.vllm.steps import Step, Steps, cells

# A page of one head must be one piece. Blocks outermost: a block is one row of pages.
_LAYOUTS = (KVCacheLayout.BLHNC, KVCacheLayout.LBHNC)
_OF_ROWS = (
    "seq_lens",
    "block_table_tensor",
    "is_prefilling",
    "seq_lens_cpu_upper_bound",
    "req_idx",
    "encoder_seq_lens",
    "encoder_seq_lens_cpu",
    "dcp_local_seq_lens",
    "dcp_local_seq_lens_cpu_upper_bound",
    "rswa_prefix_lens",
)
_OF_TOKENS = ("slot_mapping", "positions")
_DERIVED = ("_num_computed_tokens_cache", "_token_to_req_indices_cache")


@dataclass(frozen=True)
class PagedMetadata:
    """What a step's attention needs, for all layers.

    Attributes:
        builder: owns the storage.
        step: of our kernels.
        stock: metadata of vLLM's own backend, of the requests with several tokens; None of none.
        prompts: pieces of prompts whose attention the policy is to see.
    """

    builder: PagedBuilder
    step: Step
    stock: Any
    prompts: list[Piece]


class PagedBuilder(BudgetBuilder):
    """Metadata without a table of pages: one copy to the device per step, no answer from it."""

    reorder_batch_threshold: int | None = 1  # requests with one token come first
    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )
    stock: ClassVar[Any]  # vLLM's own backend

    def __init__(
        self,
        kv_cache_spec: BudgetSpec,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._check_bits(True)
        make = self.stock.get_builder_cls()
        self._stock_builder = make(kv_cache_spec, layer_names, vllm_config, device)
        self._steps: Steps | None = None
        self._captured: dict[int, tuple[int, ...]] = {}
        impl, dtype = self._modules[0].impl, vllm_config.model_config.dtype
        self._query = torch.empty(impl.num_heads, impl.head_size, dtype=dtype, device=device)
        if self._plan.policy.needs_queries or self._observes:
            # Before vLLM measures what graphs take: ``leave_room`` counts these.
            self.queries.prepare(vllm_config.scheduler_config.max_num_seqs, self._query)
        if device.type != "cpu":
            group = impl.num_heads // impl.num_kv_heads
            size, fp8 = kv_cache_spec.block_size, self._coded is not None
            bits = self.runs.layout.coding is not None
            selftest.check(device, dtype, impl.head_size, group, size, fp8, bits)

    @property
    def steps(self) -> Steps:
        """The kernels' tensors."""
        if self._steps is None:
            raise RuntimeError("the KV cache is not there yet")
        return self._steps

    def _bind(self) -> None:
        if self.runs.bound:
            return
        impl = self._modules[0].impl
        pages, pool = cells([module.kv_cache for module in self._modules], self._coded)
        scheduler = self.vllm_config.scheduler_config
        self._bind_pages(pages)
        self._steps = Steps(
            self.runs,
            self.queries,
            pool,
            self._query,
            scheduler.max_num_seqs,
            scheduler.max_num_batched_tokens,
            impl.scale,
            impl.logits_soft_cap or 0.0,
            self._bits,
            self.runs.layout.reserve.pinned(self.vllm_config.model_config.max_model_len),
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> PagedMetadata:
        """Metadata of one step."""
        common, batch, self._batch = common_attn_metadata, self._batch, None
        starts = common.query_start_loc_cpu.tolist()
        if batch is None:
            self._due, self._unseen = [], []
            after = common.seq_lens.tolist()  # a warm-up may wait for the device
            new = [b - a for a, b in itertools.pairwise(starts)]
            batch = dummy_batch([n - q for n, q in zip(after, new, strict=False)], after)
        self._bind()
        rows = len(batch.requests)
        starts = starts[: rows + 1]  # others are padding
        tokens, noted, _ = self._wanted(batch, starts)
        # A CUDA graph of single tokens has rows of padding; vLLM gives them a length of 0.
        padded = min(common.num_reqs, common.num_actual_tokens)
        self._blocks = common.block_table_tensor[:rows]
        step = self.steps.next(
            batch.slots,
            batch.before,
            starts,
            (tokens, noted),
            common.block_table_tensor[:padded],
            common.seq_lens[:padded],
        )
        stock = None
        if step.decodes < rows:
            self._check_prompts(batch, step.decodes)
            some = _behind(common, step.decodes, starts)
            stock = self._stock_builder.build(0, some, fast_build)
        else:
            self._check_addresses(step)
        prompts = self._prompts(batch, starts) if self._observes else []
        return PagedMetadata(self, step, stock, prompts)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> PagedMetadata:
        """Metadata of a step that is captured: of requests with one token each, or none."""
        meta = self.build(0, common_attn_metadata)
        step = meta.step
        if step.decodes == step.tokens:
            self._captured[step.decodes] = _addresses(step)
        return meta

    def _check_addresses(self, step: Step) -> None:
        """A graph reads vLLM's tables where they were when it was captured."""
        expected = self._captured.get(step.decodes)
        if expected is not None and expected != _addresses(step):
            raise RuntimeError(
                f"vLLM moved its tables after it captured a CUDA graph of {step.decodes} requests: "
                'start with --compilation-config \'{"cudagraph_mode": "PIECEWISE"}\', and report it'
            )

    def _check_prompts(self, batch: Batch, decodes: int) -> None:
        """Only requests that were never compressed may have several tokens."""
        for request, before in zip(batch.requests[decodes:], batch.before[decodes:], strict=True):
            if request.slot != NO_REQUEST and before >= request.start:
                raise RuntimeError(
                    "a request that decodes came behind prompts, or with many tokens"
                )


def _addresses(step: Step) -> tuple[int, ...]:
    """Where a graph reads what is vLLM's."""
    return step.blocks.data_ptr(), step.blocks.stride(0), step.seq_lens.data_ptr()


def _behind(common: CommonAttentionMetadata, decodes: int, starts: list[int]) -> Any:
    """The metadata of the requests from row ``decodes`` on, as if they were alone.

    Args:
        common: of all requests.
        decodes: those before have one token each.
        starts: [rows + 1], the first token of each request, and the end.
    """
    rows, tokens = len(starts) - 1, starts[-1]
    names = {field.name for field in dataclasses.fields(common)}
    parts = {name: slice(decodes, rows) for name in _OF_ROWS}
    parts |= {name: slice(decodes, tokens) for name in _OF_TOKENS}
    changes: dict[str, Any] = {
        name: getattr(common, name)[part]
        for name, part in parts.items()
        if name in names and getattr(common, name) is not None
    }
    changes |= {name: None for name in _DERIVED if name in names}
    if isinstance(common.causal, Tensor):
        changes["causal"] = common.causal[decodes:rows]
    return common.replace(
        query_start_loc=common.query_start_loc[decodes : rows + 1] - decodes,
        query_start_loc_cpu=common.query_start_loc_cpu[decodes : rows + 1] - decodes,
        num_reqs=rows - decodes,
        num_actual_tokens=tokens - decodes,
        max_query_len=max(b - a for a, b in itertools.pairwise(starts[decodes:])),
        **changes,
    )


class PagedImpl:
    """Attention of one layer; comes before vLLM's own class, which computes prompts."""

    num_heads: int
    head_size: int
    stock: ClassVar[Any]  # vLLM's own backend

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if kv_cache_dtype not in ("auto", "float16", "bfloat16", *CODED):
            raise UnsupportedError(
                f"a KV cache of {kv_cache_dtype} cannot run under a KV budget in vLLM yet: use a "
                f"checkpoint that does not ask for one, or {' or '.join(CODED)}"
            )
        if kv_cache_dtype in CODED and self.stock.get_name() == "FLASH_ATTN":
            raise UnsupportedError(
                f"--kv-cache-dtype {kv_cache_dtype} cannot be used with a KV budget and vLLM's "
                "FLASH_ATTN, which wants queries in fp8 too: give --attention-backend TRITON_ATTN"
            )
        given = (num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window)
        super().__init__(*given, kv_cache_dtype, *args, **kwargs)  # type: ignore[call-arg]
        self.supports_quant_query_input = False

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PagedMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """As vLLM calls it: query [tokens, heads, head_dim], output likewise, filled in place."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantisation under a KV budget")
        if attn_metadata is None:  # a warm-up without attention
            return output.fill_(0)
        meta, builder, step = attn_metadata, attn_metadata.builder, attn_metadata.step
        index = builder.layers[layer.layer_name]
        builder.steps.store(index, query, key, value, step)
        builder.steps.attend(index, query, output, step, builder.sinks(index))
        if meta.stock is not None:
            some = slice(step.decodes, step.tokens)
            super().forward(  # type: ignore[misc]
                layer, query[some], key[some], value[some], kv_cache, meta.stock, output[some]
            )
        for piece in meta.prompts:
            builder.observe(piece, index, query)
        return output

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Output is written as it is."""
        return False

    def fused_rope_kvcache_supported(self) -> bool:
        """Tokens are stored by our own kernel."""
        return False

    fused_qk_norm_rope_kvcache_supported = fused_rope_kvcache_supported
    fused_qk_norm_mrope_kvcache_supported = fused_rope_kvcache_supported


class PagedBackend:
    """Comes before vLLM's own backend."""

    forward_includes_kv_cache_update: bool = True
    plan: ClassVar[EngineBudget]
    stock: ClassVar[Any]
    impl: ClassVar[Any]
    builder: ClassVar[Any]

    @classmethod
    def get_impl_cls(cls) -> Any:
        """The attention of a layer."""
        return cls.impl

    @classmethod
    def get_builder_cls(cls) -> Any:
        """The metadata of a step."""
        return cls.builder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Those in which pages can be shared among layers and heads."""
        theirs = cls.stock.supported_kv_cache_layouts()
        both = tuple(each for each in _LAYOUTS if theirs is None or each in theirs)
        if not both:
            raise UnsupportedError(
                f"vLLM's {cls.stock.get_name()} reads no KV cache whose pages can be shared among "
                "heads: give another --attention-backend"
            )
        return both

    @classmethod
    def customize_spec(cls, spec: Any) -> BudgetSpec:
        """The layer's KV cache with what the scheduler must know of the budget."""
        reserve = cls.plan.layouts(spec.block_size)[0].reserve
        return budget_spec(cls.stock.customize_spec(spec), reserve)


def paged_backend(plan: EngineBudget, stock: Any) -> Any:
    """The backend of a plan where vLLM would choose ``stock``."""
    impl = type("PagedImpl", (PagedImpl, stock.get_impl_cls()), {"stock": stock})
    builder = type("PagedBuilder", (PagedBuilder,), {"stock": stock})
    members = {"plan": plan, "stock": stock, "impl": impl, "builder": builder}
    return type("PagedBackend", (PagedBackend, stock), members)
