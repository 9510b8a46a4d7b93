"""What the loop waits for on a channel: packets, room for those that are queued, or a while where the system is short of something.

Owns the channel's place in the loop, from its making to `end()`, which comes before the channel is closed. Threads: the loop's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from dpdkmem.primary.loop import READABLE, WRITABLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from dpdkmem.primary.loop import Loop
    from dpdkmem.shared.channel import SeqpacketChannel

_RETRY_S: Final = 0.005  # until a send that the system, not the peer, had no room for is tried again


class ChannelWatch:
    """The events of one channel.

    Args:
        loop: that waits for them.
        channel: whose; stays the caller's.
        on_events: gets READABLE, WRITABLE, or both.
    """

    __slots__ = ("_channel", "_has_ended", "_loop", "_on_events", "_watched")

    def __init__(self, loop: Loop, channel: SeqpacketChannel, on_events: Callable[[int], None]) -> None:
        self._loop = loop
        self._channel = channel
        self._on_events = on_events
        self._watched = READABLE
        self._has_ended = False
        loop.add(channel.fileno(), READABLE, on_events)

    def update(self, *, reads: bool = True) -> None:
        """Wait for what the channel wants by now; to be called when packets were sent, queued or read.

        Args:
            reads: whether its user takes more packets at this moment.
        """
        if self._has_ended:
            return
        if self._channel.needs_retry:
            self._loop.call_later(_RETRY_S, self._retry)
        wanted = (READABLE if reads else 0) | (WRITABLE if self._channel.wants_write else 0)
        if wanted != self._watched:
            self._watched = wanted
            self._loop.modify(self._channel.fileno(), wanted)

    def end(self) -> None:
        """Wait for nothing more; once, while the channel is open."""
        self._has_ended = True
        self._loop.remove(self._channel.fileno())

    def _retry(self) -> None:
        if not self._has_ended:
            self._on_events(WRITABLE)
