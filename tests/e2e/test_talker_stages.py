"""The Talker's stages through the real command, on spoken replies whose codes are random."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from corpus import micro_corpus, omni_train, overrides
from test_resume import assert_same, kill_command, num_steps_logged, outcome

PHRASES = ("red dog runs", "blue frog jumps", "green lion sleeps", "white goat eats")


def npy(codes: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, codes)
    return file.getvalue()


def write_shard(path: Path, num_samples: int = 24, num_groups: int = 4, bad: dict[int, dict] | None = None) -> None:
    """Requests to say a phrase, each with the codes of two replies. ``bad``: what is wrong with which sample."""
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(num_samples):
            wrong = (bad or {}).get(number, {})
            phrase = PHRASES[number % len(PHRASES)]
            codes = rng.integers(0, 256, (2, num_groups, 18 + number % 5)).astype(np.int16)
            content = {"speaker": wrong.get("speaker", "anna"), "task": "talk", "lang": "en", "license": "none"}
            content["messages"] = [
                {"role": "system", "content": "you speak"},
                {"role": "user", "content": f"say: {phrase}"},
                {"role": "assistant", "content": wrong.get("text", phrase)},
            ]
            members = {"codes.npy": wrong.get("codes", codes[0]), "rejected.codes.npy": codes[1]}
            encoded = {name: npy(value) for name, value in members.items()}
            writer.write({"__key__": f"k{number:03d}", "json": json.dumps(content).encode(), **encoded})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A corpus of spoken replies with the micro corpus's tokenizer."""
    folder = tmp_path_factory.mktemp("speech")
    for split in ("train", "validation"):
        for source in ("talk", "talk_asked", "talk_new_speaker"):
            write_shard(folder / split / source / "000000.tar", 24 if split == "train" else 6)
    (folder / "tokenizer").symlink_to(micro_corpus() / "tokenizer")
    return folder


def stage_values(corpus: Path, run_dir: Path, *extra: str) -> list[str]:
    values = [value for value in overrides(run_dir) if not value.startswith("data.root=")]
    return [*values, f"data.root={corpus}", "stage.total_tokens=900", *extra]


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pretrained(corpus, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("run") / "talker_pretrain"
    done = omni_train("train", "talker_pretrain", *stage_values(corpus, run_dir))
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def test_pretraining_logs_codes_residuals_and_the_router(pretrained) -> None:
    found = records(pretrained)
    assert found[0]["step"] == 1 and {"loss", "loss/residuals", "loss/router", "loss/text"} <= set(found[0])
    assert abs(found[0]["loss"] - np.log(1280)) < 1.5 and abs(found[0]["loss/residuals"] - np.log(256)) < 1.5
    assert any(name.startswith("eval/loss/") for name in found[-1])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["talker_cpt", "talker_dpo", "talker_speaker"])
def test_later_stages_start_from_its_export(stage, corpus, pretrained, tmp_path) -> None:
    export = pretrained / "export"
    init = [f"+init.talker={export}", f"+init.mtp={export}"]
    done = omni_train("train", stage, *stage_values(corpus, tmp_path / stage, *init))
    assert done.returncode == 0, done.stdout + done.stderr
    first = records(tmp_path / stage)[0]
    if stage == "talker_dpo":
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-5) and first["dpo/margin"] == pytest.approx(0, abs=1e-5)


BAD = {
    1: {"speaker": "nobody"},
    2: {"codes": np.zeros((3, 30), np.int16)},
    3: {"codes": np.full((4, 30), 256, np.int16)},
    4: {"codes": np.zeros((4, 2), np.int16)},
    5: {"codes": np.zeros((4, 30), np.float32)},
    6: {"text": ""},
}
ERRORS = {
    1: "the model has no speaker 'nobody'",
    2: "it has 3 codes a frame, the model 4",
    3: "it has the code 256; codes lie in 0 … 255",
    4: "its 2 frames are fewer than",
    5: "it is float32 [4, 30]; codes must be int16",
    6: "the last reply has no text to speak",
}


def test_bad_speech_targets_are_left_out_and_named(corpus, tmp_path) -> None:
    write_shard(tmp_path / "train" / "talk" / "bad.tar", 24, bad=BAD)
    write_shard(tmp_path / "validation" / "talk" / "good.tar", 4)
    (tmp_path / "tokenizer").symlink_to(micro_corpus() / "tokenizer")
    one_source = ["~mixture.talk_asked", "~validation.talk_asked"]
    values = stage_values(tmp_path, tmp_path / "run", "data.max_bad_samples=6", "stage.total_tokens=2500", *one_source)
    done = omni_train("train", "talker_pretrain", *values)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines():
        record = json.loads(line)
        found[record["key"]] = record["error"]
        assert record["shard"].endswith("bad.tar")
    assert set(found) == {f"k{number:03d}" for number in BAD}
    for number, error in ERRORS.items():
        assert error in found[f"k{number:03d}"], found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", ["talker_pretrain", "talker_dpo", "talker_speaker"])
def test_a_killed_stage_goes_on_bit_for_bit(stage, corpus, pretrained, tmp_path) -> None:
    extra = ["stage.total_tokens=5000", "save_every_steps=2"]
    if stage != "talker_pretrain":
        extra += [f"+init.{name}={pretrained / 'export'}" for name in ("talker", "mtp")]
    straight, killed = tmp_path / "straight" / stage, tmp_path / "killed" / stage
    for run_dir in (straight, killed):
        command = ["train", stage, *stage_values(corpus, run_dir, *extra)]
        if run_dir is killed:
            kill_command(command, killed, lambda: num_steps_logged(killed) >= 3)
        done = omni_train(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(records(straight)) > 6
    assert_same(outcome(killed), outcome(straight))
