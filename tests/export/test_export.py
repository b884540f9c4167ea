"""Exported folders give what torch gives, alone and with nothing left behind when they do not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import hfcompress.export.exporting as exporting
from hfcompress.cli.main import main
from hfcompress.export import FORMATS, ExportedModel, ExportError, export_model
from hfcompress.export.checking import Check, check_outputs, require_equal
from hfcompress.export.families import MODEL_TYPES, check_exportable, longest_text, outside_weights, padded_inputs
from hfcompress.export.formats import find_format, require_packages
from hfcompress.export.int8 import calibration_arrays
from hfcompress.measurement import compare_latency
from tests.export.conftest import BATCHES, LABELS, save_uneven
from tests.families import CONFIGS, make_model, task_class

WITHOUT = "import runpy, sys; sys.modules.update(torch=None, transformers=None); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"


def run_example(folder, *arguments):
    """The lines that an example prints where torch and transformers cannot be imported."""
    command = [sys.executable, "-c", WITHOUT, str(folder / "example.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder.parent, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# ---- the same outputs ----


@pytest.mark.parametrize("name", FORMATS)
def test_all_formats_give_what_torch_gives(bert, name):
    exported = ExportedModel(bert.done[name].folder, threads=1)
    assert exported.input_names == ["input_ids", "attention_mask", "token_type_ids"] == list(BATCHES[0])[:3]
    worst, ours, theirs = 0.0, [], []
    for rows, length in ((1, 3), (5, 11), (2, 37)):  # none of them is traced or checked with
        inputs = padded_inputs(bert.model, batch=rows, length=length, seed=9)
        with torch.no_grad():
            wanted = bert.model(**inputs).logits
        found = exported(**{name: value.numpy() for name, value in inputs.items()}).logits
        assert found.shape == wanted.shape == (rows, 3)
        worst = max(worst, float((found - wanted).abs().max() / wanted.abs().max()))
        ours.append(found.flatten())
        theirs.append(wanted.flatten())
    if FORMATS[name].int8:
        assert torch.cosine_similarity(torch.cat(ours), torch.cat(theirs), dim=0) > 0.99
        assert worst > 1e-5, "nothing was rounded"
    else:
        assert worst < 1e-5


def test_int8_is_smaller_and_heads_stay_in_float(bert):
    import onnx
    import openvino

    kinds = {}
    for name in ("onnx-int8", "onnx-int8-static"):
        graph = onnx.load(bert.done[name].folder / "model.onnx").graph
        weights = {weight.name: onnx.numpy_helper.to_array(weight) for weight in graph.initializer}
        kinds[name] = [w for w in weights.values() if w.dtype == np.int8 and w.ndim == 2]
        heads = [weight.detach().numpy() for weight in outside_weights(bert.model)]
        assert len(heads) == 2  # pooler and classifier
        for head in heads:
            same = [w for w in weights.values() if w.shape in (head.shape, head.T.shape) and w.dtype == np.float32]
            assert any(np.array_equal(w, head) or np.array_equal(w, head.T) for w in same)
    linear = [m for n, m in bert.model.bert.encoder.named_modules() if isinstance(m, torch.nn.Linear)]
    alive = [m for m in linear if 0 not in m.weight.shape]
    assert 0 < len(alive) < len(linear)  # some sublayers have nothing in them
    assert {name: len(found) for name, found in kinds.items()} == dict.fromkeys(kinds, len(alive))
    for name in ("openvino-int8", "openvino-int8-weights"):
        model = openvino.Core().read_model(bert.done[name].folder / "openvino_model.xml")
        weights = [
            port.get_source_output().get_node()
            for node in model.get_ops()
            if node.get_type_name() == "MatMul"
            for port in node.inputs()
        ]
        # What is in int8 comes through a conversion. Smoothing rescales heads, too, so their values may be others.
        floats = [tuple(node.shape) for node in weights if node.get_type_name() == "Constant"]
        assert sorted(floats) == sorted(head.shape for head in heads) == [(3, 32), (32, 32)], name


def test_an_image_model(vit):
    exported = ExportedModel(vit.done.folder)
    pixels = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = vit.model(pixel_values=pixels).logits
    torch.testing.assert_close(exported(pixel_values=pixels).logits, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "layers"), [("roberta", "num_hidden_layers"), ("distilbert", "n_layers")])
def test_other_families(name, layers, tmp_path):
    model = save_uneven(tmp_path / "model", name, "AutoModelForSequenceClassification", "both", **{layers: 2})
    done = export_model(tmp_path / "model", tmp_path / "out", format="openvino")
    inputs = padded_inputs(model, batch=3, length=13, seed=5)
    with torch.no_grad():
        wanted = model(**inputs).logits
    torch.testing.assert_close(ExportedModel(done.folder)(**inputs).logits, wanted, atol=1e-5, rtol=1e-4)
    ids = inputs["input_ids"][:1]  # nothing in it is padding, and all of it is one segment
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    torch.testing.assert_close(ExportedModel(done.folder)(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-4)


def test_what_is_missing_is_said(bert):
    with pytest.raises(
        ExportError, match="needs input_ids, token_type_ids; it takes input_ids, attention_mask, token_type_ids"
    ):
        ExportedModel(bert.done["openvino"].folder)(attention_mask=np.ones((1, 3)))
    with pytest.raises(ExportError, match=r"holds no export\.json"):
        ExportedModel(bert.source)


def test_it_is_timed_like_any_model(bert):
    models = {"torch": bert.model, "int8": ExportedModel(bert.done["openvino-int8"].folder, threads=1)}
    inputs = padded_inputs(bert.model, batch=2, length=8)
    times = compare_latency(models, inputs, rounds=3, warmup=1, threads=1)
    assert {(one.rounds, one.batch, one.length, one.threads) for one in times.values()} == {(3, 2, 8, 1)}


# ---- the folder ----


@pytest.mark.parametrize("name", ["onnx-int8", "openvino-int8"])
def test_the_example_runs_without_torch(bert, name):
    texts = ["word1 word2 word3", "word7", " ".join(["word50"] * 60)]  # the last is cut off at 40 tokens
    lines = run_example(bert.done[name].folder, *texts)
    encoded = transformers.AutoTokenizer.from_pretrained(bert.source)(
        texts, truncation=True, padding=True, return_tensors="pt"
    )
    assert encoded["input_ids"].shape == (3, 40)
    scores = ExportedModel(bert.done[name].folder)(**encoded).logits.softmax(-1)
    wanted = [f"{LABELS[int(row.argmax())]} {row.max():.4f}  {text}" for row, text in zip(scores, texts, strict=True)]
    assert lines == wanted


def test_the_example_names_classes_as_transformers_does(bert, tmp_path):
    folder = shutil.copytree(bert.done["openvino"].folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    del config["id2label"]  # as it is saved where nobody named them
    (folder / "config.json").write_text(json.dumps(config))
    named, unnamed = (run_example(one, "word1")[0].split()[0] for one in (bert.done["openvino"].folder, folder))
    assert unnamed == f"LABEL_{list(LABELS.values()).index(named)}"


def test_the_example_reads_images_as_the_processor_does(vit, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (2, 30, 41, 3), dtype=np.uint8)
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    for path, one in zip(paths, pixels, strict=True):
        Image.fromarray(one).save(path)
    processor = transformers.AutoImageProcessor.from_pretrained(vit.source)
    with torch.no_grad():
        scores = vit.model(**processor([Image.open(p) for p in paths], return_tensors="pt")).logits.softmax(-1)
    lines = run_example(vit.done.folder, *paths)
    assert [line.split()[0] for line in lines] == [LABELS[int(row.argmax())] for row in scores]
    assert [float(line.split()[1]) for line in lines] == pytest.approx(scores.max(-1).values.tolist(), abs=2e-4)


def test_the_facts(bert):
    for name, done in bert.done.items():
        facts = json.loads((done.folder / "export.json").read_text())
        assert facts["format"] == name and facts["source"] == "model"
        assert facts["check"]["cosine"] == done.check.cosine > 0.99
        assert facts["check"]["rows"] == 8 + 1 + 3 + 2 and len(facts["check"]["shapes"]) == 6
        assert facts["calibration_n"] == (8 if FORMATS[name].calibrated else 0)
        files = {path.name for path in done.folder.iterdir()}
        graph = {"model.onnx"} if "onnx" in name else {"openvino_model.xml", "openvino_model.bin"}
        assert files == graph | {"config.json", "export.json", "example.py", "README.md"} | {
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert facts["size_bytes"] == sum((done.folder / file).stat().st_size for file in graph)
        text = (done.folder / "example.py").read_text()
        assert "torch" not in text and "transformers" not in text
    assert [line for line in bert.said if line.startswith("Tracing")] == [
        "Tracing for onnxruntime",
        "Tracing for openvino",
    ]
    assert list((bert.folder / "exports").iterdir()) and not list((bert.folder / "exports").glob(".*"))


# ---- calibration ----


def test_calibration_sees_exactly_the_batches(bert, tmp_path, monkeypatch):
    import nncf

    seen, settings = [], {}

    def quantize(model, dataset, **given):
        seen.extend(dataset.get_inference_data())
        settings.update(given)
        raise RuntimeError("seen enough")

    monkeypatch.setattr(nncf, "quantize", quantize)
    graph = bert.done["openvino"].folder / "openvino_model.xml"
    monkeypatch.setattr(exporting, "write_graph", lambda model, runtime, folder: graph)
    with pytest.raises(RuntimeError, match="seen enough"):
        export_model(bert.source, tmp_path / "out", format="openvino-int8", batches=BATCHES)
    assert not list(tmp_path.iterdir())  # nothing is left
    assert len(seen) == settings["subset_size"] == len(BATCHES) == 3
    for ours, batch in zip(seen, BATCHES, strict=True):
        assert list(ours) == ["input_ids", "attention_mask", "token_type_ids"]
        for name, array in ours.items():  # the last column is padding in every row
            np.testing.assert_array_equal(array, batch[name][:, :-1].numpy())


def test_padding_on_the_left_goes_too():
    batch = {"input_ids": torch.tensor([[0, 5, 6], [0, 0, 7]]), "attention_mask": torch.tensor([[0, 1, 1], [0, 0, 1]])}
    (arrays,) = calibration_arrays([batch], ["input_ids", "attention_mask", "token_type_ids"])
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "input_ids": [[5, 6], [0, 7]],
        "attention_mask": [[1, 1], [0, 1]],
        "token_type_ids": [[0, 0], [0, 0]],
    }


# ---- the check ----


class _Fixed(torch.nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, **_):
        return {"logits": self.logits}


def test_what_a_check_says():
    one, other = _Fixed([[3.0, 4.0], [2.0, 0.0]]), _Fixed([[4.0, 3.0], [2.0, 0.0]])
    check = check_outputs(one, other, [{"input_ids": torch.zeros(2, 5, dtype=torch.long)}])
    assert check.difference == 0.25 and check.agreement == 0.5 and check.rows == 2 and check.shapes == ((2, 5),)
    assert check.cosine == pytest.approx(28 / 29)
    with pytest.raises(ExportError, match=r"logits of shape \(1, 2\), torch of shape \(2, 2\); nothing was written"):
        check_outputs(one, _Fixed([[4.0, 3.0]]), [{"input_ids": torch.zeros(2, 5, dtype=torch.long)}])


@pytest.mark.parametrize(
    ("name", "difference", "cosine", "fine"),
    [
        ("onnx", 1e-4, 1.0, True),
        ("openvino", 2e-3, 1.0, False),
        ("openvino", float("nan"), float("nan"), False),
        ("onnx-int8", 0.2, 0.95, True),
        ("openvino-int8", 0.2, 0.85, False),
        ("openvino-int8", float("nan"), float("nan"), False),
    ],
)
def test_what_differs_is_refused(name, difference, cosine, fine):
    exported = torch.nn.Module()
    exported.format = find_format(name)
    check = Check(difference, cosine, None, 1, ((1, 2),))
    if fine:
        require_equal(check, exported)
    else:
        with pytest.raises(ExportError, match=f"{name} gives something else than torch.*nothing was written"):
            require_equal(check, exported)


def test_an_export_that_differs_is_not_left_behind(bert, tmp_path, monkeypatch):
    other = save_uneven(tmp_path / "model", "bert", "AutoModelForSequenceClassification", "both", seed=7)
    assert other.config.num_labels == 3
    graph = bert.done["onnx"].folder / "model.onnx"
    alone = tmp_path / "graph"
    alone.mkdir()
    (alone / "model.onnx").write_bytes(graph.read_bytes())
    monkeypatch.setattr(exporting, "write_graph", lambda model, runtime, folder: alone / "model.onnx")
    with pytest.raises(ExportError, match="onnx gives something else than torch"):
        export_model(tmp_path / "model", tmp_path / "out" / "deep", format="onnx")
    assert not (tmp_path / "out").exists()


# ---- what is refused ----


@pytest.mark.parametrize("name", sorted({name.partition(":")[0] for name in CONFIGS}))
def test_every_family_is_exportable_or_refused(name):
    model = make_model(name, task_class(name))
    if name in MODEL_TYPES:
        check_exportable(model)
        inputs = padded_inputs(model, batch=3, length=9) if "vision" not in name else {"pixel_values": None}
        assert len(inputs) >= 1
    else:
        with pytest.raises(ExportError, match=rf"cannot be exported; what can is {', '.join(MODEL_TYPES)}"):
            check_exportable(model)


def test_refusals(bert, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, message in (
        (("onnx-int9", tmp_path / "out", None), r"no format 'onnx-int9'; there are onnx, onnx-int8"),
        (("openvino-int8", tmp_path / "out", None), "openvino-int8 fixes the ranges .* give calibration data"),
        (("onnx-int8-static", tmp_path / "out", []), "onnx-int8-static fixes the ranges"),
        (("onnx", tmp_path / "full", None), "full is not empty"),
    ):
        with pytest.raises(ExportError, match=message):
            export_model(bert.source, arguments[1], format=arguments[0], batches=arguments[2])
    with pytest.raises(
        ImportError, match=r"needs no_such_package, not installed here: pip install 'hfcompress\[export\]'"
    ):
        require_packages(("json", "no_such_package"))
    decoder = make_model("bert", "AutoModelForCausalLM", is_decoder=True)
    with pytest.raises(ExportError, match=r"BertLMHeadModel \(a decoder\) cannot be exported"):
        check_exportable(decoder)
    decoder.quantization_method = "bitsandbytes"
    with pytest.raises(ExportError, match="quantized with bitsandbytes; export the model it was made from"):
        check_exportable(decoder)


def test_positions():
    assert longest_text(make_model("roberta")) == 64 - 2
    assert longest_text(make_model("bert")) == 64
    assert longest_text(make_model("deberta-v2")) == 64


def test_nothing_heavy_is_imported_before_it_is_needed():
    heavy = ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf")
    code = (
        "import sys, hfcompress.export, hfcompress.export.table\nfrom hfcompress.cli.main import build_parser\n"
        f"build_parser().format_help()\nprint([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split("\n")[-2] == "[]"


# ---- the command ----


def test_the_command(bert, tmp_path, capsys, monkeypatch):
    graph = bert.done["openvino"].folder / "openvino_model.xml"
    alone = tmp_path / "graph"
    alone.mkdir()
    for ending in ("xml", "bin"):
        (alone / f"openvino_model.{ending}").write_bytes(graph.with_suffix(f".{ending}").read_bytes())
    monkeypatch.setattr(exporting, "write_graph", lambda model, runtime, folder: alone / "openvino_model.xml")
    data = tmp_path / "data.csv"
    rows = [(f"word{number} word{number + 1}", list(LABELS.values())[number % 3]) for number in range(30)]
    data.write_text("said,verdict\n" + "".join(f"{text},{label}\n" for text, label in rows))
    command = ["export", str(bert.source), "--format", "openvino", "openvino-int8", "--output", str(tmp_path / "out")]
    command += ["--data", str(data), "--eval", str(data), "--text", "said", "--label", "verdict", "--samples", "12"]
    assert main([*command, "--length", "16", "--measure", "--rounds", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["form", "torch", "openvino", "openvino-int8"]
    assert "accuracy (n=30)" in lines[0] and lines[1].endswith("1.00x") and lines[2].endswith("x")
    assert json.loads((tmp_path / "out" / "openvino-int8" / "export.json").read_text())["calibration_n"] == 12
    assert len(lines) >= 6 and str(tmp_path / "out" / "openvino") in lines[-2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "openvino-int8"], "openvino-int8 fixes the ranges of activations by examples; give --data"),
        (["--format", "all"], "onnx-int8-static fixes the ranges of activations by examples; give --data"),
        (["--format", "tflite"], "no format 'tflite'; there are onnx, "),
        (["--format", "onnx", "--eval", "x.csv"], "--eval needs --data as well"),
        (["--format", "openvino-int8", "--data", "missing.csv"], "missing.csv"),
    ],
)
def test_bad_input_is_one_line(bert, options, message, tmp_path, capsys):
    assert main(["export", str(bert.source), *options, "--output", str(tmp_path / "out")]) == 2
    seen = capsys.readouterr()
    assert seen.out == "" and message in seen.err and len(seen.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_decoder_is_one_line(tmp_path, capsys):
    make_model("gpt2", "AutoModelForCausalLM").save_pretrained(tmp_path / "gpt2")
    assert main(["export", str(tmp_path / "gpt2"), "--format", "onnx", "--output", str(tmp_path / "out")]) == 2
    seen = capsys.readouterr()
    assert "GPT2LMHeadModel (gpt2) cannot be exported; what can is albert, " in seen.err
    assert len([line for line in seen.err.splitlines() if line.startswith("hfcompress:")]) == 1
    assert not (tmp_path / "out").exists()
