"""What a saved folder says so that others can load it: the config, and a modelling file that stands alone."""

from __future__ import annotations

import copy
import inspect
import logging
import re
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfcompress.anatomy import Site, StructureError, family_of, find_sites, sites, stream, uniform_config
from hfcompress.anatomy.native import forget_per_layer
from hfcompress.anatomy.sites import find_stacks, linear_features
from hfcompress.checkpoints import hooks
from hfcompress.checkpoints.record import needs_building, read_hidden

logger = logging.getLogger(__name__)

MODELING_FILE = "modeling_hfcompress.py"
_AUTO_CLASSES = tuple(name for name in dir(transformers) if name.startswith("AutoModel") and "Backbone" not in name)

_ANSWERS: weakref.WeakKeyDictionary[nn.Module, list[tuple[Any, bool]]] = weakref.WeakKeyDictionary()


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
    forget_per_layer(config)
    if not needs_building(config):
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
    device) and has to have the same parameters, and, with a hidden width of its own, the same constants.

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
    config = copy.deepcopy(model.config)
    forget_per_layer(config)
    config.__dict__.pop("auto_map", None)
    hidden = read_hidden(config)
    config.hfcompress = {
        key: value for key, value in (config.hfcompress or {}).items() if key not in ("units", "hidden")
    }
    if hidden is not None:
        try:
            stream.widen(config, hidden[0])
        except StrictDataclassError:
            return None  # such as a width that the heads do not divide
    config = uniform_config(config, family_of(model), find_sites(model))
    if config is None:
        return None
    return config if _builds(type(model), config, model, constants=hidden is not None) else None


def _builds(cls: type, config: Any, model: nn.Module, *, constants: bool = False) -> bool:
    """Whether a config builds a model with the same parameters as the given one, and if asked the same constants.

    Checkpoints of a run ask the same again and again, and building takes longer than writing a small model.
    """
    asked = (cls, config.to_dict(), _shapes(model), _layout(find_sites(model)), constants)
    known = _ANSWERS.setdefault(model, [])
    answer = next((answer for question, answer in known if question == asked), None)
    if answer is None:
        answer = _try_to_build(cls, config, model, constants=constants)
        known[:] = [*known[-1:], (asked, answer)]  # of one config of each kind
    return answer


def _try_to_build(cls: type, config: Any, model: nn.Module, *, constants: bool) -> bool:
    try:
        restored = type(config).from_dict(config.to_dict())
        with torch.device("meta"):
            other = cls._from_config(restored)  # type: ignore[attr-defined]
    except (ValueError, TypeError, RuntimeError, AttributeError, ZeroDivisionError) as error:
        # Whatever transformers raises here (its own error for ambiguous fields is a RuntimeError), the answer is no.
        logger.debug("%s cannot be built from this config: %s", cls.__name__, error)
        return False
    if _shapes(other) != _shapes(model) or _layout(find_sites(other)) != _layout(find_sites(model)):
        return False
    return not constants or _constants(other) == _constants(model)


def _constants(model: nn.Module) -> dict[str, Any]:
    """Every number that the code of a module reads when it runs, and the hidden width where it reads that in the config.

    Some architectures scale by the hidden width, as Gemma its embeddings: a smaller width in the config would change that.
    """
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        names = _names_read(type(module))
        for name, value in vars(module).items():
            if name in names and isinstance(value, int | float) and name != "training":
                found[f"{path}.{name}"] = value
        for name, tensor in module.named_buffers(recurse=False):
            scalar = getattr(module, f"scalar_{name}", None)
            found[f"{path}.{name}"] = tuple(tensor.shape), scalar
        if "config" in names and "hidden_size" in names:
            found[f"{path}.config.hidden_size"] = model.config.hidden_size
    return found


def _names_read(cls: type) -> set[str]:
    """Every attribute name in the code of an architecture's class, but for the code that builds and initialises."""
    names: set[str] = set()
    for base in cls.__mro__:
        if not base.__module__.startswith("transformers.models."):
            continue
        for name, function in vars(base).items():
            code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            if code is not None and name not in ("__init__", "_init_weights", "extra_repr"):
                names |= set(code.co_names)
    return names


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


def _per_layer_config(model: nn.Module) -> dict[int, dict[str, int]] | None:
    """Heads and widths in transformers' `per_layer_config` schema; None where the schema has no word for them."""
    family, found = family_of(model), find_sites(model)
    names = getattr(model.config, "attribute_map", {})
    stacks = find_stacks(model, family) or []
    if len(family.stacks) > 1 or len(stacks) > 1 or family.width_key is None or family.width_per_hidden:
        return None
    # A layer that is used several times, or decides for others, has no number of its own in the schema.
    if len(stacks[0][2]) != model.config.num_hidden_layers or any(not s.units or s.layer is None for s in found):  # type: ignore[union-attr]
        return None
    per_layer: dict[int, dict[str, int]] = {}
    for site in found:
        assert site.layer is not None
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
    model_type, names = model.config.model_type, {"AutoModel": bare_class(model)}
    for auto in _AUTO_CLASSES:
        mapping = getattr(getattr(transformers, auto), "_model_mapping", None)
        covered = getattr(mapping, "_model_mapping", {}).get(model_type, ())
        covered = (covered,) if isinstance(covered, str) else covered
        if type(model).__name__ in covered:
            names[auto] = type(model).__name__
    module = Path(MODELING_FILE).stem
    return {auto: f"{module}.{name}" for auto, name in names.items()}


def bare_class(model: nn.Module) -> str:
    """Name of the class without a head on top, as `AutoModel` knows it."""
    known: Any = transformers.AutoModel._model_mapping._model_mapping.get(model.config.model_type)  # type: ignore[attr-defined, union-attr]
    known = known[0] if isinstance(known, list | tuple) else known
    return known or type(model).__name__


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

    It holds a copy of `hfcompress/anatomy/sites.py` (and of `stream.py` if hidden features were cut), the family of the
    model, and one class per stock class, with the same name, so that pipelines recognise it.
    """
    has_hidden = read_hidden(model.config) is not None
    body = "\n".join(_standing_alone(module) for module in ((sites, stream) if has_hidden else (sites,)))
    names = sorted({type(model).__name__, bare_class(model)})
    classes = "\n\n".join((_CLASS_HIDDEN if has_hidden else _CLASS).format(name=name) for name in names)
    four_bits = getattr(model, "is_loaded_in_4bit", False)
    guard = _GUARD.format(patch=inspect.getsource(hooks.patch_bitsandbytes)) if four_bits else ""
    return _HEADER + guard + body + f"\n\nFAMILY = {family_of(model)!r}\n\n\n" + classes


def _standing_alone(module: ModuleType) -> str:
    """The source of a module below its docstring, without what it imports from `sites.py`, which comes before it."""
    _, _, body = inspect.getsource(module).partition("from __future__ import annotations\n")
    body = re.sub(r"^from hfcompress\.anatomy\.sites import (\([^)]*\)|[^(\n]*)\n", "", body, flags=re.MULTILINE)
    if not body or "hfcompress." in "".join(line for line in body.splitlines() if line.startswith(("import", "from"))):
        raise StructureError(f"{module.__name__} must not import from hfcompress: it travels with checkpoints")
    return body


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

    @classmethod
    def is_custom_code(cls) -> bool:
        """The names of the weights in the file are those of the stock class, so its conversions apply."""
        return False

    def post_init(self) -> None:
        """Cut the freshly built modules to size before the weights are loaded."""
        apply_record(self, FAMILY, self.config.hfcompress)
        super().post_init()
'''
_CLASS_HIDDEN = _CLASS.replace(
    "        super()", "        apply_hidden(self, FAMILY, self.config.hfcompress)\n        super()"
)

__all__ = ["MODELING_FILE", "modeling_source", "plain_config", "portable_config", "write_modeling_file"]
