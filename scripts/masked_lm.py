"""Prune, distil and quantize a masked language model; start it with `accelerate launch` on any number of processes.

    accelerate launch scripts/masked_lm.py --config configs/bert_wikitext.yaml data.train=mine.txt

The data is a Hub dataset (data.name) or local txt (a text a line), csv, json or parquet files.
"""

from hfcompress.cli.scripts import run_task

if __name__ == "__main__":
    run_task("fill-mask", description=__doc__)
