"""mixture.jsonl: started anew or gone on with; a source that runs dry is told once, whatever the run goes back to."""

from __future__ import annotations

import json

from omni_train.reporting.mixture import MIXTURE_FILE, MixtureLog


def lines(folder):
    return [json.loads(line) for line in (folder / MIXTURE_FILE).read_text().splitlines()]


def test_a_source_that_runs_dry_is_told_once(tmp_path):
    log = MixtureLog(tmp_path, is_writer=True)
    log.start({"a": 1.0, "b": 2.0}, 0)
    for step, exhausted in enumerate([[], ["b"], ["b"], ["a", "b"]]):
        log.note_exhausted(exhausted, step)
    assert lines(tmp_path) == [
        {"event": "start", "step": 0, "weights": {"a": 1.0, "b": 2.0}},
        {"event": "exhausted", "source": "b", "step": 1},
        {"event": "exhausted", "source": "a", "step": 3},
    ]


def test_a_resume_forgets_what_comes_again_and_keeps_the_rest(tmp_path):
    log = MixtureLog(tmp_path, is_writer=True)
    log.start({"a": 1.0}, 0)
    log.note_exhausted(["b"], 3)
    log.note_exhausted(["b", "c"], 6)
    with open(tmp_path / MIXTURE_FILE, "a") as file:
        file.write('{"event": "exh')  # torn by a kill
    log = MixtureLog(tmp_path, is_writer=True)
    log.resume({"a": 1.0}, 6, [{"event": "reweight", "source": "a"}], ["b"])
    log.note_exhausted(["b"], 6)
    log.note_exhausted(["b", "c"], 6)
    assert [(record["event"], record.get("source")) for record in lines(tmp_path)] == [
        ("start", None),
        ("exhausted", "b"),
        ("reweight", "a"),
        ("resume", None),
        ("exhausted", "c"),
    ]


def test_a_new_start_drops_an_earlier_run_and_other_ranks_write_nothing(tmp_path):
    log = MixtureLog(tmp_path, is_writer=True)
    log.start({"old": 1.0}, 0)
    other = MixtureLog(tmp_path, is_writer=False)
    other.start({"a": 1.0}, 0)
    other.note_exhausted(["a"], 0)
    other.resume({"a": 1.0}, 0, [], [])
    assert [record["weights"] for record in lines(tmp_path)] == [{"old": 1.0}]
    log.start({"new": 1.0}, 0)
    assert [record["weights"] for record in lines(tmp_path)] == [{"new": 1.0}]
