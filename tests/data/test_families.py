"""Near-duplicates stay on one side of the split, and the held-out text of `programs` is one that was not seen."""

from __future__ import annotations

import lzma

import numpy as np
import pytest

from sigma_lite.config import CorpusConfig
from sigma_lite.data import baselines
from sigma_lite.data.baselines import seen_lines, xz_bits_per_byte, xz_given_training
from sigma_lite.data.corpora import documents, is_heldout
from sigma_lite.data.families import COMMON, families


def text(tag: str, lines: int = 30) -> str:
    return "".join(f"    the value of {tag} in line {n} is what counts\n" for n in range(lines))


def test_copies_are_one_family_and_nearness_is_passed_on():
    texts = {
        "a": text("a") + text("b"),
        "other": text("other"),
        "b": text("b") + text("c"),
        "c": text("c") + text("d"),
    }
    assert families(texts) == {"a": "a", "other": "other", "b": "a", "c": "a"}
    assert families({"x": text("x", 9) + text("y"), "z": text("x", 9) + text("z")}) == {"x": "x", "z": "z"}, (
        "nine lines are few"
    )


def test_a_licence_makes_no_family():
    """Lines that very many documents share tell nothing, however many of a short document's they are."""
    licence = text("the licence", 20)
    texts = {str(n): licence + text(f"document {n}", 5) for n in range(COMMON + 1)}
    assert set(families(texts).values()) == set(texts)
    few = {name: texts[name] for name in list(texts)[:3]}
    assert set(families(few).values()) == {"0"}, "among three it does"


def test_seen_lines_counts_bytes_of_whole_lines():
    train = b"return self\nthe quick brown fox jumps over\nshort\n"
    heldout = b"return self\nthe quick brown fox jumps over\nnew text here\n"
    found, copied = seen_lines(train, heldout)
    assert found == pytest.approx((12 + 31 + 1) / (len(heldout) + 1)) and copied == pytest.approx(31 / (len(heldout) + 1))


def test_xz_that_has_read_the_training_text_needs_less():
    train, heldout = text("train").encode() * 3, text("train", 20).encode() + text("held out", 20).encode()
    assert 0 < xz_given_training(train, heldout) < xz_bits_per_byte(heldout)
    assert xz_given_training(b"", heldout) == pytest.approx(xz_bits_per_byte(heldout), abs=8 * 40 / len(heldout))


@pytest.fixture(scope="module")
def split() -> dict[str, dict[bool, str]]:
    """Training (False) and held-out (True) text of both sources that are made of the library's files."""
    both = {}
    for source in ("stdlib", "programs"):
        sides = {False: [], True: []}
        for document in documents(CorpusConfig(source=source)):
            sides[is_heldout(document, 0.08)].append(document)
        both[source] = sides
    return both


def test_programs_hold_out_text_that_was_not_seen(split):
    """Half as much of it stands in the training text, line for line, as when files are split one by one."""
    found = {}
    for source, sides in split.items():
        train, heldout = ("\n".join(d.text for d in sides[side]).encode() for side in (False, True))
        found[source] = seen_lines(train, heldout)
        assert 0.05 < len(heldout) / len(train + heldout) < 0.11
    assert found["programs"][1] < 0.06 < 0.09 < found["stdlib"][1]
    names = [d.name for side in split["programs"].values() for d in side]
    assert not [n for n in names if n.startswith("encodings/") or n == "pydoc_data/topics.py"]


def test_families_lie_on_one_side(split):
    sides = {d.name: side for side, found in split["programs"].items() for d in found}
    assert sides["ntpath.py"] == sides["posixpath.py"] and sides["cProfile.py"] == sides["profile.py"]


def test_xz_forgets_nothing_and_small_texts_cost_what_they_did(monkeypatch):
    """A window as large as the text; up to the preset's own the same bytes come out, so recorded numbers stay."""
    text = np.random.default_rng(0).integers(0, 256, 40_000, np.uint8).tobytes()
    assert baselines._xz(text) == len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    monkeypatch.setattr(baselines, "PRESET_WINDOW", 4096)
    assert xz_given_training(text, text[:8000]) < 1, "it lies 40,000 bytes behind; forgotten it would cost 8 bits"
