"""Hooks of the docs site: links to files outside docs/ lead to the repository."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[1]
_LINK_TO_REPOSITORY = re.compile(r"\]\(((?:\.\./)+)([^)#\s]+)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Turn links such as ../src/x.py, which work in a checkout, into links to the repository."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def link(match: re.Match[str]) -> str:
        target = (folder / match[1] / match[2]).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return match[0]
        if not target.exists():
            raise PluginError(f"docs/{page.file.src_uri} links to {match[1]}{match[2]}, which does not exist")
        return f"]({config.repo_url}/{'tree' if target.is_dir() else 'blob'}/main/{target.relative_to(ROOT).as_posix()}"

    return _LINK_TO_REPOSITORY.sub(link, markdown)
