"""Speech targets: the Talker's sequence by hand, its length from the index, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
from support import micro_talker, tokenizer_folder

from omni_train.data.chatml import describe
from omni_train.data.contracts import IGNORE_INDEX, NO_CODE, Document, Sample, SampleFacts
from omni_train.data.encode import Encoder, collate, dummy_pack
from omni_train.data.media_tokens import MediaGeometry
from omni_train.data.talker_sequence import (
    SpeechFormat,
    SpeechTokens,
    read_codes,
    reply_tokens,
    speaker_row,
    talker_sequence,
    user_index,
)
from omni_train.data.tokenizer import load_tokenizer, token_ids

TALKER = micro_talker(accept_hidden_layer=3)
START, END, BREAK, ASSISTANT, USER, SYSTEM, AUDIO = 268, 269, 198, 50, 60, 70, 299


def tokens_by_hand() -> SpeechTokens:
    """Roles as single tokens, the special tokens of the tests' tokenizer."""
    ids = token_ids(load_tokenizer(tokenizer_folder()))
    assert (ids.im_start, ids.im_end, ids.audio_pad) == (START, END, AUDIO)
    return SpeechTokens(ids, (START, ASSISTANT, BREAK), USER)


def turn(role: int, *text: int) -> list[int]:
    return [START, role, BREAK, *text, END, BREAK]


def document_of(*turns: list[int]) -> Document:
    ids = np.array(sum(turns, []))
    return Document("hand", "text", ids, np.full(len(ids), IGNORE_INDEX), np.tile(np.arange(len(ids)), (3, 1)))


CONVERSATION = (turn(SYSTEM, 1), turn(USER, 2, 3), turn(ASSISTANT, 4), turn(USER, 5), turn(ASSISTANT, 6, 7))
CODES = np.arange(4 * 4).reshape(4, 4)


def test_a_sequence_by_hand():
    tokens = tokens_by_hand()
    ids, codec = tokens.ids, TALKER.tokens
    format = SpeechFormat(TALKER, tokens)
    found = talker_sequence(document_of(*CONVERSATION), [], CODES, "Aiden", format, MediaGeometry())
    user = [START, USER, BREAK, 2, 3, END, BREAK, START, USER, BREAK, 5, END, BREAK]
    head = [START, ASSISTANT, BREAK]
    frames = [7, ids.tts_eos, ids.tts_pad, ids.tts_pad]
    assert found.text_ids.tolist() == [*user, *head, *[ids.tts_pad] * 4, ids.tts_bos, 6, *frames]
    controls = [codec.nothink, codec.think_bos, codec.think_eos, 201, codec.pad, codec.bos]
    assert found.codec_ids.tolist() == [NO_CODE] * (len(user) + 3) + controls
    assert found.shift_labels.tolist() == [IGNORE_INDEX] * (len(user) + 8) + [0, 1, 2, 3, codec.eos]
    assert found.position_ids.tolist() == [list(range(len(user) + 9 + 4))] * 3
    assert len(found.media_index) == 0 and found.num_tokens == 26
    prompted = talker_sequence(document_of(*CONVERSATION), [9, 8], CODES, "aiden", format, MediaGeometry())
    assert prompted.text_ids.tolist() == [9, 8, *found.text_ids]


def test_a_pack_by_hand():
    """Two documents, the second with a medium: indices count on, the first code stands among the codec ids."""
    format = SpeechFormat(TALKER, tokens_by_hand())
    first = document_of(*CONVERSATION)
    second = document_of(turn(USER, AUDIO, AUDIO, 3), turn(ASSISTANT, 6))
    second.mels = [np.zeros((128, 16), np.float32)]
    for document, codes in ((first, CODES), (second, CODES[:, :2] + 9)):
        document.speeches = [talker_sequence(document, [], codes, "ethan", format, MediaGeometry())]
    pack = collate([first, second])
    speech = pack.speech
    assert pack.num_tokens == speech.num_tokens == 26 + 8 + 9 + 2
    assert speech.cu_seqlens.tolist() == [0, 26, 45] and speech.code_lengths.tolist() == [4, 2]
    assert speech.frame_index.tolist() == [22, 23, 24, 25, 43, 44]
    assert speech.codec_ids[speech.frame_index].tolist() == [0, 1, 2, 3, 9, 10]
    assert speech.media_index.tolist() == [len(first.input_ids) + 3, len(first.input_ids) + 4]
    assert pack.input_ids[speech.media_index].tolist() == [AUDIO, AUDIO]
    assert speech.codes[:, 4].tolist() == [9, 13, 17, 21] and speech.document.tolist() == [0, 1]
    assert speech.position_ids[0].tolist() == [*range(26), *range(19)]
    moved = pack.to("cpu").speech
    assert moved.codes.equal(speech.codes)


def test_a_dummy_has_a_frame_for_each_target_and_no_label():
    for has_rejected in (False, True):
        format = SpeechFormat(TALKER, tokens_by_hand(), has_rejected)
        pack = dummy_pack(MediaGeometry(), format.tokens.ids, format)
        assert pack.sample_ids == [] and len(pack.speech.frame_index) == 1 + has_rejected


@pytest.mark.parametrize(
    "turns, message",
    [
        ((turn(USER, 2),), "the last message is not the assistant's"),
        ((turn(USER, 2), turn(ASSISTANT)), "has no text to speak"),
        ((turn(USER, 2), [START, ASSISTANT, 271, 6, END, BREAK]), "begins with a line break"),
    ],
)
def test_a_reply_that_cannot_be_spoken(turns, message):
    with pytest.raises(ValueError, match=message):
        reply_tokens(document_of(*turns).input_ids, tokens_by_hand())


def test_a_medium_outside_the_user_s_turns_is_refused():
    with pytest.raises(ValueError, match="outside the user's turns"):
        user_index(np.array([*turn(SYSTEM, AUDIO), *turn(USER, 2), *turn(ASSISTANT, 6)]), tokens_by_hand())


@pytest.mark.parametrize(
    "codes, speaker, message",
    [
        (CODES[:3], "aiden", "it has 3 codes a frame, the model 4"),
        (CODES + 20, "aiden", "it has the code 32; codes lie in 0 … 31"),
        (CODES - 1, "aiden", "it has the code -1"),
        (CODES[:, :1], "aiden", "its 1 frames are fewer than the 2 tokens"),
        (CODES, "aidan", "no speaker 'aidan'.*did you mean 'aiden'"),
        (CODES, None, "no speaker None.*valid: aiden, ethan"),
    ],
)
def test_wrong_codes_and_speakers(codes, speaker, message):
    format = SpeechFormat(TALKER, tokens_by_hand())
    with pytest.raises(ValueError, match=message):
        talker_sequence(document_of(*CONVERSATION), [], codes, speaker, format, MediaGeometry())


def test_speakers_are_looked_up_as_stock_does():
    assert speaker_row("Aiden", TALKER) == speaker_row("aiden", TALKER) == 201


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_codes_are_read_without_unpickling():
    codes = np.arange(8, dtype=np.int16).reshape(4, 2)
    assert read_codes(npy(codes)).tolist() == codes.tolist() and read_codes(npy(codes)).dtype == np.int64
    assert read_codes(npy(codes), header_only=True).shape == (4, 2)
    for data, message in (
        (npy(codes.astype(np.int64)), "it is int64"),
        (npy(codes[0]), r"it is int16 \[2\]"),
        (npy(np.array([{}], dtype=object)), "Object arrays cannot be loaded|it is object"),
        (b"nothing", "no .npy file"),
        (npy(codes)[:-3], "no .npy file"),
    ):
        with pytest.raises(ValueError, match=message):
            read_codes(data)


def sample_of(**changes) -> Sample:
    codes = np.zeros((4, 30), np.int16)
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "what is this?"},
        {"role": "assistant", "content": "a cat"},
    ]
    content = {"messages": messages, "speaker": "ethan"} | changes.pop("content", {})
    members = {"json": json.dumps(content).encode(), "codes.npy": npy(codes), "rejected.codes.npy": npy(codes[:, :20])}
    return Sample("source", "shard.tar", "key", content, members | changes)


@pytest.mark.parametrize("has_rejected", [False, True])
@pytest.mark.parametrize("content", [{}, {"talker_system": "whisper"}], ids=["stock", "system prompt"])
def test_the_index_knows_the_length_of_a_talker_s_sequence(content, has_rejected):
    tokenizer, sample = load_tokenizer(tokenizer_folder()), sample_of(content=content)
    format = SpeechFormat(TALKER, SpeechTokens.of(tokenizer), has_rejected)
    encoder = Encoder(tokenizer, MediaGeometry(), speech=format)
    facts = SampleFacts("key", 0, 0, *describe(sample.content, sample.members, tokenizer))
    document = encoder.encode(sample)
    assert encoder.num_tokens(facts) == document.num_tokens == sum(s.num_tokens for s in document.speeches)
    assert len(document.speeches) == 1 + has_rejected
    thinker = Encoder(tokenizer, MediaGeometry())
    assert thinker.num_tokens(facts) == thinker.encode(sample).num_tokens == len(document.input_ids)


def test_a_sample_without_speech_is_named():
    tokenizer, sample = load_tokenizer(tokenizer_folder()), sample_of()
    encoder = Encoder(tokenizer, MediaGeometry(), speech=SpeechFormat(TALKER, SpeechTokens.of(tokenizer)))
    silent = dataclasses.replace(sample, members={"json": sample.members["json"]})
    with pytest.raises(ValueError, match="sample source/shard.tar/key: it has no member 'codes.npy'"):
        encoder.encode(silent)
    with pytest.raises(ValueError, match="it has no messages"):
        encoder.encode(dataclasses.replace(sample, content={"text": "a cat"}))
    members = {"rejected.codes.npy": sample.members["codes.npy"]}
    with pytest.raises(ValueError, match="without the chosen one"):
        describe(sample.content, members, tokenizer)
