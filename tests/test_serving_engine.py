"""The engine by itself: its queue, deadlines, mistakes in a step, and its end."""

import asyncio
import math
import time

import pytest
from helpers.small_model import random_prompts, small_model, uncached

from decoding.fixed_rows import FixedRows
from decoding.params import SamplingParams
from serving.engine import BusyError, Engine, Job

GREEDY = SamplingParams(temperature=0, max_new_tokens=6)


def make(rows: int = 1, most_waiting: int = 9) -> Engine:
    return Engine(FixedRows(small_model(), rows), most_waiting)


async def over(*jobs: Job) -> None:
    for job in jobs:
        while not job.over:
            await asyncio.wait_for(job.changed.wait(), 20)
            job.changed.clear()


def job(prompt: list[int], **options) -> Job:
    return Job(prompt, options.pop("params", GREEDY), **options)


def test_jobs_wait_for_their_turn_and_have_their_own_answers():
    async def main() -> None:
        engine = make(rows=2)
        engine.start(asyncio.get_running_loop())
        jobs = [job(prompt) for prompt in random_prompts([3, 9, 1, 20, 7])]
        engine.submit(jobs)
        await over(*jobs)
        for each in jobs:
            assert [token.id for token in each.tokens] == uncached(engine.rows.model, each.prompt, 6)
            assert each.ended == "length" and each.error is None
            assert each.times["came"] <= each.times["begun"] <= each.times["first"] <= each.times["ended"]
        await asyncio.to_thread(engine.close)
        assert not engine.alive

    asyncio.run(main())


def test_a_job_whose_time_is_over_leaves_from_the_queue_and_from_its_row(monkeypatch):
    async def main() -> None:
        engine = make()
        step = engine.rows.step
        monkeypatch.setattr(engine.rows, "step", lambda: (time.sleep(0.05), step())[1])
        engine.start(asyncio.get_running_loop())
        long = SamplingParams(temperature=0, max_new_tokens=30)
        running, late, patient = job([1], params=long), job([2], deadline=time.monotonic() + 0.3), job([3])
        engine.submit([running, late, patient])
        await over(late)
        assert isinstance(late.error, TimeoutError) and "before its turn came" in str(late.error)
        assert not running.over and not late.tokens
        await over(running, patient)
        late = job([4], params=long, deadline=time.monotonic() + 0.5)
        engine.submit([late])
        await over(late)
        assert running.ended == patient.ended == "length"
        assert "before its end" in str(late.error) and engine.rows.free == 1
        await asyncio.to_thread(engine.close)

    asyncio.run(main())


def test_a_mistake_in_a_step_fails_its_jobs_and_not_the_engine(monkeypatch, capsys):
    async def main() -> None:
        engine = make(rows=2)
        step, broken = engine.rows.step, [True]

        def sometimes():
            if broken and broken.pop():
                raise RuntimeError("a bad number")
            return step()

        monkeypatch.setattr(engine.rows, "step", sometimes)
        engine.start(asyncio.get_running_loop())
        jobs = [job(prompt) for prompt in random_prompts([3, 9, 5])]
        engine.submit(jobs)
        await over(*jobs)
        assert [str(each.error) for each in jobs[:2]] == ["a bad number"] * 2
        assert [token.id for token in jobs[2].tokens] == uncached(engine.rows.model, jobs[2].prompt, 6)
        await asyncio.to_thread(engine.close)

    asyncio.run(main())
    assert "a step failed (a bad number): its 2 texts are given up" in capsys.readouterr().err


def test_a_full_queue_refuses_and_a_closed_engine_too():
    async def main() -> None:
        engine = make(most_waiting=2)
        with pytest.raises(RuntimeError, match="the engine has ended"):
            engine.submit([job([1])])
        engine.alive = True  # as after start; nothing is taken from the queue
        waiting = [job([i]) for i in range(3)]
        engine.submit(waiting)  # a request may have more texts than there is room
        with pytest.raises(BusyError) as error:
            engine.submit([job([9])])
        assert error.value.retry_after >= 1
        engine.cancel(waiting[1:])
        engine.submit([job([9])])
        assert engine.waiting == 2
        engine.alive = False
        engine.start(asyncio.get_running_loop())
        await over(waiting[0])
        await asyncio.to_thread(engine.close)
        assert waiting[1].gone and not waiting[1].over and math.isinf(waiting[0].deadline)

    asyncio.run(main())
