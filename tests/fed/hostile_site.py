"""A site's process that misbehaves: ``python hostile_site.py FAULTS RUN CACHE SITE PORT FOLDER``.

FAULTS is JSON, ``{site: {round: fault}}``. In all other rounds it is a good site.
"""

import json
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import torch
from torch import Tensor

from sparsekit.codec import decode, encode
from sparsekit.codec.wire import Buffer
from sparsekit.fed import messages
from sparsekit.fed.engines import answers, framed, site_process
from sparsekit.fed.engines.framed import Connection
from sparsekit.fed.site import Site

State = dict[str, Tensor]


def _changed(change: Callable[[State], State]) -> Callable[[Site, bytes], bytes]:
    def answer(site: Site, data: bytes) -> bytes:
        message = messages.unpack(data)
        held = site.held
        assert held is not None
        weights = decode(message.payload, base=held, template=held)
        return messages.pack(message.control, encode(change(weights)))

    return answer


def _with_one(number: float) -> Callable[[State], State]:
    def change(weights: State) -> State:
        first = next(iter(weights))
        spoilt = weights[first].clone()
        spoilt.view(-1)[3] = number
        return weights | {first: spoilt}

    return change


def _stale(site: Site, data: bytes) -> bytes:
    message = messages.unpack(data)
    assert site.held is not None
    other = {name: tensor + 1.0 for name, tensor in site.held.items()}
    moved = {name: tensor + 1e-3 for name, tensor in other.items()}
    return messages.pack(message.control, encode(moved, base=other))


def _replayed(_: Site, data: bytes) -> bytes:
    message = messages.unpack(data)
    control: dict[str, Any] = dict(message.control)
    return messages.pack(control | {"round": control["round"] - 1}, message.payload)


MESSAGES: dict[str, Callable[[Site, bytes], bytes]] = {
    "flipped bit": lambda _, data: data[:-1] + bytes([data[-1] ^ 64]),
    "cut short": lambda _, data: data[:-7],
    "no message": lambda _, data: b"\x80\x04" + os.urandom(len(data)),
    "other shape": _changed(lambda weights: weights | {"out.bias": torch.zeros(2)}),
    "other round": _replayed,
    "other base": _stale,
    "NaN": _changed(_with_one(float("nan"))),
    "infinity": _changed(_with_one(float("-inf"))),
    "far away": _changed(_with_one(1e6)),
}


def _dribble(sock: socket.socket) -> None:
    sock.sendall(struct.pack("<BQ", framed.REPLY, 100_000))
    while True:
        sock.sendall(b"x")
        time.sleep(0.02)


def _half(sock: socket.socket) -> None:
    sock.sendall(struct.pack("<BQ", framed.REPLY, 500) + b"x" * 99)
    sock.shutdown(socket.SHUT_WR)
    time.sleep(3600)


def _raise(_: socket.socket) -> None:
    raise RuntimeError("an error that nobody expected")


# These act on the connection in place of the reply.
WIRES: dict[str, Callable[[socket.socket], object]] = {
    "huge frame": lambda sock: sock.sendall(struct.pack("<BQ", framed.REPLY, 2**62)),
    "unknown frame": lambda sock: sock.sendall(struct.pack("<BQ", 77, 0)),
    "odd failure": lambda sock: sock.sendall(struct.pack("<BQ", framed.FAILURE, 3) + b"{}]"),
    "dribble": _dribble,
    "too slow": lambda _: time.sleep(3600.0),
    "half a reply": _half,
    "exit": lambda _: os._exit(3),
    "exception": _raise,
}


def main() -> None:
    faults: dict[str, str] = json.loads(sys.argv[1]).get(unquote(sys.argv[4]), {})
    good = answers.answer
    wire: list[str] = []

    def answer(site: Site, request: bytes, abandoned: Callable[[], bool]) -> tuple[int, bytes]:
        kind, data = good(site, request, abandoned)
        fault = faults.get(str(messages.unpack(request).control["round"]))
        if fault in WIRES:
            wire.append(fault)
        if fault in MESSAGES:
            data = MESSAGES[fault](site, data)
        return kind, data

    class Hostile(Connection):
        def send(self, kind: int, *parts: Buffer, until: float | None = None) -> None:
            if wire:
                WIRES[wire.pop()](self._socket)
            else:
                super().send(kind, *parts, until=until)

    for name, value in (("answer", answer), ("Connection", Hostile)):
        setattr(site_process, name, value)
    site_process.main(sys.argv[2:])


if __name__ == "__main__":
    main()
