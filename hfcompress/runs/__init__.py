"""Runs: a recipe from beginning to end."""

from hfcompress.runs.pipeline import Run, run_recipe
from hfcompress.runs.table import format_rows

__all__ = ["Run", "format_rows", "run_recipe"]
