"""What a hostile operator does to a machine of his own: Python imports this at every start.

The SuperNode still fetches the honest app from the SuperLink and runs it; what leaves the machine
is decided here. ``HOSTILE`` is ``bit-flip`` (-100 times the update) or ``malformed`` (another
broken reply in each round, at last none). ``KEPT``, if given, is a file for a line a message: the
round, and what the client had kept in its context before.
"""

import os
import sys
import time

BREAKAGES = ("keys", "shape", "non-finite", "encoding", "array-records", "silence")
"""What round 1, 2, ... breaks, in the words of ``fl_bgmd.replies.Rejection``."""


def flip(message, reply):
    """Send -100 times the update."""
    sent, trained = message.content["arrays"], reply.content["arrays"]
    for key, array in trained.items():
        before, after = sent[key].numpy(), array.numpy()
        trained[key] = Array((before + 100 * (before - after)).astype(before.dtype))


def malform(message, reply):
    """Break the reply in this round's way."""
    server_round = int(message.content["config"]["server-round"])
    breakage = BREAKAGES[(server_round - 1) % len(BREAKAGES)]
    arrays = reply.content["arrays"]
    key, array = next(iter(arrays.items()))
    if breakage == "keys":
        del arrays[key]
    elif breakage == "shape":
        arrays[key] = Array(array.numpy()[:1])
    elif breakage == "non-finite":
        arrays[key] = Array(array.numpy() * float("nan"))
    elif breakage == "encoding":
        arrays[key] = Array(array.dtype, array.shape, array.stype, b"no array at all")
    elif breakage == "array-records":
        del reply.content["arrays"]
    else:
        time.sleep(3600)


if any("flwr-clientapp" in argument for argument in sys.orig_argv):
    from flwr.app import Array
    from flwr.clientapp import ClientApp

    honest = ClientApp.__call__
    lie = {"bit-flip": flip, "malformed": malform}[os.environ["HOSTILE"]]

    def hostile(self, message, context):
        """Run the honest app, then lie."""
        if "KEPT" in os.environ:
            with open(os.environ["KEPT"], "a") as file:
                print(message.content["config"]["server-round"], *context.state, file=file)
        reply = honest(self, message, context)
        lie(message, reply)
        return reply

    ClientApp.__call__ = hostile
