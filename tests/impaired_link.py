"""A slow, lossy cable for kernels without ``tc netem``: forward frames between two interfaces.

``python impaired_link.py A B SECONDS LOSS``: a frame that arrives on one interface leaves by the
other SECONDS later, or never with probability LOSS. Needs root; runs until it is killed.
"""

import heapq
import random
import selectors
import socket
import sys
import time

SOL_PACKET, PACKET_VNET_HDR = 263, 15
EVERY_PROTOCOL = 0x0003


def attach(interface: str) -> socket.socket:
    """Open a raw socket that sees the frames of an interface."""
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(EVERY_PROTOCOL))
    # Virtual cables leave checksums to be filled in later; this header says so and travels along.
    raw.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    raw.bind((interface, EVERY_PROTOCOL))
    return raw


def forward(first: str, second: str, delay: float, loss: float) -> None:
    """Forward frames both ways forever."""
    ends = attach(first), attach(second)
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    chance = random.Random(0)
    waiting: list[tuple[float, int, socket.socket, bytes]] = []
    selector = selectors.DefaultSelector()
    for end in ends:
        selector.register(end, selectors.EVENT_READ)
    count = 0
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for key, _ in selector.select(timeout):
            end = key.fileobj
            assert isinstance(end, socket.socket)
            frame, (_, _, kind, *_) = end.recvfrom(1 << 17)
            if kind != socket.PACKET_OUTGOING and chance.random() >= loss:
                count += 1
                heapq.heappush(waiting, (time.monotonic() + delay, count, other[end], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, end, frame = heapq.heappop(waiting)
            end.send(frame)


if __name__ == "__main__":
    forward(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
