"""Frames over TCP on one machine: a kind and a length, then that many bytes; nothing is unpickled.

Both ends count what they pass to the socket, so that the operating system's own count can be held
against it when a connection is closed.
"""

import contextlib
import fcntl
import socket
import struct
import sys
import termios
import time
from dataclasses import dataclass

from sparsekit.codec.wire import Buffer

HELLO, REQUEST, REPLY, FAILURE, BYE = range(1, 6)
_HEADER = struct.Struct("<BQ")
FRAME_BYTES = _HEADER.size
HOST = "127.0.0.1"
"""The only address that is listened on: other machines are for other engines."""

_PIECE_BYTES = 1 << 18
# Place of bytes_acked and bytes_received, two uint64, in Linux's struct tcp_info since 4.1.
_TCP_INFO_AT, _TCP_INFO_BYTES = 120, 136
_LINGER_SECONDS = 2.0


class BrokenFrameError(Exception):
    """The other end sent what is no frame, or more than is taken."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame as it came."""

    kind: int
    data: bytearray


@dataclass(frozen=True, slots=True)
class Counts:
    """Bytes of one connection, as passed to its socket and as the operating system has counted."""

    sent: int
    received: int
    kernel_sent: int | None
    kernel_received: int | None


class Connection:
    """One end of a connection that carries whole frames."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self.sent = self.received = 0

    def send(self, kind: int, *parts: Buffer, until: float | None = None) -> None:
        """Send one frame.

        Parameters
        ----------
        kind : int
            One of the constants above.
        parts : bytes, bytearray or memoryview
            Its bytes, in order; none are copied.
        until : float, optional
            Time of `time.monotonic` at which to give up with `TimeoutError`.
        """
        for piece in (_HEADER.pack(kind, sum(map(len, parts))), *parts):
            view = memoryview(piece)
            while view:
                self._socket.settimeout(_left(until))
                count = self._socket.send(view[:_PIECE_BYTES])
                self.sent += count
                view = view[count:]

    def receive(self, *, most: int, until: float | None = None) -> Frame:
        """Wait for one frame of at most `most` bytes.

        Raises
        ------
        EOFError
            The other end is gone.
        TimeoutError
            `until` has passed, however steadily bytes were dribbling in.
        BrokenFrameError
            The frame is longer, or its kind unknown.
        """
        kind, length = _HEADER.unpack(self._exactly(FRAME_BYTES, until))
        if not HELLO <= kind <= BYE:
            raise BrokenFrameError(f"a frame of the unknown kind {kind}")
        if length > most:
            raise BrokenFrameError(f"a frame of {length} bytes, at most {most} are taken")
        return Frame(kind, self._exactly(length, until))

    def _exactly(self, count: int, until: float | None) -> bytearray:
        # Memory grows with what has come, not with what was announced.
        data = bytearray()
        while len(data) < count:
            self._socket.settimeout(_left(until))
            piece = self._socket.recv(min(_PIECE_BYTES, count - len(data)))
            if not piece:
                raise EOFError("the other end closed the connection")
            self.received += len(piece)
            data += piece
        return data

    def counts(self, *, linger: bool = True) -> Counts:
        """Compare with the operating system; with `linger` once all that was sent has arrived."""
        if not sys.platform.startswith("linux"):
            return Counts(self.sent, self.received, None, None)
        end = time.monotonic() + _LINGER_SECONDS
        while linger and self._unsent() and time.monotonic() < end:
            time.sleep(0.001)
        raw = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        if len(raw) < _TCP_INFO_BYTES:
            return Counts(self.sent, self.received, None, None)
        acked, received = struct.unpack_from("<QQ", raw, _TCP_INFO_AT)
        return Counts(self.sent, self.received, acked, received)

    def _unsent(self) -> int:
        raw = fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, bytes(4))
        waiting: int = struct.unpack("i", raw)[0]
        return waiting

    def close(self) -> None:
        """Close it, also while another thread waits for it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _left(until: float | None) -> float | None:
    if until is None:
        return None
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline has passed")
    return left
