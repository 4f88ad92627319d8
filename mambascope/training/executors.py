"""Where the runs of a sweep run: processes of this machine, one process in turns, or the workers of a Ray cluster."""

import importlib
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mambascope.errors import BackendError, InputError
from mambascope.training.sweep import Executor, Job
from mambascope.training.worker import RESULT, run_one, run_steps

__all__ = ["in_turns", "local_processes", "ray_cluster"]

_UNFINISHED, _LATE = "it ended without its last step", "stopped, its time is over"
_LOCAL = "leave --ray-address out to run on this machine's own processes (--workers N)"


def local_processes(workers: int = 1) -> Executor:
    """Up to ``workers`` runs at a time, each in a process of its own, whose output is ``log.txt`` in its folder.

    With ``device = "cuda"`` the runs take turns over the GPUs.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise InputError(f"workers must be an integer ≥ 1, got {workers!r}")

    def run(jobs: list[Job], retries: int, report: Callable[[str], None]) -> None:
        waiting, running = deque(jobs), dict[subprocess.Popen[bytes], tuple[Job, int]]()
        gpus = _gpus() if any(job.run["device"] == "cuda" for job in jobs) else []
        slots = list(range(workers))
        try:
            while waiting or running:
                _drop_late(waiting)
                while waiting and len(running) < workers:
                    job = waiting.popleft()
                    job.attempts += 1
                    slot = slots.pop(0)
                    running[_start(job, gpus[slot % len(gpus)] if gpus else None)] = job, slot
                for process in [p for p in running if p.poll() is not None]:
                    job, slot = running.pop(process)
                    slots.append(slot)
                    job.error = "" if _finished(job) else f"{_ending(process.returncode)}: {_last_line(job)}"
                    if not _settle(job, retries, report):
                        waiting.append(job)
                time.sleep(0.02)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()

    return run


def in_turns(together: int = 1) -> Executor:
    """Up to ``together`` runs at a time in this process, a step of each in turn.

    On a GPU every run has a stream of its own, so that the device works on several steps at once: models too small to
    fill it train side by side in little more than the time of one, where processes would wait for each other. A run
    is given its next step when it has at most one to do, so that a slow one holds up nobody.
    """
    if isinstance(together, bool) or not isinstance(together, int) or together < 1:
        raise InputError(f"together must be an integer ≥ 1, got {together!r}")

    def run(jobs: list[Job], retries: int, report: Callable[[str], None]) -> None:
        waiting, going = deque(jobs), list[_Turns]()
        try:
            while waiting or going:
                _drop_late(waiting)
                while waiting and len(going) < together:
                    going.append(_Turns(waiting.popleft()))
                moved = False
                for turns in list(going):
                    if not turns.ready():
                        continue
                    moved = True
                    if turns.step():
                        continue
                    going.remove(turns)
                    if not _settle(turns.job, retries, report):
                        waiting.append(turns.job)
                if not moved:
                    time.sleep(2e-5)
        finally:
            for turns in going:
                turns.close()

    return run


class _Turns:
    """A run that goes on by one step at a time, its log in ``log.txt``."""

    def __init__(self, job: Job) -> None:
        import torch

        self.job = job
        job.attempts += 1
        self._log = (job.folder / "log.txt").open("a", encoding="utf-8")
        self._steps: Generator[None, None, Any] = run_steps(job.folder, job.run, self._report)
        self._stream = torch.cuda.Stream() if str(job.run["device"]).startswith("cuda") else None
        self._queued = deque[Any]()  # an event after each step that the device was given

    def _report(self, line: str) -> None:
        print(line, file=self._log, flush=True)

    def ready(self) -> bool:
        """Whether the device has at most one step of this run to do."""
        if len(self._queued) > 1 and self._queued[0].query():
            self._queued.popleft()
        return len(self._queued) < 2

    def step(self) -> bool:
        """One step; False if the run has ended, well or not."""
        import torch

        try:
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                next(self._steps)
                if self._stream is not None:
                    self._queued.append(self._stream.record_event())
        except StopIteration:
            self.job.error = "" if _finished(self.job) else _UNFINISHED
        except Exception as error:  # whatever it is, it is this run's: the others go on
            self.job.error = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            self._report(f"error: {self.job.error}")
        else:
            return True
        self.close()
        return False

    def close(self) -> None:
        self._steps.close()
        self._log.close()


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def _start(job: Job, gpu: str | None = None) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.run["threads"])}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    # the package as it is imported here, installed or not
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    with (job.folder / "log.txt").open("ab") as log:
        command = [sys.executable, "-m", "mambascope.training.worker", str(job.folder)]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)  # noqa: S603 (ourselves)


def _finished(job: Job) -> bool:
    return (job.folder / RESULT).is_file()


def _ending(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit status {code}"


def _last_line(job: Job) -> str:
    lines = (job.folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def _settle(job: Job, retries: int, report: Callable[[str], None]) -> bool:
    """Say how an attempt ended; False if the job is to be tried again."""
    if not job.error:
        report(f"{job.name}: finished" + (f" at attempt {job.attempts}" if job.attempts > 1 else ""))
        return True
    if _late(job):
        job.error = _LATE
        report(f"{job.name}: {_LATE}; the same command goes on with it")
        return True
    again = job.attempts <= retries
    report(f"{job.name}: {job.error}; " + ("trying again" if again else f"given up after {job.attempts} attempts"))
    return not again


def _late(job: Job) -> bool:
    return time.time() > job.run.get("until", float("inf"))


def _drop_late(waiting: deque[Job]) -> None:
    """Start nothing more once the sweep's time is over."""
    for job in [job for job in waiting if _late(job)]:
        waiting.remove(job)
        job.error = job.error or _LATE


def ray_cluster(address: str, *, timeout: float = 10.0) -> Executor:
    """The workers of a Ray cluster at ``address``: ``host:port``, ``ray://host:port``, ``auto``, or ``local`` for one
    that Ray starts here. ``out`` and the data must be on storage that all of them see under the same path.

    A run asks for its threads as CPUs, and for one GPU if its device is one. Raises BackendError, naming the local way,
    where Ray is not installed, the address does not answer within ``timeout`` seconds, or the cluster refuses.
    """
    ray = _import_ray()
    _knock(address, timeout)

    def run(jobs: list[Job], retries: int, report: Callable[[str], None]) -> None:
        ours = not ray.is_initialized()
        _connect(ray, address)
        try:
            _run_on(ray, jobs, retries, report)
        finally:
            if ours:
                ray.shutdown()

    return run


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise BackendError(f"--ray-address needs Ray: pip install mambascope[ray], or {_LOCAL}") from None


def _knock(address: str, timeout: float) -> None:
    """BackendError unless something listens at ``host:port``: Ray itself would wait for minutes."""
    if address in ("auto", "local"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not host or not port.isdigit():
        raise BackendError(
            f"the Ray address {address!r} is not host:port, ray://host:port, auto or local; "
            f"give one of these, or {_LOCAL}"
        )
    try:
        socket.create_connection((host, int(port)), timeout).close()
    except (OSError, OverflowError) as error:
        raise BackendError(f"the Ray cluster at {address} cannot be reached ({error}); start it, or {_LOCAL}") from None


def _connect(ray: Any, address: str) -> None:
    if ray.is_initialized():
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", include_dashboard=None)
    except Exception as error:
        text = str(error).strip().splitlines()
        raise BackendError(
            f"the Ray cluster at {address} cannot be used ({text[0] if text else type(error).__name__}); "
            f"check it with 'ray status', or {_LOCAL}"
        ) from None


def _run_on(ray: Any, jobs: list[Job], retries: int, report: Callable[[str], None]) -> None:
    def submit(job: Job) -> Any:
        job.attempts += 1
        gpus = 1 if str(job.run["device"]).startswith("cuda") else 0
        remote = ray.remote(num_cpus=job.run["threads"], num_gpus=gpus, max_retries=0)(_quietly)
        return remote.remote(str(job.folder), job.run)

    pending = {submit(job): job for job in jobs}
    while pending:
        (ready, *_), _ = ray.wait(list(pending), num_returns=1)
        job = pending.pop(ready)
        try:
            ray.get(ready)
        except ray.exceptions.RayError as error:
            job.error = str(error).strip().splitlines()[-1]
        else:
            job.error = "" if _finished(job) else f"its files are not in {job.folder}: that folder is not shared"
        if not _settle(job, retries, report):
            pending[submit(job)] = job


def _quietly(folder: str, run: dict[str, Any]) -> dict[str, Any]:
    """:func:`run_one`, its lines into ``log.txt``."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with (Path(folder) / "log.txt").open("a", encoding="utf-8") as log:
        return run_one(folder, run, lambda line: print(line, file=log, flush=True))
