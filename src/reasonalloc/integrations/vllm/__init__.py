"""KV budgets inside vLLM: a plugin that vLLM finds by its entry point."""
