"""Fine-tune, prune, distil and quantize a text classifier; start it with `accelerate launch` on any number of processes.

    accelerate launch scripts/text_classification.py --config configs/bert_sst2.yaml
    accelerate launch scripts/text_classification.py --config configs/bert_sst2.yaml data.train=mine.csv data.text=review

The data is a Hub dataset (data.name) or local csv, json or parquet files (data.train, data.eval), with any column names.
"""

from hfcompress.cli.scripts import run_task

if __name__ == "__main__":
    run_task("text-classification", description=__doc__)
