"""The token-deficit mixture: draws by hand, exact shares, schedules, exhausted sources."""

import numpy as np
import pytest

from omni_train.data.mixture import PackedShares, TokenMixture, WeightSchedule, weight_at


def mixture(weights):
    made = TokenMixture(len(weights), [0.0] * len(weights))
    made.set_weights(weights)
    return made


def test_draws_by_hand():
    """Weights 3 : 1, documents of 10 tokens: credits after each draw are 0.75·t − a and 0.25·t − b."""
    mix, drawn = mixture([3.0, 1.0]), []
    for _ in range(8):
        number = mix.choose()
        drawn.append(number)
        mix.charge(number, 10)
    assert drawn == [0, 1, 0, 0, 0, 1, 0, 0]
    assert mix.drawn == [60, 20] and mix.credit == [0.0, 0.0]


def test_shares_count_tokens_not_samples():
    """Documents of 100 and of 1 token at equal weights: as many tokens of each, within one document."""
    mix = mixture([1.0, 1.0])
    for _ in range(5000):
        number = mix.choose()
        mix.charge(number, (100, 1)[number])
        assert abs(mix.drawn[0] - mix.drawn[1]) <= 100
    assert mix.drawn[0] > 2000


def test_each_lane_and_all_lanes_together_are_within_a_document():
    rng = np.random.default_rng(0)
    weights, overall = np.array([0.5, 0.3, 0.2]), [0.0, 0.0, 0.0]
    lanes = [TokenMixture(3, overall) for _ in range(8)]
    for lane in lanes:
        lane.set_weights(weights)
    for _ in range(2000):
        for lane in lanes:
            number = lane.choose()
            lane.charge(number, int(rng.integers(1, (50, 200, 1000)[number])))
    drawn = np.array([lane.drawn for lane in lanes])
    deficit = weights * drawn.sum(axis=1, keepdims=True) - drawn
    assert np.abs(deficit).max() < 2_000  # two of the longest documents
    assert np.abs(deficit.sum(axis=0)).max() < 2_000  # not eight lanes of them
    assert np.allclose(deficit.sum(axis=0), overall) and np.allclose(deficit[3], lanes[3].credit)


def test_retired_source_hands_its_share_to_the_others():
    mix = mixture([2.0, 1.0, 1.0])
    mix.retire(0)
    for _ in range(100):
        number = mix.choose()
        assert number != 0
        mix.charge(number, 7)
    assert mix.drawn == [0, 350, 350]
    mix.retire(1)
    assert mix.choose() == 2
    mix.retire(2)
    assert mix.choose() == -1


def test_schedule_is_linear_between_points_and_constant_outside():
    points = [(100, 1.0), (200, 3.0), (400, 0.0)]
    values = [weight_at(points, tokens) for tokens in (0, 100, 150, 200, 300, 400, 999)]
    assert values == [1.0, 1.0, 2.0, 3.0, 1.5, 0.0, 0.0]
    schedule = WeightSchedule({"a": points, "b": 1.0})
    assert schedule.weights_at(150) == pytest.approx([2 / 3, 1 / 3])
    assert schedule.weights_at(500) == [0.0, 1.0]


def test_a_change_of_weights_does_not_repair_the_past():
    mix = mixture([1.0, 0.0])
    for _ in range(10):
        assert mix.choose() == 0
        mix.charge(0, 10)
    mix.set_weights([0.5, 0.5])
    for _ in range(100):
        mix.charge(mix.choose(), 10)
    assert mix.drawn == [600, 500]  # a target of weight × all tokens would give 550, 550


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), [], [(0, 0.0)], [(5, 1.0), (5, 2.0)]])
def test_bad_weights_are_refused(weight):
    with pytest.raises(ValueError, match="source 'a'"):
        WeightSchedule({"a": weight})


def test_all_weights_zero_at_a_point_is_refused():
    with pytest.raises(ValueError, match="all 2 source weights are 0 at 50 tokens"):
        WeightSchedule({"a": [(0, 1.0), (10, 0.0)], "b": [(0, 1.0), (10, 0.0)]}).weights_at(50)


def test_imbalance_by_hand():
    shares = PackedShares(2)
    shares.set_shares([3, 1])
    shares.book([8, 0])
    # with [4, 4]: 12 and 4 of 16, exactly 3 : 1; with [8, 0]: 16 and 0, off by 4 each
    assert shares.imbalance([4, 4]) == 0.0
    assert shares.imbalance([8, 0]) == 32.0
