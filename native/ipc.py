"""Messages of programs through the C library: dm_mp_* with values of shared/ipc_model.py, errno turned into our errors.

Owns the two functions that C calls back and the handles that they come with; the rules are those of native/__init__.py. The C
library takes the descriptors out of what it received as soon as they are in an FdBundle here: from then on Python closes them.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from dpdkmem.native import check
from dpdkmem.native._dpdkmem import ffi, lib
from dpdkmem.shared.errors import DpdkmemError, InternalError, ResourceError
from dpdkmem.shared.fds import FdBundle
from dpdkmem.shared.ipc_model import (
    MAX_FDS,
    MAX_NAME_BYTES,
    MAX_PARAM_BYTES,
    MpFailure,
    MpPeer,
    MpReceived,
    MpReplies,
    MpTarget,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from dpdkmem.native import Memory
    from dpdkmem.shared.ipc_model import MpMessage, MpTo

    Action: TypeAlias = Callable[[MpReceived], None]
    Completion: TypeAlias = Callable[[MpReplies, DpdkmemError | None], None]

_SESSION_ID_BYTES: Final = 16
_NAME_BYTES: Final = 31
_INT_MAX: Final = 0x7FFF_FFFF


class MpChannel:
    """What one memory's programs send and receive. Threads: any."""

    __slots__ = ("_actions", "_completions", "_memory", "_retired")

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._actions: dict[str, Any] = {}  # handles that C refers to
        self._completions: set[Any] = set()
        self._retired: list[Any] = []
        """Handles of actions that a handler unregistered: another thread of handlers may be about to use one."""

    def register(self, name: str, action: Action) -> None:
        """Call `action` for each message and request of that name; what it raises is logged and answers the request.

        Raises:
            ResourceError: EINVAL, E2BIG, EEXIST.
            PeerGone, LifetimeError, Unsupported: nobody can send anything here.
        """
        handle = ffi.new_handle(action)
        m = self._memory._alive()  # noqa: SLF001 - of this package
        rc: int = lib.dm_mp_action_register(m, _c_name(name), lib.dmpy_mp_action, handle)
        self._check(rc, f"register action {name!r}")
        self._actions[name] = handle

    def unregister(self, name: str, *, is_inside: bool) -> None:
        """Undo `register`; returns when no call runs any more, except inside a handler.

        Args:
            name: of the action.
            is_inside: called inside a handler or a completion.

        Raises:
            ResourceError: ENOENT, EINVAL, E2BIG.
        """
        rc: int = lib.dm_mp_action_unregister(self._memory._alive(), _c_name(name))  # noqa: SLF001
        self._check(rc, f"unregister action {name!r}")
        handle = self._actions.pop(name, None)
        if is_inside:
            self._retired.append(handle)

    def sendmsg(self, to: MpTo, message: MpMessage) -> None:
        """Send a message. Blocks: until the primary has passed it on.

        Raises:
            ResourceError: EINVAL, E2BIG, ESRCH, ENOENT, ENOTUNIQ, EAGAIN, EMFILE, ETIMEDOUT.
            PeerGone, LifetimeError, Unsupported: as `register`.
        """
        rc: int = lib.dm_mp_sendmsg(self._memory._alive(), _c_target(to), _c_message(message))  # noqa: SLF001
        self._check(rc, f"send message {message.name!r}")

    def request_sync(
        self, to: MpTo, message: MpMessage, timeout_ms: int
    ) -> tuple[MpReplies, DpdkmemError | None]:
        """Send a request; return what came of it, and why not everything, if so.

        Raises:
            ResourceError: EINVAL, E2BIG: nothing was sent.
        """
        out = ffi.new("struct dm_mp_replies *")
        m = self._memory._alive()  # noqa: SLF001 - of this package
        rc: int = lib.dm_mp_request_sync(m, _c_target(to), _c_message(message), _c_timeout(timeout_ms), out)
        error = self._error(rc, f"request {message.name!r}")
        try:
            return _replies(out), error
        finally:
            lib.dm_mp_replies_free(out)

    def request_async(self, to: MpTo, message: MpMessage, timeout_ms: int, completion: Completion) -> None:
        """Send a request; `completion` is called exactly once, on the thread of handlers.

        Raises:
            ResourceError: EINVAL, E2BIG, EAGAIN: it is not called.
            PeerGone, LifetimeError, Unsupported: as `register`.
        """
        handle = ffi.new_handle((self, completion))
        self._completions.add(handle)
        m = self._memory._alive()  # noqa: SLF001 - of this package
        rc: int = lib.dm_mp_request_async(
            m, _c_target(to), _c_message(message), _c_timeout(timeout_ms), lib.dmpy_mp_async, handle
        )
        if rc < 0:
            self._completions.discard(handle)
            self._check(rc, f"request {message.name!r}")

    def reply(self, message: MpMessage, peer: MpPeer) -> None:
        """Answer a request.

        Raises:
            ResourceError: EINVAL, E2BIG.
            PeerGone, LifetimeError: the attachment ended.
        """
        rc: int = lib.dm_mp_reply(self._memory._alive(), _c_message(message), _c_peer(peer))  # noqa: SLF001
        self._check(rc, f"reply {message.name!r}")

    def reply_error(self, number: int, text: str, peer: MpPeer) -> None:
        """Answer a request with an errno and words; raises as `reply`."""
        m = self._memory._alive()  # noqa: SLF001 - of this package
        rc: int = lib.dm_mp_reply_error(m, -number, text.encode(errors="replace"), _c_peer(peer))
        self._check(rc, "reply")

    def adopt(self, fd: int) -> None:
        """Use a channel whose other end the primary's router has; fd is taken, also if this raises."""
        check(lib.dm_mp_adopt(self._memory._alive(), fd), "open the channel for messages")  # noqa: SLF001

    def completed(self, handle: Any) -> None:
        """Let go of what a completion was called with."""
        self._completions.discard(handle)

    def _check(self, rc: int, what: str) -> None:
        if rc < 0:
            check(rc, what, text=self._memory._text())  # noqa: SLF001 - of this package

    def _error(self, rc: int, what: str) -> DpdkmemError | None:
        try:
            self._check(rc, what)
        except DpdkmemError as error:
            return error
        return None


def _callback_failed(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    import logging

    logging.getLogger("dpdkmem").error("a callback from C failed", exc_info=(kind, error, traceback))


@ffi.def_extern(error=-errno.EIO, onerror=_callback_failed)  # type: ignore[untyped-decorator]
def dmpy_mp_action(_m: Any, msg: Any, peer: Any, arg: Any) -> int:
    """Call a handler, on the thread of the library that calls them."""
    action: Action = ffi.from_handle(arg)
    received = _received(msg, peer)
    with received.fds:
        action(received)
    return 0


@ffi.def_extern(onerror=_callback_failed)  # type: ignore[untyped-decorator]
def dmpy_mp_async(_m: Any, _request: Any, status: int, text: Any, replies: Any, arg: Any) -> None:
    """Call a completion, on the thread of the library that calls handlers."""
    channel: MpChannel
    completion: Completion
    channel, completion = ffi.from_handle(arg)
    error: DpdkmemError | None = None
    try:
        check(status, "request", text=_text(text))
    except DpdkmemError as raised:
        error = raised
    try:
        with _replies(replies) as values:
            completion(values, error)
    finally:
        channel.completed(arg)


# ---- C structs from and into values


def _c_name(name: str) -> bytes:
    if "\0" in name:
        raise ResourceError(errno.EINVAL, f"the name {name!r} has a NUL")
    return name.encode(errors="surrogateescape")


def _c_timeout(timeout_ms: int) -> int:
    if timeout_ms > _INT_MAX:
        raise ResourceError(errno.EINVAL, f"a time-out of {timeout_ms} ms: {_INT_MAX} may be")
    return max(timeout_ms, -1)


def _c_message(message: MpMessage) -> Any:
    name = _c_name(message.name)
    if len(name) > MAX_NAME_BYTES or len(message.param) > MAX_PARAM_BYTES or len(message.fds) > MAX_FDS:
        raise ResourceError(
            errno.E2BIG,
            f"message {message.name!r} has a name of {len(name)} bytes, {len(message.param)} bytes and {len(message.fds)} "
            f"descriptors: {MAX_NAME_BYTES}, {MAX_PARAM_BYTES} and {MAX_FDS} may be; put more into a memzone",
        )
    out = ffi.new("struct dm_mp_msg *")
    out.name = name
    out.len_param, out.num_fds = len(message.param), len(message.fds)
    ffi.memmove(out.param, message.param, len(message.param))
    for i, fd in enumerate(message.fds):
        out.fds[i] = fd
    return out


def _c_target(to: MpTo) -> Any:
    if to is None:
        return ffi.NULL
    out = ffi.new("struct dm_mp_target *")
    match to:
        case MpTarget.PRIMARY:
            out.to = lib.DM_MP_TO_PRIMARY
        case MpTarget.ALL:
            out.to = lib.DM_MP_TO_ALL
        case int():
            out.to = lib.DM_MP_TO_OWNER
            out.owner_id = to if 0 < to <= _INT_MAX else 0
        case bytes():
            if len(to) != _SESSION_ID_BYTES:
                raise ResourceError(
                    errno.EINVAL, f"a session id has {_SESSION_ID_BYTES} bytes, not {len(to)}"
                )
            out.to = lib.DM_MP_TO_SESSION
            out.session_id = to
        case str():
            name = _c_name(to)
            if not 0 < len(name) <= _NAME_BYTES:
                raise ResourceError(
                    errno.EINVAL, f"the name {to!r} of a session has 1 to {_NAME_BYTES} bytes"
                )
            out.to = lib.DM_MP_TO_NAME
            out.name = name
        case _:
            raise InternalError(f"{to!r} is no target")
    return out


def _c_peer(peer: MpPeer) -> Any:
    out = ffi.new("struct dm_mp_peer *")
    out.owner_id, out.request_id = peer.owner_id, peer.request_id
    return out


def _text(text: Any) -> str:
    return str(ffi.string(text).decode(errors="replace"))


def _peer(peer: Any) -> MpPeer:
    return MpPeer(peer.owner_id, bytes(peer.session_id), _text(peer.name), peer.request_id, peer.timeout_ms)


def _received(msg: Any, peer: Any) -> MpReceived:
    """Take a message over from C, its descriptors too."""
    fds = FdBundle(msg.fds[i] for i in range(msg.num_fds))
    msg.num_fds = 0
    param = bytes(ffi.buffer(msg.param, msg.len_param))
    return MpReceived(_text(msg.name), param, fds, _peer(peer))


def _replies(out: Any) -> MpReplies:
    answers = [out.answers[i] for i in range(out.nb_answers)]
    return MpReplies(
        out.nb_sent,
        tuple(_received(answer.msg, answer.peer) for answer in answers if answer.status == 0),
        tuple(
            MpFailure(_peer(answer.peer), -answer.status, _text(ffi.cast("char *", answer.msg.param)))
            for answer in answers
            if answer.status != 0
        ),
    )
