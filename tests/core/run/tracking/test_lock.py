from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dovetail.errors import RunError
from dovetail.run.tracking.lock import FOLLOWERS, RUN, FolderLock, is_locked

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="locks are POSIX ones")


def test_a_lock_is_held_once_and_freed(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path, RUN), FolderLock(tmp_path, RUN)
    assert not is_locked(tmp_path)
    first.acquire()
    assert is_locked(tmp_path)
    assert first.holder() == os.getpid()
    assert not second.try_acquire(0)
    first.release()
    assert not is_locked(tmp_path)
    assert second.try_acquire(0)
    second.release()
    second.release()


def test_purposes_do_not_exclude_each_other(tmp_path: Path) -> None:
    run, followers = FolderLock(tmp_path, RUN), FolderLock(tmp_path, FOLLOWERS)
    run.acquire()
    assert followers.try_acquire(0)
    assert is_locked(tmp_path, FOLLOWERS)
    run.release()
    followers.release()


def test_another_process_is_named_until_it_is_killed(tmp_path: Path, other_process: Any) -> None:
    with other_process(tmp_path) as process:
        assert is_locked(tmp_path)
        lock = FolderLock(tmp_path, RUN)
        with pytest.raises(RunError, match=rf"in use by process {process.pid}; expected one"):
            lock.acquire()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not is_locked(tmp_path)
        lock.acquire()
        lock.release()


def test_a_lock_that_is_looked_at_is_still_taken(tmp_path: Path) -> None:
    # Whoever looks holds it for a moment; whoever takes it tries again.
    code = (
        "import sys; from pathlib import Path\n"
        "from dovetail.run.tracking.lock import is_locked\n"
        "print('looking', flush=True)\n"
        "while True: is_locked(Path(sys.argv[1]))"
    )
    FolderLock(tmp_path, RUN).path.touch()
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as looker:
        assert looker.stdout is not None
        looker.stdout.readline()
        for _ in range(50):
            lock = FolderLock(tmp_path, RUN)
            lock.acquire()
            lock.release()
        looker.kill()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, RUN)
    code = (
        "import os, sys, time; from pathlib import Path\n"
        "from dovetail.run.tracking.lock import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1]), 'run'); lock.acquire()\n"
        "pid = os.fork()\n"
        "if pid: print(pid, flush=True); os._exit(0)\n"
        "os.close(1); os.close(2); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    child = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    try:
        os.kill(child, 0)
        assert lock.try_acquire(0)
        lock.release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_folder_without_locks_is_free(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / "nosuch")
    assert FolderLock(tmp_path, RUN).holder() is None
