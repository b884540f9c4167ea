from __future__ import annotations

import io
import re

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Value
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from hfcompress.config import DataConfig
from hfcompress.tasks import DataError, prepare
from hfcompress.tasks.image import open_image


def png(color, mode="RGB") -> bytes:
    file = io.BytesIO()
    image = PIL.Image.new("RGB" if mode == "P" else mode, (10, 6), color)
    (image.quantize() if mode == "P" else image).save(file, "png")
    return file.getvalue()


@pytest.fixture
def photos(tmp_path):
    """Class folders with color, grey, transparent and palette images."""
    root = tmp_path / "photos"
    for cls, level in (("dark", 20), ("light", 230)):
        (root / cls).mkdir(parents=True)
        for i, mode in enumerate(("RGB", "L", "RGBA", "P")):
            color = {"L": level, "RGBA": (level,) * 3 + (128,)}.get(mode, (level,) * 3)
            (root / cls / f"{i}.png").write_bytes(png(color, mode))
    return root


def ready(train, *, model, **options):
    told = {key: options.pop(key) for key in list(options) if key in DataConfig.model_fields}
    return prepare(DataConfig(train=str(train), **told), task="image-classification", model_name=model, **options)


def test_everything_a_trainer_needs(photos, vit, tmp_path):
    held = ready(photos, model=vit, holdout=0.25)
    assert (len(held.train_dataset), len(held.eval_dataset)) == (6, 2)
    assert sorted(held.eval_dataset[i]["labels"] for i in range(2)) == [0, 1]
    prepared = ready(photos, model=vit, eval=str(photos))
    assert prepared.label_names == ["dark", "light"]
    assert prepared.train_dataset.column_names == ["pixel_values", "labels"]
    assert prepared.auto_class == "AutoModelForImageClassification"
    model = AutoModelForImageClassification.from_pretrained(vit, **prepared.model_kwargs)
    arguments = TrainingArguments(
        tmp_path / "run",
        max_steps=30,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=prepared.data_collator,
        train_dataset=prepared.train_dataset,
        eval_dataset=prepared.eval_dataset,
        compute_metrics=prepared.compute_metrics,
    )
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] == 1.0


def test_every_mode_becomes_three_channels(photos, vit):
    prepared = ready(photos, model=vit, eval=str(photos))
    rows = [prepared.train_dataset[i] for i in range(8)]
    assert [row["labels"] for row in rows] == [0] * 4 + [1] * 4
    for row, level in zip(rows, [20] * 4 + [230] * 4, strict=True):
        assert row["pixel_values"].shape == (3, 16, 16)
        # The processor of ViT maps [0, 255] to [-1, 1].
        assert torch.allclose(row["pixel_values"], torch.tensor(level / 127.5 - 1), atol=1e-3)
    batch = prepared.data_collator(rows)
    assert batch["pixel_values"].shape == (8, 3, 16, 16)
    assert batch["labels"].dtype == torch.int64


def test_sixteen_bit_grey_is_scaled_and_orientation_followed():
    file = io.BytesIO()
    PIL.Image.fromarray(np.array([[0, 30_000, 65535]], dtype=np.uint16)).save(file, "png")
    image = open_image({"bytes": file.getvalue(), "path": None})
    assert np.asarray(image)[0, :, 0].tolist() == [0, 117, 255]  # 30,000 / 65,535 * 255 = 116.7
    file = io.BytesIO()
    exif = PIL.Image.Exif()
    exif[274] = 6  # Orientation: turn by a quarter
    PIL.Image.new("RGB", (10, 6)).save(file, "jpeg", exif=exif)
    assert open_image({"bytes": file.getvalue(), "path": None}).size == (6, 10)


def test_a_file_that_is_no_image_is_named(photos, vit):
    (photos / "dark/9.png").write_text("not an image")
    with pytest.raises(
        DataError, match=r"photos, row 4: '.*dark/9.png' cannot be read as an image: .*replace or remove"
    ):
        ready(photos, model=vit)


def test_a_file_that_is_cut_off_is_named_when_it_is_read(photos, vit):
    whole = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(whole).save(file, "jpeg")
    (photos / "dark/9.jpg").write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    prepared = ready(photos, model=vit, eval=str(photos))
    assert len(prepared.train_dataset) == 9
    with pytest.raises(DataError, match=r"9.jpg' cannot be read as an image: .*truncated"):
        prepared.train_dataset[4]


def test_one_class_and_none(tmp_path, vit):
    (tmp_path / "one/cat").mkdir(parents=True)
    (tmp_path / "one/cat/1.png").write_bytes(png(3, "L"))
    with pytest.raises(DataError, match="one: there is only the label 'cat' in all 1 rows"):
        ready(tmp_path / "one", model=vit)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no images in one folder per class"):
        ready(tmp_path / "none", model=vit)


def test_images_in_a_table(tmp_path, vit):
    images = [{"bytes": png((i * 20,) * 3), "path": f"{i}.png"} for i in range(6)]
    plain = Features({"scan": {"bytes": Value("binary"), "path": Value("string")}, "finding": Value("string")})
    rows = {"scan": images, "finding": ["ill", "well"] * 3}
    Dataset.from_dict(rows, features=plain).to_parquet(tmp_path / "s.parquet")
    prepared = ready(tmp_path / "s.parquet", model=vit, eval=str(tmp_path / "s.parquet"))
    for i in range(6):
        assert prepared.eval_dataset[i]["labels"] == i % 2
        assert torch.allclose(prepared.eval_dataset[i]["pixel_values"], torch.tensor(i * 20 / 127.5 - 1), atol=1e-3)
    rows["scan"] = [{"bytes": None, "path": None}, *images[1:]]
    Dataset.from_dict(rows, features=plain).to_parquet(tmp_path / "m.parquet")
    with pytest.raises(DataError, match=re.escape("m.parquet: no image in column scan in row 0 (counted from 0)")):
        ready(tmp_path / "m.parquet", model=vit)


def test_file_names_in_a_table_are_relative_to_it(photos, vit):
    lines = ["file,shade", *(f"{cls}/{i}.png,{cls}" for cls in ("dark", "light") for i in range(3))]
    (photos / "list.csv").write_text("\n".join(lines))
    prepared = ready(photos / "list.csv", model=vit, image="file", eval=str(photos / "list.csv"))
    assert prepared.label_names == ["dark", "light"]
    assert prepared.train_dataset[0]["pixel_values"].shape == (3, 16, 16)
    (photos / "wrong.csv").write_text("file,shade\nnone.png,dark\ndark/0.png,light\n")
    with pytest.raises(DataError, match=r"wrong.csv, row 0: '.*none.png' cannot be read as an image: .*No such file"):
        ready(photos / "wrong.csv", model=vit, image="file")


def test_the_fingerprint_is_of_the_files(photos, vit, tmp_path):
    one = ready(photos, model=vit, eval=str(photos)).fingerprint
    copy = photos.rename(tmp_path / "elsewhere")
    assert ready(copy, model=vit, eval=str(copy)).fingerprint == one
    (copy / "dark/0.png").write_bytes(png((21, 20, 20)))
    assert ready(copy, model=vit, eval=str(copy)).fingerprint != one


def test_a_model_without_an_image_processor(photos, bert):
    with pytest.raises(DataError, match="its image processor cannot be loaded") as error:
        ready(photos, model=bert)
    assert "\n" not in str(error.value)
