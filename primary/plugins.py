"""Validators that the daemon loads at start: `--validator`, a Python function or a C function in a shared object.

    --validator TARGET[,node=N][,limit=SIZE][,name=NAME]
        TARGET  module:function of an importable module, or /path/lib.so:symbol of type dm_mem_alloc_validator (dpdkmem.h)
        node    the NUMA node; default: each that has memory
        limit   asked above it; default 0: about every growth
        name    default: the function's

The grammar is shared/option_values.py's; here it becomes something to ask. A plug-in runs in the primary with its rights: who writes
the primary's command line or file is trusted so far.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from dpdkmem.native.validators import CFunction
from dpdkmem.primary.validators import LocalAsker, Validator
from dpdkmem.shared.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpdkmem.primary.loop import Loop
    from dpdkmem.primary.validators import Validators
    from dpdkmem.shared.config import ValidatorPlugin
    from dpdkmem.shared.validator_rules import Callback


def load(plugin: ValidatorPlugin) -> Callback:
    """Return the function of a plug-in.

    Raises:
        ConfigError: it is not there, or is no function.
    """
    if plugin.is_c:
        return CFunction.load(plugin.module, plugin.function)
    try:
        module = importlib.import_module(plugin.module)
    except Exception as error:  # other people's code, which may do anything at import
        raise ConfigError(
            f"--validator {plugin.target}: module {plugin.module!r} cannot be imported: {type(error).__name__}: {error}. "
            "PYTHONPATH says where it is looked for"
        ) from error
    found: object = getattr(module, plugin.function, None)
    if not callable(found):
        raise ConfigError(
            f"--validator {plugin.target}: module {plugin.module!r} has no function {plugin.function!r}"
        )
    return cast("Callback", found)


def register_all(
    plugins: Sequence[ValidatorPlugin], validators: Validators, loop: Loop, nodes: Sequence[int]
) -> None:
    """Load and register the plug-ins of a configuration, in its order.

    Raises:
        ConfigError: one cannot be loaded.
        ResourceError: two have one name, or the node has no memory.
        Unsupported: the memory does not grow.
    """
    for plugin in plugins:
        callback = load(plugin)
        for node in nodes if plugin.numa_node is None else (plugin.numa_node,):
            asker = LocalAsker(callback, loop, plugin.name)
            validator = Validator(
                plugin.name, node, plugin.limit_bytes, asker, who=f"plug-in {plugin.target}", stop=asker.stop
            )
            try:
                validators.register(validator)
            except BaseException:
                asker.stop()
                raise
