"""Speech made frame by frame: our cached Talker and MTP against stock's greedy generation; text changed on the way."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from stock import MICRO, encoder_of, sample
from stock_omni import KINDS, NUM_FRAMES, NUM_TEXT, Models, build_models, ours, spoken, stock_answer
from support import tokenizer_folder

from omni_train.data.contracts import Document
from omni_train.data.talker_sequence import SpeechFormat, SpeechTokens
from omni_train.data.tokenizer import load_tokenizer
from omni_train.engine.export import write_processor
from omni_train.rollout.speak import Sampling, Utterance, answer_in_speech, draw, media_states, speak

GREEDY = Sampling(temperature=0, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def models() -> Models:
    """Models whose end of speech is never the most likely."""
    found = build_models(3, tokenizer_folder())
    with torch.no_grad():
        for talker in (found.talker.talker, found.stock.talker):
            talker.codec_head.weight[MICRO.talker.tokens.eos] = 0.0
    return found


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    write_processor(MICRO, folder)
    load_tokenizer(tokenizer_folder()).save_pretrained(folder)
    return folder


def prompt_of(kind: str, media) -> Document:
    return encoder_of(str(media)).prompt_and_answer(sample(kind, media))[0]


def frames_of(models: Models, kind: str, media, **options) -> np.ndarray:
    """Codes [G, T] of an answer."""
    format = SpeechFormat(MICRO.talker, SpeechTokens.of(load_tokenizer(tokenizer_folder())))
    options = {
        "sampling": GREEDY,
        "mtp_sampling": GREEDY,
        "max_frames": NUM_FRAMES,
        "max_new_tokens": NUM_TEXT,
    } | options
    frames = answer_in_speech(
        models.thinker, models.talker, prompt_of(kind, media), "aiden", format, encoder_of().geometry, **options
    )
    return torch.stack(list(frames), dim=1).numpy()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_frames_equal_stock(kind, penalty, models, media):
    """Of the text that stock spoke (its Thinker was told to write letters alone)."""
    options = {"talker_do_sample": False, "talker_repetition_penalty": penalty}
    text, codes, *_ = stock_answer(models, kind, media, **options)
    sampling = dataclasses.replace(GREEDY, repetition_penalty=penalty)
    found = frames_of(models, kind, media, change=lambda _: iter(text.tolist()), sampling=sampling)
    assert found.tolist() == codes.tolist()
    assert len(set(codes[0].tolist())) > 2


def test_frames_are_the_most_likely_of_the_teacher_forced_pass(models, media):
    text = [7, 9, 11, 13]
    found = frames_of(models, "image", media, change=lambda _: iter(text), max_frames=14)
    output = ours(models, [spoken("image", media, np.array(text), found)])
    assert found[0].max() < MICRO.talker.codebook_size  # control tokens may be likelier, and are never spoken
    assert output["residual_predictions"].T.tolist() == found[1:].tolist()


def test_text_is_pulled_as_frames_need_it(models, media):
    """One token a frame: speech starts long before the text is complete."""
    pulled: list[int] = []

    def watch(text):
        for token in text:
            pulled.append(token)
            yield token

    format = SpeechFormat(MICRO.talker, SpeechTokens.of(load_tokenizer(tokenizer_folder())))
    num_head = len(format.tokens.head) - 3
    options = {"sampling": GREEDY, "mtp_sampling": GREEDY, "change": watch, "max_new_tokens": 30}
    prompt, geometry = prompt_of("audio", media), encoder_of().geometry
    frames = answer_in_speech(models.thinker, models.talker, prompt, "aiden", format, geometry, **options)
    for number in range(1, 12):
        next(frames)
        assert len(pulled) == max(0, number - num_head)


def test_another_text_is_spoken_otherwise(models, media):
    first, second = (frames_of(models, "text", media, change=lambda _, n=n: iter([n] * 5)) for n in (5, 6))
    assert first.tolist() != second.tolist()


def test_speech_ends_at_the_end_code_and_says_nothing_for_no_text(models, media):
    codes = frames_of(models, "text", media, change=lambda _: iter([5] * 5))
    last = next(n for n, code in enumerate(codes[0]) if code not in codes[0, :n] and n > 0)
    weight, eos = models.talker.talker.codec_head.weight, MICRO.talker.tokens.eos
    with torch.no_grad():
        weight[eos] = 1.01 * weight[codes[0, last]]
    found = frames_of(models, "text", media, change=lambda _: iter([5] * 5))
    with torch.no_grad():
        weight[eos] = 0.0
    assert found.tolist() == codes[:, :last].tolist()


def test_an_unknown_speaker_is_named(models, media):
    format = SpeechFormat(MICRO.talker, SpeechTokens.of(load_tokenizer(tokenizer_folder())))
    frames = answer_in_speech(
        models.thinker, models.talker, prompt_of("text", media), "aidan", format, encoder_of().geometry
    )
    with pytest.raises(ValueError, match="no speaker 'aidan'.*did you mean 'aiden'"):
        next(frames)


@pytest.mark.parametrize("kinds", [("text", "image_audio", "video_audio"), ("audio",) * 3])
def test_side_by_side_equals_alone(kinds, models, media):
    """Prompts of different lengths; texts and ends of different lengths: each says what it says alone."""
    format = SpeechFormat(MICRO.talker, SpeechTokens.of(load_tokenizer(tokenizer_folder())))
    texts = [[5, 6, 7], [], [9] * 7]

    def codes(chosen: list[int]) -> list[list]:
        prompts = [prompt_of(kinds[n], media) for n in chosen]
        states = media_states(models.thinker, prompts, format, encoder_of().geometry)
        utterances = [
            Utterance(prompt, own, iter(texts[n]), "aiden")
            for prompt, own, n in zip(prompts, states, chosen, strict=True)
        ]
        options = {"sampling": GREEDY, "mtp_sampling": GREEDY, "max_frames": 14}
        found: list[list] = [[] for _ in chosen]
        for frames, is_open in speak(
            models.thinker.llm, models.talker, utterances, format, encoder_of().geometry, **options
        ):
            for row, frame, still in zip(found, frames.tolist(), is_open.tolist(), strict=True):
                row += [frame] if still else []
        return found

    weight, eos = models.talker.talker.codec_head.weight, MICRO.talker.tokens.eos
    first = codes([0])[0]
    with torch.no_grad():
        weight[eos] = 1.01 * weight[first[-1][0]]  # the first one ends sooner
        together, alone = codes([0, 1, 2]), [codes([n])[0] for n in range(3)]
        weight[eos] = 0.0
    assert together == alone and len(together[0]) < len(first)


def test_a_new_speaker_s_row_leaves_the_others_as_they_were(models, media):
    """Bit for bit, in what is said and in every logit of it: nobody but its speaker reads a row."""
    before = frames_of(models, "text", media, change=lambda _: iter([5] * 5))
    output = ours(models, [spoken("text", media, np.array([5, 6]), before)])
    row = models.talker.talker.model.codec_embedding.weight[MICRO.talker.speakers["ethan"]]
    with torch.no_grad():
        kept = row.clone()
        row.normal_()
    after = frames_of(models, "text", media, change=lambda _: iter([5] * 5))
    changed = ours(models, [spoken("text", media, np.array([5, 6]), before)])
    new = answer_frames(models, "ethan", media)
    with torch.no_grad():
        row.copy_(kept)
    assert after.tolist() == before.tolist() and changed["losses"].equal(output["losses"])
    assert new != answer_frames(models, "ethan", media), "its own speaker does change"


def answer_frames(models: Models, speaker: str, media) -> list:
    format = SpeechFormat(MICRO.talker, SpeechTokens.of(load_tokenizer(tokenizer_folder())))
    options = {"sampling": GREEDY, "mtp_sampling": GREEDY, "max_frames": 11, "change": lambda _: iter([5] * 5)}
    prompt, geometry = prompt_of("text", media), encoder_of().geometry
    return torch.stack(
        [*answer_in_speech(models.thinker, models.talker, prompt, speaker, format, geometry, **options)]
    ).tolist()


def test_drawing_follows_temperature_top_k_and_top_p():
    logits, generator = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.Generator().manual_seed(0)

    def shares(**options):
        draws = draw(logits.expand(2000, 4), Sampling(repetition_penalty=1.0, **options), generator)
        return draws.bincount(minlength=4) / 2000

    assert (shares(temperature=0.5) - (logits[0] / 0.5).softmax(0)).abs().max() < 0.04
    expected = torch.cat([logits[0, :2].softmax(0), torch.zeros(2)])
    assert (shares(temperature=1.0, top_k=2) - expected).abs().max() < 0.04
    assert (shares(temperature=1.0, top_p=0.7) - expected).abs().max() < 0.04  # 0.64 and the one that passes 0.7
    assert draw(logits, Sampling(temperature=0)).tolist() == [0]
    penalised = Sampling(temperature=0, repetition_penalty=3.0)
    two = torch.cat([logits, logits - 3])
    assert draw(two, penalised, before_BN=torch.tensor([[0], [0]])).tolist() == [1, 1]  # 2 / 3 < 1; −1 × 3 < −2
    assert draw(two, penalised, before_BN=torch.tensor([[0, 0], [1, 3]])).tolist() == [1, 0]  # each row its own
