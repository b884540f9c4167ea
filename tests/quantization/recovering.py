"""A small recovery that several tests share; also started with torchrun as a script, in several processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import hfcompress
from hfcompress.quantization import add_adapters, own_device_map, quantize
from hfcompress.training import DistillationTrainer
from tests.training.scenarios import Examples, arguments, recipe, same_everywhere, vector


def student(folder: Path, preset: str, **options: Any) -> Any:
    """The model in `folder / "full"`, quantized on this process's own device, with adapters."""
    full = hfcompress.load(folder / "full", device_map=own_device_map())
    if not (folder / preset).exists():
        quantize(folder / "full", preset).save_pretrained(folder / preset)
    small = hfcompress.load(folder / preset, device_map=own_device_map())
    return add_adapters(small, full, rank=4, **options)


def make_trainer(folder: Path, preset: str, output: Path, *, model: Any = None, **settings: Any) -> DistillationTrainer:
    """A trainer of adapters against the model in full precision."""
    data = Examples("bert", "sequence", 16)
    return DistillationTrainer(
        model=student(folder, preset) if model is None else model,
        teacher=hfcompress.load(folder / "full"),
        recipe=recipe(parts=("distill",), distill={"task": {"weight": 0.0}, "logits": {"weight": 1.0}}),
        args=arguments(output, **{"learning_rate": 1e-3, "per_device_train_batch_size": 16, **settings}),
        train_dataset=data,
        eval_dataset=data,
    )


def adapters_of(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters() if p.requires_grad])


SHARED = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}


def main() -> None:
    """`python -m torch.distributed.run … -m tests.quantization.recovering FOLDER PRESET`."""
    torch.set_num_threads(1)
    folder, preset = Path(sys.argv[1]), sys.argv[2]
    trainer = make_trainer(folder, preset, folder / f"two-{preset}", per_device_train_batch_size=4, **SHARED)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    facts = {
        "world": trainer.args.world_size,
        "same": same_everywhere(vector(model).float()),
        "devices": sorted({str(parameter.device) for parameter in model.parameters()}),
    }
    trainer.save_model(str(folder / f"adapter-{preset}"))
    if trainer.is_world_process_zero():
        safetensors.torch.save_file({"adapters": adapters_of(model)}, folder / f"weights-{preset}.safetensors")
        (folder / f"facts-{preset}.json").write_text(json.dumps(facts))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
