"""Ports for the servers and process groups of tests."""

import random
import socket
from pathlib import Path


def free_port() -> int:
    """A port that nothing holds, below those that the system gives to outgoing connections.

    What is to listen there needs seconds to start, in which the system could give a port of its own choice away again.
    """
    first_given_by_system = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(10_000, first_given_by_system)
    while True:
        port = random.SystemRandom().choice(candidates)  # tests seed the other generator
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
