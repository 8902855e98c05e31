"""The plan of the corpus: which samples each source of each split holds, with their media still to be made.

Everything here is a pure function of (stamps by split, recordings with their seconds, seed). A question names the
language of its answer first: "fr: what is said?".
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.shards import PlannedSample
from data.tuxpaint.media import PAUSE_SEC, Picture, Recordings
from data.tuxpaint.stamps import SpokenCaption, Stamp, is_new_speaker

LICENSE = "GPL-2.0-only"
OOD_LICENSE = "BSD-2-Clause"
QUESTIONS = {
    "spoken_caption": "what is said?",
    "picture_caption": "what is this?",
    "picture_kind": "what kind of thing?",
    "match": "same or different?",
    "long_first": "what is said first?",
}
MAX_CAPTION_CHARS = 60
MIN_LANG_CAPTIONS = 300  # a language of pictures has at least so many captions
SAME_AS_ENGLISH = frozenset(("en_GB", "en_AU"))
SPEEDS = (1.0, 0.9, 1.1)  # of the train clips; pitch moves too (Ko et al. 2015)
LONG_SEC = (10.0, 16.0)
NUM_SAMPLES = {
    "picture_langs": (1000, 4, 20),  # stamps of each language
    "picture_kind": (8, 1, 2),  # times each stamp
    "match": (1, 1, 1),  # times each spoken caption of a stamp with a picture
    "long_first": (600, 40, 120),
    "repeat": (12_000, 200, 400),
    "translate": (16_000, 200, 400),
    "text": (6, 2, 2),  # times each stamp
}
"""Of train, validation, held-out."""


@dataclass(slots=True)
class Split:
    """What one split is planned from. ``seconds`` of every recording that may be used, by its path."""

    name: str
    stamps: list[Stamp]
    spoken: list[SpokenCaption]
    seconds: dict[Path, float]
    langs: list[str]  # of the pictures
    rng: random.Random

    @property
    def is_train(self) -> bool:
        return self.name == "train"

    def amount(self, what: str) -> int:
        return NUM_SAMPLES[what][("train", "validation", "heldout").index(self.name)]

    def pictured(self) -> list[Stamp]:
        return [stamp for stamp in self.stamps if stamp.picture is not None]

    def picture(self, path: Path) -> Picture:
        return Picture(path, str(self.rng.getrandbits(48)) if self.is_train else "")


def is_usable(text: str) -> bool:
    """Whether a caption is short enough to be asked for."""
    return 0 < len(text) <= MAX_CAPTION_CHARS


def picture_langs(stamps: Sequence[Stamp]) -> list[str]:
    """Languages with enough captions to be asked about pictures; variants that repeat English are left out."""
    counts = Counter(lang for stamp in stamps for lang in stamp.captions)
    enough = min(MIN_LANG_CAPTIONS, len(stamps) // 2)
    return sorted(lang for lang, count in counts.items() if count >= enough and lang not in SAME_AS_ENGLISH)


def ask(task: str, lang: str, question: str, answer: str, media: dict | None = None, **facts: str) -> PlannedSample:
    """A question in front of which its media stand ("a.png", "b.flac", in order), with its answer in ``lang``."""
    parts = []
    for member in media or {}:
        kind = "image" if member.endswith("png") else "audio"
        parts.append({"type": kind, kind: member})
    messages = [
        {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    content = {"messages": messages, "task": task, "lang": lang, "license": LICENSE, **facts}
    return PlannedSample(content, media or {})


def prefixed(lang: str, task: str) -> str:
    return f"{lang}: {QUESTIONS[task]}"


def plan_speech(split: Split) -> list[PlannedSample]:
    """Spoken captions to write down; those by speakers who are not in train are a task of the held-out split."""
    samples = []
    for spoken in split.spoken:
        task = "spoken_new_speaker" if is_new_speaker(spoken) else "spoken_caption"
        for speed in SPEEDS if split.is_train else SPEEDS[:1]:
            clip = {"a.flac": Recordings((spoken.path,), speed)}
            question = prefixed(spoken.lang, "spoken_caption")
            samples.append(ask(task, spoken.lang, question, spoken.text, clip, speaker=spoken.speaker))
    return samples


def plan_pictures(split: Split) -> list[PlannedSample]:
    """The caption of a picture in each language, and what kind of thing it shows."""
    samples = []
    for lang in split.langs:
        known = [stamp for stamp in split.pictured() if is_usable(stamp.captions.get(lang, ""))]
        for stamp in split.rng.sample(known, min(len(known), split.amount("picture_langs"))):
            picture = {"a.png": split.picture(stamp.picture)}
            question = prefixed(lang, "picture_caption")
            samples.append(ask("picture_caption", lang, question, stamp.captions[lang], picture))
    for stamp in split.pictured():
        for _ in range(split.amount("picture_kind")):
            picture = {"a.png": split.picture(stamp.picture)}
            samples.append(ask("picture_kind", "en", prefixed("en", "picture_kind"), stamp.kind, picture))
    return samples


def plan_mixed(split: Split) -> list[PlannedSample]:
    """A picture and a spoken caption: of this stamp, or of one of another kind; as often the one as the other."""
    pictured = {stamp.name: stamp for stamp in split.pictured()}
    spoken = [one for one in split.spoken if one.stamp in pictured and not is_new_speaker(one)]
    samples = []
    for _ in range(split.amount("match")):
        for one in spoken:
            own = pictured[one.stamp]
            others = [stamp for stamp in pictured.values() if stamp.kind != own.kind]
            for stamp, answer in ((own, "same"), (split.rng.choice(others or [own]), "different")):
                if answer == "different" and not others:
                    continue
                media = {"a.png": split.picture(stamp.picture), "b.flac": Recordings((one.path,))}
                question = prefixed("en", "match")
                samples.append(ask("match", one.lang, question, answer, media, speaker=one.speaker))
    return samples


def plan_long_audio(split: Split) -> list[PlannedSample]:
    """10–16 s of one speaker's captions: what was said first?"""
    by_speaker = defaultdict(list)
    for spoken in split.spoken:
        if not is_new_speaker(spoken):
            by_speaker[spoken.speaker].append(spoken)
    enough = {
        speaker: own
        for speaker, own in sorted(by_speaker.items())
        if sum(split.seconds[one.path] + PAUSE_SEC for one in own) >= 2 * LONG_SEC[1]
    }
    samples = []
    for number in range(split.amount("long_first") if enough else 0):
        own = list(enough.values())[number % len(enough)]
        chosen = _row(split, own)
        clip = {"a.flac": Recordings(tuple(one.path for one in chosen))}
        first, question = chosen[0], prefixed(chosen[0].lang, "long_first")
        samples.append(ask("long_first", first.lang, question, first.text, clip, speaker=first.speaker))
    return samples


def _row(split: Split, own: list[SpokenCaption]) -> list[SpokenCaption]:
    """Captions of one speaker in random order, together 10 s long or a little more; none that would pass 16 s."""
    chosen: list[SpokenCaption] = []
    total_sec = 0.0
    for one in split.rng.sample(own, len(own)):
        more_sec = split.seconds[one.path] + (PAUSE_SEC if chosen else 0.0)
        if total_sec + more_sec <= LONG_SEC[1]:
            chosen.append(one)
            total_sec += more_sec
        if total_sec >= LONG_SEC[0]:
            break
    return chosen


def plan_dialogue(split: Split) -> list[PlannedSample]:
    """The media tasks in written form: words to repeat, a caption to say in another language."""
    words, pairs = defaultdict(list), []
    for stamp in split.stamps:
        for lang, caption in stamp.captions.items():
            words[lang] += caption.split()
            if is_usable(caption):
                pairs.append((stamp, lang))
    langs, rng, samples = sorted(words), split.rng, []
    for _ in range(split.amount("repeat")):
        lang = rng.choice(langs)
        jumble = " ".join(rng.choices(words[lang], k=rng.randint(1, 6)))
        samples.append(ask("text_repeat", lang, f"{jumble}\n{prefixed(lang, 'spoken_caption')}", jumble))
    for stamp, lang in rng.choices(pairs, k=split.amount("translate") if pairs else 0):
        other = rng.choice(sorted(stamp.captions))
        question = f"{stamp.captions[other]}\n{prefixed(lang, 'picture_caption')}"
        samples.append(ask("text_translate", lang, question, stamp.captions[lang]))
    return samples


def plan_text(split: Split) -> list[PlannedSample]:
    """Plain text: a stamp's captions in up to ten languages, a line each."""
    samples = []
    for stamp in split.stamps:
        for _ in range(split.amount("text")):
            langs = split.rng.sample(sorted(stamp.captions), min(10, len(stamp.captions)))
            text = "\n".join(f"{lang}: {stamp.captions[lang]}" for lang in langs)
            samples.append(PlannedSample({"text": text, "task": "captions", "license": LICENSE}))
    return samples


SOURCES: dict[str, Callable[[Split], list[PlannedSample]]] = {
    "long_audio": plan_long_audio,
    "mixed": plan_mixed,
    "speech": plan_speech,
    "pictures": plan_pictures,
    "dialogue": plan_dialogue,
    "text": plan_text,
}


def plan_source(split: Split, source: str, seed: int) -> list[PlannedSample]:
    """The samples of one source of a split in their shuffled order."""
    split.rng = random.Random(f"{source}/{split.name}/{seed}")
    samples = SOURCES[source](split)
    random.Random(f"order/{split.name}/{source}/{seed}").shuffle(samples)
    return samples


def plan_ood(folder: Path) -> list[PlannedSample]:
    """The transcribed utterances of pocketsphinx-testdata: English, read books and playing cards, held-out only."""
    texts: dict[str, tuple[Path, str]] = {}
    for part, transcription in (("cards", "cards.transcription"), ("librivox", "transcription")):
        for line in (folder / part / transcription).read_text("utf-8").splitlines():
            said, _, name = line.strip().rpartition("(")
            words = [word for word in said.split() if word not in ("<s>", "</s>")]
            texts[f"{part}/{name.rstrip(')')}"] = folder / part / f"{name.rstrip(')')}.wav", " ".join(words).lower()
    question = prefixed("en", "spoken_caption")
    found = []
    for name, (path, text) in sorted(texts.items()):
        facts = {"speaker": name.partition("/")[0], "license": OOD_LICENSE}
        found.append(ask("spoken_ood", "en", question, text, {"a.flac": Recordings((path,))}, **facts))
    return found
