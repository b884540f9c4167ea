"""Fine-tune, prune, distil and quantize an image classifier; start it with `accelerate launch` on any number of processes.

    accelerate launch scripts/image_classification.py --config configs/vit_images.yaml data.train=path/to/folder

The data is a Hub dataset (data.name), a local image folder with one folder a class, or parquet files with an image column.
"""

from hfcompress.cli.scripts import run_task

if __name__ == "__main__":
    run_task("image-classification", description=__doc__)
