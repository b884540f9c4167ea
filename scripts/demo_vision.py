"""`make demo-vision`: compress a vision transformer on scikit-learn's handwritten digits, offline, and show what came out.

There is no pretrained vision model among the packages, so a small ViT is trained from nothing; the images are real: 1,797
scans of 8 x 8 pixels, enlarged to 32 x 32.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hfcompress.cli.main import main

HERE = Path(__file__).resolve().parents[1]


def write_images(folder: Path) -> tuple[Path, Path]:
    """Write the digits as PNG files, one folder a class, in a stratified training and evaluation part."""
    digits = load_digits()
    parts = train_test_split(np.arange(len(digits.target)), test_size=500, stratify=digits.target, random_state=0)
    folders = folder / "train", folder / "eval"
    for target, indices in zip(folders, parts, strict=True):
        for index in indices:
            path = target / f"digit-{digits.target[index]}" / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[index] / 16 * 255).astype(np.uint8)
            Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(path)
    return folders


def write_model(folder: Path) -> Path:
    """Write an untrained ViT and its image processor."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=768,
        image_size=32,
        patch_size=8,
        hidden_dropout_prob=0.1,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    ViTImageProcessor(size=size, image_mean=[0.3] * 3, image_std=[0.35] * 3).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    train, evaluation = write_images(HERE / "demo" / "digits")
    model = write_model(HERE / "demo" / "vit")
    recipe = str(HERE / "configs" / "demo_vision.yaml")
    output = HERE / "demo" / "vision"
    sources = [f"model.name={model}", f"data.train={train}", f"data.eval={evaluation}", f"output={output}"]
    sys.exit(main(["run", recipe, *sources, "--restart", *sys.argv[1:]]))
