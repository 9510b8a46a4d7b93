"""Requests about af_xdp ports: calls of `XdpPorts`, whose answers become messages with descriptors.

A queue that was given to somebody whose request is over is kept for the next one. Threads: the loop's.
"""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import TYPE_CHECKING

from dpdkmem.primary.ipc_directory import RefusedError
from dpdkmem.primary.ports.requests import PortOp, encode_answer
from dpdkmem.primary.ports.xdp import QueueRequest
from dpdkmem.shared.xdp_spec import TRANSPORT

if TYPE_CHECKING:
    from collections.abc import Callable

    from dpdkmem.primary.ipc_builtin import Reply
    from dpdkmem.primary.ipc_directory import Process
    from dpdkmem.primary.ports.requests import PortRequest
    from dpdkmem.primary.ports.xdp import PortReply, XdpPorts


class XdpAction:
    """Answers requests about ports that are not the broker's own.

    Args:
        ports: what there is.
        describe: names an owner for people.
    """

    def __init__(self, ports: XdpPorts, describe: Callable[[int], str]) -> None:
        self._ports = ports
        self._describe = describe

    def __call__(self, who: Process, request: PortRequest, reply: Reply) -> None:
        """Serve one request.

        Raises:
            RefusedError: it is of a transport that no primary keeps.
        """
        name, queue_idx = request.name, request.queue_idx
        match request.op:
            case PortOp.OPEN:
                if request.spec.partition(":")[0] != TRANSPORT:
                    raise RefusedError(errno.ENOTSUP, f"{request.spec}: the primary keeps no such ports")
                self._ports.open(name, request.spec, who.owner_id, lambda answer: _send(reply, answer))
            case PortOp.CLOSE:
                self._ports.close(name, who.owner_id, lambda answer: _send(reply, answer))
            case PortOp.TAKE:
                wanted = QueueRequest(
                    name, queue_idx, who.owner_id, request.lock_word, request.n_rx_desc, request.n_tx_desc, request.pool
                )  # fmt: skip
                self._ports.take(wanted, lambda answer: self._took(wanted, reply, answer))
            case PortOp.RELEASE:
                self._ports.release(name, queue_idx, who.owner_id, lambda answer: _send(reply, answer))
            case _:
                raise RefusedError(errno.ENOTSUP, f"af_xdp ports know no {request.op.name}")

    def _took(self, request: QueueRequest, reply: Reply, answer: PortReply) -> None:
        if answer.run_by:
            answer = replace(answer, text=f"{answer.text} {self._describe(answer.run_by)}")
        if not _send(reply, answer) and answer.status == 0:
            self._ports.keep(request)


def _send(reply: Reply, answer: PortReply) -> bool:
    """Send an answer; its descriptors are closed here."""
    try:
        if answer.status:
            return reply(answer.status, text=answer.text)
        param = encode_answer(answer.record, answer.values)
        return reply(0, param, [fd.fileno() for fd in answer.fds])
    finally:
        for fd in answer.fds:
            fd.close()
