"""A metric log, a tracker that keeps what it is given, and followers that do not wait long."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from dovetail.run.tracking import MetricLog
from dovetail.run.tracking.follower import Follower
from dovetail.run.tracking.lock import RUN


class Recorder:
    """Keeps every call, unless `fault` raises.

    Args:
        fault: Called with the method and the number of each call, before it is kept.
        capabilities: What it says that it holds.
    """

    def __init__(
        self,
        fault: Callable[[str, int], object] = lambda method, number: None,
        capabilities: Sequence[str] = (),
    ) -> None:
        self.fault = fault
        self.capabilities = frozenset(capabilities)
        self.num_calls = 0
        self.calls: list[tuple[Any, ...]] = []
        self.heard = threading.Event()

    def _take(self, method: str, *arguments: Any) -> None:
        self.num_calls += 1
        self.heard.set()
        self.fault(method, self.num_calls)
        self.calls.append((method, *arguments))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._take("log", step, dict(metrics))

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._take("log_params", params)

    def log_figure(self, name: str, path: Path, step: int) -> None:
        self._take("log_figure", name, path, step)

    def log_text(self, name: str, text: str, step: int) -> None:
        self._take("log_text", name, text, step)

    def log_histogram(self, name: str, counts: Any, edges: Any, step: int) -> None:
        self._take("log_histogram", name, counts, edges, step)

    def log_artifact(self, name: str, path: Path) -> None:
        self._take("log_artifact", name, path)

    def close(self, status: str) -> None:
        self._take("close", status)

    @property
    def methods(self) -> list[str]:
        return [call[0] for call in self.calls]

    @property
    def rows(self) -> list[tuple[int, dict[str, float]]]:
        return [(call[1], call[2]) for call in self.calls if call[0] == "log"]

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.rows]

    @property
    def status(self) -> str | None:
        """The status it was closed with, `None` before."""
        return next((call[1] for call in self.calls if call[0] == "close"), None)


@pytest.fixture
def recorder() -> type[Recorder]:
    """The class of a tracker that keeps every call."""
    return Recorder


@pytest.fixture
def log(tmp_path: Path) -> Iterator[MetricLog]:
    made = MetricLog(tmp_path)
    yield made
    made.close()


@pytest.fixture
def quick_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Followers that wait for next to nothing between two tries."""
    monkeypatch.setattr(Follower, "PAUSE_S", 1e-4)
    monkeypatch.setattr(Follower, "PARKED_S", 1e-4)
    monkeypatch.setattr(Follower, "PARKED_MAX_S", 1e-3)


OtherProcess: TypeAlias = Callable[..., AbstractContextManager["subprocess.Popen[str]"]]


@pytest.fixture
def other_process() -> OtherProcess:
    """`other_process(directory, purpose)`: one that holds a lock until it is told or killed."""

    @contextmanager
    def hold(directory: Path, purpose: str = RUN) -> Iterator[subprocess.Popen[str]]:
        code = (
            "import sys; from pathlib import Path\n"
            "from dovetail.run.tracking.lock import FolderLock\n"
            "lock = FolderLock(Path(sys.argv[1]), sys.argv[2]); lock.acquire()\n"
            "print('held', flush=True)\n"
            "sys.stdin.read()"
        )
        command = [sys.executable, "-c", code, str(directory), purpose]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
            process.kill()

    return hold
