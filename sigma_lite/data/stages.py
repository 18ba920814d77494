"""The stages of `prepare`: each writes whole files, and finds and keeps those that an interrupted run has left.

Documents are read twice, for the tokenizer and for the tokens, and never held together: memory stays at one shard.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import count, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from sigma_lite.config import CONVERSATIONS, CorpusConfig, require
from sigma_lite.data import conversations, corpora, tokenizer
from sigma_lite.data.corpora import Document
from sigma_lite.data.existing import existing, normal, require_usable
from sigma_lite.data.kinds import SPECIAL, byte_kinds, token_kinds
from sigma_lite.data.listing import Skipped
from sigma_lite.data.stream import check_file, token_dtype, write_array, write_lines
from sigma_lite.storage import StorageError, atomic_write, write_json

SAMPLE_CHARACTERS = 200_000_000  # BPE merges hardly change with more text than this; so much is held in memory
BATCH_CHARACTERS = 1_000_000  # text encoded at a time: enough for all cores, little enough to hold
SPLITS = ("train", "heldout")
COUNTED = ("train_tokens", "heldout_tokens", "heldout_bytes")  # of a corpus, in its facts


def read_json(path: Path, what: str = "it") -> dict | None:
    """The content of a JSON file, or None when there is none. Raises StorageError saying to delete `what`."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise StorageError(f"{path} is damaged ({error}): delete {what} and run `sigma-lite prepare`") from error


# --------------------------------------------------------------------------------------------------------- tokenizer


def tokenizer_stage(folder: Path, corpus: CorpusConfig, progress: bool, given: bytes | None = None) -> Tokenizer:
    """tokenizer.json: the one that the settings name, or learned from the training documents of all parts; or it is there.

    Args:
        given: the content of the one that all sources of a mixture share.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        content = given or made_tokenizer(corpus, progress, lambda: sample(training_documents(corpus, progress)), path)
        with atomic_write(path) as file:
            file.write(content)
    other = "set data.corpus.dir (or this source's dir) to another folder, or delete it"
    require(given in (None, path.read_bytes()), f"{folder} was prepared with another tokenizer than this mixture's: {other}")
    return tokenizer.load(path)


def made_tokenizer(corpus: CorpusConfig, progress: bool, texts: Callable[[], Iterator[str]], name: str | Path) -> bytes:
    """The content of a tokenizer.json. Of a stranger's tokenizer the file is kept byte for byte.

    Args:
        texts: what one is learned from, where the settings name none.
        name: what messages call it then.
    """
    if corpus.tokenizer:
        content = existing(corpus.tokenizer)
    else:
        options = {"special": corpus.special_tokens, "single_digits": corpus.single_digits}
        content = tokenizer.train(texts(), corpus.vocab_size, progress, **options).to_str(pretty=True).encode()
    made = tokenizer.from_bytes(content, corpus.tokenizer or name)
    if corpus.tokenizer:
        require_usable(made, corpus.tokenizer, corpus.vocab_size)
    tokenizer.end_of_text(made, corpus.end_of_text)
    return content


def sample(documents: Iterator[Document], most: int | None = None) -> Iterator[str]:
    """All texts, or of a large corpus those with the lowest hashes, until they hold `most` characters (SAMPLE_CHARACTERS).

    Every document has the same chance wherever it stands, and the same one again in the next run.
    """
    most = most or SAMPLE_CHARACTERS
    kept: list[tuple[int, int, str]] = []  # a heap: the highest hash first
    size = number = 0
    for number, document in enumerate(documents, start=1):
        rank = int.from_bytes(hashlib.blake2b(document.key.encode(), digest_size=8, salt=b"tokenizer").digest(), "big")
        heapq.heappush(kept, (-rank, number, document.text))
        size += len(document.text)
        while size - len(kept[0][2]) >= most:
            size -= len(heapq.heappop(kept)[2])
    if len(kept) < number:
        which = f"{len(kept):,} of {number:,} training documents, drawn evenly: {size:,} characters"
        warnings.warn(f"the tokenizer learned from {which}", stacklevel=2)
    yield from (text for _, _, text in sorted(kept, key=lambda item: item[1]))


def training_documents(corpus: CorpusConfig, progress: bool) -> Iterator[Document]:
    """Raises ConfigError at their end when `heldout` leaves one side without any."""
    number, lowest, highest, unbroken = 0, 1.0, 0.0, []
    total = corpora.expected(corpus) if progress else None
    for document in _with_bar(corpora.documents(corpus), total, "reading for the tokenizer", progress):
        position = corpora.split_position(document)
        number, lowest, highest = number + 1, min(lowest, position), max(highest, position)
        if position >= corpus.heldout:
            yield document
            unbroken += [document.name] if tokenizer.has_long_run(document.text) else []
    if unbroken:
        warnings.warn(
            f"{named(unbroken)}: over {tokenizer.LONG_RUN} characters without a break; BPE learned from pieces of them. If"
            " this is data, such as base64, rather than text, leave it out of the corpus",
            stacklevel=2,
        )
    require(
        number > 1,
        "the corpus holds a single document, which cannot be both trained on and held out: cut it into several files,"
        " or into the lines of a .jsonl file",
    )
    here = f"heldout={corpus.heldout} of {number} documents"
    require(lowest < corpus.heldout, f"{here} keeps none for validation: set heldout to {lowest + 1e-3:.3f} or more")
    require(highest >= corpus.heldout, f"{here} keeps none for training: set heldout to {highest - 1e-3:.3f} or less")


def named(names: list[str]) -> str:
    """The first three, and how many there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more documents" if len(names) > 3 else "")


def _with_bar(
    documents: Iterator[Document], total: int | None, desc: str, progress: bool, done: int = 0
) -> Iterator[Document]:
    bar = {"desc": desc, "total": total, "initial": done, "unit": " documents"}
    return iter(tqdm(documents, disable=not progress, delay=1, leave=False, **bar))


# ------------------------------------------------------------------------------------------------------------ tokens


class Encoded(NamedTuple):
    facts: dict  # name, split, bytes, tokens and sha256 of the document
    domain: str | None
    ids: np.ndarray  # <|endoftext|> and the document's tokens
    kinds: np.ndarray  # uint8, of the same length


def part_file(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05}.json"


def part_stage(folder: Path, corpus: CorpusConfig, part: int, bpe: Tokenizer, shard_tokens: int, progress: bool) -> None:
    """Every shard of a part that is not finished, then the file that says so; finished shards are passed over.

    A shard ends with the batch of documents that brings it to `shard_tokens`. Documents of finished shards are read again
    only where one cannot begin behind them, or where a file of theirs was touched: then to see whether it changed.
    """
    if _part_is_finished(folder, corpus, part):
        return
    shards, at, skipped, digest = _begun(folder, corpus, part)
    desc = f"tokens for {folder}" + (f", part {part} of {corpus.parts}" if corpus.parts > 1 else "")
    total = corpora.expected(corpus) if progress else None
    documents = corpora.documents_of_part(corpus, part, skipped, at)
    documents = _with_bar(documents, total and -(-total // corpus.parts), desc, progress, at.get("documents", 0))
    for number in count(len(shards)):
        tail = _tail(corpus, part, number)
        if shard := _finished(folder, tail):
            for document in islice(documents, shard["documents"]):
                digest.update(_identity(document.name, _sha256(document.text)))
            if digest.hexdigest() != shard["digest"]:
                raise StorageError(f"the documents changed since {folder} was begun: delete it to prepare it anew")
        else:
            encoded = list(_encode(documents, bpe, corpus, shard_tokens))
            if not encoded:
                break
            for item in encoded:
                digest.update(_identity(item.facts["name"], item.facts["sha256"]))
            shard = _write_shard(folder, tail, encoded, digest.hexdigest(), _next(corpus, part, at, skipped))
        shards.append(shard)
    write_json(part_file(folder, part), {"shards": len(shards), "skipped": dict(skipped), "first_skipped": skipped.first})


def _next(corpus: CorpusConfig, part: int, at: corpora.Place, skipped: Skipped) -> dict | None:
    """Where the next shard begins, as plain values; None where only reading from the beginning finds it."""
    if (seen := corpora.seen_so_far(corpus, part, at)) is None:
        return None
    place = {name: value() if callable(value) else value for name, value in at.items() if name != "done"}
    return {"at": place, "seen": seen, "skipped": dict(skipped), "first_skipped": skipped.first}


def _begun(folder: Path, corpus: CorpusConfig, part: int) -> tuple[list[dict], corpora.Place, Skipped, Any]:
    """(finished shards that need not be read again, where to go on, what was left out, hash of their documents)."""
    shards = []
    while shard := _finished(folder, _tail(corpus, part, len(shards))):
        shards.append(shard)
    after = shards[-1].get("next") if shards else None
    if after is None or corpora.seen_so_far(corpus, part, after["at"]) != after["seen"]:
        return [], {}, Skipped(), hashlib.sha256()

    def done() -> Iterator[tuple[str, str]]:
        for shard in shards:
            with open(folder / shard["files"]["documents"]["file"], encoding="utf-8") as lines:
                yield from ((facts["name"], facts["sha256"]) for facts in map(json.loads, lines))

    digest, skipped = hashlib.sha256(), Skipped(after["skipped"])
    for name, sha256 in done():
        digest.update(_identity(name, sha256))
    skipped.first = after["first_skipped"]
    return shards, {**after["at"], "done": done}, skipped, digest


def _part_is_finished(folder: Path, corpus: CorpusConfig, part: int) -> bool:
    done = read_json(part_file(folder, part))
    return done is not None and all(_finished(folder, _tail(corpus, part, n)) for n in range(done["shards"]))


def read_part(folder: Path, corpus: CorpusConfig, part: int) -> tuple[list[dict], Skipped]:
    """The sidecars of a finished part's shards, and what was left out, by reason."""
    done = read_json(part_file(folder, part))
    shards = [read_json(folder / f"shard-{_tail(corpus, part, number)}.json") for number in range(done["shards"])]
    for shard in shards:
        shard.pop("next", None)  # of no use to who reads the tokens
    skipped = Skipped(done["skipped"])
    skipped.first = done.get("first_skipped", {})
    return shards, skipped


def _tail(corpus: CorpusConfig, part: int, number: int) -> str:
    return f"{part:05}-{number:05}" if corpus.parts > 1 else f"{number:05}"


def _finished(folder: Path, tail: str) -> dict | None:
    """The sidecar of a shard whose files are all there. Raises StorageError when one is not what was written."""
    shard = read_json(folder / f"shard-{tail}.json")
    if shard is None or not all((folder / entry["file"]).exists() for entry in shard["files"].values()):
        return None
    for entry in shard["files"].values():
        check_file(folder, entry, full=True)
    return shard


def _identity(name: str, sha256: str) -> bytes:
    return f"{name}\0{sha256}\n".encode()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _encode(documents: Iterator[Document], bpe: Tokenizer, corpus: CorpusConfig, shard_tokens: int) -> Iterator[Encoded]:
    """Tokens of the next documents, until a shard is full or the documents end."""
    dtype, lengths_V = token_dtype(corpus.vocab_size), tokenizer.token_bytes(bpe)
    end, total = tokenizer.end_of_text(bpe, corpus.end_of_text), 0
    while total < shard_tokens and (batch := _batch(documents, min(BATCH_CHARACTERS, shard_tokens))):
        for document, found in zip(batch, _ids(batch, bpe, corpus, end), strict=True):
            ids = np.array(found, dtype)
            kinds_of_bytes = byte_kinds(document.name, normal(bpe, document.text))
            kept = int(lengths_V[ids].sum()) == len(kinds_of_bytes)
            require(kept, f"data.corpus.tokenizer does not keep every byte of {document.name}: choose a byte-level one")
            kinds, solid = np.full(len(ids), SPECIAL, np.uint8), lengths_V[ids] > 0
            kinds[solid] = token_kinds(lengths_V[ids[solid]], kinds_of_bytes)
            total += len(ids)
            facts = _facts(document, corpus, len(ids), len(kinds_of_bytes))
            yield Encoded(facts, corpora.domain_of(corpus, document.name), ids, kinds)


def _ids(batch: list[Document], bpe: Tokenizer, corpus: CorpusConfig, end: int) -> Iterable[list[int]]:
    """Tokens of each document, the one that ends a text first."""
    if corpus.source in CONVERSATIONS:
        return conversations.encoded([d.turns for d in batch], bpe, end, one_by_one=corpus.source == "tasks")
    return ([end, *encoding.ids] for encoding in bpe.encode_batch_fast([d.text for d in batch]))


def _batch(documents: Iterator[Document], characters: int) -> list[Document]:
    batch, size = [], 0
    while size < characters and (document := next(documents, None)):
        batch.append(document)
        size += len(document.text)
    return batch


def _facts(document: Document, corpus: CorpusConfig, n_tokens: int, n_bytes: int) -> dict:
    return {
        "name": document.name,
        "split": SPLITS[corpora.is_heldout(document, corpus.heldout)],
        "bytes": n_bytes,
        "tokens": n_tokens,
        "sha256": _sha256(document.text),
    }


def _write_shard(folder: Path, tail: str, encoded: list[Encoded], digest: str, after: dict | None) -> dict:
    """Write a shard's files, then the sidecar that vouches for them.

    Args:
        digest: of its part's documents up to here.
        after: where the next shard begins.
    """
    files = {"documents": write_lines(folder / f"documents-{tail}.jsonl", (item.facts for item in encoded))}
    shard = {"documents": len(encoded), "digest": digest, "files": files, "domains": {}}
    if after is not None:
        shard["next"] = after
    for split in SPLITS:
        own = [item for item in encoded if item.facts["split"] == split]
        files[split] = write_array(folder / f"{split}-{tail}.bin", (item.ids for item in own))
        files[f"{split}_kinds"] = write_array(folder / f"{split}-{tail}.kinds.bin", (item.kinds for item in own))
        shard["domains"][split] = _stretches(own)
        shard[f"{split}_documents"] = len(own)
        for what in ("bytes", "tokens"):
            shard[f"{split}_{what}"] = sum(item.facts[what] for item in own)
    write_json(folder / f"shard-{tail}.json", shard)
    return shard


def _stretches(own: list[Encoded]) -> list[list]:
    """(domain, tokens) of neighbouring documents of one domain."""
    return [[domain, sum(len(item.ids) for item in group)] for domain, group in groupby(own, key=lambda item: item.domain)]
