"""Decode steps of fixed shape: run as they are, replayed from a CUDA graph, or as a program."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.graphs import capture
from reasonalloc.integrations.hf.cache import BudgetCache
from reasonalloc.integrations.hf.calls import CallCheck, CallEnd
from reasonalloc.integrations.hf.versions import given_cache
from reasonalloc.planning.memory import LayerShape
from reasonalloc.planning.shapes import text_config

# Results that a replay would overwrite while somebody still holds them.
_EXTRA_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


def check_step(step: str, model: Any, shapes: Sequence[LayerShape], parts: int) -> None:
    """Refuse static steps where they cannot work.

    Args:
        step: ``eager``, ``static``, ``graph`` or ``compile``.
        model: a transformers model.
        shapes: its layers.
        parts: number of processes that share its heads.

    Raises:
        UnsupportedError: says why, and what to use instead.
    """

    def refuse(reason: str) -> UnsupportedError:
        name = type(model).__name__
        return UnsupportedError(f"step={step!r} cannot run {name}: {reason}: use step='eager'")

    if step == "eager":
        return
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise refuse("it does not take position_ids")
    if step == "static":
        return
    if step == "compile" and getattr(model, "_compiled_call_impl", None) is not None:
        raise refuse("model.compile() was called, and both would compile its steps")
    if any(shape.sliding_window is not None for shape in shapes):
        raise refuse("the caches of its layers with a sliding window grow from step to step")
    if getattr(text_config(model), "attn_temperature_tuning", False):
        raise refuse("its attention's temperature follows a position that the host counts")
    if getattr(text_config(model), "model_type", None) == "xglm":
        raise refuse("its table of positions grows with a length that the host counts")
    if any(shape.image for shape in shapes):
        raise refuse("repeated steps of layers that attend to an image were not tested")
    if step == "graph" and any(shape.state is not None for shape in shapes):
        raise refuse("captured steps of linear, Mamba or convolution layers were not tested")
    if step == "graph" and any(shape.readers for shape in shapes):
        raise refuse("captured steps of layers that share a cache were not tested")
    if step == "graph" and model.device.type != "cuda":
        raise UsageError(
            f"step='graph' needs a GPU, but the model is on {model.device}: use step='compile'"
        )
    if step == "compile" and model.device.type != "cpu":
        other = "graph" if model.device.type == "cuda" else "eager"
        raise UsageError(
            f"step='compile' is for CPUs, but the model is on {model.device}: use step='{other}'"
        )
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1 or parts > 1:
        raise refuse("it is divided among several devices or processes")
    if step == "compile":
        from reasonalloc import cpu_step

        cpu_step.check(model.dtype)


def check_hooks(model: Any, step: str) -> None:
    """Refuse to repeat steps of a model whose modules call something else besides.

    Args:
        model: whose own hooks run in every call, and are no matter; those of modules inside do not.
        step: ``graph`` and ``compile`` repeat, the others run everything.

    Raises:
        UnsupportedError: names the module.
    """
    if step not in ("graph", "compile"):
        return
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if name and any(_is_foreign(hook) for hook in hooks):
            raise UnsupportedError(
                f"step={step!r} repeats what a step did, without calling the hooks of {name!r}: "
                "use step='eager' or remove the hooks"
            )


def _is_foreign(hook: Any) -> bool:
    """Whether a hook does more than ours, and those by which transformers collects hidden states.

    Calls that collect them are no steps that are repeated (``_EXTRA_OUTPUTS``).
    """
    place = getattr(hook, "__module__", None) or type(hook).__module__
    return not isinstance(hook, (CallCheck, CallEnd)) and not place.startswith("transformers.")


class StaticStep:
    """Stands for a model's ``forward`` while it decodes on a cache under a budget.

    Calls with one new token per sequence do the device's part of a step with inputs and cache at
    fixed addresses, then the host's: counting, and compressing when an interval is complete. With
    ``graph`` or ``compile``, the second such call captures the device's part (the first has warmed
    it up), which is replayed from then on; under ``graph`` a result is overwritten by the next
    call. All other calls, the prompt above all, go to ``forward`` as they are.

    Args:
        forward: the model's own.
        cache: new tokens of single steps are never padding there (``only_real_tokens``).
        device: of the model.
        step: ``static``, ``graph`` or ``compile``.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        cache: BudgetCache,
        device: torch.device,
        step: str,
    ) -> None:
        functools.update_wrapper(self, forward)  # generate() looks at the signature
        self._forward = forward
        self._cache = cache
        self._keeps_padding = cache.keeps_padding
        self._device = device
        self._step = step
        self._inputs: dict[str, Tensor] = {}
        self._options: dict[str, Any] = {}
        self._replay: Callable[[], Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As ``forward``."""
        if args or not self._is_step(kwargs):
            self.forget()
            return self._forward(*args, **kwargs)
        if not self._keeps_padding:
            kwargs.pop("attention_mask", None)  # all that is stored is visible, and all that is new
        if kwargs.get("position_ids") is None:
            shape = kwargs["input_ids"].shape
            kwargs["position_ids"] = torch.full(
                shape, self._cache.get_seq_length(), dtype=torch.int64, device=self._device
            )
        inputs = {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}
        options = {k: v for k, v in kwargs.items() if k not in inputs}
        if self._fits(inputs, options):
            for name, tensor in inputs.items():
                self._inputs[name].copy_(tensor)
            if self._step != "static" and self._replay is None:
                self._replay = self._capture()
        else:
            self._cache.fix()
            with torch.inference_mode(False):  # plain tensors: a later call may copy to them
                self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
            self._options, self._replay = options, None
        try:
            result = self._run() if self._replay is None else self._replay()
            self._cache.advance()
        except BaseException:
            self._cache.spoil()
            raise
        return result

    def forget(self) -> None:
        """Do not repeat what was captured: the cache has moved."""
        self._inputs, self._replay = {}, None

    def _is_step(self, call: dict[str, Any]) -> bool:
        ids = call.get("input_ids")
        return (
            isinstance(ids, Tensor)
            and ids.shape[1] == 1
            and given_cache(call) is self._cache
            and self._cache.single_tokens_are_real
            and self._cache.get_seq_length() > 0
            and not any(call.get(name) for name in _EXTRA_OUTPUTS)
        )

    def _fits(self, inputs: dict[str, Tensor], options: dict[str, Any]) -> bool:
        """Whether a call differs from the one before in the content of its tensors alone."""
        kinds = [{k: (v.shape, v.dtype) for k, v in x.items()} for x in (inputs, self._inputs)]
        return kinds[0] == kinds[1] and options == self._options

    def _run(self) -> Any:
        with self._cache.static():
            return self._forward(**self._inputs, **self._options)

    def _capture(self) -> Callable[[], Any]:
        if self._step == "compile":
            from reasonalloc import cpu_step

            return cpu_step.compile_step(self._run, verify=True)
        try:
            return capture(self._run, self._device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UnsupportedError(
                f"step='graph': a step of this model cannot be captured in a CUDA graph ({error}): "
                "use step='eager'"
            ) from error
