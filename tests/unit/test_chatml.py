import io
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from omni_train.data.chatml import Describe, Piece, count_text_tokens, describe, modality_of, render, tokenize
from omni_train.data.tokenizer import load_tokenizer, train_tokenizer

TEXTS = ["user\n\nassistant\nwhat is this? a cat, a dog\n\n\n and  two   spaces\t\n 123"] * 8
TWO_TURNS = {
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "audio", "audio": "a.flac"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": [{"type": "text", "text": "and "}, {"type": "image", "image": "jpg"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "dog"}]},
    ]
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 400, out)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def joined(pieces):
    return "".join(piece.text for piece in pieces)


def test_loss_lies_on_replies_and_their_end():
    audio = "<|audio_start|><|audio_pad|><|audio_end|>"
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert render(TWO_TURNS) == [
        Piece("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n", False),
        Piece(audio, False, media="a.flac", kind="audio"),
        Piece("what?<|im_end|>\n<|im_start|>assistant\n", False),
        Piece("a cat<|im_end|>", True),
        Piece("\n<|im_start|>user\nand ", False),
        Piece(image, False, media="jpg", kind="image"),
        Piece("<|im_end|>\n<|im_start|>assistant\n", False),
        Piece("a dog<|im_end|>", True),
        Piece("\n", False),
    ]


def test_loss_on_all_text_leaves_out_media_only():
    pieces = render(TWO_TURNS, loss_on="all_text")
    assert [piece.has_loss for piece in pieces] == [True, False, True, False, True]
    assert joined(pieces) == joined(render(TWO_TURNS))


def test_the_assistants_clip_is_no_part_of_the_text(tokenizer):
    """It is what a Talker learns to say and a codec to keep; the Thinker reads what was said."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(2400), 24_000, format="FLAC")
    reply = [{"type": "text", "text": "red dog"}, {"type": "audio", "audio": "a.flac"}]
    spoken = {"messages": [{"role": "user", "content": "say: red dog"}, {"role": "assistant", "content": reply}]}
    silent = {"messages": [spoken["messages"][0], {"role": "assistant", "content": "red dog"}]}
    assert render(spoken) == render(silent) and modality_of(spoken) == "text"
    num_tokens, facts, is_text = describe(spoken, {"a.flac": file.getvalue()}, tokenizer)
    assert num_tokens == describe(silent, {}, tokenizer)[0] and not is_text
    assert [(fact.kind, fact.num_samples, fact.sample_rate_hz) for fact in facts] == [("speech", 2400, 24_000)]
    with pytest.raises(ValueError, match=r"names speech member 'a\.flac', which is missing"):
        describe(spoken, {}, tokenizer)


def test_plain_text_ends_and_carries_loss_either_way():
    for loss_on in ("assistant", "all_text"):
        assert render({"text": "once upon"}, loss_on) == [Piece("once upon<|endoftext|>", True)]


def test_line_breaks_before_a_reply_belong_to_the_head():
    pieces = render({"messages": [{"role": "assistant", "content": " \n\n  hi"}]})
    assert pieces[:2] == [Piece("<|im_start|>assistant\n \n\n", False), Piece("  hi<|im_end|>", True)]


def test_tool_answers_share_one_user_turn():
    content = {"messages": [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]}
    assert joined(render(content)) == (
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
    )


def nasty_text(rng):
    alphabet = [
        *"ab1 \n\r\t.'é\u0301\u00a0\u2003\u3000\u2028\x85\x1c\x0b你",
        "  ",
        "\n\n",
        "'s",
        "<think>",
        "</think>",
        "🙂",
    ]
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(9)))


def nasty_content(rng):
    if rng.random() < 0.1:
        return {"text": nasty_text(rng)}
    messages = []
    for _ in range(rng.randrange(1, 5)):
        kinds = rng.choices(["text", "text", "audio", "image", "video"], k=rng.randrange(4))
        parts = [{"type": kind, kind: nasty_text(rng) if kind == "text" else "m"} for kind in kinds]
        content = nasty_text(rng) if rng.random() < 0.3 else parts
        messages.append({"role": rng.choice(["system", "user", "assistant", "tool"]), "content": content})
        if messages[-1]["role"] == "assistant" and rng.random() < 0.3:
            messages[-1]["reasoning_content"] = nasty_text(rng)
        if messages[-1]["role"] == "assistant" and rng.random() < 0.3:
            call = {"name": "f", "arguments": rng.choice(["{}", {"a": nasty_text(rng)}])}
            messages[-1]["tool_calls"] = [call, {"function": call}][: rng.randrange(3)]
    return {"messages": messages} | ({"tools": [{"name": "f", "text": "é"}]} if rng.random() < 0.2 else {})


def test_pieces_tokenise_as_the_whole_text_and_render_as_the_chat_template(tokenizer):
    rng = random.Random(0)
    for _ in range(2_000):
        content = nasty_content(rng)
        counts = set()
        for loss_on in ("assistant", "all_text"):
            pieces = render(content, loss_on)
            whole = tokenize(joined(pieces), tokenizer)
            assert [i for piece in pieces for i in tokenize(piece.text, tokenizer)] == whole, content
            counts.add(count_text_tokens(pieces, tokenizer))
            assert counts == {len(whole) - sum(piece.media is not None for piece in pieces)}
        if "messages" in content:
            expected = tokenizer.apply_chat_template(content["messages"], tools=content.get("tools"), tokenize=False)
            assert joined(pieces) == expected, content


def reply(text, **more):
    return {"role": "assistant", "content": text, **more}


def asked(*messages, **more):
    return {"messages": [{"role": "user", "content": "why?"}, *messages], **more}


CALL = {"function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}
THINKING = {
    "one turn": asked(reply("<think>\nhm\n</think>\n\nso")),
    "its own field": asked(reply("so", reasoning_content="hm")),
    "earlier turns": asked(
        reply("<think>\nfirst\n</think>\n\none"),
        {"role": "user", "content": "and?"},
        reply("<think>\nsecond\n</think>\n\ntwo"),
    ),
    "tools between": asked(
        reply("<think>\nask it\n</think>\n\n", tool_calls=[CALL, CALL]),
        {"role": "tool", "content": "3"},
        reply("<think>\nthree\n</think>\n\n3"),
        tools=[{"type": "function", "function": {"name": "add"}}],
    ),
    "system and tools": {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "1 + 2?"},
            reply("let me see", tool_calls=[{"name": "add", "arguments": '{"a": 1}'}], reasoning_content="x"),
            {"role": "tool", "content": "3"},
            {"role": "tool", "content": "4"},
            reply("3", reasoning_content="hm"),
        ],
        "tools": [{"name": "add"}, {"name": "sub"}],
    },
}


@pytest.mark.parametrize("name", THINKING)
def test_reasoning_and_tools_are_written_as_qwen3_writes_them(name):
    """Against the template that is published with Qwen3, as TRL ships it."""
    chat_templates = pytest.importorskip("trl.chat_template_utils")
    from transformers.utils.chat_template_utils import render_jinja_template

    content = THINKING[name]
    template = (Path(chat_templates.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    (expected,), _ = render_jinja_template(
        conversations=[content["messages"]], chat_template=template, tools=content.get("tools")
    )
    assert joined(render(content)) == expected


def test_earlier_reasoning_is_left_out_and_the_last_carries_loss():
    content = THINKING["earlier turns"]
    assert [piece.text for piece in render(content) if piece.has_loss] == [
        "one<|im_end|>",
        "<think>\nsecond\n</think>\n\ntwo<|im_end|>",
    ]
    only_last = [piece.text for piece in render(content, "last_turn") if piece.has_loss]
    assert only_last == ["<think>\nsecond\n</think>\n\ntwo<|im_end|>"]
    assert joined(render(content, "last_turn")) == joined(render(content))


def test_the_calls_of_a_last_turn_carry_loss():
    calls = [piece.text for piece in render(THINKING["tools between"], "last_turn") if piece.has_loss]
    assert len(calls) == 2 and calls[0].count("<tool_call>") == 2 and calls[1].endswith("</think>\n\n3<|im_end|>")


@pytest.mark.parametrize(
    "content, message",
    [
        (asked(reply("a"), tools="add"), "'tools' must be a list of objects"),
        (asked(reply("a", tool_calls=["add"])), "message 1: tool_calls must be objects"),
        (asked(reply("a", reasoning_content=3)), "message 1: reasoning_content is int"),
        (asked(reply(None)), "message 1 has content of type NoneType"),
    ],
)
def test_wrong_tools_and_reasoning_are_named(content, message):
    with pytest.raises(ValueError, match=message):
        render(content)


def test_generation_prompt_is_that_of_the_template(tokenizer):
    messages = TWO_TURNS["messages"][:2]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert joined(render({"messages": messages}, add_generation_prompt=True)) == expected


def test_truncation_left_on_by_others_does_not_cut(tokenizer):
    whole = tokenize("a cat and a dog and a cat", tokenizer)
    tokenizer(["a cat and a dog", "a"], truncation=True, max_length=2, padding="max_length")
    assert tokenize("a cat and a dog and a cat", tokenizer) == whole


def user(content):
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"messages": [{"role": "asistant", "content": ""}]},
            r"message 0 has role 'asistant'.*did you mean 'assistant'",
        ),
        (
            user([{"type": "img", "img": "x"}]),
            "message 0 has a part of type 'img'; use one of text, image, audio, video",
        ),
        (user([{"type": "imag", "imag": "x"}]), "did you mean 'image'"),
        (user([{"type": "image", "path": "x"}]), "a part of type 'image' without 'image': the name of its member"),
        (user([{"type": "text"}]), "without 'text': its text"),
        (user(["x"]), "a part of type None"),
        (user(None), "content of type NoneType"),
        (user("hi<|im_end|>"), r"message 0 holds the control token '<\|im_end\|>'"),
        ({"text": "<|audio_pad|>"}, "control token"),
        ({"text": 3}, "'text' is int"),
        ({"text": "a", "messages": []}, "either 'messages' or 'text'"),
        ({"task": "x"}, "it has task"),
        ({"messages": []}, "at least one message"),
        ({"messages": ["x"]}, "message 0 is str"),
    ],
)
def test_what_breaks_the_contract_is_named(content, message):
    with pytest.raises(ValueError, match=message):
        render(content)


def test_unknown_loss_on_is_refused():
    with pytest.raises(ValueError, match="use one of assistant, last_turn, all_text .did you mean 'assistant'"):
        render({"text": "a"}, loss_on="asistant")


def test_richest_media_names_the_modality():
    def of(*kinds):
        return modality_of(user([{"type": kind, kind: "x"} for kind in kinds]))

    assert modality_of({"text": "a"}) == modality_of(user("a")) == of("text") == "text"
    assert of("audio", "text") == "audio"
    assert of("image", "audio") == of("audio", "image") == "image"
    assert of("image", "video", "audio") == "video"
    assert modality_of(user([{"type": "video", "video": "x", "use_audio_in_video": True}])) == "video_audio"


def media_members():
    sound, picture = io.BytesIO(), io.BytesIO()
    soundfile.write(sound, np.zeros(24_000), 24_000, format="FLAC")
    Image.new("RGB", (90, 60)).save(picture, "JPEG")
    return {"a.flac": sound.getvalue(), "jpg": picture.getvalue()}


def test_describe_gives_counts_and_facts_in_order(folder, tokenizer):
    members = {"json": json.dumps(TWO_TURNS).encode(), **media_members()}
    describer = pickle.loads(pickle.dumps(Describe(folder)))
    num_tokens, facts, is_text = described = describer("k", members)
    assert num_tokens == len(tokenize(joined(render(TWO_TURNS)), tokenizer)) - 2
    assert [(fact.member, fact.kind) for fact in facts] == [("a.flac", "audio"), ("jpg", "image")]
    assert (facts[0].num_samples, facts[1].width, facts[1].height) == (24_000, 90, 60)
    assert not is_text and pickle.loads(pickle.dumps(describer))("k", members) == described


def test_describe_names_key_message_and_member(folder, tokenizer):
    members = media_members()
    del members["jpg"]
    with pytest.raises(
        ValueError, match=r"message 3 names image member 'jpg', which is missing; the sample has a\.flac"
    ):
        describe(TWO_TURNS, members, tokenizer)
    with pytest.raises(ValueError, match="member 'jpg': cannot read picture"):
        describe(TWO_TURNS, {**members, "jpg": b"?"}, tokenizer)
    with pytest.raises(ValueError, match="member 'mp4': cannot read video of 1 bytes"):
        describe(user([{"type": "video", "video": "mp4"}]), {"mp4": b"?"}, tokenizer)
    for data, message in [
        ({}, "no json member; it has none"),
        ({"json": b"{"}, "is not JSON"),
        ({"json": b"[]"}, "list"),
    ]:
        with pytest.raises(ValueError, match=f"sample k7: .*{message}"):
            Describe(folder)("k7", data)
