"""The heap gives memory back: trimming lowers what the process holds, large allocations lie outside; and nothing happens without glibc.

What is measured is measured in processes of their own: the settings cannot be undone, and other tests leave holes of their own.
"""

import ctypes
import subprocess
import sys
from collections.abc import Iterator

import pytest

from planish.calib.machine import heap

GLIBC = hasattr(ctypes.CDLL(None), "malloc_trim")
RESIDENT = "def resident(): return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()"


def numbers(code: str) -> list[int]:
    """The numbers that a new process prints."""
    program = f"import resource, torch\nfrom planish.calib.machine import heap\n{RESIDENT}\n{code}"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return [int(word) for word in ran.stdout.split()]


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_trim_returns_what_many_small_tensors_held() -> None:
    """Every second one stays, so the heap cannot shrink from its end by itself. 64 kB each: below what malloc maps by itself."""
    code = (
        "held = [torch.ones(16 * 1024) for _ in range(1600)]\n"
        "full = resident(); held = held[::2] + held[-1:]; freed = resident(); heap.trim(); print(full, freed, resident())"
    )
    full, freed, trimmed = numbers(code)
    assert full - freed < 20e6
    assert 40e6 < full - trimmed < 65e6


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
@pytest.mark.parametrize(("told", "separate"), [("", False), ("heap.separate_large()", True)])
def test_large_allocations_lie_outside_the_heap(told: str, separate: bool) -> None:
    """glibc learns from a freed mapping to put such sizes into the heap, where a small tensor behind one keeps its memory; unless it is told."""
    code = (
        f"{told}\n"
        "del (learn := [torch.ones(5 << 20)])[:]\n"  # 20 MB
        "large, small = [], []\n"
        "for _ in range(8): large.append(torch.ones(1 << 20)); small.append(torch.ones(1024))\n"  # 4 MB and 4 kB in turns
        "full = resident(); large.clear(); print(full, resident())"
    )
    full, freed = numbers(code)
    assert (full - freed > 30e6) is separate


class Recorder:
    """A C library that notes what it is asked for."""

    def __init__(self, **functions: object) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.__dict__.update(functions)


@pytest.fixture
def fresh() -> Iterator[None]:
    """The library is looked up anew in the test, and again after it."""
    heap._glibc.cache_clear()
    yield
    heap._glibc.cache_clear()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", [None, "libc.so"])
def test_nothing_is_called_elsewhere(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No C library that can be found, or one that has no malloc_trim: calling anything of it would be an AttributeError."""
    other = Recorder()
    monkeypatch.setattr("ctypes.util.find_library", lambda _name: name)
    monkeypatch.setattr("ctypes.CDLL", lambda _name: other)
    assert heap._glibc() is None
    heap.trim()
    heap.separate_large()
    assert other.calls == []


@pytest.mark.usefixtures("fresh")
def test_what_glibc_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Recorder()
    library.__dict__["malloc_trim"] = lambda *arguments: library.calls.append(("malloc_trim", *arguments))
    library.__dict__["mallopt"] = lambda *arguments: library.calls.append(("mallopt", *arguments))
    monkeypatch.setattr("ctypes.util.find_library", lambda _name: "libc.so.6")
    monkeypatch.setattr("ctypes.CDLL", lambda _name: library)
    heap.separate_large()
    heap.trim()
    assert library.calls == [("mallopt", -3, 1 << 20), ("malloc_trim", 0)]
