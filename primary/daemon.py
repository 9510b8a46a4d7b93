"""`dpdkmem-primary`: the primary as a foreground service.

Owns the process: arguments, log, signals, the service manager, exit status. What a primary is stands in service.py.

Life: parse -> start -> READY=1 -> serve -> SIGTERM or SIGINT -> STOPPING=1 -> end in order -> exit 0. An error on the way up is
one line on standard error, with the exit status of its class (shared/errors.py, docs/cli.md).
Source: sd_notify(3) for the datagrams to $NOTIFY_SOCKET.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING

from dpdkmem.shared.errors import ConfigError, DpdkmemError
from dpdkmem.shared.kinds import ProcType
from dpdkmem.shared.options import Info, help_text, parse_argv

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpdkmem.primary.service import Primary
    from dpdkmem.shared.config import Config

_LOG = logging.getLogger("dpdkmem.primary")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a primary until it is told to end; return the exit status."""
    logging.basicConfig(
        format="dpdkmem-primary: %(levelname)s: %(message)s", level=_log_level(), stream=sys.stderr
    )
    try:
        config = parse_argv(sys.argv[1:] if argv is None else argv)
        match config:
            case Info.HELP:
                sys.stdout.write(help_text())
                return 0
            case Info.VERSION:
                from dpdkmem import native

                sys.stdout.write(f"dpdkmem-primary {native.version()}\n")
                return 0
            case _:
                return _serve(config)
    except DpdkmemError as error:
        sys.stderr.write(f"dpdkmem-primary: {error}\n")
        return error.exit_status


def _log_level() -> int:
    return logging.getLevelNamesMapping().get(os.environ.get("DPDKMEM_LOG", "INFO").upper(), logging.INFO)


def _serve(config: Config) -> int:
    from dpdkmem.primary.service import Primary

    if config.proc_type is ProcType.SECONDARY:
        raise ConfigError(
            "dpdkmem-primary with --proc-type=secondary: a secondary is your own program, by dpdkmem.attach() or dm_attach()"
        )
    primary = Primary(config.resolved(ProcType.PRIMARY))
    _stop_on_signals(primary)
    with primary:
        _notify("READY=1")
        _LOG.info(
            "prefix %s is served at %s", config.file_prefix, primary.session_path or "nobody: --no-shconf"
        )
        primary.run()
        _notify("STOPPING=1")
        _LOG.info("ending")
    return 0


def _stop_on_signals(primary: Primary) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: primary.stop())


def _notify(state: str) -> None:
    """Tell the service manager, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
        try:
            notify.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
        except OSError as error:
            _LOG.warning("the service manager at %s does not listen: %s", address, error)


if __name__ == "__main__":
    sys.exit(main())
