"""The documentation site: pages that live outside ``docs/``, and links that leave it."""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent

PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
}
"""Pages of the site and the files of the repository that they show."""

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that live elsewhere."""
    from mkdocs.structure.files import File

    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links between files of the repository into links between pages."""
    known = {file.src_uri for file in files}
    return with_links(with_indents(markdown), page.file.src_uri, known)


def with_indents(markdown: str) -> str:
    """Return a text in which what belongs to a list's item is indented by four spaces.

    GitHub is content with two or three, the site's Markdown is not. Code blocks that belong to no
    item stay as they are.
    """
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    parts[::2] = [re.sub(r"^ {2,3}(?=\S)", "    ", part, flags=re.M) for part in parts[::2]]
    return "".join(parts)


def with_links(markdown: str, uri: str, known: set[str]) -> str:
    """Return a page's text with links as they are right in the site.

    Parameters
    ----------
    markdown : str
        As it stands in the repository, where links go by files.
    uri : str
        The page.
    known : set of str
        All pages and files of the site. What a link names that is not there becomes text: its
        place in the repository.
    """
    home = posixpath.dirname(PAGES.get(uri, f"docs/{uri}"))
    pages = {source: page for page, source in PAGES.items()}

    def replaced(link: re.Match[str]) -> str:
        mark, text, target = link.groups()
        path, _, anchor = target.partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return link.group()
        path = posixpath.normpath(posixpath.join(home, path))
        there = pages.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        if there in known:
            place = os.path.relpath(there, posixpath.dirname(uri) or ".")
            return f"{mark}[{text}]({place}{'#' if anchor else ''}{anchor})"
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    return _LINK.sub(replaced, markdown)
