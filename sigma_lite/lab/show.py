"""Recorded results as pictures: one self-contained page for any number of experiments, and SVG files for texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from sigma_lite import __version__
from sigma_lite.figures import OF_RESULTS, commits_of, final_rows, machine_of, origins, refused_steps, static_svg
from sigma_lite.figures.lab_final import TABLE_SAYS
from sigma_lite.lab import standing
from sigma_lite.lab.family_page import family
from sigma_lite.lab.results import Results, active_parameters, how_to_repeat, read_results
from sigma_lite.report import markup
from sigma_lite.report.document import Plot, Section, document
from sigma_lite.report.words import count, duration
from sigma_lite.storage import atomic_write

ALWAYS = ("deviation_by_layer", "learning_curves")  # drawn after the figures that an experiment asks for


def write_page(
    paths: Sequence[str | Path], out: str | Path | None = None, rows: Sequence[standing.Row] | None = None
) -> Path:
    """Draw results files into one HTML page that opens without a network; returns its path.

    Default: beside the file, NAME-SCALE.html; for several files lab-SCALE.html. The same files give the same bytes.
    `rows`: of the family's table, instead of those that its results have.
    Raises StorageError naming the command that makes a missing file.
    """
    paths = [Path(path) for path in paths]
    found = [read_results(path) for path in paths]
    beside = [read_results(path) for path in sorted(paths[0].parent.glob("*.json"))] if _has_family(found) else []
    name = f"{found[0]['experiment']}-{found[0]['scale']}" if len(found) == 1 else f"lab-{found[0]['scale']}"
    out = Path(out) if out else paths[0].with_name(f"{name}.html")
    with atomic_write(out) as file:
        file.write(render(found, beside, rows).encode())
    return out


def write_svgs(path: str | Path, folder: str | Path) -> list[Path]:
    """The figures that an experiment asks for as FOLDER/NAME-SCALE-FIGURE.svg. Needs kaleido and a Chrome."""
    results = read_results(path)
    stem = f"{results['experiment']}-{results['scale']}"
    drawn = {name: results.figure(name) for name in results["figures"]}
    return [static_svg(fig, Path(folder) / f"{stem}-{name}.svg") for name, fig in drawn.items() if fig.data]


def _has_family(found: Sequence[Results]) -> bool:
    return any(results.get("protocol") for results in found)


def render(found: Sequence[Results], beside: Sequence[Results] = (), rows: Sequence[standing.Row] | None = None) -> str:
    """The page as text: a section for each experiment.

    Args:
        beside: other results, in which the family looks for its baseline on other machines.
    """
    alone = len(found) == 1
    return document(
        kind=f"balance laboratory · {found[0]['experiment']}" if alone else "balance laboratory",
        title=found[0]["question"] if alone else "The balance laboratory",
        lead=" · ".join(_lead(found)),
        head="",
        sections=[
            _section(results, beside, rows, "What was measured" if alone else results["question"]) for results in found
        ],
        footer=markup.paragraph(
            "Every number is from a finished run. Numbers are held in 32 bits."
            f" Made by sigma_lite {__version__}; this file loads nothing from anywhere."
        ),
    )


def _lead(found: Sequence[Results]) -> list[str]:
    """Scale, machine and code, each once."""
    runs = [run for results in found for run in results["runs"]]
    scales = [f"scale {results['scale']}: {results['scale_says']}" for results in found]
    commits = [f"commit {commit}" for run in runs for commit in commits_of(run)]
    return list(dict.fromkeys([*scales, *(str(run["device"]) for run in runs), *commits]))


def _section(results: Results, beside: Sequence[Results], rows: Sequence[standing.Row] | None, title: str) -> Section:
    name = results["experiment"]
    wanted = [figure for figure in results["figures"] if figure != "final_table"]  # the page has a table of its own
    plots = tuple(_plot(results, figure) for figure in dict.fromkeys([*wanted, *ALWAYS]))
    numbers = "<h3>Final numbers</h3>" + markup.paragraph(TABLE_SAYS, "subtitle") + markup.table(*final_rows(results))
    numbers += "".join(markup.paragraph(said, "subtitle") for said in origins(results))
    first = family(rows or standing.rows(results), results, beside) if results.get("protocol") else ()
    return Section(name, title, "", (*first, _arms(results), numbers, *plots, _provenance(results)))


def _plot(results: Results, figure: str) -> Plot:
    fig = OF_RESULTS[figure](results)
    caption = (fig.layout.meta or {}).get("caption", "")
    return Plot(f"{results['experiment']}-{figure}".replace("_", "-"), fig, caption)


def _arms(results: Results) -> str:
    rows = [(name, facts["says"]) for name, facts in results["arms"].items() if facts["says"]]
    return markup.table(("arm", "what is different"), rows) if rows else ""


def _provenance(results: Results) -> str:
    """How to repeat it: command, one line a run, and the whole config of each arm, folded."""
    head = ("arm", "seed", "tokens", "active parameters", "training time", "started", "refused steps", "machine", "commit")
    rows = [
        (
            run["arm"],
            run["seed"],
            count(run["tokens"]),
            " → ".join(dict.fromkeys(map(count, active_parameters(run) or ()))) or "not counted",
            duration(run["seconds"]),
            run["time"],
            refused_steps(run),
            machine_of(run),
            " → ".join(commits_of(run)) or "not recorded",
        )
        for run in results["runs"]
    ]
    first = {run["arm"]: run for run in reversed(results["runs"])}
    versions = {f"{name} {version}" for run in results["runs"] for name, version in run["versions"].items()}
    configs = (
        markup.fold(f"Settings of {arm}", markup.preformatted(yaml.safe_dump(first[arm]["config"], sort_keys=False)))
        for arm in results["arms"]
        if arm in first
    )
    body = markup.preformatted(how_to_repeat(results), "command") + markup.table(head, rows)
    return markup.fold("How to repeat it", body + markup.paragraph(", ".join(sorted(versions))) + "".join(configs))
