"""Calls in threads: order, errors, calls within calls, forks, and what quiet_threads leaves behind."""

import multiprocessing
import threading

import pytest
import torch

from sparsereg.linalg.threads import in_turn_by_turn, in_turns, num_threads, quiet_threads


@pytest.fixture(autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def squares(numbers):
    return in_turns(lambda n: n * n, [(n,) for n in numbers])


def test_results_come_in_order():
    assert squares(range(100)) == [n * n for n in range(100)]
    assert squares([]) == []


def test_results_of_many_calls_come_while_others_are_not_yet_asked_for():
    asked = []

    def calls():
        for n in range(100):
            asked.append(n)
            yield (n,)

    found = in_turn_by_turn(lambda n: n * n, calls())
    assert next(found) == 0
    assert len(asked) == 16
    assert list(found) == [n * n for n in range(1, 100)]


def test_calls_that_come_by_and_by_are_quiet_and_what_asks_for_them_is_not():
    seen = list(in_turn_by_turn(lambda _: (torch.get_num_threads(), num_threads()), ((n,) for n in range(3))))
    assert {threads for threads, _ in seen} == {1}
    assert torch.get_num_threads() == 4
    for _ in in_turn_by_turn(abs, ((n,) for n in range(40))):
        assert torch.get_num_threads() == 4


def test_several_threads_work_at_once():
    meeting = threading.Barrier(3, timeout=30)
    in_turns(meeting.wait, [()] * 3)


def test_calls_within_calls_do_not_wait_for_each_other():
    assert in_turns(lambda n: sum(squares(range(n))), [(n,) for n in range(30)]) == [
        sum(k * k for k in range(n)) for n in range(30)
    ]


def test_an_error_of_any_call_is_told():
    for wrong in (0, 57, 99):
        with pytest.raises(ZeroDivisionError):
            in_turns(lambda n, wrong=wrong: 1 / (n - wrong), [(n,) for n in range(100)])
    assert squares(range(5)) == [0, 1, 4, 9, 16]


def test_quiet_threads_leaves_the_number_to_loops_and_gives_it_back():
    with quiet_threads():
        assert (torch.get_num_threads(), num_threads()) == (1, 4)
        with quiet_threads():
            assert (torch.get_num_threads(), num_threads()) == (1, 4)
        assert (torch.get_num_threads(), num_threads()) == (1, 4)
    assert (torch.get_num_threads(), num_threads()) == (4, 4)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own():
    assert squares(range(20)) == [n * n for n in range(20)]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(squares, (range(20),)).get(timeout=60) == [n * n for n in range(20)]


def test_quiet_threads_leaves_blas_one_thread_and_gives_its_own_back():
    from threadpoolctl import threadpool_info

    def numbers():
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    before = numbers()
    with quiet_threads():
        assert set(numbers()) <= {1}
    assert numbers() == before
