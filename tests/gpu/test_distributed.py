"""The jobs of `tests/training/test_distributed.py` and `test_sharded.py` on two GPUs (nccl)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import hfcompress
from tests.training import test_sharded
from tests.training.launching import launched, read_facts
from tests.training.scenarios import vector
from tests.training.test_distributed import COMPARED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
# Sums on a GPU run in another order.
TOLERANCE = 1e-4


@pytest.fixture(scope="session", params=test_sharded.STRATEGIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    cache = test_sharded.make_cache(tmp_path_factory.mktemp("cache") / "cache")
    jobs = test_sharded.jobs_of(request.param, cache)
    return launched(tmp_path_factory, f"{request.param} on GPUs", jobs, config=request.param, gpu=True)


@pytest.mark.parametrize("job", test_sharded.COMPARED)
def test_sharded_is_as_one_process(folder: Path, job: str) -> None:
    if not (folder / job).exists():
        pytest.skip("left out under this strategy")
    test_sharded.check_against_one(folder, job, tolerance=TOLERANCE)


def test_resuming_under_shards(folder: Path) -> None:
    whole = vector(hfcompress.load(folder / "saved" / "final"))
    for job in ("resumed", "resumed-late"):
        torch.testing.assert_close(
            vector(hfcompress.load(folder / job / "final")), whole, rtol=TOLERANCE, atol=TOLERANCE
        )


def test_plain_data_parallelism(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = launched(tmp_path_factory, "ddp on GPUs", COMPARED, gpu=True)
    for job in COMPARED:
        found = read_facts(folder, job)
        assert found["world"] == 2 and found["same_weights"] and found["same_digests"]
