"""results.json and the table made from it."""

from __future__ import annotations

import json
import math

import pytest

from omni_train.reporting.results import (
    add_capabilities,
    add_stage,
    capability_rows,
    load_results,
    loss_changes,
    meets_bar,
    render_table,
)


def test_a_missing_file_is_an_empty_result(tmp_path):
    assert load_results(tmp_path) == {"stages": [], "capabilities": {}, "controls": {}, "environment": {}}
    assert list(tmp_path.iterdir()) == []


def test_a_stage_is_appended_and_replaced_in_its_place(tmp_path):
    run = tmp_path / "run"
    add_stage(run, {"name": "s1", "tokens": 1_000, "seconds": 4, "loss": {"text": 3.0}})
    add_stage(run, {"name": "s2", "tokens": 10, "seconds": 1, "tokens_per_second": 12.5, "loss": {}})
    add_stage(run, {"name": "s1", "tokens": 3_000, "seconds": 4, "loss": {"text": 2.0}})
    results = load_results(run)
    assert results["stages"] == [
        {"name": "s1", "tokens": 3_000, "seconds": 4, "loss": {"text": 2.0}, "tokens_per_second": 750.0},
        {"name": "s2", "tokens": 10, "seconds": 1, "tokens_per_second": 12.5, "loss": {}},
    ]
    assert results["environment"]["torch"].startswith("2.13.0") and results["environment"]["cpu_count"] >= 1
    assert [path.name for path in run.iterdir()] == ["results.json"]


def test_a_stage_without_a_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a stage needs a name, got \\['tokens'\\]"):
        add_stage(tmp_path, {"tokens": 1})


def test_capabilities_are_merged_beside_the_stages(tmp_path):
    add_stage(tmp_path, {"name": "s1", "tokens": 1, "seconds": 1, "loss": {"text": math.nan}})
    add_capabilities(tmp_path, {"asr_wer": 0.5, "vqa": 0.25}, {"asr_wer": 1.0})
    add_capabilities(tmp_path, {"asr_wer": 0.125}, {"vqa/blank": math.inf})
    strict = json.loads((tmp_path / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict["capabilities"] == {"asr_wer": 0.125, "vqa": 0.25}
    results = load_results(tmp_path)
    assert results["controls"] == {"asr_wer": 1.0, "vqa/blank": math.inf}
    assert math.isnan(results["stages"][0]["loss"]["text"])


@pytest.mark.parametrize(
    ("name", "value", "bar", "expected"),
    [("vqa_accuracy", 0.5, 0.5, True), ("vqa_accuracy", 0.4, 0.5, False), ("asr_wer", 0.1, 0.2, True)]
    + [("asr_wer", 0.3, 0.2, False), ("text/cer", 0.2, 0.2, True), ("answer_winrate", 0.3, 0.2, True)]
    + [("asr_wer", math.nan, 0.2, False), ("vqa_accuracy", math.nan, 0.5, False)],
)
def test_error_rates_stay_below_their_bar_and_the_rest_above(name, value, bar, expected):
    assert meets_bar(name, value, bar) is expected


def test_rows_join_the_controls_and_fail_what_was_not_measured():
    results = {"capabilities": {"vqa": 0.5, "asr_wer": 0.1}, "controls": {"vqa/blank": 0.25, "vqa/shuffled": 0.125}}
    assert capability_rows(results, {"talk_cer": 0.3, "vqa": 0.4}) == [
        ("vqa", 0.5, "blank 0.250, shuffled 0.125", 0.4, "pass"),
        ("asr_wer", 0.1, None, None, "–"),
        ("talk_cer", None, None, 0.3, "FAIL"),
    ]


def test_the_table_has_its_columns_in_a_fixed_order():
    results = {
        "stages": [
            {"name": "text_pretrain", "tokens": 200_000, "seconds": 50, "tokens_per_second": 4000.0},
            {"name": "s1_adapters", "tokens": 1_200_000, "seconds": 300, "tokens_per_second": 4000.0}
            | {"loss": {"video": 4.0, "audio": 3.25, "text": 2.5}},
            {"name": "s2", "tokens": 600_000, "seconds": 150, "loss": {"audio": 2.0}, "tokens_per_second": 4000.0},
        ],
        "capabilities": {"asr_wer": 0.125},
        "controls": {"asr_wer": 0.97},
    }
    table = render_table(results, {"asr_wer": 0.2})
    rows = [line.split() for line in table.splitlines() if line.strip(" ─")]
    assert rows == [
        ["Stages"],
        "stage tokens time tokens/s".split(),
        "text_pretrain 200k 50s 4.00k".split(),
        "s1_adapters 1.20M 5m 00s 4.00k".split(),
        "s2 600k 2m 30s 4.00k".split(),
        "Held-out loss, nats a token".split(),
        ["s1"],
        "source adapters s2".split(),
        "text 2.500 –".split(),
        "audio 3.250 2.000".split(),
        "video 4.000 –".split(),
        ["Capabilities"],
        "capability value control bar".split(),
        "asr_wer 0.125 0.970 ≤ 0.200 pass".split(),
    ]
    assert "\x1b" not in table
    assert "Capabilities" not in render_table(results | {"capabilities": {}}, None)


def test_many_stages_have_several_tables():
    """The thinker's seven stages, then speech and post-training."""
    stages = [{"name": f"stage_{n}", "loss": {"text": 5.0 - n}} for n in range(7)]
    stages += [{"name": "codec", "loss": {"talk": 0.5}}, {"name": "thinker_sft", "loss": {"text": -1.5, "chat": 2.0}}]
    text = render_table({"stages": stages, "capabilities": {}, "controls": {}}, None)
    _, first, second = text.split("Held-out loss, nats a token\n")
    assert first.count("stage") == 7
    rows = {line.split()[0]: line.split()[1:] for line in second.splitlines() if line.strip() and "─" not in line}
    assert rows["source"] == ["codec", "sft"]
    assert rows["text"] == ["–", "-1.500"] and rows["talk"] == ["0.500", "–"]
    assert rows["chat"] == ["–", "2.000"]


def test_later_stages_are_compared_with_the_baseline():
    """Every stage after it that shares a source; not the one before, nor speech, nor a new source."""
    stages = [
        {"name": "s2", "loss": {"text": 9.0}},
        {"name": "s3", "loss": {"video": 0.25, "text": 4.0, "silent": 0.0}},
        {"name": "talker", "loss": {"talk": 1.0}},
        {"name": "thinker_sft", "loss": {"chat": 1.0, "text": 3.8, "video": 0.2625, "silent": 1.0}},
        {"name": "thinker_gspo", "loss": {"text": 4.0}},
    ]
    changes = loss_changes(stages, "s3")
    assert list(changes) == ["thinker_sft", "thinker_gspo"]
    assert changes["thinker_sft"] == pytest.approx({"text": -0.05, "video": 0.05})
    assert loss_changes(stages, "") == loss_changes(stages, "s4") == {}
    results = {"stages": stages, "capabilities": {}, "controls": {}}
    table = render_table(results, None, "s3").split("Held-out loss against s3\n")[1]
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line.strip() and "─" not in line}
    assert rows["source"] == ["s3", "sft", "gspo"]
    assert rows["text"] == ["4.000", "−5.0", "%", "+0.0", "%"] and rows["video"] == ["0.250", "+5.0", "%", "–"]
    assert set(rows) == {"thinker", "source", "text", "video"}
    assert "against" not in render_table(results, None)
