"""The worker: one thread for the device, beside an event loop that may be late."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from typing import Any

import pytest

from edgetool.fpga_service import work
from edgetool.fpga_service.device import Device
from edgetool.fpga_service.work import End, Worker
from tests.fakes.fake_device import FakeDevice

ITEMS = 10_000


@pytest.fixture
def made() -> list[int]:
    return []


def counting(made: list[int]) -> Callable[[Device, Callable[[], bool]], Generator[int, None, None]]:
    def task(device: Device, stopped: Callable[[], bool]) -> Generator[int, None, None]:
        for n in range(ITEMS):
            made.append(n)
            yield n

    return task


def until_waiting(made: list[int]) -> None:
    """Block the event loop until the device's thread has made all that it may, and a while more."""
    end_s = time.monotonic() + 30
    while len(made) <= work._MOST_AHEAD:
        assert time.monotonic() < end_s
        time.sleep(0.01)
    time.sleep(0.2)


def test_the_device_waits_for_a_loop_that_is_late_and_nothing_is_lost(made: list[int]) -> None:
    taken: list[Any] = []

    async def serve() -> None:
        worker = Worker(FakeDevice(), 4, print)
        worker.submit("owner", counting(made), taken.append, 60)
        until_waiting(made)
        assert taken == []
        assert len(made) == work._MOST_AHEAD + 1  # the last one is at the door
        while not taken or not isinstance(taken[-1], End):
            await asyncio.sleep(0.001)
        worker.stop()
        await worker.stopped()

    asyncio.run(serve())
    assert taken == [*range(ITEMS), End()]


def test_a_job_that_is_ended_while_the_device_waits_for_the_loop_lets_the_device_go(made: list[int]) -> None:
    taken: list[Any] = []

    async def serve() -> None:
        worker = Worker(FakeDevice(), 4, print)
        job = worker.submit("owner", counting(made), taken.append, 60)
        until_waiting(made)
        job.end("cancelled")
        worker.submit("other", counting([]), taken.append, 60)
        while not isinstance(taken[-1], End) or taken[-1].why is not None:
            await asyncio.sleep(0.001)
        worker.stop()
        await worker.stopped()

    asyncio.run(serve())
    assert taken == [End(why="cancelled"), *range(ITEMS), End()]


def test_a_device_that_waits_for_a_loop_that_has_ended_ends_too(made: list[int]) -> None:
    async def serve() -> Worker:
        worker = Worker(FakeDevice(), 4, print)
        worker.submit("owner", counting(made), lambda item: None, 60)
        until_waiting(made)
        return worker

    worker = asyncio.run(serve())
    worker._turns.close()
    worker._thread.join(30)
    assert not worker._thread.is_alive()
    assert len(made) < ITEMS
