"""Fine-tune, prune, distil and quantize a model that writes a text for a text (summaries, translations); start it with `accelerate launch` on any number of processes.

    accelerate launch scripts/seq2seq.py --config configs/t5_xsum.yaml data.train=mine.csv data.text=article data.label=summary

The data is a Hub dataset (data.name) or local csv, json or parquet files with a source and a target, or with translations.
"""

from hfcompress.cli.scripts import run_task

if __name__ == "__main__":
    run_task("text2text-generation", description=__doc__)
