"""The corpus of human recordings from a small package made here: what is read, what is left out, what splits share."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from data.tuxpaint import packages, prepare, stamps, tasks  # noqa: E402

RATE_HZ = 22_050
KINDS = {
    "animals": (
        ("horse", "cheval", "конь"),
        ("cow", "vache", "корова"),
        ("yak", "yack", "як"),
        ("crab", "crabe", "краб"),
    ),
    "food": (
        ("pear", "poire", "груша"),
        ("bread", "pain", "хлеб"),
        ("leek", "poireau", "порей"),
        ("corn", "maïs", "маис"),
    ),
    "town": (
        ("house", "maison", "дом"),
        ("bridge", "pont", "мост"),
        ("church", "église", "храм"),
        ("sign", "panneau", "знак"),
    ),
}


def say(path: Path, seconds: float, seed: int, loudness: float = 0.4) -> None:
    """Noise with silence before and after it."""
    wave = np.random.default_rng(seed).uniform(-loudness, loudness, int(seconds * RATE_HZ))
    wave = np.concatenate([np.zeros(RATE_HZ // 2), wave, np.zeros(RATE_HZ // 2)])
    soundfile.write(path, np.stack([wave, wave], axis=1), RATE_HZ, format="OGG", subtype="VORBIS")


def draw(path: Path, seed: int) -> None:
    """A block of noise in the middle of a transparent picture."""
    pixels = np.zeros((120, 150, 4), np.uint8)
    pixels[30:90, 40:110] = np.random.default_rng(seed).integers(0, 255, (60, 70, 4))
    pixels[30:90, 40:110, 3] = 255
    Image.fromarray(pixels, "RGBA").save(path)


def add_stamp(folder: Path, name: str, captions: dict[str, str], seed: int, spoken: tuple[str, ...] = ()) -> None:
    """A stamp with a picture, a sound effect and a spoken caption in each language of ``spoken``."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [captions["en"], *(f"{lang}.utf8={text}" for lang, text in captions.items() if lang != "en")]
    path.with_suffix(".txt").write_text("\n".join(lines) + "\n", "utf-8")
    draw(path.with_suffix(".png"), seed)
    say(path.with_suffix(".ogg"), 0.3, seed)
    for number, lang in enumerate(spoken):
        say(path.with_name(f"{path.name}_desc_{lang}.ogg"), 0.6 + 0.1 * number, 100 * seed + number)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with usr/share of both packages: twelve things, copies and faults, numerals by two people."""
    root = tmp_path_factory.mktemp("debian")
    folder = root / packages.STAMPS[1]
    for kind, things in KINDS.items():
        for number, (en, fr, ru) in enumerate(things):
            captions = {"en": f"A {en}.", "fr": f"Un {fr}.", "ru": f"{ru.title()}!"}
            add_stamp(folder, f"{kind}/{en}", captions, len(kind) * 10 + number, ("fr", "ru"))
    add_stamp(folder, "animals/horse2", {"en": "A horse.", "fr": "Un destrier."}, 1)
    (folder / "animals/horse2_desc_fr.ogg").write_bytes((folder / "animals/cow_desc_fr.ogg").read_bytes())
    add_stamp(folder, "town/quiet", {"en": "Quiet.", "fr": "Silence."}, 2)
    say(folder / "town/quiet_desc_fr.ogg", 0.5, 2, loudness=0.0)
    add_stamp(folder, "town/speech", {"en": "A speech.", "fr": "Un discours que personne ne lit si vite."}, 3, ("fr",))
    for digit, (en, fr) in enumerate((("zero", "zéro"), ("one", "un"), ("two", "deux"))):
        add_stamp(folder, f"symbols/math/{digit}", {"en": f"{en}.", "fr": f"{fr}."}, 50 + digit, ("fr",))
        for number, suffix in enumerate(("", "_en_GB", "_fr")):
            say(folder / f"symbols/math/{digit}{suffix}.ogg", 0.4, 900 + 10 * digit + number)
    data = root / packages.POCKETSPHINX[1]
    for part, transcription in (("cards", "cards.transcription"), ("librivox", "transcription")):
        (data / part).mkdir(parents=True)
        (data / part / transcription).write_text("<s> ten of  clubs </s> (001)\n")
        say(data / part / "001.wav", 0.7, 7)
    return root


@pytest.fixture(scope="module")
def corpus(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(packages.ROOT_VARIABLE, str(root))
        return prepare.prepare(tmp_path_factory.mktemp("tuxpaint"), jobs=1)


@pytest.fixture(scope="module")
def samples(corpus: Path) -> list[dict]:
    """Every sample as the stock library reads it: ``json`` parsed, media as bytes; ``split`` and ``source`` added."""
    manifest = json.loads((corpus / "manifest.json").read_text())
    return [
        {**sample, "json": json.loads(sample["json"]), "split": split, "source": source}
        for split, sources in manifest.items()
        for source, entry in sources.items()
        for sample in webdataset.WebDataset([str(corpus / shard) for shard in entry["shards"]], shardshuffle=False)
    ]


def answer(sample: dict) -> str:
    return sample["json"]["messages"][1]["content"][0]["text"]


def of_task(samples: list[dict], *names: str) -> list[dict]:
    return [sample for sample in samples if sample["json"]["task"] in names]


def test_captions_are_normalised() -> None:
    text = "A  Horse.\nfr.utf8=Un e\u0301talon !\nde.utf8=\nnot a caption\nzh_CN.utf8=马。\n"
    assert stamps.parse_captions(text) == {"en": "a horse", "fr": "un étalon", "zh_CN": "马"}
    assert stamps.parse_captions("") == {}


def test_manifest_counts_what_the_stock_reader_finds(corpus, samples):
    manifest = json.loads((corpus / "manifest.json").read_text())
    found = Counter((sample["split"], sample["source"]) for sample in samples)
    stated = {(split, name): entry["samples"] for split, sources in manifest.items() for name, entry in sources.items()}
    assert found == stated
    for sample in samples:
        parts = [part for message in sample["json"].get("messages", []) for part in message["content"]]
        named = [part[kind] for part in parts for kind in ("audio", "image") if part["type"] == kind]
        assert named == [member for member in sample if member.endswith((".flac", ".png"))]


def test_stamps_alike_lie_together(root):
    found = stamps.read_stamps(root / packages.STAMPS[1])
    groups = {frozenset(stamp.name for stamp in group) for group in stamps.group_stamps(found)}
    together = {"animals/horse", "animals/horse2", "animals/cow"}  # a caption, and a recording, in common
    assert next(group for group in groups if "animals/horse" in group) == together
    assert {"town/house"} in groups


def test_splits_share_no_stamp_and_no_caption(corpus, samples):
    names = {
        split: facts["names"] for split, facts in json.loads((corpus / "about.json").read_text())["stamps"].items()
    }
    assert sum(map(len, names.values())) == len(set().union(*names.values())) == 18
    assert len(names["heldout"]) >= 2 and len(names["validation"]) >= 1
    said = {split: set() for split in names}
    for sample in of_task(samples, "spoken_caption", "picture_caption", "text_translate", "long_first"):
        said[sample["split"]].add((sample["json"]["lang"], answer(sample)))
    assert said["train"] and said["heldout"] and said["validation"]
    assert not said["train"] & said["heldout"] and not said["train"] & said["validation"]
    assert not said["validation"] & said["heldout"]
    pictures = {split: {s["a.png"] for s in samples if s["split"] == split and "a.png" in s} for split in names}
    assert not pictures["train"] & pictures["heldout"]


def test_faulty_recordings_and_copies_are_left_out(corpus, samples):
    about = json.loads((corpus / "about.json").read_text())
    assert about["left_out"] == {"says less than its caption": 1, "silent or too short": 1}
    heard = Counter(s["json"]["speaker"] for s in of_task(samples, "spoken_caption") if s["split"] != "train")
    in_train = Counter(s["json"]["speaker"] for s in of_task(samples, "spoken_caption") if s["split"] == "train")
    # 12 things, of which a copy under another caption takes the cow's; three numerals, in train.
    assert heard["fr/caption"] + in_train["fr/caption"] // 3 == 11 + 3
    assert heard["ru/caption"] + in_train["ru/caption"] // 3 == 12
    assert in_train["en_US/numeral"] == 3 * 3 and not heard["en_US/numeral"]
    assert about["speech"]["ru"]["train"]["clips"] == in_train["ru/caption"] // 3


def test_a_second_speaker_is_heard_in_heldout_alone(samples):
    new = of_task(samples, "spoken_new_speaker")
    assert {sample["split"] for sample in new} == {"heldout"}
    assert Counter(sample["json"]["speaker"] for sample in new) == {"fr/numeral": 3, "en_GB/numeral": 3}
    others = {s["json"].get("speaker") for s in samples if s["json"]["task"] != "spoken_new_speaker"}
    assert not others & {"fr/numeral", "en_GB/numeral"}
    train = {answer(sample) for sample in of_task(samples, "spoken_caption") if sample["split"] == "train"}
    assert {answer(sample) for sample in new} <= train


def test_speech_is_trimmed_and_resampled_and_train_hears_it_at_three_speeds(samples):
    seconds: dict[str, list[float]] = {}
    for sample in of_task(samples, "spoken_caption"):
        wave, rate_hz = soundfile.read(io.BytesIO(sample["a.flac"]))
        assert rate_hz == 16_000 and wave.ndim == 1 and 0.6 < np.abs(wave).max() < 0.75
        assert np.abs(wave[: rate_hz // 10]).max() > 0.1  # the half second of silence is gone
        if sample["split"] == "train" and sample["json"]["speaker"] == "fr/caption" and answer(sample) != "un cheval":
            seconds.setdefault(answer(sample), []).append(len(wave) / rate_hz)
    assert len(seconds) > 3
    for lengths in seconds.values():
        fast, usual, slow = sorted(lengths)
        assert 0.6 < usual < 0.75
        assert fast / usual == pytest.approx(1 / 1.1, abs=0.01) and slow / usual == pytest.approx(1 / 0.9, abs=0.01)


def test_pictures_stand_over_white_and_keep_still_in_heldout(samples):
    seen = [sample["a.png"] for sample in of_task(samples, "picture_caption") if sample["split"] == "heldout"]
    image = np.asarray(Image.open(io.BytesIO(seen[0])))
    assert image.shape == (64, 64, 3)
    assert (image[:3] == 255).all() and (image[-3:] == 255).all() and image[20:40].std() > 30
    kinds = {answer(sample) for sample in of_task(samples, "picture_kind")}
    assert kinds == {"animals", "food", "town", "symbols"}


def test_a_match_is_as_often_as_not_and_another_picture_is_of_another_kind(samples):
    for split in ("train", "heldout"):
        found = Counter(answer(sample) for sample in of_task(samples, "match") if sample["split"] == split)
        assert found["same"] == found["different"] > 0


def test_questions_name_the_language(samples):
    for sample in of_task(samples, "spoken_caption", "picture_caption"):
        question = sample["json"]["messages"][0]["content"][-1]["text"]
        assert question.startswith(f"{sample['json']['lang']}: what is ")


def test_out_of_domain_speech_is_heldout_alone(samples):
    ood = [sample for sample in samples if sample["source"] == "ood_speech"]
    assert [answer(sample) for sample in ood] == ["ten of clubs", "ten of clubs"]
    assert {sample["split"] for sample in ood} == {"heldout"}
    assert {sample["json"]["license"] for sample in ood} == {"BSD-2-Clause"}


@pytest.mark.slow
def test_the_same_bytes_come_out_again(root, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv(packages.ROOT_VARIABLE, str(root))
    again = prepare.prepare(tmp_path, jobs=2)
    assert again.name == corpus.name
    digests = [
        {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.*")}
        for folder in (corpus, again)
    ]
    assert len(digests[0]) > 18 and digests[0] == digests[1]
    assert prepare.prepare(tmp_path) == again


def test_long_rows_hold_one_speaker_and_last_10_to_16_seconds():
    spoken = [stamps.SpokenCaption(Path(f"{n}.ogg"), "fr", "fr/caption", f"mot {n}", f"a/{n}") for n in range(60)]
    seconds = {one.path: 0.8 + 0.05 * (number % 7) for number, one in enumerate(spoken)}
    split = tasks.Split("validation", [], spoken, seconds, [], None)
    planned = tasks.plan_source(split, "long_audio", seed=0)
    assert len(planned) == tasks.NUM_SAMPLES["long_first"][1]
    for sample in planned:
        paths = sample.media["a.flac"].paths
        total = sum(seconds[path] for path in paths) + 0.35 * (len(paths) - 1)
        assert 10.0 <= total <= 16.0
        assert sample.content["messages"][1]["content"][0]["text"] == f"mot {paths[0].stem}"


@pytest.mark.parametrize("given", [True, False])
def test_a_missing_package_is_named_with_the_command(given, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get
    if given:
        monkeypatch.setenv(packages.ROOT_VARIABLE, str(tmp_path))
    else:
        monkeypatch.delenv(packages.ROOT_VARIABLE, raising=False)
    absent = ("no-such-package", "usr/share/no-such-package")
    with pytest.raises(ValueError, match="apt-get download no-such-package && dpkg-deb -x no-such-package_"):
        packages.find(absent, tmp_path / "cache")
