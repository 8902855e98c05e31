"""Start the ranks of a command on this machine: a process each, all ended when one fails, one message for all of them.

run_ranks ──fork──▶ rank 0 … rank n, each writes why it failed (report_failure) ──▶ the first cause is printed once

Ranks are forked from a process that has imported what they need: a recipe starts ranks a dozen times, and an import
takes seconds. Nothing here touches an accelerator before the fork.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import TracebackType

from omni_train.config import EngineConfig

FAILURES = "OMNI_TRAIN_FAILURES"
"""Environment variable naming the folder in which ranks that ``run_ranks`` started leave why they failed."""

GRACE_SEC = 10.0
PR_SET_PDEATHSIG = 1
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_launched() -> bool:
    """Whether a launcher (ours, torchrun, Slurm through torchrun) already set this process's rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_ranks(command: list[str], engine: EngineConfig) -> int:
    """Run ``omni-train COMMAND`` on ``engine.num_processes`` ranks; 0, or the exit status of the first to fail.

    When a rank ends with an error the others are terminated, killed after 10 s, and the message of the rank that
    failed first is printed, once. Signals TERM, INT and USR1 are passed on. A rank that a signal ended counts as 128 +
    its number.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(engine.num_processes)}
    address["OMP_NUM_THREADS"] = str(engine.threads)
    import_for_ranks(engine)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="omni-train-") as failures:
        ranks: list[ForkProcess] = []
        with ExitStack() as stack:
            with _signals_held():
                stack.enter_context(_passing_signals_to(ranks))
                stack.callback(_end, ranks)
                for rank in range(engine.num_processes):
                    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), FAILURES: failures}
                    ranks.append(context.Process(target=_as_rank, args=(command, address | own), name=f"rank {rank}"))
                    ranks[-1].start()
            failed = _wait_for_first_failure(ranks)
        if failed is None:
            return 0
        code = ranks[failed].exitcode or 0
        message = _first_cause(Path(failures), failed, code)
        if message:
            print(message, file=sys.stderr, flush=True)
        return code if code > 0 else 128 - code


def import_for_ranks(engine: EngineConfig) -> None:
    """Import what ranks need, so that they start in a fraction of a second. Makes no thread and no device context."""
    os.environ.setdefault("OMP_NUM_THREADS", str(engine.threads))
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for CUDA must not create its context here
    modules = ["omni_train.train", "omni_train.evaluation.transcription"]
    if engine.device == "cpu":  # on a GPU DeepSpeed's accelerator may look at the device when it is imported
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        modules += ["deepspeed", "deepspeed.module_inject.auto_ep_layer"]
    for module in modules:
        importlib.import_module(module)


def _as_rank(command: list[str], environment: dict[str, str]) -> None:
    """The forked process of one rank: as ``python -m omni_train.cli COMMAND`` would be, but for its imports."""
    os.environ |= environment
    for number in PASSED_ON:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        run_command(command)
    except SystemExit:
        raise
    except BaseException as error:
        _report_uncaught(type(error), error, error.__traceback__)
        sys.exit(1)


def run_command(command: list[str]) -> None:
    """``python -m omni_train.cli COMMAND`` in this process."""
    sys.argv = ["omni-train", *command]
    sys.modules.pop("omni_train.cli", None)  # runpy warns of a module that the starter has imported
    runpy.run_module("omni_train.cli", run_name="__main__")


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
    """Set up a rank: an uncaught exception reported once, its starter's death noticed."""
    sys.excepthook = _report_uncaught
    if sys.platform == "linux" and FAILURES in os.environ:  # a killed starter: save and leave too
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class StopSignal:
    """Remembers TERM or USR1, so that the run saves at the end of a step and leaves."""

    def __init__(self) -> None:
        self.seen = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        self.seen = True


def quiet() -> None:
    """Silence, before heavy imports, notices that no user can act on; errors and our own lines stay."""
    for name, value in {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' bars while it writes shards
        "TRANSFORMERS_VERBOSITY": "error",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # peers' broken connections, told by the rank that failed first
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def _report_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    report_failure("".join(traceback.format_exception(kind, error, trace)).rstrip())


@contextmanager
def _passing_signals_to(ranks: list[ForkProcess]) -> Iterator[None]:
    def pass_on(number: int, _: object) -> None:
        for process in ranks:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _signals_held() -> Iterator[None]:
    """While ranks are forked: a signal waits until all are there, one to a rank until it has its own handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait_for_first_failure(ranks: list[ForkProcess]) -> int | None:
    """The number of a rank that ended with an error, as soon as there is one; None when all have ended well.

    A rank that died of a signal goes before ranks that failed because of it.
    """
    while True:
        codes = [process.exitcode for process in ranks]
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


def _end(ranks: list[ForkProcess]) -> None:
    """Terminate what still runs, then kill what does not listen."""
    deadline = time.monotonic() + GRACE_SEC
    for process in ranks:
        if process.is_alive():
            process.terminate()
    for process in ranks:
        process.join(timeout=max(0.1, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
