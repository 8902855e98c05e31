"""``omni-train data``: prepare a corpus, index and check shards, write codes and preference pairs into new ones.

Heavy imports happen inside the commands, so that a wrong argument is answered in seconds.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
from pathlib import Path

from omni_train import config as configuration
from omni_train.config import ConfigError

CODES_EPILOG = """examples:
  omni-train data codes .cache/corpus/tiny/current --codec runs/tiny/codec/export --out codes --only '*/talk/*.tar'
  omni-train data codes speech --codec mimi --out speech_codes --codebooks 16     a local folder of transformers' Mimi

The speech of a sample is the clip of its last reply, else its only clip. Every shard is written anew under --out with
KEY.codes.npy (int16 [codebooks, frames]) beside its other members; those without speech are copied, and a tokenizer/
beside them, so that --out is a data.root. Under torchrun the ranks share the shards.
"""

PAIRS_EPILOG = """examples:
  omni-train data pairs runs/tiny/data/codes --only 'train/talk/*.tar' --out pairs \\
    --talker runs/tiny/talker_cpt/export --through runs/tiny/code2wav/export \\
    --judge runs/tiny/aut_pretrain/export \\
    +init.thinker=runs/tiny/s3_long_context/export model=tiny stage.yarn_factor=4

A reply to each sample is drawn with each --heat; the best is written as KEY.codes.npy, the worst as
KEY.rejected.codes.npy: by the character error rate of what AuT hears, less --likeness-weight times the likeness to the
speaker's own clip. Cooler replies are clearer and more alike: of both kinds there is more to prefer. Under torchrun
the ranks share the shards.
"""

LAYOUT_EPILOG = """Layouts of a sample:
  messages  KEY.json with "messages" or "text", and the media members that it names (the default)
  pairs     one medium (jpg png webp, flac wav mp3 ogg, mp4) and its text: KEY.txt, or a field of KEY.json
  text      one text: KEY.txt, or a field of KEY.json

A source of a mixture sets the same values: {shards: [laion/*.tar], weight: 1, layout: pairs, prompt: "What is shown?"}.
Each set of values has its own index: SHARD.idx for messages, SHARD.LAYOUT-HASH.idx for the others. Training writes
what is missing by itself; a job that a launcher started ends with the command instead.
"""

INDEX_EPILOG = f"""examples:
  omni-train data index .cache/corpus/tiny/current --tokenizer .cache/corpus/tiny/current/tokenizer
  omni-train data index laion --tokenizer TOKENIZER --layout pairs                       as img2dataset writes them
  omni-train data index asr --tokenizer TOKENIZER --layout pairs --text-field transcript --prompt "What is said?"

{LAYOUT_EPILOG}"""

CHECK_EPILOG = f"""examples:
  omni-train data check .cache/corpus/tiny/current
  omni-train data check laion --layout pairs                                             the index of these values

{LAYOUT_EPILOG}"""


def add_data_commands(commands: argparse._SubParsersAction) -> None:
    """The parser of ``omni-train data`` and of its actions."""
    raw = argparse.RawDescriptionHelpFormatter
    data = commands.add_parser("data", help="prepare a corpus, index shards, check shards")
    actions = data.add_subparsers(dest="action", required=True, metavar="action")
    prepare = actions.add_parser("prepare", help="make a corpus of data/, its tokenizer and its index")
    prepare.add_argument("name", help="a folder of data/: tiny, tuxpaint")
    prepare.add_argument("--out", help="default .cache/corpus/NAME")
    prepare.add_argument("--vocab-size", type=int, help="of its tokenizer; default that of conf/corpus/NAME.yaml")
    what = "write the index beside every shard of a folder"
    index = actions.add_parser("index", help=what, description=what, epilog=INDEX_EPILOG, formatter_class=raw)
    index.add_argument("--tokenizer", required=True, help="a transformers folder")
    what = "read every shard strictly and compare it with its index"
    check = actions.add_parser("check", help=what, description=what, epilog=CHECK_EPILOG, formatter_class=raw)
    what = "write shards anew with the codes of their speech"
    codes = actions.add_parser("codes", help=what, description=what, epilog=CODES_EPILOG, formatter_class=raw)
    codes.add_argument("--codec", required=True, help="the export of stage codec, or a local folder of Mimi")
    what = "write shards anew with two replies of a Talker to each sample, the better and the worse"
    pairs = actions.add_parser("pairs", help=what, description=what, epilog=PAIRS_EPILOG, formatter_class=raw)
    pairs.add_argument("folder", help="its *.tar are the shards, also in folders below")
    pairs.add_argument("--talker", required=True, help="the export of a Talker's stage")
    pairs.add_argument("--through", required=True, help="the export of code2wav, which makes the replies heard")
    pairs.add_argument("--judge", required=True, help="the export of aut_pretrain, which hears them")
    pairs.add_argument("--question", default="what is said?", help="that AuT is asked (default: what is said?)")
    what = "how replies to each sample are drawn, one a number: stock's temperatures times it (default 1 1 0.3 0.3)"
    pairs.add_argument("--heat", type=float, nargs="+", default=[1.0, 1.0, 0.3, 0.3], help=what)
    pairs.add_argument("--likeness-weight", type=float, default=0.1, help="against the error rate (default 0.1)")
    pairs.add_argument("--margin", type=float, default=0.05, help="least difference of a pair's scores (default 0.05)")
    pairs.add_argument("overrides", nargs="*", help="of stage talker_dpo: +init.thinker=EXPORT, model=PRESET, ...")
    for action in (codes, pairs):
        action.add_argument("--out", required=True, help="folder of the new shards, which keep their names in it")
        action.add_argument("--only", default="**/*.tar", help="pattern of shards below the folder (default all)")
    codes.add_argument("--codebooks", type=int, help="take the first so many (default all that the codec has)")
    for action in (index, check, codes):
        action.add_argument(
            "folder", help="its *.tar are the shards, also in folders below; without any, its *.jsonl and *.parquet"
        )
        action.add_argument("--layout", default="messages", help="messages (default), pairs or text")
        action.add_argument("--prompt", default="", help="pairs: what the user says after the medium (default nothing)")
        action.add_argument("--text-field", default="", help="the json field with the text (default KEY.txt if there)")
        action.add_argument("--use-audio-in-video", action="store_true", help="pairs: a video's sound is heard too")


def command_data(options: argparse.Namespace, arguments: list[str]) -> int:
    if options.action == "prepare":
        from omni_train.corpus import prepare_corpus

        prepare_corpus(options.name, Path(options.out or f".cache/corpus/{options.name}"), options.vocab_size)
        return 0
    if options.action == "pairs":
        return write_pairs(options)
    from omni_train.data.index import check_shard, expand
    from omni_train.data.layouts import layout_id
    from omni_train.data.rows import ROW_SUFFIXES

    layout = configuration.LayoutConfig(
        layout=options.layout,
        prompt=options.prompt,
        text_field=options.text_field,
        use_audio_in_video=options.use_audio_in_video,
    )
    if options.action == "codes":
        return write_codes(options, layout)
    folder = Path(options.folder)
    # Row files beside tar shards are what a tool wrote about them.
    rows = [suffix for suffix in ROW_SUFFIXES if any(folder.rglob(f"*{suffix}"))]
    suffixes = [".tar"] if any(folder.rglob("*.tar")) else rows or [".tar"]
    shards = expand([f"{folder}/**/*{suffix}" for suffix in suffixes])
    if options.action == "index":
        from omni_train.corpus import index_shards

        indexes = index_shards(shards, Path(options.tokenizer), layout, math.inf)
        print(f"{len(shards)} shards indexed")
    else:
        indexes = [check_shard(shard, layout_id(layout)) for shard in shards]
        samples = sum(index.num_samples for index in indexes)
        print(f"{len(shards)} shards, {samples:,} samples: whole and as indexed")
    bad = [sample for index in indexes for sample in index.bad]
    listed = [f"{sample.shard}: sample {sample.key!r}: byte {sample.offset:,}: {sample.error}" for sample in bad]
    if bad and not any(index.num_samples for index in indexes):
        raise ConfigError(f"none of the {len(bad):,} samples can be used; the first: {listed[0]}")
    for line in listed:
        print(f"bad: {line}")
    if bad:
        print(f"{len(bad):,} bad samples; a run leaves them out only as far as data.max_bad_samples allows")
    return 0


def write_codes(options: argparse.Namespace, layout: configuration.LayoutConfig) -> int:
    import torch

    from omni_train.data.codes import add_codes
    from omni_train.models.codec import load_codec

    num_gpus = torch.cuda.device_count()
    device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % num_gpus}" if num_gpus else "cpu"
    encode, total = load_codec(Path(options.codec), options.codebooks, device), 0
    for shard, out in shards_of_rank(options):
        num_coded = add_codes(shard, out, encode, layout)
        total += num_coded
        print(f"{out}: {num_coded:,} samples with codes", flush=True)
    if not total and "RANK" not in os.environ:
        raise ConfigError(f"no sample under '{options.folder}' has speech; see --only and --layout")
    return 0


def write_pairs(options: argparse.Namespace) -> int:
    from omni_train.engine import parallel
    from omni_train.pairs import PairMaker, add_pairs

    config = configuration.load("talker_dpo", options.overrides)
    ranks = parallel.start(config.engine)
    shards = shards_of_rank(options)
    parallel.any_rank(False, ranks.device)  # the tokenizer is there
    talker, through, judge = (Path(folder) for folder in (options.talker, options.through, options.judge))
    maker = PairMaker(config, talker, through, judge, ranks, options.question)
    for shard, out in shards:
        num_pairs = add_pairs(shard, out, maker, options.heat, options.likeness_weight, options.margin)
        print(f"{out}: {num_pairs:,} pairs", flush=True)
    parallel.stop()
    return 0


def shards_of_rank(options: argparse.Namespace) -> list[tuple[Path, Path]]:
    """(shard, new shard) of this rank's share of the shards; rank 0 copies the tokenizer that lies beside them."""
    from omni_train.data.index import expand

    root, out = Path(options.folder), Path(options.out)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank == 0 and (root / "tokenizer").is_dir():
        shutil.copytree(root / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    shards = [Path(shard) for shard in expand([f"{options.folder}/{options.only}"])]
    return [(shard, out / shard.relative_to(root)) for shard in shards[rank::world]]
