"""Fine-tune, prune, distil and quantize a model that finds answers in a text; start it with `accelerate launch` on any number of processes.

    accelerate launch scripts/question_answering.py --config configs/bert_squad.yaml data.train=mine.json data.eval=test.json

The data is a Hub dataset (data.name) or local json or parquet files with question, context and answers, as in SQuAD.
"""

from hfcompress.cli.scripts import run_task

if __name__ == "__main__":
    run_task("question-answering", description=__doc__)
