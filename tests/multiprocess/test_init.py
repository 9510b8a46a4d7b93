"""`dpdkmem.init(argv)`: EAL's options make this process a primary or a secondary."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import dpdkmem

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS = ("--file-prefix=init", "--no-huge")
SECONDARY = """
import dpdkmem, sys
with dpdkmem.init(sys.argv[1:]) as memory:
    assert type(memory) is dpdkmem.Attachment
    zone = memory.memzone_lookup("from primary")
    zone.buffer()[:5] = b"hello"
    print(*memory.application_argv)
"""


@pytest.mark.usefixtures("runtime_dir", "same_descriptors")
@pytest.mark.parametrize("proc_type", ["primary", "auto"])
def test_the_first_is_a_primary_that_serves_the_next_as_a_secondary(proc_type: str) -> None:
    with dpdkmem.init([*OPTIONS, f"--proc-type={proc_type}"]) as memory:
        assert not isinstance(memory, dpdkmem.Attachment)
        zone = memory.memzone_reserve("from primary", 64)
        for option in ("--proc-type=auto", "--proc-type=secondary"):
            zone.buffer()[:5] = bytes(5)
            done = subprocess.run(
                [sys.executable, "-c", SECONDARY, *OPTIONS, option, "--", "rest", "of", "it"],
                check=True,
                capture_output=True,
                text=True,
            )
            assert done.stdout == "rest of it\n"
            assert bytes(zone.buffer(0, 5)) == b"hello"
        zone.free()


@pytest.mark.usefixtures("runtime_dir")
def test_a_second_primary_is_refused_with_the_owner_named() -> None:
    with dpdkmem.init(OPTIONS), pytest.raises(dpdkmem.DeviceBusy, match=f"process {os.getpid()}"):
        dpdkmem.init(OPTIONS)


@pytest.mark.usefixtures("same_descriptors")
def test_a_secondary_without_a_primary_is_told_so(runtime_dir: Path) -> None:
    with pytest.raises(dpdkmem.PeerGone, match=f"no primary serves the prefix 'init' in {runtime_dir}"):
        dpdkmem.init(["--file-prefix=init", "--proc-type=secondary"])


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_what_only_a_command_can_do_is_a_config_error(option: str) -> None:
    with pytest.raises(dpdkmem.ConfigError, match=option):
        dpdkmem.init([option])


@pytest.mark.usefixtures("runtime_dir")
def test_what_has_no_effect_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(dpdkmem.PeerGone):
        dpdkmem.init(["--file-prefix=init", "--proc-type=secondary", "--in-memory"])
    assert "--in-memory has no effect" in caplog.text
