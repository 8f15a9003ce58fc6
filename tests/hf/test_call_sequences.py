"""Sequences of calls at a budget that holds everything, beside transformers' own cache."""

from __future__ import annotations

import pytest

from call_sequences import Sequence, run


@pytest.mark.parametrize("seed", [*range(10), 1795853305])
def test_random_sequences(seed: int) -> None:
    run(seed)


def test_the_sequence_that_found_masks_over_the_past() -> None:
    """Batch of three, a row ends early, pads follow, the next turn hides them."""
    for seed in range(200):
        sequence = Sequence(seed)
        if sequence.batch == 3 and not bool(sequence.mask[:, -1:].all()):
            sequence.turn()
            sequence.turn()
            return
    raise AssertionError("no row ended early")
