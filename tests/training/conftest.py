"""Trainer collects garbage at the start of each run, which walks all of torch and transformers: they are set aside."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.families import make_model
from tests.training.scenarios import FAMILIES


@pytest.fixture(autouse=True, scope="session")
def nothing_old_to_collect() -> Iterator[None]:
    """Three quarters of the time of these tests went into looking at modules that stay anyway."""
    for family in FAMILIES:
        make_model(family)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
