"""What has to hold before a version is published."""

import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
STANDS_IN = ("pyproject.toml", "fl_bgmd/__init__.py", "CITATION.cff")


@pytest.fixture
def release(tmp_path: Path) -> dict[str, Any]:
    """Return the script's functions, about a repository of their own."""
    found = runpy.run_path(str(ROOT / ".ci" / "release"))
    (tmp_path / "fl_bgmd").mkdir()
    for name in STANDS_IN:
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    found["version"].__globals__["ROOT"] = tmp_path
    git(tmp_path, "init", "--quiet")
    commit(tmp_path, "# Changelog\n\n## [Unreleased]\n")
    return found


def git(folder: Path, *command: str) -> None:
    names = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost")
    subprocess.run(["git", *names, *command], cwd=folder, check=True, capture_output=True)


def commit(folder: Path, changes: str) -> None:
    (folder / "CHANGELOG.md").write_text(changes)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "changes")


@pytest.mark.parametrize("name", STANDS_IN)
def test_the_version_is_one_wherever_it_stands(
    release: dict[str, Any], tmp_path: Path, name: str
) -> None:
    number = release["version"]()
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text.replace(number, "9.9.9"))
    with pytest.raises(SystemExit, match=r"the version is .*9\.9\.9.*; allowed: one"):
        release["version"]()


def test_what_is_published_is_tagged_committed_and_in_the_changelog(
    release: dict[str, Any], tmp_path: Path
) -> None:
    number, check = release["version"](), release["check_commit"]
    with pytest.raises(SystemExit, match=rf"tags of this commit are \[\]; allowed: with v{number}"):
        check(number)
    git(tmp_path, "tag", f"v{number}")
    with pytest.raises(SystemExit, match=rf"CHANGELOG\.md has no section \[{number}\]"):
        check(number)
    commit(tmp_path, f"# Changelog\n\n## [{number}] - 2026-01-01\n")
    with pytest.raises(SystemExit, match="tags of this commit are"):
        check(number)
    git(tmp_path, "tag", "--force", f"v{number}")
    check(number)
    (tmp_path / "more").touch()
    with pytest.raises(SystemExit, match="the working tree has changes"):
        check(number)
