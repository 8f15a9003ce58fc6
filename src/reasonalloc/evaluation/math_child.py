"""The process that compares answers: JSON lines ``[gold, answer]`` in, ``true``/``false`` out.

math-verify bounds its time by SIGALRM, which works in a process's main thread alone, and a number
such as 9^9^9^9 may take memory and time without end. So it runs in a process of its own, which its
owner may end; it leaves by itself when its input is closed.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable
from typing import Any

#: A space in front of three digits: ``70\,000`` is 70000, which math-verify takes for a product.
_THOUSANDS = re.compile(r"(?<=\d)\\[,:;! ](?=\d{3}(?!\d))")


def _equal() -> Callable[[str, str], bool]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    configs = [LatexExtractionConfig(), ExprExtractionConfig()]

    def read(text: str) -> Any:
        plain = _THOUSANDS.sub("", text.strip().strip("$"))
        return parse(f"${plain}$", extraction_config=configs)

    return lambda gold, answer: bool(verify(read(gold), read(answer)))


def main() -> None:
    """Answer until the input ends."""
    logging.disable(logging.CRITICAL)
    equal = _equal()
    for line in sys.stdin:
        gold, answer = json.loads(line)
        print(json.dumps(equal(gold, answer)), flush=True)


if __name__ == "__main__":
    main()
