"""Who imports whom: servers nothing of clients, clients nothing of servers."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("side", "other"),
    [
        ("simulations.server_app", ("clients", "fl_bgmd.clients")),
        ("fl_bgmd.strategies.legacy", ("clients", "fl_bgmd.clients", "simulations")),
        ("clients.client_app", ("strategies", "fl_bgmd.strategies", "simulations")),
    ],
)
def test_the_two_sides_do_not_import_each_other(side: str, other: tuple[str, ...]) -> None:
    code = f"import sys, {side}; print(*(name for name in {other!r} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
