"""Load a model by hub name, folder or ``.gguf`` file; what goes wrong is one clear sentence."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import re
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from reasonalloc.errors import UsageError, unknown_name

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


@dataclass(frozen=True)
class Source:
    """Where a model lives.

    Attributes:
        kind: ``hub``, ``folder`` or ``gguf``.
        name: as the user gave it.
        path: the folder or the file; None on the hub.
    """

    kind: Literal["hub", "folder", "gguf"]
    name: str
    path: Path | None = None

    def arguments(self) -> tuple[str, dict[str, Any]]:
        """Return the first argument and the keywords of transformers' ``from_pretrained``."""
        if self.path is None:
            return self.name, {"local_files_only": not hub_reachable()}
        if self.kind == "gguf":
            return str(self.path.parent), {"gguf_file": self.path.name}
        return str(self.path), {}


def find_source(name: str | os.PathLike[str]) -> Source:
    """Tell a folder, a ``.gguf`` file and a hub name apart.

    Raises:
        UsageError: nothing is there, or it is no model.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise UsageError(f"model={name!r} is no name: give a hub name, a folder or a .gguf file")
    name = os.fspath(name)
    if not name.strip():
        raise UsageError("model='' is empty: give a hub name, a folder or a .gguf file")
    path = Path(name).expanduser()
    if path.is_dir():
        _check_folder(name, path)
        return Source("folder", name, path)
    if path.is_file():
        _check_gguf(name, path)
        return Source("gguf", name, path.absolute())
    looks_like_path = name.startswith(("/", ".", "~")) or name.endswith(".gguf")
    if looks_like_path or not _HUB_NAME.fullmatch(name):
        raise UsageError(
            f"model {name!r}: there is no such folder or file: check the path, or give a hub name "
            "such as Qwen/Qwen3-0.6B"
        )
    return Source("hub", name)


def _check_folder(name: str, path: Path) -> None:
    if (path / "config.json").is_file():
        return
    files = sorted(p.name for p in path.glob("*.gguf"))
    remedy = (
        f"give the file {str(path / files[0])!r}"
        if files
        else "give the folder that save_pretrained() or a download made"
    )
    raise UsageError(f"model {name!r} is a folder without config.json: {remedy}")


def _check_gguf(name: str, path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UsageError(f"model {name!r} cannot be read: {error.strerror}") from None
    if magic != b"GGUF":
        raise UsageError(f"model {name!r} is not a GGUF file: give a .gguf file, or a folder")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"model {name!r} needs the package {package!r}: pip install 'reasonalloc[gguf]'"
            )


def hub_reachable() -> bool:
    """Whether the hub's name resolves; without it, its client would retry for half a minute."""
    from huggingface_hub import constants

    if urllib.request.getproxies():
        return True
    host = urllib.parse.urlparse(constants.ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def quiet(*, progress: bool = False) -> Iterator[None]:
    """Silence the advice and the progress bars of transformers and the hub's client.

    Args:
        progress: leave the progress bars on.
    """
    from transformers.utils import logging as hf_logging

    hub = logging.getLogger("huggingface_hub")
    before = hf_logging.get_verbosity(), hub.level, hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hub.setLevel(logging.CRITICAL)
    if not progress:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before[0])
        hub.setLevel(before[1])
        if before[2]:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def _explained(source: Source) -> Iterator[None]:
    """Quiet, and every failure as a UsageError; bars stay for a download that is watched."""
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(quiet(progress=source.kind == "hub" and sys.stderr.isatty()))
            if source.kind == "gguf":  # its conversion draws a bar that no setting turns off
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    except (UsageError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a broken checkpoint raises anything, from KeyError to its own
        raise UsageError(_sentence(source, error)) from error


def _sentence(source: Source, error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    detail = lines[0].strip().rstrip(".:")
    name = f"model {source.name!r}"
    if isinstance(error, ImportError):
        return f"{name} needs a package that is not installed: {' '.join(str(error).split())}"
    if "trust_remote_code" in str(error):
        return (
            f"{name} brings its own code, which would be run on this machine: read it, then pass "
            "--trust-remote-code (trust_remote_code=True)"
        )
    if source.kind != "hub":
        return (
            f"{name} cannot be loaded ({type(error).__name__}: {detail}): it is incomplete, "
            "damaged or of a kind that transformers does not know"
        )
    if "gated" in str(error):
        return f"{name} is gated: accept its terms on huggingface.co, then run 'hf auth login'"
    if not hub_reachable() or "couldn't connect" in str(error):
        return (
            f"{name} is no folder or file here and is not in the Hugging Face cache, and the hub "
            "cannot be reached: check the name and the network"
        )
    if "not a valid model identifier" in str(error):
        return f"{name} is neither a local folder nor on the hub (or it is private): check the name"
    return f"{name} cannot be loaded ({type(error).__name__}: {detail})"


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """Return a model's configuration, without its weights.

    Args:
        name: hub name, folder or ``.gguf`` file.
        trust_remote_code: run code that comes with the model.

    Raises:
        UsageError: it cannot be found or read.
    """
    return _load_config(find_source(name), trust_remote_code)


def _load_config(source: Source, trust_remote_code: bool) -> Any:
    with _explained(source):
        from transformers import AutoConfig

        where, keywords = source.arguments()
        return AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **keywords)


def resolve_dtype(dtype: str | torch.dtype, config: Any) -> torch.dtype:
    """Return the dtype that a model is loaded with; ``auto`` is the checkpoint's own, else float32.

    Raises:
        UsageError: an unknown name, or a dtype that no model computes in.
    """
    if isinstance(dtype, torch.dtype):
        if dtype not in DTYPES.values() and dtype != torch.float64:
            raise UsageError(f"dtype={dtype} must be one of {', '.join(DTYPES)}")
        return dtype
    if dtype == "auto":
        own = getattr(config, "dtype", None)
        own = getattr(config.get_text_config(decoder=True), "dtype", None) if own is None else own
        own = getattr(torch, own, None) if isinstance(own, str) else own
        return own if isinstance(own, torch.dtype) else torch.float32
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise unknown_name("dtype", str(dtype), ["auto", *DTYPES])
    return DTYPES[dtype]


def available_devices() -> list[str]:
    """Return devices that a model can be put on here, the best one first."""
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return [*devices, "cpu"]


def resolve_device(device: str) -> torch.device:
    """Return a device; ``auto`` is the best one here.

    Raises:
        UsageError: no such device here.
    """
    known = available_devices()
    if device == "auto":
        return torch.device(known[0])
    if device not in known and f"{device}:0" not in known:
        raise UsageError(
            f"device {device!r} is not available here: choose one of {', '.join(['auto', *known])}"
        )
    return torch.device(device)


def load_model(
    name: str,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    config: Any = None,
    device_map: str | None = None,
    tp_plan: str | None = None,
) -> tuple[Any, Any]:
    """Return a causal language model in evaluation mode, and its tokenizer.

    Args:
        name: hub name, folder or ``.gguf`` file (its weights are dequantised).
        dtype: a torch dtype, ``float32``, ``bfloat16``, ``float16``, or ``auto``: the checkpoint's
            own, float32 for a ``.gguf`` file.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        trust_remote_code: run code that comes with the model.
        config: the result of ``load_config``, if it is there already.
        device_map: passed to ``from_pretrained`` (``auto``: spread over all devices), instead of
            ``device``; needs accelerate.
        tp_plan: passed to ``from_pretrained`` (``auto``: the model's own plan): every process of a
            ``torchrun`` holds a part of each layer.

    Raises:
        UsageError: it cannot be found, read, or put on the device.
    """
    source, place = find_source(name), resolve_device(device)
    spread = _spread(device, device_map, tp_plan)
    if config is None:
        config = _load_config(source, trust_remote_code)
    kind = resolve_dtype(dtype, config)
    with _explained(source):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        where, keywords = source.arguments()
        keywords["trust_remote_code"] = trust_remote_code
        tokenizer = AutoTokenizer.from_pretrained(where, **keywords)
        model: Any = AutoModelForCausalLM.from_pretrained(
            where, config=config, dtype=kind, **spread, **keywords
        )
        if source.kind == "gguf" and source.path is not None:
            _correct_gguf(source.path, model, tokenizer)
    if spread:
        return model.eval(), tokenizer
    try:
        return model.to(place).eval(), tokenizer
    except torch.OutOfMemoryError:
        raise UsageError(
            f"model {name!r} does not fit on {place}: use a smaller dtype or another device"
        ) from None


def _spread(device: str, device_map: str | None, tp_plan: str | None) -> dict[str, str]:
    """Return the arguments of ``from_pretrained`` that divide a model among devices, or none."""
    wanted = {"device_map": device_map, "tp_plan": tp_plan}
    spread = {name: value for name, value in wanted.items() if value is not None}
    given = ({} if device == "auto" else {"device": device}) | spread
    if spread and len(given) > 1:
        both = " and ".join(f"{name}={value!r}" for name, value in given.items())
        raise UsageError(f"{both}: give one of them")
    if tp_plan is not None and "WORLD_SIZE" not in os.environ:
        raise UsageError(
            f"tp_plan={tp_plan!r} needs one process per device: start the command as "
            "torchrun --nproc-per-node 2 -m reasonalloc ..."
        )
    return spread


def _correct_gguf(path: Path, model: Any, tokenizer: Any) -> None:
    """Set the special tokens and the chat template that the file's own metadata names.

    Some releases of transformers derive bos and eos from the vocabulary's order instead, and leave
    a ``quantization_config`` although the weights are dense now.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    for token in ("bos", "eos", "padding", "unknown"):
        field = reader.get_field(f"tokenizer.ggml.{token}_token_id")
        if field is None:
            continue
        number, short = (
            int(field.contents()),
            {"padding": "pad", "unknown": "unk"}.get(token, token),
        )
        setattr(tokenizer, f"{short}_token", tokenizer.convert_ids_to_tokens(number))
        if short != "unk":
            setattr(model.config, f"{short}_token_id", number)
            setattr(model.generation_config, f"{short}_token_id", number)
    template = reader.get_field("tokenizer.chat_template")
    if template is not None:
        tokenizer.chat_template = template.contents()
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = str(path)
