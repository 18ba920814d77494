"""A folder of tokens: documents in, checksummed memory-mapped token files out, surviving a kill at any moment.

    settings.json          claims the folder for one set of corpus settings
    tokenizer.json         byte-level BPE
    documents-00000.jsonl  name, split, bytes, tokens and sha256 of each document of shard 0
    train-00000.bin        token ids of its training documents; train-00000.kinds.bin: what each token is
    heldout-00000.bin      the same of its held-out documents; heldout-00000.kinds.bin
    shard-00000.json       sizes and hashes of these files, written after them, and which tokens are of which domain
    ...
    part-00000.json        written after the last shard of part 0
    manifest.json          everything about the data; it is written last, so its presence means finished

With `parts: 4` in the corpus, shard 1 of part 3 is called 00003-00001, and four processes may prepare it side by side,
on one machine or on several that share the folder: the files are the same whoever writes them. Each file is whole or
absent (storage.atomic_write), so a second `prepare` keeps what is there and goes on behind it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from sigma_lite.config import CorpusConfig, plain_path, require
from sigma_lite.data import baselines, corpora, packages, stages, tokenizer
from sigma_lite.data.copies import Copies, copies
from sigma_lite.data.listing import Skipped
from sigma_lite.data.stream import Domains, TokenStream, check_file, token_dtype
from sigma_lite.storage import StorageError, exclusive, sha256_of, write_json

FORMAT = 1
RECIPE = 1  # raised by hand where the same text and settings give other tokens than before: a test sees that it must be
SHARD_TOKENS = 64_000_000  # 192 MB of memory and disk
COUNTED_AT_A_TIME = 10_000_000


@dataclass(frozen=True)
class Prepared:
    """A folder that `prepare` has finished: `manifest` holds the facts, `train` and `heldout` the tokens."""

    dir: Path
    manifest: dict
    train: TokenStream
    heldout: TokenStream

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return tokenizer.load(self.dir / "tokenizer.json")

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each token, int32 [V]."""
        return tokenizer.token_bytes(self.tokenizer, self.vocab_size)

    @property
    def sources(self) -> dict[str, Prepared]:
        """What rows are read from; a mixture has several."""
        return {"corpus": self}

    @property
    def vocab_size(self) -> int:
        return self.manifest["corpus"]["vocab_size"]

    def copies(self, limit: float) -> Copies | None:
        """The ids under which tokens are spread so that none exceeds a share `limit` of the training text; None at 1."""
        if limit >= 1:
            return None
        train_V, heldout_V = (self._counts(stream) for stream in (self.train, self.heldout))
        used_V = train_V + heldout_V > 0
        used_V[list(tokenizer.special_tokens(self.tokenizer))] = True
        return copies(train_V, limit, used_V)

    def _counts(self, stream: TokenStream) -> np.ndarray:
        counts_V = np.zeros(self.vocab_size, np.int64)
        for start in range(0, len(stream), COUNTED_AT_A_TIME):
            counts_V += np.bincount(stream.read(start, start + COUNTED_AT_A_TIME)[0], minlength=self.vocab_size)
        return counts_V

    def domain_tokens(self) -> dict[str, dict[str, int]]:
        """{domain: {"train": tokens, "heldout": tokens}}; {} when the corpus has none, or they were not recorded."""
        splits = {"train": self.train.domains, "heldout": self.heldout.domains}
        sizes = {split: domains.tokens() for split, domains in splits.items() if domains is not None}
        return {name: {split: sizes[split][name] for split in sizes} for name in sizes.get("train", ())}

    def documents(self) -> Iterator[dict]:
        """name, split, bytes, tokens (with <|endoftext|>) and sha256 of each document, in the order of the tokens."""
        for shard in self.manifest["shards"]:
            with open(self.dir / shard["files"]["documents"]["file"], encoding="utf-8") as lines:
                yield from map(json.loads, lines)

    def documents_in(self, first: int, end: int, split: str = "train") -> list[str]:
        """Names of the documents whose tokens lie among tokens first..end-1 of a split, in order."""
        names, at = [], 0
        for shard in self.manifest["shards"]:
            size = shard[f"{split}_tokens"]
            if at < end and first < at + size:
                with open(self.dir / shard["files"]["documents"]["file"], encoding="utf-8") as lines:
                    own = [facts for facts in map(json.loads, lines) if facts["split"] == split]
                ends = list(itertools.accumulate((facts["tokens"] for facts in own), initial=at))
                names += [
                    f["name"] for f, start, stop in zip(own, ends, ends[1:], strict=False) if start < end and first < stop
                ]
            at += size
        return names

    def left_out(self, but: Collection[str] = ()) -> str:
        """What `prepare` found and did not take, such as "1 not UTF-8 (a.txt)"; `but`: reasons not to name."""
        skipped = Skipped({reason: n for reason, n in self.manifest["skipped"].items() if reason not in but})
        skipped.first = self.manifest.get("first_skipped", {})
        return skipped.sentence()

    def facts(self) -> dict:
        """What a run's record says about its data."""
        facts = {**{name: self.manifest[name] for name in (*stages.COUNTED, "interpreter")}, **self.manifest["baselines"]}
        listed = {"packages": self.manifest["packages"]} if "packages" in self.manifest else {}
        return {**facts, "recipe": self.manifest.get("recipe", 1), **listed}


def prepare(
    corpus: CorpusConfig, progress: bool = True, shard_tokens: int = SHARD_TOKENS, tokenizer: bytes | None = None
) -> Prepared:
    """Make `corpus.dir` ready and open it; what an earlier call finished is kept, and nothing is done twice.

    `progress` shows bars on stderr for what takes longer than a second. `tokenizer` is the content of the tokenizer.json
    that all sources of a mixture share.
    A folder that an older recipe has finished is taken as it is, so that its runs go on, and that is said.
    Raises ConfigError when the folder holds other data, or an older recipe's unfinished ones, or the corpus cannot be read,
    and StorageError when a file was cut or altered or the disk is full; in each case what was there stays.
    """
    folder = Path(corpus.dir)
    if not _is_finished(folder, corpus):
        prepare_parts(corpus, progress=progress, shard_tokens=shard_tokens, tokenizer=tokenizer)
        with exclusive(folder / "prepare.lock", waiting=_waiting(folder)):
            _finish(folder, corpus, progress)
    ready = load(folder)
    if (was := ready.manifest.get("recipe", 1)) < RECIPE:
        fix = "delete the folder to prepare it anew, but a run that began with it needs it as it is"
        warnings.warn(f"{folder} was prepared by an older sigma-lite (recipe {was}, now {RECIPE}): {fix}", stacklevel=2)
    return ready


def prepare_parts(
    corpus: CorpusConfig,
    rank: int = 0,
    ranks: int = 1,
    *,
    progress: bool = True,
    shard_tokens: int = SHARD_TOKENS,
    tokenizer: bytes | None = None,
) -> list[int]:
    """Parts rank, rank + ranks, ... of the corpus; returns the parts that no process has finished so far.

    Where the list is empty, `prepare` only has to write the manifest. Processes need not know of each other: the first
    one trains the tokenizer while the others wait for it.
    Raises as `prepare` does, and ConfigError when `rank` is not one of `ranks` or there are more ranks than parts.
    """
    require(ranks >= 1, f"ranks={ranks}: must be at least 1")
    require(0 <= rank < ranks, f"rank={rank}: must be from 0 to ranks - 1 = {ranks - 1}")
    require(
        ranks <= corpus.parts,
        f"ranks={ranks}: there are parts={corpus.parts} of the corpus to share out; set data.corpus.parts={ranks} or more",
    )
    folder = Path(corpus.dir)
    with exclusive(folder / "tokenizer.lock", waiting=_waiting(folder)):
        bpe = _begin(folder, corpus, progress, tokenizer)
    for part in range(rank, corpus.parts, ranks):
        with exclusive(folder / f"part-{part:05}.lock", waiting=_waiting(folder)):
            stages.part_stage(folder, corpus, part, bpe, shard_tokens, progress)
    return [part for part in range(corpus.parts) if not stages.part_file(folder, part).exists()]


def _waiting(folder: Path) -> str:
    return f"another command prepares {folder}: waiting for it"


def load(folder: str | Path, full_check: bool = False, splits: Collection[str] = stages.SPLITS) -> Prepared:
    """Open a prepared folder, after a check of all sizes, and of the hashes of files < 64 MB (all with `full_check`).

    `fit` compares the others' hashes beside the training: see data/verified.py.

    Args:
        splits: which tokens must be there; ("heldout",) where the training tokens were left behind, as too large to share.

    Raises StorageError naming the file that is missing, cut or altered, and the fix.
    """
    folder = Path(folder)
    manifest = stages.read_json(folder / "manifest.json")
    if manifest is None:
        raise StorageError(f"{folder} holds no finished data (no manifest.json): run `sigma-lite prepare`")
    for entry in entries(manifest, splits):
        check_file(folder, entry, full_check)
    return _open(folder, manifest)


def has_heldout(corpus: CorpusConfig) -> bool:
    """Whether the held-out tokens are there, finished: enough to measure a model. Raises as `prepare` does."""
    return _is_finished(Path(corpus.dir), corpus, ("heldout",))


def _open(folder: Path, manifest: dict) -> Prepared:
    shards, dtype = manifest["shards"], token_dtype(manifest["corpus"]["vocab_size"])
    recorded = all("domains" in shard for shard in shards)  # not by sigma-lite before it knew domains
    spans = [shard["domains"] for shard in shards] if recorded else []
    names = sorted({name for shard in spans for split in stages.SPLITS for name, _ in shard[split] if name is not None})

    def stream(split: str) -> TokenStream:
        ids, kinds = ([folder / s["files"][name]["file"] for s in shards] for name in (split, f"{split}_kinds"))
        domains = Domains(names, (span for shard in spans for span in shard[split])) if recorded else None
        lengths = [s[f"{split}_tokens"] for s in shards]
        return TokenStream(ids, kinds, lengths, dtype, domains, manifest.get("end_of_text", tokenizer.END_OF_TEXT_ID))

    return Prepared(folder, manifest, stream("train"), stream("heldout"))


def _begin(folder: Path, corpus: CorpusConfig, progress: bool, given: bytes | None) -> Tokenizer:
    _check_owner(folder, corpus)
    if not _is_claimed(folder):
        write_json(folder / "settings.json", {"format": FORMAT, "recipe": RECIPE, "corpus": settings_of(corpus)})
    was = stages.read_json(folder / "settings.json").get("recipe", 1)
    mixed = f"{folder} was begun by an older sigma-lite (recipe {was}, this is {RECIPE}), which cut text into other tokens"
    require(was == RECIPE, f"{mixed}: delete it to prepare it anew, or let that version finish it")
    return stages.tokenizer_stage(folder, corpus, progress, given)


def _finish(folder: Path, corpus: CorpusConfig, progress: bool) -> None:
    """Write the manifest of finished parts. One that is there, because a file of it was lost, must fit them."""
    before = stages.read_json(folder / "manifest.json")
    parts = [stages.read_part(folder, corpus, part) for part in range(corpus.parts)]
    shards, skipped = [shard for own, _ in parts for shard in own], Skipped()
    for _, of_part in parts:
        skipped.add(of_part)
    manifest = {
        "format": FORMAT,
        "recipe": RECIPE,
        "corpus": settings_of(corpus),
        "interpreter": corpora.interpreter(),
        "skipped": dict(skipped),
        "first_skipped": skipped.first,
        **_sums(shards),
        "tokenizer": _entry(folder / "tokenizer.json"),
        "end_of_text": tokenizer.end_of_text(tokenizer.load(folder / "tokenizer.json"), corpus.end_of_text),
        "shards": shards,
    }
    empty = [split for split in stages.SPLITS if manifest[f"{split}_documents"] == 0]
    require(not empty, f"heldout={corpus.heldout} leaves no document for {' and '.join(empty)}: change it, or add documents")
    hashes = "".join(entry["sha256"] for entry in entries(manifest))
    manifest["fingerprint"] = hashlib.sha256(hashes.encode()).hexdigest()
    if before:
        if before["fingerprint"] != manifest["fingerprint"]:
            raise StorageError(f"{folder}: what was built again differs, the corpus has changed: delete the folder")
        return
    data = _open(folder, manifest)
    if corpus.source == "packages":
        manifest["packages"] = packages.listed(corpus.packages, data.documents())
    words = tokenizer.token_strings(data.tokenizer)
    heldout = baselines.first_bytes(data.heldout, words)
    train = baselines.last_bytes(data.train, words, baselines.XZ_BYTES - len(heldout))
    seen, copied = baselines.seen_lines(train, heldout)
    unigram = baselines.unigram_bits_per_byte(data.train, data.heldout, data.token_bytes)
    manifest["baselines"] = {
        "xz_bits_per_byte": baselines.xz_bits_per_byte(heldout),
        "xz_bytes": len(heldout),
        "xz_given_training_bits_per_byte": baselines.xz_given_training(train, heldout),
        "xz_train_bytes": len(train),
        "unigram_bits_per_byte": unigram,
        "heldout_lines_in_training": seen,
        "heldout_long_lines_in_training": copied,
    }
    write_json(folder / "manifest.json", manifest)
    if lost := data.left_out(but=("empty", "duplicate", "hidden")):
        warnings.warn(f"left out of the corpus: {lost}", stacklevel=2)


def _sums(shards: list[dict]) -> dict:
    names = [f"{split}_{what}" for split in stages.SPLITS for what in ("documents", "tokens", "bytes")]
    return {name: sum(shard[name] for shard in shards) for name in names}


# -------------------------------------------------------------------------------------------------------- the folder


def _is_finished(folder: Path, corpus: CorpusConfig, splits: Collection[str] = stages.SPLITS) -> bool:
    """Whether all files of these splits are there. Raises ConfigError when the folder is not for this corpus."""
    _check_owner(folder, corpus)
    manifest = stages.read_json(folder / "manifest.json")
    return manifest is not None and all((folder / entry["file"]).exists() for entry in entries(manifest, splits))


def _check_owner(folder: Path, corpus: CorpusConfig) -> None:
    fixes = f"set data.corpus.dir to another folder, or delete {folder}"
    found = stages.read_json(folder / "settings.json", what="the folder")
    if found is None:
        others = contents(folder)
        require(not others, f"{folder} holds files that `prepare` did not write ({', '.join(others[:3])}): {fixes}")
    if not _is_claimed(folder):
        return
    require(found["format"] == FORMAT, f"{folder} was prepared in format {found['format']}, this is {FORMAT}: {fixes}")
    was = found.get("recipe", 1)
    require(was <= RECIPE, f"{folder} was prepared by a newer sigma-lite (recipe {was}, this knows {RECIPE}): {fixes}")
    unnamed = settings_of(CorpusConfig())  # what a folder that is older than a setting was prepared with
    for name, value in settings_of(corpus).items():
        was = found["corpus"].get(name, unnamed[name])
        if name == "path" and was is not None:
            was = plain_path(was, name)  # ~ was written down as it stood
        require(was == value, f"{folder} was prepared with {name}={was!r}, not {value!r}: {fixes}")


def _is_claimed(folder: Path) -> bool:
    """Whether anything was made of the settings that the folder names: a start that was refused leaves no more than them."""
    return (folder / "settings.json").exists() and contents(folder) != ["settings.json"]


def contents(folder: Path) -> list[str]:
    """Names in a folder, but for those that a running or killed command leaves."""
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    return [name for name in names if not name.endswith((".lock", ".partial"))]


def settings_of(corpus: CorpusConfig) -> dict:
    """As settings.json holds them: lists where a config has tuples."""
    return json.loads(json.dumps({name: value for name, value in dataclasses.asdict(corpus).items() if name != "dir"}))


def _entry(path: Path) -> dict:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def entries(manifest: dict, splits: Collection[str] = stages.SPLITS) -> list[dict]:
    """The entries of all data files, or those of some splits, by name: a sidecar read back has its keys in another order."""
    wanted = {"documents", *splits, *(f"{split}_kinds" for split in splits)}
    files = (entry for shard in manifest["shards"] for name, entry in shard["files"].items() if name in wanted)
    return sorted([manifest["tokenizer"], *files], key=lambda entry: entry["file"])
