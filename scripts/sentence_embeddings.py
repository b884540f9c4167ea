"""Prune, distil and quantize a model of sentence embeddings, on texts without labels; start it with `accelerate launch` on any number of processes.

    accelerate launch scripts/sentence_embeddings.py --config configs/minilm_sentences.yaml data.train=mine.txt

The data is a Hub dataset (data.name) or local txt (a text a line), csv, json or parquet files.
"""

from hfcompress.cli.scripts import run_task

if __name__ == "__main__":
    run_task("feature-extraction", description=__doc__)
