"""Ports for the servers and process groups of tests."""

import random
import socket
from pathlib import Path


def free_port() -> int:
    """A free port below the range that the system assigns to outgoing connections.

    The server needs seconds to start listening; meanwhile the system could assign a port from its own range again.
    """
    first_given_by_system = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(10_000, first_given_by_system)
    while True:
        port = random.SystemRandom().choice(candidates)  # tests seed the global generator
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
