"""A search as one page: what was tried in which order, the best, and what of it held with other seeds and other text."""

from __future__ import annotations

import statistics
from pathlib import Path

import plotly.graph_objects as go

from sigma_lite import __version__, record
from sigma_lite.figures.searched import Tried, fitness_in_order, loss_against_deviation
from sigma_lite.lab.results import Results, read_results
from sigma_lite.lab.retrain import COLUMNS, named, table, verdict
from sigma_lite.lab.search import Individual, Islands, Noise, read_log
from sigma_lite.report import markup
from sigma_lite.report.document import Plot, Section, document
from sigma_lite.report.words import duration
from sigma_lite.storage import atomic_write

BEST = 15  # rows of the table
SAYS = (
    "The best of many is the best partly by luck: its fitness was looked at to choose it. What may be claimed stands under"
    " “Trained anew”, if “sigma-lite lab retrain” has followed the search."
)


def write_search_page(out: str | Path) -> Path:
    """OUT/search.html of OUT/search.jsonl, and of the results of `retrain` beside it; returns its path.

    Raises: ConfigError where there is no log.
    """
    out = Path(out)
    islands, noise = read_log(out)
    anew = [read_results(path) for path in sorted(out.glob("retrained-*.json"))]
    path = out / "search.html"
    with atomic_write(path) as file:
        file.write(_page(out, islands, noise, anew).encode())
    return path


def _page(out: Path, islands: Islands, noise: Noise | None, anew: list[Results]) -> str:
    search, found = islands.search, islands.individuals
    starts = record.read(out / "search.jsonl", "search")
    failed = sum(one.fitness is None for one in found)
    refused = sum(sum(one.rejected.values()) for one in found)
    where = f"{_times(search.islands, 'island')} in {_times(islands.done, 'generation')}"
    trains = f"{search.steps} steps with {_times(len(search.seeds), 'seed')}"
    lead = (
        f"{len(found)} expressions on {where}; each trains {trains}: {duration(sum(one.seconds for one in found))} in all."
        f" {failed} failed to train; {refused} proposals were not worth a training. Fitness: bits per byte of held-out"
        f" text + {search.weight:g} x deviation of loads."
    )
    return document(
        kind="balance laboratory · search",
        title="Which balance loss does a search find?",
        lead=lead,
        head="",
        sections=[
            Section("search", "What was tried", "", _plots(found, noise)),
            Section("best", "The best of the search", SAYS, (_best(islands, noise),)),
            *([Section("anew", "Trained anew", "", _anew(islands, anew))] if anew else []),
        ],
        footer=markup.preformatted(starts[0]["command"], "command")
        + markup.paragraph(
            f"Commit {', '.join(dict.fromkeys(str(start['commit']) for start in starts))}. Made by sigma_lite {__version__};"
            " this file loads nothing from anywhere."
        ),
    )


def _times(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _plots(found: list[Individual], noise: Noise | None) -> tuple[Plot, ...]:
    tried = [
        Tried(one.number, one.by, one.text, one.fitness, statistics.mean(one.bits), statistics.mean(one.deviation))
        for one in found
        if one.fitness is not None
    ]
    figures = {"loss-against-deviation": loss_against_deviation(tried)}
    if noise is not None:
        figures = {"fitness-in-order": fitness_in_order(tried, noise.mean, noise.floor), **figures}
    return tuple(Plot(name, fig, _caption(fig)) for name, fig in figures.items())


def _caption(fig: go.Figure) -> str:
    return (fig.layout.meta or {}).get("caption", "")


def _best(islands: Islands, noise: Noise | None) -> str:
    head = ("number", "generation", "made by", "fitness", "below the founder", "bits per byte", "deviation", "expression")
    rows = [
        (
            named(one),
            one.generation,
            one.by,
            f"{one.fitness:.4f}",
            f"{noise.gain(one):+.4f}" if noise else "not known",
            f"{statistics.mean(one.bits):.4f}",
            f"{statistics.mean(one.deviation):.3f}",
            one.text,
        )
        for one in islands.best()[:BEST]
    ]
    said = f"Less than {noise.floor:.4f} below the founder is noise of its seeds." if noise else ""
    return markup.table(head, rows) + markup.paragraph(said, "subtitle")


def _anew(islands: Islands, anew: list[Results]) -> tuple[str, ...]:
    seeds = len({run["seed"] for run in anew[0]["runs"]})
    said = f"Differences from the founder, paired over {seeds} seeds that the search has not seen, with 95 % intervals."
    return markup.paragraph(said), markup.table(COLUMNS, table(islands, anew)), markup.paragraph(verdict(islands, anew))
