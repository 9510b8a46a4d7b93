"""The XDP program, run by an interpreter of the few instructions that it has; specs of af_xdp ports."""

from __future__ import annotations

import struct

import pytest

from dpdkmem.shared.errors import ConfigError
from dpdkmem.shared.xdp_program import assemble, parse_rules
from dpdkmem.shared.xdp_spec import parse_spec

PASS, REDIRECTED = 2, 99
DATA, CONTEXT, MAP_FD = 0x1000, 0x100000, 7
SIZES = {0x71: 1, 0x69: 2, 0x61: 4}


def run(program: bytes, packet: bytes) -> int:
    """What becomes of a packet of queue 3; a read beyond its end fails, as in the verifier."""
    code = [struct.unpack_from("<BBhi", program, at) for at in range(0, len(program), 8)]
    context = struct.pack("<5I", DATA, DATA + len(packet), 0, 0, 3)
    r = [0] * 10
    r[1] = CONTEXT
    at = 0
    for _ in range(10_000):
        opcode, registers, offset, imm = code[at]
        dst, src, at = registers & 15, registers >> 4, at + 1
        if opcode in SIZES:
            memory, base = (context, CONTEXT) if r[src] >= CONTEXT else (packet, DATA)
            start = r[src] + offset - base
            assert 0 <= start <= len(memory) - SIZES[opcode], "read outside of the packet"
            r[dst] = int.from_bytes(memory[start : start + SIZES[opcode]], "little")
            continue
        match opcode:
            case 0x18:
                assert (src, imm) == (1, MAP_FD)
                at += 1
            case 0xB7:
                r[dst] = imm
            case 0xBF:
                r[dst] = r[src]
            case 0x07:
                r[dst] += imm
            case 0x0F:
                r[dst] += r[src]
            case 0x57:
                r[dst] &= imm
            case 0x67:
                r[dst] <<= imm
            case 0x85:
                assert (imm, r[2], r[3]) == (51, 3, PASS)
                r[0] = REDIRECTED
            case 0x95:
                return r[0]
            case _:
                jumps = {
                    0x05: True,
                    0x15: r[dst] == imm,
                    0x55: r[dst] != imm,
                    0x2D: r[dst] > r[src],
                    0x45: bool(r[dst] & imm),
                }
                at += offset if jumps[opcode] else 0
    raise AssertionError("it does not end")


def ethernet(ethertype: int, payload: bytes) -> bytes:
    return bytes(12) + ethertype.to_bytes(2, "big") + payload


def ip4(protocol: int, payload: bytes, *, options: int = 0, fragment: int = 0) -> bytes:
    head = (
        bytes((0x45 + options, 0, 0, 0, 0, 0))
        + fragment.to_bytes(2, "big")
        + bytes((64, protocol))
        + bytes(10)
    )
    return ethernet(0x0800, head + bytes(4 * options) + payload)


def ip6(protocol: int, payload: bytes) -> bytes:
    return ethernet(0x86DD, bytes((0x60, 0, 0, 0, 0, 0, protocol)) + bytes(33) + payload)


def ports(source: int, destination: int) -> bytes:
    return struct.pack(">HH", source, destination) + bytes(16)


ARP = ethernet(0x0806, bytes(28))
CASES = [
    ("", ARP, False),
    ("arp", ARP, True),
    ("arp", ip4(6, ports(1, 2)), False),
    ("ip4", ip4(6, ports(1, 2)), True),
    ("ip6", ip6(6, ports(1, 2)), True),
    ("ip6", ip4(6, ports(1, 2)), False),
    ("0x88cc", ethernet(0x88CC, b""), True),
    ("icmp", ip4(1, b""), True),
    ("icmp", ip6(58, b""), False),
    ("icmp6", ip6(58, b""), True),
    ("tcp", ip4(6, b""), True),
    ("tcp", ip6(6, b""), True),
    ("tcp", ip4(17, ports(1, 2)), False),
    ("udp:53", ip4(17, ports(53, 9)), True),
    ("udp:53", ip4(17, ports(9, 53)), True),
    ("udp:53", ip4(17, ports(9, 54)), False),
    ("udp:53", ip4(17, ports(9, 53), options=3), True),
    ("udp:53", ip4(17, ports(9, 53), fragment=0x2000), True),  # the first of several
    ("udp:53", ip4(17, ports(9, 53), fragment=0x2001), False),
    ("udp:53", ip4(17, b"\0"), False),
    ("udp:53", ip6(17, ports(9, 53)), True),
    ("udp:53", ip6(17, b"\0"), False),
    ("tcp", ethernet(0x0800, b"\x45"), False),
    ("arp+udp:53+tcp:80", ip6(6, ports(80, 4)), True),
    ("arp+udp:53+tcp:80", ip6(6, ports(53, 4)), False),
    ("arp", b"\0" * 13, False),
]


@pytest.mark.parametrize(("rules", "packet", "is_passed"), CASES)
def test_what_a_rule_names_goes_to_the_kernel(rules: str, packet: bytes, is_passed: bool) -> None:
    program = assemble(parse_rules(rules), MAP_FD)
    assert run(program, packet) == (PASS if is_passed else REDIRECTED)


@pytest.mark.parametrize(
    "rules",
    ["ftp", "tcp:0", "tcp:65536", "tcp:x", "0x5ff", "0x10000", "0xzz", "arp:1", "+".join(["arp"] * 17)],
)
def test_other_rules_are_refused(rules: str) -> None:
    with pytest.raises(ConfigError):
        parse_rules(rules)


def test_a_spec_says_what_it_means() -> None:
    spec = parse_spec("af_xdp:veth0,queue=2,mode=copy,pass=arp+tcp:22,busy_poll=50")
    assert (spec.iface, spec.name, spec.first_queue, spec.n_queues) == ("veth0", "af_xdp_veth0", 2, 1)
    assert (spec.mode, spec.busy_poll_us, spec.need_wakeup, spec.passed) == (1, 50, True, "arp+tcp:22")
    assert spec.canonical == "af_xdp:busy_poll=50,iface=veth0,mode=copy,pass=arp+tcp:22,queue=2"
    assert parse_spec(spec.canonical) == spec
    assert parse_spec("af_xdp:veth0").n_queues == 0  # all that there are


@pytest.mark.parametrize(
    "text",
    [
        "ring:name=a", "af_xdp:", "af_xdp:veth0,iface=veth1", "af_xdp:veth0,mode=fast", "af_xdp:veth0,queues=0", "af_xdp:veth0,queue=x",
        "af_xdp:veth0,colour=red", "af_xdp:veth0,name=" + "n" * 24, "af_xdp:veth0,pass=ftp",
    ],
)  # fmt: skip
def test_a_bad_spec_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_spec(text)
