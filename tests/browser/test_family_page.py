"""The family's table in a real browser: a click on a head sorts its rows, by numbers where they are numbers."""

from __future__ import annotations

import json

import pytest
import synthetic_results

from sigma_lite.lab.family import BASE, PROTOCOL
from sigma_lite.lab.show import write_page

sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright drives the browser")
pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_a_click_sorts(page, tmp_path):
    made = synthetic_results.results((BASE, "nine", "ten"), (0, 1)) | {"experiment": "family", "protocol": PROTOCOL}
    for run in made["runs"]:
        run["heldout"]["bits_per_byte"] = {BASE: 2.0, "nine": 1.8, "ten": 2.2}[run["arm"]]
        run["seconds"] = {BASE: 40.0, "nine": 360.0, "ten": 4000.0}[run["arm"]]
    (tmp_path / "family-quick.json").write_text(json.dumps(made))
    page.goto(write_page([tmp_path / "family-quick.json"]).as_uri())
    arms = page.locator("table.sortable").first.locator("tbody td:first-child")
    head = page.get_by_role("button", name="step", exact=True)
    assert arms.all_inner_texts() == ["nine", BASE, "ten"], "as they stand, best first"
    head.click()
    assert arms.all_inner_texts() == [BASE, "nine", "ten"], "100 ms before 900 ms before 10,000 ms"
    head.click()
    assert arms.all_inner_texts() == ["ten", "nine", BASE]
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("step")
    page.get_by_role("button", name="arm", exact=True).first.click()
    assert arms.all_inner_texts() == [BASE, "nine", "ten"]
    assert not page.requests and not page.faults
