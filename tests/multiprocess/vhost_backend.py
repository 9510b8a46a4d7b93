"""The memory side of a vhost-user back-end: it gets a memory table and its descriptors, and maps what they say.

Arguments: the descriptor of a socket, the vaddr and the length of an area to read. It writes 0x77 into the area's first byte and
prints what it found as JSON: the number of regions, whether guest and user addresses agree, and the values of all bytes.
Source: the vhost-user specification, VHOST_USER_SET_MEM_TABLE.
"""

from __future__ import annotations

import json
import mmap
import socket
import struct
import sys


def main(number: int, vaddr: int, n_bytes: int) -> None:
    """Serve one table."""
    with socket.socket(fileno=number) as sock:
        payload, fds, _, _ = socket.recv_fds(sock, 8192, 64)
    n, _padding = struct.unpack_from("=II", payload)
    rows = [struct.unpack_from("=QQQQ", payload, 8 + 32 * i) for i in range(n)]
    found, values, agree = 0, set(), True
    for (guest, size, user, offset), fd in zip(rows, fds, strict=True):
        agree &= guest == user
        with mmap.mmap(fd, size, offset=offset) as mapped:
            first, end = max(user, vaddr), min(user + size, vaddr + n_bytes)
            if first < end:
                found += end - first
                values |= set(mapped[first - user : end - user])
            if first == vaddr and first < end:
                mapped[first - user] = 0x77
    report = {"n_regions": n, "guest_is_user": agree, "found_bytes": found, "values": sorted(values)}
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
