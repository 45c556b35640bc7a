"""Who imports whom: servers nothing of clients, clients nothing of servers."""

import pytest
from warm_python import run_code


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
    found = run_code(code)
    assert (found.returncode, found.stdout.split()) == (0, []), found.stderr
