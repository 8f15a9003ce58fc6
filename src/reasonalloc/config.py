"""What a run is asked to do: the arm (policy / layers / heads), the budget and the cadence."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from reasonalloc.errors import UsageError, unknown_name
from reasonalloc.kinds import is_coded, parse_kinds
from reasonalloc.sizes import ByteBudget
from reasonalloc.whole import LARGEST, whole_number

_MOST_TOKENS = 2**31 - 1  # positions are counted in 32 bits

RecordLevel = Literal["off", "budgets", "tokens"]
Step = Literal["eager", "static", "graph", "compile"]
Prompt = Literal["evict", "protect", "pin"]
PinOverflow = Literal["refuse", "evict"]


@dataclass(frozen=True)
class Arm:
    """One method: which tokens (``policy``), how many per layer, how many per KV head.

    Each is a name, ``"name(key=value)"``, or an object or a class of a ``Policy``, a
    ``LayerAllocator`` and a ``HeadAllocator``, which becomes such a text.

    Raises:
        UsageError: another thing than these, or a class whose name is taken.
    """

    policy: str = "rkv"
    layers: str = "uniform"
    heads: str = "uniform"

    if TYPE_CHECKING:  # what it takes is more than what it holds

        def __init__(self, policy: Any = "rkv", layers: Any = "uniform", heads: Any = "uniform"):
            """Take names, objects or classes."""

    def __post_init__(self) -> None:
        if all(isinstance(part, str) for part in (self.policy, self.layers, self.heads)):
            return
        from reasonalloc.allocators.head import HEAD_ALLOCATORS
        from reasonalloc.allocators.layer import LAYER_ALLOCATORS
        from reasonalloc.policies import POLICIES

        object.__setattr__(self, "policy", POLICIES.specification(self.policy))
        object.__setattr__(self, "layers", LAYER_ALLOCATORS.specification(self.layers))
        object.__setattr__(self, "heads", HEAD_ALLOCATORS.specification(self.heads))

    def __str__(self) -> str:
        return f"{self.policy}/{self.layers}/{self.heads}"


@dataclass(frozen=True)
class Preset:
    """A named arm; ``arm`` is None for the full cache."""

    arm: Arm | None
    summary: str


PRESETS: dict[str, Preset] = {
    "full": Preset(None, "no compression: the model's own full cache"),
    "rkv": Preset(Arm("rkv"), "R-KV, equal budgets"),
    "snapkv": Preset(Arm("snapkv"), "SnapKV at every boundary, equal budgets"),
    "h2o": Preset(Arm("h2o"), "H2O with really accumulated attention, equal budgets"),
    "streaming_llm": Preset(Arm("streaming_llm"), "sinks and the most recent, equal budgets"),
    "random": Preset(Arm("random"), "random eviction: the control"),
    "pyramid-rkv": Preset(Arm("rkv", "pyramid"), "R-KV with linearly falling layer budgets"),
    "adakv": Preset(Arm("snapkv", "uniform", "adakv"), "SnapKV with AdaKV's head budgets"),
    "reasonalloc": Preset(
        Arm("rkv", "profile", "reasonalloc"), "R-KV, layers from a profile, heads online"
    ),
    "best": Preset(
        Arm("calibrated", "cost", "planned"),
        "what measured best: policy and budgets per layer and head from a cost profile",
    ),
    "best-bytes": Preset(
        Arm("calibrated", "cost(bits=planned)", "planned"),
        "the same with tokens and bits per head, in the bytes of the budget at full width",
    ),
}


def parse_arm(text: str) -> Arm | None:
    """Read a preset's name or ``policy/layers/heads``; None means the full cache.

    Raises:
        UsageError: neither a preset nor three parts. Names inside are checked when used.
    """
    if not isinstance(text, str):
        raise UsageError(
            f"arm={text!r} must be a preset's name, policy/layers/heads or an Arm object"
        )
    if text in PRESETS:
        return PRESETS[text].arm
    depth, parts, current = 0, [], ""
    for char in text:  # a slash inside parentheses belongs to a parameter, such as a path
        depth += (char == "(") - (char == ")")
        if char == "/" and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += char
    parts.append(current)
    if len(parts) == 1 and "(" in text:
        raise UsageError(
            f"arm {text!r} is no preset's name: a policy alone is written {text}/uniform/uniform"
        )
    if len(parts) == 1:
        raise unknown_name("arm", text, PRESETS)
    if len(parts) == 3 and not all(p.strip() for p in parts):
        raise UsageError(
            f"arm {text!r} has an empty part: write policy/layers/heads, for example "
            "rkv/uniform/uniform"
        )
    if len(parts) != 3:
        raise UsageError(
            f"arm {text!r} has {len(parts)} parts: write policy/layers/heads, "
            "for example rkv/uniform/uniform, or a preset's name"
        )
    return Arm(*(p.strip() for p in parts))


def choose_arm(
    arm: str | Arm | None, policy: Any = None, layers: Any = None, heads: Any = None
) -> Arm:
    """Return the arm that is given whole or in parts; parts that are None have their defaults.

    Raises:
        UsageError: both are given, the full cache, or parts that are of no use.
    """
    parts = {"policy": policy, "layers": layers, "heads": heads}
    given = {name: value for name, value in parts.items() if value is not None}
    if arm is None:
        return Arm(**given)
    for name, value in given.items():
        raise UsageError(f"arm={arm!r} and {name}={value!r}: give one of the two")
    parsed = arm if isinstance(arm, Arm) else parse_arm(arm)
    if parsed is None:
        raise UsageError("arm='full' means no compression: do not attach anything")
    return parsed


def split_arms(text: str) -> list[str]:
    """Return arms, or policies, separated at the commas that are outside of parentheses."""
    parts, depth = [""], 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def preset_name(arm: Arm | str) -> str:
    """The name of the preset that an arm is, else its three parts."""
    return next((name for name, p in PRESETS.items() if str(p.arm) == str(arm)), str(arm))


@dataclass(frozen=True)
class CompressionConfig:
    """Settings of a compressed cache, validated at construction.

    The ``help`` of a field is that of its command-line option.

    Attributes:
        budget: mean number of retained tokens per (layer, KV head) right after a compression,
            the observation window included. Or bytes of keys and values of one sequence in the
            layers that have a budget, pinned prompts apart: ``"64MiB"``, or ``"25%@8192"``, a
            quarter of the full cache at 8192 tokens; the tokens that fit are known with the model
            (``BudgetPlan``), until then this is the least.
        size: the budget in bytes, if it was given so.
        arm: policy, layer allocator, head allocator.
        interval: generated tokens between two compressions; a head grows by so many meanwhile.
        window: most recent tokens that are always kept and whose queries are observed.
        n_sink: first tokens of each sequence that are always kept (0: none).
        prompt: what happens to the first prompt: ``evict``, it competes like everything else;
            ``protect``, every token of it stays, inside the budget; ``pin``, every layer and head
            keeps the whole of it on top of the budget, for which what comes later competes.
        pin_turns: pin what every later call with several tokens brings, too: turns of a chat.
        pin_limit: longest prompt that is pinned, in tokens; None: any.
        pin_overflow: what happens to a longer one: ``refuse`` it, or let it compete (``evict``).
        protect_prompt: another name of ``prompt="protect"``.
        seed: seed of the ``random`` policy.
        profile: path of a calibrated file, for the policy or layer allocator that reads one and has
            no path of its own.
        kv_dtype: how tokens that are older than the window are kept from the next boundary on:
            ``auto``, as the model computes; ``int8``, ``fp8``, ``int4``, ``int4h`` (``ops.codes``);
            for keys and values apart, such as ``int8:int4``.
        attention: ``auto``, or a name from ``reasonalloc ls``.
        step: how ``generate`` runs a decode step: ``eager``; ``static``, with fixed shapes and
            addresses, lengths and positions on the device; ``graph``, the same captured in a CUDA
            graph; ``compile``, the same as one program in C++, for CPUs.
        record: ``off``, ``budgets`` (per event and head), ``tokens`` (kept positions as well).
    """

    budget: int = field(
        metadata={"help": "Mean tokens kept per layer and KV head right after a compression."}
    )
    arm: Arm = field(
        default=Arm(),
        metadata={
            "help": "policy/layers/heads or a preset, see 'reasonalloc ls'; full: no compression."
        },
    )
    interval: int = field(
        default=128, metadata={"help": "Generated tokens between two compressions."}
    )
    window: int = field(default=8, metadata={"help": "Most recent tokens that are always kept."})
    n_sink: int = field(default=0, metadata={"help": "First tokens that are always kept."})
    prompt: Prompt = field(
        default="evict",
        metadata={
            "help": "The prompt: evict (competes), protect (stays, inside the budget), pin (stays "
            "on top of it)."
        },
    )
    pin_turns: bool = field(
        default=False, metadata={"help": "With --prompt-mode pin: pin later turns as well."}
    )
    pin_limit: int | None = field(
        default=None,
        metadata={
            "help": "With --prompt-mode pin: longest prompt that is pinned, in tokens.",
            "option": {"min": 1},
        },
    )
    pin_overflow: PinOverflow = field(
        default="refuse",
        metadata={"help": "With --pin-limit: refuse longer prompts, or evict from them."},
    )
    protect_prompt: bool = field(
        default=False, metadata={"help": "The same as --prompt-mode protect."}
    )
    kv_dtype: str = field(
        default="auto",
        metadata={
            "help": "Older keys and values in fewer bits: auto (no), int8, fp8, int4, int4h; or "
            "keys:values, as int8:int4."
        },
    )
    seed: int = 0
    profile: str | os.PathLike[str] | None = field(
        default=None,
        metadata={"help": "Calibrated file for the policy or layer allocator that reads one."},
    )
    attention: str = field(
        default="auto", metadata={"help": "Attention backend, see 'reasonalloc ls'."}
    )
    step: Step = field(
        default="eager",
        metadata={
            "help": "Decode steps: eager, static (fixed shapes), graph (CUDA), compile (CPU)."
        },
    )
    record: RecordLevel = "off"
    size: ByteBudget | None = None

    def __post_init__(self) -> None:
        if isinstance(self.budget, str):
            object.__setattr__(self, "size", ByteBudget.parse(self.budget))
            for name in ("window", "n_sink"):
                whole_number(name, getattr(self, name), 0, "tokens")
            object.__setattr__(self, "budget", self.window + self.n_sink)
        for name, least in (("budget", 1), ("interval", 1), ("window", 1), ("n_sink", 0)):
            number = whole_number(name, getattr(self, name), least, "tokens", _MOST_TOKENS)
            object.__setattr__(self, name, number)  # numpy's numbers cannot be written as JSON
        object.__setattr__(self, "seed", whole_number("seed", self.seed, -LARGEST))
        self._check_prompt()
        parse_kinds(self.kv_dtype)
        if self.budget < self.window + self.n_sink:
            raise UsageError(
                f"budget={self.budget} cannot hold the observation window ({self.window}) and the "
                f"sinks ({self.n_sink}): give a budget of at least {self.window + self.n_sink}"
            )
        if not isinstance(self.profile, (str, os.PathLike, type(None))):
            raise UsageError(f"profile={self.profile!r} must be the path of a file")
        if not isinstance(self.step, str) or self.step not in get_args(Step):
            raise unknown_name("step", str(self.step), get_args(Step))
        if self.record not in ("off", "budgets", "tokens"):
            raise unknown_name("record level", str(self.record), ("off", "budgets", "tokens"))

    @property
    def given_budget(self) -> int | str:
        """The budget as it was given: tokens, or the text of one in bytes."""
        return self.budget if self.size is None else self.size.text

    @property
    def coded(self) -> bool:
        """Whether older tokens are kept in fewer bits."""
        return is_coded(self.kv_dtype)

    def pinned(self, prompt_tokens: int) -> int:
        """Return how many tokens of a first prompt are kept on top of the budget.

        Args:
            prompt_tokens: of the prompt.

        Raises:
            UsageError: a prompt that is too long to be pinned, and is to be refused then.
        """
        tokens = whole_number("prompt_tokens", prompt_tokens, 0, "tokens")
        if self.prompt != "pin":
            return 0
        if self.pin_limit is None or tokens <= self.pin_limit:
            return tokens
        if self.pin_overflow == "evict":
            return 0
        raise UsageError(
            f"the prompt has {tokens} tokens, more than pin_limit={self.pin_limit}: raise it, "
            "shorten the prompt, or give pin_overflow='evict'"
        )

    def _check_prompt(self) -> None:
        for name in ("protect_prompt", "pin_turns"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name}={getattr(self, name)!r} must be True or False")
        if not isinstance(self.prompt, str) or self.prompt not in get_args(Prompt):
            raise unknown_name("prompt", self.prompt, get_args(Prompt))
        if self.pin_overflow not in get_args(PinOverflow):
            raise unknown_name("pin_overflow", self.pin_overflow, get_args(PinOverflow))
        if self.protect_prompt and self.prompt == "pin":
            raise UsageError("protect_prompt=True and prompt='pin': give one of the two")
        if self.protect_prompt:
            object.__setattr__(self, "prompt", "protect")
        object.__setattr__(self, "protect_prompt", self.prompt == "protect")
        if self.pin_limit is not None:
            limit = whole_number("pin_limit", self.pin_limit, 1, "tokens")
            object.__setattr__(self, "pin_limit", limit)
        for name, none in (("pin_turns", False), ("pin_limit", None)):
            if self.prompt != "pin" and getattr(self, name) != none:
                raise UsageError(
                    f"{name}={getattr(self, name)!r} has no effect with prompt={self.prompt!r}: "
                    "leave it out, or give prompt='pin'"
                )
        if self.pin_overflow != "refuse" and self.pin_limit is None:
            raise UsageError(
                f"pin_overflow={self.pin_overflow!r} has no effect without pin_limit: leave it out"
            )
