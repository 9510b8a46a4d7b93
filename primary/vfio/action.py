"""Devices for secondaries: the built-in action `dpdkmem.device` (shared/device_wire.py).

Owns which session has which device, and which user maps. A session is handed the device's descriptor, with which it does all that VFIO
lets it do to that device; the primary keeps its own, so that its end ends nothing but what we end.

Laws: a device is one session's at a time; only root, the primary's user and those of --device-uid may be handed one; a session's end, by a goodbye
or a proved death, stops its device before anything of its memory is given to anybody else.
Who cleans up after a kill -9 of the session: `dying()`, called by the sessions before they reap. Of the primary: nobody has to: the session
goes on with its descriptor, which keeps container and maps alive, until it ends. So it does when the primary ends in order.
A death while something is opened or closed waits for that: operations have one order (steps.py).
Threads: the loop's.
"""

from __future__ import annotations

import contextlib
import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from dpdkmem.primary.ipc_directory import RefusedError
from dpdkmem.shared.device_wire import (
    ACTION,
    MAX_REGIONS,
    DeviceAnswer,
    DeviceOp,
    DeviceQuestion,
)
from dpdkmem.shared.errors import DpdkmemError, ResourceError, errno_of, words_of
from dpdkmem.shared.pci import PciAddress

if TYPE_CHECKING:
    from collections.abc import Callable

    from dpdkmem.primary.ipc_builtin import Reply
    from dpdkmem.primary.ipc_directory import Process
    from dpdkmem.primary.vfio.function import PciFunction
    from dpdkmem.primary.vfio.functions import Functions
    from dpdkmem.shared.fds import FdBundle

_MAX_USER_MAPS: Final = 4096  # of a session: each is an entry of the container, and a pin


@dataclass(slots=True, eq=False)
class _Hand:
    """What a session has."""

    functions: dict[str, PciFunction] = field(default_factory=dict)
    maps: dict[int, int] = field(default_factory=dict)
    """User maps: IOVA -> length."""


class DeviceAction:
    """Serves the action.

    Args:
        functions: the devices.
        uid_of: the user of a session, by owner id; None: it is over.
    """

    action = ACTION

    def __init__(self, functions: Functions, uid_of: Callable[[int], int | None]) -> None:
        self._functions = functions
        self._uid_of = uid_of
        self._hands: dict[int, _Hand] = {}
        functions.on_last = self._forget_maps

    def handle(self, who: Process, param: bytes, fds: FdBundle, reply: Reply) -> None:
        """Serve one question."""
        del fds
        try:
            question = DeviceQuestion.decode(param)
        except ValueError as error:
            raise RefusedError(errno.EINVAL, str(error)) from None
        try:
            self._serve(who, question, reply)
        except DpdkmemError as error:
            _refuse(reply, error)

    def dying(self, owner_id: int, then: Callable[[], None]) -> None:
        """A session has ended, and its process has died or said goodbye: stop what it drove; `then` is called when it is stopped."""
        hand = self._hands.get(owner_id)
        if hand is None:
            then()
            return
        for function in hand.functions.values():
            self._functions.close(function)
        self._functions.call(lambda: self._unmap_all(owner_id, hand), lambda _: then())

    def _unmap_all(self, owner_id: int, hand: _Hand) -> None:
        del self._hands[owner_id]  # not before: the end of the container forgets its maps
        for iova, n_bytes in hand.maps.items():
            with contextlib.suppress(ResourceError):  # the kernel keeps it: see the log
                self._functions.maps.user_unmap(iova, n_bytes)

    def _serve(self, who: Process, question: DeviceQuestion, reply: Reply) -> None:
        hand = self._hands.setdefault(who.owner_id, _Hand())
        match question.op:
            case DeviceOp.OPEN:
                self._open(who, str(PciAddress.parse(question.address)), reply)
            case DeviceOp.CLOSE:
                function = hand.functions.get(str(PciAddress.parse(question.address)))
                if function is None:
                    raise ResourceError(
                        errno.ENOENT, f"this process was not handed {question.address}, or it is closed"
                    )
                self._close(hand, function, lambda: reply(0))
            case DeviceOp.DMA_MAP:
                self._check_may(who)
                self._functions.call(lambda: self._map(hand, question), lambda error: _answer(reply, error))
            case DeviceOp.DMA_UNMAP:
                self._functions.call(lambda: self._unmap(hand, question), lambda error: _answer(reply, error))

    def _map(self, hand: _Hand, question: DeviceQuestion) -> None:
        if len(hand.maps) >= _MAX_USER_MAPS:
            raise ResourceError(
                errno.ENOSPC, f"this process has {_MAX_USER_MAPS} DMA maps: take some away first"
            )
        self._functions.maps.user_map(question.vaddr, question.iova, question.n_bytes)
        hand.maps[question.iova] = question.n_bytes

    def _unmap(self, hand: _Hand, question: DeviceQuestion) -> None:
        if hand.maps.get(question.iova) != question.n_bytes:
            raise ResourceError(
                errno.ENOENT,
                f"this process has no DMA map at IOVA {question.iova:#x} with {question.n_bytes} bytes",
            )
        self._functions.maps.user_unmap(question.iova, question.n_bytes)
        del hand.maps[question.iova]

    def _close(self, hand: _Hand, function: PciFunction, then: Callable[[], object]) -> None:
        """Close a session's device, which is the session's until it is closed."""

        def closed() -> None:
            if hand.functions.get(function.address) is function:
                del hand.functions[function.address]
            then()

        self._functions.close(function, closed)

    def _open(self, who: Process, address: str, reply: Reply) -> None:
        self._check_may(who)

        def done(outcome: PciFunction | DpdkmemError) -> None:
            if isinstance(outcome, DpdkmemError):
                _refuse(reply, outcome)
            else:
                self._hand_over(who, outcome, reply)

        self._functions.open(address, who.describe(), lambda: self._given_back(who.owner_id, address), done)

    def _hand_over(self, who: Process, function: PciFunction, reply: Reply) -> None:
        try:
            param = _describe(function).encode()
        except DpdkmemError as error:
            failure = error
            self._functions.close(function, lambda: _refuse(reply, failure))
            return
        if reply(0, param, [self._functions.share(function)]):
            self._hands.setdefault(who.owner_id, _Hand()).functions[function.address] = function
        else:  # nobody waits for it any more
            self._functions.close(function)

    def _given_back(self, owner_id: int, address: str) -> None:
        """The host wants it: whoever has it has no word in this; it is stopped and closed here, and is of no use to the session."""
        hand = self._hands.get(owner_id, _Hand())
        function = hand.functions.get(address)
        if function is not None:
            self._close(hand, function, lambda: None)

    def _forget_maps(self) -> None:
        """With the last device all maps are gone."""
        for hand in self._hands.values():
            hand.maps.clear()

    def _check_may(self, who: Process) -> None:
        if not self._functions.may_have(who.owner_id):
            uid = self._uid_of(who.owner_id)
            raise RefusedError(
                errno.EPERM,
                f"user {uid} may not be handed devices: start the primary with --device-uid={uid}, if it may do DMA to all memory",
            )


def _describe(function: PciFunction) -> DeviceAnswer:
    regions = []
    for index in range(MAX_REGIONS):
        try:
            region = function.region(index)
        except ResourceError:  # no VGA
            continue
        if region.n_bytes:
            regions.append(region)
    return DeviceAnswer(function.n_vectors(), tuple(regions))


def _answer(reply: Reply, error: DpdkmemError | None) -> None:
    if error is None:
        reply(0)
    else:
        _refuse(reply, error)


def _refuse(reply: Reply, error: DpdkmemError) -> None:
    reply(errno_of(error), text=words_of(error))
