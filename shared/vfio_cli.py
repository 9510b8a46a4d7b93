"""`dpdkmem vfio status | bind | unbind`: devices for VFIO. Speaks to the kernel only; no primary is needed.

Rules: as cli.py, which adds the group to its own and turns errors into exit statuses. Where several devices are named, each is judged and done by itself, in order; the
first that fails ends it, and what was done before it stays done and was said.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import sys
from typing import TYPE_CHECKING

import click

from dpdkmem.shared.errors import ConfigError
from dpdkmem.shared.pci import DRIVER, PciAddress
from dpdkmem.shared.render import Style
from dpdkmem.shared.vfio_bind import Binder, check_all
from dpdkmem.shared.vfio_host import Roots, vfio_lines, vfio_report

if TYPE_CHECKING:
    from collections.abc import Sequence

_addresses = click.argument("addresses", metavar="ADDRESS…", nargs=-1, required=True)
_dry_run = click.option("--dry-run", is_flag=True, help="Print what would be written, and write nothing.")


@click.group("vfio")
def vfio_group() -> None:
    """Devices for VFIO: what there is, and who drives it."""


@vfio_group.command()
@click.argument("addresses", metavar="[ADDRESS…]", nargs=-1)
@click.option(
    "--all", "everything", is_flag=True, help="All PCI devices, not only of the network and of VFIO."
)
@click.option("--json", "as_json", is_flag=True, help="As JSON (docs/json.md).")
def status(addresses: Sequence[str], *, everything: bool, as_json: bool) -> None:
    """Show devices: driver, IOMMU group, NUMA node, interface, and who has them open."""
    report = vfio_report([PciAddress.parse(one) for one in addresses], Roots(), everything=everything)
    if as_json:
        click.echo(json.dumps(report))
        return
    style = Style(colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    click.echo("\n".join(vfio_lines(report, style)))


@vfio_group.command()
@_addresses
@click.option("--driver", default=DRIVER, show_default=True, help="The driver of VFIO.")
@click.option("--user", metavar="USER", help="Who may open the devices, by name or number.")
@click.option("--group", metavar="GROUP", help="A group that may open the devices.")
@click.option(
    "--noiommu", is_flag=True, help="Turn no-IOMMU mode on if there is no IOMMU: nothing is protected then."
)
@click.option(
    "--force", is_flag=True, help="Also if it carries routes, or others of its IOMMU group have drivers."
)
@_dry_run
def bind(  # noqa: PLR0917 - the options
    addresses: Sequence[str],
    driver: str,
    user: str | None,
    group: str | None,
    noiommu: bool,
    force: bool,
    dry_run: bool,
) -> None:
    """Take devices from the kernel's drivers."""
    wanted = [PciAddress.parse(one) for one in addresses]
    check_all(wanted)
    uid, gid = _user(user), _group(group)
    binder = Binder(Roots(), click.echo, dry_run=dry_run, force=force)
    for address in wanted:
        binder.bind(address, driver, noiommu=noiommu)
        if user is not None or group is not None:
            binder.give(address, uid, gid)


@vfio_group.command()
@_addresses
@_dry_run
def unbind(addresses: Sequence[str], *, dry_run: bool) -> None:
    """Give devices back to the kernel's drivers."""
    wanted = [PciAddress.parse(one) for one in addresses]
    check_all(wanted)
    binder = Binder(Roots(), click.echo, dry_run=dry_run)
    for address in wanted:
        binder.unbind(address)


def _user(text: str | None) -> int:
    if text is None or text.isdecimal():
        return -1 if text is None else int(text)
    try:
        return pwd.getpwnam(text).pw_uid
    except KeyError:
        raise ConfigError(f"--user={text}: there is no such user") from None


def _group(text: str | None) -> int:
    if text is None or text.isdecimal():
        return -1 if text is None else int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise ConfigError(f"--group={text}: there is no such group") from None
