"""vLLM's next release on a CPU before its CPU build exists.

``python overlay.py SDIST FOLDER`` writes the Python of a source distribution of vLLM into FOLDER,
with links to the compiled libraries of this Python's CPU build. ``PYTHONPATH=FOLDER`` uses it.
"""

from __future__ import annotations

import importlib.util
import sys
import tarfile
from pathlib import Path

METADATA = "Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"


def overlay(sdist: Path, folder: Path) -> None:
    """Write an empty folder."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SystemExit("this Python has no vLLM: install its CPU build first")
    root = sdist.name.removesuffix(".tar.gz")
    with tarfile.open(sdist) as archive:
        for member in archive:
            if member.name.startswith(f"{root}/vllm/"):
                member.name = member.name.removeprefix(f"{root}/")
                archive.extract(member, folder, filter="data")
    for library in Path(spec.origin).parent.rglob("*.so"):
        link = folder / "vllm" / library.relative_to(Path(spec.origin).parent)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(library)
    # vLLM takes a version with "cpu" in it for a CPU build.
    version = f"{root.removeprefix('vllm-')}+cpu"
    information = folder / f"vllm-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(METADATA.format(version=version))
    (information / "top_level.txt").write_text("vllm\n")


if __name__ == "__main__":
    overlay(Path(sys.argv[1]), Path(sys.argv[2]))
