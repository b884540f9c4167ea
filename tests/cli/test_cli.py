"""The command line: help that teaches, errors in one line, and what each command writes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

import hfcompress
from hfcompress.cli.main import main
from hfcompress.hub import verify
from tests.families import make_inputs, make_model, run_model
from tests.hub.folders import all_fine, none_fine, save_pruned

COMMANDS = (
    "run",
    "prune",
    "sensitivity",
    "student",
    "cache-teacher",
    "write-targets",
    "measure",
    "inspect",
    "report",
    "compare",
    "check",
    "quantize",
    "vocabulary",
    "push",
    "verify",
)
NOT_IN_THE_EPILOG = ("verify", "sensitivity")

_HELP = """
import contextlib, io, json, sys
from hfcompress.cli.main import main
found = {}
for command in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main([*command, "--help"])
        except SystemExit as end:
            status = end.code
    found[" ".join(command)] = [status, out.getvalue()]
heavy = [name for name in ("torch", "transformers", "datasets", "numpy", "matplotlib") if name in sys.modules]
print(json.dumps([found, heavy]))
"""


def test_help_teaches_and_imports_nothing_heavy():
    commands = [[], *([name] for name in COMMANDS)]
    done = subprocess.run(
        [sys.executable, "-c", _HELP, json.dumps(commands)], capture_output=True, text=True, check=True
    )
    found, heavy = json.loads(done.stdout)
    assert heavy == []
    assert len(found) == 16 and {status for status, _ in found.values()} == {0}
    for command, (_, text) in found.items():
        assert re.search(rf"examples?:\n  hfcompress {command}", text), command
    assert all(f"hfcompress {name} " in found[""][1] or name in NOT_IN_THE_EPILOG for name in COMMANDS)


def test_the_installed_command(tmp_path):
    version = subprocess.run(
        [sys.executable, "-m", "hfcompress.cli.main", "--version"], capture_output=True, text=True, check=True
    )
    assert version.stdout == f"hfcompress {hfcompress.__version__}\n"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("prunee: {}\n")
    done = subprocess.run(
        [sys.executable, "-m", "hfcompress.cli.main", "run", str(recipe)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"hfcompress: {recipe}: prunee is not a key here; did you mean prune?")


@pytest.fixture
def pruned(tmp_path):
    save_pruned(tmp_path / "pruned")
    return tmp_path / "pruned"


@pytest.fixture
def fail(capsys):
    """Runs a command that has to fail, and gives the one line it says on stderr."""

    def run(*arguments):
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        seen = capsys.readouterr()
        assert (status, seen.out) == (2, "")
        assert seen.err.endswith("\n") and len(seen.err.splitlines()) == 1 and "Traceback" not in seen.err, seen.err
        return seen.err.strip()

    return run


PRUNE = ("prune", "model", "--data", "x.csv", "--output", "x")


def test_errors_are_one_line(fail, pruned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: text-classification\n")
    said = {
        ("run", "nowhere.yaml"): "hfcompress: nowhere.yaml: ",
        ("run", recipe, "prune.target.sparcity=0.5"): "did you mean prune.target.sparsity?",
        ("run", recipe, "prune.target.sparsity=2"): "prune.target.sparsity",
        ("run", recipe): "the recipe needs data to be run",
        ("run", recipe, "--restart", "prune.target.sparcity=0.5"): "did you mean prune.target.sparsity?",
        ("run", recipe, "output=x", "--restart", "prune.target.sparsity=2"): "prune.target.sparsity",
        ("run", recipe, "--restrat", "output=x"): "unrecognized arguments: --restrat",
        ("inspect", empty, "more"): "unrecognized arguments: more",
        ("inspect", empty): "config.json",
        ("inspect", "./nowhere"): "nowhere",
        ("verify", empty): "holds no config.json; give a folder that save_pretrained wrote",
        ("verify", "nowhere"): "holds no config.json",
        ("push", "nowhere", "me/x"): "holds no config.json",
        ("quantize", empty, "--preset", "nf4"): "config.json",
        ("quantize", pruned, "--preset", "nf5"): "'nf5' is not allowed; did you mean nf4? Allowed: 'int8'",
        ("quantize", pruned): "one of the arguments --preset --layers is required",
        ("quantize", pruned, "--preset", "nf4", "--skip", "clasifier"): "'clasifier', which is not a module of",
        ("quantize", pruned, "--preset", "nf4", "--output", tmp_path): "is not empty; give another --output",
        ("measure", empty): "config.json",
        ("measure", "./nowhere"): "./nowhere is neither a folder nor a repository on the Hub that you may see",
        ("measure", pruned, "--batch", "0"): "'0' is not allowed: must be a whole number of 1 or more",
        ("measure", pruned, "--batch", "many"): "'many' is not allowed: must be a whole number of 1 or more",
        ("measure", pruned, "--rounds", "2"): "measure.rounds",
        ("prune", pruned, "--data", recipe, "--output", "x"): "one of the arguments --speedup --latency-ms --sparsity",
        ("prune", pruned, "--speedup", "2", "--output", "x"): "required: --data; see hfcompress prune --help",
        ("prune", pruned, "--speedup", "2", "--data", recipe): "required: --output; see hfcompress prune --help",
        (*PRUNE, "--speedup", "2", "--flops", "0.5"): "argument --flops: not allowed with argument --speedup",
        (*PRUNE, "--speedup", "fast"): "argument --speedup: 'fast' is not allowed: must be a number",
        (
            *PRUNE,
            "--speedup",
            "0.5",
        ): "prune.target.speedup: 0.5 is not allowed: input should be greater than or equal to 1",
        (*PRUNE, "--speedup", "nan"): "prune.target.speedup: nan is not allowed",
        (*PRUNE, "--sparsity", "1"): "prune.target.sparsity: 1.0 is not allowed: input should be less than 1",
        (*PRUNE, "--parameters", "0"): "prune.target.parameters: 0.0 is not allowed: input should be greater than 0",
        (*PRUNE, "--max-drop", "-1"): "prune.target.max_drop: -1.0 is not allowed",
        (*PRUNE, "--speedup", "2", "--criterion", "obss"): "'obss' is not allowed; did you mean obs? Allowed: 'obs', ",
        (*PRUNE, "--speedup", "2", "--units", "hats"): "argument --units: invalid choice: 'hats'",
        (*PRUNE, "--speedup", "2", "--samples", "0"): "'0' is not allowed: must be a whole number of 1 or more",
        (
            *PRUNE,
            "--speedup",
            "2",
            "--uniform",
            "--units",
            "layers",
        ): "uniform and units: layers cannot be had together",
        ("prune", "./nowhere", "--data", "x.csv", "--output", "x", "--speedup", "2"): "nowhere",
        ("sensitivity", pruned): "required: --data; see hfcompress sensitivity --help",
        ("sensitivity", pruned, "--data", "x.csv", "--criterion", "obss"): "did you mean obs?",
        ("compress",): "invalid choice: 'compress'",
        (): "required: COMMAND",
    }
    for arguments, text in said.items():
        assert text in fail(*arguments), arguments
    assert len(said) == 42
    assert {path.name for path in tmp_path.iterdir()} == {"pruned", "empty", "recipe.yaml"}, "something was written"


def test_tracebacks_for_those_who_ask(monkeypatch, tmp_path):
    monkeypatch.setenv("HFCOMPRESS_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["verify", str(tmp_path)])


def test_stopping_is_no_error(monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hfcompress.cli.verify.run", stop)
    assert main(["verify", "x"]) == 130
    assert capsys.readouterr().err == "hfcompress: stopped\n"


def test_a_repository_that_is_not_there(fail, local_hub):
    for command in (["inspect"], ["measure"], ["quantize", "--preset", "nf4"]):
        assert "tester/nowhere" in fail(*command, "tester/nowhere")


def test_a_push_that_is_refused(fail, pruned, local_hub, monkeypatch):
    monkeypatch.setattr(verify, "_run_child", all_fine)
    assert "you may not write there" in fail("push", pruned, "somebody-else/x")
    monkeypatch.setattr(verify, "_run_child", none_fine)
    assert fail("push", pruned, "tester/x").endswith("nothing was pushed")
    assert local_hub.repo_ids() == []


# ---- what the commands do ----


def test_inspect(pruned, capsys, tmp_path):
    assert main(["inspect", str(pruned), "--picture", str(tmp_path / "a.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["encoder.0", "#" * 12 + "." * 12, "2/4"]
    # heads: 2, 1, 3 of 4; neurons: 43, 14, 28 of 48
    assert lines[-3:] == ["heads: 6 of 12 (50%)", "neurons: 85 of 144 (59%)", f"drawn in {tmp_path / 'a.png'}"]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"
    assert main(["inspect", str(pruned), "--json", "--picture", str(tmp_path / "b.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 6 and found["encoder.1.heads"] == {"left": 1, "before": 4}
    assert found["encoder.2.neurons"] == {"left": 28, "before": 48} and (tmp_path / "b.png").is_file()


def test_inspect_a_uniform_model_and_a_whole_one(tmp_path, capsys):
    save_pruned(tmp_path / "even", pattern="even")
    assert main(["inspect", str(tmp_path / "even"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["encoder.0.neurons"] == {"left": 24, "before": 48}
    assert found["encoder.0.heads"] == {"left": 4, "before": 4}
    make_model("llama", "AutoModelForCausalLM").save_pretrained(tmp_path / "whole")
    assert main(["inspect", str(tmp_path / "whole")]) == 0
    assert "heads: 6 of 6 (100%)" in capsys.readouterr().out  # groups: 2 in each of 3 layers


def test_inspect_reads_no_weights(pruned, capsys):
    (pruned / "model.safetensors").unlink()
    assert main(["inspect", str(pruned)]) == 0
    assert "heads: 6 of 12 (50%)" in capsys.readouterr().out


def test_measure(pruned, tmp_path, capsys):
    whole = make_model("bert", "AutoModelForSequenceClassification")
    whole.save_pretrained(tmp_path / "whole")
    options = ["--batch", "2", "--length", "8", "--rounds", "3", "--threads", "1", "--device", "cpu"]
    assert main(["measure", str(tmp_path / "whole"), str(pruned), *options, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["parameters"] == sum(parameter.numel() for parameter in whole.parameters())
    assert second["parameters"] == sum(parameter.numel() for parameter in hfcompress.load(pruned).parameters())
    assert (
        second["flops_per_input"] < first["flops_per_input"]
        and "speedup" not in first
        and second["speedup"]["median"] > 0
    )
    assert first["disk_bytes"] >= os.path.getsize(tmp_path / "whole" / "model.safetensors")
    latency = first["latency"]
    assert (latency["batch"], latency["length"], latency["rounds"], latency["threads"]) == (2, 8, 3, 1)
    assert main(["measure", str(pruned), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].split()[0] == "model" and lines[1].startswith(str(pruned))


@pytest.mark.parametrize("device", ["cuda:7", "toaster", "meta"])
def test_a_device_that_is_not_here(device, pruned, fail, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = f"device {device!r} cannot be used here; give auto or one of cpu, cuda:0, cuda:1"
    assert fail("measure", pruned, "--device", device) == f"hfcompress: {message}"


def test_measure_a_repository(pruned, local_hub, capsys):
    files = {path.name: path.read_bytes() for path in pruned.iterdir()}
    local_hub.create_repo("tester/small", files=files)
    assert main(["measure", "tester/small", "--batch", "1", "--length", "4", "--rounds", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "tester/small"


def test_quantize_writes_a_folder_that_loads(pruned, capsys, fail):
    assert main(["quantize", str(pruned), "--preset", "nf4-dq", "--no-measure"]) == 0
    target = pruned.with_name("pruned-nf4-dq")
    assert re.fullmatch(
        rf"{re.escape(str(target))}: 0\.\d MB \(before: 0\.\d MB\); loads again\n", capsys.readouterr().out
    )
    assert {"config.json", "model.safetensors", "README.md", "hfcompress_probe.safetensors"} <= {
        path.name for path in target.iterdir()
    }
    inputs = make_inputs("bert")
    expected = run_model(hfcompress.quantize(pruned, "nf4-dq"), inputs)["logits"]
    assert torch.equal(run_model(hfcompress.load(target), inputs)["logits"], expected)
    assert "is not empty; give another --output" in fail("quantize", pruned, "--preset", "nf4-dq")
    assert "is quantized already" in fail("quantize", target, "--preset", "int8")


def test_quantize_with_options(pruned, tmp_path, capsys):
    target = tmp_path / "small"
    options = ["--output", str(target), "--skip", "bert.encoder.layer.0", "--dtype", "bfloat16", "--no-measure"]
    assert main(["quantize", f"{pruned}/", "--preset", "int8", *options]) == 0
    model = hfcompress.load(target)
    assert model.classifier.weight.dtype == torch.bfloat16
    assert type(model.bert.encoder.layer[0].output.dense) is torch.nn.Linear
    assert type(model.bert.encoder.layer[1].output.dense) is not torch.nn.Linear
    assert "small: " in capsys.readouterr().out


def test_push(pruned, local_hub, capsys, monkeypatch):
    monkeypatch.setattr(verify, "_run_child", all_fine)
    assert main(["push", str(pruned), "tester/small", "--private", "--revision", "v1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("pushed: ") and "tester/small" in out
    assert local_hub.commits("tester/small", "v1")[0].oid in out and local_hub.is_private("tester/small")
    assert len(local_hub.commits("tester/small")) == 1


def test_verify(pruned, capsys, monkeypatch):
    monkeypatch.setattr(verify, "_run_child", all_fine)
    assert main(["verify", str(pruned)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0] == "hfcompress.load: ok, difference 2e-07"
    monkeypatch.setattr(verify, "_run_child", none_fine)
    assert main(["verify", str(pruned)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0] == "hfcompress.load: FAILED: outputs differ from those at saving"
