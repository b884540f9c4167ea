"""Small runs that several tests share; also started with torchrun as a script, one scenario a process group."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset
from transformers import TrainingArguments

from hfcompress.config import Recipe
from hfcompress.training import CompressionTrainer
from tests.families import IMAGE_FAMILIES, make_model

LABELS = 3


class Examples(Dataset):
    """Random examples of a task; texts of unequal length, padded at the end to the longest."""

    def __init__(self, family: str, task: str, n: int = 16, *, labelled: bool = True) -> None:
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
            if not labelled:
                row.pop("labels")
            self.rows.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


AUTO = {
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "causal": "AutoModelForCausalLM",
    "image": "AutoModelForImageClassification",
}


def build(family: str, task: str, *, seed: int, dropout: float = 0.0, **changes: Any) -> torch.nn.Module:
    names = {
        "distilbert": ("dropout", "attention_dropout", "seq_classif_dropout"),
        "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout"),
        "opt": ("dropout", "attention_dropout"),
    }.get(family, ("hidden_dropout_prob", "attention_probs_dropout_prob"))
    if family not in ("llama", "qwen2", "qwen3", "mistral", "gemma"):
        changes = {**dict.fromkeys(names, dropout), **changes}
    if task in ("sequence", "token", "image"):
        changes["num_labels"] = LABELS
    return make_model(family, AUTO[task], seed=seed, **changes)


def arguments(folder: Path | str, **changes: Any) -> TrainingArguments:
    settings = {
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
    return TrainingArguments(**{**settings, **changes})


def recipe(
    *, cut: str = "gradual", sparsity: float = 0.5, hidden: float = 0.5, criterion: str = "first_order"
) -> Recipe:
    return Recipe.from_dict(
        {
            "distill": {"hidden": {"weight": hidden}},
            "prune": {
                "target": {"sparsity": sparsity},
                "criterion": criterion,
                "multiple_of": {"neurons": 4},
                "at_least": {"neurons": 4},
                "schedule": {"start": 0.1, "end": 0.7, "updates": 3},
                "cut": cut,
            },
        }
    )


def compress(
    folder: Path | str, *, family: str = "bert", task: str = "sequence", resume: str | None = None, **options: Any
) -> tuple[CompressionTrainer, torch.nn.Module]:
    """One run of CompressionTrainer; options of `arguments`, and cut, dropout, n, sparsity, criterion, hidden."""
    dropout, n = options.pop("dropout", 0.0), options.pop("n", 16)
    chosen = recipe(**{key: options.pop(key) for key in ("cut", "sparsity", "hidden", "criterion") if key in options})
    data = Examples(family, task, n)
    model = build(family, task, seed=0, dropout=dropout)
    trainer = CompressionTrainer(
        model=model,
        teacher=build(family, task, seed=7),
        recipe=chosen,
        args=arguments(folder, **options),
        train_dataset=data,
        eval_dataset=data,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, model


def vector(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def main() -> None:
    """`torchrun scenarios.py FOLDER JSON`: train, compare the ranks, and write down what came out."""
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    transformers.logging.set_verbosity_error()
    trainer, model = compress(folder, **options)
    mine = vector(model)
    everyones = [torch.zeros_like(mine) for _ in range(trainer.args.world_size)]
    torch.distributed.all_gather(everyones, mine)
    trainer.save_model(str(folder / "final"))
    if trainer.is_world_process_zero():
        torch.distributed.barrier()
        facts = {
            "world": trainer.args.world_size,
            "wrapper": type(trainer.model_wrapped).__name__,
            "same_weights": all(torch.equal(other, mine) for other in everyones),
            "units": model.config.hfcompress.get("units"),
            "weights": mine.tolist(),
            "eval": trainer.state.log_history[-1],
        }
        (folder / "facts.json").write_text(json.dumps(facts))
    else:
        torch.distributed.barrier()


if __name__ == "__main__":
    main()
