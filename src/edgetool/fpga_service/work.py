"""The host's work for its one device: taken from many connections in turns, done by one thread, given up when asked."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Hashable
from dataclasses import dataclass
from typing import Any, Literal

from edgetool.errors import BadInput, EdgetoolError
from edgetool.fpga_service.device import Device

Why = Literal["cancelled", "timeout", "shutting_down"]
Task = Callable[[Device, Callable[[], bool]], Generator[Any, None, None]]
"""What the device has to do: called in the device's thread with the device and a question whether to stop; yields what
is to be delivered."""

_LOOK_S = 0.01
_MOST_AHEAD = 64
"""Items that the device's thread may have made of a job before the event loop took the first of them: a loop that is
late has them in its memory, and learns only from them that nobody reads."""


class QueueFull(Exception):
    """As many jobs wait as may wait."""


class DeviceFailed(Exception):
    """The device failed while it did a job; the message says how."""


@dataclass(frozen=True)
class End:
    """The last thing that is delivered of a job. error: what the task raised; why: who ended it before."""

    error: BadInput | DeviceFailed | None = None
    why: Why | None = None


class Job:
    """One piece of work. All methods but `stopped` and `deliver_later` belong to the event loop's thread.

    Args:
        owner: whose it is; owners take turns.
        task: what to do.
        deliver: called in the event loop with everything that the task yields, and an `End` last, exactly once.
    """

    def __init__(self, owner: Hashable, task: Task, deliver: Callable[[Any], None]) -> None:
        self.owner = owner
        self.task = task
        self._deliver = deliver
        self._over = False
        self._stop = threading.Event()
        self._ahead = threading.Semaphore(_MOST_AHEAD)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def limit(self, timeout_s: float) -> None:
        """End it after `timeout_s`, whether it has begun by then or not."""
        self._timer = self._loop.call_later(timeout_s, self.end, "timeout")

    def stopped(self) -> bool:
        """Whether the task should end early."""
        return self._stop.is_set()

    def end(self, why: Why) -> None:
        """End it now, whether it waits or runs; the device stops as soon as it can."""
        self._stop.set()
        self.deliver(End(why=why))

    def deliver(self, item: Any) -> None:
        """Pass on what was made, unless the job is over."""
        if self._over:
            return
        if isinstance(item, End):
            self._over = True
            if self._timer is not None:
                self._timer.cancel()
        self._deliver(item)

    def deliver_later(self, item: Any) -> None:
        """The same from the device's thread, which waits here while the loop is too far behind."""
        while not self._ahead.acquire(timeout=_LOOK_S):
            if self._stop.is_set():
                return
            if self._loop.is_closed():
                break
        try:
            self._loop.call_soon_threadsafe(self._deliver_next, item)
        except RuntimeError:  # the loop has ended, and with it all who listen
            self._stop.set()

    def _deliver_next(self, item: Any) -> None:
        self._ahead.release()
        self.deliver(item)


class Turns:
    """Jobs that wait: first come first served for each owner, and one job each in turn between owners."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._queues: OrderedDict[Hashable, deque[Job]] = OrderedDict()
        self._waiting = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, job: Job) -> None:
        """Raises QueueFull."""
        with self._changed:
            self._drop_stopped()
            if self._waiting >= self._limit:
                raise QueueFull(f"{self._waiting} requests wait already")
            self._queues.setdefault(job.owner, deque()).append(job)
            self._waiting += 1
            self._changed.notify()

    def take(self) -> Job | None:
        """The next job, waited for; None after `close`. An owner that has had its turn goes behind the others."""
        with self._changed:
            while True:
                self._drop_stopped()
                if self._closed:
                    return None
                if self._queues:
                    owner, queue = self._queues.popitem(last=False)
                    self._waiting -= 1
                    job = queue.popleft()
                    if queue:
                        self._queues[owner] = queue
                    return job
                self._changed.wait()

    def close(self) -> None:
        """Let `take` give None."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _drop_stopped(self) -> None:
        for owner in list(self._queues):
            kept = deque(job for job in self._queues[owner] if not job.stopped())
            self._waiting -= len(self._queues[owner]) - len(kept)
            if kept:
                self._queues[owner] = kept
            else:
                del self._queues[owner]


class Worker:
    """The device and the one thread that may touch it.

    Args:
        device: what does the work.
        max_queue: jobs that may wait.
        log: takes lines for people.
    """

    def __init__(self, device: Device, max_queue: int, log: Callable[[str], None]) -> None:
        self.facts = device.facts
        self.max_queue = max_queue
        self._device = device
        self._log = log
        self._turns = Turns(max_queue)
        self._jobs: set[Job] = set()
        # no daemon: a process that ends while torch computes in a thread is aborted by the C++ runtime
        self._thread = threading.Thread(target=self._run, name="device")
        self._thread.start()

    def submit(self, owner: Hashable, task: Task, deliver: Callable[[Any], None], timeout_s: float) -> Job:
        """Have it done. Raises QueueFull."""

        def delivered(item: Any) -> None:
            if isinstance(item, End):
                self._jobs.discard(job)
            deliver(item)

        job = Job(owner, task, delivered)
        self._turns.put(job)
        self._jobs.add(job)
        job.limit(timeout_s)
        return job

    def stop(self) -> None:
        """End all jobs; the device is closed when it has let go of the last."""
        for job in list(self._jobs):
            job.end("shutting_down")
        self._turns.close()

    async def stopped(self) -> None:
        """Wait, after `stop`, until the device has let go and is closed: at most a token or a chunk of a prompt."""
        while self._thread.is_alive():
            await asyncio.sleep(_LOOK_S)

    def _run(self) -> None:
        while (job := self._turns.take()) is not None:
            job.deliver_later(self._do(job))
        self._device.close()

    def _do(self, job: Job) -> End:
        try:
            with contextlib.closing(job.task(self._device, job.stopped)) as items:
                for item in items:
                    job.deliver_later(item)
                    if job.stopped():
                        break
        except BadInput as error:
            return End(error)
        except EdgetoolError as error:
            self._log(f"the device failed: {error.message}")
            return End(DeviceFailed(error.message))
        except BaseException as error:
            # a bug, whose traceback belongs into the log; the thread goes on, since the next request may be none
            self._log("".join(traceback.format_exception(error)))
            return End(DeviceFailed(f"{type(error).__name__}: {error}"))
        return End()
