"""What several tests draw."""

from __future__ import annotations

from hypothesis import strategies as st


def lengths_of_heads(
    length: st.SearchStrategy[int], most_heads: int, most_sequences: int
) -> st.SearchStrategy[list[list[int]]]:
    """[batch][kv_heads] lengths, as many heads in every sequence."""
    return st.integers(1, most_heads).flatmap(
        lambda heads: st.lists(
            st.lists(length, min_size=heads, max_size=heads), min_size=1, max_size=most_sequences
        )
    )
