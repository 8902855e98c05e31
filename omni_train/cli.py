"""The command ``omni-train``: read the arguments, check the configuration, start ranks, print one message on error.

Heavy imports happen inside the commands, so that a wrong argument is answered in seconds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from omni_train import config as configuration
from omni_train.cli_data import add_data_commands, command_data
from omni_train.config import ConfigError

EPILOG = """examples:
  omni-train data prepare tiny                        make the small corpus, its tokenizer and its index
  omni-train run recipes/tiny.yaml                    the whole curriculum; finished stages are skipped
  omni-train train s2_general stage.total_tokens=1e5  one stage with Hydra overrides; the same command resumes it
  omni-train train s2_general corpus=tuxpaint         the same stage on another corpus of conf/corpus/
  omni-train eval runs/tiny                           held-out capabilities, as the recipe asks
  omni-train report runs/tiny                         report.html and the result table

`omni-train COMMAND --help` shows a command's own examples.
"""

TRAIN_EPILOG = """examples:
  omni-train train s2_general                              on the tiny model, two CPU ranks, expert parallelism 2
  omni-train train s2_general engine=cpu1 stage.context=1024 run_dir=runs/mine
  omni-train train s2_general mixture.text.weight=0.3 '+mixture.more={shards: [laion/*.tar], weight: 1, layout: pairs}'
  omni-train train s2_general corpus=tuxpaint '~validation.text' '+validation.mine={shards: [mine/*.tar]}'
  omni-train train s1_encoders '~stage.components.audio_adapter' +init.all=runs/tiny/s1_adapters/export
  torchrun --nproc-per-node 8 -m omni_train.cli train s2_general model=small engine=zero1_ep8 data.lanes=8

Killed or stopped, the same command goes on from the newest checkpoint of run_dir. TERM and USR1 save first, then end
with status 85. Values lie in conf/STAGE.yaml and its groups conf/{model,corpus,mixture,validation,engine}/.
"""

RUN_EPILOG = """examples:
  omni-train run recipes/tiny.yaml
  omni-train run recipes/tiny.yaml run_dir=runs/second seed=1
  omni-train run recipes/tiny.yaml run_dir=runs/gpu engine=gpu1 engine.precision=fp32

The same command goes on where it was stopped. A stage writes run_dir/STAGE/; results and report lie in run_dir.
"""


EVAL_EPILOG = """examples:
  omni-train eval runs/tiny                                            what the recipe asks, into results.json
  omni-train eval runs/tiny --stage aut_pretrain                       only what it asks of one stage
  omni-train eval runs/tiny/s3_long_context/export --split validation  one export, printed only
  omni-train eval runs/tiny/s3_long_context/export --tasks long_audio_find --yarn off
  omni-train eval runs/tiny/aut_pretrain/export --window-sec 1 2 4 8   AuT transcribes with its own decoder
"""

ASSEMBLE_EPILOG = """examples:
  omni-train assemble omni model=tiny +init.thinker=runs/tiny/s3_long_context/export \\
    +init.talker=runs/tiny/talker_cpt/export +init.mtp=runs/tiny/talker_cpt/export \\
    +init.code2wav=runs/stock_voice/code2wav/export

Stock has the published ConvNet alone as Code2Wav's head (model.code2wav.head=conv; recipes/tiny_stock_voice.yaml).
Qwen3OmniMoeForConditionalGeneration.from_pretrained("omni") answers in text and speech. Where a user's video is heard
too, pass its generate() talker_use_audio_in_video=True beside use_audio_in_video=True: stock forgets its Talker.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(
        prog="omni-train",
        description="Train a Qwen3-Omni-class model whole, from shards to a transformers folder.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="command")

    raw = argparse.RawDescriptionHelpFormatter
    what = "run a recipe: its stages in order, finished ones skipped, a half-done one resumed"
    run = commands.add_parser("run", help=what, description=what, epilog=RUN_EPILOG, formatter_class=raw)
    run.add_argument("recipe", help="a YAML file of recipes/")
    run.add_argument("overrides", nargs="*", help="run_dir=FOLDER, and Hydra overrides for every stage")

    what = "run one stage, or go on with it where its run_dir stands"
    train = commands.add_parser("train", help=what, description=what, epilog=TRAIN_EPILOG, formatter_class=raw)
    train.add_argument("stage", help=f"one of: {', '.join(configuration.available())}")
    train.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. model=tiny engine=cpu2 stage.context=512")

    plan = commands.add_parser("plan", help="what a stage amounts to: parameters, steps, tokens; needs no data")
    plan.add_argument("stage", help=f"one of: {', '.join(configuration.available())}")
    plan.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. model=qwen3_omni_30b_a3b")

    what = "held-out capabilities, each beside a control that cannot know"
    evaluate = commands.add_parser("eval", help=what, description=what, epilog=EVAL_EPILOG, formatter_class=raw)
    evaluate.add_argument("folder", help="a recipe's run folder, or one export folder")
    evaluate.add_argument("--recipe", default="recipes/tiny.yaml", help="the recipe with tasks, model and engine")
    evaluate.add_argument("--stage", help="of a run folder: only this one; of an export: the stage that wrote it")
    evaluate.add_argument("--split", default="heldout", help="heldout (default) or validation")
    evaluate.add_argument("--yarn", choices=["on", "off"], default="on", help="off: drop the folder's YaRN")
    evaluate.add_argument("--tasks", nargs="*", help="only these tasks of an export folder")
    evaluate.add_argument("--window-sec", type=int, nargs="+", help="windows of an AuT export (default 1 8)")
    evaluate.add_argument("--through", help="of a Talker's export: the export of Code2Wav that it is heard through")
    evaluate.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. engine=cpu1")

    export = commands.add_parser("export", help="copy a finished stage's transformers folder")
    export.add_argument("run", help="the stage's run folder")
    export.add_argument("folder", help="where to write")

    what = "write the whole model as one transformers folder, from the exports of its stages"
    assemble = commands.add_parser("assemble", help=what, description=what, epilog=ASSEMBLE_EPILOG, formatter_class=raw)
    assemble.add_argument("folder", help="where to write")
    assemble.add_argument(
        "overrides", nargs="*", help="model=PRESET, corpus=NAME, +init.COMPONENT=EXPORT for each part"
    )

    report = commands.add_parser("report", help="write report.html and print the result table of a run folder")
    report.add_argument("run", help="a recipe's run folder")
    report.add_argument("--recipe", help="recipe whose bars, and whose comparison with its baseline, to print")

    add_data_commands(commands)
    return root


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line; overrides may also stand behind options, where argparse would not take them."""
    root = parser()
    options, rest = root.parse_known_args(arguments)
    strange = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if strange:
        root.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        options.overrides += rest
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the process's exit status. What a user can mend ends in one message on stderr and status 2."""
    from omni_train.launching.local import is_launched, prepare_rank, quiet, report_failure

    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    quiet()
    if is_launched():
        prepare_rank()
    try:
        return COMMANDS[options.command](options, arguments)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("OMNI_TRAIN_TRACEBACK") or not is_for_user(error):
            raise
        report_failure(f"omni-train: error: {error}")
        return 2


def is_for_user(error: BaseException) -> bool:
    """Whether our own code raised ``error``: then its message says what to mend; else it is a bug."""
    from omni_train.data.shard import DataError

    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return isinstance(error, (ConfigError, DataError)) or raised_in.split(".")[0] in ("omni_train", "data", "__main__")


def command_train(options: argparse.Namespace, arguments: list[str]) -> int:
    """One stage: in this process when a launcher set its rank, else on the configured number of local ranks."""
    from omni_train.launching.local import FAILURES, is_launched
    from omni_train.run import check_init, check_inputs, check_origins, check_unchanged, start_stage

    config = configuration.load(options.stage, options.overrides)
    if not is_launched():
        return start_stage(config, arguments[1:])
    if FAILURES not in os.environ:  # under torchrun nobody has checked yet
        if os.environ["RANK"] == "0":
            world = int(os.environ["WORLD_SIZE"])
            replace(config, engine=replace(config.engine, num_processes=world))  # checks lanes and experts against it
            check_unchanged(config)
            check_origins(config)
            check_init(config)
            check_inputs(config, is_launched=True)
        if (Path(config.run_dir) / "DONE").exists():  # a requeued job that had finished
            return 0
    from omni_train.train import train

    train(config)
    return 0


def command_run(options: argparse.Namespace, arguments: list[str]) -> int:
    from omni_train.launching.local import is_launched
    from omni_train.run import run

    if is_launched():
        raise ConfigError(
            "a recipe starts the ranks of its stages itself, on this machine; under torchrun run its stages one by "
            "one, `omni-train train STAGE …` (see launch/README.md)"
        )
    return run(Path(options.recipe), options.overrides)


def command_plan(options: argparse.Namespace, arguments: list[str]) -> int:
    from omni_train.planning.counts import render_plan

    print(render_plan(configuration.load(options.stage, options.overrides)))
    return 0


def command_eval(options: argparse.Namespace, arguments: list[str]) -> int:
    """Measure exports on the local ranks: a run folder's as its recipe asks, or one as the options say."""
    from omni_train.launching.local import is_launched, run_ranks
    from omni_train.measure import job_of_export, jobs_of_run, measure
    from omni_train.recipe import load_recipe

    recipe = load_recipe(Path(options.recipe))
    folder = Path(options.folder)
    if not folder.is_dir():
        raise ConfigError(f"no folder '{folder}'; give a recipe's run folder, or a stage's export/ folder")
    is_export = (folder / "config.json").is_file()
    if is_export:
        job = job_of_export(
            recipe,
            folder,
            options.overrides,
            stage=options.stage,
            tasks=options.tasks,
            use_yarn=options.yarn == "on",
            window_sec=options.window_sec,
            through=Path(options.through) if options.through else None,
        )
        jobs = [job]
    else:
        if options.tasks or options.window_sec or options.yarn == "off":
            raise ConfigError(f"--tasks, --yarn and --window-sec need one export folder, e.g. {folder}/STAGE/export")
        jobs = jobs_of_run(recipe, folder, options.stage, options.overrides)
    if not is_launched():
        return run_ranks(arguments, jobs[0].config.engine)
    measure(jobs, options.split, folder if not is_export and options.split == "heldout" else None)
    return 0


def command_export(options: argparse.Namespace, arguments: list[str]) -> int:
    source = Path(options.run) / "export"
    if not source.is_dir():
        raise ConfigError(f"'{options.run}' has no export/ folder: the stage is not finished; resume it")
    shutil.copytree(source, options.folder)
    print(f"wrote {options.folder}")
    return 0


def command_assemble(options: argparse.Namespace, arguments: list[str]) -> int:
    from omni_train.data.tokenizer import load_tokenizer
    from omni_train.engine.export import write_omni
    from omni_train.reporting.card import model_card

    config = configuration.load("talker_pretrain", options.overrides)
    tokenizer = load_tokenizer(Path(config.data.tokenizer))
    card = partial(model_card, config.model.name)
    sources = write_omni(config.model, tokenizer, config.init, Path(options.folder), card)
    for component, source in sources.items():
        print(f"{component} from {source}")
    print(f"wrote {options.folder}; what was measured of its parts: {options.folder}/README.md")
    return 0


def command_report(options: argparse.Namespace, arguments: list[str]) -> int:
    from omni_train.recipe import load_recipe
    from omni_train.reporting.report import write_report
    from omni_train.reporting.results import load_results, render_table

    recipe = load_recipe(Path(options.recipe)) if options.recipe else None
    bars, baseline = (recipe.bars, recipe.baseline) if recipe else (None, "")
    print(render_table(load_results(Path(options.run)), bars, baseline))
    print(f"report: {write_report(Path(options.run), bars, baseline)}")
    return 0


COMMANDS = {
    "train": command_train,
    "run": command_run,
    "plan": command_plan,
    "eval": command_eval,
    "export": command_export,
    "assemble": command_assemble,
    "report": command_report,
    "data": command_data,
}

if __name__ == "__main__":
    sys.exit(main())
