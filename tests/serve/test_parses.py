"""Code that parses, against a 5-gram model: what counts, which prompts, and that both writers answer the same ones."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from sigma_lite.data import shards
from sigma_lite.data.ngram import NGram
from sigma_lite.serve.generate import Sampling
from sigma_lite.serve.trained import Trained

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from parses import by_counting, compare, headers, is_function


@pytest.mark.parametrize(
    ("written", "fine"),
    [
        ("\n    return x\n", True),
        ("\n    return x\n    y = (1", True),  # the line that was cut off does not count
        ("\n    return x\ndef other(", True),  # nor what follows the function
        ("\n    return (x\n    y = 1\n", False),
        ("\nreturn x\n", False),
        ("\n    # nothing\n", False),
        ("\n    return x", False),  # no whole line
        ("", False),
        (" return x\n", True),
    ],
)
def test_what_counts_as_a_function(written, fine):
    assert is_function("def f(x):", written) == fine


def test_prompts_are_headers_of_held_out_functions(corpus_and_data):
    data = shards.load(corpus_and_data / "prepared")
    names = [facts["name"] for facts in data.documents() if facts["split"] == "heldout"]
    held_out = {name.removesuffix(".py").partition("_")[2] for name in names}
    found = headers(data, 1000)
    assert len(found) == 10 * len(held_out) and found != sorted(found)
    assert {header.split("_")[1] for header in found} == held_out
    assert all(header.startswith("def rule_") and header.endswith("(x):") for header in found)
    assert headers(data, 4) == headers(data, 4) and len(headers(data, 4)) == 4


def test_a_counted_text_is_written_again():
    ids = np.array([0, 5, 6, 7, 8, 9, 4] * 50)
    model, greedy = NGram(ids, 10), Sampling(0)
    assert by_counting(model, [0, 5], 4, greedy, end=0, seed=0) == [6, 7, 8, 9]
    assert by_counting(model, [0, 5], 40, greedy, end=0, seed=0) == [6, 7, 8, 9, 4], "it stops where a document does"


def test_both_continue_the_same_prompts(finished, monkeypatch):
    """The tiny corpus is one function over and over: counting copies it, the untrained model writes nothing that parses."""
    monkeypatch.chdir(finished)
    trained = Trained("run")
    found = compare(trained, shards.load("prepared"), prompts=6, tokens=80, temperatures=[0.0])
    assert found["prompts"] == 6 and found["tokens"] == 80
    own = found["parses"]["0.0"]
    assert own["5-gram"] >= 0.8 > own["model"] and own["gap"] == pytest.approx(own["model"] - own["5-gram"])
