"""`sigma-lite`: everything a person does with this package, by name.

    sigma-lite prepare  -c FILE            text to tokens on disk
    sigma-lite fit      -c FILE            train, or continue what was cut off; then measure, sample and report
    sigma-lite validate|test|predict -c FILE
    sigma-lite plan     -c FILE [--cluster NAME] [--json]   weight, speed and price of a config, before anything runs
    sigma-lite report   RUN                one self-contained HTML page
    sigma-lite generate RUN --prompt TEXT
    sigma-lite chat     RUN                talk with a model whose training knew conversations
    sigma-lite explore  RUN --text TEXT    a page: each token coloured by its expert, each expert's favourite tokens
    sigma-lite eval     RUN TASKS          likelihood, generated tasks, code, what its experts know; into its report
    sigma-lite rows     RUN STEP           source, epoch and documents of each row that a training step read
    sigma-lite export   RUN OUT            for transformers, lm-evaluation-harness and vLLM; `import FOLDER OUT` reads such
    sigma-lite convert  RUN OUT --with papers.dense2moe.TaylorSplit    a trained model made into another
    sigma-lite lab      list | run NAME | show | rank | search | retrain   experiments on balance, side by side
    sigma-lite check    FOLDER             grade students' notebooks; --list names all steps that can be checked

Several -c lay files over each other; any key can be given as --section.key value. `sigma-lite COMMAND --help` says more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sigma_lite.config import ConfigError, nearest, plain_path, require
from sigma_lite.convert import command as surgery
from sigma_lite.lab.command import add_parser as add_lab_parser
from sigma_lite.runfile import load_run, overrides
from sigma_lite.serve.command import PROMPT, add_run, opened
from sigma_lite.serve.command import add_commands as add_serve_commands
from sigma_lite.storage import StorageError

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")  # LightningCLI parses these; the rest need no Lightning
COMMANDS = (
    *TRAINER_COMMANDS,
    *("prepare", "plan", "report", "generate", "chat", "explore", "eval", "rows", "export", "import", "convert", "lab"),
    *("check",),
)


def main(args: Sequence[str] | None = None) -> None:
    """Run one command. Ends with exit code 2 and one sentence on standard error when the input cannot work."""
    args = list(sys.argv[1:] if args is None else args)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # not every stream of a notebook or a test can be changed
            stream.reconfigure(errors="replace")  # a sample may hold any character, a terminal may not know it
    if "" not in sys.path:
        sys.path.insert(0, "")  # a balance loss of your own is named by its file in this folder
    try:
        if args and not args[0].startswith("-"):
            require(args[0] in COMMANDS, f"unknown command {args[0]!r}; {nearest(args[0], COMMANDS)}")
        if args and args[0] in TRAINER_COMMANDS:
            _train(args)
        else:
            options, rest = _parser().parse_known_args(args)
            options.over = _only_overrides(options, rest)
            options.run(options)
    except (ConfigError, StorageError) as error:
        print(f"sigma-lite: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        print(f"\nsigma-lite: {stop or 'stopped; the same command continues from the last checkpoint'}", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # of `sigma-lite plan ... | head`: who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more when it ends
        raise SystemExit(141) from None


def _path(given: str) -> Path:
    """A file or folder of the command line."""
    try:
        return Path(plain_path(given, "the path"))
    except ConfigError as error:  # of which argparse would say only that the value is invalid
        raise argparse.ArgumentTypeError(str(error)) from error


class _Parser(argparse.ArgumentParser):
    """One sentence for what it cannot read."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` shows how it is written")


def _only_overrides(options: argparse.Namespace, rest: list[str]) -> dict:
    """What is left of a command line, as groups of keys: only commands that read a config take --section.key value."""
    over = overrides(rest) if "config" in options else {}
    expected = False  # a value for the option before it
    for arg in rest:
        known = arg.startswith("--") and "." in arg.partition("=")[0] and "config" in options
        require(known or expected, f"unknown option {arg!r}; `sigma-lite --help` lists the commands and their options")
        expected = known and "=" not in arg
    return over


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sigma-lite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    def config_command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = command(name, run, text)
        sub.add_argument("-c", "--config", action="append", required=True, metavar="FILE", help="yaml; several are overlaid")
        return sub

    sub = config_command(
        "prepare",
        _prepare,
        "Turn the corpus of a config into a tokenizer and token files; continues where it was cut off.",
    )
    sub.add_argument("--rank", type=int, default=0, help="this process is number RANK of RANKS, from 0 (default: 0)")
    sub.add_argument("--ranks", type=int, default=1, help="processes that share out data.corpus.parts (default: 1)")

    sub = config_command(
        "plan",
        _plan,
        "Say what a config weighs, moves, takes and costs on a machine, and whether it fits, before anything runs.",
    )
    sub.add_argument("--json", action="store_true", help="one JSON object")
    sub.add_argument(
        "--cluster", metavar="NAME|FILE", help="a built-in machine or your own yaml (default: by trainer.accelerator)"
    )
    sub.add_argument("--nodes", type=int, metavar="N", help="so many nodes of it (default: trainer.num_nodes)")
    sub.add_argument(
        "--imbalance", type=float, metavar="X", help="rows of the fullest device, in shares; 1 is even (default: 1.5)"
    )

    sub = command("report", _report, "Draw a run as one HTML page that opens without a network.")
    sub.add_argument("RUN", type=_path, help="folder of the run, such as runs/toy")
    sub.add_argument("--out", type=_path, help="where to write (default: RUN/report.html)")

    add_serve_commands(command, _path)
    sub = command("explore", _explore, "Write a page that shows which expert of each layer reads each token of a text.")
    add_run(sub, _path)
    sub.add_argument("--text", help=f"to look at (default: {PROMPT!r} and what the model writes behind it)")
    sub.add_argument("--file", type=_path, help="a file with the text")
    sub.add_argument("--tokens", type=int, default=30_000, help="of held-out text, by which experts are known (%(default)s)")
    sub.add_argument("--out", type=_path, help="where to write (default: RUN/routing.html)")
    surgery.add_parser(command("convert", _convert, surgery.SAYS), _path)
    add_lab_parser(
        command("lab", None, "Experiments on balance: list them, run their arms side by side, show what they found."), _path
    )
    sub = command("check", _check, "Grade notebooks: each step passed, wrong by a known mistake, or not tried.")
    sub.add_argument("FOLDER", type=_path, nargs="?", help="a notebook, or a folder with one folder or file per student")
    sub.add_argument("--list", action="store_true", help="list all steps that can be checked; grade nothing")
    sub.add_argument("--json", action="store_true", help="JSON instead of a table")
    sub.add_argument("--csv", action="store_true", help="one line per student and step")
    sub.add_argument("--hidden", type=_path, metavar="FILE", help="Python with CASES = {step: [(argument, ...), ...]}")
    sub.add_argument("--seconds", type=float, default=120.0, help="for each notebook (default: %(default)g)")
    for name in TRAINER_COMMANDS:
        command(name, None, "see `sigma-lite " + name + " --help`")
    return parser


def _prepare(options: argparse.Namespace) -> None:
    from sigma_lite.data.mixture import prepare_mixture
    from sigma_lite.data.shards import prepare, prepare_parts

    run = load_run(options.config, options.over)
    corpus = run.corpus
    shared = (options.rank, options.ranks) != (0, 1)
    if run.mixture.sources:
        ready = prepare_mixture(corpus, run.mixture, rank=options.rank, ranks=options.ranks)
        if ready is None:
            print(f"data          {corpus.dir}: some parts of the sources are not finished yet")
            return
        _say_prepared(ready)
        for name, source in ready.facts()["sources"].items():
            shares = (f"{dict(zip(ready.sources, s, strict=True))[name]:.1%}" for _, s in run.mixture.shares(ready.tokens))
            says = f"{source['train_tokens']:,} training and {source['heldout_tokens']:,} held-out tokens"
            print(f"  {name:<12}{says}, {', then '.join(shares)} of the rows")
        return
    if shared and (missing := prepare_parts(corpus, options.rank, options.ranks)):
        print(f"data          {corpus.dir}: {len(missing)} of {corpus.parts} parts are not finished yet")
        return
    _say_prepared(prepare(corpus))


def _say_prepared(ready) -> None:
    facts = ready.facts()
    print(f"data          {ready.dir}: {facts['train_tokens']:,} training and {facts['heldout_tokens']:,} held-out tokens")
    print(f"              bits per byte: {_baselines(facts)}")
    if (copied := facts.get("heldout_long_lines_in_training")) is not None:
        print(f"              {copied:.1%} of the held-out bytes are lines of 20 characters or more of the training text")
    if left_out := ready.left_out():
        print(f"              left out: {left_out}")


def _baselines(facts: dict) -> str:
    names = {"xz_given_training": "xz -9e given the training text", "xz": "xz -9e alone", "unigram": "token frequencies"}
    found = ((name, facts.get(f"{key}_bits_per_byte")) for key, name in names.items())  # data of before knew less
    return ", ".join(f"{name} {bits:.3f}" for name, bits in found if bits is not None)


def _plan(options: argparse.Namespace) -> None:
    from sigma_lite.scale.forecast import forecast
    from sigma_lite.scale.layout import IMBALANCE
    from sigma_lite.scale.table import as_table

    uneven = IMBALANCE if options.imbalance is None else options.imbalance
    facts = forecast(load_run(options.config, options.over, fit=True), options.cluster, options.nodes, uneven)
    print(json.dumps(facts) if options.json else as_table(facts))


def _report(options: argparse.Namespace) -> None:
    from sigma_lite.record import run_files
    from sigma_lite.report import write_report
    from sigma_lite.storage import run_alone

    run_files(options.RUN)
    inside = options.out is None or options.RUN.resolve() in options.out.resolve().parents
    instead = "give --out with a file outside of it to look at it meanwhile"
    with run_alone(options.RUN, instead) if inside else contextlib.nullcontext():
        print(f"report        {write_report(options.RUN, options.out)}")


def _explore(options: argparse.Namespace) -> None:
    from sigma_lite.report.explore import write_explorer
    from sigma_lite.serve.explore import explored, text_to_read

    require(options.text is None or options.file is None, "give --text or --file, not both")
    require(options.tokens >= 1, f"tokens={options.tokens}: must be at least 1")
    trained, own = opened(options), options.RUN if options.RUN.is_dir() else Path()  # a model in the package stays as it is
    out = options.out or own / "routing.html"
    text = text_to_read(trained, options.text, options.file, PROMPT)
    facts = explored(trained, text, options.data, options.tokens, options.file and options.file.name)
    print(f"explore       {write_explorer(facts, options.RUN.resolve().name, out)}")


def _check(options: argparse.Namespace) -> None:
    from sigma_lite.teach.command import run

    run(options)


def _convert(options: argparse.Namespace) -> None:
    import platform
    from datetime import datetime, timezone

    import torch

    from sigma_lite import __version__
    from sigma_lite.identity import package_code
    from sigma_lite.train.provenance import device_name, git_commit

    versions = {"python": platform.python_version(), "torch": torch.__version__, "sigma_lite": __version__}
    facts = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "versions": versions, "code": package_code()}
    surgery.run(options, facts | {"device": device_name(torch.device("cpu")), "commit": git_commit()})


def _train(args: list[str]) -> None:
    from sigma_lite.train.run import RunCLI

    with RunCLI(args) as cli:
        if args[0] == "fit":
            _finish(cli)


def _finish(cli) -> None:
    """After training: measure on held-out text, sample, report. Each is done once; the same command again only prints."""
    from sigma_lite import record
    from sigma_lite.report import write_report
    from sigma_lite.serve.generate import why_it_cannot_write
    from sigma_lite.serve.trained import Trained

    if not cli.finished:
        if cli.trainer.is_global_zero:
            print(f"sigma-lite: {cli.where_it_stopped()}", file=sys.stderr)
        return
    run, step = cli.run_dir, cli.trainer.max_steps
    diary = run / "record.jsonl"

    def at_end(kind: str) -> list[dict]:
        return [entry for entry in record.read(diary, kind) if entry["step"] == step]

    cli.validate_at_end()
    if not cli.trainer.is_global_zero:
        return
    if not at_end("sample"):
        trained = Trained(run, parts=cli.model.parts)
        if why := why_it_cannot_write(trained.model):
            print(f"sigma-lite: no sample: {why}", file=sys.stderr)
        else:
            text = "".join(trained.continue_text(PROMPT, 200, temperature=0.7, seed=0))
            record.append(diary, "sample", step, prompt=PROMPT, text=text)
    starts = record.read(diary, "run")
    if not starts:
        cli.datamodule.setup()
    facts = starts[-1]["data"] if starts else cli.datamodule.prepared.facts()
    for sample in at_end("sample")[-1:]:
        print(f"\n{sample['prompt']}{sample['text']}\n")
    measured = at_end("validation")[-1]
    print(f"held-out      {measured['bits_per_byte']:.4f} bits per byte   ({_baselines(facts)})")
    for name, bits in measured.get("sources", {}).items():
        print(f"  {name:<12}{bits['bits_per_byte']:.4f}                 ({_baselines(facts['sources'][name])})")
    if not starts:
        print(f"report        not drawn: {diary}, from which it would be, was deleted after the run had ended")
        return
    page = run / "report.html"
    if not page.exists() or page.stat().st_mtime < diary.stat().st_mtime:
        page = write_report(run)
    print(f"report        {page}")
