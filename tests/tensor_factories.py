"""Finds calls whose result hangs on PyTorch's default type or device."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

# Both decide what these give. `tensor` and its kind take the default type for floats, and also for
# an empty list of integers.
_TYPED = {
    *("zeros", "ones", "empty", "full", "eye", "linspace", "logspace", "empty_strided"),
    *("tensor", "as_tensor", "asarray", "scalar_tensor", "rand", "randn", "normal"),
    *("hann_window", "hamming_window", "kaiser_window", "empty_permuted"),
}
# Integers by nature: the device alone. Not so `arange` of what is no integer.
_INTEGERS = {"arange", "randint", "randperm", "tril_indices", "triu_indices"}
# Legacy constructors have no way to say it.
_LEGACY = {"Tensor", "FloatTensor", "HalfTensor", "DoubleTensor", "range"}


def unclear_calls(folder: Path) -> list[str]:
    """``file:line: call: what is missing`` of every call in a folder's Python files."""
    return [
        f"{path.relative_to(folder)}:{line}: {message}"
        for path in sorted(folder.rglob("*.py"))
        for line, message in unclear_in(path.read_text(encoding="utf-8"))
    ]


def unclear_in(source: str) -> Iterator[tuple[int, str]]:
    """Line and message of every call in a file."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if not isinstance(node.func.value, ast.Name) or node.func.value.id != "torch":
            continue
        missing = _missing(node, node.func.attr)
        if missing:
            yield node.lineno, f"torch.{node.func.attr}: no {' and no '.join(missing)}"


def _missing(call: ast.Call, name: str) -> list[str]:
    given = {keyword.arg for keyword in call.keywords}
    if name in _LEGACY:
        return ["dtype", "device"]
    if name == "where":
        return ["tensor to take the type from"] if all(map(_number, call.args[1:])) else []
    if name not in _TYPED | _INTEGERS or None in given:  # None: **arguments
        return []
    needed = ["device"]
    if name in _TYPED or (name == "arange" and any(map(_fraction, call.args))):
        needed.insert(0, "dtype")
    return [argument for argument in needed if argument not in given]


def _number(node: ast.expr) -> bool:
    """Whether an expression is made of literals."""
    kinds = (ast.Constant, ast.operator, ast.unaryop, ast.BinOp, ast.UnaryOp)
    return all(isinstance(part, kinds) for part in ast.walk(node))


def _fraction(node: ast.expr) -> bool:
    """Whether an expression is no integer."""
    return any(
        isinstance(part, ast.Div) or (isinstance(part, ast.Constant) and type(part.value) is float)
        for part in ast.walk(node)
    )
