"""Fine-tune, prune, distil and quantize a classifier of sounds; start it with `accelerate launch` on any number of processes.

    accelerate launch scripts/audio_classification.py --config configs/wav2vec2_sounds.yaml data.train=path/to/folder

The data is a Hub dataset (data.name), a local folder with one folder of sounds a class, or json or parquet files with samples.
"""

from hfcompress.cli.scripts import run_task

if __name__ == "__main__":
    run_task("audio-classification", description=__doc__)
