"""shared/messages.py: the bytes are those of native/wire.h, and one test per rule of syntax."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from dpdkmem.shared import messages as m
from dpdkmem.shared.errors import LocalProtocolError, PeerProtocolError

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[2]
SESSION_ID = bytes(range(16))
RUNS = (m.Run(0, 5, 2), m.Run(63, 0, 1))

HELLO = m.Hello(1, 1, 1, m.Role.WORKER, m.HelloFlag.NO_GUARD, "tester")
WELCOME = m.Welcome(1, 2, 2, userfaultfd=True, session_id=SESSION_ID, control_bytes=4096, base_vaddr=1 << 32, window_bytes=1 << 30)  # fmt: skip
LIST_FILES = m.ListFiles((0, 3))
SEGMENTS = m.Segments(RUNS, 3)
MAP = m.Round(7, 0, m.RoundOp.MAP, last=True, event_seq=0, runs=RUNS, n_fds=3)
UNMAP = m.Round(8, 1, m.RoundOp.UNMAP, last=False, event_seq=9, runs=RUNS, n_fds=0)
DROP = m.Round(0, m.NO_SLOT, m.RoundOp.UNMAP, last=True, event_seq=0, runs=RUNS, n_fds=0)
GROW = m.Grow(3, 100, 64, 1 << 21, 0, iova_contiguous=True)
DONE = m.Done(3, 28, retryable=True, text="no huge pages")
EXTERNAL = m.External(5, m.ExternalOp.ADD, m.ExternalFlag.HAS_FD, 0, 1 << 40, 1 << 20, 4096, 4096, "frames")
END = m.End(m.EndCode.PROTOCOL, retryable=False, text="so it is")

ALL: Final[tuple[m.Message, ...]] = (
    HELLO, WELCOME, LIST_FILES, SEGMENTS, m.Synced(4), m.Ready(4, guarded=True), m.Attached(4), MAP, UNMAP, DROP, GROW, DONE,
    m.Bye(), m.MpOpen(), END, m.GetFds(4, m.Run(2, 9, 300)), m.Fds(4, m.Run(2, 9, 253), 253), EXTERNAL, m.ExternalDone(5, 17, 3, "overlaps"),
    m.ExternalFile(9, read_only=True, generation=4, fd_offset=4096),
    m.ValidatorRegister(6, 1 << 30, 0, "budget"), m.ValidatorUnregister(7, 1, "budget"),
    m.Validate(8, 1 << 30, (1 << 30) + 4096, 0, "budget"), m.Verdict(8, 12, "not today"),
)  # fmt: skip


def names(message: m.Message) -> str:
    return message.TYPE.name


def changed(message: m.Message, offset: int, form: str, value: int | bytes) -> bytes:
    """Returns the bytes of a message with one field overwritten."""
    data = bytearray(message.encode())
    struct.pack_into("=" + form, data, offset, value)
    return bytes(data)


def refused(data: bytes, n_fds: int = 0) -> str:
    with pytest.raises(PeerProtocolError) as caught:
        m.decode(data, n_fds)
    assert caught.value.wire_code == m.EndCode.PROTOCOL
    return caught.value.text


@pytest.mark.parametrize("message", ALL, ids=names)
def test_decode_gives_back_what_was_encoded(message: m.Message) -> None:
    assert m.decode(message.encode(), message.n_fds) == message


def test_every_message_type_is_here() -> None:
    assert {message.TYPE for message in ALL} == set(m.MessageType)


# ---- the same as in C and in the docs ------------------------------------------------------------------------------------------


def documented_words() -> list[tuple[str, int, int]]:
    """Returns name, offset and size of each word of the control segment that docs/protocol.md names."""
    rows = re.findall(
        r"^\| `(\w+\.\w+)` \| (\d+) \| (\d+) \|", (ROOT / "docs/protocol.md").read_text(), re.MULTILINE
    )
    return [(name, int(offset), int(size)) for name, offset, size in rows]


def documented_fields(title: str) -> dict[str, tuple[int, int]]:
    """Returns field -> offset and size of the table under a title of docs/protocol.md."""
    section = (ROOT / "docs/protocol.md").read_text().split(f"\n### {title}\n")[1].split("\n##")[0]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \|", section, re.MULTILINE)
    return {field: (int(offset), int(size)) for offset, size, field in rows}


@pytest.fixture(scope="module")
def in_c(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, int]:
    """Returns sizes, offsets and constants as the C compiler sees them."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs compiler: no cc on PATH")
    text = (ROOT / "native/wire.h").read_text()
    names = sorted(
        set(re.findall(r"\bDM_[A-Z0-9_]+(?=\s*[=,} /])", text)) - {"DM_WIRE_H"} | {"DM_WIRE_MAGIC"}
    )
    names += [
        "DM_MAX_LISTS",
        "DM_MAX_HEAPS",
        "DM_MAX_ROUNDS",
        "DM_MAX_OWNERS",
        "DM_NAME_BYTES",
        "DM_SESSION_ID_BYTES",
    ]
    names += ["DM_ROLE_WORKER", "DM_ALLOC_IOVA_CONTIG"]
    wanted = [
        (name, name) for name in names if name not in {"DM_HELLO_", "DM_WELCOME_", "DM_READY_", "DM_WIRE_H"}
    ]
    structs = re.findall(r"struct (dm_wire_\w+) \{(.*?)\n\};", text, re.DOTALL)
    for name, body in structs:
        wanted.append((name, f"sizeof(struct {name})"))
        fields = re.findall(r"(\w+)(?:\[\w*\])?\s*[,;]", re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL))
        wanted += [(f"{name}.{field}", f"offsetof(struct {name}, {field})") for field in fields]
    for name in [row[0] for row in documented_words()]:
        kind, field = name.split(".")
        wanted.append((name, f"offsetof(struct dm_{kind}, {field})"))
        wanted.append((name + ".size", f"sizeof(((struct dm_{kind} *)0)->{field})"))
    folder = tmp_path_factory.mktemp("wire")
    lines = "".join(f'\tprintf("{name} %lld\\n", (long long)({value}));\n' for name, value in wanted)
    source = folder / "wire.c"
    source.write_text(
        '#include <stddef.h>\n#include <stdio.h>\n#include "dpdkmem.h"\n#include "types.h"\n#include "wire.h"\n'
        f"int main(void)\n{{\n{lines}\treturn 0;\n}}\n"
    )
    subprocess.run(
        [compiler, "-std=gnu11", f"-I{ROOT / 'native'}", "-o", folder / "wire", source], check=True
    )
    output = subprocess.run([folder / "wire"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in output.splitlines())}


def test_constants_are_those_of_wire_h(in_c: Mapping[str, int]) -> None:
    assert in_c["DM_WIRE_MAGIC"] == m.WIRE_MAGIC
    assert in_c["DM_WIRE_VERSION"] == m.WIRE_VERSION
    assert in_c["DM_WIRE_MAX_BYTES"] == m.MAX_MESSAGE_BYTES
    assert in_c["DM_WIRE_MAX_FDS"] == m.MAX_FDS
    assert in_c["DM_WIRE_MAX_RUNS"] == m.MAX_RUNS
    assert in_c["DM_WIRE_TEXT_BYTES"] == m.TEXT_BYTES
    assert in_c["DM_NAME_BYTES"] == m.NAME_BYTES
    assert in_c["DM_SESSION_ID_BYTES"] == m.SESSION_ID_BYTES
    assert (in_c["DM_MAX_LISTS"], in_c["DM_MAX_HEAPS"]) == (m.MAX_LISTS, m.MAX_HEAPS)
    assert (in_c["DM_MAX_ROUNDS"], in_c["DM_MAX_OWNERS"]) == (m.MAX_ROUNDS, m.MAX_OWNERS)
    assert in_c["DM_WELCOME_USERFAULTFD"] == m._WELCOME_USERFAULTFD
    assert in_c["DM_READY_GUARDED"] == m._READY_GUARDED
    assert in_c["DM_ROUND_LAST"] == m._ROUND_LAST
    assert in_c["DM_ALLOC_IOVA_CONTIG"] == m._GROW_IOVA_CONTIGUOUS
    assert in_c["DM_HELLO_NO_GUARD"] == m.HelloFlag.NO_GUARD
    assert in_c["DM_HELLO_GUARDED"] == m.HelloFlag.GUARDED
    assert in_c["DM_ROLE_WORKER"] == m.Role.WORKER


def test_enumerations_are_those_of_wire_h(in_c: Mapping[str, int]) -> None:
    assert {kind.name: kind.value for kind in m.MessageType} == {
        kind.name: in_c[f"DM_WIRE_{kind.name}"] for kind in m.MessageType
    }
    assert {code.name: code.value for code in m.EndCode} == {
        name.removeprefix("DM_END_"): value for name, value in in_c.items() if name.startswith("DM_END_")
    }
    assert {op.name: op.value for op in m.RoundOp} == {
        op.name: in_c[f"DM_ROUND_{op.name}"] for op in m.RoundOp
    }


def test_sizes_are_those_of_wire_h(in_c: Mapping[str, int]) -> None:
    header = m.HEADER_BYTES
    assert header == in_c["dm_wire_header"]
    assert m._RUN.size == in_c["dm_wire_run"]
    sizes = {
        "hello": m._HELLO, "welcome": m._WELCOME, "runs": m._RUNS, "version": m._VERSION, "round": m._ROUND,
        "grow": m._GROW, "text": m._TEXT,
    }  # fmt: skip
    assert {name: header + form.size for name, form in sizes.items()} == {
        name: in_c[f"dm_wire_{name}"] for name in sizes
    }
    assert header + m._RUN.size == in_c["dm_wire_fds"]


@pytest.mark.parametrize(
    ("struct_name", "form", "fields"),
    [
        ("header", m._HEADER, ("magic", "type", "n_fds", "bytes", "request_id")),
        ("run", m._RUN, ("list_idx", "reserved", "first_seg", "n_segs")),
        ("hello", m._HELLO, ("version_min", "version_max", "layout_version", "role", "flags", "name")),
        ("welcome", m._WELCOME, ("version", "n_lists", "owner_id", "flags", "reserved", "session_id", "control_bytes", "base_vaddr", "window_bytes")),
        ("runs", m._RUNS, ("n_runs", "reserved")),
        ("version", m._VERSION, ("version", "flags", "reserved")),
        ("round", m._ROUND, ("round_id", "slot", "op", "flags", "event_seq", "n_runs", "reserved")),
        ("grow", m._GROW, ("bytes", "align", "page_bytes", "heap_idx", "flags")),
        ("text", m._TEXT, ("status", "retryable", "text")),
    ],
)  # fmt: skip
def test_offsets_are_those_of_wire_h(
    in_c: Mapping[str, int], struct_name: str, form: struct.Struct, fields: tuple[str, ...]
) -> None:
    offset = 0 if struct_name in {"header", "run"} else m.HEADER_BYTES
    codes = re.findall(r"\d*[a-zA-Z]", form.format)
    assert len(codes) == len(fields)
    for field, code in zip(fields, codes, strict=True):
        assert offset == in_c[f"dm_wire_{struct_name}.{field}"], field
        offset += struct.calcsize("=" + code)


@pytest.mark.parametrize(
    ("title", "struct_name", "form"),
    [
        ("Header", "header", m._HEADER),
        ("1 HELLO", "hello", m._HELLO),
        ("2 WELCOME", "welcome", m._WELCOME),
        ("Runs", "run", m._RUN),
        ("3 LIST_FILES", "runs", m._RUNS),
        ("5 SYNCED", "version", m._VERSION),
        ("8 ROUND", "round", m._ROUND),
        ("9 GROW", "grow", m._GROW),
        ("10 DONE", "text", m._TEXT),
    ],
)
def test_the_byte_tables_of_the_docs_are_those_of_wire_h(
    in_c: Mapping[str, int], title: str, struct_name: str, form: struct.Struct
) -> None:
    documented = documented_fields(title)
    assert {name: offset for name, (offset, _) in documented.items()} == {
        name: in_c[f"dm_wire_{struct_name}.{name}"] for name in documented
    }
    n_bytes = form.size if struct_name in {"header", "run"} else m.HEADER_BYTES + form.size
    end = m.HEADER_BYTES if n_bytes > form.size else 0
    for offset, size in documented.values():
        assert offset == end
        end += size
    assert end == n_bytes


def test_the_words_of_the_control_segment_in_the_docs_are_those_of_types_h(in_c: Mapping[str, int]) -> None:
    words = documented_words()
    assert len(words) > 30
    assert words == [(name, in_c[name], in_c[name + ".size"]) for name, _, _ in words]


# ---- the header ------------------------------------------------------------------------------------------------


def test_a_packet_shorter_than_the_header_is_refused() -> None:
    for n in range(m.HEADER_BYTES):
        assert "shorter" in refused(m.Bye().encode()[:n])


def test_another_magic_is_refused() -> None:
    assert "begins with" in refused(changed(m.Bye(), 0, "I", 0x31534D45))


def test_an_unknown_type_is_refused() -> None:
    for number in (0, 19, 0xFFFF):
        assert f"no message type {number}" in refused(changed(m.Bye(), 4, "H", number))


def test_a_length_that_is_not_the_packets_is_refused() -> None:
    assert "bytes long" in refused(changed(m.Bye(), 8, "I", 17))
    assert "bytes long" in refused(m.Bye().encode() + b"\0")


def test_a_message_longer_than_the_limit_is_refused() -> None:
    data = struct.pack("=IHHII", m.WIRE_MAGIC, m.MessageType.SEGMENTS, 0, m.MAX_MESSAGE_BYTES + 1, 0)
    assert "may" in refused(data.ljust(m.MAX_MESSAGE_BYTES + 1, b"\0"))


@pytest.mark.parametrize("message", ALL, ids=names)
def test_another_number_of_descriptors_than_announced_is_refused(message: m.Message) -> None:
    assert "descriptors" in refused(message.encode(), message.n_fds + 1)


@pytest.mark.parametrize("message", ALL, ids=names)
def test_more_descriptors_than_the_type_has_are_refused(message: m.Message) -> None:
    assert "descriptors" in refused(changed(message, 6, "H", message.n_fds + 1), message.n_fds + 1)


@pytest.mark.parametrize("message", [x for x in ALL if x.TYPE not in m._REQUESTS], ids=names)
def test_a_request_id_where_none_belongs_is_refused(message: m.Message) -> None:
    assert "request id" in refused(changed(message, 12, "I", 1), message.n_fds)


@pytest.mark.parametrize("message", [GROW, DONE], ids=names)
def test_a_request_id_of_zero_is_refused(message: m.Message) -> None:
    assert "request id 0" in refused(changed(message, 12, "I", 0))


@pytest.mark.parametrize("message", ALL, ids=names)
def test_a_message_cut_or_prolonged_with_a_matching_length_is_refused(message: m.Message) -> None:
    data = message.encode()
    for n_bytes in {*range(m.HEADER_BYTES, len(data)), len(data) + 1, len(data) + m._RUN.size} - {len(data)}:
        other = bytearray(data[:n_bytes].ljust(n_bytes, b"\0"))
        struct.pack_into("=I", other, 8, n_bytes)
        refused(bytes(other), message.n_fds)


# ---- reserved fields and flags ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "offset"),
    [
        (WELCOME, 28), (LIST_FILES, 20), (SEGMENTS, 20), (SEGMENTS, 28), (m.Synced(1), 24), (m.Synced(1), 28),
        (m.Ready(1, guarded=False), 28), (m.Attached(1), 24), (m.Attached(1), 28), (MAP, 44), (MAP, 52),
    ],
)  # fmt: skip
def test_a_reserved_field_that_is_not_zero_is_refused(message: m.Message, offset: int) -> None:
    assert "reserved" in refused(changed(message, offset, "I", 1), message.n_fds)


@pytest.mark.parametrize(("message", "offset"), [(WELCOME, 24), (m.Ready(1, guarded=True), 24), (MAP, 28), (GROW, 44), (DONE, 20), (END, 20)])  # fmt: skip
def test_an_unknown_flag_is_refused(message: m.Message, offset: int) -> None:
    assert "flags" in refused(changed(message, offset, "I", 2), message.n_fds)


def test_unknown_flags_of_hello_and_codes_of_end_are_kept_for_the_judge_of_meaning() -> None:
    hello = m.decode(changed(HELLO, 28, "I", 0x81), 0)
    assert isinstance(hello, m.Hello)
    assert int(hello.flags) == 0x81
    end = m.decode(changed(END, 16, "i", 4711), 0)
    assert isinstance(end, m.End)
    assert end.code == 4711


# ---- values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "value"), [(32, b"x" * 32), (32, b"a\0b"), (32, b"\xff\0"), (32, b"\x1b[31m\0"), (63, b"x")]
)
def test_a_name_that_is_not_printable_utf8_with_nul_and_zeros_is_refused(offset: int, value: bytes) -> None:
    assert "the name" in refused(changed(HELLO, offset, f"{len(value)}s", value))


@pytest.mark.parametrize("message", [DONE, END], ids=names)
def test_a_text_without_nul_is_refused(message: m.Message) -> None:
    assert "the text" in refused(changed(message, 24, "512s", b"x" * 512))


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 1), (2, 1)])
def test_an_empty_version_range_is_refused(low: int, high: int) -> None:
    data = bytearray(HELLO.encode())
    struct.pack_into("=HH", data, 16, low, high)
    assert "version range" in refused(bytes(data))


@pytest.mark.parametrize(
    ("offset", "form", "value"),
    [(16, "H", 0), (18, "H", 257), (20, "I", 0), (20, "I", 1), (20, "I", 32768), (48, "Q", 0), (56, "Q", (1 << 64) - 1), (64, "Q", 0)],
)  # fmt: skip
def test_a_welcome_with_impossible_values_is_refused(offset: int, form: str, value: int) -> None:
    assert "WELCOME" in refused(changed(WELCOME, offset, form, value), 3)


@pytest.mark.parametrize(
    ("offset", "form", "value"),
    [(24, "I", 256), (32, "Q", (1 << 64) - 1), (40, "Q", 0), (40, "Q", (1 << 64) - 1)],
)
def test_a_run_that_is_no_range_is_refused(offset: int, form: str, value: int) -> None:
    refused(changed(SEGMENTS, offset, form, value), 3)


def test_segments_bring_a_descriptor_each_or_none() -> None:
    assert m.decode(m.Segments(RUNS, 0).encode(), 0).n_fds == 0
    for n_fds in (1, 2, 4):
        assert "descriptors for 3 segments" in refused(changed(SEGMENTS, 6, "H", n_fds), n_fds)


def test_a_message_needs_runs() -> None:
    for message in (SEGMENTS, LIST_FILES):
        data = bytearray(message.encode()[:24])
        struct.pack_into("=I", data, 8, 24)
        struct.pack_into("=HI", data, 6, 0, 24)
        struct.pack_into("=I", data, 16, 0)
        assert "runs" in refused(bytes(data))


def test_more_runs_than_the_limit_are_refused() -> None:
    data = bytearray(m.Segments((m.Run(0, 0, 1),) * m.MAX_RUNS, m.MAX_FDS).encode() + m._RUN.pack(0, 0, 0, 1))
    struct.pack_into("=I", data, 8, len(data))
    struct.pack_into("=I", data, 16, m.MAX_RUNS + 1)
    assert "more than 253" in refused(bytes(data), m.MAX_FDS)


def test_list_files_ascend_and_have_no_segments() -> None:
    assert "ascend" in refused(changed(LIST_FILES, 48, "I", 0), 2)
    assert "no segments" in refused(changed(LIST_FILES, 40, "Q", 1), 2)


@pytest.mark.parametrize(
    ("message", "offset", "form", "value"),
    [
        (MAP, 16, "I", 0),  # no round id, but a slot
        (MAP, 20, "I", m.MAX_ROUNDS),
        (MAP, 20, "I", m.NO_SLOT),
        (MAP, 24, "I", 0),
        (MAP, 24, "I", 3),
        (MAP, 24, "I", m.RoundOp.UNMAP),  # with descriptors
        (MAP, 32, "Q", 1),  # a map that waits for an event
        (DROP, 16, "I", 1),
        (DROP, 20, "I", 0),
        (DROP, 24, "I", m.RoundOp.MAP),
        (DROP, 28, "I", 0),
    ],
)
def test_a_round_that_contradicts_itself_is_refused(
    message: m.Message, offset: int, form: str, value: int
) -> None:
    assert "ROUND" in refused(changed(message, offset, form, value), message.n_fds)


@pytest.mark.parametrize(
    ("offset", "form", "value"),
    [(16, "Q", 0), (16, "Q", 1 << 63), (24, "Q", 3), (32, "Q", 5), (40, "I", 128)],
)
def test_a_grow_with_impossible_values_is_refused(offset: int, form: str, value: int) -> None:
    assert "GROW" in refused(changed(GROW, offset, form, value))


@pytest.mark.parametrize("status", [-1, 4096])
def test_a_status_that_is_no_errno_is_refused(status: int) -> None:
    assert "no errno" in refused(changed(DONE, 16, "i", status))


def test_a_negative_end_code_is_refused() -> None:
    assert "no code" in refused(changed(END, 16, "i", -1))


# ---- sending ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        m.Hello(1, 1, 1, 1, m.HelloFlag(0), "x" * 32),
        m.Hello(1, 1, 1, 1, m.HelloFlag(0), "a\nb"),
        m.Hello(1, 1 << 16, 1, 1, m.HelloFlag(0), "x"),
        m.Segments((), 0),
        m.Segments((m.Run(0, 0, 254),), 254),
        m.Segments((m.Run(0, 0, 2),), 1),
        m.ListFiles(()),
        m.Grow(0, 1, 0, 0, 0),
        m.Synced(-1),
        m.Done(1, 5000, retryable=False, text=""),
    ],
)
def test_what_the_peer_would_refuse_cannot_be_sent(message: m.Message) -> None:
    with pytest.raises(LocalProtocolError):
        message.encode()


@pytest.mark.parametrize(
    ("text", "arrives"),
    [
        ("x" * 600, "x" * 511),
        ("ä" * 400, "ä" * 255),
        ("two\nlines\0", "two lines "),
        ("\udc80", " "),
        ("", ""),
    ],
)
def test_a_text_is_cut_at_a_character_and_made_printable_instead_of_refused(text: str, arrives: str) -> None:
    end = m.decode(m.End(1, retryable=False, text=text).encode(), 0)
    assert isinstance(end, m.End)
    assert end.text == arrives


# ---- split_runs ------------------------------------------------------------------------------------------------


def test_split_runs_fills_each_message_and_keeps_the_order() -> None:
    runs = (m.Run(0, 10, 250), m.Run(1, 0, 300), m.Run(2, 7, 1))
    fds = tuple(range(1000, 1551))
    portions = list(m.split_runs(runs, fds))
    assert [sum(run.n_segs for run in portion) for portion, _ in portions] == [253, 253, 45]
    assert tuple(fd for _, part in portions for fd in part) == fds
    segments = [(run.list_idx, seg) for portion, _ in portions for run in portion for seg in range(run.first_seg, run.first_seg + run.n_segs)]  # fmt: skip
    assert segments == [
        (run.list_idx, seg) for run in runs for seg in range(run.first_seg, run.first_seg + run.n_segs)
    ]
    for portion, part in portions:
        m.Segments(portion, len(part)).encode()


def test_split_runs_without_descriptors_cuts_by_the_number_of_runs() -> None:
    runs = tuple(m.Run(0, 2 * i, 1 << 20) for i in range(600))
    portions = list(m.split_runs(runs))
    assert [len(portion) for portion, _ in portions] == [253, 253, 94]
    assert tuple(run for portion, _ in portions for run in portion) == runs


def test_split_runs_of_nothing_is_nothing() -> None:
    assert not list(m.split_runs(()))


def test_split_runs_demands_a_descriptor_per_segment() -> None:
    with pytest.raises(LocalProtocolError):
        list(m.split_runs((m.Run(0, 0, 2),), (5,)))
