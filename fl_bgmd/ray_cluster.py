"""What all that runs on Ray asks of it: a cluster that answers, its machines, their imports."""

import logging
import os
import socket
import sys
from typing import Any

import ray

OWN = "local"
"""Ray's address for a cluster of one's own.

Without an address it would join any that ran on this machine before, also one that is dead.
"""


def join(address: str, **settings: Any) -> None:
    """Join the cluster at ``HOST:PORT``, or start one of this process's own for an empty address.

    ``settings`` are further ones of ``ray.init``.
    """
    ray.init(
        address=address or OWN,
        log_to_driver=False,
        logging_level=logging.WARNING,
        include_dashboard=None if address else False,
        **settings,
    )


def check_answers(address: str) -> None:
    """Raise ``OSError`` or ``ValueError`` where no cluster answers at ``HOST:PORT``.

    Ray itself would try for twelve minutes.
    """
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=10).close()


def machines() -> list[dict[str, Any]]:
    """Return the machines of the cluster that this process is connected to, as Ray tells them."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def same_imports() -> dict[str, Any]:
    """Return the ``runtime_env`` in which workers find what this process finds.

    An app's module, rules of one's own.
    """
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}}
