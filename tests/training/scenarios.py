"""Small runs that several tests share; also started with torchrun as a script, which runs several jobs."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import hfcompress.training.pruning
import hfcompress.training.sharded
from hfcompress.config import Recipe
from hfcompress.distillation import AverageTeacher
from hfcompress.distillation.placement import available_bytes
from hfcompress.training import CompressionTrainer, DistillationTrainer, PlainTrainer, PruningTrainer
from hfcompress.training.sharded import digest, is_sharded, loading_whole
from tests.families import IMAGE_FAMILIES, make_model

LABELS = 3
FAMILIES = ("bert", "roberta", "distilbert", "vit", "gpt2", "llama")


class Examples(Dataset):
    """Random examples of a task; texts of unequal length, padded at the end to the longest.

    With `silent`, every second group of four has no label that counts. Of a text, `prompt` tokens have no label.
    """

    def __init__(
        self, family: str, task: str, n: int = 16, *, labelled: bool = True, silent: bool = False, prompt: int = 0
    ) -> None:
        self.rows = []
        for number in range(n):
            generator = torch.Generator().manual_seed(number)
            if family in IMAGE_FAMILIES:
                row = {
                    "pixel_values": torch.randn(3, 16, 16, generator=generator),
                    "labels": torch.tensor(number % LABELS),
                }
            else:
                length = 4 + (number * 5) % 9
                ids = torch.randint(3, 99, (12,), generator=generator)
                mask = (torch.arange(12) < length).long()
                ids = ids * mask
                row = {"input_ids": ids, "attention_mask": mask}
                if task == "sequence":
                    row["labels"] = torch.tensor(number % LABELS)
                elif task == "token":
                    row["labels"] = torch.where(mask.bool(), ids % LABELS, -100)
                else:
                    row["labels"] = torch.where(mask.bool(), ids, -100)
            if silent and number // 4 % 2:
                row["labels"] = torch.full_like(row["labels"], -100)
            if prompt:
                row["labels"] = row["labels"].clone()
                row["labels"][:prompt] = -100
            if not labelled:
                row.pop("labels")
            self.rows.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return dict(self.rows[index])

    def batch(self, *indices: int) -> dict[str, torch.Tensor]:
        """Chosen examples as a collator puts them together."""
        return {name: torch.stack([self.rows[i][name] for i in indices]) for name in self.rows[0]}


AUTO = {
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "causal": "AutoModelForCausalLM",
    "image": "AutoModelForImageClassification",
}


def build(family: str, task: str, *, seed: int, dropout: float = 0.0, **changes: Any) -> Any:
    names = {
        "distilbert": ("dropout", "attention_dropout", "seq_classif_dropout"),
        "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout"),
        "opt": ("dropout", "attention_dropout"),
    }.get(family, ("hidden_dropout_prob", "attention_probs_dropout_prob"))
    if family not in ("llama", "qwen2", "qwen3", "mistral", "gemma"):
        changes = {**dict.fromkeys(names, dropout), **changes}
    if task in ("sequence", "token", "image"):
        changes = {"num_labels": LABELS, **changes}
    return make_model(family, AUTO[task], seed=seed, **changes)


def arguments(folder: Path | str, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "learning_rate": 1e-3,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    made = TrainingArguments(**{**settings, **changes})
    if "HFCOMPRESS_FSDP_ON_CPU" in os.environ and "ACCELERATE_USE_FSDP" in os.environ:
        # Accelerate looks for FSDP only where there are GPUs; on gloo it works as well.
        assert made.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return made


def checkpointing(**settings: Any) -> dict[str, Any]:
    """Arguments that recompute activations; their names changed from gradient_... to activation_... in 2026."""
    name = "activation_checkpointing"
    if name not in {field.name for field in dataclasses.fields(TrainingArguments)}:
        name = "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": settings}


def recipe(
    *,
    cut: str = "gradual",
    sparsity: float = 0.5,
    hidden: float = 0.5,
    criterion: str = "first_order",
    distill: dict[str, Any] | None = None,
    prune: dict[str, Any] | None = None,
    qat: dict[str, Any] | None = None,
    parts: tuple[str, ...] = ("distill", "prune"),
) -> Recipe:
    sections = {
        "distill": {"hidden": {"weight": hidden}, "dropout": True, **(distill or {})},  # where a model has any
        "prune": {
            "target": {"sparsity": sparsity},
            "criterion": criterion,
            "multiple_of": {"neurons": 4},
            "at_least": {"neurons": 4},
            "schedule": {"start": 0.1, "end": 0.7, "updates": 3},
            "cut": cut,
            **(prune or {}),
        },
    }
    return Recipe.from_dict({part: sections[part] for part in parts} | ({"qat": qat} if qat else {}))


RECIPE_OPTIONS = ("cut", "sparsity", "hidden", "criterion", "distill", "prune", "qat")
PARTS: dict[type, tuple[str, ...]] = {
    Trainer: (),
    PlainTrainer: (),
    DistillationTrainer: ("distill",),
    PruningTrainer: ("prune",),
    CompressionTrainer: ("distill", "prune"),
}
TRAINERS = {cls.__name__: cls for cls in PARTS}


def make_trainer(
    folder: Path | str,
    *,
    trainer: type[Trainer] | str = CompressionTrainer,
    family: str = "bert",
    task: str = "sequence",
    model: Any = None,
    data: Dataset | None = None,
    teacher: Any = None,
    given: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer of any kind on a tiny model.

    Options are those of `recipe`, `dropout`, `n`, `prompt`, `teacher_width`, `average` (the decay, where the student's own average
    teaches), `cached` (the folder of a cache that teaches) and everything that `arguments` takes; `given` goes to the trainer as it is.
    """
    cls = TRAINERS[trainer] if isinstance(trainer, str) else trainer
    dropout, n, width = options.pop("dropout", 0.0), options.pop("n", 16), options.pop("teacher_width", None)
    average, prompt = options.pop("average", None), options.pop("prompt", 0)
    teacher = options.pop("cached", teacher)
    settings = {key: options.pop(key) for key in RECIPE_OPTIONS if key in options}
    given = dict(given or {})
    parts = tuple(options.pop("parts", PARTS[next(known for known in cls.__mro__ if known in PARTS)]))
    if parts:
        given.setdefault("recipe", recipe(parts=parts, **settings))
    if "distill" in parts:
        wider = {"hidden_size": width} if width is not None else {}
        teacher = AverageTeacher(decay=average) if average is not None else teacher
        with loading_whole():
            given["teacher"] = teacher if teacher is not None else build(family, task, seed=7, **wider)
    if "model_init" not in given:
        with loading_whole():
            given["model"] = model if model is not None else build(family, task, seed=0, dropout=dropout)
    data = data if data is not None else Examples(family, task, n, prompt=prompt)
    given = {"train_dataset": data, "eval_dataset": data, "args": arguments(folder, **options), **given}
    trainer = cls(**given)
    if trainer.is_deepspeed_enabled:
        # Parameters of small models would otherwise be gathered once and stay so.
        zero = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0
    return trainer


def compress(folder: Path | str, *, resume: str | Path | bool | None = None, **options: Any) -> tuple[Any, Any]:
    """One run of CompressionTrainer (or what `make_trainer` is told); the trainer and its model."""
    trainer = make_trainer(folder, **options)
    trainer.train(resume_from_checkpoint=resume if resume is None or resume is True else str(resume))
    return trainer, trainer.accelerator.unwrap_model(trainer.model)


def vector(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def everything(model: torch.nn.Module) -> torch.Tensor:
    """Parameters and buffers: packed weights are buffers."""
    return torch.cat([tensor.detach().flatten().double() for tensor in model.state_dict().values()])


class Gradients(TrainerCallback):
    """Keeps a copy of the gradients that each optimizer step sees (all of them are averaged over processes by then)."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        named = model.named_parameters()
        self.steps.append({name: p.grad.detach().clone() for name, p in named if p.grad is not None})


GRADIENT_CASES = {
    "bert-sequence": ("bert", "sequence"),
    "roberta-sequence": ("roberta", "sequence"),
    "distilbert-sequence": ("distilbert", "sequence"),
    "bert-token": ("bert", "token"),
    "gpt2-causal": ("gpt2", "causal"),
    "llama-causal": ("llama", "causal"),
    "vit-image": ("vit", "image"),
}
GRADIENT_TRAINERS = ("PlainTrainer", "DistillationTrainer", "PruningTrainer")
# The pruned runs have been cut when their first step begins.
AT_ONCE = {"criterion": "magnitude", "prune": {"schedule": {"name": "constant", "start": 0.0}}}


def gradients(
    folder: Path | str, *, case: str, trainer: str, silent: bool = False, batch: int = 8, **options: Any
) -> dict[str, torch.Tensor]:
    """The gradients of the first optimizer step over the same eight examples, in batches of 8 or accumulated."""
    family, task = GRADIENT_CASES[case]
    settings = {
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": batch,
        "data": Examples(family, task, 8, silent=silent),
    }
    captured = Gradients()
    run = make_trainer(
        folder,
        family=family,
        task=task,
        trainer=trainer,
        given={"callbacks": [captured]},
        **{**settings, **AT_ONCE, **options},
    )
    run.train()
    assert len(captured.steps) == 1
    return captured.steps[0]


def same_everywhere(tensor: torch.Tensor) -> bool:
    """Whether all processes hold the same values; a tensor of another length is another tensor."""
    everyones: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyones, tensor)
    return all(other.shape == tensor.shape and torch.equal(other, tensor) for other in everyones)


def from_disk(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Student and teacher read with `from_pretrained` where the arguments are there already, as in most scripts."""
    kept = arguments(folder)
    loaded = {}
    for role, seed in (("model", 0), ("teacher", 7)):
        with loading_whole():
            model = build(job["family"], job["task"], seed=seed)
        if kept.process_index == 0:
            model.save_pretrained(folder / role)
        torch.distributed.barrier()
        loaded[role] = type(model).from_pretrained(folder / role)
    return {**job, **loaded}


def share_held(model: torch.nn.Module) -> float:
    """The share of a model's numbers that this process holds."""
    held = whole = 0
    for parameter in model.parameters():
        whole += getattr(parameter, "ds_numel", parameter.numel())
        if isinstance(parameter, DTensor):
            held += parameter.to_local().numel()
        else:
            held += parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else parameter.numel()
    return held / whole


def run_job(folder: Path, job: dict[str, Any]) -> None:
    """One run on all processes; rank 0 writes `facts.json` and tensors beside it."""
    job = dict(job)
    folder.mkdir(parents=True, exist_ok=True)
    room = job.pop("free_bytes", None)
    hfcompress.training.sharded.available_bytes = available_bytes if room is None else lambda *_, **__: room
    if job.pop("from_disk", False):
        job = from_disk(folder, job)
    if job.get("do") == "refuse":
        found = {}
        for name, options in job["cases"].items():
            try:
                make_trainer(folder, **options).train()
            except ValueError as error:
                found[name] = str(error)
        if torch.distributed.get_rank() == 0:
            (folder / "facts.json").write_text(json.dumps(found))
        torch.distributed.barrier()
        return
    if job.pop("do", "compress") == "gradients":
        found = gradients(folder, **job)
        if torch.distributed.get_rank() == 0:
            safetensors.torch.save_file(found, folder / "gradients.safetensors")
        torch.distributed.barrier()
        return
    if (resume := job.pop("resume_job", None)) is not None:
        job["resume"] = folder.parent / resume
    keep_reducer = job.pop("keep_reducer", False)
    rebuild = hfcompress.training.pruning.rebuild_reducer
    if keep_reducer:
        hfcompress.training.pruning.rebuild_reducer = lambda wrapped: None
    try:
        trainer, model = compress(folder, **job)
    except RuntimeError as error:
        if "don't know how to restore data location" not in str(error):
            raise
        # transformers 5.17 asks torch for the optimizer's state on "cpu:0", which there is not.
        (folder / "facts.json").write_text(
            json.dumps({"skip": "this transformers cannot resume several CPU processes"})
        )
        return
    finally:
        hfcompress.training.pruning.rebuild_reducer = rebuild
    facts = {
        "world": trainer.args.world_size,
        "wrapper": type(trainer.model_wrapped).__name__,
        "sharding": trainer.sharding,
        "units": (getattr(model.config, "hfcompress", None) or {}).get("units"),
        "log": trainer.state.log_history,
        "in_optimizer": sum(len(group["params"]) for group in trainer.optimizer.param_groups),
    }
    pruner = getattr(trainer, "pruner", None)
    plan = None if pruner is None else pruner.units()
    facts["same_digests"] = len(set(gather_object([digest(model, plan)]))) == 1
    facts["share_held"] = share_held(model)
    if trainer.sharding != "none":
        facts["units"] = plan or None
    if not is_sharded(model):
        facts["same_weights"] = same_everywhere(everything(model))
    if hasattr(trainer, "_projections"):
        projections = trainer._projections
        facts["same_projections"] = len(projections) == 0 or same_everywhere(vector(projections))
        facts["projections"] = len(projections)
        for teacher in trainer.teacher.models:
            facts["teacher"] = {"type": type(teacher).__name__, "training": teacher.training}
            facts["teacher"]["share_held"] = share_held(teacher)
            facts["same_teacher"] = is_sharded(teacher) or same_everywhere(vector(teacher))
        if trainer.is_world_process_zero():
            state = {name: value.contiguous() for name, value in projections.state_dict().items()}
            safetensors.torch.save_file(state, folder / "projections.safetensors")
    facts["eval"] = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder / "final"))
    if trainer.is_world_process_zero():
        if not is_sharded(model):
            safetensors.torch.save_file({"weights": vector(model)}, folder / "weights.safetensors")
        (folder / "facts.json").write_text(json.dumps(facts))
    torch.distributed.barrier()


def main() -> None:
    """`python -m torch.distributed.run … -m tests.training.scenarios FOLDER JOBS`; jobs are JSON: name to options."""
    folder, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if "ACCELERATE_USE_DEEPSPEED" in os.environ and not torch.cuda.is_available():
        import deepspeed.ops

        # A faster way for processes to talk, which is compiled for more than a minute when it is first used.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for family in FAMILIES:
        make_model(family)
    gc.freeze()  # Trainer collects garbage at the start of each run; what is imported stays anyway
    for name, job in jobs.items():
        run_job(folder / name, job)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    # DeepSpeed keeps groups of its own, whose threads (gloo) may end after the interpreter: that aborts, once in many times.
    sys.stdout.flush()
    os._exit(0)
