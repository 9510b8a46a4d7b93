"""Stream sockets with descriptors, for protocols that are not ours: vhost-user.

Owns nothing but the kind of socket: a `SeqpacketChannel` in which packets have no borders. Its user asks `recv()` for no more
bytes than the message at hand lacks, so what comes with them belongs to that message.

Rule: what is sent in one call must be small, at most a few hundred bytes: Linux takes it as one piece or refuses it with EAGAIN
(net/unix/af_unix.c unix_stream_sendmsg(): one buffer of up to SO_SNDBUF / 2), so nothing is ever sent in part.
"""

from __future__ import annotations

import socket
from typing import ClassVar

from dpdkmem.shared.channel import SeqpacketChannel


class StreamChannel(SeqpacketChannel):
    """One SOCK_STREAM connection; the rest is the base class's."""

    KIND: ClassVar[int] = socket.SOCK_STREAM
    ABSENT: ClassVar[str] = "start the other side, or name the socket that it listens on"
