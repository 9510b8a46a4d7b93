"""Validators that live in secondaries: their messages, and the questions that are open with them.

Owns the step between the session protocol (VALIDATOR_REGISTER, VALIDATOR_UNREGISTER, VALIDATE, VERDICT) and `Validators`. A session's
validators end with the session; a question that its end leaves open is no refusal (validators.py says why).
Threads: the loop's.
"""

from __future__ import annotations

import errno
import itertools
from typing import TYPE_CHECKING, Final, Protocol

from dpdkmem.primary.validators import Validator
from dpdkmem.shared.errors import DpdkmemError, PeerGone, ResourceError, Unsupported
from dpdkmem.shared.messages import Done, Validate, ValidatorUnregister, Verdict
from dpdkmem.shared.protocol import MAX_QUESTIONS

if TYPE_CHECKING:
    from dpdkmem.primary.sessions import Session
    from dpdkmem.primary.validators import Answered, Validators
    from dpdkmem.shared.messages import ValidatorRegister
    from dpdkmem.shared.validator_rules import Question

_MAX_ID: Final = 0xFFFF_FFFF


class Send(Protocol):
    """How a message goes to a session: SessionTable.tell."""

    def __call__(self, session: Session, message: Done | Validate) -> None:
        """Send, or queue; what cannot be sent ends the session."""


class SessionValidators:
    """The validators of all sessions.

    Args:
        validators: where they are registered.
        send: to a session.
    """

    def __init__(self, validators: Validators, send: Send) -> None:
        self._validators = validators
        self._send = send
        self._ids = itertools.count(1)
        self._open: dict[int, dict[int, Answered]] = {}  # owner id -> request id -> who waits

    def handle(self, session: Session, message: ValidatorRegister | ValidatorUnregister | Verdict) -> None:
        """Do what a message of a session's says."""
        if isinstance(message, Verdict):
            answered = self._open.get(session.owner_id, {}).pop(message.request_id, None)
            if answered is not None:  # else it is of a registration that has ended
                answered(message.reason if message.status else None)
            return
        try:
            self._change(session, message)
        except DpdkmemError as error:
            code, text = _code_and_text(error)
            self._send(session, Done(message.request_id, code, error.retryable, text))
        else:
            self._send(session, Done(message.request_id, 0, retryable=False, text=""))

    def ended(self, session: Session) -> None:
        """Forget a session's validators and questions."""
        self._open.pop(session.owner_id, None)
        self._validators.forget(session.owner_id)

    def _change(self, session: Session, message: ValidatorRegister | ValidatorUnregister) -> None:
        if isinstance(message, ValidatorUnregister):
            self._validators.unregister(message.name, message.numa_node, session.owner_id)
            return

        def ask(question: Question, answered: Answered) -> None:
            self._ask(session, message.name, question, answered)

        self._validators.register(
            Validator(
                message.name,
                message.numa_node,
                message.limit_bytes,
                ask,
                session.owner_id,
                session.describe(),
                session.evict,
            )
        )

    def _ask(self, session: Session, name: str, question: Question, answered: Answered) -> None:
        if session.over:
            raise PeerGone(f"{session.describe()} has ended")
        waiting = self._open.setdefault(session.owner_id, {})
        if len(waiting) >= MAX_QUESTIONS:
            raise ResourceError(errno.EBUSY, f"{session.describe()} owes answers to {len(waiting)} questions")
        request_id = next(self._ids) % _MAX_ID + 1
        waiting[request_id] = answered
        self._send(
            session,
            Validate(request_id, question.limit_bytes, question.new_len_bytes, question.numa_node, name),
        )


def _code_and_text(error: DpdkmemError) -> tuple[int, str]:
    if isinstance(error, Unsupported):
        return errno.ENOTSUP, str(error)
    if isinstance(error, ResourceError):
        return error.errno or errno.EIO, error.text
    return errno.EIO, str(error)
