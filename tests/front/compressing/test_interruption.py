"""Ctrl-C where a library makes another error of it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest

from planish.common.interruption import interruptible


def swallowing(other: Exception) -> None:
    """What a library does."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise other from None


@pytest.fixture(autouse=True)
def default() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("outer", [nullcontext, interruptible])
def test_it_stays_an_interruption(outer: Callable[[], AbstractContextManager[None]]) -> None:
    with pytest.raises(KeyboardInterrupt) as raised, outer(), interruptible():
        swallowing(ValueError("could not determine the shape"))
    assert isinstance(raised.value.__cause__, ValueError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ValueError, match="own"), interruptible():
        raise ValueError("own")
    with pytest.raises(KeyboardInterrupt), interruptible():
        swallowing(ValueError("earlier"))
    with pytest.raises(ValueError, match="later"), interruptible():
        raise ValueError("later")


def test_a_handler_of_somebody_else_stays() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _frame: seen.append(number))
    with pytest.raises(ValueError, match="could not convert"), interruptible():
        float(f"not a number {signal.raise_signal(signal.SIGINT)}")
    assert seen == [signal.SIGINT]


def test_in_another_thread() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with interruptible():
                raise ValueError("own")
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [str(error) for error in errors] == ["own"]
