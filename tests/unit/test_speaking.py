"""Figures of a Talker from replies by hand: what is seen and unseen, before and after, near and far from a pitch."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from omni_train.engine import parallel
from omni_train.engine.parallel import Ranks
from omni_train.evaluation import speaking
from omni_train.evaluation.speaking import Heard

RANKS = Ranks(0, 1, 0, torch.device("cpu"))
SAID = {"train": ["red dog", "red dog", "red dog"], "heldout": ["blue frog", "blue frog"]}
HEARD = {"train": "red dog", "heldout": "blue dog"}
"""Of the unseen, half the words."""


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replies to samples (split, text), spoken by what the folder is called; the folders that were asked for."""
    folders: list[str] = []

    def speaker(config, talker, code2wav, data, ranks):
        folders.append(str(talker))
        return str(talker)

    def hear(folder, listener, samples, seed=None, has_pitch=True):
        assert has_pitch is (seed is None), "drawn replies are read for their words alone"
        voices = ["high", "low"]
        found = []
        for n, (split, said) in enumerate(samples):
            heard = said if folder == "after" and n == 0 else HEARD[split]
            found.append(Heard(heard, said, voices[n % 2], [220.0, 90.0][n % 2], [200.0, 100.0][n % 2]))
        return found

    monkeypatch.setattr(speaking, "Speaker", speaker)
    monkeypatch.setattr(speaking, "hear_replies", hear)
    monkeypatch.setattr(speaking, "listener_of", lambda data, run_dir, ranks: SimpleNamespace(snap=lambda text: text))
    monkeypatch.setattr(speaking.DataPipeline, "of", lambda config: None)
    monkeypatch.setattr(parallel, "lists_of_ranks", lambda own: [own])
    monkeypatch.setattr(
        speaking,
        "split_tasks",
        lambda data, tasks, split, _, most=None: {t: [(split, s) for s in SAID[split]] for t in tasks},
    )
    return folders


def test_seen_words_are_of_train_and_unseen_ones_of_the_split(by_hand):
    (found,) = speaking.talker_figures(None, "export", {"talker": "talk"}, "heldout", RANKS, None, "code2wav")
    assert found.figures["talker_seen_words"] == 1.0 and found.figures["talker_unseen_words"] == 0.5
    assert found.figures["talker_cer"] == pytest.approx(4 / 18)  # frog → dog: 2 of 9 letters, twice
    assert found.figures["talker_f0_error"] == pytest.approx(0.1)
    assert found.by_speaker["talker_unseen_words"] == {"high": [0.5, None], "low": [0.5, None]}
    assert found.by_speaker["talker_f0_hz"] == {"high": [220.0, 200.0], "low": [90.0, 100.0]}


def test_a_gain_is_the_errors_of_the_start_less_those_of_the_export(by_hand):
    config = SimpleNamespace(init={"talker": "before"}, stage=SimpleNamespace(name="talker_dpo"))
    (found,) = speaking.preference_figures(config, "after", {"dpo": "talk"}, "heldout", RANKS, None, "code2wav")
    assert by_hand == ["before", "after"]
    before, after = found.controls["dpo_cer"], found.figures["dpo_cer"]
    assert after == pytest.approx(before / 2) and after < before  # one of the two replies is now right
    low, high = found.figures["dpo_gain_low"], found.figures["dpo_gain_high"]
    assert 0.0 <= low <= before - after <= high


@pytest.mark.parametrize(("has_pitch", "expected"), [(True, (220.0, 200.0)), (False, (None, None))])
def test_pitches_are_read_only_where_they_are_asked_for(has_pitch, expected, monkeypatch):
    speaker = SimpleNamespace(
        talker=SimpleNamespace(talker=SimpleNamespace(codec_head=torch.nn.Linear(1, 1))),
        codes=lambda samples, generator: [None] * len(samples),
        waves=lambda codes: (torch.full((len(codes), 480), 220.0), [240] * len(codes)),
    )
    read: list[tuple[int, float]] = []
    monkeypatch.setattr(speaking, "codec_mel", lambda waves: waves)
    monkeypatch.setattr(speaking, "clips_of", lambda samples: [SimpleNamespace(text="red", wave=np.full(360, 200.0))])
    monkeypatch.setattr(speaking, "median_pitch", lambda wave: read.append((len(wave), wave[0])) or float(wave[0]))
    listener = SimpleNamespace(hear=lambda mel, lengths: ["rad"])
    sample = SimpleNamespace(content={"speaker": "low"})
    (heard,) = speaking.hear_replies(speaker, listener, [sample], has_pitch=has_pitch)
    assert (heard.text, heard.said, heard.speaker) == ("rad", "red", "low")
    found = tuple(None if hz != hz else hz for hz in (heard.pitch, heard.original_pitch))
    assert found == expected and read == ([(240, 220.0), (360, 200.0)] if has_pitch else [])


@pytest.mark.parametrize(("heat", "expected"), [(1.0, (0.9, 1.0)), (0.5, (0.45, 0.5)), (None, (0.0, 0.0))])
def test_heat_scales_both_of_stocks_temperatures_and_none_takes_the_most_likely(heat, expected, monkeypatch):
    speaker, seen = object.__new__(speaking.Speaker), {}
    llm, talker = SimpleNamespace(llm=None), SimpleNamespace(num_code_groups=4)
    speaker.thinker, speaker.talker, speaker.format = llm, None, SimpleNamespace(talker=talker)
    speaker.device = torch.device("meta")
    speaker.encoder = SimpleNamespace(prompt_and_answer=lambda sample: ("prompt", "answer"), geometry=None)
    monkeypatch.setattr(speaking.Speaker, "tokens", lambda self, text: [1])
    monkeypatch.setattr(speaking, "media_states", lambda thinker, prompts, *_: prompts)
    monkeypatch.setattr(speaking, "read_codes", lambda data, header_only: torch.empty(4, 7))
    monkeypatch.setattr(speaking, "speak", lambda *_, **options: seen.update(options) or [])
    sample = SimpleNamespace(content={"speaker": "anna"}, members={speaking.CODES: b""})
    drawn = () if heat is None else (torch.Generator(), heat)
    (silence,) = speaker.codes([sample], *drawn)
    assert silence.shape == (4, 0) and silence.device == speaker.device  # beside the codes of other replies
    assert (seen["sampling"].temperature, seen["mtp_sampling"].temperature) == pytest.approx(expected)
    assert seen["max_frames"] == 4 * 7
