"""The XDP program of an af_xdp port, as bytes: what the kernel keeps, and what goes to the sockets.

Owns the rules of `pass=` and the assembly. No system call is made here; native/xdp_kernel.c loads the result. The program looks at the
rules in the order given; a packet that one fits goes to the kernel's network stack (XDP_PASS). The rest goes to the socket of the
packet's receive queue, or, if that queue has none, to the kernel as well (the third argument of bpf_redirect_map, Linux 5.3).

    pass=arp+icmp+tcp:5201        arp  ip4  ip6  icmp  icmp6  tcp  udp  tcp:PORT  udp:PORT  0xETHERTYPE

A port fits as source or destination, of first fragments. Left out on purpose: VLAN tags and IPv6 extension headers; packets with them fit
rules on their ethertype (0x8100) or on ip6 only.
Source: Linux Documentation/bpf/standardization/instruction-set.rst.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

from dpdkmem.shared.errors import ConfigError

_ETHERTYPES: Final = {"arp": 0x0806, "ip4": 0x0800, "ip6": 0x86DD}
_PROTOCOLS: Final = {"tcp": 6, "udp": 17}
_ICMP: Final = {"icmp": (0x0800, 1), "icmp6": (0x86DD, 58)}
_MAX_RULES: Final = 16
_XDP_PASS: Final = 2
_REDIRECT_MAP: Final = 51  # bpf_redirect_map

# Opcodes, by the names of the specification's tables.
_LDX_B, _LDX_H, _LDX_W, _LD_IMM64 = 0x71, 0x69, 0x61, 0x18
_MOV, _MOV_REG, _ADD, _ADD_REG, _AND, _LSH = 0xB7, 0xBF, 0x07, 0x0F, 0x57, 0x67
_JA, _JEQ, _JNE, _JGT_REG, _JSET, _CALL, _EXIT = 0x05, 0x15, 0x55, 0x2D, 0x45, 0x85, 0x95
_R0, _R1, _R2, _R3, _R4, _R5, _R6, _R7 = range(8)
_PSEUDO_MAP_FD: Final = 1


@dataclass(frozen=True, slots=True)
class Rule:
    """What a packet must be to go to the kernel; 0 of a field: anything."""

    ethertype: int = 0
    protocol: int = 0
    port: int = 0


def parse_rules(text: str) -> tuple[Rule, ...]:
    """Return the rules of a value of `pass=`, words with + between them; "" has none.

    Raises:
        ConfigError: an unknown word, or more than 16.
    """
    words = [word for word in text.split("+") if word]
    if len(words) > _MAX_RULES:
        raise ConfigError(f"pass={text}: {len(words)} rules, at most {_MAX_RULES}")
    return tuple(_rule(word) for word in words)


def _rule(word: str) -> Rule:
    name, _, rest = word.partition(":")
    if not rest and name in _ETHERTYPES:
        return Rule(_ETHERTYPES[name])
    if not rest and name in _ICMP:
        return Rule(*_ICMP[name])
    if name in _PROTOCOLS and (not rest or (rest.isdecimal() and 0 < int(rest) < 1 << 16)):
        return Rule(protocol=_PROTOCOLS[name], port=int(rest or 0))
    try:
        ethertype = int(word, 16) if word.startswith("0x") else 0
    except ValueError:
        ethertype = 0
    if 0x0600 <= ethertype < 1 << 16:
        return Rule(ethertype)
    raise ConfigError(
        f"pass={word}: not one of arp, ip4, ip6, icmp, icmp6, tcp, udp, tcp:PORT, udp:PORT, 0xETHERTYPE"
    )


def _network_order(value: int) -> int:
    return int.from_bytes(value.to_bytes(2, "little"), "big")


@dataclass(slots=True)
class _Code:
    """Instructions; a jump names a label, which is placed later."""

    rows: list[tuple[int, int, int, int, str | int]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def add(self, opcode: int, dst: int = 0, src: int = 0, to: str | int = 0, imm: int = 0) -> None:
        self.rows.append((opcode, dst, src, imm, to))

    def place(self, label: str) -> None:
        self.labels[label] = len(self.rows)

    def encode(self) -> bytes:
        out = bytearray()
        for at, (opcode, dst, src, imm, to) in enumerate(self.rows):
            offset = self.labels[to] - at - 1 if isinstance(to, str) else to
            out += struct.pack("<BBhi", opcode, src << 4 | dst, offset, imm)
        return bytes(out)


def assemble(rules: tuple[Rule, ...], map_fd: int) -> bytes:
    """Return the program.

    Args:
        rules: of `parse_rules`.
        map_fd: of the XSKMAP, which the kernel takes a reference of when it loads the program.
    """
    code = _Code()
    code.add(_MOV_REG, _R6, _R1)
    if rules:
        code.add(_LDX_W, _R2, _R1, 0)  # xdp_md.data
        code.add(_LDX_W, _R3, _R1, 4)  # xdp_md.data_end
        _at_least(code, _R2, 14, "redirect")
        code.add(_LDX_H, _R5, _R2, 12)
        for number, rule in enumerate(rules):
            _judge(code, rule, f"next{number}")
            code.place(f"next{number}")
    code.place("redirect")
    code.add(_LDX_W, _R2, _R6, 16)  # xdp_md.rx_queue_index
    code.add(_LD_IMM64, _R1, _PSEUDO_MAP_FD, 0, map_fd)
    code.add(0)
    code.add(_MOV, _R3, imm=_XDP_PASS)
    code.add(_CALL, imm=_REDIRECT_MAP)
    code.add(_EXIT)
    if rules:  # the verifier refuses what nothing reaches
        code.place("pass")
        code.add(_MOV, _R0, imm=_XDP_PASS)
        code.add(_EXIT)
    return code.encode()


def _at_least(code: _Code, register: int, nbytes: int, otherwise: str) -> None:
    code.add(_MOV_REG, _R4, register)
    code.add(_ADD, _R4, imm=nbytes)
    code.add(_JGT_REG, _R4, _R3, otherwise)


def _judge(code: _Code, rule: Rule, otherwise: str) -> None:
    if rule.protocol == 0:
        code.add(_JEQ, _R5, to="pass", imm=_network_order(rule.ethertype))
        return
    if rule.ethertype in (0, _ETHERTYPES["ip4"]):
        not_ip4 = f"{otherwise}_ip6" if rule.ethertype == 0 else otherwise
        code.add(_JNE, _R5, to=not_ip4, imm=_network_order(_ETHERTYPES["ip4"]))
        _judge_ip4(code, rule, otherwise)
        code.place(f"{otherwise}_ip6")
    if rule.ethertype in (0, _ETHERTYPES["ip6"]):
        code.add(_JNE, _R5, to=otherwise, imm=_network_order(_ETHERTYPES["ip6"]))
        _at_least(code, _R2, 14 + 40, otherwise)
        code.add(_LDX_B, _R0, _R2, 14 + 6)  # next header
        code.add(_JNE, _R0, to=otherwise, imm=rule.protocol)
        code.add(_MOV_REG, _R7, _R2)
        code.add(_ADD, _R7, imm=14 + 40)
        _judge_port(code, rule, otherwise)


def _judge_ip4(code: _Code, rule: Rule, otherwise: str) -> None:
    _at_least(code, _R2, 14 + 20, otherwise)
    code.add(_LDX_B, _R0, _R2, 14 + 9)  # protocol
    code.add(_JNE, _R0, to=otherwise, imm=rule.protocol)
    if rule.port != 0:
        code.add(_LDX_H, _R0, _R2, 14 + 6)  # flags and fragment offset
        code.add(_JSET, _R0, to=otherwise, imm=_network_order(0x1FFF))
        code.add(_LDX_B, _R7, _R2, 14)
        code.add(_AND, _R7, imm=0xF)  # words of the header
        code.add(_LSH, _R7, imm=2)
        code.add(_ADD_REG, _R7, _R2)
        code.add(_ADD, _R7, imm=14)
    _judge_port(code, rule, otherwise)


def _judge_port(code: _Code, rule: Rule, otherwise: str) -> None:
    """The transport header begins at r7; it is read if the rule has a port."""
    if rule.port == 0:
        code.add(_JA, to="pass")
        return
    _at_least(code, _R7, 4, otherwise)
    for offset in (0, 2):  # source, destination
        code.add(_LDX_H, _R0, _R7, offset)
        code.add(_JEQ, _R0, to="pass", imm=_network_order(rule.port))
    code.add(_JA, to=otherwise)
