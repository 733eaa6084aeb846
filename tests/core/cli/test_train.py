"""`dovetail train`, with a real model, real checkpoints and a real Ctrl-C."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from dovetail.run.checkpoint import last_checkpoint, load_progress

Run = Callable[..., Result]
ANSI = re.compile(r"\x1b")


def resume_command(output: str) -> list[str]:
    """Return the arguments of the command that a run's last line names."""
    (line,) = [text for text in output.splitlines() if text.startswith("resume with: ")]
    command = shlex.split(line.removeprefix("resume with: "))
    assert command[0] == "dovetail"
    return command[1:]


def test_train_prints_lines_and_paths_when_piped(project: Any, run_cli: Run) -> None:
    result = run_cli("train", "tiny.toml")
    assert result.exit_code == 0, result.output
    (run,) = project.runs
    lines = result.stdout.splitlines()
    where = f"runs/tiny/{run.name}"
    assert lines[1:3] == [f"run {where}", "14 parameters on cpu; 8 steps in 2 epochs"]
    assert lines[3].startswith("epoch 1/2: train loss ")
    assert lines[4].startswith("epoch 2/2: train loss ")
    assert lines[6].startswith("completed: 8 steps in ")
    paths = dict(line.split() for line in lines[-3:])
    assert paths["run"] == where
    assert paths["best"].startswith(f"{where}/checkpoints/step-00000")
    assert paths["report"] == f"{where}/report.html"
    assert not ANSI.search(result.stdout + result.stderr)


@pytest.mark.filterwarnings("default")
def test_train_prints_paths_alone_when_quiet(project: Any, run_cli: Run) -> None:
    result = run_cli("train", "tiny.toml", "--quiet", "model.kwargs.warn_at=2")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()] == ["run", "best", "report"]


def test_train_prints_nothing_when_it_is_not_the_first_process(
    project: Any, run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    result = run_cli("train", "tiny.toml")
    assert (result.exit_code, result.output) == (0, "")


def test_train_takes_overrides(project: Any, run_cli: Run) -> None:
    result = run_cli("train", "tiny.toml", "train.max_steps=3", "train.optimizer=sgd")
    assert "completed: 3 steps in " in result.stdout


@pytest.mark.filterwarnings("default")
def test_train_shows_a_warning_as_one_line(project: Any, run_cli: Run) -> None:
    result = run_cli("train", "tiny.toml", "model.kwargs.warn_at=2")
    assert "warning: the weather is bad" in result.stdout.splitlines()
    assert result.stderr == ""


def test_train_exits_2_with_every_problem_of_the_config(project: Any, run_cli: Run) -> None:
    result = run_cli("train", "tiny.toml", "train.lr=-1", "export.use=pytroch")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert lines[0] == "error: config 'tiny.toml': 2 problems"
    assert lines[1].startswith("  - config train.lr: got -1; expected ")
    assert lines[2].startswith("  - config export.use: no plugin is called 'pytroch'")
    assert not (project.directory / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.toml",), "error: config file 'absent.toml': not found"),
        (("tiny.toml", "lr"), "error: override 'lr': is no setting"),
        ((), "error: Missing argument 'CONFIG'."),
        (("--resume", "tiny.toml"), "--resume took 'tiny.toml' for a run: put it last."),
        (("tiny.toml", "--resume", "train.lr=1"), "--resume took 'train.lr=1' for a run"),
        (("tiny.toml", "--lr", "1"), "error: No such option"),
    ],
)
def test_train_exits_2_when_the_arguments_do_not_fit(
    project: Any, run_cli: Run, arguments: tuple[str, ...], message: str
) -> None:
    result = run_cli("train", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_train_exits_1_without_a_traceback_when_the_model_does_not_fit(
    project: Any, run_cli: Run
) -> None:
    result = run_cli("train", "tiny.toml", "task.num_classes=3")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


def test_train_exits_1_with_the_traceback_when_the_users_code_fails(
    project: Any, run_cli: Run
) -> None:
    result = run_cli("train", "tiny.toml", "model.kwargs.fail_at=6")
    assert result.exit_code == 1
    assert 'KeyError: "the user\'s own mistake"' in result.stderr
    assert "error: unexpected KeyError." in result.stderr
    (run,) = project.runs
    assert f"what the run left behind: runs/tiny/{run.name}" in result.stderr


def test_train_resumes_a_run_whose_folder_looks_like_an_override(
    project: Any, run_cli: Run
) -> None:
    overrides = ('run.dir="a=b"', "model.kwargs.interrupt_at=2", "run.id=one")
    stopped = run_cli("train", "tiny.toml", *overrides)
    arguments = resume_command(stopped.stdout)
    assert arguments[-1] == "a=b/tiny/one"
    finished = run_cli(*arguments, "train.max_steps=3")
    assert "completed: 3 steps in " in finished.stdout, finished.output


def test_train_exits_1_when_the_run_to_resume_is_not_there(project: Any, run_cli: Run) -> None:
    result = run_cli("train", "tiny.toml", "--resume")
    assert result.exit_code == 1
    assert "error: resume 'latest': there is no run" in result.stderr


def test_train_shows_the_traceback_of_its_own_error_when_debugging(
    project: Any, run_cli: Run
) -> None:
    result = run_cli("train", "tiny.toml", "train.lr=-1", "--debug")
    assert result.exit_code == 2
    assert result.stderr.startswith("Traceback (most recent call last):")
    assert result.stderr.splitlines()[-1].startswith("error: config train.lr: got -1")


def test_train_exits_130_with_the_command_that_resumes_when_interrupted(
    project: Any, run_cli: Run
) -> None:
    overrides = ("model.kwargs.interrupt_at=6", "run.id=one", "data.kwargs.num_samples=32")
    stopped = run_cli("train", "tiny.toml", *overrides)
    assert stopped.exit_code == 130
    assert "interrupted: 6 steps in " in stopped.stdout
    arguments = resume_command(stopped.stdout)
    assert arguments == ["train", "tiny.toml", *overrides, "--resume", "runs/tiny/one"]
    # The resumed run builds the model anew, which is interrupted at its own sixth micro-batch.
    stopped = run_cli(*arguments)
    assert stopped.exit_code == 130
    assert "interrupted: 12 steps in " in stopped.stdout
    finished = run_cli(*resume_command(stopped.stdout))
    assert finished.exit_code == 0
    assert "completed: 16 steps in " in finished.stdout
    assert [run.name for run in project.runs] == ["one"]


def test_train_prints_the_resuming_command_when_interrupted_and_quiet(
    project: Any, run_cli: Run
) -> None:
    result = run_cli("train", "tiny.toml", "-q", "model.kwargs.interrupt_at=2")
    assert result.exit_code == 130
    first_words = [line.split()[0] for line in result.output.splitlines()]
    assert first_words == ["run", "best", "report", "resume"]


def test_train_says_so_when_there_is_nothing_to_resume(project: Any, run_cli: Run) -> None:
    text = (project.directory / "tiny.toml").read_text()
    (project.directory / "tiny.toml").write_text(text.replace("load_splits", "load_interrupted"))
    result = run_cli("train", "tiny.toml")
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"
    assert result.stdout.splitlines()[-1] == "there is no checkpoint to resume from"


def test_train_tells_formats_and_how_to_check_them(exporting_project: Any, run_cli: Run) -> None:
    result = run_cli("train", "tiny.toml", "export.use=npz", "run.id=one")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert {"npz: exporting", "npz: proving", "npz: proven"} <= set(lines)
    (row,) = [line.split() for line in lines if line.startswith("npz  ")]
    assert row[4:8] == ["1,", "2,", "3,", "8"]
    assert lines[-2:] == [
        "bundle  runs/tiny/one/bundle",
        "check it with: dovetail verify runs/tiny/one/bundle",
    ]


@pytest.mark.parametrize("flags", [(), ("--quiet",)])
def test_train_exits_1_with_the_reason_when_a_format_fails(
    exporting_project: Any, run_cli: Run, flags: tuple[str, ...]
) -> None:
    result = run_cli("train", "tiny.toml", 'export.use=["npz", "bad"]', *flags)
    assert result.exit_code == 1
    told = " ".join((result.stdout + result.stderr).split())
    assert "bad failed at its export: " in told
    assert "knows no linear layers" in told
    assert (exporting_project.runs[0] / "bundle" / "manifest.json").is_file()


def test_train_with_a_lock_runs_with_the_same_plugins_only(project: Any, run_cli: Run) -> None:
    assert run_cli("train", "tiny.toml", "run.id=one", "train.max_steps=1").exit_code == 0
    lock = "runs/tiny/one"
    arguments = ("--frozen", lock, "run.id=two", "train.max_steps=1")
    assert run_cli("train", "tiny.toml", *arguments).exit_code == 0
    text = (Path(lock) / "plugins.lock.json").read_text()
    assert (Path("runs/tiny/two") / "plugins.lock.json").read_text() == text
    changed = run_cli("train", "tiny.toml", "--frozen", lock, "accumulate.exact.steps=2")
    assert changed.exit_code == 2
    assert "accumulate plugin 'exact': its options differ" in changed.stderr
    assert len(project.runs) == 2


def test_train_exits_2_when_there_is_no_such_lock(project: Any, run_cli: Run) -> None:
    result = run_cli("train", "tiny.toml", "--frozen", "absent.json")
    assert result.exit_code == 2
    assert "error: lock 'absent.json': not found." in result.stderr


def test_train_is_resumed_with_the_same_lock_and_the_same_list(project: Any, run_cli: Run) -> None:
    assert run_cli("train", "tiny.toml", "run.id=one", "train.max_steps=1").exit_code == 0
    overrides = ("model.kwargs.interrupt_at=2", "run.id=two")
    flags = ("--frozen", "runs/tiny/one", "--allow", "dovetail-default")
    stopped = run_cli("train", "tiny.toml", *flags, *overrides)
    assert stopped.exit_code == 130, stopped.stderr
    arguments = resume_command(stopped.stdout)
    assert arguments == ["train", "tiny.toml", *overrides, *flags, "--resume", "runs/tiny/two"]
    assert run_cli(*arguments, "train.max_steps=3").exit_code == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--no-autoload",), "dovetail-default offers it; option --no-autoload keeps it out."),
        (("--allow", "absent"), "option --allow: no installed distribution offers 'absent'"),
        (("--no-autoload", "--allow", "dovetail-default"), None),
    ],
)
def test_train_takes_plugins_of_allowed_distributions_only(
    project: Any, run_cli: Run, flags: tuple[str, ...], message: str | None
) -> None:
    result = run_cli("train", "tiny.toml", "train.max_steps=1", *flags)
    assert result.exit_code == (0 if message is None else 2)
    assert message is None or message in result.stderr


@pytest.mark.slow
def test_train_ends_with_a_checkpoint_when_the_terminal_sends_ctrl_c(
    project: Any, run_cli: Run
) -> None:
    command = [sys.executable, "-m", "dovetail", "train", "tiny.toml", "train.epochs=100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("epoch 3/"):
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate()
    assert process.returncode == 130, errors
    assert errors == ""
    (run,) = project.runs
    progress = load_progress(last_checkpoint(run))
    assert f"interrupted: {progress.step} steps in " in rest
    assert not ANSI.search("".join(seen) + rest)
    arguments = resume_command(rest)
    arguments[arguments.index("train.epochs=100000")] = f"train.epochs={progress.epoch + 2}"
    finished = run_cli(*arguments)
    assert finished.exit_code == 0, finished.output
    assert f"completed: {4 * (progress.epoch + 2)} steps in " in finished.stdout


@pytest.mark.slow
def test_train_goes_on_when_nobody_reads_its_lines_any_more(project: Any) -> None:
    command = [sys.executable, "-m", "dovetail", "train", "tiny.toml", "train.epochs=5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    _, errors = process.communicate()
    assert (process.returncode, errors) == (0, b"")
    assert load_progress(last_checkpoint(project.runs[0])).step == 20
