from __future__ import annotations

import json
import re

import datasets
import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, DatasetDict

from hfcompress.config import DataConfig
from hfcompress.tasks import DataError, load_data
from hfcompress.tasks.splits import hold_out, take

TEXT = "text-classification"
ROWS = {"phrase": ["one", "two", "three", "four"], "kind": ["a", "b", "a", "b"]}


def write(path, rows=ROWS):
    rows = Dataset.from_dict(rows)
    if path.suffix == ".parquet":
        rows.to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows.to_list()))
    elif path.suffix in (".jsonl", ".ndjson"):
        path.write_text("\n".join(json.dumps(row) for row in rows.to_list()))
    else:
        rows.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)
    return str(path)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "ndjson", "parquet"])
def test_each_file_format_reads_the_same(tmp_path, suffix):
    data = load_data(
        DataConfig(train=write(tmp_path / f"t[1].{suffix}"), eval=write(tmp_path / f"e.{suffix}")), task=TEXT, seed=0
    )
    assert data["train"].to_dict() == ROWS
    assert data["eval"].to_dict() == ROWS


def test_csv_keeps_words_that_pandas_takes_for_missing_values_and_finds_the_separator(tmp_path):
    file = tmp_path / "excel.csv"
    file.write_bytes('\ufeffphrase;kind\nNA;None\nnull;x\n"a;b";None\nhä;x\n'.encode())
    data = load_data(DataConfig(train=str(file), eval=str(file)), task=TEXT, seed=0)
    assert data["train"].to_dict() == {"phrase": ["NA", "null", "a;b", "hä"], "kind": ["None", "x", "None", "x"]}


def test_quotation_marks_of_a_tsv_that_does_not_quote(tmp_path):
    (tmp_path / "t.tsv").write_text('phrase\tkind\n"good\ta\nbad\tb\nso "so"\ta\n"what\tb\n')
    (tmp_path / "q.tsv").write_text('phrase\tkind\n"a ""b"""\tx\nc\ty\n')
    config = DataConfig(train=str(tmp_path / "t.tsv"), eval=str(tmp_path / "q.tsv"))
    data = load_data(config, task=TEXT, seed=0)
    assert data["train"]["phrase"][:] == ['"good', "bad", 'so "so"', '"what']
    assert data["eval"]["phrase"][:] == ['a "b"', "c"]


def test_several_files_by_pattern_and_a_folder_of_files(tmp_path):
    for i in range(3):
        write(tmp_path / f"train-{i:05d}-of-00003.parquet")
    write(tmp_path / "validation-00000-of-00001.parquet", {"phrase": ["five"], "kind": ["a"]})
    (tmp_path / "README.md").write_text("about")
    by_pattern = load_data(DataConfig(train=str(tmp_path / "train-*.parquet")), task=TEXT, seed=0)
    assert by_pattern.num_rows == {"train": 11, "eval": 1}
    for config in (
        DataConfig(train=str(tmp_path)),
        DataConfig(name=str(tmp_path)),
        DataConfig(name=str(tmp_path), train="train"),
    ):
        assert load_data(config, task=TEXT, seed=0).num_rows == {"train": 12, "eval": 1}
    swapped = load_data(DataConfig(name=str(tmp_path), train="validation", eval="train"), task=TEXT, seed=0)
    assert swapped.num_rows == {"train": 1, "eval": 12}


def test_folders_whose_file_names_only_contain_or_lack_the_split(tmp_path):
    write(tmp_path / "sst2_train.csv")
    write(tmp_path / "sst2_dev.csv", {"phrase": ["five"], "kind": ["a"]})
    assert load_data(DataConfig(train=str(tmp_path)), task=TEXT, seed=0).num_rows == {"train": 4, "eval": 1}
    write(tmp_path / "extra.csv")
    with pytest.raises(DataError, match=r"cannot tell which split extra.csv in .* belongs to"):
        load_data(DataConfig(train=str(tmp_path)), task=TEXT, seed=0)
    (tmp_path / "plain").mkdir()
    write(tmp_path / "plain/one.csv")
    write(tmp_path / "plain/two.csv")
    assert load_data(DataConfig(train=str(tmp_path / "plain")), task=TEXT, seed=0).num_rows == {"train": 7, "eval": 1}


def test_saved_data_sets(tmp_path):
    rows = Dataset.from_dict(ROWS)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "test": rows.select([0, 1])}).save_to_disk(tmp_path / "two")
    one = load_data(DataConfig(train=str(tmp_path / "one"), eval=str(tmp_path / "one")), task=TEXT, seed=0)
    two = load_data(DataConfig(train=str(tmp_path / "two")), task=TEXT, seed=0)
    assert one.num_rows == {"train": 4, "eval": 4}
    assert two.num_rows == {"train": 4, "eval": 2}


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hub with one data set."""
    calls = []
    rows = Dataset.from_dict({"sentence": list("abcdef"), "label": [0, 1, 0, 1, 0, 1]})
    splits = DatasetDict({"train": rows, "validation": rows.select(range(4)), "test": rows.select(range(2))})

    real = datasets.load_dataset

    def load_dataset(name, config=None, split=None, **options):
        if name == "json":
            return real(name, **options)
        calls.append((name, config, split))
        if name != "user/films":
            raise ConnectionError("Couldn't reach it\nmore")
        return splits if split is None else rows.select(range(5))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, {"train": 6, "eval": 4}),
        ({"eval": "test"}, {"train": 6, "eval": 2}),
        ({"train": "validation"}, {"train": 4, "eval": 2}),
        ({"train": "train[:80%]", "eval": "validation"}, {"train": 5, "eval": 4}),
    ],
)
def test_splits_of_a_hub_data_set(hub, options, sizes):
    data = load_data(DataConfig(name="user/films", config="small", **options), task=TEXT, seed=0)
    assert data.num_rows == sizes
    assert {call[:2] for call in hub} == {("user/films", "small")}


def test_hub_training_data_with_a_local_file_to_evaluate_on(hub, tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('{"sentence": "x", "label": 1}\n')
    assert load_data(DataConfig(name="user/films", eval=str(file)), task=TEXT, seed=0).num_rows["eval"] == 1


def test_hub_errors_are_one_line(hub):
    with pytest.raises(DataError, match=r"'validaton' is not in the data; .* did you mean 'validation'"):
        load_data(DataConfig(name="user/films", eval="validaton"), task=TEXT, seed=0)
    with pytest.raises(DataError, match=r"data.name: 'user/none' cannot be loaded: Couldn't reach it; check") as error:
        load_data(DataConfig(name="user/none"), task=TEXT, seed=0)
    assert "\n" not in str(error.value)


def _broken_files(folder):
    (folder / "quote.csv").write_text('phrase,kind\n"a,b\n')
    (folder / "empty.csv").write_text("")
    (folder / "header.csv").write_text("phrase,kind\n")
    (folder / "latin.csv").write_bytes("phräse,kind\n".encode("latin-1"))
    (folder / "cut.json").write_text('[{"phrase": 3')
    (folder / "cut.parquet").write_text("no")
    (folder / "notes.docx").write_text("no")
    (folder / "mixed").mkdir()
    write(folder / "mixed/a.csv")
    write(folder / "mixed/b.parquet")
    (folder / "nothing").mkdir()
    (folder / "saved").mkdir()
    (folder / "saved/dataset_dict.json").write_text("{")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.csv", "data.train: '.*none.csv' is neither a file nor a folder"),
        ("quote.csv", "data.train: quote.csv cannot be read: .*EOF inside string"),
        ("empty.csv", "data.train: empty.csv has no rows"),
        ("header.csv", "header.csv has no rows"),
        ("latin.csv", "latin.csv is not in UTF-8"),
        ("cut.json", "data.train: cut.json cannot be read: "),
        ("cut.parquet", "data.train: cut.parquet cannot be read: Parquet file size"),
        ("notes.docx", r"files end in .docx; give one kind of .csv, .tsv"),
        ("mixed", r"files end in .csv, .parquet; give one kind"),
        ("nothing", "holds no .csv"),
        ("saved", "data.train: '.*saved' cannot be read: "),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, name, message):
    _broken_files(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        load_data(DataConfig(train=str(tmp_path / name)), task=TEXT, seed=0)
    assert "\n" not in str(error.value)


def test_wrong_split_of_a_local_folder(tmp_path):
    write(tmp_path / "alpha_train.csv")
    write(tmp_path / "test.csv")
    with pytest.raises(
        DataError, match=r"data.train: split 'trian' is not in the data; there are: train, test; did you mean"
    ):
        load_data(DataConfig(name=str(tmp_path), train="trian"), task=TEXT, seed=0)
    with pytest.raises(DataError, match=r"data.eval: split 'nope' is not in the data"):
        load_data(DataConfig(name=str(tmp_path), eval="nope"), task=TEXT, seed=0)


def test_evaluating_on_the_training_data_is_said(tmp_path, caplog):
    file = write(tmp_path / "a.csv")
    load_data(DataConfig(train=file, eval=file), task=TEXT, seed=0)
    assert "data.eval is the training data" in caplog.text


def save_image(path, color=(200, 10, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new(mode, (9, 7), color).save(path)


def test_class_folders_with_names_that_sound_like_splits(tmp_path):
    for cls in ("car", "test_tube", "train"):
        for i in range(4):
            save_image(tmp_path / cls / f"validation_{i}.png")
    (tmp_path / "car/.hidden.png").write_text("no image")
    (tmp_path / "car/notes.txt").write_text("no image")
    data = load_data(DataConfig(train=str(tmp_path), holdout=0.25), task="image-classification", seed=0)
    assert data["train"].features["label"].names == ["car", "test_tube", "train"]
    assert data.num_rows == {"train": 9, "eval": 3}
    assert sorted(data["eval"]["label"]) == [0, 1, 2]


def test_image_folder_with_splits_and_nested_folders(tmp_path):
    for split, cls in (("Train", "cat/old"), ("Train", "dog"), ("test", "dog")):
        save_image(tmp_path / split / cls / "1.jpg")
    data = load_data(DataConfig(train=str(tmp_path)), task="image-classification", seed=0)
    assert data["train"].features["label"].names == ["cat", "dog"]
    assert data.num_rows == {"train": 2, "eval": 1}
    assert data["train"][0]["image"].size == (9, 7)


def test_image_folder_with_metadata(tmp_path):
    for i in range(4):
        save_image(tmp_path / f"{i}.png")
    lines = ["file_name,kind", *(f"{i}.png,{'ab'[i % 2]}" for i in range(4))]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    data = load_data(DataConfig(train=str(tmp_path), holdout=0.5), task="image-classification", seed=0)
    assert sorted(data["eval"]["kind"]) == ["a", "b"]


def test_images_outside_class_folders_are_an_error(tmp_path):
    save_image(tmp_path / "cat/1.png")
    save_image(tmp_path / "2.png")
    with pytest.raises(DataError, match=r"2.png' lies in no class folder \(1 such\); images are expected"):
        load_data(DataConfig(train=str(tmp_path)), task="image-classification", seed=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_hold_out_is_stratified_and_exhaustive(seed):
    classes = ["a"] * 60 + ["b"] * 30 + ["c"] * 9 + ["d"]
    train, held = hold_out(100, share=0.2, seed=seed, classes=classes)
    assert sorted([*train, *held]) == list(range(100))
    # By hand: 20 of 100 are 12 : 6 : 1.8 : 0.2, and d has only one, which is trained on.
    assert [sum(classes[i] == c for i in held) for c in "abcd"] == [12, 6, 2, 0]
    again = hold_out(100, share=0.2, seed=seed, classes=classes)[1]
    other = hold_out(100, share=0.2, seed=seed + 1, classes=classes)[1]
    assert np.array_equal(held, again)
    assert not np.array_equal(held, other)


def test_hold_out_at_its_limits():
    assert [len(part) for part in hold_out(2, share=0.01, seed=0)] == [1, 1]
    assert [len(part) for part in hold_out(10, share=0.99, seed=0)] == [1, 9]
    assert [len(part) for part in hold_out(10, share=0.99, seed=0, classes=list("aaaaabbbbb"))] == [2, 8]
    with pytest.raises(DataError, match="1 row is too few"):
        hold_out(1, share=0.5, seed=0)
    with pytest.raises(DataError, match="every class has a single row"):
        hold_out(3, share=0.5, seed=0, classes=["a", "b", "c"])


def test_limits_take_random_rows_by_seed(tmp_path):
    file = write(tmp_path / "n.csv", {"phrase": [f"p{i}" for i in range(200)], "kind": ["a", "b"] * 100})
    config = DataConfig(train=file, max_train=30, max_eval=5)
    first, again = (load_data(config, task=TEXT, seed=3) for _ in range(2))
    other = load_data(config, task=TEXT, seed=4)
    assert first.num_rows == {"train": 30, "eval": 5}
    assert first["train"].to_dict() == again["train"].to_dict()
    assert first["train"].to_dict() != other["train"].to_dict()
    assert not set(first["train"]["phrase"]) & set(first["eval"]["phrase"])
    assert first["train"]["phrase"][:30] != [f"p{i}" for i in range(30)]
    assert len(set(take(1000, limit=400, seed=0, stream=1))) == 400


def test_errors_name_the_key(tmp_path):
    with pytest.raises(DataError, match=re.escape("data.eval: 'no/file.csv' is neither a file nor a folder")):
        load_data(DataConfig(train=write(tmp_path / "a.csv"), eval="no/file.csv"), task=TEXT, seed=0)
