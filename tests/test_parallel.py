"""Pieces of work side by side: in order, each on its share, and stopped by the first error."""

import threading

import pytest
import torch

from chipviz.parallel import Pool

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
def test_results_come_in_order_from_single_threads():
    seen = set()

    def work(i):
        seen.add(threading.get_ident())
        return i, torch.get_num_threads()

    assert list(Pool(CPU).map(work, range(50))) == [(i, 1) for i in range(50)]
    assert threading.get_ident() not in seen
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_an_error_leaves_the_rest_undone():
    begun = []

    def work(i):
        begun.append(i)
        threading.Event().wait(0.01)
        if i == 3:
            raise ValueError("no")
        return i

    with pytest.raises(ValueError, match="no"):
        list(Pool(CPU).map(work, range(200)))
    assert len(begun) < 100
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_one_item_more_than_are_at_work_is_taken_ahead():
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    results = Pool(CPU).map(lambda i: i, items())
    assert next(results) == 0
    assert len(taken) == 2 + 1 + 1  # at work, waiting, and one for the result
    results.close()
    assert len(taken) == 2 + 1 + 1


@pytest.mark.usefixtures("two_threads")
def test_the_caller_may_have_other_work_done_on_the_same_threads_between_two_results():
    def work(_):
        return threading.get_ident(), torch.get_num_threads()

    pool = Pool(CPU)
    outer = pool.map(work, range(20))
    seen = [next(outer)]
    seen += pool.map(work, range(20))
    assert torch.get_num_threads() == 1  # the outer work is not over
    seen += outer
    threads = {thread for thread, _ in seen}
    assert threading.get_ident() not in threads
    assert len(threads) <= 2
    assert {n_threads for _, n_threads in seen} == {1}
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_gpu_goes_on_with_the_next_item_while_the_caller_has_one():
    begun = [threading.Event() for _ in range(4)]
    at_once, most = 0, 0

    def work(i):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        begun[i].set()
        threading.Event().wait(0.01)
        at_once -= 1
        return i

    results = Pool(torch.device("cuda")).map(work, range(4))
    for i in range(3):
        assert next(results) == i
        assert begun[i + 1].wait(10)  # nobody has asked for it yet
    assert list(results) == [3]
    assert most == 1
    assert torch.get_num_threads() == 2
