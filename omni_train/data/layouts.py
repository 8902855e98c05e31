"""What the members of a sample say, by the layout of their source: members → content (``messages`` or ``text``).

    {"jpg": …, "txt": …, "json": …} ──read_content(pairs)──▶ {"messages": [user: picture, prompt; assistant: caption]}

* ``messages``: KEY.json is the content (data/README.md).
* ``pairs``: one medium and its text, as img2dataset, video2dataset and most speech corpora write them.
* ``text``: one text, loss on all of it; other members are left alone.

Everything after this module sees the content only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from omni_train.config import LayoutConfig
from omni_train.config.model import nearest

MESSAGES = LayoutConfig()
"""Our own layout, the default."""

MEDIA_KINDS = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image"),
    **dict.fromkeys(("flac", "wav", "mp3", "ogg"), "audio"),
    "mp4": "video",
}
"""The last part of a media member's extension → the type of its content part."""

TEXT_FIELDS = ("text", "caption")
"""Where the text is in a json without KEY.txt: ``text`` in speech manifests, ``caption`` in img2dataset's."""

LABEL_FIELDS = ("task", "lang", "speaker", "license")
"""Optional fields that a json of any layout may hold."""


def layout_id(layout: LayoutConfig) -> str:
    """ "" for ``messages``, else the layout's name and 8 hex digits of its settings: the same id, the same content."""
    if layout.layout == MESSAGES.layout:
        return ""
    settings = json.dumps([layout.prompt, layout.text_field, layout.use_audio_in_video])
    return f"{layout.layout}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


def read_content(members: dict[str, bytes], layout: LayoutConfig) -> dict[str, Any]:
    """The content of a sample: ``messages`` or ``text``, and what its json has of ``LABEL_FIELDS``.

    Raises ValueError, with the members or fields there are, for a sample that does not follow the layout.
    """
    if layout.layout == "pairs":
        return _pair(members, layout)
    if layout.layout == "text":
        fields = _json_object(members)
        return {"text": _text(members, fields, layout.text_field), **_labels(fields)}
    return _messages(members)


def _messages(members: dict[str, bytes]) -> dict[str, Any]:
    content = _json_object(members)
    if "messages" in content or ("text" in content and not _media(members)):
        return content
    media = _media(members)
    other = "if each sample is a medium and its text" if media else "if each sample is plain text in KEY.txt"
    fix = f"{other}, set layout: {'pairs' if media else 'text'} on its source"
    if "json" not in members:
        raise ValueError(f"the sample has no json member; it has {_listed(members)}; {fix}")
    if "text" in content:
        raise ValueError(f"member 'json' holds a plain text, which does not name {_listed(media)}; {fix}")
    raise ValueError(f"member 'json' holds neither 'messages' nor 'text'; it has {_listed(content)}; {fix}")


def _pair(members: dict[str, bytes], layout: LayoutConfig) -> dict[str, Any]:
    media = _media(members)
    if len(media) != 1:
        raise ValueError(
            f"layout pairs needs one medium in a sample; it has {_listed(media)} (members: {_listed(members)}); "
            "several need layout messages, whose json names each; a dot in a file's name ends its key"
        )
    kind = MEDIA_KINDS[_suffix(media[0])]
    medium: dict[str, Any] = {"type": kind, kind: media[0]}
    if kind == "video" and layout.use_audio_in_video:
        medium["use_audio_in_video"] = True
    prompt = [{"type": "text", "text": layout.prompt}] if layout.prompt else []
    fields = _json_object(members)
    answer = _text(members, fields, layout.text_field).strip()
    messages = [{"role": "user", "content": [medium, *prompt]}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **_labels(fields)}


def _text(members: dict[str, bytes], fields: dict[str, Any], text_field: str) -> str:
    """KEY.txt, or the json's ``text_field``. Raises ValueError where it is missing, no string or white space only."""
    if not text_field and "txt" in members:
        where = "member 'txt'"
        try:
            text = members["txt"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8: {error}") from error
    else:
        name = text_field or _text_field(members, fields)
        where = f"field {name!r} of member 'json'"
        if name not in fields:
            fix = nearest(name, fields) if fields else f"members: {_listed(members)}"
            raise ValueError(f"{where}, which the source's text_field asks for, is missing; {fix}")
        text = fields[name]
        if not isinstance(text, str):
            raise ValueError(f"{where} is {type(text).__name__}; it must be a string")
    if not text.strip():
        raise ValueError(f"{where} is empty")
    return text


def _text_field(members: dict[str, bytes], fields: dict[str, Any]) -> str:
    """The json field that holds the text where nobody said which."""
    found = [name for name in TEXT_FIELDS if name in fields]
    if len(found) == 1:
        return found[0]
    either = " or ".join(TEXT_FIELDS)
    what = f"has both {' and '.join(found)} in its json" if found else f"has no txt member and no {either} in its json"
    there = f"members: {_listed(members)}" + (f"; fields: {_listed(fields)}" if fields else "")
    raise ValueError(f"the sample {what} ({there}); name the field with text_field on its source")


def _json_object(members: dict[str, bytes]) -> dict[str, Any]:
    """The parsed json member, {} where there is none. Raises ValueError if it is no object."""
    try:
        fields = json.loads(members.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"member 'json' is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"member 'json' holds a {type(fields).__name__}, not an object")
    return fields


def _labels(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in LABEL_FIELDS if name in fields}


def _media(members: dict[str, bytes]) -> list[str]:
    return [name for name in members if _suffix(name) in MEDIA_KINDS]


def _suffix(name: str) -> str:
    return name.rpartition(".")[2]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
