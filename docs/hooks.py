"""What mkdocs runs: pages of ``benchmarks/`` that the documentation links to join the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\]\(\.\./((?:benchmarks|src)/[^)#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside the documentation that a page links to, under its own path."""
    pages = [file for file in files if file.is_documentation_page()]
    wanted = {target for page in pages for target in _LINK.findall(page.content_string)}
    for target in sorted(wanted):
        path = _ROOT / target
        if path.is_dir():
            listing = "\n".join(f"- `{p.name}`" for p in sorted(path.iterdir()) if p.is_file())
            page = f"{target}/index.md"
            files.append(File.generated(config, page, content=f"# {target}\n\n{listing}\n"))
        elif path.is_file():
            files.append(File.generated(config, target, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links that lead out of ``docs/`` in the repository to the files of the site."""

    def inside(match: re.Match[str]) -> str:
        target = match.group(1)
        return f"]({target}/index.md" if (_ROOT / target).is_dir() else f"]({target}"

    return _LINK.sub(inside, markdown)
