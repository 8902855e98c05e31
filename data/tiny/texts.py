"""Words, phrases, written exercises and library documentation: everything of the corpus that is text."""

from __future__ import annotations

import ast
import functools
import itertools
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data.tiny.pictures import BACKGROUNDS, CONCEPTS

COLOURS = tuple(BACKGROUNDS)
NOUNS = (
    *CONCEPTS,
    *("cat", "horse", "lion", "bear", "goat", "duck", "boy", "girl", "king", "doctor", "apple", "car", "train"),
    *("tree", "flower", "book", "chair", "table", "ball", "hat", "shoe"),
)
VERBS = (
    *("runs", "jumps", "sleeps", "eats", "sings", "swims", "flies", "walks", "talks", "falls", "waits", "plays"),
    *("laughs", "hides", "dances", "reads", "works", "cooks", "climbs", "spins"),
)
PLACES = ("here", "outside", "inside", "upstairs", "home", "away", "nearby", "abroad", "below", "downtown")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LEXICON = {"colours": COLOURS, "nouns": NOUNS, "verbs": VERBS, "places": PLACES, "numbers": NUMBERS}
WORDS = tuple(itertools.chain.from_iterable(LEXICON.values()))
FILLERS = (*COLOURS, *VERBS, *PLACES, *NUMBERS)
"""Words that are no names, for the tasks that hide one name among others."""

TALK = (
    ("red", "yellow", "green", "blue", "purple", "pink", "black", "white"),
    ("dog", "frog", "tiger", "turtle", "horse", "lion", "goat", "spider"),
    ("runs", "jumps", "sleeps", "eats"),
)
"""What replies are spoken of: "<colour> <animal> <verb>"."""

FORMATS = {
    "reply as json.": ('{{"answer": "{}"}}', r'\{"answer": "[^"\n]+"\}'),
    "reply in a sentence.": ("the answer is {}.", r"the answer is [^.\n]+\."),
    "reply as a list.": ("- {}", r"- [^\n]+"),
    "reply in brackets.": ("[{}]", r"\[[^\]\n]+\]"),
}
"""What a system turn asks for: how a reply is written so, and the regular expression of any such reply."""

DIGIT_WORDS = {
    "de": ("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"),
    "es": ("cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve"),
    "fr": ("zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf"),
    "it": ("zero", "uno", "due", "tre", "quattro", "cinque", "sei", "sette", "otto", "nove"),
    "pt": ("zero", "um", "dois", "três", "quatro", "cinco", "seis", "sete", "oito", "nove"),
}

# The first wording is the only one in validation and held-out.
QUESTIONS = {
    "transcribe": ("what is said?", "write what you hear."),
    "spoken_digit": ("which digit is said?",),
    "digit_image": ("which digit is this?", "what digit do you see?"),
    "picture_name": ("what is this?", "name the picture."),
    "picture_colour": ("which background colour?",),
    "count": ("how many?", "count them."),
    "same_or_different": ("same or different?", "do they match? same or different?"),
    "digit_sum": ("sum?", "what is the sum?"),
    "audio_find": ("which name is said?", "what name do you hear?"),
    "count_words": ("how many words?",),
    "man_or_woman": ("man or woman?",),
    "video_motion": ("what does it do?", "how does it move?"),
    "comes_first": ("what comes first?",),
    "comes_last": ("what comes last?",),
}
DOC_CHARS, LONG_DOC_CHARS = 1500, 4000


@functools.cache
def phrase_pools(seed: int) -> dict[str, tuple[str, ...]]:
    """Shuffled phrases of each split: "<colour> <noun> <verb> [<place>]" and "<noun> <verb> <place>".

    Of every five two are of the first form, two end in a place too and one is of the last. Splits share no run
    of three words: each such triple belongs to one split (8 % validation, 16 % held-out), a longer phrase to the split
    of both its triples.
    """
    rng = random.Random(f"phrases/{seed}")
    split_of: dict[tuple[str, ...], str] = {}
    pools: dict[str, tuple[list[str], ...]] = {split: ([], [], []) for split in ("train", "validation", "heldout")}
    for kind, words in enumerate(((COLOURS, NOUNS, VERBS), (NOUNS, VERBS, PLACES))):
        triples = list(itertools.product(*words))
        rng.shuffle(triples)
        for number, triple in enumerate(triples):
            share = number / len(triples)
            split_of[triple] = "validation" if share < 0.08 else "heldout" if share < 0.24 else "train"
            pools[split_of[triple]][kind].append(" ".join(triple))
    longer = list(itertools.product(COLOURS, NOUNS, VERBS, PLACES))
    rng.shuffle(longer)
    for phrase in longer:
        if split_of[phrase[:3]] == split_of[phrase[1:]]:
            pools[split_of[phrase[1:]]][2].append(" ".join(phrase))
    return {split: tuple(_interleave(*kinds)) for split, kinds in pools.items()}


def talk_phrases(seed: int) -> dict[str, tuple[str, ...]]:
    """All 256 phrases of TALK by split: 184 in train, 24 in validation, 48 held out. Every word is in train."""
    phrases = [" ".join(words) for words in itertools.product(*TALK)]
    random.Random(f"talk/{seed}").shuffle(phrases)
    return {"train": tuple(phrases[72:]), "validation": tuple(phrases[48:72]), "heldout": tuple(phrases[:48])}


def _interleave(three: list[str], places: list[str], four: list[str]) -> Iterator[str]:
    for group in zip(three[::2], four[::2], three[1::2], four[1::2], places, strict=False):
        yield from group


EXERCISES_A_ROUND = 24


class Exercise(NamedTuple):
    """A written question with its answer, and what the reply thinks before it."""

    task: str
    question: str
    answer: str
    reasoning: str = ""


def _exercises(rng: random.Random, phrases: tuple[str, ...]) -> Iterator[Exercise]:
    """The media tasks and a few more in written form, a round of each, without end.

    What a media task would hear or show stands before its question, where the clip or the picture will stand.
    Repeating comes most often and of words without grammar too: copying is what transcribing asks of an LLM.
    """

    def ask(content: str, question: str) -> str:
        return f"{content}\n{rng.choice(QUESTIONS[question])}"

    while True:
        phrase = rng.choice(phrases)
        word, name, digit = rng.choice(WORDS), rng.choice(CONCEPTS), rng.randrange(10)
        fillers = rng.sample(FILLERS, rng.choice((2, 4, 8)))
        fillers.insert(rng.randint(0, len(fillers)), name)
        colour, count = rng.choice(COLOURS), rng.randint(1, 5)
        words = " ".join(phrase.split()[: rng.randint(1, 4)])
        for said in (phrase, phrase, word, _jumble(rng, 4), _jumble(rng, 8), _jumble(rng, 8)):
            yield Exercise("text_repeat", ask(said, "transcribe"), said)
        for form in (str, spell):
            yield Exercise("text_digit", ask(form(NUMBERS[digit]), "spoken_digit"), str(digit))
        for said in (word, phrase):
            yield Exercise("text_unspell", ask(spell(said), "transcribe"), said)
        for said in (name, " ".join(fillers), " ".join(rng.sample(fillers, len(fillers)))):
            yield Exercise("text_find", ask(said, "audio_find"), name)
        yield Exercise("text_count_words", ask(words, "count_words"), str(len(words.split())))
        for _ in range(2):  # on lines of their own: after a space a name is another token, hard to compare
            first, second = rng.sample(CONCEPTS, 2)
            for other, verdict in ((first, "same"), (second, "different")):
                both = f"{first}\n{other}"
                yield Exercise("text_same", ask(both, "same_or_different"), verdict, reasoning=both)
        yield Exercise("text_digit", ask(NUMBERS[digit], "digit_image"), str(digit))
        yield Exercise("text_count", ask(" ".join([name] * count), "count"), str(count))
        yield Exercise("text_colour", ask(f"{colour} {name}", "picture_colour"), colour)
        yield Exercise("text_name", ask(f"a picture of a {colour} {name}", "picture_name"), name)
        yield Exercise("text_number", f"write in letters: {digit}", NUMBERS[digit])
        yield Exercise("text_spell", f"spell {word}", spell(word))


def _jumble(rng: random.Random, max_words: int) -> str:
    """Words without grammar: nothing but their source tells what comes next, so copying has to be learned."""
    return " ".join(rng.choices(WORDS, k=rng.randint(1, max_words)))


def spell(text: str) -> str:
    """Letters apart by a space, words by a comma: "a b , c d"."""
    return " , ".join(" ".join(word) for word in text.split())


def dialogues(split: str, num_rounds: int, seed: int) -> list[Exercise]:
    """``num_rounds`` rounds of exercises, over the phrases of ``split`` alone."""
    rng = random.Random(f"dialogues/{split}/{seed}")
    return list(itertools.islice(_exercises(rng, phrase_pools(seed)[split]), EXERCISES_A_ROUND * num_rounds))


def sums(num_times: int) -> list[Exercise]:
    """All 100 sums of two digits, ``num_times`` each, in a few written forms; a reply first thinks of both digits."""
    forms = ("{a} + {b} =", "{a} {b}\nsum?", "{x} {y}\nsum?", "{a} {y}\nsum?", "{a} {s}\nsum?")
    return [
        Exercise(
            "text_sum",
            forms[time % len(forms)].format(a=a, b=b, x=NUMBERS[a], y=NUMBERS[b], s=spell(NUMBERS[b])),
            str(a + b),
            reasoning=f"{a}\n{b}",
        )
        for time in range(num_times)
        for a in range(10)
        for b in range(10)
    ]


def stories(split: str, num_stories: int, seed: int) -> list[str]:
    """Plain texts of 3–12 phrases of ``split``, ended by full stops."""
    rng = random.Random(f"stories/{split}/{seed}")
    phrases = phrase_pools(seed)[split]
    return [" ".join(f"{phrase}." for phrase in rng.sample(phrases, rng.randint(3, 12))) for _ in range(num_stories)]


def _pieces(text: str) -> Iterator[str]:
    """Paragraphs of ``text`` joined to pieces of at most 1,500 characters (a longer paragraph is cut)."""
    piece = ""
    for paragraph in text.split("\n\n"):
        for start in range(0, len(paragraph), DOC_CHARS):
            part = paragraph[start : start + DOC_CHARS]
            if piece and len(piece) + len(part) + 2 > DOC_CHARS:
                yield piece
                piece = ""
            piece = f"{piece}\n\n{part}" if piece else part
    if len(piece) > 40:
        yield piece


def _docstrings(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text("utf-8", errors="replace"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) >= 60:
                yield docstring


@functools.cache
def documentation(scale: float) -> dict[str, list[str]]:
    """Texts of each split from the running Python: the language reference (``pydoc_data.topics``) and docstrings.

    Each module or topic is in one split: the 10th of every ten in validation, the 5th in held-out. Every third topic of
    more than 4,000 characters stays whole, for context splitting; all else is cut to pieces.
    """
    from pydoc_data.topics import topics

    stdlib = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in stdlib.glob("*.py") if not path.name.startswith("_sysconfigdata"))
    documents = [list(_docstrings(path)) for path in files[: max(10, round(scale * len(files)))]]
    documents += [[topics[name].strip()] for name in sorted(topics)[: max(10, round(scale * len(topics)))]]
    texts: dict[str, list[str]] = {"train": [], "validation": [], "heldout": []}
    seen: set[str] = set()
    num_long = 0
    for number, document in enumerate(documents):
        split = {9: "validation", 4: "heldout"}.get(number % 10, "train")
        for text in document:
            num_long += len(text) > LONG_DOC_CHARS
            is_whole = len(text) > LONG_DOC_CHARS and num_long % 3 == 0
            for piece in [text] if is_whole else _pieces(text):
                if piece not in seen:
                    seen.add(piece)
                    texts[split].append(piece)
    return texts
