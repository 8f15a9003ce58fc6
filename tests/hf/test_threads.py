"""Several threads that generate with one attached model, as servers do."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import reasonalloc
from models import prompt, tiny
from reasonalloc import UsageError

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}


@pytest.mark.parametrize("step", ["eager", "static", "compile"])
def test_calls_on_one_model_are_independent(step: Any) -> None:
    model = tiny("llama", num_hidden_layers=4)
    prompts = [prompt(10 + seed, 1 + seed % 3, seed=seed) for seed in range(6)]
    with reasonalloc.attach(model, budget=24, interval=8, policy="h2o", step=step):
        alone = [model.generate(ids, **GREEDY) for ids in prompts]
        start = threading.Barrier(3)

        def serve(number: int) -> list[bool]:
            start.wait()
            found = []
            for turn in range(6):
                which = (turn + 2 * number) % len(prompts)
                out = model.generate(prompts[which], **GREEDY)
                found.append(torch.equal(out, alone[which]))
            return found

        with ThreadPoolExecutor(3) as pool:
            assert all(all(found) for found in pool.map(serve, range(3)))
        assert torch.equal(model.generate(prompts[0], **GREEDY), alone[0])


@pytest.mark.parametrize("step", ["eager", "static"])
def test_one_cache_serves_one_call_at_a_time(step: Any) -> None:
    model = tiny("llama")
    with reasonalloc.attach(model, budget=24, interval=8, step=step) as attached:
        cache, errors = attached.new_cache(), []

        class Another(StoppingCriteria):
            """In the middle of a call, somebody else takes its cache."""

            def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
                if not errors:
                    with pytest.raises(UsageError, match="in use by another generate call") as e:
                        model.generate(ids, past_key_values=cache, **GREEDY)
                    errors.append(e)
                    model.generate(prompt(9), **GREEDY)  # with a cache of its own
                return torch.zeros(len(ids), dtype=torch.bool)

        ids = prompt(20)
        out = model.generate(
            ids,
            past_key_values=cache,
            stopping_criteria=StoppingCriteriaList([Another()]),
            **GREEDY,
        )
        assert errors and torch.equal(out, model.generate(ids, **GREEDY))
        more = torch.cat([out, prompt(3)], dim=1)
        assert model.generate(more, past_key_values=cache, **GREEDY).shape == (1, 63)
