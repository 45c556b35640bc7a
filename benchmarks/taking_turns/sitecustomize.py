"""SuperNodes of one machine that take turns: Python imports this at every start.

A SuperNode takes its message as soon as it is there, and holds it, and its reply, in memory. On
machines of their own all do so at once; eight of them on one machine would need what eight machines
have. Here a SuperNode asks for a message while no other has one, and until its reply is sent. The
file ``TURN`` is locked meanwhile.
"""

import os
import sys

if any("flower-supernode" in argument for argument in sys.orig_argv):
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
