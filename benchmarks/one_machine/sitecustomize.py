"""What lets many machines be one: Python imports this at every start.

SuperNodes take turns. A SuperNode takes its message as soon as it is there, and holds it, and its
reply, in memory. On machines of their own all do so at once; eight of them on one machine would
need what eight machines have. Here a SuperNode asks for a message while no other has one, and until
its reply is sent; the file ``TURN`` is locked meanwhile.

The SuperLink is patient with its disk, which all of them share: Flower's own gives its database 5
seconds to be written, then answers with an error, at which a SuperNode ends.
"""

import os
import sys


def runs(program):
    """Whether this process is one of Flower's programs."""
    return any(program in argument for argument in sys.orig_argv)


if runs("flower-superlink"):
    from flwr.supercore import sql_mixin

    patient = {"busy_timeout": "600000", "synchronous": "OFF"}
    sql_mixin.SQLITE_PRAGMAS = tuple((dict(sql_mixin.SQLITE_PRAGMAS) | patient).items())

if runs("flower-supernode"):
    import fcntl

    from flwr.supernode import start_client_internal as node

    turn = open(os.environ["TURN"], "w")  # noqa: SIM115 - as long as the process lives
    pull, push = node._pull_and_store_message, node._push_messages

    def pull_in_turn(**given):
        """Ask for a message; the turn lasts where there is one."""
        fcntl.flock(turn, fcntl.LOCK_EX)
        run = pull(**given)
        if run is None:
            fcntl.flock(turn, fcntl.LOCK_UN)
        return run

    def push_and_pass(**given):
        """Send the reply; the next one's turn."""
        try:
            push(**given)
        finally:
            fcntl.flock(turn, fcntl.LOCK_UN)

    node._pull_and_store_message, node._push_messages = pull_in_turn, push_and_pass
