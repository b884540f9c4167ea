"""The example beside an exported model: about ten lines that need the runtime, numpy and the tokenizer or PIL, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hfcompress.export.checking import Check
from hfcompress.export.families import longest_text, reads_text
from hfcompress.export.formats import Format

EXAMPLE_FILE = "example.py"

_OPEN = {
    "onnxruntime": """\
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
""",
    "openvino": """\
settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
session = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", settings)
""",
}
_RUN = {
    "onnxruntime": """\
names = [port.name for port in session.get_inputs()]
output = session.run(None, {name: inputs[name] for name in names})[0]
""",
    "openvino": """\
names = [port.get_any_name() for port in session.inputs]
output = session({name: inputs[name] for name in names})[0]
""",
}
_TEXT = """\
texts = sys.argv[1:] or ["a gripping and funny film", "two hours that nobody will give back"]
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_truncation({length})
tokenizer.enable_padding(direction={direction!r}, pad_id={pad_id}, pad_type_id={pad_type_id}, pad_token={pad_token!r})
encoded = tokenizer.encode_batch(texts)
parts = {{"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}}
inputs = {{name: np.array([getattr(one, part) for one in encoded], dtype=np.int64) for name, part in parts.items()}}
"""
_LABELS = """\
labels = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("id2label", {{}})
scores = {scores}
for name, row in zip({names}, scores):
    print(labels.get(str(row.argmax()), f"LABEL_{{row.argmax()}}"), f"{{row.max():.4f}}  {{name}}")
"""
_SOFTMAX = "(lambda e: e / e.sum(-1, keepdims=True))(np.exp(output - output.max(-1, keepdims=True)))"
_SCORES = {
    "single_label_classification": _SOFTMAX,
    "multi_label_classification": "1 / (1 + np.exp(-output))",
    "regression": "output",
}


def write_example(folder: Path, form: Format, model: nn.Module, processor: Any) -> bool:
    """Write `example.py` into an exported folder.

    Args:
        folder: The folder.
        form: What it holds.
        model: The model it came from.
        processor: Its tokenizer or image processor; None if it has none.

    Returns:
        Whether there is one: not without a tokenizer of the package tokenizers, nor with an image processor that does more than to resize,
        crop, rescale and normalize.
    """
    if reads_text(model):
        prepare = _text(folder, model, processor)
        package, names = "from tokenizers import Tokenizer", "texts"
    else:
        prepare = _image(processor)
        package, names = "from PIL import Image", "paths"
    if prepare is None:
        return False
    show = "print(output.shape, output)\n"
    if type(model).__name__.endswith(("ForSequenceClassification", "ForImageClassification")):
        config: Any = model.config
        kind = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
        show = _LABELS.format(scores=_SCORES[kind], names=names)
    runtime = form.runtime
    # isort's order: what is imported as a whole, then from.
    third = [*sorted(["import numpy as np", f"import {runtime}"]), package]
    heads = ["import json", "import sys", "from pathlib import Path", "", *third, "", "folder = Path(__file__).parent"]
    if "json." not in show:
        heads.remove("import json")
    text = "\n".join(heads) + "\n" + prepare + _OPEN[runtime] + _RUN[runtime] + show
    (folder / EXAMPLE_FILE).write_text(text, encoding="utf-8")
    return True


def _text(folder: Path, model: nn.Module, tokenizer: Any) -> str | None:
    if tokenizer is None or not (folder / "tokenizer.json").is_file():
        return None
    return _TEXT.format(
        length=min(longest_text(model), tokenizer.model_max_length),
        direction=tokenizer.padding_side,
        pad_id=tokenizer.pad_token_id or 0,
        pad_type_id=tokenizer.pad_token_type_id,
        pad_token=tokenizer.pad_token or "",
    )


def _image(processor: Any) -> str | None:
    """The lines that read images as a processor of transformers does; None if it does something else as well."""
    if processor is None:
        return None
    asked: Mapping[str, Any] = processor.to_dict()
    known = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_reduce_labels"}
    if any(value and name.startswith("do_") and name not in known for name, value in asked.items()):
        return None
    lines = ["paths = sys.argv[1:]", "arrays = []", "for path in paths:", '    image = Image.open(path).convert("RGB")']
    size = asked.get("size") or {}
    if asked.get("do_resize"):
        resample = int(asked.get("resample", 2))
        if "height" in size:
            lines.append(f"    image = image.resize(({size['width']}, {size['height']}), {resample})")
        elif set(size) == {"shortest_edge"}:
            edge = size["shortest_edge"]
            lines.append(f"    width, height = ({edge} * side // min(image.size) for side in image.size)")
            lines.append(f"    image = image.resize((width, height), {resample})")
        else:
            return None
    if asked.get("do_center_crop"):
        crop = asked["crop_size"]
        lines.append(f"    left, top = (image.width - {crop['width']}) // 2, (image.height - {crop['height']}) // 2")
        lines.append(f"    image = image.crop((left, top, left + {crop['width']}, top + {crop['height']}))")
    factor = asked.get("rescale_factor", 1 / 255) if asked.get("do_rescale") else 1
    lines.append(f"    pixels = np.asarray(image, dtype=np.float32) * {factor!r}")
    if asked.get("do_normalize"):
        mean, std = list(asked["image_mean"]), list(asked["image_std"])
        lines.append(f"    pixels = (pixels - np.array({mean!r})) / np.array({std!r})")
    lines.append("    arrays.append(pixels.transpose(2, 0, 1))")
    lines.append('inputs = {"pixel_values": np.array(arrays, dtype=np.float32)}')
    return "\n".join(lines) + "\n"


def write_readme(folder: Path, facts: Mapping[str, Any], check: Check, *, example: bool) -> None:
    """Write what the folder is, how to run it and what was found when it was checked."""
    runtime = facts["runtime"]
    needs = "pillow" if facts["inputs"][0] == "pixel_values" else "tokenizers"
    argument = "picture.png" if needs == "pillow" else '"a text" "another"'
    agreement = "" if check.agreement is None else f", the same likeliest class in {check.agreement:.2%}"
    steps = ", ".join(map(str, facts["steps"]))
    calibrated = (
        f"\nRanges of activations were taken from {facts['calibration_n']:,} examples."
        if facts["calibration_n"]
        else ""
    )
    run = (
        f"```bash\npip install {runtime} {needs} numpy\npython {EXAMPLE_FILE} {argument}\n```\n"
        if example
        else f"`pip install {runtime} numpy`; inputs are {', '.join(facts['inputs'])}.\n"
    )
    text = f"""\
# {facts["source"]}, {facts["format"]}

Exported by hfcompress {facts["versions"]["hfcompress"]} for {runtime}{f" after: {steps}" if steps else ""}; \
{facts["size_bytes"] / 1e6:.1f} MB. Neither torch nor transformers is needed.

{run}
Compared with torch on {check.rows:,} rows of several lengths, with padding: cosine of the outputs {check.cosine:.5f}{agreement}, \
largest difference {check.difference:.2g} of the largest output. All facts are in `export.json`.{calibrated}
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
