"""`sigma-lite lab list | run | show | rank | search | retrain`: the laboratory on the command line."""

from __future__ import annotations

import argparse
import shlex
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from sigma_lite.lab.catalogue import EXPERIMENTS, experiment
from sigma_lite.lab.experiment import Experiment, Scale
from sigma_lite.lab.results import read_results, results_path
from sigma_lite.lab.run import RESULTS, RUNS, run_experiment
from sigma_lite.lab.scales import SCALES, scale
from sigma_lite.storage import writable


def add_parser(sub: argparse.ArgumentParser, path: Callable[[str], Path]) -> None:
    """The options of `sigma-lite lab`.

    Args:
        path: reads a path, as every command does.
    """
    actions = sub.add_subparsers(required=True, metavar="list|run|show|rank|search|retrain")

    def action(name: str, does: Callable, text: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(run=does)
        return made

    action("list", _list, "Experiments, arms and scales.")
    run = action("run", _run, "Train what is not trained yet, then draw it; after a cut the same command goes on.")
    show = action("show", _show, "Draw recorded results: one page, and SVG files where wanted.")
    for each in (run, show):
        each.add_argument("NAME", nargs="+", help="experiments as `lab list` names them, or all")
        each.add_argument("--scale", default="quick", help=f"{', '.join(SCALES)} (default: %(default)s)")
        each.add_argument("--results", type=path, default=RESULTS, help="folder of results (default: %(default)s)")
        each.add_argument("--out", type=path, help="the page (default: RESULTS/NAME-SCALE.html)")
    run.add_argument("--arms", nargs="+", metavar="ARM", help="names of arms as `lab list` gives them, instead of all")
    ranked = action("rank", _rank, "Train your own balancer or router as the family was, and say where it stands.")
    ranked.add_argument("IDEA", help="FILE.py:NAME: a Balancer, a function (routing, f_E) -> scalar, or a Router")
    ranked.add_argument("--part", help="what a class is that is no Balancer: router, the default, or another of the parts")
    ranked.add_argument("--scale", default="cpu", help="one at which the family is recorded (default: %(default)s)")
    ranked.add_argument("--results", type=path, default=RESULTS, help="folder of results (default: %(default)s)")
    for each in (run, ranked):
        _add_training(each, path)
    _add_search(action, path)
    show.add_argument("--svg", type=path, metavar="DIR", help="also write each figure as an SVG file; needs a Chrome")


def _add_search(action: Callable, path: Callable[[str], Path]) -> None:
    """Options of what searches, and of what looks at it again. Their defaults are those of lab/search.py."""
    search = action("search", _search, "Search for balance losses by evolution; after a cut the same command goes on.")
    whole = {
        "generations": (40, "until so many are in the log"),
        "islands": (4, "populations, which trade their best"),
        "children": (4, "new expressions an island has in a generation"),
        "steps": (160, "optimizer steps of one training"),
        "seed": (0, "of the proposals"),
        "repeats": (8, "trainings of the founder, from which the noise is known"),
        "migrate": (5, "generations between two trades"),
    }
    for name, (default, text) in whole.items():
        search.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: %(default)s)")
    search.add_argument("--weight", type=float, default=0.1, help="of the loads' deviation in the fitness (%(default)s)")
    search.add_argument(
        "--propose", metavar="FILE.py:NAME", help="a function ([(expression, fitness)], random) -> expression"
    )
    search.add_argument("--reuse", action="store_true", help="go on with a log that other code has begun")
    search.add_argument("--page", action="store_true", help="train nothing: draw the page of a log")
    retrained = action("retrain", _retrain, "Train the best of a search anew, with other seeds and other text.")
    retrained.add_argument("--best", type=int, default=5, help="so many (default: %(default)s)")
    retrained.add_argument("--corpora", nargs="+", default=["stdlib", "domains"], help="(default: %(default)s)")
    retrained.add_argument("--beside", metavar="EXPRESSION", nargs="+", default=[], help="train these too")
    retrained.add_argument("--again", dest="if_changed", action="store_const", const="again", help="train kept runs anew")
    fresh = list(range(100, 106))
    retrained.add_argument("--seeds", type=int, nargs="+", default=fresh, help="that the search has not seen (%(default)s)")
    for each in (search, retrained):
        each.add_argument("--out", type=path, default=Path("runs/search"), help="folder of the log (default: %(default)s)")
        each.add_argument("--workers", type=int, default=1, help="trainings at a time (default: %(default)s)")


def _add_training(command: argparse.ArgumentParser, path: Callable[[str], Path]) -> None:
    """Options of what trains."""
    kept = "folder of runs, kept for the next time (default: %(default)s)"
    command.add_argument("--runs", type=path, default=RUNS, help=kept)
    command.add_argument("--seeds", type=int, nargs="+", help="instead of the scale's")
    command.add_argument("--workers", type=int, help="runs at a time (default: one a core; one on a GPU)")
    changed = command.add_mutually_exclusive_group()
    for name, does in (("again", "train kept runs that other code has made anew"), ("reuse", "take them as they are")):
        changed.add_argument(f"--{name}", dest="if_changed", action="store_const", const=name, help=does)


def _chosen(names: Sequence[str]) -> list[str]:
    """Names of experiments, each once. Raises ConfigError naming the nearest."""
    found = [experiment(name).name for name in dict.fromkeys(names) if name != "all"]
    return list(EXPERIMENTS) if "all" in names else found


def _run(options: argparse.Namespace) -> None:
    names, size = _chosen(options.NAME), scale(options.scale)
    for name in names:
        EXPERIMENTS[name].chosen(options.arms)  # an unknown arm is refused before any work
    if options.out:
        writable(options.out.parent)
    paths = []
    for name in names:
        command = f"sigma-lite lab run {name} --scale {size.name}"
        command += f" --seeds {shlex.join(map(str, options.seeds))}" if options.seeds else ""
        command += f" --arms {shlex.join(options.arms)}" if options.arms else ""
        paths.append(
            run_experiment(
                EXPERIMENTS[name],
                size,
                command=command,
                runs=options.runs,
                results=options.results,
                seeds=options.seeds,
                arms=options.arms,
                workers=options.workers,
                if_changed=options.if_changed,
            )
        )
        print(f"\n{name}: {EXPERIMENTS[name].question}\n{read_results(paths[-1]).table()}")
    _draw(paths, options.out)


def _show(options: argparse.Namespace) -> None:
    paths = [results_path(options.results, name, scale(options.scale).name) for name in _chosen(options.NAME)]
    _draw(paths, options.out)
    if options.svg:
        from sigma_lite.lab.show import write_svgs

        for path in paths:
            for picture in write_svgs(path, options.svg):
                print(f"figure        {picture}")


def _rank(options: argparse.Namespace) -> None:
    from sigma_lite.lab.rank import in_words, rank

    standing, made = rank(
        options.IDEA,
        scale(options.scale),
        part=options.part,
        seeds=options.seeds,
        runs=options.runs,
        results=options.results,
        workers=options.workers,
        if_changed=options.if_changed,
    )
    print(f"\n{in_words(standing)}\nresults       {made}")
    from sigma_lite.lab.show import write_page

    print(f"page          {write_page([made], rows=standing.all_rows)}")


def _search(options: argparse.Namespace) -> None:
    if options.page:
        return _search_page(options.out)
    from sigma_lite.lab.rank import importable, loaded
    from sigma_lite.lab.search import Search, run_search
    from sigma_lite.lab.trials import search_scale

    names = ("islands", "children", "steps", "weight", "seed", "repeats", "migrate")
    search, hook = Search(**{name: getattr(options, name) for name in names}), None
    if options.propose:
        with importable(options.propose) as path:
            hook = loaded(options.propose, path, "--propose")
    words = ["sigma-lite", "lab", "search", *(f"--{n}={getattr(options, n)}" for n in names)]
    words += ["--propose", options.propose] if options.propose else []
    islands, noise = run_search(
        search,
        search_scale(search.steps),
        options.out,
        generations=options.generations,
        workers=options.workers,
        command=shlex.join(words),
        hook=hook,
        reuse=options.reuse,
    )
    print(
        f"\n{len(islands.individuals)} expressions; better than the founder by more than {noise.floor:.4f}, which is noise:"
    )
    better = [one for one in islands.best() if noise.gain(one) > noise.floor]
    print("\n".join(f"{one.number:5}  {noise.gain(one):.4f}  {one.text}" for one in better[:10]) or "none")
    _search_page(options.out)


def _retrain(options: argparse.Namespace) -> None:
    from sigma_lite.lab.retrain import in_words, retrain
    from sigma_lite.lab.search import read_log

    words = ["sigma-lite", "lab", "retrain", "--best", str(options.best), "--seeds", *map(str, options.seeds)]
    words += ["--corpora", *options.corpora]
    words += ["--beside", *options.beside] if options.beside else []
    each = retrain(
        options.out,
        best=options.best,
        seeds=options.seeds,
        corpora=options.corpora,
        beside=options.beside,
        workers=options.workers,
        if_changed=options.if_changed,
        command=shlex.join(words),
    )
    print(in_words(*read_log(options.out), each))
    _search_page(options.out)


def _search_page(out: Path) -> None:
    from sigma_lite.lab.search_page import write_search_page

    print(f"page          {write_search_page(out)}")


def _draw(paths: Sequence[Path], out: Path | None) -> None:
    from sigma_lite.lab.show import write_page

    print(f"page          {write_page(paths, out)}")


# --------------------------------------------------------------------------------------------------------------- list


def _list(options: argparse.Namespace) -> None:
    print("\n\n".join([*map(_experiment, EXPERIMENTS.values()), "scales:\n" + "\n".join(map(_scale, SCALES.values()))]))


def _experiment(found: Experiment) -> str:
    width = max(len(arm.name) for arm in found.arms)
    lines = [f"{found.name}: {found.question}"]
    for arm in found.arms:
        lines += _hanging(f"  {arm.name:{width}}  ", arm.description)
    return "\n".join(lines)


def _scale(size: Scale) -> str:
    """Model and tokens of one arm, seeds, and what the scale says about hardware and time."""
    net, rows = size.settings["model"]["net"], size.settings["data"]["rows"]  # type: ignore[index]
    tokens = size.steps * rows["per_step"] * rows["length"]
    shape = f"{net['n_layers']} layers x {net['n_experts']} experts, width {net['d_model']}"
    seeds = f"{len(size.seeds)} seed{'s' * (len(size.seeds) > 1)}"
    return "\n".join(
        _hanging(f"  {size.name:5}  ", f"{shape}, {tokens / 1e6:,.1f} M tokens an arm, {seeds}: {size.description}")
    )


def _hanging(first: str, text: str) -> list[str]:
    """`text` wrapped behind `first`."""
    return textwrap.wrap(text, 118, initial_indent=first, subsequent_indent=" " * len(first))
