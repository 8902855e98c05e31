"""The plan of the corpus: which samples each source of each split holds, with their media still to be made.

Everything here is a pure function of (split, scale, seed). Nothing is synthesised or drawn; ``prepare`` does that.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from data.shards import SPLITS, PlannedSample
from data.tiny import texts
from data.tiny.pictures import BACKGROUNDS, CONCEPTS, DIGIT_ROWS, Digit, Picture, translations
from data.tiny.videos import MOTIONS, Film, Video
from data.tiny.voices import (
    NEW_SPEAKERS,
    OTHER_LANGS,
    SPEAKERS,
    VARIANTS,
    Clip,
    Recording,
    Reply,
    english_voices,
    gender,
)

Media = Clip | Recording | Reply | Picture | Digit | Video | Film

SPEECH_LICENSE = "CC0-1.0"
PICTURE_LICENSE = "CC-BY-SA-4.0"
DIGIT_LICENSE = "CC-BY-SA-3.0"
DOC_LICENSE = "PSF-2.0"

NUM_SAMPLES = {
    "spoken_word": (28, 2, 6),  # times each word
    "spoken_phrase": (4500, 250, 600),
    "spoken_digit": (40, 24, 60),  # times each digit
    "audio_find": (2000, 200, 500),
    "speech_other": (1500, 100, 400),
    "count_words": (700, 200, 500),
    "man_or_woman": (700, 200, 500),
    "digit_variants": (4, 1, 1),  # times each image
    "picture_name": (280, 6, 17),  # times each concept
    "picture_colour": (1200, 200, 500),
    "count": (2300, 200, 500),
    "same_or_different": (72, 3, 8),  # times each concept, same and different
    "same_audio": (300, 100, 250),  # of each of two kinds
    "digit_sum": (14, 3, 6),  # times each pair
    "digit_sum_unseen": (0, 14, 34),  # times each pair
    "long_audio_find": (860, 120, 500),
    "video_motion": (450, 20, 75),  # times each motion
    "video_name": (10, 2, 3),  # times each concept
    "video_audio": (22, 3, 7),  # times each concept, named by the voice and not
    "video_said": (6, 2, 3),  # times each concept
    "long_video_order": (200, 40, 100),
    "talker": (184, 24, 48),  # phrases, each by every speaker
    "talker_asked": (92, 12, 24),  # the same, asked aloud
    "speaker": (32, 8, 48),  # the same, by a new one
    "sft_format": (1400, 100, 1000),
    "exercise_rounds": (1000, 25, 40),  # of 24 dialogues
    "text_sum": (25, 1, 2),  # times each sum
    "stories": (600, 50, 100),
}
"""Of train, validation, held-out at scale 1."""

UNSEEN_PAIRS = frozenset([(a, (3 * a + 1) % 10) for a in range(10)] + [(a, (7 * a + 4) % 10) for a in range(0, 10, 2)])
"""(seen digit, heard digit) whose sum is asked only in held-out and validation, as ``digit_sum_unseen``."""
KINDS = {
    Clip: ("audio", "flac"),
    Recording: ("audio", "flac"),
    Reply: ("audio", "flac"),
    Picture: ("image", "png"),
    Digit: ("image", "png"),
    Video: ("video", "mp4"),
    Film: ("video", "mp4"),
}
"""Part type and file extension of each medium."""


class Planner:
    """Draws the samples of one split; every task draws from its own generator, so one does not shift another."""

    def __init__(self, split: str, scale: float, seed: int) -> None:
        self.split, self.scale, self.seed = split, scale, seed
        self.voices = english_voices(split)
        self.num_media = 0
        self.rng = random.Random()

    def begin(self, task: str) -> int:
        """Starts the generator of ``task``; returns how many samples (or times) it is to have."""
        self.rng = random.Random(f"{task}/{self.split}/{self.seed}")
        amount = NUM_SAMPLES[task][SPLITS.index(self.split)]
        return max(1, round(amount * self.scale)) if amount else 0

    def media_seed(self) -> int:
        self.num_media += 1
        return (self.seed * 3 + SPLITS.index(self.split)) * 10_000_000 + self.num_media

    def clip(self, text: str, voice: str = "") -> Clip:
        rng = self.rng
        return Clip(
            text=text,
            voice=voice or rng.choice(self.voices),
            rate_wpm=rng.randint(130, 185),
            pitch=rng.randint(36, 64),
            peak=round(rng.uniform(0.5, 0.9), 3),
            noise=round(rng.uniform(0.001, 0.015), 4) if self.split == "train" and rng.random() < 0.3 else 0.0,
            seed=self.media_seed(),
        )

    def picture(self, concept: str, count: int = 0, background: str = "") -> Picture:
        return Picture(concept, self.media_seed(), count, background)

    def digit(self, value: int) -> Digit:
        row = self.rng.randrange(*DIGIT_ROWS[self.split])
        return Digit(value, row, self.media_seed(), augment=self.split == "train")

    def sample(
        self,
        task: str,
        question: str,
        answer: str,
        *media: Media,
        reasoning: str = "",
        license: str = SPEECH_LICENSE,
        lang: str = "en",
    ) -> PlannedSample:
        """A question about ``media`` (members a, b in order). ``question`` names a wording or is the text itself.

        ``reasoning`` is what the reply thinks before its answer.
        """
        wordings = texts.QUESTIONS.get(question, (question,))
        wording = self.rng.choice(wordings) if self.split == "train" else wordings[0]
        parts, members = [], {}
        speakers = []
        for letter, spec in zip("ab", media, strict=False):
            kind, extension = KINDS[type(spec)]
            members[f"{letter}.{extension}"] = spec
            parts.append({"type": kind, kind: f"{letter}.{extension}"})
            clip = spec if isinstance(spec, Clip) else getattr(spec, "clip", None)
            if kind == "video":
                parts[-1]["use_audio_in_video"] = clip is not None
            if clip is not None:
                speakers.append(clip.voice)
        messages = _turn(wording, answer, *parts)
        if reasoning:
            messages[-1]["reasoning_content"] = reasoning
        content = {"messages": messages, "task": task, "lang": lang, "license": license}
        if speakers:
            content["speaker"] = speakers[0]
        return PlannedSample(content, members)


def _turn(question: str, answer: str, *media: dict) -> list[dict]:
    """A question after its media, and the answer."""
    return [
        {"role": "user", "content": [*media, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def plan_speech(plan: Planner) -> list[PlannedSample]:
    """Words, phrases and digits to write down, and a name to find among one to three other words."""
    samples = []
    for _ in range(plan.begin("spoken_word")):
        samples += [plan.sample("spoken_word", "transcribe", word, plan.clip(word)) for word in texts.WORDS]
    amount = plan.begin("spoken_phrase")
    for phrase in texts.phrase_pools(plan.seed)[plan.split][:amount]:
        samples.append(plan.sample("spoken_phrase", "transcribe", phrase, plan.clip(phrase)))
    for number in range(plan.begin("spoken_digit")):
        for value in range(10):
            clip = plan.clip(texts.NUMBERS[value], plan.voices[(number + value) % len(plan.voices)])
            samples.append(plan.sample("spoken_digit", "spoken_digit", str(value), clip))
    for number in range(plan.begin("audio_find")):
        name = CONCEPTS[number % len(CONCEPTS)]
        words = plan.rng.sample(texts.FILLERS, plan.rng.randint(1, 3))
        words.insert(plan.rng.randint(0, len(words)), name)
        samples.append(plan.sample("audio_find", "audio_find", name, plan.clip(" ".join(words))))
    return samples


def plan_speech_other(plan: Planner) -> list[PlannedSample]:
    """Picture names and digits in five other languages, to write down."""
    samples = []
    for number in range(plan.begin("speech_other")):
        lang = OTHER_LANGS[number % len(OTHER_LANGS)]
        word = plan.rng.choice([*translations(lang).values(), *texts.DIGIT_WORDS[lang]])
        clip = plan.clip(word, f"{lang}+{plan.rng.choice(VARIANTS[plan.split])}")
        samples.append(plan.sample("speech_other", "transcribe", word, clip, lang=lang))
    return samples


def plan_audio_understanding(plan: Planner) -> list[PlannedSample]:
    """How many words, and a man's or a woman's voice; both balanced."""
    samples = []
    phrases = [phrase.split() for phrase in texts.phrase_pools(plan.seed)[plan.split]]
    phrases = [words for words in phrases if len(words) == 4]
    for number in range(plan.begin("count_words")):
        num_words = number % 4 + 1
        text = " ".join(plan.rng.choice(phrases)[:num_words])
        samples.append(plan.sample("count_words", "count_words", str(num_words), plan.clip(text)))
    for number in range(plan.begin("man_or_woman")):
        answer = ("man", "woman")[number % 2]
        voice = plan.rng.choice([voice for voice in plan.voices if gender(voice) == answer])
        clip = plan.clip(" ".join(plan.rng.choice(phrases)[: plan.rng.randint(2, 4)]), voice)
        samples.append(plan.sample("man_or_woman", "man_or_woman", answer, clip))
    return samples


def plan_digits(plan: Planner) -> list[PlannedSample]:
    """MNIST digits."""
    samples = []
    start, stop = DIGIT_ROWS[plan.split]
    rows = range(start, start + max(1, round((stop - start) * min(1.0, plan.scale))))
    for variant in range(plan.begin("digit_variants")):
        for value in range(10):
            for row in rows:
                digit = Digit(value, row, plan.media_seed(), augment=plan.split == "train" and variant > 0)
                samples.append(plan.sample("digit_image", "digit_image", str(value), digit, license=DIGIT_LICENSE))
    return samples


def plan_pictures(plan: Planner) -> list[PlannedSample]:
    """Picture names, background colours and counts."""
    samples = []
    for _ in range(plan.begin("picture_name")):
        for name in CONCEPTS:
            picture = plan.picture(name)
            samples.append(plan.sample("picture_name", "picture_name", name, picture, license=PICTURE_LICENSE))
    for number in range(plan.begin("picture_colour")):
        colour = list(BACKGROUNDS)[number % len(BACKGROUNDS)]
        picture = plan.picture(plan.rng.choice(CONCEPTS), background=colour)
        samples.append(plan.sample("picture_colour", "picture_colour", colour, picture, license=PICTURE_LICENSE))
    for number in range(plan.begin("count")):
        count = number % 5 + 1
        picture = plan.picture(plan.rng.choice(CONCEPTS), count=count)
        samples.append(plan.sample("count", "count", str(count), picture, license=PICTURE_LICENSE))
    return samples


def _comparison(
    plan: Planner, task: str, first: str, second: str, *media: Media, question: str = "same_or_different", **about: str
) -> PlannedSample:
    """Whether two names are the same. The reply first thinks of both, each on a line of its own."""
    answer = "same" if first == second else "different"
    return plan.sample(task, question, answer, *media, reasoning=f"{first}\n{second}", **about)


def _same_or_different(plan: Planner) -> list[PlannedSample]:
    """Each name is drawn as often with its own word as with another, and said as often over its own picture."""
    samples = []
    for _ in range(plan.begin("same_or_different")):
        shift = plan.rng.randint(1, len(CONCEPTS) - 1)
        for number, seen in enumerate(CONCEPTS):
            other = CONCEPTS[(number + shift) % len(CONCEPTS)]
            for heard in (seen, other):
                media = plan.picture(seen), plan.clip(heard)
                samples.append(_comparison(plan, "same_or_different", seen, heard, *media, license=PICTURE_LICENSE))
    return samples


def plan_mixed(plan: Planner) -> list[PlannedSample]:
    """A picture with a spoken name, two spoken names, a written with a spoken name."""
    samples = _same_or_different(plan)
    for number in range(plan.begin("same_audio")):
        first, second = plan.rng.sample(CONCEPTS, 2)
        second = (first, second)[number % 2]
        pair = plan.clip(first), plan.clip(second)
        samples.append(_comparison(plan, "same_audio", first, second, *pair))
        written = f"{first}\n{texts.QUESTIONS['same_or_different'][0]}"
        samples.append(_comparison(plan, "same_audio", first, second, plan.clip(second), question=written))
    return samples


def plan_sums(plan: Planner) -> list[PlannedSample]:
    """A seen plus a heard digit. The reply first thinks of both, each on a line of its own."""
    samples = []
    for task in ("digit_sum", "digit_sum_unseen"):
        for _ in range(plan.begin(task)):
            for seen, heard in ((a, b) for a in range(10) for b in range(10)):
                if ((seen, heard) in UNSEEN_PAIRS) == (task == "digit_sum_unseen"):
                    media = plan.digit(seen), plan.clip(texts.NUMBERS[heard])
                    about = {"reasoning": f"{seen}\n{heard}", "license": DIGIT_LICENSE}
                    samples.append(plan.sample(task, "digit_sum", str(seen + heard), *media, **about))
    return samples


def plan_long_audio(plan: Planner) -> list[PlannedSample]:
    """One name in 10–16 s of verbs, colours, places and numbers."""
    samples = []
    for number in range(plan.begin("long_audio_find")):
        name = CONCEPTS[number % len(CONCEPTS)]
        utterances = [" ".join(plan.rng.sample(texts.FILLERS, plan.rng.randint(1, 3))) for _ in range(9)]
        utterances.insert(plan.rng.randint(0, len(utterances)), name)
        recording = Recording(tuple(utterances), round(plan.rng.uniform(10.2, 13.0), 2), plan.clip(name))
        samples.append(plan.sample("long_audio_find", "audio_find", name, recording))
    return samples


def plan_video(plan: Planner) -> list[PlannedSample]:
    """Which way a silent video moves, or that it grows, shrinks or turns; what it shows."""
    samples = []
    for _ in range(plan.begin("video_motion")):
        for motion in MOTIONS:
            video = Video(plan.rng.choice(CONCEPTS), motion, plan.media_seed())
            samples.append(plan.sample("video_motion", "video_motion", motion, video, license=PICTURE_LICENSE))
    for _ in range(plan.begin("video_name")):
        for name in CONCEPTS:
            video = Video(name, plan.rng.choice(MOTIONS), plan.media_seed())
            samples.append(plan.sample("video_name", "picture_name", name, video, license=PICTURE_LICENSE))
    return samples


def plan_video_audio(plan: Planner) -> list[PlannedSample]:
    """Whether the voice in a video names what it shows; the name that it says. Each name is as often right as wrong."""
    samples = []
    for _ in range(plan.begin("video_audio")):
        shift = plan.rng.randint(1, len(CONCEPTS) - 1)
        for number, seen in enumerate(CONCEPTS):
            other = CONCEPTS[(number + shift) % len(CONCEPTS)]
            for heard in (seen, other):
                video = Video(seen, plan.rng.choice(MOTIONS), plan.media_seed(), plan.clip(heard))
                samples.append(_comparison(plan, "video_audio", seen, heard, video, license=PICTURE_LICENSE))
    for _ in range(plan.begin("video_said")):
        for heard in CONCEPTS:
            video = Video(plan.rng.choice(CONCEPTS), plan.rng.choice(MOTIONS), plan.media_seed(), plan.clip(heard))
            samples.append(plan.sample("video_said", "audio_find", heard, video, license=PICTURE_LICENSE))
    return samples


def plan_long_video(plan: Planner) -> list[PlannedSample]:
    """Films of four to six scenes: which concept comes first or last."""
    samples = []
    for number in range(plan.begin("long_video_order")):
        concepts = plan.rng.sample(CONCEPTS, plan.rng.randint(4, 6))
        film = Film(tuple(Video(name, plan.rng.choice(MOTIONS), plan.media_seed()) for name in concepts))
        question, answer = (("comes_first", concepts[0]), ("comes_last", concepts[-1]))[number % 2]
        samples.append(plan.sample("long_video_order", question, answer, film, license=PICTURE_LICENSE))
    return samples


def plan_dialogue(plan: Planner) -> list[PlannedSample]:
    """The media tasks and a few more in written form, and sums."""
    rounds, times = plan.begin("exercise_rounds"), plan.begin("text_sum")
    written = texts.dialogues(plan.split, rounds, plan.seed) + texts.sums(times)
    return [plan.sample(one.task, one.question, one.answer, reasoning=one.reasoning) for one in written]


def plan_text(plan: Planner) -> list[PlannedSample]:
    """Plain text: stories and library documentation."""
    samples = []
    for story in texts.stories(plan.split, plan.begin("stories"), plan.seed):
        samples.append(PlannedSample({"text": story, "task": "story", "lang": "en", "license": SPEECH_LICENSE}))
    for text in texts.documentation(plan.scale)[plan.split]:
        samples.append(PlannedSample({"text": text, "task": "documentation", "lang": "en", "license": DOC_LICENSE}))
    return samples


def plan_chat(plan: Planner) -> list[PlannedSample]:
    """One or two questions about a clip, a picture or a text, under a system turn that says how to reply."""
    samples = []
    for number in range(plan.begin("sft_format")):
        order, (form, pattern) = list(texts.FORMATS.items())[number % len(texts.FORMATS)]
        messages: list[dict] = [{"role": "system", "content": [{"type": "text", "text": order}]}]
        members: dict[str, Media] = {}
        for letter in "ab"[: plan.rng.randint(1, 2)]:
            word, name, media = plan.rng.choice(texts.WORDS), plan.rng.choice(CONCEPTS), None
            kind = plan.rng.choice(("heard", "seen", "read"))
            if kind == "heard":
                media, question, answer = plan.clip(word), "what is said?", word
            elif kind == "seen":
                media, question, answer = plan.picture(name), "what is this?", name
            else:
                question, answer = f"{word}\nwhat is said?", word
            parts = []
            if media is not None:
                medium, extension = KINDS[type(media)]
                members[f"{letter}.{extension}"] = media
                parts.append({"type": medium, medium: f"{letter}.{extension}"})
            messages += _turn(question, form.format(answer), *parts)
        content = {"messages": messages, "task": "sft_format", "pattern": pattern, "lang": "en"}
        samples.append(PlannedSample({**content, "license": PICTURE_LICENSE}, members))
    return samples


def _plan_replies(
    plan: Planner, task: str, speakers: Iterable[str], *, is_asked_aloud: bool = False
) -> list[PlannedSample]:
    """Requests to say a phrase, written or asked with a clip of it; the reply is its text and its speech."""
    samples = []
    for phrase in texts.talk_phrases(plan.seed)[plan.split][: plan.begin(task)]:
        for speaker in speakers:
            if is_asked_aloud:
                sample = plan.sample(task, "transcribe", phrase, plan.clip(phrase))
            else:
                sample = plan.sample(task, f"say: {phrase}", phrase)
            reply = f"{'ab'[len(sample.media)]}.flac"
            sample.content["messages"][1]["content"].append({"type": "audio", "audio": reply})
            sample.content["speaker"] = speaker
            samples.append(PlannedSample(sample.content, {**sample.media, reply: Reply(phrase, speaker)}))
    return samples


def plan_talk(plan: Planner) -> list[PlannedSample]:
    """Spoken replies by the named speakers, at 24 kHz."""
    return _plan_replies(plan, "talker", SPEAKERS)


def plan_talk_asked(plan: Planner) -> list[PlannedSample]:
    """Spoken replies to spoken questions. A source of its own: a codec learns every clip of its sources."""
    return _plan_replies(plan, "talker_asked", SPEAKERS, is_asked_aloud=True)


def plan_talk_new_speaker(plan: Planner) -> list[PlannedSample]:
    """The same by a speaker of whom there is little."""
    return _plan_replies(plan, "speaker", NEW_SPEAKERS)


SOURCES: dict[str, Callable[[Planner], list[PlannedSample]]] = {
    "long_audio": plan_long_audio,
    "speech": plan_speech,
    "mixed": plan_mixed,
    "sums": plan_sums,
    "pictures": plan_pictures,
    "speech_other": plan_speech_other,
    "audio_understanding": plan_audio_understanding,
    "dialogue": plan_dialogue,
    "text": plan_text,
    "digits": plan_digits,
    "video": plan_video,
    "video_audio": plan_video_audio,
    "long_video": plan_long_video,
    "chat": plan_chat,
    "talk": plan_talk,
    "talk_new_speaker": plan_talk_new_speaker,
    "talk_asked": plan_talk_asked,
}


def plan_source(split: str, source: str, scale: float, seed: int) -> list[PlannedSample]:
    """The samples of one source in their shuffled order."""
    plan = Planner(split, scale, seed)
    plan.num_media = list(SOURCES).index(source) * 1_000_000
    samples = SOURCES[source](plan)
    random.Random(f"order/{split}/{source}/{seed}").shuffle(samples)
    return samples
