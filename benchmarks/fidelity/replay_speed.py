"""How much faster a replay is than token-by-token decoding: the same arm, the same text.

    python benchmarks/fidelity/replay_speed.py MODEL [TOKENS] [INTERVAL]

Both run the compressed cache over the same tokens and must give the same logits.
"""

from __future__ import annotations

import sys
import time

import torch

from reasonalloc.config import CompressionConfig
from reasonalloc.integrations.hf import attach_config
from reasonalloc.integrations.hf.replay import PIECE
from reasonalloc.loading import load_model

PROMPT, BUDGET = 48, 128


@torch.inference_mode()
def main() -> None:
    """Print both times and the largest difference of logits."""
    tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 2000
    interval = int(sys.argv[3]) if len(sys.argv) > 3 else 128
    model = load_model(sys.argv[1], "float32", "cpu")[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT + tokens), generator=generator)
    config = CompressionConfig(BUDGET, interval=interval)
    took, last = {}, {}
    for name, piece in (("replay", PIECE), ("token by token", 1)):
        with attach_config(model, config) as attached:
            cache = attached.new_cache()
            model(ids[:, :PROMPT], past_key_values=cache, use_cache=True, logits_to_keep=1)
            began = time.perf_counter()
            with cache.replaying():
                for start in range(PROMPT, PROMPT + tokens, piece):
                    out = model(ids[:, start : start + piece], past_key_values=cache)
            took[name], last[name] = time.perf_counter() - began, out.logits[0, -1]
        print(f"{name}: {took[name]:.1f} s for {tokens} tokens, {torch.get_num_threads()} threads")
    print(f"ratio {took['token by token'] / took['replay']:.1f}")
    print(f"largest difference {float((last['replay'] - last['token by token']).abs().max()):.1e}")


if __name__ == "__main__":
    main()
