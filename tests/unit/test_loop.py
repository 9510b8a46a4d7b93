"""The primary's loop after its end, and the stop before its start."""

from __future__ import annotations

import os

from dpdkmem.primary.loop import Loop


def _loop() -> Loop:
    def fail(error: BaseException) -> None:
        raise error

    return Loop(fail)


def test_stop_before_run_ends_run_at_once() -> None:
    loop = _loop()
    loop.stop()
    loop.run()
    loop.close()


def test_stop_and_calls_after_close_touch_no_descriptor_of_others() -> None:
    loop = _loop()
    loop.close()
    fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(8)]  # the loop's numbers again
    try:
        loop.stop()
        loop.call_soon_threadsafe(lambda: None)
        for fd in fds:
            try:
                raise AssertionError(f"{os.eventfd_read(fd)} was written to {fd}")
            except BlockingIOError:
                pass
    finally:
        for fd in fds:
            os.close(fd)
