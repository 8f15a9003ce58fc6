"""Several models at once with Ray: on one machine's GPUs or CPU shares, or on a cluster."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
from collections import Counter, deque
from collections.abc import Generator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from reasonalloc.config import parse_arm
from reasonalloc.errors import UsageError
from reasonalloc.parts import adopt_parts, own_parts

if TYPE_CHECKING:
    from reasonalloc.evaluation.batch import Job, Settings
    from reasonalloc.evaluation.chunks import Chunk, Facts, ModelSpec, Outcome
    from reasonalloc.evaluation.progress import Observer
    from reasonalloc.evaluation.sampling import Sampling

#: A chunk whose worker died so often is not tried again.
_TRIES = 3
_POLL_SECONDS = 0.5
_KNOCK_SECONDS = 10.0


class Cluster:
    """Workers with a model each; one that dies is replaced and its chunk taken up again.

    Args:
        arguments: of ``Solver``, for every worker.
        workers: how many.
        address: of a running cluster; None: a private one on this machine.
        observer: is told how it goes.

    Raises:
        UsageError: Ray is not installed, the cluster cannot be reached or is too small.
    """

    def __init__(
        self,
        arguments: tuple[ModelSpec, Settings, Sampling, int],
        workers: int,
        address: str | None,
        observer: Observer,
    ) -> None:
        require_ray()
        import ray

        self._ray: Any = ray
        self._arguments, self._observer = arguments, observer
        self._known: Any = None  # jobs, prompts and own parts, in Ray's store
        self._start(address)
        try:
            self._options = self._share(workers)
            self._actors = [self._spawn() for _ in range(workers)]
        except BaseException:
            ray.shutdown()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ray.shutdown()  # ends our workers, and the cluster if it is a private one

    def check(self, jobs: Sequence[Job], prompts: Sequence[str]) -> Facts:
        """See ``Solver.check``; one worker answers for all.

        Raises:
            UsageError: as there, or workers die while they load the model.
        """
        arms = [arm for job in jobs if (arm := parse_arm(job.arm)) is not None]
        self._known = self._ray.put((list(jobs), list(prompts), own_parts(arms)))
        for _ in range(_TRIES):
            try:
                facts: Facts = self._result(self._actors[0].check.remote(self._known))
            except self._ray.exceptions.RayActorError as error:
                reason = _line(error)
                self._actors[0] = self._spawn()
            else:
                return facts
        raise UsageError(f"workers died {_TRIES} times while they loaded the model: {reason}")

    def outcomes(self, todo: deque[Chunk]) -> Generator[tuple[Chunk, Outcome], None, None]:
        """See ``Executor``."""
        ray, died = self._ray, Counter[Any]()
        busy: dict[Any, tuple[int, Chunk]] = {}
        while todo or busy:
            idle = set(range(len(self._actors))) - {worker for worker, _ in busy.values()}
            for worker in sorted(idle)[: len(todo)]:
                chunk = todo.popleft()
                call = self._actors[worker].solve.remote(chunk, self._known)
                busy[call] = worker, chunk
            ready, _ = ray.wait(list(busy), timeout=_POLL_SECONDS)
            if not ready:
                self._look(busy)
            for reference in ready:
                worker, chunk = busy.pop(reference)
                try:
                    outcome = self._result(reference)
                except ray.exceptions.RayActorError as error:
                    died[chunk] += 1
                    if died[chunk] == _TRIES:
                        raise UsageError(
                            f"workers died {_TRIES} times on {chunk.job}, problem "
                            f"{chunk.items[0].problem!r}: {_line(error)}; what is finished is kept"
                        ) from None
                    todo.appendleft(chunk)
                    self._actors[worker] = self._spawn()
                    self._observer.died(worker, chunk)
                else:
                    yield chunk, outcome

    def _start(self, address: str | None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if address is not None:
            _check_address(address)
        try:
            self._init(address)
        except Exception as error:  # of many kinds
            if address is None:
                raise UsageError(f"Ray cannot be started on this machine: {_line(error)}") from None
            raise UsageError(
                f"there is no way into the cluster at ray_address={address!r}: {_line(error)} (if "
                "it wants a token, set RAY_AUTH_MODE=token)"
            ) from None

    def _init(self, address: str | None) -> None:
        """Join a cluster or start one here; Ray gives up after 30 s, too soon on a busy machine."""
        for left in reversed(range(_TRIES)):
            try:
                self._ray.init(
                    address=address or "local",
                    include_dashboard=None if address else False,
                    log_to_driver=False,
                    logging_level="ERROR",
                )
            except Exception as error:  # of no kind of its own
                if address is not None or not left or "timed out during startup" not in str(error):
                    raise
                self._ray.shutdown()
            else:
                return

    def _share(self, workers: int) -> dict[str, Any]:
        """What each worker takes: a GPU where there are any, else a share of the CPUs."""
        resources = self._ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        kind, most = ("GPUs", gpus) if gpus else ("CPU cores", cpus)
        if workers > most:
            raise UsageError(f"workers={workers} is too many: Ray has {most} {kind} here")
        if gpus:
            return {"num_gpus": 1, "num_cpus": min(1, cpus // workers)}
        return {"num_cpus": cpus // workers}

    def _spawn(self) -> Any:
        """A worker; its first call loads the model."""
        threads = None if "num_gpus" in self._options else self._options["num_cpus"]
        remote = self._ray.remote(concurrency_groups={"watch": 1})(_worker_class(self._ray))
        start = (self._arguments, threads, str(Path.cwd()))
        return remote.options(**self._options).remote(*start)

    def _result(self, reference: Any) -> Any:
        """The worker's result; its mistakes as they were there, without Ray's trace."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None

    def _look(self, busy: dict[Any, tuple[int, Chunk]]) -> None:
        """Ask busy workers how far they are; who does not answer at once is left alone."""
        ray = self._ray
        calls = {self._actors[w].steps.remote(): (w, chunk) for w, chunk in busy.values()}
        ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=_POLL_SECONDS)
        for reference in ready:
            worker, chunk = calls[reference]
            try:
                self._observer.stepped(worker, chunk, ray.get(reference))
            except ray.exceptions.RayError:
                continue  # the loop above finds out what happened to it


def require_ray() -> None:
    """Make sure that there can be workers.

    Raises:
        UsageError: the package is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--workers needs the package 'ray': pip install 'reasonalloc[ray]'")


def _worker_class(ray: Any) -> type[Any]:
    class Worker:
        """A solver that loads on its first call and tells how far it is."""

        def __init__(self, arguments: Any, threads: int | None, folder: str) -> None:
            # A cluster's workers start where the cluster was started: paths mean ours.
            with contextlib.suppress(OSError):
                os.chdir(folder)
            self._arguments, self._threads = arguments, threads
            self._solver: Any = None
            self._facts: Any = None
            self._steps = 0

        def check(self, known: Any) -> Any:
            jobs, prompts, parts = known
            adopt_parts(parts)
            if self._solver is None:
                import torch

                from reasonalloc.evaluation.engines import make_solver

                # An engine of this process, which ends with it, on the cores that Ray gave it.
                os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
                os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
                if self._threads is not None:
                    torch.set_num_threads(self._threads)
                self._solver = make_solver(*self._arguments)
            if self._facts is None:
                self._facts = self._solver.check(jobs, prompts)
            return self._facts

        def solve(self, chunk: Any, known: Any) -> Any:
            self._steps = 0
            self.check(known)
            return self._solver.solve(chunk, self._watch)

        def _watch(self, steps: int) -> bool:
            self._steps = steps
            return True

        @ray.method(concurrency_group="watch")  # type: ignore[untyped-decorator]
        def steps(self) -> int:
            return self._steps

    return Worker


def _check_address(address: str) -> None:
    """Knock once: Ray itself waits for minutes where nobody answers."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon:  # "auto", "local"
        return
    try:
        socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UsageError(
            f"ray_address={address!r} does not answer ({_line(error)}): give the address that "
            "'ray start --head' printed"
        ) from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
