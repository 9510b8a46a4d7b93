"""Messages between programs, as a program uses them: DPDK's rte_mp_* as methods of the memory, on both sides.

Owns what becomes of an exception in a handler: it is logged, counted, and answers the request that it was called for, so that nobody
waits for a reply that will not come. The threads, the queue and the matching of replies are the C library's (native/ipc.h), the
way from process to process is the primary's (primary/ipc_router.py): the same for C programs.

Rules: handlers and completions of a process run one at a time on a thread of the library's, and while one of them waits in
`mp_request_sync()` or `mp_sendmsg()` others go on. Inside them, and inside memory event callbacks, everything is allowed but closing
the memory.
"""

from __future__ import annotations

import errno
import logging
import threading
from typing import TYPE_CHECKING, Final

from dpdkmem.native.ipc import MpChannel
from dpdkmem.shared.errors import DpdkmemError, LifetimeError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from dpdkmem.native import Memory
    from dpdkmem.shared.ipc_model import MpMessage, MpPeer, MpReceived, MpReplies, MpTo

    Handler: TypeAlias = Callable[[MpReceived, MpPeer], object]
    Completion: TypeAlias = Callable[[MpReplies, DpdkmemError | None], object]

_LOG: Final = logging.getLogger("dpdkmem")
_DEFAULT_TIMEOUT_MS: Final = 5000  # DPDK's own, of its requests for memory


class MpUser:
    """The part of `UserMemory` that sends and receives messages. Threads: any.

    Args:
        memory: as of `UserMemory`.
    """

    def __init__(self, memory: Memory) -> None:
        self._mp = MpChannel(memory)
        self._mp_running_on: set[int] = set()
        self._n_mp_errors = 0

    def mp_action_register(self, name: str, callback: Handler) -> None:
        """Call `callback(received, peer)` for each message and request of that name, in order of arrival.

        A request (peer.request_id is not 0) is answered by `mp_reply`, inside the callback or later, from any thread. What the
        callback raises answers it with EIO and the words of the exception.

        Args:
            name: 1 to 63 bytes, without control characters.
            callback: what of `received.fds` it does not take is closed when it returns.

        Raises:
            ResourceError: EINVAL, E2BIG; EEXIST, it is registered already; ETIMEDOUT, the primary does not answer.
            PeerGone: the primary is gone.
            Unsupported: a primary that serves no secondaries.
            LifetimeError: the attachment ended.
        """
        self._mp_open()
        self._mp.register(name, _Call(self, name, callback))

    def mp_action_unregister(self, name: str) -> None:
        """Undo `mp_action_register`. The callback is not called any more once this returns.

        Raises:
            ResourceError: ENOENT, EINVAL, E2BIG.

        Blocks: until a call that runs has returned, except inside handlers.
        """
        self._mp.unregister(name, is_inside=threading.get_ident() in self._mp_running_on)

    def mp_sendmsg(self, message: MpMessage, to: MpTo = None) -> None:
        """Send a message that has no reply; returns once it waits at its receivers.

        Args:
            message: its descriptors stay the caller's.
            to: whom for; see `MpTo`.

        Raises:
            ResourceError: EINVAL, E2BIG; ESRCH, there is no such process; ENOENT, it has not registered the action; ENOTUNIQ;
                EAGAIN, its queue is full; EMFILE, the primary is out of descriptors; ETIMEDOUT; EBADF.
            PeerGone, Unsupported, LifetimeError: as `mp_action_register`.

        Blocks: until the primary has passed it on, at most 5 s.
        """
        self._mp_open()
        self._mp.sendmsg(to, message)

    def mp_request_sync(
        self,
        message: MpMessage,
        timeout_ms: int = _DEFAULT_TIMEOUT_MS,
        to: MpTo = None,
        *,
        partial: bool = False,
    ) -> MpReplies:
        """Send a request and wait until all its receivers have replied; return the replies.

        Args:
            message: its descriptors stay the caller's.
            timeout_ms: for all replies together.
            to: whom for; see `MpTo`. To nobody, where all are meant, is no error.
            partial: return what came also if not all replied: `failures` tells of those that said why.

        Raises:
            PeerGone: a receiver died or detached before it replied: told at once. Or the primary is gone.
            ResourceError: ETIMEDOUT, the text names who has not replied; EDEADLK, 32 handlers of this process wait for requests
                of theirs; a handler's own errno; and as `mp_sendmsg`.
            Unsupported, LifetimeError: as `mp_action_register`.

        Blocks: at most timeout_ms (and 0.1 s if the primary is stopped).
        """
        self._mp_open()
        replies, error = self._mp.request_sync(to, message, timeout_ms)
        if error is None or (partial and replies.nb_sent):
            return replies
        replies.close()
        raise error

    def mp_request_async(
        self, message: MpMessage, callback: Completion, timeout_ms: int = _DEFAULT_TIMEOUT_MS, to: MpTo = None
    ) -> None:
        """Send a request; `callback(replies, error)` is called exactly once, on the thread of handlers.

        Args:
            message: its descriptors stay the caller's.
            callback: error is None, or what `mp_request_sync` would raise; descriptors that it does not take are closed after it.
            timeout_ms: as `mp_request_sync`.
            to: whom for; see `MpTo`.

        Raises:
            ResourceError: EINVAL, E2BIG, EAGAIN: the callback is not called.
            PeerGone, Unsupported, LifetimeError: as `mp_action_register`.
        """
        self._mp_open()
        self._mp.request_async(to, message, timeout_ms, _Completion(self, message.name, callback))

    def mp_reply(self, message: MpMessage, peer: MpPeer) -> None:
        """Answer a request; one that comes too late is dropped.

        Args:
            message: its descriptors stay the caller's.
            peer: that the callback got.

        Raises:
            ResourceError: EINVAL, peer made no request; E2BIG; EBADF.
            PeerGone, LifetimeError: the attachment ended.
        """
        self._mp.reply(message, peer)

    def mp_reply_error(self, number: int, text: str, peer: MpPeer) -> None:
        """Answer a request with an errno and words, which is what the requester's call raises; else as `mp_reply`."""
        self._mp.reply_error(number, text, peer)

    @property
    def n_mp_errors(self) -> int:
        """How often handlers and completions raised."""
        return self._n_mp_errors

    def mp_check_outside(self) -> None:
        """Refuse what a handler cannot do.

        Raises:
            LifetimeError: called from inside a handler or a completion.
        """
        if threading.get_ident() in self._mp_running_on:
            raise LifetimeError("a handler of messages cannot close the memory that calls it")

    def _mp_open(self) -> None:
        """Open the channel if the C library cannot do that by itself: in a primary."""

    def mp_call(self, name: str, call: Callable[[], object]) -> BaseException | None:
        """Call code of the program's on a thread of the library's; return what it raised."""
        ident = threading.get_ident()
        self._mp_running_on.add(ident)
        try:
            call()
        except Exception as error:  # noqa: BLE001 - a boundary: the caller is C, and other people's messages come next
            self._n_mp_errors += 1
            _LOG.exception("handler of %r failed", name)
            return error
        finally:
            self._mp_running_on.discard(ident)
        return None


class _Call:
    """A handler as C calls it."""

    __slots__ = ("_callback", "_name", "_user")

    def __init__(self, user: MpUser, name: str, callback: Handler) -> None:
        self._user = user
        self._name = name
        self._callback = callback

    def __call__(self, received: MpReceived) -> None:
        peer = received.peer
        error = self._user.mp_call(self._name, lambda: self._callback(received, peer))
        if error is not None and peer.request_id:
            number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
            try:
                words = error.text if isinstance(error, ResourceError) else f"{type(error).__name__}: {error}"
                self._user.mp_reply_error(number, words, peer)
            except DpdkmemError as failed:
                _LOG.debug("no reply to %r: %s", self._name, failed)


class _Completion:
    """A completion as C calls it."""

    __slots__ = ("_callback", "_name", "_user")

    def __init__(self, user: MpUser, name: str, callback: Completion) -> None:
        self._user = user
        self._name = name
        self._callback = callback

    def __call__(self, replies: MpReplies, error: DpdkmemError | None) -> None:
        self._user.mp_call(self._name, lambda: self._callback(replies, error))
