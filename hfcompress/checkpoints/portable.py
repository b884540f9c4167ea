"""What a saved folder says so that others can load it: the config, and a modelling file that stands alone."""

from __future__ import annotations

import copy
import inspect
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfcompress.anatomy import Site, StructureError, family_of, find_sites, sites, uniform_config
from hfcompress.anatomy.sites import linear_features
from hfcompress.checkpoints import hooks
from hfcompress.checkpoints.record import read_units

logger = logging.getLogger(__name__)

MODELING_FILE = "modeling_hfcompress.py"
_AUTO_CLASSES = tuple(name for name in dir(transformers) if name.startswith("AutoModel") and "Backbone" not in name)


def portable_config(model: nn.Module) -> Any:
    """A copy of a model's config as it should be saved.

    * Where the plain config of the architecture can say the shapes, it does, and transformers alone loads the folder.
    * Elsewhere it holds the record, points to the modelling file, and repeats the shapes in transformers' own
      `per_layer_config` if a model built from that is the same.

    Args:
        model: The model to be saved; left as it is.

    Returns:
        The config for `config.json`.
    """
    config = copy.deepcopy(model.config)
    _forget_per_layer(config)
    if not read_units(config):
        return config
    native = plain_config(model)
    if native is not None:
        return native
    config.auto_map = _auto_map(model)
    per_layer = _per_layer_config(model)
    if per_layer is not None:
        trial = copy.deepcopy(config)
        if _set_per_layer(trial, per_layer) and _builds(type(model), trial, model):
            return trial
    return config


def plain_config(model: nn.Module) -> Any | None:
    """A config without structure from which transformers alone builds the model's shapes, or None if there is none.

    What the config can say is tried and compared, not assumed: a model is built from it without memory (on the meta
    device) and has to have the same parameters.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from hfcompress.pruning import Plan, cut
        >>> model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64))
        >>> half = tuple(range(32))
        >>> _ = cut(model, Plan({"encoder.0.neurons": half, "encoder.1.neurons": half}))
        >>> plain_config(model).intermediate_size
        32
        >>> _ = cut(model, Plan({"encoder.1.heads": (0, 1)}))
        >>> plain_config(model) is None
        True
    """
    found = find_sites(model)
    heads = [site for site in found if site.kind == "heads"]
    neurons = [site for site in found if site.kind == "neurons"]
    if len({(site.units, site.query_heads, site.width) for site in heads}) != 1 or len({s.units for s in neurons}) != 1:
        return None
    config = copy.deepcopy(model.config)
    _forget_per_layer(config)
    config.__dict__.pop("auto_map", None)
    config.hfcompress = {key: value for key, value in (config.hfcompress or {}).items() if key != "units"}
    units = (heads[0].units, neurons[0].units)
    config = uniform_config(config, family_of(model), heads=heads[0], neurons=neurons[0], units=units)
    if config is None:
        return None
    return config if _builds(type(model), config, model) else None


def _builds(cls: type, config: Any, model: nn.Module) -> bool:
    """Whether a config builds a model with the same parameters as the given one."""
    try:
        restored = type(config).from_dict(config.to_dict())
        with torch.device("meta"):
            other = cls._from_config(restored)  # type: ignore[attr-defined]
    except (ValueError, TypeError, RuntimeError, AttributeError, ZeroDivisionError) as error:
        # Whatever transformers raises here (its own error for ambiguous fields is a RuntimeError), the answer is no.
        logger.debug("%s cannot be built from this config: %s", cls.__name__, error)
        return False
    return _shapes(other) == _shapes(model) and _layout(find_sites(other)) == _layout(find_sites(model))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Logical shape of every linear layer and of every other parameter; quantized weights hide theirs."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D) or (hasattr(module, "in_features") and hasattr(module, "out_features")):
            shapes[name] = linear_features(module)
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            shapes[f"{name}.{parameter_name}"] = tuple(parameter.shape)
    return shapes


def _layout(found: list[Site]) -> list[tuple[str, int, int, int]]:
    return [(site.name, site.units, site.query_heads, site.width) for site in found]


def _forget_per_layer(config: Any) -> None:
    """Drop per-layer settings that an earlier save left; they are computed anew."""
    if getattr(config, "is_heterogeneous", False):
        config.per_layer_config = None
    config.__dict__.pop("allow_global_per_layer_attribute_access", None)


def _per_layer_config(model: nn.Module) -> dict[int, dict[str, int]] | None:
    """Heads and widths in transformers' `per_layer_config` schema; None where the schema has no word for them."""
    family, found = family_of(model), find_sites(model)
    names = getattr(model.config, "attribute_map", {})
    if len(family.stacks) > 1 or family.width_key is None or family.width_per_hidden or any(not s.units for s in found):
        return None
    per_layer: dict[int, dict[str, int]] = {}
    for site in found:
        layer = per_layer.setdefault(site.layer, {})
        if site.kind == "neurons":
            layer[names.get(family.width_key, family.width_key)] = site.units
            continue
        layer[names.get(family.heads_key, family.heads_key)] = site.units * site.query_heads
        if family.kv_heads_key is not None:
            layer[family.kv_heads_key] = site.units
    return per_layer


def _set_per_layer(config: Any, per_layer: dict[int, dict[str, int]]) -> bool:
    if not hasattr(type(config), "per_layer_config"):
        return False
    config.allow_global_per_layer_attribute_access = True
    try:
        config.per_layer_config = per_layer
    except (ValueError, TypeError, AttributeError) as error:
        logger.debug("per_layer_config is not safe here: %s", error)
        return False
    return True


def _auto_map(model: nn.Module) -> dict[str, str]:
    """For each Auto class that covers the model's class, the class of the modelling file."""
    model_type, names = model.config.model_type, {"AutoModel": type(_base(model)).__name__}
    for auto in _AUTO_CLASSES:
        mapping = getattr(getattr(transformers, auto), "_model_mapping", None)
        covered = getattr(mapping, "_model_mapping", {}).get(model_type, ())
        covered = (covered,) if isinstance(covered, str) else covered
        if type(model).__name__ in covered:
            names[auto] = type(model).__name__
    module = Path(MODELING_FILE).stem
    return {auto: f"{module}.{name}" for auto, name in names.items()}


def _base(model: nn.Module) -> nn.Module:
    return getattr(model, "base_model", model)


def write_modeling_file(model: nn.Module, config: Any, folder: str | Path) -> None:
    """Write the modelling file that `config.auto_map` names, if it names ours, or remove one that is no longer needed."""
    path = Path(folder) / MODELING_FILE
    targets = set((getattr(config, "auto_map", None) or {}).values())
    if not any(target.startswith(path.stem + ".") for target in targets):
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(modeling_source(model), encoding="utf-8")


def modeling_source(model: nn.Module) -> str:
    """Source of a Python module that builds the recorded shapes with transformers and torch alone.

    It holds a copy of `hfcompress/anatomy/sites.py`, the family of the model, and one class per stock class, with the same
    name, so that pipelines recognise it.
    """
    source = inspect.getsource(sites)
    _, _, body = source.partition("from __future__ import annotations\n")
    if not body or "hfcompress." in "".join(line for line in body.splitlines() if line.startswith(("import", "from"))):
        raise StructureError("hfcompress/anatomy/sites.py must not import from hfcompress: it travels with checkpoints")
    names = sorted({type(model).__name__, type(_base(model)).__name__})
    classes = "\n\n".join(_CLASS.format(name=name) for name in names)
    four_bits = getattr(model, "is_loaded_in_4bit", False)
    guard = _GUARD.format(patch=inspect.getsource(hooks.patch_bitsandbytes)) if four_bits else ""
    return _HEADER + guard + body + f"\n\nFAMILY = {family_of(model)!r}\n\n\n" + classes


_HEADER = '''"""Builds the pruned model in this folder without hfcompress; used with trust_remote_code=True.

With hfcompress installed, `import hfcompress` does the same and no remote code is needed.
Written by hfcompress (Apache-2.0).
"""

from __future__ import annotations

import transformers
'''

_GUARD = """
# bitsandbytes 0.50 repacks 4-bit weights in place on some CPUs, which fails for the widths of pruned layers, and reads
# weights of such widths wrong on more.
{patch}

try:
    import bitsandbytes.nn.modules as _modules

    patch_bitsandbytes(_modules)
except ImportError:
    pass
"""

_CLASS = '''class {name}(transformers.{name}):
    """The stock class with the shapes that config.hfcompress records."""

    def post_init(self) -> None:
        """Cut the freshly built modules to size before the weights are loaded."""
        apply_record(self, FAMILY, self.config.hfcompress)
        super().post_init()
'''

__all__ = ["MODELING_FILE", "modeling_source", "plain_config", "portable_config", "write_modeling_file"]
