"""`sigma-lite lab search`: an evolutionary search over balance losses, in the spirit of ShinkaEvolve (2509.19349).

Theirs: islands that begin with the global-batch LBL and trade their best; a parent is drawn by

    sigmoid(10 (fitness - median) / median distance from it) / (1 + children so far)

(the division by the spread is in their code, not in the paper); a child that does as another does is not evaluated; fitness
is what training ends with. Ours: children come from a grammar (expressions.py, evolve.py), not from a language model, though
a hook may be one; "as another does" is told by gradients, not by text; and fitness is a mean over two seeds.

    fitness = bits per byte of held-out text + weight * sum_e |f_e - 1 / E|, mean over layers        less is better

The log, OUT/search.jsonl, has a line for each evaluated expression, in the order of proposing. Everything that a proposal
depends on is in the seed and in the lines before, so a search that was killed goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sigma_lite import record
from sigma_lite.config import ConfigError, require
from sigma_lite.identity import changed_files, identify_named, package_code
from sigma_lite.lab.evolve import behaviour, crossed, flaw, mutated
from sigma_lite.lab.experiment import Scale
from sigma_lite.lab.expressions import Node, read
from sigma_lite.lab.seeds import T95
from sigma_lite.lab.trials import Trial, Trials
from sigma_lite.storage import exclusive

FOUNDER = "mean(f * P)"
TRIES = 200  # proposals that are not new, before a search says that it is at its end
KEPT = 16  # of an island: the best, from which parents are drawn
CROSSED = 0.3  # share of children that have two parents
SELECTION = 10.0  # lambda of the sigmoid, as in the released code

Hook = Callable[[Sequence[tuple[str, float]], random.Random], str]
"""(known expressions with their fitness, best first; a generator) -> an expression: a reader's own model."""


@dataclass(frozen=True)
class Search:
    """What decides a search; kept in its log.

    Args:
        islands, children: that many populations, and children of each in a generation.
        steps: optimizer steps of one training.
        weight: of the deviation of loads in the fitness, in bits per byte; the deviation lies in 0..2.
        seed: of all proposals.
        seeds: with which each expression trains.
        repeats: of the founder, with seeds 0, 1, ...: from them the noise is known.
        migrate: generations after which each island gets the best of the one before it.
        hooked: share of children that the hook proposes, where there is one.
    """

    islands: int = 4
    children: int = 4
    steps: int = 160
    weight: float = 0.1
    seed: int = 0
    seeds: tuple[int, ...] = (0, 1)
    repeats: int = 8
    migrate: int = 5
    hooked: float = 0.5

    def __post_init__(self) -> None:
        for name in ("islands", "children", "steps", "migrate"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: must be at least 1")
        require(3 <= self.repeats <= len(T95) + 1, f"repeats={self.repeats}: the noise needs 3 to {len(T95) + 1} trainings")
        require(0 <= self.weight < math.inf, f"weight={self.weight}: must be 0 or more, and finite")
        require(len(set(self.seeds)) == len(self.seeds) > 0, f"seeds={list(self.seeds)}: give at least one, each once")


class Individual(NamedTuple):
    """One expression and what it came to; a line of the log."""

    number: int  # 0: the founder
    generation: int
    island: int  # the founder lives on all
    by: str
    parents: tuple[int, ...]
    text: str
    fitness: float | None  # None: some training failed
    bits: tuple[float, ...] = ()  # one a seed, as the next two
    deviation: tuple[float, ...] = ()
    busiest: tuple[float, ...] = ()  # E f - 1 of layer 0's busiest expert
    rejected: Mapping[str, int] = {}  # proposals before this one that were not worth a training, by reason
    failed: str = ""
    seconds: float = 0.0


@dataclass
class Islands:
    """All individuals so far. What it answers depends on them alone, so a log that is read again makes the same."""

    search: Search
    individuals: list[Individual] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # also of what is in training
    offspring: Counter = field(default_factory=Counter)
    homes: list[set[int]] = field(default_factory=list)  # numbers of each island
    done: int = 0  # generations finished: parents are of these, so how much of the next is known changes nothing

    def __post_init__(self) -> None:
        self.homes = [set() for _ in range(self.search.islands)]

    def expect(self, text: str, parents: Sequence[int]) -> None:
        """Before it has trained: what does the same is no longer new, and its parents have a child more."""
        self.texts.append(text)
        self.offspring.update(parents)

    def add(self, individual: Individual) -> None:
        """The last of a generation ends it, and where it is time lets the best migrate."""
        self.individuals.append(individual)
        for island, home in enumerate(self.homes):
            if individual.number == 0 or island == individual.island:
                home.add(individual.number)
        self.done, rest = divmod(len(self.individuals) - 1, self.search.islands * self.search.children)
        if self.done > 0 and rest == 0 and self.done % self.search.migrate == 0:
            self._migrate()

    def _migrate(self) -> None:
        """The best of each island also lives on the next one."""
        best = [self.living(island)[0].number for island in range(len(self.homes))]
        for island, number in enumerate(best):
            self.homes[(island + 1) % len(self.homes)].add(number)

    def living(self, island: int) -> list[Individual]:
        """Those from which parents are drawn, best first."""
        found = (self.individuals[number] for number in sorted(self.homes[island]))
        able = (one for one in found if one.fitness is not None and one.generation <= self.done)
        return sorted(able, key=lambda one: one.fitness)[:KEPT]

    def parent(self, island: int, chance: random.Random) -> Individual:
        """One of them, by fitness and by how few children it has."""
        living = self.living(island)
        return chance.choices(living, sampling_weights(living, self.offspring))[0]

    def best(self) -> list[Individual]:
        """All that trained, best first."""
        return sorted((one for one in self.individuals if one.fitness is not None), key=lambda one: one.fitness)


def sampling_weights(living: Sequence[Individual], offspring: Mapping[int, int]) -> list[float]:
    """Not normalised; the fitness is turned, because here less is better."""
    middle = statistics.median(one.fitness for one in living)
    scale = max(statistics.median(abs(one.fitness - middle) for one in living), 1e-6)
    steep = [max(-60.0, min(60.0, SELECTION * (middle - one.fitness) / scale)) for one in living]
    return [1 / (1 + math.exp(-s)) / (1 + offspring.get(one.number, 0)) for s, one in zip(steep, living, strict=True)]


# ----------------------------------------------------------------------------------------------------------- proposals


class Proposal(NamedTuple):
    text: str
    by: str
    parents: tuple[int, ...]
    rejected: dict[str, int]


def propose(islands: Islands, island: int, number: int, hook: Hook | None = None) -> Proposal:
    """The next child of an island: a new expression. Raises ConfigError when TRIES in a row were none."""
    chance = random.Random(f"{islands.search.seed}/{number}")
    rejected: Counter = Counter()
    for _ in range(TRIES):
        by, parents, node = _child(islands, island, chance, hook)
        why = node if isinstance(node, str) else flaw(behaviour(node), [_acts(text) for text in islands.texts])
        if not why:
            return Proposal(str(node), by, parents, dict(rejected))
        rejected[why] += 1
    raise ConfigError(f"{TRIES} proposals in a row were not worth a training ({dict(rejected)}): the search is at its end")


@cache
def _acts(text: str) -> Tensor:
    return behaviour(read(text))


def _child(
    islands: Islands, island: int, chance: random.Random, hook: Hook | None
) -> tuple[str, tuple[int, ...], Node | str]:
    """(how it was made, its parents, the expression or why there is none)."""
    if hook is not None and chance.random() < islands.search.hooked:
        try:
            return "hook", (), read(hook([(one.text, one.fitness) for one in islands.living(island)], chance))
        except Exception as error:  # whatever a reader's model says or raises
            return "hook", (), f"hook: {type(error).__name__}"
    one = islands.parent(island, chance)
    if chance.random() < CROSSED:
        other = islands.parent(island, chance)
        if other.number != one.number:
            return "crossover", (one.number, other.number), crossed(chance, read(one.text), read(other.text))
    return "mutation", (one.number,), mutated(chance, read(one.text))


# -------------------------------------------------------------------------------------------------------------- noise


class Noise(NamedTuple):
    """What the founder's own seeds make of its fitness."""

    mean: float
    spread: float  # standard deviation of the fitness of one training
    floor: float  # half a 95 % interval of the difference: a candidate's mean over its seeds from the founder's mean

    def gain(self, one: Individual) -> float:
        """By how much its fitness is below the founder's mean."""
        return self.mean - one.fitness if one.fitness is not None else float("-inf")


def noise_of(fitness: Sequence[float], seeds: int) -> Noise:
    """Args: fitness: of each of the founder's trainings; seeds: over how many a candidate's is a mean."""
    spread = statistics.stdev(fitness)
    floor = T95[len(fitness) - 2] * spread * (1 / seeds + 1 / len(fitness)) ** 0.5
    return Noise(statistics.mean(fitness), spread, floor)


def read_log(out: str | Path) -> tuple[Islands, Noise | None]:
    """(all individuals, noise once it is known) of OUT/search.jsonl."""
    entries = record.read(Path(out) / "search.jsonl")
    require(bool(entries), f"{out} holds no search.jsonl: run `sigma-lite lab search --out {out}` first")
    settings = next((entry.get("settings") for entry in entries if entry["kind"] == "search"), None)
    require(settings is not None, f"{out}/search.jsonl is no log of a search: give --out another folder")
    search = Search(**{**settings, "seeds": tuple(settings["seeds"])})
    islands, fitness = Islands(search), [entry["fitness"] for entry in entries if entry["kind"] == "founder"]
    noise = noise_of(fitness, len(search.seeds)) if len(fitness) == search.repeats else None
    for entry in entries:
        if entry["kind"] == "individual":
            facts = {key: entry[key] for key in Individual._fields if key in entry}
            facts = {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
            one = Individual(number=entry["step"], **facts)
            islands.expect(one.text, one.parents)
            islands.add(one)
    return islands, noise


# --------------------------------------------------------------------------------------------------------------- run


def run_search(
    search: Search,
    scale: Scale,
    out: str | Path,
    *,
    generations: int,
    workers: int = 1,
    command: str = "",
    hook: Hook | None = None,
    reuse: bool = False,
    trials: Trials | None = None,
) -> tuple[Islands, Noise]:
    """Search until so many generations are in OUT/search.jsonl; one that was cut off goes on, one at its end is read.

    Args:
        scale: model, data and training of a trial; its steps are `search.steps`.
        workers: processes that train, one thread each. They change nothing but the time.
        reuse: go on although other code has trained the lines before.

    Raises: ConfigError for a folder of a search with other settings or of other code, and where nothing new is left.
    """
    require(generations >= 1, f"generations={generations}: must be at least 1")
    if hook is not None:
        try:
            hook([(FOUNDER, 0.0)], random.Random(0))
        except Exception as error:  # later it may fail at times; one that fails at once would leave a night without it
            raise ConfigError(f"the hook's first call ended with {type(error).__name__}: {error}") from error
    trials = trials or Trials(scale, out, workers)
    out, log = Path(out), Path(out) / "search.jsonl"
    with exclusive(out / "search.lock", waiting=f"another process searches in {out}: waiting for it"):
        _begin(search, scale, log, command, reuse)
        try:
            noise = _measure_noise(search, log, trials)
            islands, _ = read_log(out)
            if not islands.individuals:
                _evaluate(islands, [_founder(islands)], log, trials, noise)
            while islands.done < generations:
                _evaluate(islands, _proposals(islands, hook), log, trials, noise)
        finally:
            trials.close()
    return islands, noise


def _begin(search: Search, scale: Scale, log: Path, command: str, reuse: bool) -> None:
    """Write how this start was made, or refuse it."""
    from sigma_lite.train.provenance import git_commit

    own = {name: identify_named(f"sigma_lite.lab.{name}") for name in ("expressions.Candidate", "evolve.behaviour")}
    now = {"settings": _plain(asdict(search)), "scale": _plain(scale.settings)}
    code = {**package_code(), **own}
    starts, wanted = record.read(log, "search"), {**now["settings"], "scale": now["scale"]}
    for start in starts[-1:]:
        then = {**start["settings"], "scale": start["scale"]}
        others = [f"{key}={then.get(key)!r}" for key, value in wanted.items() if then.get(key) != value]
        require(not others, f"{log} is of a search with {', '.join(others)[:200]}: give --out another folder")
        changed = changed_files(start["code"], code)
        said = f"{log} was made by other code; changed since: {', '.join(changed[:6])}"
        require(reuse or not changed, f"{said}. Give --out another folder, or --reuse to go on all the same")
        if changed:
            print(said, file=sys.stderr)
    record.append(log, "search", 0, command=command, commit=git_commit(), **now, code=code)


def _plain(value: Any) -> Any:
    """As a log that is read again has it."""
    return json.loads(json.dumps(value))


def _measure_noise(search: Search, log: Path, trials: Trials) -> Noise:
    known = record.read(log, "founder")
    wanted = [Trial(FOUNDER, seed) for seed in range(len(known), search.repeats)]
    for trial, found in zip(wanted, trials.all(wanted), strict=True):
        require(not found.failed, f"the founder cannot train with seed {trial.seed}: {found.failed}")
        facts = {"bits": found.bits, "deviation": found.deviation, "fitness": found.bits + search.weight * found.deviation}
        record.append(log, "founder", trial.seed, **facts, seconds=round(found.seconds, 1))
    noise = noise_of([entry["fitness"] for entry in record.read(log, "founder")], len(search.seeds))
    print(
        f"founder       {FOUNDER}: fitness {noise.mean:.4f}, standard deviation {noise.spread:.4f} over {search.repeats}"
        f" seeds; less than {noise.floor:.4f} better is nothing"
    )
    return noise


def _founder(islands: Islands) -> tuple[int, Proposal]:
    islands.expect(FOUNDER, ())
    return 0, Proposal(FOUNDER, "founder", (), {})


def _proposals(islands: Islands, hook: Hook | None) -> list[tuple[int, Proposal]]:
    """(island, proposal) of those that the present generation lacks; each is new beside those before it."""
    search, found = islands.search, []
    first, end = len(islands.individuals), 1 + (islands.done + 1) * search.islands * search.children
    for number in range(first, end):
        island = (number - 1) // search.children % search.islands
        proposal = propose(islands, island, number, hook)
        islands.expect(proposal.text, proposal.parents)
        found.append((island, proposal))
    return found


def _evaluate(islands: Islands, proposals: Sequence[tuple[int, Proposal]], log: Path, trials: Trials, noise: Noise) -> None:
    """Train and log each proposal, in their order."""
    search, first, done = islands.search, len(islands.individuals), islands.done
    each = len(search.seeds)
    results = trials.all([Trial(p.text, seed) for _, p in proposals for seed in search.seeds])
    for i, (island, proposal) in enumerate(proposals):
        found = [next(results) for _ in range(each)]
        failed = next((one.failed for one in found if one.failed), "")
        scores = [one.bits + search.weight * one.deviation for one in found]
        one = Individual(
            number=first + i,
            generation=done + 1 if proposal.by != "founder" else 0,
            island=island,
            **proposal._asdict(),
            fitness=None if failed else statistics.mean(scores),
            bits=() if failed else tuple(one.bits for one in found),
            deviation=() if failed else tuple(one.deviation for one in found),
            busiest=() if failed else tuple(one.busiest for one in found),
            failed=failed,
            seconds=round(sum(one.seconds for one in found), 1),
        )
        facts = one._asdict()
        record.append(log, "individual", facts.pop("number"), **facts)
        islands.add(one)
        if noise.gain(one) > noise.floor:
            print(f"{one.number:5}  generation {one.generation}: {noise.gain(one):.4f} better than the founder: {one.text}")
