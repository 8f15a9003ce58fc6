"""What an attachment puts on a model, and how the model is saved without it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from itertools import chain
from typing import Any

from reasonalloc.integrations.hf.inline import set_attention

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
)


class _Placed:
    """Attributes of a module that stand for its own.

    Args:
        module: to set them on.
        stands: by name.
    """

    def __init__(self, module: Any, stands: dict[str, Any]) -> None:
        self._module, self._stands = module, stands
        self.before = {name: module.__dict__.get(name) for name in stands}
        module.__dict__.update(stands)

    def plain(self) -> dict[str, Any]:
        """The module's attributes without what was placed."""
        state = {k: v for k, v in self._module.__dict__.items() if k not in self.before}
        return state | {name: own for name, own in self.before.items() if own is not None}

    def remove(self) -> None:
        """Give the module its own attributes back.

        What somebody else has put in the place of an attribute since stays.
        """
        for name, own in self.before.items():
            if self._module.__dict__.get(name) is not self._stands[name]:
                continue
            del self._module.__dict__[name]
            if own is not None:
                self._module.__dict__[name] = own


class Installed:
    """Attributes of a model that stand for its own, and hooks on its modules.

    While they are there, the model is copied and pickled as a plain one.

    Args:
        model: a transformers model.
        stands: attributes to set on it.
        original: what ``set_attn_implementation`` takes to give the model its own attention back.
    """

    def __init__(self, model: Any, stands: dict[str, Any], original: Any) -> None:
        self._model = model
        self._original = original
        self._hooks: list[tuple[Any, Any]] = []  # modules and what removes their hooks
        self.forward: Callable[..., Any] = model.forward
        self._placed = _Placed(model, {**stands, "__getstate__": self._plain_state})
        self._inside: list[_Placed] = []

    def own(self, name: str) -> Any:
        """What the model itself, not its class, had under a name before; None if nothing."""
        return self._placed.before.get(name)

    def place(self, module: Any, stands: dict[str, Any]) -> None:
        """Set attributes on a module of the model, which stand for its own."""
        inside: _Placed  # known by the time that the module is copied
        inside = _Placed(module, {**stands, "__getstate__": lambda: inside.plain()})
        self._inside.append(inside)

    def check(self, module: Any, hook: Callable[..., Any]) -> None:
        """Have a module's calls go through a hook first."""
        handle = module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
        self._hooks.append((module, handle))

    def after(self, module: Any, hook: Callable[..., Any]) -> None:
        """Have a module's calls that ended well go through a hook last."""
        handle = module.register_forward_hook(hook, with_kwargs=True)
        self._hooks.append((module, handle))

    def remove(self) -> None:
        """Give the model its own attributes back, and take the hooks off."""
        for placed in (self._placed, *self._inside):
            placed.remove()
        for _, handle in self._hooks:
            handle.remove()

    def _plain_state(self) -> dict[str, Any]:
        """The model's attributes without what was installed; tensors are shared, not copied."""
        model = self._model
        twin: Any = object.__new__(type(model))
        memo: dict[int, Any] = {id(t): t for t in chain(model.parameters(), model.buffers())}
        memo[id(model)] = model  # of bound methods: whoever copies the state knows the copy
        for module, handle in self._hooks:
            for name in _HOOKS:
                hooks = getattr(module, name)
                own = memo.get(id(hooks), hooks)
                memo[id(hooks)] = OrderedDict((k, v) for k, v in own.items() if k != handle.id)
        twin.__dict__.update(copy.deepcopy(self._placed.plain(), memo))
        set_attention(twin, self._original)
        return dict(twin.__dict__)
