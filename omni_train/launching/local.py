"""Start the ranks of a command on this machine: a process each, all ended when one fails, one message for all of them.

run_ranks ──spawn──▶ rank 0 … rank n, each writes why it failed (report_failure) ──▶ the first cause is printed once
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

FAILURES = "OMNI_TRAIN_FAILURES"
"""Environment variable naming the folder in which ranks that ``run_ranks`` started leave why they failed."""

GRACE_SEC = 10.0
PR_SET_PDEATHSIG = 1


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_launched() -> bool:
    """Whether a launcher (ours, torchrun, Slurm through torchrun) already set this process's rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_ranks(command: list[str], num_processes: int, threads: int) -> int:
    """Run ``python -m omni_train.cli COMMAND`` on ``num_processes`` ranks; 0, or the exit status of the first to fail.

    When a rank ends with an error the others are terminated, killed after 10 s, and the message of the rank that
    failed first is printed, once. Signals TERM, INT and USR1 are passed on. A rank that a signal ended counts as 128 +
    its number.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_processes)}
    address["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory(prefix="omni-train-") as failures:
        ranks: list[subprocess.Popen[bytes]] = []
        with _passing_signals_to(ranks):
            try:
                for rank in range(num_processes):
                    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), FAILURES: failures}
                    program = [sys.executable, "-m", "omni_train.cli", *command]
                    ranks.append(subprocess.Popen(program, env={**os.environ, **address, **own}))
                failed = _wait_for_first_failure(ranks)
            finally:
                _end(ranks)
        if failed is None:
            return 0
        code = ranks[failed].returncode
        message = _first_cause(Path(failures), failed, code)
        if message:
            print(message, file=sys.stderr, flush=True)
        return code if code > 0 else 128 - code


def report_failure(message: str) -> None:
    """Leave ``message`` for the process that started this rank, or print it where nobody collects messages."""
    folder, rank = os.environ.get(FAILURES), os.environ.get("RANK", "0")
    if folder and Path(folder).is_dir():
        path = Path(folder) / f"{time.time_ns():020d}-{rank}"
        path.with_suffix(".part").write_text(message)
        path.with_suffix(".part").rename(path)
    else:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        print(f"[rank {rank}] {message}" if world > 1 else message, file=sys.stderr, flush=True)


def prepare_rank() -> None:
    """Set up a rank's process before heavy imports: library chatter off, an uncaught exception reported once.

    Only notices that no user can act on are silenced; errors and our own lines stay.
    """
    for name, value in {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' bars while it writes shards
        "TRANSFORMERS_VERBOSITY": "error",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # peers' broken connections, told by the rank that failed first
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    sys.excepthook = _report_uncaught
    if sys.platform == "linux" and FAILURES in os.environ:  # a killed starter: save and leave too
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _report_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    report_failure("".join(traceback.format_exception(kind, error, trace)).rstrip())


@contextmanager
def _passing_signals_to(ranks: list[subprocess.Popen[bytes]]):
    def pass_on(number: int, _: object) -> None:
        for process in ranks:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for_first_failure(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    """The number of a rank that ended with an error, as soon as there is one; None when all have ended well.

    A rank that died of a signal goes before ranks that failed because of it.
    """
    while True:
        codes = [process.poll() for process in ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            return min(failed, key=lambda rank: codes[rank] or 0)
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _first_cause(failures: Path, failed: int, code: int) -> str:
    """What to tell about a failure: a rank's death by a signal, else the message that was written first."""
    if code < 0:
        hint = "; the machine may have run out of memory" if -code == signal.SIGKILL else ""
        return f"omni-train: error: rank {failed} was ended by {signal.Signals(-code).name}{hint}"
    messages = sorted(path for path in failures.iterdir() if path.suffix != ".part")
    return messages[0].read_text() if messages else ""


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Terminate what still runs, then kill what does not listen."""
    deadline = time.monotonic() + GRACE_SEC
    for process in ranks:
        if process.poll() is None:
            process.terminate()
    for process in ranks:
        try:
            process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
