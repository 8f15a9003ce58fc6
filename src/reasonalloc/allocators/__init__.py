"""How many tokens: per layer (``layer``) and per KV head (``head``); sums are exact."""
