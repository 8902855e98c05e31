"""The stamps as the package has them: captions, spoken captions with their speaker, pictures; and their splits.

stamps/**/NAME.txt               first line English, then LANG.utf8=CAPTION
stamps/**/NAME.png | NAME.svg    the picture
stamps/**/NAME_desc_LANG.ogg     the caption, spoken by a person; NAME_desc.ogg is English
stamps/symbols/math/N_LANG.ogg   the numeral, spoken by another person; N.ogg is English
stamps/**/NAME.ogg               a sound effect, not used
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.shards import SPLITS

DESCRIPTION = re.compile(r"(?P<name>.+)_desc(?:_(?P<lang>[A-Za-z_@]+))?(?:\.ogg)?")
NUMERAL = re.compile(r"(?P<name>[0-9])(?:_(?P<lang>[A-Za-z_]+))?")
NUMERALS_FOLDER = "symbols/math"
STOP_WORDS = frozenset(("a", "an", "the", "of", "in", "on", "and", "with", "s"))
SPLIT_SHARES = {"heldout": 0.14, "validation": 0.06}
MAX_MOVABLE_STAMPS = 40  # a larger group of stamps alike stays in train
NEW_SPEAKER_LANGS = frozenset(("en", "fr", "ro", "ru"))
"""Languages whose numerals two people speak, by the credits: one of the two is never in train."""


@dataclass(frozen=True, slots=True)
class SpokenCaption:
    """One recording. ``speaker``: LANG/caption or LANG/numeral, one person or group each by the package's credits."""

    path: Path
    lang: str
    speaker: str
    text: str
    stamp: str


@dataclass(slots=True)
class Stamp:
    """``name`` is its path below the stamps folder, without an extension; ``kind`` its first folder."""

    name: str
    captions: dict[str, str]
    picture: Path | None
    recordings: list[SpokenCaption] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]


def normalise(text: str) -> str:
    """A caption as it is asked for: NFC, lower case, single spaces, no full stop or exclamation mark at the end."""
    return unicodedata.normalize("NFC", " ".join(text.split()).lower()).rstrip(" .!。！")


def parse_captions(text: str) -> dict[str, str]:
    """{language: caption} of a stamp's text file; empty captions are left out."""
    first, *rest = text.splitlines() or [""]
    captions = {"en": normalise(first)}
    for line in rest:
        key, has_caption, caption = line.partition(".utf8=")
        if has_caption:
            captions[key] = normalise(caption)
    return {lang: caption for lang, caption in captions.items() if caption}


def read_stamps(folder: Path) -> list[Stamp]:
    """Every stamp that has captions, by name, with the spoken captions whose text is known."""
    recordings = defaultdict(list)
    for path in sorted([*folder.rglob("*.ogg"), *folder.rglob("*.wav")]):
        if found := _spoken(path, folder):
            recordings[found[0]].append((path, *found[1:]))
    stamps = []
    for text in sorted(folder.rglob("*.txt")):
        name = text.relative_to(folder).with_suffix("").as_posix()
        stamp = Stamp(name, parse_captions(text.read_text("utf-8")), _picture(text))
        for path, lang, speaker in recordings[name]:
            if lang in stamp.captions:
                stamp.recordings.append(SpokenCaption(path, lang, speaker, stamp.captions[lang], name))
        stamps.append(stamp)
    return stamps


def _picture(text: Path) -> Path | None:
    drawn = (text.with_name(f"{text.stem}.{extension}") for extension in ("png", "svg"))
    return next((path for path in drawn if path.exists()), None)


def _spoken(path: Path, folder: Path) -> tuple[str, str, str] | None:
    """(stamp, language, speaker) of a recording; None for a sound effect."""
    parent = path.parent.relative_to(folder).as_posix()
    if match := DESCRIPTION.fullmatch(path.stem):
        lang = match["lang"] or "en"
        return f"{parent}/{match['name']}", lang, f"{lang}/caption"
    if parent == NUMERALS_FOLDER and (match := NUMERAL.fullmatch(path.stem)):
        lang = {None: "en", "en_GB": "en", "zh_tw": "zh_TW"}.get(match["lang"], match["lang"])
        return f"{parent}/{match['name']}", lang, f"{match['lang'] or 'en_US'}/numeral"
    return None


def is_new_speaker(recording: SpokenCaption) -> bool:
    """Whether its speaker is kept out of train: another person speaks that language, and the same words, there."""
    lang, kind = recording.speaker.split("/")
    return kind == "numeral" and recording.lang in NEW_SPEAKER_LANGS and lang != "en_US"


@functools.cache
def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def distinct(recordings: Iterable[SpokenCaption]) -> Iterator[SpokenCaption]:
    """One of each (language, bytes): the package copies recordings from stamp to stamp. None where captions differ."""
    copies = defaultdict(list)
    for recording in recordings:
        copies[recording.lang, digest(recording.path)].append(recording)
    for same in copies.values():
        if len({recording.text for recording in same}) == 1:
            yield same[0]


def group_stamps(stamps: list[Stamp]) -> list[list[Stamp]]:
    """Stamps alike together, in the order of their first: see ``_marks`` and ``_alike``."""
    parent = {stamp.name: stamp.name for stamp in stamps}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    marked: dict[tuple[str, str], str] = {}
    for stamp in stamps:
        for mark in _marks(stamp):
            parent[root(stamp.name)] = root(marked.setdefault(mark, stamp.name))
    for one, other in _alike(stamps):
        parent[root(one)] = root(other)
    groups: dict[str, list[Stamp]] = defaultdict(list)
    for stamp in stamps:
        groups[root(stamp.name)].append(stamp)
    return list(groups.values())


def _marks(stamp: Stamp) -> Iterator[tuple[str, str]]:
    """What makes two stamps one group: a caption in any language, a recording, a file name but for its number."""
    yield from stamp.captions.items()
    yield "file", re.sub(r"[\d_-]+$", "", stamp.name)
    for recording in stamp.recordings:
        yield "recording", digest(recording.path)


def _alike(stamps: list[Stamp]) -> Iterator[tuple[str, str]]:
    """Pairs whose English captions share at least half of their words, articles and the like not counted."""
    words = [(stamp.name, _words(stamp)) for stamp in stamps]
    for number, (name, own) in enumerate(words):
        for other, others in words[:number]:
            if own and 2 * len(own & others) >= len(own | others):
                yield name, other


def _words(stamp: Stamp) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", stamp.captions.get("en", ""))) - STOP_WORDS


def split_stamps(stamps: list[Stamp], seed: int) -> dict[str, list[Stamp]]:
    """{split: stamps}; stamps alike lie in one split. Large groups and the numerals stay in train."""
    groups = group_stamps(stamps)
    movable = [group for group in groups if len(group) <= MAX_MOVABLE_STAMPS and not _has_numeral(group)]
    random.Random(f"stamps/{seed}").shuffle(movable)
    split_of: dict[str, str] = {}
    for split, share in SPLIT_SHARES.items():
        num_stamps = 0
        while movable and num_stamps < share * len(stamps):
            group = movable.pop()
            num_stamps += len(group)
            split_of |= {stamp.name: split for stamp in group}
    return {split: [stamp for stamp in stamps if split_of.get(stamp.name, "train") == split] for split in SPLITS}


def _has_numeral(group: list[Stamp]) -> bool:
    return any(re.fullmatch(rf"{NUMERALS_FOLDER}/\d", stamp.name) for stamp in group)
