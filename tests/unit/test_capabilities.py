"""Capabilities of an export: scores and controls by hand, ranks of which one has nothing to answer."""

from __future__ import annotations

import pytest
from clips import spoken
from support import Case, Ranks, run_config_in, run_ranks, tokenizer_folder

from omni_train.data.encode import Encoder
from omni_train.data.pipeline import media_geometry
from omni_train.data.tokenizer import load_tokenizer
from omni_train.engine.deepspeed import build_engine
from omni_train.evaluation import capabilities
from omni_train.evaluation.capabilities import Answers, answer_all, compared, gather, score
from omni_train.models.build import thinker_config
from omni_train.models.weights import yarn_factor_of
from omni_train.stage import build_modules


def test_score_by_hand():
    """Two of four are exact; a substitution (car for cat) and a deletion (dg for dog) over 3 + 3 + 4 + 4 letters."""
    pairs = [("car", "cat"), ("dg", "dog"), ("bird", "bird"), ("fish", "fish")]
    assert score(pairs, with_cer=False) == {"exact": 0.5}
    assert score(pairs, with_cer=True) == {"exact": 0.5, "cer": pytest.approx(2 / 14)}
    assert score([("", "cat")], with_cer=True) == {"exact": 0.0, "cer": pytest.approx(1.0)}


def test_answers_apart_by_language_keep_their_controls():
    pairs = [("un", "un"), ("x", "два"), ("deux", "deux")]
    answers = Answers("spoken_caption", pairs, [("un", "trois"), ("два", "два")], "", ["fr", "ru", "fr"], ["fr", "ru"])
    by_lang = answers.by_lang()
    assert list(by_lang) == ["fr", "ru"]
    assert by_lang["fr"].pairs == [pairs[0], pairs[2]] and by_lang["fr"].swapped == [("un", "trois")]
    assert by_lang["ru"].pairs == [pairs[1]] and by_lang["ru"].swapped == [("два", "два")]
    assert by_lang["fr"].named("cer") == "spoken_caption_cer"


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_yarn_is_read_from_the_export(tmp_path, factor):
    config = run_config_in(Case(), tokenizer_folder())
    thinker_config(config.model, load_tokenizer(tokenizer_folder()), factor).save_pretrained(tmp_path)
    assert yarn_factor_of(tmp_path) == factor


def answers(ranks: Ranks, folder: str, num_samples: int, world: int) -> list[tuple[str, str]]:
    """All ranks' (answer, reference), the experts shared."""
    config = run_config_in(Case(world=world, expert_parallel=world), folder)
    tokenizer = load_tokenizer(folder)
    thinker = build_engine(
        build_modules(config, tokenizer)["thinker"], config.engine, config.stage, None, micro_batches=1
    ).eval()
    encoder = Encoder(tokenizer, media_geometry(config.model.vision))
    capabilities.BATCH_TOKENS = 60  # two prompts a batch
    return gather(answer_all(thinker, encoder, [spoken(n, f"word {n}") for n in range(num_samples)], ranks, 24))


@pytest.mark.parametrize("num_samples", [5, 1])
def test_ranks_share_the_samples_also_when_one_has_none(num_samples):
    (alone,) = run_ranks(1, answers, tokenizer_folder(), num_samples, 1)
    both = run_ranks(2, answers, tokenizer_folder(), num_samples, 2)
    assert both[0] == both[1] == alone
    assert [reference for _, reference in alone] == [f"word {n}" for n in range(num_samples)]


def test_a_pattern_asks_for_the_form_alone():
    pattern = r"\[[^\]\n]+\]"
    assert compared("[cat]", "[dog]", pattern) == ("[dog]", "[dog]")
    answer, reference = compared("cat", "[dog]", pattern)
    assert answer == "cat" and reference != answer
    assert compared("[cat] yes", "[dog]", pattern)[0] != compared("[cat] yes", "[dog]", pattern)[1]
    assert compared("cat", "dog", None) == ("cat", "dog")
