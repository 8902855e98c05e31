"""Packing: hand-worked placements, and fill on realistic lengths."""

import json

import numpy as np
import pytest

from omni_train.data.packing import BestFitPacker, first_fit


def test_best_fit_by_hand():
    packer = BestFitPacker(10, num_bins=2)
    assert packer.add(6, "a") is None  # [6]
    assert packer.add(7, "b") is None  # [6, 7]
    assert packer.add(3, "c") == ["b", "c"]  # 7 + 3 is full and closes; best fit, not first fit
    assert packer.add(5, "d") is None  # [6, 5]
    assert packer.add(2, "e") is None  # [8, 5]: the bin with the least room that it fits
    assert packer.open_bins == [(8, ["a", "e"]), (5, ["d"])]
    assert packer.add(9, "f") == ["f"]  # a third bin is one too many; the fullest closes
    assert packer.add(10, "g") == ["g"]
    assert packer.close_one() == ["a", "e"]
    assert packer.close_one() == ["d"]
    assert packer.close_one() is None


def test_cost_chooses_among_bins_within_the_slack():
    def cost(items):
        return items[0]

    packer = BestFitPacker(10, num_bins=3, slack=2, cost=cost)
    for length, item in ((9, 5), (8, 3), (7, 1)):
        assert packer.add(length, item) is None
    # room 1, 2, 3, 6: within the slack are items 5 and 3; the cheaper is 3, the cheapest of all (1) is not full enough
    assert packer.add(4, 0) == [3]
    assert packer.add(7, 9) == [5]
    # none within the slack: the fullest
    packer = BestFitPacker(10, num_bins=1, slack=1, cost=cost)
    packer.add(6, 2)
    assert packer.add(7, 8) == [8]


@pytest.mark.parametrize("length", [0, -1, 11])
def test_lengths_that_cannot_fit_are_refused(length):
    with pytest.raises(ValueError, match=f"a document of {length} tokens does not fit a pack of 10"):
        BestFitPacker(10).add(length, "a")


def test_state_goes_through_json_and_continues_identically():
    lengths = np.random.default_rng(0).integers(1, 60, 2000).tolist()
    straight = BestFitPacker(100, num_bins=5)
    expected = [straight.add(length, number) for number, length in enumerate(lengths)]
    first = BestFitPacker(100, num_bins=5)
    found = [first.add(length, number) for number, length in enumerate(lengths[:1003])]
    second = BestFitPacker(100, num_bins=5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second.add(length, number) for number, length in enumerate(lengths[1003:], start=1003)]
    assert found == expected
    with pytest.raises(ValueError, match="do not fit packs of 20 tokens"):
        BestFitPacker(20).load_state_dict(first.state_dict())


@pytest.mark.parametrize(("context", "least"), [(512, 0.97), (8_192, 0.995), (32_768, 0.995)])
def test_fill_on_realistic_lengths(context, least):
    rng = np.random.default_rng(0)
    short, long = rng.integers(8, 61, 60_000), rng.integers(100, 401, 60_000)
    lengths = np.where(rng.random(60_000) < 0.5, short, long).tolist()
    packer, tokens, packs = BestFitPacker(context), 0, 0
    for length in lengths:
        pack = packer.add(length, length)
        if pack:
            assert sum(pack) <= context
            tokens, packs = tokens + sum(pack), packs + 1
    assert tokens / (packs * context) >= least
    assert packs > 300 or context > 8_192


def test_first_fit_by_hand():
    assert first_fit([6, 7, 3, 4, 10, 1], 10) == [[0, 2, 5], [1], [3], [4]]
    assert first_fit([], 10) == []
    with pytest.raises(ValueError, match="document 1 of 11 tokens does not fit a pack of 10"):
        first_fit([1, 11], 10)
