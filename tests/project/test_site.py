"""The documentation site, without building it: pages, navigation, links."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import simulations

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SPEC = importlib.util.spec_from_file_location("mkdocs_hooks", ROOT / "mkdocs_hooks.py")
assert SPEC is not None
assert SPEC.loader is not None
HOOKS = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(HOOKS)
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
WRITTEN = {
    str(path.relative_to(DOCS))
    for path in DOCS.rglob("*.md")
    if not path.is_relative_to(DOCS / "results")
}


def named(nav: Any) -> Iterator[str]:
    """Yield the pages of a navigation."""
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from named(part)


def text_of(page: str) -> str:
    return (ROOT / HOOKS.PAGES[page] if page in HOOKS.PAGES else DOCS / page).read_text()


def test_the_navigation_names_every_page_once() -> None:
    pages = list(named(SITE["nav"]))
    assert sorted(pages) == sorted(WRITTEN | HOOKS.PAGES.keys())


def test_the_reference_has_every_module_that_declares_what_is_public() -> None:
    shown = "".join(text_of(page) for page in WRITTEN if page.startswith("api/"))
    documented = {*re.findall(r"^::: ([\w.]+)", shown, re.M)}
    folders = {name: ROOT / name for name in ("strategies", "clients", "simulations")}
    public = {f"fl_bgmd.{name}" for name in folders}
    for path in [*(ROOT / "fl_bgmd").glob("*.py"), *(ROOT / "fl_bgmd").glob("*/__init__.py")]:
        if re.search("^__all__", path.read_text(), re.M):
            public.add(f"fl_bgmd.{path.parent.name if path.stem == '__init__' else path.stem}")
    assert public - documented == {"fl_bgmd.simulations"}  # whose names come from its modules
    for name in set(simulations.__all__) - {"main"}:
        assert re.search(rf"members: \[.*\b{name}\b", shown), name


@pytest.mark.parametrize("page", sorted(WRITTEN | HOOKS.PAGES.keys()))
def test_links_lead_somewhere(page: str) -> None:
    """To a file of the repository, and to a heading of it where they name one."""
    home = ROOT if page in HOOKS.PAGES else (DOCS / page).parent
    prose = re.sub(r"^( *)```.*?^\1```", "", text_of(page), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        there = (home / path).resolve() if path else (ROOT / HOOKS.PAGES.get(page, f"docs/{page}"))
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", there.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}
            assert anchor in slugs, target


@pytest.mark.parametrize(
    ("text", "page", "expected"),
    [
        ("[a](../SECURITY.md#x)", "deployment.md", "[a](security.md#x)"),
        ("![a](docs/quickstart.png)", "index.md", "![a](quickstart.png)"),
        ("[a](docs/memory.md)", "security.md", "[a](memory.md)"),
        ("[a](../other-apps.md)", "api/legacy.md", "[a](../other-apps.md)"),
        ("[an app](../examples/numpy)", "other-apps.md", "an app (`examples/numpy`)"),
        ("[`examples/own`](examples/own)", "contributing.md", "`examples/own`"),
        ("[a](https://flower.ai) [b](#here)", "index.md", "[a](https://flower.ai) [b](#here)"),
    ],
)
def test_links_between_files_become_links_between_pages(
    text: str, page: str, expected: str
) -> None:
    known = {*WRITTEN, *HOOKS.PAGES, "quickstart.png"}
    assert HOOKS.with_links(text, page, known) == expected


def test_what_belongs_to_an_item_is_indented_as_the_site_needs_it() -> None:
    text = "1. An item\n   ```\n   code\n   ```\n- Another\n\n  | a |\n\n```\nx \\\n  --y\n```\n"
    assert HOOKS.with_indents(text) == (
        "1. An item\n    ```\n    code\n    ```\n- Another\n\n    | a |\n\n```\nx \\\n  --y\n```\n"
    )


def test_the_site_asks_nothing_of_other_servers() -> None:
    assert SITE["theme"]["font"] is False
    assert SITE["strict"] is True


def test_nobody_is_told_to_stop_what_is_not_theirs() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*")]
    for page in (page for page in pages if page.is_file() and page.suffix != ".npz"):
        text = page.read_text(errors="replace")
        assert "pkill" not in text, page
        assert "killall" not in text, page
