"""Fine-tune, prune, distil and quantize a tagger of words (named entities, parts of speech); start it with `accelerate launch` on any number of processes.

    accelerate launch scripts/token_classification.py --config configs/bert_conll2003.yaml data.train=mine.jsonl data.eval=test.jsonl

The data is a Hub dataset (data.name) or local json or parquet files with a column of lists of words and one of lists of tags.
"""

from hfcompress.cli.scripts import run_task

if __name__ == "__main__":
    run_task("token-classification", description=__doc__)
