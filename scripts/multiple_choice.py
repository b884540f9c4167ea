"""Fine-tune, prune, distil and quantize a model that chooses among answers; start it with `accelerate launch` on any number of processes.

    accelerate launch scripts/multiple_choice.py --config configs/bert_swag.yaml data.train=mine.csv data.choices=[a,b,c] data.label=right

The data is a Hub dataset (data.name) or local csv, json or parquet files with a text, choices, and the number of the right one.
"""

from hfcompress.cli.scripts import run_task

if __name__ == "__main__":
    run_task("multiple-choice", description=__doc__)
