"""Python's collector of garbage looks through all objects that there are: those made before a long piece of work can be left out."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_FROZEN_BY_PYTHON = 1000  # objects: Python 3.12 starts with 375 frozen ones; a program that freezes its own has many more


def freeze() -> bool:
    """Leave out the objects that there are until `gc.unfreeze`, which is the caller's part; False if somebody has done so before."""
    free = gc.get_freeze_count() < _FROZEN_BY_PYTHON
    if free:
        gc.freeze()
    return free


@contextmanager
def older_objects_left_out() -> Iterator[None]:
    """The collector looks only at what is made meanwhile."""
    froze = freeze()
    try:
        yield
    finally:
        if froze:
            gc.unfreeze()
