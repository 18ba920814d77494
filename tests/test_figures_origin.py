"""Under every table of results: from which commits, which code and which machines its rows come, and what was refused."""

from __future__ import annotations

import copy

import pytest
import synthetic_results

from sigma_lite.figures import final_rows, final_table, origins, refused_steps
from sigma_lite.lab.results import Results

RESULTS = synthetic_results.results(seeds=(0, 1))


@pytest.fixture
def results() -> dict:
    return copy.deepcopy(RESULTS)


def test_rows_of_one_commit_say_it_once(results):
    assert origins(results)[0] == "All rows come from commit 0123abc."
    assert "No step was refused." in origins(results) and "what torch used of it is not recorded" in origins(results)[-1]
    assert all("†" not in row[0] for row in final_rows(results)[1])


def test_rows_of_different_commits_are_named_with_arm_seed_and_day(results):
    results["runs"][1]["commit"] = "9999fff"
    (said, *_) = origins(results)
    assert said.startswith(
        "The rows come from 2 different commits, and whether the code that trains differs was not recorded"
    )
    assert "9999fff (2026-01-01): LBL, K = 1 (seed 1)." in said
    for run in results["runs"]:
        run["code"] = ["aaaa"]
    assert "and the code that trains is the same:" in origins(results)[0]
    results["runs"][0]["code"] = ["bbbb"]
    assert "and the code that trains differs:" in origins(results)[0]


def test_code_that_is_in_no_commit_marks_its_arm(results):
    results["runs"][2]["commit"] = "0123abc-dirty"
    assert [row[0] for row in final_rows(results)[1]] == ["LBL, K = 1", "loss-free, K = 1\u00a0†", "K = 8 low"]
    assert "† 1 of 6 runs were made by code that is in no commit (-dirty): loss-free, K = 1 (seed 0)." in origins(results)
    for look in (Results(results).table(), Results(results)._repr_html_(), final_table(results).layout.meta["caption"]):
        assert "in no commit (-dirty)" in look


def test_a_start_in_the_middle_by_other_code_counts(results):
    results["runs"][0]["commits"] = ["0123abc-dirty", "0123abc"]
    assert final_rows(results)[1][0][0].endswith("†") and "0123abc-dirty → 0123abc" in origins(results)[0]


def test_refused_steps_are_counted_also_where_older_files_only_list_them(results):
    results["runs"][3]["events"] = [{"kind": "event", "step": 9, "what": "step skipped", "why": "a spike"}] * 2
    assert refused_steps(results["runs"][3]) == 2
    assert "Refused steps: 2 in loss-free, K = 1 (seed 1)." in origins(results)


def test_machines_are_told_apart_by_their_instructions(results):
    for run in results["runs"]:
        run |= {"cpu": {"model": "AMD EPYC", "instructions": "avx512"}, "experts": {"backend": "cpu", "why": "fast"}}
    assert origins(results)[-1].endswith("1 process: avx512, experts by backend 'cpu'.")
    results["runs"][0]["cpu"] = {"model": "AMD EPYC", "instructions": "avx2"}
    assert origins(results)[-1].startswith("2 kinds of machine: ") and "avx2" in origins(results)[-1]


def test_no_commit_at_all_is_said(results):
    for run in results["runs"]:
        run["commit"] = None
    assert origins(results)[0] == "The rows' commit was not recorded."
    assert origins({**results, "runs": []}) == []
