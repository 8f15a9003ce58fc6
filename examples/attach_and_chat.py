"""Chat with a model whose KV cache stays inside a budget.

    python examples/attach_and_chat.py --model Qwen/Qwen3-0.6B --budget 512

Without questions on the command line, type them; an empty line ends the chat.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from transformers import AutoModelForCausalLM, AutoTokenizer

import reasonalloc


def typed() -> Iterator[str]:
    """Questions from the keyboard, until an empty line."""
    return iter(lambda: input("> "), "")


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", nargs="*")
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--budget", type=int, default=512, help="tokens kept per layer and KV head")
    parser.add_argument("--max-new-tokens", type=int, default=2048)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").eval()
    with reasonalloc.attach(model, budget=options.budget) as handle:
        chat = handle.chat(tokenizer, max_new_tokens=options.max_new_tokens)
        for question in options.questions or typed():
            print(chat.ask(question))
            print(f"[{chat.prefilled} tokens read, {handle.recorder.compressions} compressions]")


if __name__ == "__main__":
    main()
