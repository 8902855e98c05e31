"""The plan as a whole: token shares, fill, every sample once, and one plan for any ranks, workers and resume.

Synthetic lengths of the five S2 sources: mostly short text with a long tail, speech of seconds, pictures of hundreds of
tokens, videos of thousands.
"""

import hashlib
import json
import time
from collections import Counter

import numpy as np
import pytest

from omni_train.data.loader import StepLoader, rank_packs
from omni_train.data.planner import OutOfData, Planner, Source

S2_TARGET = {"text": 0.57, "audio": 0.77, "image": 0.82, "video": 0.05, "video_audio": 0.05}
SHARES = {name: weight / sum(S2_TARGET.values()) for name, weight in S2_TARGET.items()}
LANES = 8


def realistic_sources(seed=0, num_shards=4, shard_samples=1000, max_epochs=None):
    rng = np.random.default_rng(seed)
    draw = {
        "text": lambda n: np.minimum(8 + np.exp(rng.normal(6.2, 1.1, n)).astype(int), 60_000),
        "audio": lambda n: rng.integers(40, 410, n),
        "image": lambda n: rng.integers(150, 900, n),
        "video": lambda n: rng.integers(800, 4000, n),
        "video_audio": lambda n: rng.integers(900, 4500, n),
    }
    sources = []
    for name, weight in S2_TARGET.items():
        lengths = [draw[name](shard_samples) for _ in range(num_shards)]
        flags = [np.full(shard_samples, name == "text") for _ in range(num_shards)]
        sources.append(Source(name, weight, lengths, flags, max_epochs))
    return sources


def short_sources(seed=0, max_epochs=None, counts=(700, 300)):
    """Two sources of 8–60 and 100–400 tokens, for a context of 512."""
    rng = np.random.default_rng(seed)
    return [
        Source(
            name,
            1.0,
            [rng.integers(low, high, count) for _ in range(3)],
            [np.zeros(count, bool) for _ in range(3)],
            max_epochs,
        )
        for name, low, high, count in (("short", 8, 61, counts[0]), ("long", 100, 401, counts[1]))
    ]


def plan_tokens(planner, num_tokens):
    """Tokens of each source in the packs of the first steps that hold ``num_tokens`` tokens."""
    tokens = Counter()
    while tokens.total() < num_tokens:
        for pack in planner.next_step():
            assert sum(document.num_tokens for document in pack.documents) <= planner.context
            for document in pack.documents:
                tokens[document.source] += document.num_tokens
    return tokens


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("context", [8_192, 32_768])
def test_token_shares_are_within_a_fifth_of_a_point_after_2m_tokens(context, seed):
    planner = Planner(realistic_sources(seed), context=context, lanes=LANES, packs_per_lane=1, seed=seed)
    tokens = plan_tokens(planner, 2_000_000)
    stats = planner.stats()
    drawn = {name: source["tokens_drawn"] for name, source in stats["sources"].items()}
    off_drawn = {name: 100 * (drawn[name] / sum(drawn.values()) - share) for name, share in SHARES.items()}
    assert max(map(abs, off_drawn.values())) < 0.2, off_drawn
    assert {name: source["tokens"] for name, source in stats["sources"].items()} == dict(tokens)
    off_packed = {name: 100 * (tokens[name] / tokens.total() - share) for name, share in SHARES.items()}
    assert max(map(abs, off_packed.values())) < 0.2, off_packed


@pytest.mark.parametrize("context", [8_192, 32_768])
def test_fill_at_long_contexts(context):
    planner = Planner(realistic_sources(), context=context, lanes=LANES, packs_per_lane=1, seed=0)
    tokens = plan_tokens(planner, 4_000_000)
    stats = planner.stats()
    assert stats["fill"] >= 0.995
    assert stats["fill"] == tokens.total() / (stats["steps"] * LANES * context)


def test_fill_at_a_short_context():
    planner = Planner(short_sources(), context=512, lanes=LANES, packs_per_lane=2, seed=0)
    plan_tokens(planner, 1_000_000)
    assert planner.stats()["fill"] >= 0.97


def drain(planner):
    documents = []
    try:
        while True:
            documents += [document for pack in planner.next_step() for document in pack.documents]
    except OutOfData:
        return documents


@pytest.mark.parametrize("lanes", [1, 3, 8])
@pytest.mark.parametrize("counts", [(700, 300), (64, 65), (5, 1)])
@pytest.mark.parametrize("max_epochs", [1, 3])
def test_every_sample_of_an_epoch_exactly_once(lanes, counts, max_epochs):
    sources = short_sources(max_epochs=max_epochs, counts=counts)
    planner = Planner(sources, context=512, lanes=lanes, packs_per_lane=1, seed=4)
    found = Counter((d.source, d.shard, d.index) for d in drain(planner))
    expected = {
        (source.name, shard, index)
        for source in sources
        for shard, lengths in enumerate(source.lengths)
        for index in range(len(lengths))
    }
    assert found == dict.fromkeys(expected, max_epochs)


def test_every_token_of_long_texts_exactly_once():
    source = realistic_sources(max_epochs=1)[0]
    ranges: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for d in drain(Planner([source], context=1024, lanes=LANES, packs_per_lane=1, seed=0)):
        ranges.setdefault((d.shard, d.index), []).append((d.start, d.stop))
    for shard, lengths in enumerate(source.lengths):
        for index, length in enumerate(lengths.tolist()):
            stops = [(start, min(start + 1024, length)) for start in range(0, length, 1024)]
            assert sorted(ranges[shard, index]) == stops


def test_epochs_differ_and_the_seed_counts():
    def order(seed, source_name="a"):
        lengths = [np.full(640, 10)]
        source = Source(source_name, 1.0, lengths, [np.zeros(640, bool)], 2)
        documents = drain(Planner([source], context=10, lanes=1, packs_per_lane=1, seed=seed))
        return [document.index for document in documents]

    first, second = order(0)[:640], order(0)[640:]
    assert sorted(first) == sorted(second) == list(range(640)) and first != second
    assert order(0) == order(0) and order(1) != order(0) and order(0, "b") != order(0)


def new_planner():
    """Small epochs (a few steps each), long texts that are cut, and open bins at every step."""
    sources = realistic_sources(num_shards=2, shard_samples=150)
    return Planner(sources, context=2048, lanes=LANES, packs_per_lane=2, seed=7)


def load_pack(plan):
    """The plan itself stands for the loaded pack: what matters is which pack comes when."""
    return plan


def no_pack():
    return None


def global_packs(world, num_steps, num_workers=0, state=None):
    """Packs of ``num_steps`` steps as all ranks together see them, by (step, lane, slot), and the state after them."""
    packs, states = {}, []
    for rank in range(world):
        with StepLoader(new_planner(), load_pack, no_pack, rank, world, num_workers) as loader:
            if state is not None:
                loader.load_state_dict(state)
            for _ in range(num_steps):
                step = [pack for pack in loader.next_step() if pack is not None]
                assert [(pack.lane, pack.slot) for pack in step] == sorted((pack.lane, pack.slot) for pack in step)
                packs |= {(pack.step, pack.lane, pack.slot): pack.documents for pack in step}
            states.append(loader.state_dict())
    assert all(other == states[0] for other in states)
    return dict(sorted(packs.items())), states[0]


def test_one_plan_for_any_number_of_ranks_and_workers():
    expected, state = global_packs(1, 12)
    assert len(expected) == 12 * LANES * 2
    for world in (2, 3, 5, 8):
        assert global_packs(world, 12) == (expected, state)
    assert global_packs(1, 12, num_workers=1) == (expected, state)
    assert global_packs(3, 12, num_workers=4) == (expected, state)


def test_ranks_get_equally_many_packs():
    step = new_planner().next_step()
    for world in (1, 2, 3, 5, 8):
        shares = [rank_packs(step, rank, world) for rank in range(world)]
        assert {len(share) for share in shares} == {-(-LANES // world) * 2}
        real = [plan for share in shares for plan in share if plan is not None]
        assert sorted(real, key=lambda plan: (plan.lane, plan.slot)) == step


def test_resume_at_any_step_on_another_world_size_continues_identically():
    num_steps = 40
    straight = new_planner()
    steps, states = [], [json.dumps(straight.state_dict())]
    for _ in range(num_steps):
        steps.append(straight.next_step())
        states.append(json.dumps(straight.state_dict()))
    middle = json.loads(states[20])
    epochs = {cursor[0] for lane in middle["lanes"] for cursor in lane["cursors"]}
    assert len(epochs) > 1, "the sources must be in different epochs"
    assert any(cursor[3] > 0 for state in states for lane in json.loads(state)["lanes"] for cursor in lane["cursors"])
    assert all(len(lane["bins"]) > 4 for lane in middle["lanes"]), "bins must be open"
    for at in range(num_steps):
        resumed = new_planner()
        resumed.load_state_dict(json.loads(states[at]))
        assert resumed.next_step() == steps[at]
    for world, at in ((1, 1), (2, 13), (3, 20), (5, 27), (8, 33)):
        packs, state = global_packs(world, num_steps - at, state=json.loads(states[at]))
        assert packs == {(p.step, p.lane, p.slot): p.documents for step in steps[at:] for p in step}
        assert json.dumps(state) == states[-1]


def test_the_plan_does_not_change_between_versions():
    """A new digest means that no run can be resumed: raise STATE_VERSION with it, and say why in the commit."""
    lengths = [np.arange(500) * 7919 % 900 + 8, np.arange(300) * 104_729 % 300 + 20]
    sources = [
        Source("text", 0.7, lengths, [np.ones(500, bool), np.ones(300, bool)]),
        Source("image", [(0, 0.2), (100_000, 0.5)], lengths[1:], [np.zeros(300, bool)]),
    ]
    planner = Planner(sources, context=512, lanes=4, packs_per_lane=2, seed=7)
    digest = hashlib.blake2b(digest_size=8)
    for _ in range(30):
        for pack in planner.next_step():
            digest.update(repr([(d.source, d.shard, d.index, d.start, d.stop) for d in pack.documents]).encode())
    assert digest.hexdigest() == "e0fcef311328c98b"


def test_state_is_small():
    planner = Planner(realistic_sources(), context=8_192, lanes=LANES, packs_per_lane=1, seed=0)
    plan_tokens(planner, 2_000_000)
    assert len(json.dumps(planner.state_dict())) / LANES < 8_000


def test_a_document_of_a_large_corpus_is_planned_as_fast_as_one_of_a_small_corpus():
    """About 200,000 documents a second on one core; a ratio, since machines differ and coverage slows them fourfold."""

    def seconds_per_document(num_samples: int) -> float:
        sources = short_sources(counts=(num_samples, num_samples))
        planner = Planner(sources, context=8_192, lanes=LANES, packs_per_lane=4, seed=0)
        start = time.process_time()
        documents = sum(len(pack.documents) for _ in range(5) for pack in planner.next_step())
        return (time.process_time() - start) / documents

    small, large = (min(seconds_per_document(count) for _ in range(3)) for count in (2_000, 200_000))
    assert large < 3 * small, f"{1e6 * large:.1f} and {1e6 * small:.1f} microseconds"
