"""Contracts: each clause met, failed or undecided by its whole interval, and what a folder that fails is good for."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from hfcompress.config import ContractConfig, Recipe, RecipeError
from hfcompress.hub import push_folder, verify
from hfcompress.hub.card import write_card
from hfcompress.hub.contract import ContractError, best_verdict, describe, judge, require_contract, verdict
from hfcompress.measurement.paired import tango_interval
from tests.hub.folders import all_fine, row, save_pruned, write_results


def change(drop: float, low: float, high: float, n: int = 1000) -> dict:
    return {"drop": drop, "low": low, "high": high, "unit": "points", "p_value": 0.5, "test": "McNemar, exact", "n": n}


def one(contract: dict, **measured):
    (clause,) = judge(ContractConfig(**contract), {"disk_bytes": 60_000_000, **measured})
    return clause


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        ((-0.5, 0.9), "met"),
        ((-0.5, 1.0), "met"),
        ((-0.5, 1.1), "undecided"),
        ((1.0, 3.0), "undecided"),
        ((1.01, 3.0), "failed"),
    ],
)
def test_a_drop_is_judged_by_both_ends(ends, status):
    assert one({"max_drop": 1.0}, change=change(sum(ends) / 2, *ends)).status == status


@pytest.mark.parametrize(
    ("ends", "status"),
    [((1.8, 2.0), "met"), ((1.7, 2.0), "undecided"), ((1.5, 1.8), "undecided"), ((1.5, 1.79), "failed")],
)
def test_a_speedup_is_judged_by_both_ends(ends, status):
    speedup = {"median": sum(ends) / 2, "low": ends[0], "high": ends[1], "rounds": 15}
    assert one({"min_speedup": 1.8}, speedup=speedup).status == status
    latency = {"median_ms": sum(ends) / 2, "low": ends[0], "high": ends[1], "rounds": 15}
    opposite = {"met": "undecided", "undecided": "undecided", "failed": "met"}
    expected = "met" if ends[1] <= 1.8 else opposite[status]
    assert one({"max_latency_ms": 1.8}, latency=latency).status == expected


def test_size_has_no_interval():
    assert [one({"max_mb": bound}).status for bound in (60, 59.9)] == ["met", "failed"]
    assert describe(one({"max_mb": 59.5})) == "at most 59.5 MB on disk: 60.0 MB: failed"


def test_what_was_not_measured_is_undecided():
    assert "give labelled data" in describe(one({"max_drop": 1.0}))
    few = one({"min_speedup": 1.0}, speedup={"median": 2.0, "rounds": 3})
    assert few.status == "undecided" and few.note == "6 rounds at least give an interval"
    assert one({"min_speedup": 1.0}).status == "undecided"


def test_a_score_that_is_not_finite_fails():
    lost = change(math.inf, math.inf, math.inf)
    assert one({"max_drop": 1.0}, change=lost).status == "failed"


def test_how_many_examples_would_decide_it():
    """The number that is named is tried: with the same shares in so many examples the bound is outside."""
    lost, gained, n = 12, 8, 1000
    low, high = (100 * end for end in tango_interval(lost, gained, n))
    clause = one({"max_drop": 1.0}, change=change(0.4, low, high, n))
    assert clause.status == "undecided"
    named = int(clause.note.split()[1].replace(",", ""))
    factor = named / n
    assert factor > 1
    low, high = tango_interval(round(lost * factor), round(gained * factor), named)
    assert 100 * high == pytest.approx(1.0, abs=0.1) and 100 * high <= 1
    assert "1,000 were used" in describe(clause)
    # Above the bound: it would turn out to have failed.
    above = one({"max_drop": 0.3}, change=change(0.4, -0.5, 1.3, n))
    assert above.note.startswith("about 81,000 examples")  # (0.9 / 0.1)² thousand, rounded up
    assert "may never decide it" in one({"max_drop": 0.4}, change=change(0.4, -0.5, 1.3, n)).note


def test_verdicts():
    clauses = judge(ContractConfig(max_drop=1.0, max_mb=50), {"disk_bytes": 60e6, "change": change(0.5, 0, 2)})
    assert [clause.status for clause in clauses] == ["undecided", "failed"] and verdict(clauses) == "failed"
    assert verdict(clauses[:1]) == "undecided" and verdict([]) == "met"
    orders = (["met", "failed"], ["failed", "undecided"], ["failed", "failed"])
    assert [best_verdict(order) for order in orders] == ["met", "undecided", "failed"]


def test_a_contract_says_something():
    for values, message in (
        ({}, "contract: a contract has at least one of max_drop, min_speedup, max_mb, max_latency_ms"),
        ({"min_speedup": 0.0}, "contract.min_speedup: 0.0 is not allowed"),
        ({"max_dropp": 1.0}, "contract.max_dropp is not a key here; did you mean contract.max_drop?"),
    ):
        with pytest.raises(RecipeError) as caught:
            Recipe.from_dict({"contract": values})
        assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1


# ---- folders ----


def test_a_folder_that_fails_is_refused(tmp_path):
    lost = change(3.0, 2.0, 4.0)
    rows = [row("teacher", "teacher", 0.9), row("pruned", ".", 0.87, change=lost), row("other", "other", 0.5)]
    write_results(tmp_path, rows=rows)
    require_contract(tmp_path)  # no contract, nothing to keep
    write_results(tmp_path, rows=rows, contract={"max_drop": 5.0})
    require_contract(tmp_path)
    write_results(tmp_path, rows=rows, contract={"max_drop": 3.5})
    require_contract(tmp_path)  # undecided
    write_results(tmp_path, rows=rows, contract={"max_drop": 1.0, "max_mb": 100})
    with pytest.raises(ContractError) as caught:
        require_contract(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} fails the contract of its recipe: at most 1 points worse: 3.00 points [2.00, 4.00]: failed; "
        "compress less, or change the contract and run again"
    )


def test_folders_without_results_or_with_broken_ones(tmp_path):
    require_contract(tmp_path)
    for contract in ({"max_dropp": 1.0}, {}, {"min_speedup": -1.0}):
        write_results(tmp_path, contract=contract)
        with pytest.raises(ValueError, match="is not what a run writes"):
            require_contract(tmp_path)
    write_results(tmp_path, contract="strict")
    with pytest.raises(ValueError, match="measure the model again"):
        require_contract(tmp_path)


def test_the_card_tells_the_verdict(tmp_path):
    save_pruned(tmp_path)
    lost = change(0.72, -0.2, 1.64, 1500)
    rows = [row("teacher", "teacher", 0.9123), row("pruned", ".", 0.9051, change=lost, speedup={"median": 2.1})]
    write_results(tmp_path, rows=rows, contract={"max_drop": 1.0, "max_mb": 100})
    text = write_card(tmp_path).read_text()
    assert "**The contract of its recipe: undecided.**" in text
    assert "* at most 1 points worse: 0.72 points [-0.20, 1.64]: undecided (about " in text
    assert "* at most 100 MB on disk: 90.9 MB: met\n" in text
    assert json.loads((tmp_path / "results.json").read_text())["contract"]["max_mb"] == 100
    assert np.isclose(lost["drop"], 0.72)


def test_what_fails_its_contract_is_not_pushed(tmp_path, local_hub, monkeypatch):
    monkeypatch.setattr(verify, "_run_child", all_fine)
    save_pruned(tmp_path)
    write_results(tmp_path, contract={"max_mb": 10.0})
    with pytest.raises(
        ContractError, match=r"fails the contract of its recipe: at most 10 MB on disk: 90.9 MB: failed"
    ):
        push_folder(tmp_path, "tester/small")
    assert list(local_hub.repo_ids()) == []
    write_results(tmp_path, contract={"max_mb": 100.0})
    push_folder(tmp_path, "tester/small")
    assert list(local_hub.repo_ids()) == ["tester/small"]
