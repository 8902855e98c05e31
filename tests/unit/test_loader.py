"""The loader: packs to ranks, ranged reads, workers that change nothing but the time."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import webdataset
from test_index import write_shards

from omni_train.data.contracts import DocumentPlan, PackPlan
from omni_train.data.index import ensure_index
from omni_train.data.layouts import MESSAGES
from omni_train.data.loader import PackReader, StepLoader, distinct_names, rank_packs
from omni_train.data.planner import OutOfData, Planner, Source
from omni_train.data.shard import DataError


def document(index):
    return DocumentPlan("a", 0, index, 0, 1)


def test_rank_packs_by_hand():
    plans = [PackPlan(0, lane, slot, [document(lane)]) for lane in range(5) for slot in range(2)]
    plans[3].documents = []  # lane 1, slot 1: out of data

    def shown(rank, world):
        return [(plan.lane, plan.slot) if plan else None for plan in rank_packs(plans, rank, world)]

    assert shown(0, 2) == [(0, 0), (0, 1), (2, 0), (2, 1), (4, 0), (4, 1)]
    assert shown(1, 2) == [(1, 0), None, (3, 0), (3, 1), None, None]
    assert [len(shown(rank, 3)) for rank in range(3)] == [4, 4, 4]
    assert shown(0, 1) == [(lane, slot) if (lane, slot) != (1, 1) else None for lane in range(5) for slot in range(2)]
    with pytest.raises(ValueError, match="rank 0 of 6 data-parallel ranks cannot share 5 lanes"):
        rank_packs(plans, 0, 6)


def describe(key, members):
    return len(members["a.bin"]) + 1, [], True


@pytest.fixture
def reader(tmp_path):
    """Two shards of source "a": sample n of shard s holds number 10·s + n, and that many bytes."""
    shards = []
    for shard in range(2):
        path = tmp_path / f"x-{shard}.tar"
        with webdataset.TarWriter(str(path), mtime=0) as writer:
            for number in range(10 * shard, 10 * shard + 10):
                content = {13: b"[1]", 14: b"{bad"}.get(number, json.dumps({"text": f"{number}"}).encode())
                writer.write({"__key__": f"k{number}", "json": content, "a.bin": b"b" * number})
        shards.append(path)
    indexed = list(zip(shards, ensure_index(shards, describe, "t"), strict=True))
    return PackReader({"a": indexed}, {"a": MESSAGES}), shards


def test_reader_reads_exactly_the_sample(reader):
    sample = reader[0].read(DocumentPlan("a", 1, 7, 0, 5))
    assert (sample.id, sample.content, sample.members["a.bin"]) == ("a/x-1.tar/k17", {"text": "17"}, b"b" * 17)


def test_samples_of_shards_that_share_a_name_keep_ids_of_their_own(tmp_path):
    shards = []
    for folder in ("en", "de"):
        (tmp_path / folder).mkdir()
        shards.append(tmp_path / folder / "00000.tar")
        with webdataset.TarWriter(str(shards[-1])) as writer:
            writer.write({"__key__": "0", "json": {"text": folder}, "a.bin": b""})
    reader = PackReader({"a": list(zip(shards, ensure_index(shards, describe, "t"), strict=True))}, {"a": MESSAGES})
    ids = [reader.read(DocumentPlan("a", number, 0, 0, 4)).id for number in (0, 1)]
    assert ids == ["a/en/00000.tar/0", "a/de/00000.tar/0"]
    assert distinct_names(["/x/1.tar", "s3://y/x/2.tar"]) == ["1.tar", "2.tar"]
    assert distinct_names(["/u/x/y/1.tar", "/v/x/y/1.tar"]) == ["u/x/y/1.tar", "v/x/y/1.tar"]
    assert distinct_names([]) == [] and distinct_names(["b/a.tar", "b/a.tar"]) == ["a.tar", "a.tar"]


def test_reader_names_bad_json(reader):
    with pytest.raises(DataError, match=r"x-1\.tar: sample 'k13': byte 6,144: member 'json' holds a list, not an obj"):
        reader[0].read(DocumentPlan("a", 1, 3, 0, 5))
    with pytest.raises(DataError, match=r"x-1\.tar: sample 'k14': byte 8,192: member 'json' is not JSON") as info:
        reader[0].read(DocumentPlan("a", 1, 4, 0, 5))
    assert (info.value.key, info.value.offset) == ("k14", 8192)


def test_reader_notices_that_the_shard_changed(reader):
    data = reader[1][0].read_bytes()
    reader[1][0].write_bytes(data[4096:] + data[:4096])
    with pytest.raises(DataError, match=r"sample 'k1': byte 1,?\d*: expected one sample here, found keys"):
        reader[0].read(DocumentPlan("a", 0, 1, 0, 5))


@dataclass
class FakeLoad:
    """Loads a pack as {"ids": …, "threads": …}; fails, sleeps or dies at given steps."""

    fail_at: int = -1
    die_at: int = -1
    sleep_sec: float = 0.0

    def __call__(self, plan):
        if plan.step == self.fail_at:
            raise DataError("shard s, sample k: broken", shard="s", key="k", offset=3)
        if plan.step == self.die_at:
            os._exit(9)
        time.sleep(self.sleep_sec * (plan.lane + 1))  # later lanes finish later, and steps overlap
        ids = torch.tensor([[d.shard, d.index, d.start, d.stop] for d in plan.documents])
        return {"where": (plan.step, plan.lane, plan.slot), "ids": ids, "threads": torch.get_num_threads()}


class AwkwardError(Exception):
    """Cannot be unpickled: two required arguments."""

    def __init__(self, shard, key):
        super().__init__(f"{shard}: {key} is awkward")


def awkward(plan):
    raise AwkwardError("s", "k")


def dummy():
    return {"where": "dummy"}


def make_planner(max_epochs=None):
    lengths = [np.arange(1, 60), np.arange(5, 40)]
    flags = [np.zeros(len(values), bool) for values in lengths]
    return Planner([Source("a", 1.0, lengths, flags, max_epochs)], context=64, lanes=3, packs_per_lane=2, seed=0)


def shown(step):
    return [(pack["where"], pack["ids"].tolist()) if "ids" in pack else None for pack in step]


@pytest.mark.parametrize("num_workers", [1, 4])
def test_workers_change_nothing(num_workers):
    with StepLoader(make_planner(1.0), FakeLoad(), dummy, 0, 2) as inline:
        expected = []
        with pytest.raises(OutOfData):
            while True:
                expected.append((shown(inline.next_step()), inline.state_dict()))
    assert len(expected) > 5
    assert inline.state_dict() == expected[-1][1]
    with StepLoader(make_planner(1.0), FakeLoad(sleep_sec=0.002), dummy, 0, 2, num_workers, 3) as loader:
        found = []
        with pytest.raises(OutOfData):
            while True:
                step = loader.next_step()
                assert all(pack.get("threads", 1) == 1 for pack in step)
                found.append((shown(step), loader.state_dict()))
    assert found == expected


def test_prefetched_steps_do_not_count_in_the_state():
    with StepLoader(make_planner(), FakeLoad(), dummy, 1, 3, 2, 4) as loader:
        start = loader.state_dict()
        steps = [shown(loader.next_step()) for _ in range(6)]
        state = json.loads(json.dumps(loader.state_dict()))
        following = [shown(loader.next_step()) for _ in range(3)]
        assert state["step"] == 6 and loader.planner.step > 9
        assert loader.load_state_dict(state) == []
        assert [shown(loader.next_step()) for _ in range(3)] == following
        loader.load_state_dict(start)
        assert [shown(loader.next_step()) for _ in range(6)] == steps


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_load_pack_surfaces_at_its_step(num_workers):
    with StepLoader(make_planner(), FakeLoad(fail_at=2), dummy, 0, 1, num_workers) as loader:
        assert [loader.next_step()[0]["where"][0] for _ in range(2)] == [0, 1]
        with pytest.raises(DataError, match="shard s, sample k: broken") as info:
            loader.next_step()
        assert (info.value.shard, info.value.key, info.value.offset) == ("s", "k", 3)
        assert loader.state_dict()["step"] == 2


def test_an_error_that_cannot_be_pickled_keeps_its_name_and_message():
    with StepLoader(make_planner(), awkward, dummy, 0, 1, 1) as loader:
        with pytest.raises(RuntimeError, match="AwkwardError: s: k is awkward"):
            loader.next_step()


def test_a_worker_that_dies_is_an_error_not_a_hang():
    with StepLoader(make_planner(), FakeLoad(die_at=1), dummy, 0, 1, 2) as loader:
        with pytest.raises(RuntimeError, match="a data worker died"):
            for _ in range(3):
                loader.next_step()


SIGNALLED = """
import os, subprocess, sys, time
sys.path.insert(0, {tests!r})
from multiprocessing import forkserver
from test_loader import FakeLoad, dummy, make_planner
from omni_train.data.loader import StepLoader
if __name__ == "__main__":
    with StepLoader(make_planner(), FakeLoad(), dummy, 0, 1, 2) as loader:
        loader.next_step()
        workers, server = list(loader._executor._processes), forkserver._forkserver._forkserver_pid
        for number in ("TERM", "USR1"):
            subprocess.run(["kill", f"-{{number}}", *map(str, [server, *workers])], check=True)
        time.sleep(0.2)
        for _ in range(4):
            loader.next_step()
        assert list(loader._executor._processes) == workers
        assert os.waitpid(server, os.WNOHANG) == (0, 0), "the fork server has ended"
"""


FORKED = """
import multiprocessing, sys
sys.path.insert(0, {tests!r})
from test_index import describe
from test_loader import FakeLoad, dummy, make_planner
from omni_train.data.index import ensure_index
from omni_train.data.loader import StepLoader
def rank():
    with StepLoader(make_planner(), FakeLoad(), dummy, 0, 1, 1) as loader:
        loader.next_step()
if __name__ == "__main__":
    assert len(ensure_index(sys.argv[1:], describe, "", jobs=2)) == 2
    process = multiprocessing.get_context("fork").Process(target=rank)
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


def run_script(folder, code, *arguments, **options):
    """A script of its own: the fork server of this process may be another test's."""
    script = folder / "script.py"
    script.write_text(code.format(tests=os.path.dirname(__file__)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, timeout=120, env=environment, **options)


def test_workers_go_on_when_the_whole_job_is_told_to_stop(tmp_path):
    """The rank saves then, for which it needs the step that is on its way. The signals come from another process."""
    run_script(tmp_path, SIGNALLED, check=True)


@pytest.mark.slow
def test_a_rank_forked_from_a_process_that_has_indexed_shards_starts_workers(tmp_path):
    run_script(tmp_path, FORKED, *write_shards(tmp_path, ["one", "two", "three"], maxcount=2), check=True)


def test_more_ranks_than_lanes_and_bad_settings_are_refused():
    with pytest.raises(ValueError, match="rank 0 of 4 data-parallel ranks cannot share data.lanes=3"):
        StepLoader(make_planner(), FakeLoad(), dummy, 0, 4)
    with pytest.raises(ValueError, match="prefetch_steps .0."):
        StepLoader(make_planner(), FakeLoad(), dummy, 0, 1, 1, 0)


def test_steps_are_loaded_ahead():
    """While the consumer computes on a step, the next two are loaded."""
    with StepLoader(make_planner(), FakeLoad(), dummy, 0, 3, 1, 2) as loader:
        loader.next_step()
        futures = [future for _, step, _ in loader._in_flight for future in step]
        assert len(futures) == 4  # two steps of one lane with two packs
        deadline = time.time() + 30
        while not all(future.done() for future in futures) and time.time() < deadline:
            time.sleep(0.01)
        assert all(future.done() for future in futures)


@pytest.mark.parametrize(("world", "num_workers", "expected"), [(1, 1, 2), (3, 1, 2), (1, 16, 6), (3, 16, 16)])
def test_every_worker_has_two_packs_however_few_a_step_has(world, num_workers, expected):
    """Three lanes of two packs: six packs a step on one rank, two on each of three."""
    with StepLoader(make_planner(), FakeLoad(), dummy, 0, world, num_workers) as loader:
        assert loader._prefetch_steps == expected


SCRIPT = """
import os, sys, time
sys.path.insert(0, {tests!r})
from test_loader import FakeLoad, dummy, make_planner
from omni_train.data.loader import StepLoader
if __name__ == "__main__":
    loader = StepLoader(make_planner(), FakeLoad(), dummy, 0, 1, 2)
    loader.next_step()
    print(*[process.pid for process in loader._executor._processes.values()], flush=True)
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_no_worker_outlives_the_run(tmp_path, how):
    """Neither a script that forgets close() nor one that is killed hangs or leaves workers."""
    result = run_script(tmp_path, SCRIPT, how, stdout=subprocess.PIPE, text=True)
    assert result.returncode == (-9 if how == "kill" else 0)
    workers = [int(pid) for pid in result.stdout.split()]
    assert len(workers) == 2
    deadline = time.time() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.time() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in workers if os.path.exists(f"/proc/{pid}")]
