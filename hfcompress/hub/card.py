"""The model card: rendered from the record in `config.json` and the numbers in `results.json`, and nothing else."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.models.auto import modeling_auto as auto_names

import hfcompress
from hfcompress.anatomy import StructureError
from hfcompress.checkpoints.adapters import ADAPTER_FILE, read_config
from hfcompress.checkpoints.io import units_left
from hfcompress.checkpoints.portable import MODELING_FILE
from hfcompress.checkpoints.quantizer import DYNAMIC
from hfcompress.checkpoints.record import read_hidden, read_layers, read_steps, read_units, read_vocabulary
from hfcompress.hub.contract import contract_of, describe, judge, verdict
from hfcompress.hub.picture import Units, draw_layers, save_curves_picture, save_layers_picture, save_tradeoff_picture
from hfcompress.hub.results import (
    RESULTS_FILE,
    base_name,
    class_changes,
    command_without_paths,
    public_name,
    read_results,
    repository_of,
    words_of_data,
    words_of_lineage,
    words_of_row,
    words_of_rows,
    words_of_score,
    words_of_steps,
)
from hfcompress.hub.verify import RouteCheck, is_4bit, is_packed, is_torchao

__all__ = ["PICTURE_FILE", "RESULTS_FILE", "read_results", "write_card"]

PICTURE_FILE = "layers.png"
TRADEOFF_FILE = "tradeoff.png"
CURVES_FILE = "curves.png"
SHOWN_CLASSES = 10
_TEMPLATE = Path(__file__).with_name("card_template.md")
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
    steps = steps_of(config)
    units = units_of(config)
    name = (repo_id or results.get("name") or folder.resolve().name).rpartition("/")[2]
    base_model = base_model or results.get("base_model")
    rows = results.get("rows", [])
    own = next((row for row in rows if row.get("folder") == "."), None)
    clauses = judge(contract_of(results), own) if own and results.get("contract") else []
    classes = class_changes(rows[0], own) if own and own is not rows[0] else []
    words = words_of_rows(results)
    notes = words.pop("notes")
    card = ModelCard.from_template(
        _card_data(config, results, name=name, steps=steps, base_model=base_model, metadata=metadata),
        template_path=str(_TEMPLATE),
        title=name,
        summary=summarize(config, units),
        rows=[_cells(words_of_row(row)) for row in rows],
        effects=[_cells(effect) for effect in words_of_steps(rows)] if len(rows) > 2 else [],
        clauses=[describe(clause) for clause in clauses],
        verdict=verdict(clauses),
        classes=[{**each, "name": _cell(each["name"])} for each in classes[:SHOWN_CLASSES]],
        class_count=len(classes),
        steps=describe_steps(steps),
        pictures=_draw(folder, units, read_layers(config), results),
        units=draw_layers(units, layers=read_layers(config)) if units else None,
        ways=ways_to_load(folder, config, repo_id or f"path/to/{name}"),
        checks=", ".join(
            f"{check.route} {check.difference:.1g}" for check in checks or [] if check.difference is not None
        ),
        base_model=repository_of(base_model) or base_name(results),
        teacher=teacher_of(steps),
        data=words_of_data(results),
        licences=words_of_lineage(results),
        scores=", ".join(f"{name} {value:.4g}" for name, value in (scores or {}).items()),
        command=command_without_paths(results.get("command")),
        version=hfcompress.__version__,
        **{key: word and _cell(word) for key, word in words.items()},
        notes=[_cell(note) for note in notes],
    )
    path = folder / "README.md"
    card.save(path)
    return path


def _cell(text: str) -> str:
    """A text that stays in its cell of a table in Markdown, and no markup."""
    words = " ".join(text.split())
    return html.escape(words, quote=False).replace("|", "\\|").replace("`", "'")


def _cells(row: Mapping[str, str]) -> dict[str, str]:
    return {key: _cell(text) for key, text in row.items()}


def steps_of(config: Any) -> list[dict[str, Any]]:
    """The steps of a model's record that say what they are."""
    return [step for step in read_steps(config) if isinstance(step.get("step"), str)]


def units_of(config: Any) -> dict[str, tuple[int, int]]:
    """Site name to (units left, units before) of every site; empty if no units were pruned."""
    recorded = read_units(config) or _units_of_steps(steps_of(config))
    try:
        return units_left(config) if recorded else {}
    except StructureError:  # a class that is none of transformers'
        return recorded


def teacher_of(steps: Sequence[Mapping[str, Any]]) -> str:
    """What the last distillation learned from."""
    return next((public_name(step.get("teacher")) for step in reversed(steps) if step["step"] == "distill"), "none")


def describe_steps(steps: Sequence[dict[str, Any]]) -> list[str]:
    """What was done to a model, a sentence a step."""
    return [_describe(step) for step in steps] or ["Nothing yet."]


def _draw(folder: Path, units: Units, layers: Units, results: dict[str, Any]) -> list[dict[str, str]]:
    """Draw what there is to be drawn; what stands under each picture, and its file."""
    rows = results.get("rows", [])
    drawn = []
    if len(rows) > 1 and all(row.get("metric") for row in rows):
        points = [
            (r["name"], r["latency"]["median_ms"], *(r["metric"][k] for k in ("value", "low", "high"))) for r in rows
        ]
        save_tradeoff_picture(points, folder / TRADEOFF_FILE, metric=rows[0]["metric"]["name"].replace("_", " "))
        drawn.append({"text": "Score against latency, with 95 % intervals", "file": TRADEOFF_FILE})
    if units:
        save_layers_picture(units, folder / PICTURE_FILE, layers=layers)
        drawn.append({"text": "What is left in each layer", "file": PICTURE_FILE})
    if save_curves_picture(results.get("history", {}), folder / CURVES_FILE):
        drawn.append({"text": "Loss and sparsity in training", "file": CURVES_FILE})
    return drawn


def _units_of_steps(steps: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Units of a model whose plain config says its shapes: its record keeps them in the pruning step."""
    pruned = [step for step in steps if step["step"] == "prune"]
    return {name: (pair[0], pair[1]) for name, pair in pruned[-1].get("units", {}).items()} if pruned else {}


def pipeline_of(config: Any) -> str | None:
    """The task of a model by its architecture, as the Hub calls it; None where it is not known."""
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
        "pipeline_tag": pipeline_of(config),
        "tags": list(dict.fromkeys([*tags, *([extra] if isinstance(extra, str) else extra)])),
        "base_model": repository_of(base_model),
    }
    if fields["base_model"]:
        fields["base_model_relation"] = "quantized" if "quantize" in done else "finetune"
    fields |= {key: value for key, value in metadata.items() if value is not None}
    evaluated = _eval_results(results, task=fields["pipeline_tag"] or "other")
    if evaluated:
        fields |= {"model_name": name, "eval_results": evaluated}
    return ModelCardData(**{key: value for key, value in fields.items() if value is not None})


# How the Hub calls them, where it has another word.
_HUB_METRICS = {"macro_f1": "f1", "rougeL": "rouge", "pearson": "pearsonr"}


def _eval_results(results: dict[str, Any], *, task: str) -> list[EvalResult]:
    """The score of the model in this folder, for the `model-index` of its metadata."""
    mine = next((row for row in results.get("rows", []) if row.get("folder") == "."), None)
    data = results.get("data") or {}
    if not mine or not data.get("name") or not mine.get("metric") or data.get("labels") is False:
        return []
    metric, dataset = mine["metric"], str(data["name"])
    source = repository_of(data.get("repository")) or repository_of(dataset)
    return [
        EvalResult(
            task_type=task,
            dataset_type=source or re.sub(r"[^\w.-]+", "-", Path(dataset).name),
            dataset_name=dataset,
            dataset_config=data.get("config"),
            dataset_split=data.get("split"),
            metric_type=_HUB_METRICS.get(metric["name"], metric["name"]),
            metric_value=round(metric["value"], 6),
            metric_name=f"{metric['name'].replace('_', ' ')}, n = {metric['n']:,}: {words_of_score(metric)}",
        )
    ]


_WORDS = {"distill": "distilled", "prune": "pruned", "vocabulary": "cut in vocabulary", "quantize": "quantized"}


def summarize(config: Any, units: Units) -> str:
    """What a model is and what is left of it."""
    steps = steps_of(config)
    done = [_WORDS[step["step"]] for step in steps if step["step"] in _WORDS]
    what = " and ".join(dict.fromkeys(done)) or "saved"
    text = f"A {config.model_type} model, {what} with hfcompress."
    left = []
    for kind in ("heads", "neurons"):
        pairs = [pair for name, pair in units.items() if name.endswith(kind)]
        if any(now < before for now, before in pairs):
            left.append(f"{sum(p[0] for p in pairs):,} of {sum(p[1] for p in pairs):,} {kind}")
    stacks = read_layers(config)
    if left:
        text += f" {' and '.join(left)} are left{' in the layers that stayed' * bool(stacks)}."
    if stacks:
        several = len(stacks) > 1
        counts = [f"{now} of {before} layers" + f" in {name}" * several for name, (now, before) in stacks.items()]
        text += f" {' and '.join(counts)} are left."
    hidden = read_hidden(config)
    if hidden is not None:
        text += f" The hidden states have {hidden[0]:,} of {hidden[1]:,} features left."
    tokens = read_vocabulary(config)
    if tokens is not None:
        text += f" The vocabulary has {tokens[0]:,} of {tokens[1]:,} tokens left."
    return text


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
            f"Distilled from {public_name(step['teacher'])} for {step['optimizer_steps']:,} steps: {', '.join(used)}; "
            f"temperature {step['settings']['logits']['temperature']}."
        )
    if kind == "prune":
        return _pruning_sentence(step)
    if kind == "vocabulary":
        return f"Cut the vocabulary to {step['left']:,} of {step['before']:,} tokens."
    if kind == "quantize" and isinstance(step["layers"], dict):
        return _rounding_sentence(step)
    if kind == "quantize":
        library = "torchao" if step["preset"] in DYNAMIC else "bitsandbytes"
        return (
            f"Quantized {step['layers']} linear layers with {library} ({step['preset']}); "
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


def ways_to_load(folder: Path, config: Any, name: str) -> list[dict[str, str]]:
    """The ways to load what is in a folder, under a name: what each needs, and the code."""
    ways = _ways_to_load(folder, config, name)
    if not is_torchao(config):
        return ways
    compiling = "\nmodel.compile()  # what is multiplied in 8 bits is fast once it is compiled"
    texts = [f"{way['text'].removesuffix(':').removesuffix(' alone')}; torchao has to be installed:" for way in ways]
    return [{"text": text, "code": way["code"] + compiling} for text, way in zip(texts, ways, strict=True)]


def _ways_to_load(folder: Path, config: Any, name: str) -> list[dict[str, str]]:
    auto = _AUTO.get(pipeline_of(config) or "", "AutoModel")
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
