from __future__ import annotations

import json

import pytest
from datasets import Dataset

from hfcompress.tasks import DataError
from hfcompress.tasks.corpus import read_corpus

ROWS = {"sentence": ["so good", "so bad", ""], "label": [1, 0, 1]}


def test_each_format(tmp_path):
    rows = Dataset.from_dict(ROWS)
    rows.to_csv(tmp_path / "a.csv", index=False)
    rows.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows.to_list()))
    (tmp_path / "a[1].txt").write_text("so good\nso bad\n\n")
    for name, empty in (("a.csv", None), ("a.parquet", ""), ("a.json", ""), ("a[1].txt", "")):
        corpus = read_corpus([str(tmp_path / name)])
        assert list(corpus) == ["so good", "so bad", empty], name
        assert list(corpus) == list(corpus) and len(corpus) == 3  # read again


def test_several_files_and_columns(tmp_path):
    Dataset.from_dict({"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": ["x", "y"]}).to_parquet(
        tmp_path / "pairs.parquet"
    )
    (tmp_path / "more-1.txt").write_text("e\n")
    (tmp_path / "more-2.txt").write_text("f\n")
    corpus = read_corpus([str(tmp_path / "pairs.parquet"), str(tmp_path / "more-*.txt")])
    assert list(corpus) == ["a", "b", "c", "d", "e", "f"] and len(corpus) == 6
    assert list(read_corpus([str(tmp_path / "pairs.parquet")], text=["label"])) == ["x", "y"]


def test_a_folder_with_splits_is_read_whole(tmp_path):
    for split, text in (("train", "a"), ("test", "b")):
        Dataset.from_dict({"text": [text] * 1500}).to_parquet(tmp_path / f"{split}.parquet")
    assert sorted(read_corpus([str(tmp_path)])) == ["a"] * 1500 + ["b"] * 1500


def test_errors_name_what_was_asked_for(tmp_path):
    Dataset.from_dict(ROWS | {"other": ["x", "y", "z"]}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "empty.txt").write_text("")
    for files, text, message in (
        ([], [], "--data: no files are given"),
        ([str(tmp_path / "no.csv")], [], "--data: .*no.csv' is neither a file nor a folder"),
        ([str(tmp_path / "empty.txt")], [], "--data: empty.txt has no rows"),
        ([str(tmp_path / "a.parquet")], ["sentense"], "'sentense' is not in the data; .* did you mean 'sentence'"),
        ([str(tmp_path / "a.parquet")], ["label"], "column 'label' holds int64, not text"),
    ):
        with pytest.raises(DataError, match=message):
            read_corpus(files, text=text, key="--data")
    assert list(read_corpus([str(tmp_path / "a.parquet")], text=["other"])) == ["x", "y", "z"]
