"""The model card: rendered from the record in `config.json` and the numbers in `results.json`, and nothing else."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.models.auto import modeling_auto as auto_names

import hfcompress
from hfcompress.checkpoints.adapters import ADAPTER_FILE, read_config
from hfcompress.checkpoints.portable import MODELING_FILE
from hfcompress.checkpoints.record import read_hidden, read_layers, read_steps, read_units
from hfcompress.hub.picture import draw_layers, save_layers_picture
from hfcompress.hub.verify import RouteCheck, is_4bit, is_packed
from hfcompress.measurement.metrics import PERCENTAGES

RESULTS_FILE = "results.json"
PICTURE_FILE = "layers.png"
_TEMPLATE = Path(__file__).with_name("card_template.md")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+|[A-Za-z0-9][\w.-]*")
_PIPELINES = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForMultipleChoice": "multiple-choice",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
}
_AUTO = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "multiple-choice": "AutoModelForMultipleChoice",
    "audio-classification": "AutoModelForAudioClassification",
    "text2text-generation": "AutoModelForSeq2SeqLM",
}
# Where the ending of a class does not say what it is for.
_BY_MODEL = {
    "audio-classification": auto_names.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "text2text-generation": auto_names.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}


def write_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    checks: list[RouteCheck] | None = None,
    scores: dict[str, float] | None = None,
    **metadata: Any,
) -> Path:
    """Render `README.md` of a saved folder, and the picture of its layers.

    Args:
        folder: A folder that `save_pretrained` wrote; numbers come from the `results.json` in it, if there is one.
        repo_id: Where it is going to be, for the loading examples.
        base_model: Repository on the Hub that the weights come from.
        checks: What `verify_folder` found.
        scores: Named numbers of the last evaluation in training, for a model that was not measured otherwise.
        **metadata: More fields of the card's metadata: license, language, datasets, tags, ...

    Returns:
        The path of the card.

    Raises:
        ValueError: `results.json` is not what a run writes.
    """
    folder = Path(folder)
    config = read_config(folder)
    results = read_results(folder)
    steps = [step for step in read_steps(config) if isinstance(step.get("step"), str)]
    units = read_units(config) or _units_of_steps(steps)
    if units:
        save_layers_picture(units, folder / PICTURE_FILE, layers=read_layers(config))
    name = (repo_id or results.get("name") or folder.resolve().name).rpartition("/")[2]
    base_model = base_model or results.get("base_model")
    card = ModelCard.from_template(
        _card_data(config, results, name=name, steps=steps, base_model=base_model, metadata=metadata),
        template_path=str(_TEMPLATE),
        title=name,
        summary=_summary(config, steps, units),
        rows=[_row(row) for row in results.get("rows", [])],
        steps=[_describe(step) for step in steps] or ["Nothing yet."],
        picture=PICTURE_FILE if units else None,
        units=draw_layers(units, layers=read_layers(config)) if units else None,
        ways=_ways(folder, config, repo_id or f"path/to/{name}"),
        checks=", ".join(
            f"{check.route} {check.difference:.1g}" for check in checks or [] if check.difference is not None
        ),
        base_model=_repository(base_model) or "not said",
        teacher=next((_public(s.get("teacher")) for s in reversed(steps) if s["step"] == "distill"), "none"),
        data=_data(results),
        scores=", ".join(f"{name} {value:.4g}" for name, value in (scores or {}).items()),
        command=_without_paths(results.get("command")),
        version=hfcompress.__version__,
        **_conditions(results),
    )
    path = folder / "README.md"
    card.save(path)
    return path


def read_results(folder: Path) -> dict[str, Any]:
    """The numbers that a run measured; empty if there are none.

    Raises:
        ValueError: The file is not a JSON object with a list of rows, or a row lacks a number.
    """
    path = folder / RESULTS_FILE
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not valid JSON; measure the model again") from None
    if not isinstance(results, dict) or not isinstance(results.get("rows", []), list):
        raise ValueError(f"{path} must hold an object with a list of rows; measure the model again")
    try:
        for row in results.get("rows", []):
            _row(row)
        _conditions(results)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} lacks numbers that the card shows ({reason}); measure the model again") from None
    return results


def _units_of_steps(steps: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Units of a model whose plain config says its shapes: its record keeps them in the pruning step."""
    pruned = [step for step in steps if step["step"] == "prune"]
    return {name: (pair[0], pair[1]) for name, pair in pruned[-1].get("units", {}).items()} if pruned else {}


def _pipeline(config: Any) -> str | None:
    architecture, kind = (config.architectures or [""])[0], config.model_type
    for task, names in _BY_MODEL.items():
        if names.get(kind) == architecture:
            return task
    reads_text = (
        kind in auto_names.MODEL_FOR_MASKED_LM_MAPPING_NAMES or kind in auto_names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    if reads_text and auto_names.MODEL_MAPPING_NAMES.get(kind) == architecture:
        return "feature-extraction"
    return next((task for ending, task in _PIPELINES.items() if architecture.endswith(ending)), None)


def _repository(name: str | None) -> str | None:
    """A name that can be a repository; a path of this machine cannot, and stays out of the card."""
    return name if name and _REPOSITORY.fullmatch(name) and not Path(name).exists() else None


def _public(name: Any) -> str:
    """How a model is called in the card: its repository, or the last part of a path of this machine."""
    return _repository(str(name or "")) or Path(str(name or "")).name or "not said"


def _without_paths(command: str | None) -> str | None:
    """A command line with the absolute paths of this machine shortened to their last part."""
    if command is None:
        return None
    words = []
    for word in shlex.split(command):
        key, equals, value = word.rpartition("=")
        words.append(f"{key}{equals}path/to/{Path(value).name}" if Path(value).is_absolute() else word)
    return shlex.join(words)


def _card_data(
    config: Any,
    results: dict[str, Any],
    *,
    name: str,
    steps: list[dict[str, Any]],
    base_model: str | None,
    metadata: dict[str, Any],
) -> ModelCardData:
    done = {step["step"] for step in steps}
    tags = ["hfcompress", *(word.replace(" ", "-") for step, word in _WORDS.items() if step in done)]
    extra = metadata.pop("tags", None) or []
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": _pipeline(config),
        "tags": list(dict.fromkeys([*tags, *([extra] if isinstance(extra, str) else extra)])),
        "base_model": _repository(base_model),
    }
    if fields["base_model"]:
        fields["base_model_relation"] = "quantized" if "quantize" in done else "finetune"
    fields |= {key: value for key, value in metadata.items() if value is not None}
    mine = next((row for row in results.get("rows", []) if row.get("folder") == "."), None)
    dataset = results.get("data", {}).get("name")
    if mine and dataset and mine.get("metric"):
        metric = mine["metric"]
        fields["model_name"] = name
        fields["eval_results"] = [
            EvalResult(
                task_type=fields["pipeline_tag"] or "other",
                dataset_type=_repository(dataset) or re.sub(r"[^\w.-]+", "-", Path(dataset).name),
                dataset_name=dataset,
                metric_type=metric["name"],
                metric_value=round(metric["value"], 6),
            )
        ]
    return ModelCardData(**{key: value for key, value in fields.items() if value is not None})


_WORDS = {"distill": "distilled", "prune": "pruned", "vocabulary": "cut in vocabulary", "quantize": "quantized"}


def _summary(config: Any, steps: list[dict[str, Any]], units: dict[str, tuple[int, int]]) -> str:
    done = [_WORDS[step["step"]] for step in steps if step["step"] in _WORDS]
    what = " and ".join(dict.fromkeys(done)) or "saved"
    text = f"A {config.model_type} model, {what} with hfcompress."
    left = []
    for kind in ("heads", "neurons"):
        pairs = [pair for name, pair in units.items() if name.endswith(kind)]
        if pairs:
            left.append(f"{sum(p[0] for p in pairs):,} of {sum(p[1] for p in pairs):,} {kind}")
    if left:
        text += f" In the layers that were pruned, {' and '.join(left)} are left."
    stacks = read_layers(config)
    if stacks:
        several = len(stacks) > 1
        counts = [f"{now} of {before} layers" + f" in {name}" * several for name, (now, before) in stacks.items()]
        text += f" {' and '.join(counts)} are left."
    hidden = read_hidden(config)
    if hidden is not None:
        text += f" The hidden states have {hidden[0]:,} of {hidden[1]:,} features left."
    return text


def _row(row: dict[str, Any]) -> dict[str, str]:
    metric, latency = row.get("metric"), row["latency"]
    speedup, layers = row.get("speedup"), row.get("layers_speedup")
    return {
        "name": row["name"],
        "metric": _score(metric) if metric is not None else "not measured",
        "parameters": f"{row['parameters'] / 1e6:.2f} M",
        "disk": f"{row['disk_bytes'] / 1e6:.1f}",
        "latency": f"{latency['median_ms']:.1f} ({latency['p10_ms']:.1f} to {latency['p90_ms']:.1f})",
        "speedup": f"{speedup['median']:.2f}x" if speedup else "1",
        "layers": f"{layers['median']:.2f}x" if layers else "1",
    }


def _score(metric: dict[str, Any]) -> str:
    factor, digits = (100, 2) if metric["name"] in PERCENTAGES else (1, 4)
    value, low, high = (f"{factor * metric[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _conditions(results: dict[str, Any]) -> dict[str, str | None]:
    if not results.get("rows"):
        return {"metric_label": "", "latency_label": "", "metric_note": "", "latency_note": "", "conditions": None}
    first = results["rows"][0]
    metric, latency = first.get("metric"), first["latency"]
    size = f"batch {latency['batch']}" + (f" x {latency['length']} tokens" if latency.get("length") else "")
    versions = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
    return {
        "metric_label": f"{metric['name'].replace('_', ' ')}, n = {metric['n']:,}" if metric else "score",
        "latency_label": size,
        "metric_note": "In brackets: the 95 % interval.",
        "latency_note": (
            f"Latency: median (10th to 90th percentile) of {latency['rounds']} rounds, all models in turn in one process; "
            "speedups are medians of the ratios round by round, that of the layers without embeddings and head."
        ),
        "conditions": (
            f"On {latency['device']}, {latency['threads']} threads, {size}, {latency['dtype']}; {versions}; "
            f"seed {results.get('seed')}; {results.get('date')}; commit {results.get('commit') or 'not known'}."
        ),
    }


def _data(results: dict[str, Any]) -> str:
    data = results.get("data") or {}
    if not data:
        return "not said"
    uses = (("train_n", "for training"), ("calibration_n", "for calibration"), ("eval_n", "for evaluation"))
    counts = [f"{data[key]:,} {use}" for key, use in uses if data.get(key) is not None]
    counts[:1] = [count.replace(" for", " examples for", 1) for count in counts[:1]]
    return f"{data.get('name')}, {' and '.join(counts)}" if counts else str(data.get("name"))


def _describe(step: dict[str, Any]) -> str:
    """One step of the record as a sentence; as it stands where it is none of ours."""
    try:
        return _sentence(step)
    except (KeyError, TypeError, ValueError, AttributeError):
        details = {key: value for key, value in step.items() if key != "step"}
        return f"{step['step']}: {json.dumps(details, sort_keys=True)}"


def _sentence(step: dict[str, Any]) -> str:
    kind = step["step"]
    if kind == "distill":
        terms = [f"{n} (weight {step['settings'][n]['weight']})" for n in ("task", "logits", "hidden")]
        used = [
            term
            for term, n in zip(terms, ("task", "logits", "hidden"), strict=True)
            if step["settings"][n]["weight"] > 0
        ]
        return (
            f"Distilled from {_public(step['teacher'])} for {step['optimizer_steps']:,} steps: {', '.join(used)}; "
            f"temperature {step['settings']['logits']['temperature']}."
        )
    if kind == "prune":
        return _pruning_sentence(step)
    if kind == "vocabulary":
        return f"Cut the vocabulary to {step['left']:,} of {step['before']:,} tokens."
    if kind == "quantize" and isinstance(step["layers"], dict):
        return _rounding_sentence(step)
    if kind == "quantize":
        return (
            f"Quantized {step['layers']} linear layers with bitsandbytes ({step['preset']}); "
            f"left as they are: {', '.join(step['skipped']) or 'none'}; everything else in {step['dtype']}."
        )
    if kind == "adapt":
        start = "what quantization took away" if step["init"] == "loftq" else "zero"
        return f"Put adapters of rank {step['rank']} on {step['layers']} layers, starting from {start}."
    if kind == "merge":
        return f"Merged the adapters of {step['layers']} layers into weights in float."
    raise ValueError(f"{kind} is no step of ours")


def _rounding_sentence(step: dict[str, Any]) -> str:
    how = "each weight to the nearest number"
    if "optimizer_steps" in step:
        how = f"trained with rounded weights for {step['optimizer_steps']:,} steps"
    elif step["method"] == "second order":
        how = f"rounded on {step['calibration_n']:,} examples, later columns making up for the error of earlier ones"
    counts = ", ".join(f"{count} in {form}" for form, count in step["layers"].items())
    return f"Quantized linear layers ({counts}), {how}."


def _pruning_sentence(step: dict[str, Any]) -> str:
    settings, schedule = step["settings"], step["settings"]["schedule"]
    criterion = settings["criterion"]
    criterion = criterion["name"] if isinstance(criterion, dict) else criterion
    when = "without training"
    if schedule is not None:
        when = (
            f"gradually ({schedule['name']} schedule from {schedule['start']:.0%} to {schedule['end']:.0%} of "
            f"{step['optimizer_steps']:,} steps)"
        )
    reached = [f"{found['speedup']:.2f}x measured for {found['wanted']:.2f}x" for found in step.get("reached", [])]
    speed = f", {'; '.join(reached)}" if reached else ""
    return (
        f"Pruned {', '.join(settings['units'])} {when} by the criterion {criterion} to a sparsity of {step['sparsity']:.3f} of "
        f"the layers' prunable parameters{speed}, and cut."
    )


def _ways(folder: Path, config: Any, name: str) -> list[dict[str, str]]:
    auto = _AUTO.get(_pipeline(config) or "", "AutoModel")
    plain = f"from transformers import {auto}\n"
    if (folder / ADAPTER_FILE).is_file():
        text = (
            "With transformers and peft, which find the model that the adapter belongs to, once hfcompress is imported:"
        )
        return [{"text": text, "code": f'import hfcompress\n{plain}model = {auto}.from_pretrained("{name}")'}]
    if is_packed(config):
        text = "With transformers, once hfcompress is imported (the weights are packed in a form of its own):"
        return [{"text": text, "code": f'import hfcompress\n{plain}model = {auto}.from_pretrained("{name}")'}]
    if not (folder / MODELING_FILE).is_file():
        if is_4bit(config):
            text = "With transformers, once hfcompress is imported (on CPUs bitsandbytes reads some widths wrong without it):"
            return [{"text": text, "code": f'import hfcompress\n{plain}model = {auto}.from_pretrained("{name}")'}]
        return [{"text": "With transformers alone:", "code": f'{plain}model = {auto}.from_pretrained("{name}")'}]
    return [
        {"text": "With hfcompress:", "code": f'import hfcompress\nmodel = hfcompress.load("{name}")'},
        {
            "text": "With transformers' own classes, pipelines and Trainer, once hfcompress is imported:",
            "code": f'import hfcompress\n{plain}model = {auto}.from_pretrained("{name}")',
        },
        {
            "text": f"Without hfcompress, by running the file `{MODELING_FILE}` in this repository:",
            "code": f'{plain}model = {auto}.from_pretrained("{name}", trust_remote_code=True)',
        },
    ]
