"""The verbs of the admin socket: what each argument means, what is changed, and what is said of it.

Owns the judgement of arguments and the words of answers; the changes themselves are quota.py's, floors.py's, growth.py's and
sessions.py's. Every change that was made is an event of topic `admin` that names who asked (uid, pid). A verb that fails has changed
nothing, but for `reap-orphans`, whose answer says how far it came.
Threads: the loop's.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from dpdkmem.primary.admin import Actor  # noqa: TC001 - a part of the interface
from dpdkmem.shared.admin_wire import AdminVerb
from dpdkmem.shared.control_wire import Topic
from dpdkmem.shared.errors import (
    ConfigError,
    DeviceBusy,
    DpdkmemError,
    PeerProtocolError,
    ResourceError,
    Unsupported,
)
from dpdkmem.shared.model import OwnerState, PinKind
from dpdkmem.shared.option_values import MAX_HYSTERESIS, MAX_LANE_CACHE
from dpdkmem.shared.units import MAX_VALUE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dpdkmem.primary.admin import Done
    from dpdkmem.primary.service import Primary
    from dpdkmem.shared.model import ListInfo, OwnerInfo

    Verb = Callable[["_Args", Actor, Done], None]

_MAX_NUMA_NODE: Final = 1023
_DEVICE_PINS: Final = frozenset({PinKind.VFIO, PinKind.VHOST, PinKind.XDP})


class AdminVerbs:
    """Does what is asked of one primary.

    Args:
        primary: whose parts are changed.
    """

    def __init__(self, primary: Primary) -> None:
        self._primary = primary
        self._verbs: dict[AdminVerb, Verb] = {
            AdminVerb.LIMIT_SET: self._limit_set,
            AdminVerb.FLOOR_SET: self._floor_set,
            AdminVerb.SHRINK: self._shrink,
            AdminVerb.REAP_ORPHANS: self._reap_orphans,
            AdminVerb.EVICT: self._evict,
            AdminVerb.SET_HYSTERESIS: self._set_hysteresis,
            AdminVerb.SET_WARM_RESERVE: self._set_warm_reserve,
            AdminVerb.SET_LANE_CACHE: self._set_lane_cache,
            AdminVerb.CHECK: self._check,
        }

    def run(self, verb: str, args: Mapping[str, object], actor: Actor, done: Done) -> None:
        """Do a verb; `done` is called once, perhaps later, unless this raises.

        Raises:
            PeerProtocolError: there is no such verb.
            ConfigError: arguments that cannot be.
            DpdkmemError: it cannot be done.
        """
        known = {one.value: one for one in AdminVerb}
        if verb not in known:
            raise PeerProtocolError(0, f"there is no verb {verb[:40]!r}; there are {', '.join(known)}")
        judged = _Args(args)
        self._verbs[known[verb]](judged, actor, done)

    def _tell(self, what: AdminVerb, actor: Actor, **more: object) -> None:
        self._primary.publish(
            Topic.ADMIN, {"type": what.value, "by_uid": actor.uid, "by_pid": actor.pid} | more
        )

    def _require_growing(self, what: str) -> None:
        if self._primary.config.memory.legacy_mem:
            raise Unsupported(
                what, "memory that grows and shrinks: with --legacy-mem all of it is taken at the start"
            )

    # ---- ceilings and floors ----

    def _limit_set(self, args: _Args, actor: Actor, done: Done) -> None:
        node, page_bytes, limit = args.node(), args.page_bytes(), args.amount_or_none("limit_bytes")
        args.end()
        self._require_growing("a limit")
        quota = self._primary.quota
        if page_bytes is None:
            nodes = quota.choose_nodes(node)
            before = {one: quota.node_limit(one) for one in nodes}
            for one in nodes:
                quota.check_node_limit(one, limit)
            for one in nodes:
                quota.set_node_limit(one, limit)
        else:
            lists = quota.choose_lists(node, page_bytes)
            before = {info.numa_node: info.limit_segments * info.page_bytes for info in lists}
            for info in lists:
                quota.check_list_limit(info, limit)
            for info in lists:
                quota.set_list_limit(info, limit)
            nodes = tuple(info.numa_node for info in lists)
        leaving = self._let_go()
        rows = [self._node_row(one, page_bytes, before[one], leaving) for one in nodes]
        for row in rows:
            self._tell(AdminVerb.LIMIT_SET, actor, **row)
        done({"nodes": rows})

    def _let_go(self) -> dict[int, int]:
        """Give back what is free and what is warm, as far as the new limits want it; return the bytes on their way, by list."""
        before = {info.list_idx: info.n_present for info in self._primary.native.lists()}
        reserve = self._primary.growth.reserve
        if self._primary.quota.is_exceeded():
            reserve.renew()
        else:
            reserve.fill_anew()
        self._primary.growth.shrink(self._primary.quota.keep_segments())
        after = self._primary.native.lists()
        return {info.list_idx: (before[info.list_idx] - info.n_present) * info.page_bytes for info in after}

    def _node_row(
        self, node: int, page_bytes: int | None, before: int | None, leaving: Mapping[int, int]
    ) -> dict[str, object]:
        quota = self._primary.quota
        lists = [info for info in quota.lists_of(node) if page_bytes in {None, info.page_bytes}]
        used = sum(quota.used_of_list(info) for info in lists)
        limit = (
            quota.node_limit(node)
            if page_bytes is None
            else sum(info.limit_segments * info.page_bytes for info in lists)
        )
        return {
            "numa_node": node,
            "page_bytes": page_bytes,
            "before_bytes": before,
            "limit_bytes": limit,
            "used_bytes": used,
            "leaving_bytes": sum(leaving[info.list_idx] for info in lists),
            "over_bytes": 0 if limit is None else max(0, used - limit),
        }

    def _floor_set(self, args: _Args, actor: Actor, done: Done) -> None:
        node, page_bytes, floor = args.node(), args.page_bytes(), args.amount_or_none("floor_bytes")
        args.end()
        self._require_growing("a floor")
        quota = self._primary.quota
        if page_bytes is not None:
            quota.choose_lists(node, page_bytes)
        nodes = list(quota.choose_nodes(node))
        before = {one: self._floor(one, page_bytes) for one in nodes}

        def finish(error: DpdkmemError | None) -> None:
            if error is not None:
                done(error)
                return
            rows = [
                {
                    "numa_node": one,
                    "page_bytes": page_bytes,
                    "before_bytes": before[one],
                    "floor_bytes": self._floor(one, page_bytes),
                    "used_bytes": sum(quota.used_of_list(info) for info in self._lists(one, page_bytes)),
                }
                for one in nodes
            ]
            for row in rows:
                self._tell(AdminVerb.FLOOR_SET, actor, **row)
            done({"nodes": rows})

        _FloorChange(self._primary, nodes, page_bytes, floor or 0, before, finish).go()

    def _lists(self, node: int, page_bytes: int | None) -> list[ListInfo]:
        return [info for info in self._primary.quota.lists_of(node) if page_bytes in {None, info.page_bytes}]

    def _floor(self, node: int, page_bytes: int | None) -> int:
        return sum(self._primary.quota.floor_of_list(info) for info in self._lists(node, page_bytes))

    # ---- what is free, and what the dead left ----

    def _shrink(self, args: _Args, actor: Actor, done: Done) -> None:
        args.end()
        self._require_growing("giving memory back")
        before = {info.list_idx: info.n_present for info in self._primary.native.lists()}
        self._primary.native.drain_caches(idle_only=False)
        self._primary.growth.shrink(0)
        after = self._primary.native.lists()
        leaving = sum((before[info.list_idx] - info.n_present) * info.page_bytes for info in after)
        present = sum(info.n_present * info.page_bytes for info in after)
        self._tell(AdminVerb.SHRINK, actor, leaving_bytes=leaving)
        done({"leaving_bytes": leaving, "present_bytes": present})

    def _reap_orphans(self, args: _Args, actor: Actor, done: Done) -> None:
        wanted, everybody = args.owner_id_or_none(), args.flag("all")
        args.end()
        if everybody == (wanted is not None):
            raise ConfigError("reap-orphans wants one owner, or all")
        owners = list(self._primary.native.owners())
        orphans = [one for one in owners if one.state is OwnerState.ORPHAN]
        if wanted is not None:
            orphans = [_orphan(owners, wanted)]
        for owner in orphans:
            self._check_devices(owner)
        rows = [self._reap(owner, actor) for owner in orphans]
        self._primary.shrink()
        done({"owners": rows[:_MAX_ROWS], "n_owners": len(rows), "freed_bytes": _sum(rows, "freed_bytes")})

    def _check_devices(self, owner: OwnerInfo) -> None:
        held = next(
            (
                pin
                for pin in self._primary.native.pins()
                if pin.owner_id == owner.owner_id and pin.kind in _DEVICE_PINS
            ),
            None,
        )
        if held is not None:
            raise DeviceBusy(
                errno.EBUSY,
                f"what session {owner.owner_id} ({owner.name}) left cannot be freed yet: {held.kind.name.lower()} may still write to "
                f"[{held.vaddr:#x}, {held.vaddr + held.bytes:#x}) (pin {held.pin_id}: {held.reason}): stop the device or back-end first",
            )

    def _reap(self, owner: OwnerInfo, actor: Actor) -> dict[str, object]:
        report = self._primary.sessions.free_orphan(owner.owner_id)
        row: dict[str, object] = {
            "owner_id": owner.owner_id,
            "name": owner.name,
            "n_blocks": report.n_reclaimed,
            "freed_bytes": report.reclaimed_bytes,
        }
        self._tell(AdminVerb.REAP_ORPHANS, actor, **row)
        return row

    # ---- sessions and settings ----

    def _evict(self, args: _Args, actor: Actor, done: Done) -> None:
        owner_id = args.owner_id_or_none()
        args.end()
        session = next((one for one in self._primary.sessions.all if one.owner_id == owner_id), None)
        if owner_id is None or session is None:
            raise ResourceError(
                errno.ENOENT, f"there is no living session {owner_id}: `dpdkmem sessions` lists them"
            )
        row: dict[str, object] = {"owner_id": owner_id, "name": session.name, "pid": session.peer.pid}
        session.evict(f"by user {actor.uid}, process {actor.pid} (dpdkmem evict)")
        self._tell(AdminVerb.EVICT, actor, **row)
        done(row)

    def _set_hysteresis(self, args: _Args, actor: Actor, done: Done) -> None:
        n_segments = args.number("n_segments", MAX_HYSTERESIS)
        args.end()
        quota = self._primary.quota
        before = quota.hysteresis_segments
        quota.set_hysteresis(n_segments)
        self._primary.growth.shrink(quota.keep_segments())
        row: dict[str, object] = {"before_segments": before, "n_segments": n_segments}
        self._tell(AdminVerb.SET_HYSTERESIS, actor, **row)
        done(row)

    def _check(self, args: _Args, actor: Actor, done: Done) -> None:
        args.end()
        laws, damaged = self._primary.native.check_heaps()
        self._tell(AdminVerb.CHECK, actor, n_broken=len(laws), n_damaged=len(damaged))
        done({"broken": laws, "damaged": damaged})

    def _set_lane_cache(self, args: _Args, actor: Actor, done: Done) -> None:
        n_bytes = args.number("n_bytes", MAX_LANE_CACHE)
        args.end()
        before = self._primary.lane_cache_bytes
        self._primary.set_lane_cache(n_bytes)
        row: dict[str, object] = {"before_bytes": before, "n_bytes": n_bytes}
        self._tell(AdminVerb.SET_LANE_CACHE, actor, **row)
        done(row)

    def _set_warm_reserve(self, args: _Args, actor: Actor, done: Done) -> None:
        n_bytes = args.number("n_bytes", MAX_VALUE)
        args.end()
        self._require_growing("a warm reserve")
        before = self._primary.growth.reserve.target_bytes
        self._primary.growth.reserve.set_target(n_bytes)
        row: dict[str, object] = {"before_bytes": before, "n_bytes": n_bytes}
        self._tell(AdminVerb.SET_WARM_RESERVE, actor, **row)
        done(row)


_MAX_ROWS: Final = 64  # of a reply


class _FloorChange:
    """The floor of several nodes: of all, or, where one cannot have it, of none."""

    def __init__(  # noqa: PLR0917 - what a change needs, once
        self,
        primary: Primary,
        nodes: Sequence[int],
        page_bytes: int | None,
        floor_bytes: int,
        before: Mapping[int, int],
        done: Callable[[DpdkmemError | None], None],
    ) -> None:
        self._primary = primary
        self._left = list(nodes)
        self._changed: list[int] = []
        self._page_bytes = page_bytes
        self._floor_bytes = floor_bytes
        self._before = before
        self._done = done

    def go(self) -> None:
        """Change the next node; goes on by itself."""
        if not self._left:
            self._done(None)
            return
        node = self._left.pop(0)
        try:
            self._primary.floors.set(
                node, self._page_bytes, self._floor_bytes, lambda error: self._changed_one(node, error)
            )
        except DpdkmemError as error:
            self._changed_one(node, error)

    def _changed_one(self, node: int, error: DpdkmemError | None) -> None:
        if error is None:
            self._changed.append(node)
            self.go()
            return
        self._go_back(error)

    def _go_back(self, cause: DpdkmemError) -> None:
        """Give the nodes that were changed their floors back: lowering cannot fail, and what was lowered is there still, or not."""
        if not self._changed:
            self._done(cause)
            return
        node = self._changed.pop()
        try:
            self._primary.floors.set(
                node, self._page_bytes, self._before[node], lambda _: self._go_back(cause)
            )
        except DpdkmemError:
            self._go_back(cause)


class _Args:
    """The arguments of a verb, judged; each is asked for once, and none may be left."""

    def __init__(self, args: Mapping[str, object]) -> None:
        self._args = dict(args)

    def end(self) -> None:
        """See that nothing is left over.

        Raises:
            ConfigError: there is an argument that this verb does not know.
        """
        if self._args:
            raise ConfigError(f"unknown arguments: {', '.join(sorted(self._args))[:200]}")

    def node(self) -> int | None:
        return self._number("numa_node", _MAX_NUMA_NODE)

    def page_bytes(self) -> int | None:
        return self._number("page_bytes", MAX_VALUE)

    def owner_id_or_none(self) -> int | None:
        return self._number("owner_id", MAX_VALUE)

    def amount_or_none(self, name: str) -> int | None:
        """Return an amount that must be given, None for none."""
        if name not in self._args:
            raise ConfigError(f"{name} is missing: a number of bytes, or null for none")
        return self._number(name, MAX_VALUE)

    def number(self, name: str, most: int) -> int:
        value = self._number(name, most)
        if value is None:
            raise ConfigError(f"{name} is missing: a number from 0 to {most}")
        return value

    def flag(self, name: str) -> bool:
        value = self._args.pop(name, False)
        if not isinstance(value, bool):
            raise ConfigError(f"{name} is {_shown(value)}: true or false is wanted")
        return value

    def _number(self, name: str, most: int) -> int | None:
        value = self._args.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise ConfigError(f"{name} is {_shown(value)}: a number from 0 to {most} is wanted")
        return value


def _shown(value: object) -> str:
    return repr(value)[:60]


def _orphan(owners: Sequence[OwnerInfo], owner_id: int) -> OwnerInfo:
    owner = next((one for one in owners if one.owner_id == owner_id), None)
    if owner is None:
        raise ResourceError(
            errno.ENOENT, f"there is no session {owner_id}: `dpdkmem sessions` lists who left memory"
        )
    if owner.state is not OwnerState.ORPHAN:
        raise DeviceBusy(
            errno.EBUSY,
            f"session {owner_id} ({owner.name}) is {owner.state.name.lower()}: only what an ended session left is freed; "
            + (
                "`dpdkmem evict` ends it"
                if owner.state is OwnerState.LIVE
                else "its process has not ended, or its locks are not free yet: try again"
            ),
        )
    return owner


def _sum(rows: Sequence[Mapping[str, object]], name: str) -> int:
    return sum(value for row in rows if isinstance(value := row[name], int))
