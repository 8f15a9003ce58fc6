"""Random sequences of calls on one cache, beside transformers' own cache: no token may differ.

``make fuzz`` (``python tests/call_sequences.py --minutes 10``) tries new sequences until the time
is over; a sequence is a seed, which fails again whenever it is run.
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import reasonalloc
from models import VOCAB, tiny

BUDGET = 400  # holds everything that a sequence writes
NAMES = ("llama", "qwen3", "qwen2", "gemma2")
ARMS = (
    "rkv",
    "snapkv/uniform/adakv",
    "h2o/uniform/reasonalloc",
    "lazy_eviction/uniform/uniform",
    "value_aware/uniform/adakv",
    "random",
    "streaming_llm",
)
PROMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"prompt": "pin"},
    {"prompt": "pin", "pin_turns": True},
    {"prompt": "pin", "pin_turns": True, "pin_limit": 9, "pin_overflow": "evict"},
)
NEAR = 1e-3  # logits this close may be decided either way


class Tie(Exception):
    """Two tokens were as good: what follows cannot be compared."""


class Sequence:
    """One conversation, held by a cache under a budget and by transformers' own.

    Args:
        seed: decides everything.
    """

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        name = self.draw.choice(NAMES)
        steps = ["eager"] if name == "gemma2" else ["eager", "static", "compile"]
        # A model of its own for each side: one of them is attached.
        self.plain = tiny(name, num_hidden_layers=4)
        self.model = tiny(name, num_hidden_layers=4)
        self.step = self.draw.choice(steps)
        self.arm = self.draw.choice(ARMS)
        self.settings: dict[str, Any] = {
            "budget": BUDGET,
            "interval": self.draw.choice([4, 16]),
            "arm": self.arm,
            "step": self.step,
            # Drawn apart, so that a seed makes the same calls as ever.
            **random.Random(f"prompt {seed}").choice(PROMPTS),
        }
        self.log = [f"seed {seed}: {name} {self.settings}"]
        self.attached = reasonalloc.attach(self.model, **self.settings)
        self.begin()

    def begin(self) -> None:
        """An empty conversation with left padding, or without."""
        self.batch = self.draw.choice([1, 2, 3])
        self.ours = self.attached.new_cache()
        self.theirs: Any = DynamicCache(config=self.plain.config)
        columns = self.draw.randint(1, 20)
        self.text = self.tokens(columns)
        self.mask = torch.ones_like(self.text)
        if self.draw.random() < 0.4:
            for row in range(1, self.batch):
                self.mask[row, : self.draw.randrange(columns)] = 0
        self.text *= self.mask
        self.generate("begin")

    def tokens(self, columns: int) -> torch.Tensor:
        rows = [[self.draw.randrange(2, VOCAB) for _ in range(columns)] for _ in range(self.batch)]
        return torch.tensor(rows)

    def extend(self, ids: torch.Tensor) -> None:
        self.text = torch.cat([self.text, ids], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], dim=1)

    def generate(self, what: str, alone: bool = False) -> None:
        """Both sides go on with the text; compare tokens."""
        new = self.draw.randint(1, 20)
        options: dict[str, Any] = {
            "max_new_tokens": new,
            "do_sample": False,
            "pad_token_id": 0,
            "suppress_tokens": [0],
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        if self.draw.random() < 0.4:  # rows may end early, pads follow
            options["eos_token_id"] = self.draw.sample(range(2, VOCAB), 8)
        self.log.append(f"{what}, generate {new}, alone={alone}, {self.text.shape}")
        found = []
        for model, cache in ((self.plain, self.theirs), (self.model, self.ours)):
            ids = self.text[:, cache.get_seq_length() :] if alone else self.text
            # Without a mask, transformers takes every pad in the text for padding.
            plain = bool(self.mask.all()) and bool(self.text.all()) and not alone
            extra = {} if plain else {"attention_mask": self.mask}
            found.append(model.generate(ids, past_key_values=cache, **extra, **options))
        theirs, ours = found
        self.compare(theirs.logits, ours.logits, theirs.sequences, ours.sequences)
        width = len(theirs.logits)
        written = theirs.sequences[:, -width:]
        ends = options.get("eos_token_id", [])
        self.extend(written)
        shown = torch.ones_like(written)
        for row, ids in enumerate(written.tolist()):
            last = next((i for i, token in enumerate(ids) if token in ends), width)
            shown[row, last + 1 :] = 0
        if self.draw.random() < 0.7:  # what a chat does: pads behind an end are not shown again
            self.mask[:, -width:] = shown

    def compare(self, theirs: Any, ours: Any, expected: Any, found: Any) -> None:
        if expected.shape == found.shape and torch.equal(expected, found):
            return
        for ours_now, theirs_now in zip(ours, theirs, strict=False):
            ours_now[:, 0] = theirs_now[:, 0] = -torch.inf
            best = theirs_now.topk(2, dim=-1).values
            if bool((best[:, 0] - best[:, 1] < NEAR).any()):
                raise Tie
            other = theirs_now.argmax(dim=-1) != ours_now.argmax(dim=-1)
            if bool(other.any()):
                break
        raise AssertionError("\n".join([*self.log, f"full cache {expected}", f"budget {found}"]))

    def turn(self) -> None:
        self.extend(self.tokens(self.draw.randint(1, 8)))
        self.generate("turn", alone=self.draw.random() < 0.4)

    def hide(self) -> None:
        """Any part of the past is hidden from now on."""
        seen = self.ours.get_seq_length()
        start = self.draw.randrange(seen)
        row = self.draw.randrange(self.batch)
        self.mask[row, start : start + self.draw.randint(1, 6)] = 0
        self.mask[:, -1] = 1
        self.log.append(f"hide {row} from {start}")
        self.turn()

    def by_hand(self) -> None:
        """Chunks and single tokens by plain calls, with a mask or without."""
        self.extend(self.tokens(self.draw.randint(1, 6)))
        self.log.append(f"by hand, {self.text.shape}")
        seen = self.ours.get_seq_length()
        while seen < self.text.shape[1]:
            stop = min(self.text.shape[1], seen + self.draw.randint(1, 3))
            places = (self.mask[:, :stop].cumsum(dim=1) - 1).clamp_min(0)[:, seen:]
            call: dict[str, Any] = {"position_ids": places}
            if not bool(self.mask[:, :stop].all()) or self.draw.random() < 0.5:
                call["attention_mask"] = self.mask[:, :stop]
            logits = []
            with torch.no_grad():
                for model, cache in ((self.plain, self.theirs), (self.model, self.ours)):
                    out = model(self.text[:, seen:stop], past_key_values=cache, **call)
                    logits.append(out.logits[self.mask[:, seen:stop].bool()])
            worst = (logits[0] - logits[1]).abs().max()
            assert worst < 2e-3, "\n".join([*self.log, f"logits differ by {worst}"])
            seen = stop
        self.generate_more()

    def generate_more(self) -> None:
        self.extend(self.tokens(1))
        self.generate("after it")

    def copies(self) -> None:
        """A copy goes on with other words, or replaces the original."""
        self.log.append("copy")
        saved = (self.text.clone(), self.mask.clone())
        twins = (copy.deepcopy(self.theirs), copy.deepcopy(self.ours))
        self.turn()
        if self.draw.random() < 0.6:
            self.text, self.mask = saved
            self.theirs, self.ours = twins
            self.turn()

    def crop(self) -> None:
        """Take back some tokens, where it can be."""
        seen = self.ours.get_seq_length()
        back = self.draw.randint(1, min(12, seen - 1))
        keep = seen - back
        if self.ours.reach(keep) != keep or not bool(self.mask[:, keep - 1].all()):
            return
        self.log.append(f"crop {back}")
        self.ours.crop(-back)
        self.theirs.crop(-back)
        self.text, self.mask = self.text[:, :keep], self.mask[:, :keep]
        self.turn()

    def edit(self) -> None:
        """Drop a part of the text, as a template drops thoughts."""
        seen = self.ours.get_seq_length()
        if not bool(self.mask.all()):
            return None  # another mask for other words: a matter of its own
        start = self.draw.randrange(1, seen)
        stop = min(seen, start + self.draw.randint(1, 12))
        kept = torch.cat([self.text[:, :start], self.text[:, stop:]], dim=1)
        self.log.append(f"edit {start}:{stop} of {seen}")
        self.text, self.mask = kept, torch.ones_like(kept)
        self.extend(self.tokens(self.draw.randint(1, 6)))
        if self.text.shape[1] <= seen and torch.equal(
            self.ours.seen.ids[:, : self.text.shape[1]].long(), self.text
        ):
            return self.begin()
        self.theirs = DynamicCache(config=self.plain.config)
        return self.generate("edited")

    def threads(self) -> None:
        """Three copies at once, each with words of its own."""
        self.log.append("threads")
        if not bool(self.mask.all()):
            return
        tails = [self.tokens(3) for _ in range(3)]
        texts = [torch.cat([self.text, tail], dim=1) for tail in tails]
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
        expected = [
            self.plain.generate(text, past_key_values=copy.deepcopy(self.theirs), **options)
            for text in texts
        ]
        caches = [copy.deepcopy(self.ours) for _ in texts]

        def go(i: int) -> torch.Tensor:
            out: torch.Tensor = self.model.generate(texts[i], past_key_values=caches[i], **options)
            return out

        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(go, range(3)))
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other), "\n".join([*self.log, f"{one}", f"{other}"])

    def save(self) -> None:
        """Through a file."""
        self.log.append("save")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.safetensors"
            self.attached.save_cache(self.ours, path)
            self.ours = self.attached.load_cache(path)
        self.turn()

    def again(self) -> None:
        """Another conversation on the same attachment."""
        self.log.append("again")
        self.begin()

    def run(self, calls: int) -> None:
        """So many random calls; a text that grows too long begins anew."""
        moves = (
            [self.turn] * 4
            + [self.hide] * 2
            + [self.by_hand] * 2
            + [self.copies, self.crop, self.edit, self.threads, self.save, self.again]
        )
        for _ in range(calls):
            if self.text.shape[1] > BUDGET - 80:
                self.begin()
            self.draw.choice(moves)()
        assert self.ours.recorder.compressions == 0


def run(seed: int, calls: int = 10) -> bool:
    """One sequence.

    Returns:
        Whether it came to its end without two tokens that were as good.

    Raises:
        AssertionError: a token differs; the message tells the calls.
    """
    default = random.Random(seed).choice([torch.float32, torch.bfloat16, torch.float64])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sequence = None
        try:
            torch.set_default_dtype(torch.float32)
            sequence = Sequence.__new__(Sequence)
            Sequence.__init__(sequence, seed)
            torch.set_default_dtype(default)
            sequence.run(calls)
        except Tie:
            return False
        except AssertionError:
            raise
        except Exception as error:
            told = [] if sequence is None else getattr(sequence, "log", [])
            raise AssertionError("\n".join([*told, f"{type(error).__name__}: {error}"])) from error
        finally:
            torch.set_default_dtype(torch.float32)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="of the first sequence")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    seed = int(time.time()) if chosen.seed is None else chosen.seed
    end, results = time.monotonic() + 60 * chosen.minutes, Counter[bool]()
    while time.monotonic() < end:
        results[run(seed)] += 1
        seed += 1
    print(f"{results[True]} sequences without a difference, {results[False]} ended at a tie")


if __name__ == "__main__":
    main()
