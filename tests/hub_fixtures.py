"""Fixtures that point the Hugging Face client of this process, and of its subprocesses, at a `LocalHub`.

Register with `pytest_plugins = ["tests.hub_fixtures"]`.

`huggingface_hub` reads its environment once, when it is imported. `connect` reads it again: it loads the client's
`constants.py` a second time under the environment of `hub_env` and puts each value that came out differently wherever
the first one stands. So there is no list of constants here that could go stale. `datasets` keeps an endpoint of its
own, which stays as it is: load data sets from the hub in a subprocess.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Iterator, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download, hf_api

# Those that are not used here copy constants when they are first imported: during a test, they would keep its hub's.
from huggingface_hub.utils import _cache_assets, _cache_manager, _git_credential, _http  # noqa: F401

from hfcompress.hub import retries
from tests.local_hub import TOKEN, LocalHub


def hub_env(hub: LocalHub, *, token: str | None = TOKEN) -> dict[str, str]:
    """The environment variables with which a process has `hub` for its Hub and an empty cache.

    For a subprocess: `env={**os.environ, **hub_env(hub)}`.

    Args:
        hub: A hub that is being served.
        token: Whose client it is; None is nobody's.
    """
    home = hub.client_home
    own_host = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"]))
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": token or "",
        "HF_HOME": str(home),
        # The next three would win over HF_HOME, were they set.
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "HUGGINGFACE_CO_STAGING": "0",
        "NO_PROXY": own_host,
        "no_proxy": own_host,
    }


def _constants_of(environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The client's constants as a new process with this environment would have them."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("huggingface_hub._fresh_constants", constants.__file__)
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    return {name: value for name, value in vars(fresh).items() if name.isupper()}


def _loaded_client_modules() -> list[ModuleType]:
    return [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "huggingface_hub"]


def _forget_shared_clients() -> None:
    """Drop connections and shared `HfApi` objects that know the Hub of before; they are made anew when needed."""
    huggingface_hub.close_session()
    transformers_hub = sys.modules.get("transformers.utils.hub")
    if transformers_hub is not None:
        vars(transformers_hub)["_hf_api"] = None


def connect(hub: LocalHub, monkeypatch: pytest.MonkeyPatch, *, token: str | None = TOKEN) -> None:
    """Point this process's client at `hub`, until `monkeypatch` is undone."""
    fresh, modules = _constants_of(hub_env(hub, token=token), monkeypatch), _loaded_client_modules()
    for name, value in fresh.items():
        before = getattr(constants, name)
        if value == before:
            continue
        for module in modules:
            if name in vars(module) and vars(module)[name] == before:
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(hf_api.api, "_whoami_cache", {})
    _forget_shared_clients()


@pytest.fixture
def local_hub() -> Iterator[LocalHub]:
    """An empty hub that is this process's Hub for the length of one test, with `USER` signed in."""
    with LocalHub() as hub, pytest.MonkeyPatch.context() as monkeypatch:
        connect(hub, monkeypatch)
        yield hub
        _forget_shared_clients()
    assert hub.crashes == []


@pytest.fixture
def backoff_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Lets the client retry at once; the list collects the seconds it would have waited."""
    waits: list[float] = []
    impatient = SimpleNamespace(**{**vars(time), "sleep": waits.append})
    for module in (_http, file_download, retries):
        monkeypatch.setattr(module, "time", impatient)
    return waits
