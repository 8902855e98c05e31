"""What stock transformers makes of an assembled folder: spoken questions answered in text and sound.

    PYTHONPATH=. python tests/benchmark/whole.py FOLDER --run runs/quickstart [--items 48] [--temperature 0.9]

FOLDER is what `omni-train assemble` wrote; the questions are held-out phrases, each said by a voice that nothing was
trained on: "what is said?". Stock's own `generate` answers, as it draws by default, with the named voice of the
sample; the words of its wave are those that the recogniser of the run finds (RUN/recogniser.pt, trained on original
voices alone), beside what was said in the question and beside what the model itself wrote. The corpus must be there
(``make corpus``).
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import torch
from rollout import stock_inputs
from transformers import AutoTokenizer, Qwen3OmniMoeForConditionalGeneration
from transformers.generation import EosTokenCriteria

from omni_train import config as configuration
from omni_train.data.codes import speech_member
from omni_train.data.contracts import Sample
from omni_train.data.media_tokens import SAMPLES_PER_CODEC_FRAME
from omni_train.data.pipeline import DataPipeline
from omni_train.engine.parallel import Ranks
from omni_train.evaluation.capabilities import split_tasks
from omni_train.evaluation.speech import listener_of, swapped, word_accuracy
from omni_train.models.codec import codec_mel


def asked(sample: Sample) -> tuple[Sample, str]:
    """(the question of a sample without the speech of its reply, what that reply says)."""
    *messages, reply = sample.content["messages"]
    said = "".join(part["text"] for part in reply["content"] if part["type"] == "text").strip()
    members = {name: data for name, data in sample.members.items() if name != speech_member(sample.content)}
    messages = [*messages, {"role": "assistant", "content": said}]
    return Sample(sample.id, sample.shard, sample.key, {"messages": messages}, members), said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a whole model")
    parser.add_argument("--run", type=Path, required=True, help="the run whose recogniser listens")
    parser.add_argument("--items", type=int, default=48)
    what = "of the Talker's codes (default .9, stock's own); 0: the likeliest, without stock's repetition penalty"
    parser.add_argument("--temperature", type=float, default=0.9, help=what)
    parser.add_argument("overrides", nargs="*", help="of the corpus, e.g. data.root=FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = configuration.load("s2_general", ["engine=cpu1", "data.lanes=1", *options.overrides])
    data = DataPipeline(config, AutoTokenizer.from_pretrained(options.folder, local_files_only=True))
    if not (options.run / "recogniser.pt").exists():
        parser.error(f"{options.run} has no recogniser.pt: its speech was not measured yet")
    listener = listener_of(data, options.run, Ranks(0, 1, 0, torch.device("cpu")))
    ids = data.encoder.ids
    model, loading = Qwen3OmniMoeForConditionalGeneration.from_pretrained(
        options.folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    print(f"python {platform.python_version()}, torch {torch.__version__}, one thread")
    print(f"loading: {({name: list(found) for name, found in loading.items() if found}) or 'nothing missing'}")
    samples = split_tasks(data, {"talker_asked": "talk_asked"}, "heldout")["talker_asked"][: options.items]
    written, heard, of_its_own, started = [], [], [], time.perf_counter()
    for sample in samples:
        question, said = asked(sample)
        prompt, _ = data.encoder.prompt_and_answer(question)
        inputs = stock_inputs([prompt], ids.endoftext)
        # NOTE: stock counts a reply's tokens from its third and puts the end of the text where it finds the end of
        # sequence. The tokenizer of a small corpus cuts "assistant" in pieces, so that the last words would be lost.
        stops = {"thinker_eos_token_id": None, "thinker_stopping_criteria": [EosTokenCriteria(ids.im_end)]}
        stops["thinker_pad_token_id"] = ids.endoftext
        drawn = {"talker_temperature": options.temperature}
        if options.temperature == 0:
            drawn = {"talker_do_sample": False, "talker_repetition_penalty": 1.0}
        limits = {"thinker_max_new_tokens": 24, "talker_max_new_tokens": 64, "talker_pad_token_id": 0}
        answer, wave = model.eval().generate(**inputs, speaker=sample.content["speaker"], **stops, **limits, **drawn)
        text = data.tokenizer.decode(answer[0][prompt.num_tokens :], skip_special_tokens=True).strip()
        written.append((text, said))
        wave = wave.reshape(1, -1).float()
        wave = torch.nn.functional.pad(wave, (0, -wave.shape[1] % SAMPLES_PER_CODEC_FRAME))
        sound = listener.snap(listener.hear(codec_mel(wave), [wave.shape[1]])[0])
        heard.append((sound, said))
        of_its_own.append((sound, text or said))
    exact = sum(text == said for text, said in written) / len(written)
    print(f"{len(samples)} questions, {(time.perf_counter() - started) / len(samples):.2f} s each")
    print(f"text exact {exact:.3f}, words {word_accuracy(written):.3f}")
    control = word_accuracy(swapped(heard))
    print(f"words heard in the wave {word_accuracy(heard):.3f} (of another item: {control:.3f})")
    print(f"words heard of those it wrote {word_accuracy(of_its_own):.3f}")
    for (text, said), (sound, _) in list(zip(written, heard, strict=True))[:4]:
        print(f"    '{said}': wrote '{text}', said '{sound}'")


if __name__ == "__main__":
    main()
