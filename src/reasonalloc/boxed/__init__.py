"""The boxed reasoner: a checkpoint that transformers loads. Its training is in tools/boxed."""
