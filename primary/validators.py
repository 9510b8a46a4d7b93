"""Who may veto a growth: allocation validators, asked in order before any page is taken.

Owns the list of validators, and the judgements that wait for answers. A validator is a function of this process or of a plug-in
(`LocalAsker`, on a thread of its own) or a session's (session_validators.py); here they are all `Ask`: a question goes in, an
answer comes back on the loop, perhaps never.

When one is asked: a growth of its node would bring what is present and on its way there (also what waits for a judgement) **above**
its limit; reaching the limit exactly is no matter of its (DPDK asks from the limit on: `rte_mem_alloc_validator_register`). All
that match are asked, in the order of registration, also after a refusal; one refusal refuses. The start-up minimum is not asked
about, as in DPDK. Growths of one node are judged one after another, so that each is told what the ones before it brought.

    Judgement:  WAITING -> ASKING -> (the next validator) ... -> DECIDED -> started or refused

Laws: every growth that is admitted is started or refused exactly once. A question has a deadline (`--ack-timeout`): then its
validator "owes" an answer, the growth is refused (`--on-lag=evict`: the session is evicted, and the growth goes on without it),
and as long as it owes, whatever it would be asked about is refused at once. So nobody waits twice for the same silence, and a
check that cannot be made is never taken for one that was passed. A validator that goes away (unregistered, its session ended) has
no say any more, also in the judgement that waits for it.
Who cleans up after a kill -9 of a validator's process: the end of its session, by `forget()`.
Threads: the loop's, but for what LocalAsker says.
"""

from __future__ import annotations

import errno
import logging
import queue
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from dpdkmem.shared.errors import DpdkmemError, LimitExceeded, ResourceError, Unsupported
from dpdkmem.shared.kinds import LagPolicy
from dpdkmem.shared.units import format_size
from dpdkmem.shared.validator_rules import Question, ask, check_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from dpdkmem.primary.loop import Loop, Timer
    from dpdkmem.primary.quota import Quota
    from dpdkmem.shared.model import ListInfo
    from dpdkmem.shared.validator_rules import Callback

    Answered = Callable[[str | None], None]
    """Called on the loop's thread, with the reason of a refusal or None."""
    Ask = Callable[[Question, Answered], None]

_LOG: Final = logging.getLogger(__name__)
PRIMARY_OWNER: Final = 1  # DM_OWNER_PRIMARY: of validators of this process
MAX_PER_OWNER: Final = 64  # a session must not fill our memory with names


@dataclass(slots=True, eq=False)
class Validator:
    """One registration."""

    name: str
    numa_node: int
    limit_bytes: int
    ask: Ask
    owner_id: int = PRIMARY_OWNER
    who: str = "the primary"
    evict: Callable[[str], None] | None = None
    """Ends the session that it belongs to; None: it is of this process."""
    stop: Callable[[], None] = lambda: None
    """Called when it is not asked any more."""
    owes: bool = False
    """It let a deadline pass and has not answered since."""
    is_gone: bool = False
    n_asked: int = 0
    n_refused: int = 0

    def describe(self) -> str:
        """Return who it is, for messages."""
        return f"validator {self.name!r} of {self.who}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a validator refused."""

    validator: Validator
    reason: str
    is_silence: bool


@dataclass(slots=True, eq=False)
class _Judgement:
    info: ListInfo
    n_bytes: int
    start: Callable[[], None]
    refuse: Callable[[DpdkmemError], None]
    begun: bool = False
    decided: bool = False
    question_bytes: int = 0
    left: deque[Validator] = field(default_factory=deque)
    asked: Validator | None = None
    refusals: list[Refusal] = field(default_factory=list)
    timer: Timer | None = None


class Validators:
    """All validators of one primary.

    Args:
        loop: for deadlines.
        quota: what is used of a node, and its nodes.
        deadline_s: of each question.
        on_lag: what happens to a session that is silent.
        may_register: False in legacy mode, where nothing grows.
    """

    def __init__(
        self, loop: Loop, quota: Quota, deadline_s: float, on_lag: LagPolicy, *, may_register: bool = True
    ) -> None:
        self._loop = loop
        self._quota = quota
        self._deadline_s = deadline_s
        self._on_lag = on_lag
        self._may_register = may_register
        self._all: list[Validator] = []
        self._waiting: dict[int, deque[_Judgement]] = {}  # by node, the one that is judged first
        self._running: set[int] = set()
        self.n_asked = 0
        self.n_refused = 0
        self.on_refusal: Callable[[Refusal, Question], None] = lambda _refusal, _question: None
        self.on_change: Callable[[str, Validator], None] = lambda _what, _validator: None

    @property
    def all(self) -> list[Validator]:
        """The registrations, in their order."""
        return list(self._all)

    def close(self) -> None:
        """Forget all; judgements that wait are dropped, as every growth is then."""
        self._waiting.clear()
        for validator in self._all:
            validator.is_gone = True
            validator.stop()
        self._all.clear()

    # ---- registering ----

    def register(self, validator: Validator) -> None:
        """Ask it from now on.

        Raises:
            ResourceError: EINVAL, ENAMETOOLONG, EEXIST (its owner's, of that name, for that node), ENOSPC.
            Unsupported: the memory does not grow.
        """
        check_name(validator.name, validator.numa_node)
        self._check_mode()
        if validator.numa_node not in self._quota.nodes:
            nodes = ", ".join(map(str, self._quota.nodes))
            raise ResourceError(
                errno.EINVAL,
                f"validator {validator.name!r}: NUMA node {validator.numa_node} has no memory here, so it would never be asked: there is {nodes}",
            )
        mine = [one for one in self._all if one.owner_id == validator.owner_id]
        if any((one.name, one.numa_node) == (validator.name, validator.numa_node) for one in mine):
            raise ResourceError(
                errno.EEXIST,
                f"validator {validator.name!r} is registered for NUMA node {validator.numa_node} already",
            )
        if len(mine) >= MAX_PER_OWNER:
            raise ResourceError(
                errno.ENOSPC, f"{len(mine)} validators are registered by {validator.who} already"
            )
        self._all.append(validator)
        _LOG.info(
            "%s is asked before NUMA node %d grows above %s",
            validator.describe(), validator.numa_node, format_size(validator.limit_bytes),
        )  # fmt: skip
        self.on_change("validator_registered", validator)

    def unregister(self, name: str, numa_node: int, owner_id: int = PRIMARY_OWNER) -> None:
        """Ask it no more.

        Raises:
            ResourceError: EINVAL, ENAMETOOLONG; ENOENT, its owner has none of that name for that node.
            Unsupported: the memory does not grow.
        """
        check_name(name, numa_node)
        self._check_mode()
        for validator in self._all:
            if (validator.name, validator.numa_node, validator.owner_id) == (name, numa_node, owner_id):
                self._remove(validator)
                return
        raise ResourceError(errno.ENOENT, f"no validator {name!r} is registered for NUMA node {numa_node}")

    def forget(self, owner_id: int) -> None:
        """Forget what a session registered, for it has ended."""
        for validator in self.all:
            if validator.owner_id == owner_id:
                self._remove(validator)

    def _check_mode(self) -> None:
        if not self._may_register:
            raise Unsupported(
                "an allocation validator",
                "memory that grows: with --legacy-mem all of it is taken at the start",
            )

    def _remove(self, validator: Validator) -> None:
        self._all.remove(validator)
        validator.is_gone = True
        validator.stop()
        self.on_change("validator_unregistered", validator)
        for waiting in list(self._waiting.values()):
            judgement = waiting[0] if waiting else None
            if judgement is not None and judgement.asked is validator:
                self._answered(judgement, validator, None)

    # ---- judging ----

    def admit(
        self,
        info: ListInfo,
        n_bytes: int,
        start: Callable[[], None],
        refuse: Callable[[DpdkmemError], None],
    ) -> None:
        """Call `start`, at once or when all that must be asked have agreed; else `refuse`, also with what `start` raises.

        Args:
            info: of the list that is to grow.
            n_bytes: by how much.
            start: takes slots, so that what it brings counts from then on.
            refuse: gets the error for who asked.
        """
        node = info.numa_node
        before_it = sum(one.n_bytes for one in self._waiting.get(node, ()))
        if not self._matching(node, before_it + n_bytes):
            _start(start, refuse)
            return
        error = self._quota.refusal(info, n_bytes)
        if error is not None:  # a ceiling decides by itself: nobody is asked about what cannot be
            refuse(error)
            return
        self._waiting.setdefault(node, deque()).append(_Judgement(info, n_bytes, start, refuse))
        self._run(node)

    def may_grow(self, info: ListInfo, n_bytes: int) -> DpdkmemError | None:
        """Say why so many more bytes may not be made ahead, or None: for what will be used without asking (the warm reserve).

        It may be made if no ceiling and no validator's limit is passed even when all that is warm is used too: what lies above a
        limit must be asked about growth by growth.
        """
        error = self._quota.refusal(info, n_bytes)
        if error is not None:
            return error
        before_it = sum(one.n_bytes for one in self._waiting.get(info.numa_node, ()))
        matching = self._matching(info.numa_node, before_it + n_bytes)
        if not matching:
            return None
        return LimitExceeded(
            errno.EDQUOT,
            f"{format_size(n_bytes)} more on NUMA node {info.numa_node} are for {matching[0].describe()} to judge, when they are wanted",
        )

    def _matching(self, numa_node: int, more_bytes: int) -> list[Validator]:
        asked = [one for one in self._all if one.numa_node == numa_node]
        if not asked:
            return []
        new_len = self._quota.used_of_node(numa_node) + more_bytes
        return [one for one in asked if new_len > one.limit_bytes]

    def _run(self, node: int) -> None:
        """Judge what waits, oldest first, until one waits for an answer. A decision that calls back to here is gone on with there."""
        if node in self._running:
            return
        self._running.add(node)
        try:
            waiting = self._waiting.get(node)
            while waiting:
                judgement = waiting[0]
                self._step(judgement)
                if not judgement.decided:
                    return
                waiting.popleft()
                self._conclude(judgement)
        finally:
            self._running.discard(node)

    def _step(self, judgement: _Judgement) -> None:
        """Ask the next ones, until one does not answer at once."""
        node = judgement.info.numa_node
        if not judgement.begun:
            judgement.begun = True
            judgement.question_bytes = self._quota.used_of_node(node) + judgement.n_bytes
            judgement.left = deque(self._matching(node, judgement.n_bytes))
        while judgement.asked is None and judgement.left:
            self._ask(judgement, judgement.left.popleft())
        judgement.decided = judgement.asked is None

    def _ask(self, judgement: _Judgement, validator: Validator) -> None:
        if validator.is_gone:
            return
        if validator.owes:
            reason = "it still owes an answer to an earlier question: let it run, end it, or unregister it"
            self._refused(judgement, Refusal(validator, reason, is_silence=True))
            return
        validator.n_asked += 1
        self.n_asked += 1
        judgement.asked = validator
        judgement.timer = self._loop.call_later(self._deadline_s, lambda: self._silent(judgement, validator))
        question = _question(judgement, validator)
        try:
            validator.ask(question, lambda reason: self._answered(judgement, validator, reason))
        except DpdkmemError as error:
            self._answered(judgement, validator, f"it could not be asked: {error}")

    def _answered(self, judgement: _Judgement, validator: Validator, reason: str | None) -> None:
        validator.owes = False
        if judgement.asked is not validator:
            return  # too late
        judgement.asked = None
        if judgement.timer is not None:
            judgement.timer.cancel()
        if reason is not None and not validator.is_gone:
            self._refused(judgement, Refusal(validator, reason, is_silence=False))
        self._run(judgement.info.numa_node)

    def _silent(self, judgement: _Judgement, validator: Validator) -> None:
        if judgement.asked is not validator:
            return
        why = f"it did not answer within {self._deadline_s:g} s"
        if self._on_lag is LagPolicy.EVICT and validator.evict is not None:
            validator.evict(
                f"validator {validator.name!r} did not answer within {self._deadline_s:g} s (--on-lag=evict)"
            )
            if validator.is_gone:  # forget() went on with the judgement
                return
        validator.owes = True
        judgement.asked = None
        self._refused(
            judgement, Refusal(validator, f"{why}: let it run, end it, or unregister it", is_silence=True)
        )
        self._run(judgement.info.numa_node)

    def _refused(self, judgement: _Judgement, refusal: Refusal) -> None:
        refusal.validator.n_refused += 1
        self.n_refused += 1
        judgement.refusals.append(refusal)
        self.on_refusal(refusal, _question(judgement, refusal.validator))

    def _conclude(self, judgement: _Judgement) -> None:
        if judgement.refusals:
            judgement.refuse(_error(judgement))
        else:
            _start(judgement.start, judgement.refuse)


class LocalAsker:
    """Asks a function of this process, on a thread of its own: what hangs there hangs nobody else.

    Args:
        callback: the function.
        loop: on which answers come back.
        name: of the thread.
    """

    def __init__(self, callback: Callback, loop: Loop, name: str) -> None:
        self._callback = callback
        self._loop = loop
        self._questions: queue.SimpleQueue[tuple[Question, Answered] | None] = queue.SimpleQueue()
        # A daemon: a function that never returns must not keep the process from ending.
        self._thread = threading.Thread(target=self._serve, name=f"dm-validator-{name}"[:15], daemon=True)
        self._thread.start()

    @property
    def called_from_inside(self) -> bool:
        """Whether the caller runs inside the function."""
        return threading.current_thread() is self._thread

    def __call__(self, question: Question, answered: Answered) -> None:
        """Ask; never blocks."""
        self._questions.put((question, answered))

    def stop(self) -> None:
        """Ask no more; a call that runs goes on."""
        self._questions.put(None)

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for a call that runs, except from inside it. Threads: not the loop's."""
        if not self.called_from_inside:
            self._thread.join(timeout_s)

    def _serve(self) -> None:
        while (wanted := self._questions.get()) is not None:
            question, answered = wanted
            self._answer(answered, ask(self._callback, question))

    def _answer(self, answered: Answered, reason: str | None) -> None:
        self._loop.call_soon_threadsafe(lambda: answered(reason))


def _start(start: Callable[[], None], refuse: Callable[[DpdkmemError], None]) -> None:
    try:
        start()
    except DpdkmemError as error:
        refuse(error)


def _question(judgement: _Judgement, validator: Validator) -> Question:
    return Question(validator.numa_node, validator.limit_bytes, judgement.question_bytes)


def _error(judgement: _Judgement) -> ResourceError:
    """Make the error for who asked: the first reason first."""
    reasons = "; ".join(
        f"{one.validator.describe()}: {one.reason or 'it gave no reason'}" for one in judgement.refusals
    )
    text = (
        f"{format_size(judgement.n_bytes)} more on NUMA node {judgement.info.numa_node}, {format_size(judgement.question_bytes)} in all, "
        f"were refused by {reasons}"
    )
    if all(one.is_silence for one in judgement.refusals):
        return ResourceError(errno.ETIMEDOUT, text)
    return LimitExceeded(errno.EDQUOT, text)
