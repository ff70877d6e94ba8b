"""Refuses connections beyond the networks that tests may use, in every Python that they start.

Python imports this module by itself where its folder stands on PYTHONPATH; tests/conftest.py puts
it there, and takes it in too. ``SPARSEKIT_TEST_NETWORKS`` widens it for the processes of a test
that makes network namespaces of its own. Refusals go to the file ``SPARSEKIT_TEST_REFUSALS``, as a
library may swallow the error. Names are looked up before the guard sees an address.
"""

import os
import sys

LOOPBACK = "127.0.0.0/8 ::1/128"
_EVENTS = ("socket.connect", "socket.sendto", "socket.sendmsg")


def is_allowed(host: str) -> bool:
    """Whether tests may send to this address."""
    import ipaddress

    if host in ("", "localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    networks = os.environ.get("SPARSEKIT_TEST_NETWORKS", LOOPBACK).split()
    return any(address in ipaddress.ip_network(network) for network in networks)


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if event not in _EVENTS:
        return
    import socket

    sock, address = arguments[0], arguments[1]
    internet = getattr(sock, "family", None) in (socket.AF_INET, socket.AF_INET6)
    if not internet or not isinstance(address, tuple) or is_allowed(str(address[0])):
        return
    text = f"{event} to {address} by process {os.getpid()}: {' '.join(sys.argv)[:200]}"
    path = os.environ.get("SPARSEKIT_TEST_REFUSALS")
    if path:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(text + "\n")
    raise PermissionError(f"tests stay on this machine: {text}")


sys.addaudithook(_hook)
