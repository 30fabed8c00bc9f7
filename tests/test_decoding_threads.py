"""How many threads a step takes."""

import torch

from decoding.threads import PATIENCE, Threads


class Clock:
    """Seconds that pass only when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(threads: Threads, clock: Clock, seconds: dict[int, float], steps: int, n_ids: int = 8) -> list[int]:
    """Return the numbers of threads of some steps that take `seconds` (threads -> seconds)."""
    used = []
    for _ in range(steps):
        with threads.step(n_ids):
            used.append(torch.get_num_threads())
            clock.now += seconds[used[-1]]
    return used


def test_the_faster_way_is_taken_and_the_slower_one_costs_little():
    before, clock = torch.get_num_threads(), Clock()
    try:
        torch.set_num_threads(2)
        threads = Threads(clock=clock)
        assert run(threads, clock, {2: 0.001, 1: 0.002}, 2) == [2, 1]  # each once
        assert set(run(threads, clock, {2: 0.001, 1: 0.002}, 2 * PATIENCE)) == {2}
        # another program takes a core: the two threads wait for each other
        busy = {2: 0.1, 1: 0.002}
        used = run(threads, clock, busy, 20_000)
        assert used.count(1) > 19_000 and used[100:].count(2) * busy[2] < 0.03 * used.count(1) * busy[1]
        # it has ended
        used = run(threads, clock, {2: 0.001, 1: 0.002}, 60_000)
        assert used[-100:].count(2) >= 98
        # steps of another size are judged for themselves
        assert run(threads, clock, {2: 0.3, 1: 0.2}, 3, n_ids=100) == [2, 1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_one_thread_leaves_no_choice():
    before, clock = torch.get_num_threads(), Clock()
    threads = Threads(most=1, clock=clock)
    with threads.step(8):
        assert torch.get_num_threads() == before
    assert threads.ways == (1,)


def test_a_step_that_fails_is_not_counted_and_gives_the_threads_back():
    before = torch.get_num_threads()
    threads = Threads(most=before + 1, clock=Clock())
    try:
        try:
            with threads.step(8):
                raise KeyError
        except KeyError:
            pass
        assert threads.choose(4) == before + 1 and torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
