"""Workers: every item has its worker and its threads, results come in order, errors come out, and nothing is changed afterwards."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from planish.calib.machine.workers import MOST, Workers, share_of_threads, workers_for

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 3])
def count(request: pytest.FixtureRequest) -> int:
    assert isinstance(request.param, int)
    return request.param


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
def test_how_many() -> None:
    assert [workers_for(batches, CPU) for batches in (0, 1, 3, 4, 64)] == [1, 1, 3, 4, 4]
    assert [share_of_threads(workers) for workers in (1, 2, 3, 4, 8)] == [4, 2, 1, 1, 1]
    assert workers_for(64, torch.device("cuda")) == 1
    torch.set_num_threads(100)
    assert workers_for(64, CPU) == MOST


@pytest.mark.parametrize("ahead", [True, False])
def test_each_item_stays_with_its_worker(count: int, ahead: bool) -> None:
    with Workers(count) as workers:
        once, again = (list(workers.map(lambda item: (item, threading.get_ident()), range(7), ahead=ahead)) for _ in range(2))
        assert list(workers.map(str, [], ahead=ahead)) == []
    assert once == again
    assert [item for item, _ in once] == list(range(7))
    threads = [thread for _, thread in once]
    assert threads[0] == threading.get_ident()
    assert len(set(threads)) == count
    assert threads[count:] == threads[:-count]


def test_how_far_ahead(count: int) -> None:
    done: list[int] = []
    with Workers(count) as workers:
        assert next(workers.map(done.append, range(6), ahead=True)) is None
        assert len(done) == (1 if count == 1 else 6)
        done.clear()
        next(workers.map(done.append, range(6), ahead=False))
        assert sorted(done) == list(range(count))


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(("each", "seen"), [(None, [4, 2, 1]), (1, [1, 1, 1])])
def test_torch_has_its_share_of_threads_and_no_gradients(count: int, each: int | None, seen: list[int]) -> None:
    def state(_item: int) -> tuple[int, bool]:
        return torch.get_num_threads(), torch.is_grad_enabled()

    with Workers(count, each) as workers:
        with torch.no_grad():
            assert list(workers.map(state, range(4))) == [(seen[count - 1], False)] * 4
        assert list(workers.map(state, range(4))) == [(seen[count - 1], True)] * 4
        assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("bad", range(3))
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_comes_out_and_stops_the_others(count: int, bad: int, error: type[BaseException]) -> None:
    before = threading.active_count()
    done: list[int] = []
    before = threading.active_count()

    def work(item: int) -> None:
        if item == bad:
            raise error(f"item {item}")
        time.sleep(0.02)
        done.append(item)

    with Workers(count) as workers:
        with pytest.raises(error, match=f"item {bad}"):
            list(workers.map(work, range(60)))
        assert len(done) < 10
        assert torch.get_num_threads() == 4
        assert list(workers.map(str, range(3))) == ["0", "1", "2"]  # and they work on
    assert threading.active_count() == before
