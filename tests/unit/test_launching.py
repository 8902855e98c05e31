"""Ranks as processes: the first cause is told once, the others are ended quickly, signals reach everyone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from omni_train.config import EngineConfig
from omni_train.launching import local


@pytest.fixture
def rank_program(monkeypatch: pytest.MonkeyPatch):
    """Makes run_ranks run this Python code in each rank in place of the command line."""

    def use(code: str) -> None:
        def run(command: list[str]) -> None:
            local.prepare_rank()
            exec(code, vars(local) | {"rank": int(os.environ["RANK"])})

        monkeypatch.setattr(local, "run_command", run)

    return use


def engine(num_processes: int, threads: int = 1) -> EngineConfig:
    return EngineConfig(num_processes=num_processes, threads=threads)


def test_every_rank_gets_its_place(rank_program, tmp_path: Path) -> None:
    rank_program(
        "names = 'RANK LOCAL_RANK WORLD_SIZE OMP_NUM_THREADS MASTER_ADDR'\n"
        f"open(f'{tmp_path}/{{rank}}', 'w').write(' '.join(os.environ[n] for n in names.split()))"
    )
    assert local.run_ranks([], engine(2, threads=3)) == 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["0 0 2 3 127.0.0.1", "1 1 2 3 127.0.0.1"]


def test_a_failing_rank_ends_the_others_at_once_and_alone_is_heard(rank_program, monkeypatch, capfd) -> None:
    monkeypatch.setattr(local, "GRACE_SEC", 60.0)
    rank_program("if rank == 1:\n    raise RuntimeError('the second rank broke')\ntime.sleep(60)")
    local.import_for_ranks(engine(2))  # what is timed is the end of ranks, not the first import of a test run
    started = time.monotonic()
    assert local.run_ranks([], engine(2)) == 1
    assert time.monotonic() - started < 30.0
    error = capfd.readouterr().err
    assert error.count("RuntimeError: the second rank broke") == 1 and error.count("Traceback") == 1


def test_a_rank_that_has_hardly_started_ends_too(rank_program, monkeypatch: pytest.MonkeyPatch) -> None:
    forks: list[int] = []
    os.register_at_fork(
        before=lambda: forks.append(0) if forks else None,  # the list is empty when no test asks
        after_in_child=lambda: time.sleep(2.0) if len(forks) == 2 else None,  # rank 0; the other fails meanwhile
    )
    monkeypatch.setattr(local, "GRACE_SEC", 60.0)
    rank_program("if rank == 1:\n    sys.exit(3)\ntime.sleep(60)")
    local.import_for_ranks(engine(2))
    forks.append(0)
    started = time.monotonic()
    assert local.run_ranks([], engine(2)) == 3
    assert time.monotonic() - started < 30.0
    forks.clear()


def test_the_first_of_two_messages_is_the_one_that_is_printed(rank_program, capfd) -> None:
    rank_program(
        "time.sleep(0.0 if rank == 1 else 0.3)\n"
        "report_failure(f'omni-train: error: cause {rank}')\ntime.sleep(0.0 if rank == 0 else 0.5)\nsys.exit(2)"
    )
    assert local.run_ranks([], engine(2)) == 2
    assert capfd.readouterr().err == "omni-train: error: cause 1\n"


def test_a_killed_rank_is_named_and_not_its_peers_complaint(rank_program, capfd) -> None:
    rank_program("if rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)")
    assert local.run_ranks([], engine(2)) == 128 + signal.SIGKILL
    assert capfd.readouterr().err.startswith("omni-train: error: rank 1 was ended by SIGKILL; the machine may")


def test_a_rank_that_does_not_listen_is_killed(rank_program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "GRACE_SEC", 0.5)
    rank_program(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(0.5)\nif rank == 1:\n    sys.exit(3)\ntime.sleep(60)"
    )
    local.import_for_ranks(engine(2))  # what is timed is the end of ranks, not the first import of a test run
    started = time.monotonic()
    assert local.run_ranks([], engine(2)) == 3
    assert time.monotonic() - started < 30.0


def test_a_stop_signal_reaches_all_ranks_and_their_status_is_kept(rank_program, tmp_path: Path) -> None:
    rank_program(
        "def stop(*_):\n    open(f'" + str(tmp_path) + "/stopped{rank}', 'w').close()\n    sys.exit(85)\n"
        "signal.signal(signal.SIGUSR1, stop)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open(f'{tmp_path}/ready{{rank}}', 'w').close()\ntime.sleep(60)"
    )
    before = signal.getsignal(signal.SIGUSR1)

    def interrupt() -> None:
        while len(list(tmp_path.glob("ready*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=interrupt).start()
    assert local.run_ranks([], engine(2)) == 85
    assert sorted(path.name for path in tmp_path.glob("stopped*")) == ["stopped0", "stopped1"]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_the_ranks_of_a_killed_starter_stop(tmp_path: Path) -> None:
    starter = (
        "import time\nfrom omni_train.config import EngineConfig\nfrom omni_train.launching import local\n"
        "def rank(command):\n"
        f"    local.prepare_rank()\n    open(r'{tmp_path}/up', 'w').close()\n    time.sleep(60)\n"
        "local.run_command = rank\nlocal.run_ranks([], EngineConfig(num_processes=1))"
    )
    process = subprocess.Popen([sys.executable, "-c", starter])
    while not (tmp_path / "up").exists():
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("the kernel does not list children")
    child = int(children.read_text().split()[0])
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30.0
    while Path(f"/proc/{child}").exists() and "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline, "the rank outlives its starter"
        time.sleep(0.01)


def test_a_launcher_is_known_by_its_environment(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    for name in ("RANK", "WORLD_SIZE", local.FAILURES):
        monkeypatch.delenv(name, raising=False)
    assert not local.is_launched()
    monkeypatch.setenv("RANK", "3")
    assert not local.is_launched()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert local.is_launched()
    local.report_failure("omni-train: error: x")  # under torchrun nobody collects: each rank says who it is
    assert capfd.readouterr().err == "[rank 3] omni-train: error: x\n"
