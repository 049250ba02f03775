"""The thread that writes: work that is set aside keeps its order, frees its room at once and is never lost; no long pauses."""

import gc
from collections.abc import Callable

import numpy as np
import pytest

from engine.capture.spool import Spool
from engine.capture.writer import WriterThread


def test_what_is_set_aside_is_written_in_order_and_nothing_waits() -> None:
    """Ten times what may wait is put by an engine that never rests: all of it arrives, in order."""
    written: list[int] = []
    spool = Spool()
    thread = WriterThread(limit=20 * 400)

    def put(number: int) -> None:
        records = np.full(100, number, np.float32)

        def set_aside() -> Callable[[], None]:
            spooled = spool.put(records)
            return lambda: written.append(int(spooled.take()[0]))

        thread.put(lambda: written.append(number), records.nbytes, set_aside=set_aside)

    for number in range(200):
        put(number)
        if number % 7 == 0:  # pieces that hold nothing, such as a chosen token, keep their place among the others
            thread.put(lambda number=number: written.append(1000 + number), 0)
    thread.finish()
    expected = [value for number in range(200) for value in ([number] if number % 7 else [number, 1000 + number])]
    assert written == expected


def test_a_disk_that_is_full_makes_the_engine_wait_and_loses_nothing() -> None:
    """Where a piece cannot be set aside it is done at once, in its order."""
    written: list[int] = []
    thread = WriterThread(limit=1000)

    def no_room() -> Callable[[], None]:
        raise OSError(28, "No space left on device")

    for number in range(50):
        thread.put(lambda number=number: written.append(number), 400, set_aside=no_room)
    thread.finish()
    thread.check()
    assert written == list(range(50))


def test_a_failure_discards_what_was_not_set_aside_and_comes_out() -> None:
    """After a failure the pieces that still hold their room give it back, and the failure is raised in the next call."""
    discarded: list[int] = []
    thread = WriterThread(limit=1000)

    def fail() -> None:
        raise ValueError("the disk is gone")

    thread.put(fail, 100)
    thread.put(lambda: None, 100, lambda: discarded.append(1))
    thread.finish()
    assert discarded == [1]
    with pytest.raises(ValueError, match="the disk is gone"):
        thread.check()


def test_garbage_collections_pass_over_older_objects_while_a_device_is_recorded() -> None:
    """A collection beside such a writer does not look at older objects; afterwards it does."""
    older: dict[str, list[int]] = {"older": []}
    gc.unfreeze()  # another test may have left a writer that was never finished
    first, second = WriterThread(freeze=True), WriterThread(freeze=True)
    try:
        assert not any(thing is older["older"] for thing in gc.get_objects())
    finally:
        second.finish()
        assert gc.get_freeze_count() > 1000  # the first one still writes
        first.finish()
    first.finish()  # again, as at the process's end
    assert any(thing is older["older"] for thing in gc.get_objects())


def test_a_program_that_froze_its_objects_itself_keeps_them_frozen() -> None:
    """A writer gives back only what it has frozen itself: servers freeze what they have loaded before they fork."""
    gc.freeze()
    try:
        WriterThread(freeze=True).finish()
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()


def test_a_writer_on_the_host_leaves_the_collector_alone() -> None:
    """Nothing runs dry there: recording does not change how the whole process collects garbage."""
    gc.unfreeze()  # another test may have left a writer that was never finished
    before = gc.get_freeze_count()
    thread = WriterThread()
    try:
        assert gc.get_freeze_count() == before
    finally:
        thread.finish()
