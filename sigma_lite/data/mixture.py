"""Several corpora under one tokenizer, prepared side by side and read as one: what `data.mixture` names.

DIR/tokenizer.json   of all sources; it stays as it is, whatever weights or sources come later
DIR/mixture.json     what it was made of
DIR/NAME/            the prepared tokens of each source, a folder as data/shards.py makes it
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import warnings
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from sigma_lite.config import OF_ALL_SOURCES, ConfigError, CorpusConfig, MixtureConfig, require
from sigma_lite.data import shards, stages
from sigma_lite.data.rows import Batch, Rows, together
from sigma_lite.data.shards import Prepared
from sigma_lite.data.tokenizer import FILE
from sigma_lite.runfile import source_corpora
from sigma_lite.storage import StorageError, atomic_write, exclusive, sha256_of, write_json


@dataclass(frozen=True)
class PreparedMixture:
    """All sources of a mixture, prepared with one tokenizer. Offers what a `Prepared` does, as far as a run needs it."""

    dir: Path
    sources: dict[str, Prepared]

    @property
    def tokens(self) -> dict[str, int]:
        """Training tokens of each source."""
        return {name: source.manifest["train_tokens"] for name, source in self.sources.items()}

    @cached_property
    def manifest(self) -> dict[str, Any]:
        each = [source.manifest for source in self.sources.values()]
        text = "".join(f"{name}\0{source.manifest['fingerprint']}\n" for name, source in self.sources.items())
        return {
            "fingerprint": hashlib.sha256(text.encode()).hexdigest(),
            "tokenizer": each[0]["tokenizer"],
            "heldout_bytes": sum(manifest["heldout_bytes"] for manifest in each),
        }

    def facts(self) -> dict[str, Any]:
        """What a run's record says about its data: of all sources, and of each.

        A compressor's bits per byte are those of the sources, each compressed by itself, weighted by held-out bytes.
        """
        each = {name: source.facts() for name, source in self.sources.items()}
        bits = [name for name in next(iter(each.values())) if name.endswith("bits_per_byte")]
        total = {name: sum(facts[name] for facts in each.values()) for name in stages.COUNTED}
        means = {b: sum(f[b] * f["heldout_bytes"] for f in each.values()) / total["heldout_bytes"] for b in bits}
        first = next(iter(each.values()))
        return {**total, **means, "interpreter": first["interpreter"], "recipe": first["recipe"], "sources": each}

    def left_out(self) -> str:
        said = {name: source.left_out() for name, source in self.sources.items()}
        return "; ".join(f"{name}: {left}" for name, left in said.items() if left)


def prepare_mixture(
    corpus: CorpusConfig, mixture: MixtureConfig, progress: bool = True, rank: int = 0, ranks: int = 1, **options: Any
) -> PreparedMixture | None:
    """Make all sources ready and open them; raises as `shards.prepare` does. What is finished is kept.

    Args:
        rank: of `ranks` processes that share out each source's `parts`; None is returned where others are not finished.
        options: for `shards.prepare`.
    """
    given, sources = _tokenizer(corpus, mixture, progress), source_corpora(corpus, mixture)
    if ranks > 1:
        shared = {"progress": progress, "tokenizer": given, **options}
        if any([shards.prepare_parts(source, rank, ranks, **shared) for source in sources.values()]):
            return None
    for name, source in sources.items():
        with _of(name):
            shards.prepare(source, progress, tokenizer=given, **options)
    return load_mixture(corpus, mixture)


@contextlib.contextmanager
def _of(name: str) -> Iterator[None]:
    """Have a ConfigError say of which source it is."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"data.mixture.sources.{name}: {error}") from error


def load_mixture(corpus: CorpusConfig, mixture: MixtureConfig, splits: Collection[str] = stages.SPLITS) -> PreparedMixture:
    """Open prepared sources; raises StorageError as `shards.load` does, and ConfigError where their tokenizers differ."""
    found = {name: shards.load(own.dir, splits=splits) for name, own in source_corpora(corpus, mixture).items()}
    path = Path(corpus.dir, FILE)
    if not path.is_file():
        raise StorageError(f"{path}, the tokenizer of all sources, is missing: run `sigma-lite prepare`")
    for source in found.values():
        same = source.manifest["tokenizer"]["sha256"] == sha256_of(path)
        fix = "delete it to prepare it anew, or give the source another dir"
        require(same, f"{source.dir} was prepared with another tokenizer than {path}: {fix}")
    return PreparedMixture(Path(corpus.dir), found)


def has_all_heldout(corpus: CorpusConfig, mixture: MixtureConfig) -> bool:
    """Whether the held-out tokens of all sources are there."""
    return all([shards.has_heldout(source) for source in source_corpora(corpus, mixture).values()])


# --------------------------------------------------------------------------------------------------------- tokenizer


def _tokenizer(corpus: CorpusConfig, mixture: MixtureConfig, progress: bool) -> bytes:
    """The tokenizer.json of all sources: named, or learned from a text in which each source has its share."""
    folder, path = Path(corpus.dir), Path(corpus.dir, FILE)
    with exclusive(folder / "mixture.lock", waiting=f"another command prepares {folder}: waiting for it"):
        now = {name: shards.settings_of(corpus)[name] for name in OF_ALL_SOURCES}
        found = stages.read_json(folder / "mixture.json", what="the folder")
        others = [] if found else [name for name in shards.contents(folder) if name not in mixture.sources]
        fix = "set data.corpus.dir to another folder, or delete it"
        require(not others, f"{folder} holds files of no mixture ({', '.join(others[:3])}): {fix}")
        for name, value in now.items() if found else ():
            was = found["tokenizer"].get(name)
            require(was == value, f"{folder} was prepared with {name}={was!r}, not {value!r}: {fix}")
        if not path.exists():
            content = stages.made_tokenizer(corpus, progress, lambda: _sample(corpus, mixture, progress), path)
            write_json(folder / "mixture.json", {"tokenizer": now})
            with atomic_write(path) as file:
                file.write(content)
    return path.read_bytes()


def _sample(corpus: CorpusConfig, mixture: MixtureConfig, progress: bool) -> Iterator[str]:
    """Texts of all sources, each with its share of the characters; of a source that is too short some come twice or more.

    Shares are the mean of the stages', so that text of the last one is known too.
    """
    sources, kept = source_corpora(corpus, mixture), {}
    equal = dict.fromkeys(sources, 1 / len(sources))
    for name, source in sources.items():
        asked = _mean_shares(mixture, dict.fromkeys(sources, 1)) if mixture.weights else equal
        most = max(1, int(stages.SAMPLE_CHARACTERS * asked[name]))
        with _of(name):
            kept[name] = list(stages.sample(stages.training_documents(source, progress), most))
    sizes = {name: sum(map(len, texts)) for name, texts in kept.items()}
    shares, total = _mean_shares(mixture, sizes), sum(sizes.values())
    for name, texts in kept.items():
        wanted = round(shares[name] * total)  # a fraction of a character would bring a text again
        for text in itertools.cycle(texts):
            if wanted <= 0:
                break
            wanted -= len(text)
            yield text
    short = [name for name in sources if shares[name] * total > 10 * sizes[name]]
    if short:
        warnings.warn(f"the tokenizer read {', '.join(short)} over ten times to give it its share", stacklevel=2)


def _mean_shares(mixture: MixtureConfig, sizes: Mapping[str, int]) -> dict[str, float]:
    means = np.mean([shares for _, shares in mixture.shares(sizes)], axis=0)
    return dict(zip(sizes, means.tolist(), strict=True))


# -------------------------------------------------------------------------------------------------------------- rows


class RowsOfSources(Dataset):
    """The rows of all sources, numbered through source after source; `domains_B` says of which source each is."""

    def __init__(self, parts: list[Rows]):
        self.parts = parts
        self.ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, row: int) -> Batch:
        return self.__getitems__([row])

    def __getitems__(self, rows: list[int]) -> Batch:
        found = []
        for row in rows:
            source = min(bisect_right(self.ends, row), len(self.parts) - 1)  # the number behind the last is padding
            first = self.ends[source] - len(self.parts[source])
            found.append(self.parts[source][row - first]._replace(domains_B=torch.tensor([source])))
        return together(found)
