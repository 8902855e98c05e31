"""The card of a whole model: every component's source, and the figures of the runs that they come from."""

from __future__ import annotations

from omni_train.reporting.card import model_card
from omni_train.reporting.results import add_capabilities


def test_it_names_sources_and_brings_the_figures_of_their_runs(tmp_path):
    add_capabilities(tmp_path / "whole", {"spoken_word_exact": 0.9652}, {"spoken_word_exact": 0.0131})
    add_capabilities(tmp_path / "voice", {"codec_words_wave": 0.8229, "codec_stoi": 0.712}, {})
    sources = {
        "llm": f"{tmp_path}/whole/s3_long_context/export",
        "talker": f"{tmp_path}/whole/talker_cpt/export",
        "code2wav": f"{tmp_path}/voice/code2wav/export",
        "mtp": f"{tmp_path}/elsewhere/mtp/export",
    }
    card = model_card("tiny", sources)
    for component, source in sources.items():
        assert f"| {component} | {source} |" in card
    whole, voice = (
        card.index("from which s3_long_context, talker_cpt was taken"),
        card.index("which code2wav was taken"),
    )
    assert whole < card.index("| spoken_word_exact | 0.965 | 0.013 |") < voice
    assert voice < card.index("| codec_words_wave | 0.823 | – |") < card.index("| codec_stoi | 0.712 | – |")
    assert "Nothing was measured beside mtp" in card and card.count("spoken_word_exact") == 1
