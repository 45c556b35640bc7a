"""Flower's private names stand in one module."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = {"app", "clientapp", "serverapp", "client", "server", "common"}


def test_only_one_module_imports_what_is_private() -> None:
    found = {}
    for folder in ("fl_bgmd", "strategies", "clients", "simulations"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flwr."):
                    part = (node.module or "").split(".")[1]
                    if part not in PUBLIC:
                        found.setdefault(str(file.relative_to(ROOT)), set()).add(part)
    assert found == {"fl_bgmd/flower.py": {"supercore", "simulation"}}
