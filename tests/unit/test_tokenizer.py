import shutil

import pytest
from transformers import AutoTokenizer

from omni_train.data.tokenizer import (
    REQUIRED_TOKENS,
    fingerprint,
    load_tokenizer,
    token_ids,
    token_spelling,
    train_tokenizer,
)

TEXTS = ["the cat sat on the mat.\n\nthe dog sat on the log, 2024!", "你好，世界。 你好！", "Ünïcode's café"] * 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 330, out)
    return out


def test_round_trip_through_plain_transformers(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, "🙂 never seen\t\n  \n", "a<think>\nb</think>"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_merges_were_learned_and_vocabulary_has_the_size_asked(folder):
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == 330
    assert len(tokenizer(" the")["input_ids"]) == 1


def test_digits_stay_single_and_line_breaks_join_as_qwen_splits_them(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("2024")["input_ids"]) == ["2", "0", "2", "4"]
    words = [text for text, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n b  c")]
    assert words == ["a", "ĊĊ", "Ġb", "Ġ", "Ġc"]


def test_special_tokens_are_single_and_named_for_the_stock_processor(folder):
    tokenizer = load_tokenizer(folder)
    for token in REQUIRED_TOKENS:
        assert len(tokenizer(token)["input_ids"]) == 1, token
    assert (tokenizer.image_token, tokenizer.audio_token) == ("<|image_pad|>", "<|audio_pad|>")
    assert (tokenizer.video_token, tokenizer.audio_bos_token) == ("<|video_pad|>", "<|audio_start|>")
    assert (tokenizer.vision_bos_token, tokenizer.vision_eos_token) == ("<|vision_start|>", "<|vision_end|>")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_thinking_stays_when_special_tokens_are_skipped(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("<|im_start|><think>hm</think>yes<|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>hm</think>yes"


def test_token_ids_name_the_right_rows(folder):
    tokenizer = load_tokenizer(folder)
    ids = token_ids(tokenizer)
    assert tokenizer.convert_ids_to_tokens([ids.audio_pad, ids.im_end, ids.tts_eos]) == [
        "<|audio_pad|>",
        "<|im_end|>",
        "<tts_text_eod>",
    ]
    assert ids.eos == ids.im_end != ids.endoftext


def test_fingerprint_holds_over_save_load_and_retraining_and_tells_others_apart(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    tokenizer.save_pretrained(tmp_path / "again")
    same = train_tokenizer(TEXTS, 330, tmp_path / "same")
    other = train_tokenizer(TEXTS, 329, tmp_path / "other")
    expected = fingerprint(tokenizer)
    assert fingerprint(load_tokenizer(tmp_path / "again")) == expected == fingerprint(same)
    assert fingerprint(other) != expected
    tokenizer("encoding changes nothing", truncation=True, max_length=2)
    assert fingerprint(tokenizer) == expected


def test_missing_folder_names_the_file_and_the_fix(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json .* is missing.*train_tokenizer"):
        load_tokenizer(tmp_path / "nowhere")


def test_missing_special_token_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "t")
    for file in (tmp_path / "t").iterdir():
        file.write_text(file.read_text().replace("<|audio_pad|>", "<|odd_pad|>"))
    with pytest.raises(ValueError, match=r"lacks the special tokens <\|audio_pad\|>"):
        load_tokenizer(tmp_path / "t")


def test_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="vocab_size .100. must hold 256 bytes and 33 special tokens; use at least 289"
    ):
        train_tokenizer(TEXTS, 100, tmp_path)


def test_spelling_gives_each_text_back_and_nothing_for_control_tokens(folder):
    tokenizer = load_tokenizer(folder)
    spelling = token_spelling(tokenizer, 400)
    for text in [*TEXTS, "🙂 naïve\n ☃"]:
        assert b"".join(spelling[n] for n in tokenizer(text)["input_ids"]).decode() == text
    assert spelling[tokenizer.convert_tokens_to_ids("<|im_end|>")] == b"" and spelling[399] == b""
