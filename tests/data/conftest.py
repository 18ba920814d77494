"""Small corpora that hold what real ones spring on you: other scripts, CRLF, one-byte files, a spelled-out end of text."""

from __future__ import annotations

from pathlib import Path

import pytest

from sigma_lite.config import CorpusConfig
from sigma_lite.data.shards import Prepared, prepare

ODD_TEXTS = {
    "crlf.py": 'def f():\r\n    """Döc."""\r\n    return "x"\r\n',
    "one.txt": "x",
    "spelled.txt": "before <|endoftext|> after <|user|>\n",
    "scripts.txt": "Grüße, Καλημέρα, 你好, 🙂🙃 \u2028 \ufeff tail without newline",
    "blank.txt": " \n\t\n",
    "latin.py": "# caf\u00e9\nprice = '5 €'  # \U0001f4b6\n",
}


def write_texts(folder: Path) -> dict[str, str]:
    """A corpus of some 16 kB in `folder`; returns its texts by name."""
    texts = dict(ODD_TEXTS)
    for number in range(14):
        lines = (f'def rule_{number}_{i}(x):\n    """Add {i * number}."""\n    return x + {i * number}\n' for i in range(16))
        texts[f"package_{number % 3}/module_{number}.py"] = f"# module {number}\n" + "\n\n".join(lines)
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return texts


def corpus_of(folder: Path, **changes) -> CorpusConfig:
    """Settings of the corpus in `folder`/text, prepared in `folder`/data."""
    return CorpusConfig(
        **{"source": "files", "path": str(folder / "text"), "dir": str(folder / "data"), "vocab_size": 300, "heldout": 0.2}
        | changes
    )


def prepare_quietly(corpus: CorpusConfig) -> Prepared:
    return prepare(corpus, progress=False, shard_tokens=1500)  # several shards from the small corpus


@pytest.fixture(scope="session")
def texts_and_data(tmp_path_factory) -> tuple[dict[str, str], Prepared]:
    """The texts and the data prepared from them, in several shards. Do not write into the folder."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = write_texts(folder / "text")
    return texts, prepare_quietly(corpus_of(folder))


@pytest.fixture(scope="session")
def data(texts_and_data) -> Prepared:
    return texts_and_data[1]


@pytest.fixture
def fresh(tmp_path) -> Path:
    """A folder with a corpus in text/, not yet prepared."""
    write_texts(tmp_path / "text")
    return tmp_path
