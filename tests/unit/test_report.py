"""The report: one page that needs nothing else, whatever the run folder holds."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from omni_train.reporting.charts import Series, line_chart, nice_ticks, smooth, thin
from omni_train.reporting.metrics import MetricsWriter
from omni_train.reporting.report import find_stages, metric_series, write_report
from omni_train.reporting.results import add_capabilities, add_stage

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Checker(HTMLParser):
    """Fails on a tag that is closed in the wrong place; gathers text and links."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.text, self.resources, self.ids, self.anchors = [], [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "data", "xlink:href") or (name == "href" and not value.startswith("#")):
                self.resources.append(value)
            elif name == "href":
                self.anchors.append(value[1:])
            elif name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def make_stage(run: Path, name: str, num_steps: int) -> None:
    writer = MetricsWriter(run / name, wandb_project=None, wandb_mode="disabled", config={}, is_writer=True)
    for step in range(1, num_steps + 1):
        record = {"tokens": 1_000 * step, "loss": 3.0, "loss/text": 4.0 / step, "loss/router": 1.0, "lr/llm": 1e-3}
        record |= {"grad_norm/main": 1.0, "tokens_per_second": 500.0, "moe/max_violation": 0.5, "moe/dead_experts": 0.0}
        if step % 10 == 0:
            record["eval/loss/asr"] = 2.0
        writer.log(record, step)
    writer.close()
    (run / name / "config.yaml").write_text("stage:\n  name: <script>alert(1)</script>\n")
    (run / name / "mixture.jsonl").write_text(
        '{"event": "start", "weights": {"speech": 3.0, "images": 1.0}}\n{"event": "added", "source": "video"}\n{"tor'
    )


def test_the_page_is_whole_and_needs_nothing_else(tmp_path):
    run = tmp_path / "quick<start"
    make_stage(run, "s2_general", 5)
    make_stage(run, "s1_adapters", 50)
    add_stage(run, {"name": "s1_adapters", "tokens": 50_000, "seconds": 100, "loss": {"audio": 2.0, "text": math.nan}})
    add_stage(run, {"name": "s2_general", "tokens": 5_000, "seconds": 10, "loss": {"audio": 1.9}})
    add_capabilities(run, {"asr_wer": 0.125}, {"asr_wer": 0.97})
    page = Checker(write_report(run, {"asr_wer": 0.1}, "s1_adapters").read_text(encoding="utf-8"))
    text = " ".join(page.text)
    assert page.resources == [] and not re.search(r"url\(|@import", text)
    assert page.ids == ["s1_adapters", "s2_general"] and set(page.anchors) == set(page.ids)
    for part in (
        "quick<start",
        "asr_wer",
        "0.125",
        "0.970",
        "≤ 0.100",
        "FAIL",
        "<script>alert(1)</script>",
        "75.0 %",
        "−5.0 %",
    ):
        assert part in text
    assert '{"event": "added", "source": "video"}' in text and '{"tor' not in text
    assert sorted(path.name for path in run.iterdir()) == ["report.html", "results.json", "s1_adapters", "s2_general"]


def test_an_empty_folder_has_a_report_and_a_missing_one_is_refused(tmp_path):
    assert "No stage has finished yet" in write_report(tmp_path).read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="does not exist"):
        write_report(tmp_path / "nowhere")


def test_stages_go_by_the_results_then_by_name(tmp_path):
    for name in ("a", "b", "c", "wandb"):
        (tmp_path / name).mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / name / "metrics.jsonl").write_text("")
    results = {"stages": [{"name": "c"}, {"name": "gone"}]}
    assert [path.name for path in find_stages(tmp_path, results)] == ["c", "a", "b"]
    (tmp_path / "config.yaml").write_text("")
    assert find_stages(tmp_path, results)[0] == tmp_path


def test_metrics_are_grouped_in_the_order_of_the_page():
    records = [
        {
            "step": 1,
            "tokens": 10,
            "reward/format": 0.5,
            "lr/llm": 1e-3,
            "loss": 3.0,
            "loss/video": 4.0,
            "loss/text": 2.0,
        },
        {"step": 2, "tokens": 20, "loss": 2.0, "loss/text": math.nan, "loss/router": 1.25, "eval/loss/asr": 1.5},
        {"step": 3, "kl": 0.25, "moe/dead_experts": 1, "note": "x"},
    ]
    series = metric_series(records)
    assert list(series) == ["loss", "eval/loss", "lr", "moe/dead_experts", "loss/router", "kl", "reward"]
    assert [line.name for line in series["loss"]] == ["text", "video"]
    assert series["eval/loss"] == [Series("asr", [(20.0, 1.5)])]
    assert series["kl"] == [Series("kl", [(3.0, 0.25)])]
    assert series["loss"][0].points[0] == (10.0, 2.0) and math.isnan(series["loss"][0].points[1][1])


def test_a_lone_loss_is_charted():
    assert metric_series([{"step": 1, "loss": 3.0}]) == {"loss": [Series("loss", [(1.0, 3.0)])]}


@pytest.mark.parametrize(
    ("low", "high", "count", "ticks"),
    [
        (0.0, 10.0, 5, [0, 2, 4, 6, 8, 10]),
        (1.1, 3.9, 4, [1, 2, 3, 4]),
        (0.0, 1e-3, 4, [0, 2.5e-4, 5e-4, 7.5e-4, 1e-3]),
        (5.0, 5.0, 4, [4.5, 4.75, 5.0, 5.25, 5.5]),
        (0.0, 0.0, 4, [0, 0.25, 0.5, 0.75, 1.0]),
    ],
)
def test_ticks_are_round_and_enclose_the_data(low, high, count, ticks):
    assert nice_ticks(low, high, count) == pytest.approx(ticks)


def test_smoothing_keeps_a_constant_and_passes_over_gaps():
    assert smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    # Three values: the span is one value, the decay 1/e; (4 + 1/e · 2) / (1 + 1/e) = 3.4621.
    assert smooth([2.0, 4.0, math.inf]) == [2.0, pytest.approx(3.46212, abs=1e-5), math.inf]


def test_thinning_keeps_both_ends():
    points = [(float(x), 0.0) for x in range(1_001)]
    assert [x for x, _ in thin(points, 5)] == [0, 250, 500, 750, 1000]
    assert thin(points[:5], 5) == points[:5]


def test_a_chart_places_its_points_and_breaks_at_what_is_not_finite():
    points = [(0.0, 0.0), (5.0, math.nan), (5.0, 10.0), (10.0, 10.0)]
    figure = line_chart("Loss <b>", [Series("text", points), Series("audio", [(0.0, math.nan)])])
    # The plot area spans x 52…450 and y 194 (bottom) … 10 (top).
    assert 'd="M52.0 194.0M251.0 10.0L450.0 10.0"' in figure
    assert "Loss &lt;b&gt;" in figure and "text <b>10</b>" in figure and "audio <b>–</b>" in figure
    assert "var(--c0)" in figure and "var(--c1)" in figure
    Checker(figure)
    assert line_chart("Loss", [Series("text", [(0.0, math.nan)])]) == ""


def test_a_report_reads_a_run_in_flight(tmp_path):
    (tmp_path / "s1").mkdir()
    (tmp_path / "s1" / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.5}) + '\n{"step": 2, "lo')
    page = Checker(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "Training loss (nats per token)" in page.text and "2.5" in page.text
