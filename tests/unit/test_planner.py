"""The planner: ranges of long texts, what is left out, state and what a resume may change."""

import json

import numpy as np
import pytest

from omni_train.data.contracts import DocumentPlan
from omni_train.data.order import LaneCursor, SourceOrder, keyed_permutation
from omni_train.data.planner import OutOfData, Planner, Source, exhausted, plan_once


def source(name, lengths, *, weight=1.0, splittable=False, max_epochs=None):
    """A source with one shard for each list of ``lengths``."""
    arrays = [np.array(values) for values in lengths]
    return Source(name, weight, arrays, [np.full(len(values), splittable) for values in arrays], max_epochs)


def planner(sources, **changes):
    settings = {"context": 100, "lanes": 4, "packs_per_lane": 1, "seed": 0, "num_bins": 3}
    return Planner(sources, **(settings | changes))


def drain(plan):
    """All documents until OutOfData, in order."""
    documents = []
    try:
        while True:
            documents += [document for pack in plan.next_step() for document in pack.documents]
    except OutOfData:
        return documents


def test_keyed_permutation_is_fixed_for_ever():
    """The order of a run must survive an upgrade of numpy: a change here breaks resuming."""
    assert keyed_permutation(10, 1, "text", 0).tolist() == [8, 3, 2, 9, 5, 7, 1, 6, 4, 0]
    assert keyed_permutation(10, 1, "text", 1).tolist() == [4, 6, 9, 3, 0, 5, 1, 2, 8, 7]


def test_long_text_is_cut_and_other_long_samples_are_left_out():
    text = source("text", [[250, 40]], splittable=True, max_epochs=1)
    image = source("image", [[30, 101], [100]], max_epochs=1)
    plan = planner([text, image], lanes=1)
    found = sorted((d.source, d.shard, d.index, d.start, d.stop) for d in drain(plan))
    assert found == [
        ("image", 0, 0, 0, 30),
        ("image", 1, 0, 0, 100),
        ("text", 0, 0, 0, 100),
        ("text", 0, 0, 100, 200),
        ("text", 0, 0, 200, 250),
        ("text", 0, 1, 0, 40),
    ]
    stats = plan.stats()["sources"]
    assert (stats["text"]["left_out"], stats["image"]["left_out"]) == (0, 1)
    assert (stats["text"]["tokens"], stats["text"]["epochs"], stats["text"]["documents"]) == (290, 1.0, 4)


def test_packs_are_ordered_numbered_and_within_the_context():
    plan = planner([source("a", [list(range(1, 90))])], packs_per_lane=2)
    for step in range(5):
        packs = plan.next_step()
        assert [(pack.step, pack.lane, pack.slot) for pack in packs] == [
            (step, lane, slot) for lane in range(4) for slot in range(2)
        ]
        assert all(0 < sum(document.num_tokens for document in pack.documents) <= 100 for pack in packs)


def test_neighbours_of_a_shard_are_not_neighbours_in_the_order():
    order = SourceOrder(source("a", [[1] * 4096]), context=8, lanes=2, seed=0, block_size=64, window=1024)
    cursor = LaneCursor(order, 0)
    indexes = np.array([cursor.next_document()[1] for _ in range(2048)])
    assert len(set(indexes.tolist())) == 2048
    assert np.mean(np.abs(np.diff(indexes)) == 1) < 0.01
    blocks = [len(set((indexes[at : at + 64] // 64).tolist())) for at in range(0, 2048, 64)]
    assert min(blocks) >= 8  # a run of 64 samples comes from at least half of the 16 blocks of the window


@pytest.mark.parametrize("num_samples", [1, 3, 7, 8, 9, 100])
def test_every_lane_gets_its_turn_in_a_source_with_fewer_samples_than_lanes(num_samples):
    """8 lanes, 8 epochs: each lane draws num_samples documents, each sample is drawn 8 times."""
    lengths = [[5] * num_samples]
    order = SourceOrder(source("a", lengths, max_epochs=8), context=8, lanes=8, seed=0, block_size=64, window=1024)
    counts = np.zeros(num_samples, dtype=int)
    for lane in range(8):
        cursor, drawn = LaneCursor(order, lane), 0
        while (document := cursor.next_document()) is not None:
            counts[document[1]] += 1
            drawn += 1
        assert abs(drawn - num_samples) <= 8 * 3  # blocks of at most 3 samples
    assert counts.tolist() == [8] * num_samples


def test_max_epochs_may_end_inside_an_epoch():
    documents = drain(planner([source("a", [[10] * 1000], max_epochs=2.5)], lanes=2))
    counts = np.bincount([document.index for document in documents], minlength=1000)
    assert set(counts.tolist()) == {2, 3}
    assert counts.sum() == pytest.approx(2500, abs=64)


def test_exhausted_source_leaves_and_the_end_is_clear():
    plan = planner([source("a", [[10] * 50], max_epochs=1), source("b", [[10] * 200], max_epochs=2)])
    documents = drain(plan)
    assert sum(document.source == "a" for document in documents) == 50
    assert sum(document.source == "b" for document in documents) == 400
    assert exhausted(plan.state_dict()) == ["a", "b"]
    with pytest.raises(OutOfData, match="all sources have reached max_epochs after"):
        plan.next_step()


def test_weight_schedule_moves_the_shares():
    sources = [source("a", [[10] * 500], weight=[(0, 1.0), (20_000, 0.0)]), source("b", [[10] * 500])]
    plan = planner(sources)
    while plan.stats()["tokens"] < 40_000:
        plan.next_step()
    stats = plan.stats()["sources"]
    # share of a at t tokens is w/(w+1), w = 1 − t/20,000: its integral is 20,000·(1 − ln 2) = 6,137
    assert stats["a"]["tokens_drawn"] == pytest.approx(6_137, abs=200)


def test_plan_once_is_one_ordered_pass():
    packs = plan_once(source("a", [[60, 250], [30, 10]], splittable=True), 100)
    assert packs == [
        [DocumentPlan("a", 0, 0, 0, 60), DocumentPlan("a", 1, 0, 0, 30), DocumentPlan("a", 1, 1, 0, 10)],
        [DocumentPlan("a", 0, 1, 0, 100)],
        [DocumentPlan("a", 0, 1, 100, 200)],
        [DocumentPlan("a", 0, 1, 200, 250)],
    ]
    assert plan_once(source("a", [[60, 101], [40]]), 100) == [
        [DocumentPlan("a", 0, 0, 0, 60), DocumentPlan("a", 1, 0, 0, 40)]
    ]
    with pytest.raises(ValueError, match=r"held-out source 'a' has no sample that fits stage.context \(50 tokens\)"):
        plan_once(source("a", [[60, 101]]), 50)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: source("a", [[5], [3, 0]]), "source 'a': sample 1 of shard 1 has 0 tokens"),
        (lambda: source("a", [[5]], max_epochs=0), "max_epochs .0. must be > 0"),
        (lambda: Source("a", 1.0, [np.ones(3)], [np.ones(2)]), "must have the same shards and samples"),
        (lambda: planner([source("a", [[101, 200]])]), r"no sample that fits a context of 100 tokens \(2 are longer\)"),
        (lambda: planner([source("a", [[]])]), "source 'a' has no sample"),
        (lambda: planner([source("a", [[1]]), source("a", [[1]])]), "different names"),
        (lambda: planner([source("a", [[1]])], lanes=0), r"lanes \(0\) must be at least 1"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def run(plan, steps):
    return [plan.next_step() for _ in range(steps)]


LENGTHS = {"a": [[7, 20, 31, 8] * 20, [50, 12] * 30], "b": [[90, 33, 5] * 25]}


def two_sources(**changes):
    return [source("a", LENGTHS["a"], **changes), source("b", LENGTHS["b"])]


def test_state_is_json_and_strict_resume_is_exact():
    plan = planner(two_sources())
    run(plan, 7)
    state = plan.state_dict()
    assert json.loads(json.dumps(state)) == state
    expected = run(plan, 20)
    resumed = planner(two_sources())
    assert resumed.load_state_dict(json.loads(json.dumps(state))) == []
    assert run(resumed, 20) == expected
    assert resumed.state_dict() == plan.state_dict()


def test_a_source_is_exhausted_when_no_lane_draws_from_it():
    state = planner([source("a", [[10] * 50]), source("b", [[10] * 50])], lanes=2).state_dict()
    first, second = state["lanes"]
    first["active"] = [False, False]
    assert exhausted(state) == []
    second["active"] = [True, False]
    assert exhausted(state) == ["b"]


def test_resume_after_a_source_is_exhausted_is_exact():
    def three():
        return [source("a", [[10, 4, 31] * 20], max_epochs=1), *two_sources()[1:], source("c", [[8, 40] * 50])]

    plan = planner(three())
    assert exhausted(plan.state_dict()) == []
    run(plan, 60)
    assert exhausted(plan.state_dict()) == ["a"]
    resumed = planner(three())
    resumed.load_state_dict(plan.state_dict())
    assert run(resumed, 20) == run(plan, 20)


@pytest.mark.parametrize(("name", "value"), [("lanes", 2), ("seed", 1), ("context", 128), ("num_bins", 4)])
def test_shape_is_fixed_for_a_run(name, value):
    state = planner(two_sources()).state_dict()
    with pytest.raises(ValueError, match=f"data.{name} is {value} but the run was started with"):
        planner(two_sources(), **{name: value}).load_state_dict(state)


def test_changed_weight_needs_reweight_and_is_recorded():
    plan = planner(two_sources())
    run(plan, 3)
    state = plan.state_dict()
    changed = planner(two_sources(weight=3.0))
    with pytest.raises(ValueError, match=r"source 'a' has another weight .* set data\.resume_policy=reweight"):
        changed.load_state_dict(state)
    (record,) = changed.load_state_dict(state, policy="reweight")
    assert (record["event"], record["source"], record["from"], record["to"]) == ("reweight", "a", 1.0, 3.0)
    assert (record["step"], record["tokens"]) == (3, sum(sum(lane["drawn"]) for lane in state["lanes"]))
    before = changed.stats()["sources"]
    run(changed, 100)
    after = changed.stats()["sources"]
    drawn = {name: after[name]["tokens_drawn"] - before[name]["tokens_drawn"] for name in "ab"}
    assert drawn["a"] / sum(drawn.values()) == pytest.approx(0.75, abs=0.01)


def test_raised_max_epochs_reopens_an_exhausted_source():
    plan = planner([source("a", [[10] * 50], max_epochs=1), source("b", LENGTHS["b"])])
    run(plan, 40)
    assert exhausted(plan.state_dict()) == ["a"]
    raised = planner([source("a", [[10] * 50], max_epochs=3), source("b", LENGTHS["b"])])
    raised.load_state_dict(plan.state_dict(), policy="reweight")
    assert exhausted(raised.state_dict()) == []
    run(raised, 100)
    assert raised.stats()["sources"]["a"]["epochs"] == 3.0
    lowered = planner([source("a", [[10] * 50], max_epochs=0.1), source("b", LENGTHS["b"])])
    lowered.load_state_dict(plan.state_dict(), policy="reweight")
    run(lowered, 10)
    assert lowered.stats()["sources"]["a"]["epochs"] == 1.0


def test_added_and_removed_sources():
    plan = planner(two_sources())
    run(plan, 5)
    state = plan.state_dict()
    added = planner([source("c", [[9] * 40]), *two_sources()])
    with pytest.raises(ValueError, match=r"source 'c' is new .*=reweight does not allow.*resume_policy=add"):
        added.load_state_dict(state, policy="reweight")
    assert [(r["event"], r["source"]) for r in added.load_state_dict(state, policy="add")] == [("add", "c")]
    run(added, 50)
    stats = added.stats()["sources"]
    assert stats["c"]["tokens_drawn"] > 3_000 and stats["a"]["documents"] > 0

    removed = planner([source("b", LENGTHS["b"])])
    with pytest.raises(ValueError, match=r"source 'a' is gone .*=add does not allow.*resume_policy=add_remove"):
        removed.load_state_dict(state, policy="add")
    assert [(r["event"], r["source"]) for r in removed.load_state_dict(state, policy="add_remove")] == [("remove", "a")]
    documents = [document for step in run(removed, 10) for pack in step for document in pack.documents]
    assert {document.source for document in documents} == {"b"}


def test_sources_may_come_in_another_order():
    """State is keyed by name: b's cursors and open documents stay b's."""
    plan = planner(two_sources())
    run(plan, 6)
    swapped = planner(two_sources()[::-1])
    assert swapped.load_state_dict(plan.state_dict()) == []
    before, after = plan.stats()["sources"], swapped.stats()["sources"]
    assert before == {name: after[name] for name in before}
    seen = {(d.source, d.shard, d.index) for pack in swapped.next_step() for d in pack.documents}
    sizes = {"a": [80, 60], "b": [75]}
    assert seen and all(index < sizes[name][shard] for name, shard, index in seen)


def test_changed_samples_and_unknown_policy_are_refused():
    state = planner(two_sources()).state_dict()
    one_length = [[8, *LENGTHS["a"][0][1:]], LENGTHS["a"][1]]
    moved = [LENGTHS["a"][0] + LENGTHS["a"][1][:1], LENGTHS["a"][1][1:]]
    for changed in (source("a", one_length), source("a", moved), source("a", LENGTHS["a"], splittable=True)):
        with pytest.raises(ValueError, match="source 'a' has other samples than when the state was saved"):
            planner([changed, source("b", LENGTHS["b"])]).load_state_dict(state, policy="add_remove")
    with pytest.raises(ValueError, match="resume_policy 'free' is unknown; choose one of strict, reweight"):
        planner(two_sources()).load_state_dict(state, policy="free")
    with pytest.raises(ValueError, match="state of version 0"):
        planner(two_sources()).load_state_dict(state | {"version": 0})
