"""Giving freed memory back to the system: the C library keeps what large tensors leave in its heap, and over many blocks the holes add up."""

import ctypes
import ctypes.util
import functools

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
LARGE = 1 << 20  # bytes from which an allocation gets pages of its own; 8 MB would take a quarter more memory in all, a sixth less time
WORTH_TRIMMING = 8 << 20  # bytes freed at once after which `trim` pays


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    name = ctypes.util.find_library("c")
    library = ctypes.CDLL(name) if name else None
    return library if hasattr(library, "malloc_trim") else None


def separate_large() -> None:
    """From now on, large allocations of this process lie outside the heap. Nothing where the C library is not glibc.

    What the heap has grown to by then it keeps using, so this comes before the first large tensor.
    """
    library = _glibc()
    if library is not None:
        library.mallopt(M_MMAP_THRESHOLD, LARGE)


def trim() -> None:
    """Return the heap's free pages to the system. Nothing where the C library is not glibc."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)
