"""Names of the formats that keys and values are kept in; light, so that ``--help`` is quick."""

from __future__ import annotations

from reasonalloc.errors import UsageError

#: Formats of one vector, and their numbers in the loops in C++ and Triton.
KINDS = {"auto": 0, "int8": 1, "int4": 2, "fp8": 3, "int4h": 4}
#: Those of values: a rotation would have to be undone in every output.
VALUE_KINDS = ("auto", "int8", "int4", "fp8")


def parse_kinds(text: str) -> tuple[str, str]:
    """Return the formats of keys and of values: of ``int8``, or of ``int8:int4`` one each.

    ``int4h`` alone means ``int4h:int4``.

    Raises:
        UsageError: something else.
    """
    parts = text.split(":") if isinstance(text, str) else []
    if len(parts) == 1:
        parts.append("int4" if parts[0] == "int4h" else parts[0])
    if len(parts) != 2 or parts[0] not in KINDS or parts[1] not in VALUE_KINDS:
        raise UsageError(
            f"kv_dtype={text!r} must be one of {', '.join(KINDS)}, or a format for keys and one of "
            f"{', '.join(VALUE_KINDS)} for values, such as 'int8:int4'"
        )
    return parts[0], parts[1]


def is_coded(kv_dtype: str) -> bool:
    """Whether keys or values are kept in fewer bits.

    Raises:
        UsageError: as ``parse_kinds``.
    """
    return parse_kinds(kv_dtype) != ("auto", "auto")
