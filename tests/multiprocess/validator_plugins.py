"""Validators that tests load into a daemon: --validator validator_plugins:NAME."""

from __future__ import annotations


def refuse(_numa_node: int, limit: int, new_len: int) -> str:
    return f"plug-in says no to {new_len} above {limit}"


def agree(_numa_node: int, _limit: int, _new_len: int) -> None:
    return None


not_callable = 5
