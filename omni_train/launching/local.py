"""Start the ranks of a command on this machine: a process each, all ended when one fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_launched() -> bool:
    """Whether a launcher (ours, torchrun, Slurm through torchrun) already set this process's rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_ranks(command: list[str], num_processes: int, threads: int) -> int:
    """Run ``python -m omni_train.cli COMMAND`` on ``num_processes`` ranks; the first non-zero exit status, or 0.

    When a rank ends with an error the others are terminated, then killed after 10 s. Signals TERM, INT and USR1 are passed on.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_processes)}
    address["OMP_NUM_THREADS"] = str(threads)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "omni_train.cli", *command],
            env={**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(num_processes)
    ]

    def pass_on(number: int, _: object) -> None:
        for process in ranks:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        while True:
            codes = [process.poll() for process in ranks]
            failed = [code for code in codes if code]
            if failed or all(code == 0 for code in codes):
                return failed[0] if failed else 0
            time.sleep(0.05)
    finally:
        _end(ranks)
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(ranks: list[subprocess.Popen]) -> None:
    """Terminate what still runs, then kill what does not listen."""
    deadline = time.monotonic() + 10.0
    for process in ranks:
        if process.poll() is None:
            process.terminate()
    for process in ranks:
        try:
            process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
