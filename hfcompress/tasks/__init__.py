"""Tasks: from a data set on the Hub or on disk to what a Trainer takes. One entry of `TASKS` per task."""

from hfcompress.tasks.columns import Columns
from hfcompress.tasks.errors import DataError
from hfcompress.tasks.preparation import TASKS, PreparedTask, TaskSpec, find_columns, load_data, prepare
from hfcompress.tasks.scores import load_metric

__all__ = [
    "TASKS",
    "Columns",
    "DataError",
    "PreparedTask",
    "TaskSpec",
    "find_columns",
    "load_data",
    "load_metric",
    "prepare",
]
