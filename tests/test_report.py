"""The page: true to its record, self-contained, safe, small, the same every time. The runs are made up."""

from __future__ import annotations

import base64
import copy
import hashlib
import shutil
import subprocess
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import synthetic_run
from read_page import Page

from sigma_lite.report import markup, words, write_report
from sigma_lite.report.findings import findings
from sigma_lite.report.headlines import headlines
from sigma_lite.storage import StorageError

RUN = synthetic_run.entries()
LAST_LOAD = [entry for entry in RUN if entry["kind"] == "load"][-1]
ATTACK = "</script></pre><script>alert(1)</script><img src=https://example.org/x onerror=alert(1)><!-- <i>"


def report(folder: Path, entries: list[dict]) -> Page:
    return Page(write_report(synthetic_run.write(folder, entries)).read_text("utf-8"))


def unpacked(array: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(array["bdata"]), "<" + array["dtype"])


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Page:
    return report(tmp_path_factory.mktemp("runs") / "toy", RUN)


# ------------------------------------------------------------------------------------------------------------- truth


def test_the_page_draws_the_recorded_deviations(toy):
    loads = [entry for entry in RUN if entry["kind"] == "load"]
    band = toy.data("data-band")["data"]
    np.testing.assert_allclose(unpacked(band[0]["y"]), [100 * (96 * min(e["f"][0]) - 1) for e in loads], rtol=1e-6)
    np.testing.assert_allclose(unpacked(band[7]["y"]), [100 * (96 * max(e["f"][3]) - 1) for e in loads], rtol=1e-6)


def test_the_head_holds_the_final_numbers(toy):
    bits = [entry for entry in RUN if entry["kind"] == "validation"][-1]["bits_per_byte"]
    tiles = {tile.name: tile for tile in headlines(RUN)}
    most, least = (words.percent(96 * end(LAST_LOAD["f"][0]) - 1) for end in (max, min))
    assert tiles["held-out bits per byte"].value == f"{bits:.3f}"
    assert tiles["held-out bits per byte"].detail == (
        "xz -9e given the training text 1.402 · xz -9e given no training text 1.823 · token frequencies alone 2.710"
    )
    assert tiles["experts per token"].value == "1 of 96" and "8, 6, 4, 2" in tiles["experts per token"].detail
    assert tiles["load deviation, layer 0"].value == f"{most} / {least}"
    assert tiles["training tokens"].value == "8.19\u00a0M" and tiles["wall time"].value == "15\u00a0min 10\u00a0s"
    assert all(tile.value in toy.words for tile in tiles.values())


def test_only_an_expert_without_a_token_is_at_minus_100_percent():
    assert [words.percent(deviation) for deviation in (-1.0, -0.9999, 0.314)] == ["−100\u00a0%", "−99\u00a0%", "+31\u00a0%"]


def test_provenance_is_on_the_page(toy):
    for text in ("sigma-lite fit -c scaled_configs/toy.yaml", "torch 2.13.0", "AMD EPYC", "0123abc", "9,798,016"):
        assert text in toy.words
    for text in ("window_tokens: 200000", "max_steps: 1000", "gradient norm 31.2", "[8, 6, 4, 2] -> [1, 1, 1, 1]"):
        assert text in toy.words
    assert 'Return the <b>path</b> & its parent."""' in toy.words


def verdicts(entries: list[dict]) -> dict[str, bool | None]:
    return {finding.text: finding.holds for finding in findings(entries)}


def changed(kind: str, **facts) -> list[dict]:
    """The run with other facts in the last entry of a kind."""
    entries = copy.deepcopy(RUN)
    [entry for entry in entries if entry["kind"] == kind][-1].update(facts)
    return entries


def test_verdict_on_compressors_follows_the_numbers():
    assert verdicts(changed("validation", bits_per_byte=1.5))[
        "Held-out text costs 1.500 bits per byte, xz -9e given no training text needs 1.823: 18 % less."
    ]
    worse = verdicts(changed("validation", bits_per_byte=2.0))
    assert worse["Held-out text costs 2.000 bits per byte, xz -9e given no training text needs 1.823: 10 % more."] is False


def test_verdict_on_the_blind_spot_needs_a_flat_loss_and_an_uneven_load():
    uneven = [[2.9 / 96, *[(1 - 2.9 / 96) / 95] * 95], *LAST_LOAD["f"][1:]]
    blind = "The balance loss of layer 0 is 1.01 (1 = balanced) while its busiest expert gets 2.9× its share"
    assert f"{blind}: the loss does not see it." in verdicts(changed("load", lbl=[1.01, 1, 1, 1], f=uneven))
    seen = "The balance loss of layer 0 is 1.70 (1 = balanced) and its busiest expert gets 2.9× its share."
    assert seen in verdicts(changed("load", lbl=[1.7, 1, 1, 1], f=uneven))


def test_verdict_on_dead_experts_counts_them():
    assert verdicts(RUN)["No expert is dead in the last window."] is True
    f = copy.deepcopy(LAST_LOAD["f"])
    f[2][5] = f[2][6] = 0.0
    assert verdicts(changed("load", f=f))["2 experts are dead in the last window (layer 2: 2)."] is False


def test_verdict_on_progress_and_health():
    assert verdicts(RUN)["The run is complete: step 1,000 of 1,000."] is True
    half = [entry for entry in RUN if entry["step"] <= 500 and entry["kind"] != "event"]
    assert "The run stands at step 500 of 1,000; everything below is true up to there." in verdicts(half)
    assert verdicts(half)["No steps skipped; the loss is finite at every recorded step."] is True
    assert verdicts(changed("step", loss=None))["1 step skipped; the loss is not finite at 1 step."] is False


# --------------------------------------------------------------------------------------------------- one file, no more


def test_nothing_is_loaded_from_anywhere(toy):
    loaders = {"link", "img", "iframe", "object", "embed", "video", "audio", "source", "base", "form"}
    assert not [tag for tag, _ in toy.tags if tag in loaders]
    addresses = [value for _, attributes in toy.tags for name, value in attributes.items() if name in ("src", "href")]
    assert addresses and all(address.startswith("#") for address in addresses)
    style = Path(markup.__file__).with_name("page.css").read_text("utf-8")
    assert "url(" not in style and "@import" not in style


def test_the_browser_is_told_to_run_exactly_these_scripts_and_load_nothing(toy):
    policy = next(attrs["content"] for tag, attrs in toy.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    scripts = [text for attributes, text in toy.scripts if "type" not in attributes]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert len(scripts) == 2 and policy.startswith(
        "default-src 'none'; script-src " + " ".join(f"'sha256-{h}'" for h in hashes)
    )


def test_no_figure_offers_to_upload_itself(toy):
    assert "showSendToCloud: false" in toy.scripts[-1][1] and 'plotlyServerURL: ""' in toy.scripts[-1][1]


def test_text_of_a_record_stays_text(tmp_path, toy):
    entries = copy.deepcopy(RUN)
    entries[0] |= {"command": ATTACK, "device": ATTACK, "commit": ATTACK, "time": ATTACK, "versions": {ATTACK: ATTACK}}
    entries[0]["config"]["corpus"]["source"] = entries[0]["data"][ATTACK] = ATTACK
    for entry in entries:
        if entry["kind"] == "step":
            entry["terms"][ATTACK] = entry["weighted"][ATTACK] = 1.0
    entries.append({"kind": "sample", "step": 1000, "prompt": ATTACK, "text": ATTACK})
    entries.append({"kind": "event", "step": 1, "what": ATTACK, "why": ATTACK})
    page = report(tmp_path / "x<img src=y>", entries)
    assert len(page.scripts) == len(toy.scripts)
    assert not {"img", "i"} & {tag for tag, _ in page.tags}
    assert page.words.count(ATTACK) >= 9


def test_numbers_are_packed_in_32_bits_and_nan_becomes_null():
    fig = go.Figure(go.Scatter(x=[1.5, float("nan")], y=np.array([0.1, np.nan]), customdata=np.array([3.0, 2.0**30])))
    drawn = markup.drawable(fig)["data"][0]
    assert drawn["x"] == [1.5, None]
    assert drawn["y"]["dtype"] == "f4" and unpacked(drawn["y"])[0] == np.float32(0.1) and np.isnan(unpacked(drawn["y"])[1])
    assert drawn["customdata"]["dtype"] == "i4" and list(unpacked(drawn["customdata"])) == [3, 2**30]


def test_same_record_same_bytes_and_one_file(tmp_path):
    folder = synthetic_run.write(tmp_path / "run", RUN)
    first = write_report(folder).read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["record.jsonl", "report.html"]
    assert write_report(folder, tmp_path / "elsewhere" / "page.html").read_bytes() == first
    assert len(first) < 6e6


@pytest.mark.slow
def test_the_full_model_stays_under_15_megabytes(tmp_path):
    entries = synthetic_run.entries(n_layers=56, steps=3000, n_windows=100)
    page = report(tmp_path, entries)
    assert (tmp_path / "report.html").stat().st_size < 15e6
    assert "The heat map holds 60 evenly spaced windows." in page.words and "so that spikes stay" in page.words


def test_a_folder_without_a_record_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"holds no record\.jsonl"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------- unusual records


def _nulls() -> list[dict]:
    entries = changed("validation", bits_per_byte=None, nats_per_token=None)
    entries[0]["data"]["xz_bits_per_byte"] = float("nan")
    for entry in entries:
        if entry["kind"] == "step" and entry["step"] % 3 == 0:
            entry |= {"terms": {"lm": None}, "weighted": {"lm": None}, "loss": None, "grad_norm": float("nan")}
        if entry["kind"] == "load" and entry["step"] > 500:
            entry["f"][0] = [None] * 96
            entry |= {"lbl": [None, 1, 1, 1], "P": None, "router_entropy": None}
    return entries


def _resumed() -> list[dict]:
    other = copy.deepcopy(RUN[0]) | {"step": 500, "device": "cuda: H200"}
    other["config"]["optim"]["lr"] = 0.001
    return [*RUN[:1], {**RUN[0], "step": 200}, *RUN[1:], other]


UNUSUAL = {
    "dense": (synthetic_run.entries(n_experts=1, switch=0), "one expert in each layer gets every token", 7),
    "no load window": ([e for e in RUN if e["kind"] != "load"], "Load deviation: no load window recorded yet.", 7),
    "one step": (synthetic_run.entries(steps=1, n_windows=1, switch=0), "The run is complete: step 1 of 1.", 16),
    "resumed": (_resumed(), "Start 3 of 3, at step 500", 16),
    "resumed on the same machine": (_resumed()[:-1], "as in the start before", 16),
    "nulls": (_nulls(), "the loss is not finite at 333 steps", 16),
    "only started": (RUN[:1], "Loss terms: no step recorded yet.", 0),
    "empty": ([], "no start recorded yet", 0),
    "56 layers": (synthetic_run.entries(n_layers=56, steps=20, n_windows=2), "In layer 52, shares f lie within", 16),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_records_give_a_page_that_says_so(tmp_path, name):
    entries, sentence, n_figures = UNUSUAL[name]
    page = report(tmp_path, entries)
    assert sentence in page.words
    drawn = [attributes["data-figure"] for _, attributes in page.tags if "data-figure" in attributes]
    assert len(drawn) == n_figures and all(page.data(f"data-{figure}")["data"] for figure in drawn)


def test_numbers_as_words():
    assert [words.count(n) for n in (12, 999_999, 1_234_567, 19.36e9)] == ["12", "1\u00a0M", "1.23\u00a0M", "19.4\u00a0B"]
    assert [words.duration(s) for s in (3.21, 910, 3725)] == ["3.2\u00a0s", "15\u00a0min 10\u00a0s", "1\u00a0h 2\u00a0min"]
    assert [words.k_text(k) for k in ([1, 1], [8, 8, 1, 1, 1])] == ["1", "8, 8, 1 × 3"]


@pytest.mark.browser
@pytest.mark.slow
def test_a_browser_draws_every_figure(tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if not browser:
        pytest.skip("needs a Chrome or Chromium")
    page = write_report(synthetic_run.write(tmp_path, RUN))
    quiet = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",  # containers have little
        "--no-first-run",
        "--disable-background-networking",
        "--disable-sync",
        "--disable-component-update",
    ]
    command = [browser, *quiet, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", "--dump-dom"]
    dom = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=600).stdout
    assert 'data-drawn="16"' in dom and dom.count('class="main-svg"') >= 16
    assert 'data-title="Zoom"' in dom and 'data-title="Share' not in dom and 'type="range"' in dom
