"""The rows of prepared data, as training and validation of a run read them: plain text, conversations, several sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sigma_lite.config import CONVERSATIONS, CorpusConfig, MixtureConfig, RowsConfig, plain_path, require
from sigma_lite.data import shards
from sigma_lite.data.chat import marks
from sigma_lite.data.mixture import PreparedMixture, RowsOfSources, load_mixture
from sigma_lite.data.order import Begun, Order
from sigma_lite.data.packed import PackedRows
from sigma_lite.data.rows import Rows, stretches_of
from sigma_lite.data.shards import Prepared
from sigma_lite.data.stages import SPLITS
from sigma_lite.runfile import from_mapping
from sigma_lite.storage import StorageError


class RunData(NamedTuple):
    """What a run reads: its prepared data, and how this becomes rows."""

    prepared: Prepared | PreparedMixture
    rows: RowsConfig
    mixture: MixtureConfig

    def parts(self, split: str) -> dict[str, Rows]:
        """The rows of each source; of "heldout" all, in their order."""
        return {name: rows_of(source, split, self.rows) for name, source in self.prepared.sources.items()}

    def together(self, parts: Sequence[Rows]) -> Rows | RowsOfSources:
        """Rows of all sources, numbered through."""
        return RowsOfSources([*parts]) if self.mixture.sources else parts[0]

    def order(self, parts: Sequence[Rows], begun: Begun | None = None) -> Order:
        """Which training rows each step takes, as `together` numbers them."""
        if self.mixture.sources:
            stages = self.mixture.shares(self.prepared.tokens)
            return Order([len(part) for part in parts], self.rows, stages, begun=begun)
        return Order([len(parts[0])], self.rows, stretches=stretches_of(parts[0], self.rows))


def rows_of(source: Prepared, split: str, config: RowsConfig) -> Rows:
    """The rows of one source. Raises ConfigError where its kind cannot have them."""
    if (kind := source.manifest["corpus"]["source"]) in CONVERSATIONS:
        fits = config.split_above >= 1
        require(fits, f"rows.split_above={config.split_above}: rewrites plain text, not source {kind!r}; set it to 1")
        stream, frame = getattr(source, split), marks(source.tokenizer, source.manifest["end_of_text"])
        return PackedRows(stream, source.token_bytes, config.length, frame, config.packed or split == "heldout")
    copies = source.copies(config.split_above)
    return Rows(getattr(source, split), source.token_bytes, config.length, split == "heldout", copies)


def data_of(settings: Mapping[str, Any], folder: str | Path | None = None, splits: Collection[str] = SPLITS) -> RunData:
    """Open what a run with these settings read.

    Args:
        settings: as a checkpoint holds them.
        folder: where the data lies now, of a mixture its whole folder, or a source's, which is then read alone. None: where
            the run had it.
        splits: which tokens are needed.

    Raises: StorageError where it does not lie there.
    """
    corpus, mixture = settings.get("corpus", {}), from_mapping(MixtureConfig, settings.get("mixture", {}), "data.mixture")
    where = folder or corpus.get("dir")
    if where is None:
        raise StorageError("this model came without data: give --data, the folder of a prepared corpus")
    where, rows = plain_path(str(where), "data"), from_mapping(RowsConfig, settings.get("rows", {}), "data.rows")
    if not mixture.sources or Path(where, "manifest.json").is_file():
        return RunData(shards.load(where, splits=splits), rows, MixtureConfig())
    of_all = dataclasses.replace(from_mapping(CorpusConfig, corpus, "data.corpus"), dir=where)
    return RunData(load_mixture(of_all, mixture, splits), rows, mixture)
