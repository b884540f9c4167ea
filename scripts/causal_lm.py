"""Fine-tune, prune, distil and quantize a language model; start it with `accelerate launch` on any number of processes.

    accelerate launch scripts/causal_lm.py --config configs/smollm_wikitext.yaml data.train=mine.txt

The data is a Hub dataset (data.name) or local txt, csv, json or parquet files: plain text, prompts with completions, or chats.
"""

from hfcompress.cli.scripts import run_task

if __name__ == "__main__":
    run_task("text-generation", description=__doc__)
