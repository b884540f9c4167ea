"""Folders that load by every way, and folders that do not, in fresh processes."""

from __future__ import annotations

import json
import os

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

import hfcompress
from hfcompress.checkpoints.portable import MODELING_FILE
from hfcompress.hub import VerificationError, save_probe, verify, verify_folder
from hfcompress.hub.verify import PROBE_FILE, ROUTES, RouteCheck, require_loadable, routes_of
from tests.families import DECODERS, IMAGE_FAMILIES, make_model, run_model, task_class
from tests.hub.folders import all_fine, none_fine, save_pruned


def test_a_pruned_folder_in_four_bits_loads_by_every_way(tmp_path):
    """Widths of 32 and less: the way without hfcompress needs the guards that travel in the modelling file."""
    save_pruned(tmp_path / "full")
    small = hfcompress.quantize(tmp_path / "full", "nf4")
    small.save_pretrained(tmp_path / "small")
    save_probe(small, tmp_path / "small")
    checks = verify_folder(tmp_path / "small")
    assert [check.route for check in checks] == ["load", "auto", "remote"]
    for check in checks:
        assert check.ok and check.error is None and check.difference <= 1e-5, check
        assert check.to_dict()["route"] == check.route


def test_a_uniform_folder_loads_with_transformers_alone_and_a_probe_is_made(tmp_path):
    save_pruned(tmp_path, pattern="even")
    assert not (tmp_path / MODELING_FILE).exists()
    (tmp_path / PROBE_FILE).unlink()
    checks = verify_folder(str(tmp_path))
    assert (tmp_path / PROBE_FILE).is_file()
    assert [(check.route, check.ok, check.tolerance) for check in checks] == [
        ("load", True, 1e-5),
        ("auto", True, 1e-5),
        ("plain", True, 1e-5),
    ]


def test_a_changed_weight_and_a_broken_modelling_file(tmp_path):
    save_pruned(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["classifier.bias"][0] += 0.01
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    (tmp_path / MODELING_FILE).write_text("class Broken(:\n")
    load, remote = verify_folder(tmp_path, routes=["load", "remote"])
    assert (load.route, load.ok, load.error) == ("load", False, "outputs differ from those at saving")
    assert load.difference == pytest.approx(0.01, rel=1e-3)
    assert (remote.route, remote.ok, remote.difference) == ("remote", False, None)
    assert "SyntaxError" in remote.error and len(remote.error.splitlines()) == 1


# ---- from here on without fresh processes ----


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config.json; give a folder that save_pretrained wrote$"):
        verify_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        verify_folder(tmp_path / "nowhere")


def test_which_routes_a_folder_promises(tmp_path):
    save_pruned(tmp_path / "uneven")
    save_pruned(tmp_path / "even", pattern="even")
    make_model("bert").save_pretrained(tmp_path / "whole")
    assert routes_of(tmp_path / "uneven") == ["load", "auto", "remote"]
    assert routes_of(tmp_path / "even") == routes_of(tmp_path / "whole") == ["load", "auto", "plain"]


def test_what_does_not_load_is_refused_in_one_line(tmp_path, monkeypatch):
    save_pruned(tmp_path)
    monkeypatch.setattr(verify, "_run_child", none_fine)
    with pytest.raises(VerificationError) as caught:
        require_loadable(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} does not load through hfcompress.load: outputs differ from those at saving (difference 0.25, "
        "allowed 1e-05); nothing was pushed"
    )
    monkeypatch.setattr(verify, "_run_child", all_fine)
    assert [check.route for check in require_loadable(tmp_path)] == ["load", "auto", "remote"]


def test_one_failing_route_is_enough(tmp_path, monkeypatch):
    save_pruned(tmp_path)
    monkeypatch.setattr(
        verify, "_run_child", lambda folder, routes, s: [RouteCheck(r, r != "remote", 0.0, 1e-5, "x") for r in routes]
    )
    with pytest.raises(VerificationError, match="trust_remote_code=True, without hfcompress: x"):
        require_loadable(tmp_path)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; sys.exit('first\\nlast line')", "last line"),
        ("pass", "no output"),
        ("import time; time.sleep(60)", "took longer than 0.5 s"),
    ],
)
def test_a_process_that_dies_or_hangs(code, reason, tmp_path, monkeypatch):
    save_pruned(tmp_path)
    script = tmp_path / "child.py"
    script.write_text(code)
    monkeypatch.setattr(verify, "_CHILD", script)
    checks = verify_folder(tmp_path, routes=["load", "auto"], timeout_s=0.5 if "sleep" in code else 60)
    assert [(check.route, check.ok, check.difference, check.error) for check in checks] == [
        ("load", False, None, reason),
        ("auto", False, None, reason),
    ]


def test_the_process_is_offline_alone_and_elsewhere(tmp_path, monkeypatch):
    """It reports its environment in place of a result."""
    save_pruned(tmp_path)
    script = tmp_path / "child.py"
    names = ("HF_HUB_OFFLINE", "HF_MODULES_CACHE", "RANK", "WORLD_SIZE", "MASTER_PORT")
    script.write_text(
        "import json, os, sys\n"
        f"seen = {{name: os.environ.get(name) for name in {names}}} | {{'cwd': os.getcwd(), 'folder': sys.argv[1]}}\n"
        "json.dump({'load': {'error': json.dumps(seen)}}, open(sys.argv[3], 'w'))\n"
    )
    monkeypatch.setattr(verify, "_CHILD", script)
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    (check,) = verify_folder(tmp_path, routes=["load"])
    seen = json.loads(check.error)
    assert (seen["HF_HUB_OFFLINE"], seen["RANK"], seen["WORLD_SIZE"], seen["MASTER_PORT"]) == ("1", None, None, None)
    assert seen["cwd"] == os.path.realpath(seen["HF_MODULES_CACHE"]) != os.getcwd()
    assert seen["folder"] == str(tmp_path.resolve())
    assert not os.path.exists(seen["cwd"]), "the scratch folder is left behind"


@pytest.mark.parametrize("difference", [2e-5, float("nan"), float("inf")])
def test_what_is_not_close_enough(difference):
    check = verify._judge("load", {"difference": difference}, 1e-5)
    assert not check.ok and check.error
    assert verify._judge("load", {"difference": 9e-6}, 1e-5).ok


def test_tolerances(tmp_path):
    for config, expected in (
        ({"dtype": "float32"}, 1e-5),
        ({}, 1e-5),
        ({"dtype": "bfloat16"}, 1e-2),
        ({"dtype": "float32", "quantization_config": {"load_in_8bit": True}}, 1e-2),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert verify._tolerance(tmp_path) == expected


PROBED = ("bert", "distilbert", "vit", "gpt2", "llama", "opt")


@pytest.mark.parametrize("name", PROBED)
def test_a_probe_holds_inputs_and_outputs(name, tmp_path):
    model = make_model(name, task_class(name)).train()
    save_probe(model, tmp_path)
    assert model.training
    with safe_open(tmp_path / PROBE_FILE, "pt") as file:
        assert file.metadata()["device"] == "cpu"
        probe = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    inputs = {key.removeprefix("input."): value for key, value in probe.items() if key != "output"}
    assert set(inputs) == ({"pixel_values"} if name in IMAGE_FAMILIES else {"input_ids", "attention_mask"})
    assert all(len(value) == 2 for value in inputs.values())
    logits = run_model(model.eval(), inputs)["logits"]
    assert torch.equal(probe["output"], logits) and (logits.dim() == 3) is (name in DECODERS)


def test_of_large_vocabularies_only_the_last_position_is_kept(tmp_path):
    model = make_model("gpt2", "AutoModelForCausalLM", vocab_size=1200)
    save_probe(model, tmp_path)
    assert safetensors.torch.load_file(tmp_path / PROBE_FILE)["output"].shape == (2, 1200)


def test_every_route_has_a_name():
    assert list(ROUTES) == ["load", "auto", "remote", "plain", "peft"]
