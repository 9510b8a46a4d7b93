"""Answers to GET_FDS: which descriptors a secondary gets of the segments that it asks for.

Owns that choice only. The files are those of supplies.py, which closes them; sending them is sessions.py's work.

Rules: from the first segment on, as many in a row as have a file and fit in one message; of a one-file list its one file,
which serves them all. Nothing is given of a segment that is not there: DONE with ENOENT says so.
"""

from __future__ import annotations

import errno
import itertools
from typing import TYPE_CHECKING

from dpdkmem.shared.messages import MAX_FDS, Done, Fds, Run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpdkmem.primary.growth import MemsegList
    from dpdkmem.shared.messages import GetFds


def find_fds(lists: Sequence[MemsegList], request: GetFds) -> tuple[Fds | Done, tuple[int, ...]]:
    """Return the answer to a request, and its descriptors, which stay the files'."""
    asked = request.run
    if asked.list_idx >= len(lists):
        return _refusal(request, errno.EINVAL, f"there is no memseg list {asked.list_idx}"), ()
    files = lists[asked.list_idx].files
    if files.list_fd is not None:
        one = Run(asked.list_idx, asked.first_seg, 1)
        return Fds(request.request_id, one, 1), (files.list_fd,)
    there = files.there(asked.first_seg, min(asked.n_segs, MAX_FDS))
    in_a_row = itertools.takewhile(there.__contains__, itertools.count(asked.first_seg))
    fds = tuple(there[seg_idx] for seg_idx in in_a_row)
    if not fds:
        text = f"segment {asked.first_seg} of list {asked.list_idx} is not there"
        return _refusal(request, errno.ENOENT, text), ()
    return Fds(request.request_id, Run(asked.list_idx, asked.first_seg, len(fds)), len(fds)), fds


def _refusal(request: GetFds, number: int, text: str) -> Done:
    return Done(request.request_id, number, retryable=False, text=text)
