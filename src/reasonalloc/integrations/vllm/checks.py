"""What an engine under a budget cannot do yet, refused before anything is loaded."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any

from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.integrations.vllm.kernels import check_coded
from reasonalloc.integrations.vllm.pages import CODED

if TYPE_CHECKING:
    from reasonalloc.config import CompressionConfig
    from reasonalloc.integrations.vllm.budget import EngineBudget

#: Releases that the patches and the kernels were tested with: at least, and below.
VERSIONS = ((0, 32), (0, 34))
_CPU_BLOCK, _BLOCK = 32, 16  # tokens; vLLM's own 128 on a CPU would waste much of a small budget
_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


def check_version(version: str) -> None:
    """Refuse a vLLM that was not tested.

    Raises:
        UnsupportedError: names the tested range.
    """
    low, high = (".".join(map(str, v)) for v in VERSIONS)
    try:
        installed = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        installed = (0, 0)
    if not VERSIONS[0] <= installed < VERSIONS[1]:
        raise UnsupportedError(
            f"vLLM {version} was not tested with ReasonAlloc: install vllm>={low},<{high}"
        )


def default_block_size() -> int:
    """Tokens of a block where a user gives none."""
    from vllm.platforms import current_platform

    return _CPU_BLOCK if current_platform.is_cpu() else _BLOCK


def prepare(args: Any) -> None:
    """Set what a user left open in vLLM's ``EngineArgs`` to what works under a budget.

    Raises:
        UnsupportedError: something else was asked for.
    """
    from vllm import envs
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if envs.VLLM_USE_V2_MODEL_RUNNER and not HAS_TRITON:
        raise UnsupportedError(f"{_RUNNER}=1 needs Triton, which is not there: set {_RUNNER}=0")
    if args.block_size is None and current_platform.is_cpu():
        args.block_size = _CPU_BLOCK


def prepare_caching(cache: Any, asked: bool | None, plan: EngineBudget | None) -> None:
    """Turn prefix caching off where it cannot go with prompts that are evicted from.

    Args:
        cache: vLLM's ``CacheConfig``.
        asked: what the user said of it; None: nothing.
        plan: the budget.

    Raises:
        UsageError: it was asked for.
    """
    if plan is None or plan.config.prompt == "pin" or plan.observed is not None:
        return
    if asked:
        raise UsageError(
            "enable_prefix_caching=True (--enable-prefix-caching) cannot be used with policy="
            f"{plan.config.arm.policy!r} and prompts that are evicted from: it looks at the "
            "attention in which a prompt is computed, and what is cached is not computed again; "
            "pin prompts (prompt='pin', --prompt pin), or leave the flag out"
        )
    cache.enable_prefix_caching = False


def check_engine(config: Any) -> None:
    """Refuse features of vLLM that do not go together with a budget.

    Args:
        config: vLLM's ``VllmConfig``.

    Raises:
        UnsupportedError, UsageError: names the flag and the remedy.
    """
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    def refuse(flag: str, why: str) -> UnsupportedError:
        return UnsupportedError(f"{flag} cannot be used with a KV budget yet: {why}")

    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        raise UnsupportedError(
            "KV budgets in vLLM run on NVIDIA GPUs and on its CPU backend, and this is "
            f"{current_platform.device_name}: use transformers there (reasonalloc.attach)"
        )
    if current_platform.is_cuda() and not HAS_TRITON:
        raise UnsupportedError("KV budgets in vLLM need Triton on a GPU: pip install triton")
    parallel, cache = config.parallel_config, config.cache_config
    if config.speculative_config is not None:
        raise refuse("--speculative-config", "rejected tokens cannot be taken back; leave it out")
    if cache.kv_offloading_size is not None:
        raise refuse("--kv-offloading-size", "blocks do not hold what others expect; leave it out")
    if config.kv_transfer_config is not None:
        raise refuse("--kv-transfer-config", "blocks do not hold what others expect; leave it out")
    v1_on_cpu = current_platform.is_cpu() and not config.use_v2_model_runner
    if parallel.pipeline_parallel_size > 1 and v1_on_cpu:
        raise refuse(
            "--pipeline-parallel-size",
            "vLLM's V1 model runner has no stages on a CPU; use --tensor-parallel-size",
        )
    if parallel.decode_context_parallel_size > 1:
        raise refuse("--decode-context-parallel-size", "use --tensor-parallel-size")
    if getattr(parallel, "use_ubatching", False):
        flag = "--enable-dbo" if parallel.enable_dbo else "--ubatch-size"
        raise refuse(flag, "leave it out")
    own = str(config.model_config.dtype).removeprefix("torch.")
    if cache.cache_dtype not in ("auto", own, *CODED):
        use = ", ".join(("auto", own, *CODED[:-1]))
        raise refuse(f"--kv-cache-dtype {cache.cache_dtype}", f"use {use} or {CODED[-1]}")
    if cache.cache_dtype == "auto" and asks_for_fp8(config.model_config.hf_config):
        raise UnsupportedError(
            f"{config.model_config.model} asks for a KV cache in fp8, and vLLM learns that too "
            f"late for a KV budget: give --kv-cache-dtype fp8, or {own} for the model's own type"
        )
    if cache.cache_dtype in CODED and v1_on_cpu:
        check_coded(config.model_config.get_head_size(), cache.block_size or _CPU_BLOCK)
    if cache.kv_cache_dtype_skip_layers:
        raise refuse("--kv-cache-dtype-skip-layers", "all layers share one pool; leave it out")
    if config.model_config.is_mm_prefix_lm:
        raise UnsupportedError(
            f"{config.model_config.model} cannot run under a KV budget in vLLM with images, whose "
            "tokens see each other: serve text alone (--language-model-only)"
        )
    if config.model_config.disable_sliding_window:
        raise refuse("--disable-sliding-window", "give --max-model-len instead")
    if cache.kv_sharing_fast_prefill:
        raise refuse("--kv-sharing-fast-prefill", "leave it out")
    if config.model_config.runner_type != "generate":
        raise refuse(f"--runner {config.model_config.runner_type}", "only generation has a cache")


def check_size(settings: CompressionConfig, stored: str) -> None:
    """Refuse a budget in bytes where it is not known how many tokens they are.

    Args:
        settings: of the budget.
        stored: vLLM's name of the cache's format.

    Raises:
        UnsupportedError: says what to do.
    """
    if settings.size is not None and stored in CODED:
        raise UnsupportedError(
            f"budget={settings.size.text!r} counts bytes of the model's own type and cannot be "
            f"used with --kv-cache-dtype {stored} yet: give it in tokens"
        )


def check_bits(plan: EngineBudget, stored: str, able: bool) -> None:
    """Refuse fewer bits where nothing reads them.

    Args:
        plan: keeps older tokens in fewer bits.
        stored: vLLM's name of the cache's format.
        able: our own attention can be had.

    Raises:
        UnsupportedError: says what to do.
    """
    if stored in CODED:
        raise UnsupportedError(
            f"--kv-cache-dtype {stored} cannot be used with {plan.bits} in vLLM: tokens would be "
            "kept in fewer bits twice; leave one of them out"
        )
    if not able:
        raise UnsupportedError(
            f"{plan.bits} needs our own attention in vLLM on a processor, which could not be "
            "compiled: install g++ (or name a compiler in the environment variable CXX)"
        )


def check_blocks(plan: EngineBudget, block_size: int) -> None:
    """Refuse blocks in which a processor cannot read fewer bits.

    Args:
        plan: keeps older tokens in fewer bits.
        block_size: tokens of a block.

    Raises:
        UnsupportedError: says what to do.
    """
    if block_size < _CPU_BLOCK or block_size & (block_size - 1):
        raise UnsupportedError(
            f"block_size={block_size}: {plan.bits} needs a power of two from {_CPU_BLOCK} on in "
            f"vLLM on a processor: give --block-size {_CPU_BLOCK}"
        )


def asks_for_fp8(hf_config: Any) -> bool:
    """Whether a checkpoint says itself that its KV cache is coded (compressed-tensors does)."""
    quantised = getattr(hf_config, "quantization_config", None) or {}
    if not isinstance(quantised, dict):
        quantised = quantised.to_dict()
    return quantised.get("kv_cache_scheme") is not None


def check_windows(config: Any) -> None:
    """Refuse an engine in which a model's layers with sliding windows are none.

    Args:
        config: vLLM's ``VllmConfig``, of a model with such layers.

    Raises:
        UnsupportedError: names the flag.
    """
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise UnsupportedError(
            "--disable-hybrid-kv-cache-manager cannot be used with a KV budget and a model with "
            "sliding-window layers: they would keep every token; leave it out"
        )


def check_prompt(tokens: int, reserve: Any, blocks: int, last: int) -> str | None:
    """What to say of a prompt that the whole pool cannot hold, else None.

    Args:
        tokens: of the prompt.
        reserve: ``layout.Reserve`` of the engine.
        blocks: of the pool, the null block left out.
        last: most tokens of a sequence.
    """
    last = max(last, tokens)

    def most(prompt: int) -> int:
        needed: int = reserve.peak(prompt, last) + reserve.windows.peak(prompt, last)
        return needed

    if (needed := most(tokens)) <= blocks:
        return None
    pinned = " is pinned," if reserve.pin else ""
    fits = bisect_right(range(1, tokens), blocks, key=most)
    shorten = f"shorten it to {fits} tokens, or " if fits else ""
    return (
        f"the prompt has {tokens} tokens,{pinned} and takes {needed} blocks with its answer, but "
        f"the whole KV cache has {blocks}: {shorten}give the engine more KV cache memory"
    )
