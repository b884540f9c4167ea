"""Recipes: what is allowed is read, everything else is one line that says where, what and what instead."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from hfcompress.config import (
    DataConfig,
    DistillConfig,
    HiddenTerm,
    ModelConfig,
    PruneConfig,
    Recipe,
    RecipeError,
    ScheduleConfig,
    TeacherConfig,
)

DATA = {"train": "x.csv"}


def refusal(values, **kwargs):
    """The message of a recipe that is not allowed."""
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(values, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 600
    return message


def at(path, value):
    """Nested mappings with a value at a dotted path."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def test_the_defaults():
    recipe = Recipe.from_dict({})
    assert recipe == Recipe() and recipe.prune is None and recipe.seed == 42
    prune = Recipe.from_dict({"prune": {}}).prune
    assert prune == PruneConfig()
    assert (prune.target.quantity, prune.target.goals, prune.schedule.power) == ("sparsity", [0.5], 3.0)
    assert (prune.criterion.name, prune.criterion.samples, prune.repair, prune.cut) == ("obs", 512, None, "gradual")
    assert (prune.multiple_of.heads, prune.multiple_of.neurons) == (1, "auto")
    assert (prune.at_least.heads, prune.at_least.neurons) == (1, 8)


def test_a_whole_recipe_goes_to_yaml_and_back(tmp_path):
    values = {
        "task": "text-classification",
        "model": {"name": "somebody/model", "revision": "main"},
        "teacher": {"name": None, "train": {"learning_rate": 1e-4}},
        "student": {"layers": {"encoder": 6, "decoder": 3}, "initialize": "random"},
        "data": {"name": "glue", "config": "sst2", "text": ["premise", "hypothesis"], "max_train": 100},
        "distill": {"hidden": {"weight": 1.0, "layers": [[0, 1], [2, 5]]}, "logits": {"temperature": 4}},
        "prune": {"target": {"sparsity": 0}, "units": ["neurons"], "multiple_of": {"neurons": 64}, "uniform": True},
        "qat": None,  # its result is quantized already
        "quantize": {"presets": ["nf4", "int8"], "skip": ["classifier"]},
        "train": {"num_train_epochs": 1, "bf16": True},
        "measure": {"threads": 1},
        "contract": {"max_drop": 1.0, "min_speedup": 1.8, "max_mb": 60.0},
        "push": {"repo": "me/model"},
        "output": "runs/one",
        "seed": 2**32 - 1,
    }
    recipe = Recipe.from_dict(values)
    assert set(values) == set(Recipe.model_fields), "a section is missing in this test"
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.from_yaml(path) == Recipe.from_yaml(str(path)) == recipe
    assert yaml.safe_load(recipe.to_yaml()) == values
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())).to_yaml() == recipe.to_yaml()


def test_sections_are_immutable_and_not_shared():
    recipe = Recipe()
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3
    recipe.train["learning_rate"] = 1.0
    PruneConfig().units.append("neurons")
    assert Recipe().train == {} and PruneConfig().units == ["heads", "neurons"]


def test_sections_made_in_python_follow_the_same_rules():
    assert PruneConfig(target={"sparsity": 0.3}).target.sparsity == 0.3
    for section, values in (
        (PruneConfig, {"target": {"sparsity": 1.0}}),
        (ScheduleConfig, {"start": 0.5, "end": 0.5}),
        (HiddenTerm, {"layers": [[0]]}),
        (DataConfig, {}),
        (ModelConfig, {"nam": "x"}),
    ):
        with pytest.raises(ValueError):
            section(**values)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("prunee", "prune"),
        ("distil", "distill"),
        ("quantise", "quantize"),
        ("measur", "measure"),
        ("prune.target.sparcity", "prune.target.sparsity"),
        ("prune.sheduler", "prune.schedule"),
        ("prune.schedule.en", "prune.schedule.end"),
        ("prune.multiple_of.head", "prune.multiple_of.heads"),
        ("prune.at_least.neuron", "prune.at_least.neurons"),
        ("distill.logits.temprature", "distill.logits.temperature"),
        ("distill.hidden.layer", "distill.hidden.layers"),
        ("quantize.preset", "quantize.presets"),
        ("data.max_lenght", "data.max_length"),
        ("model.nam", "model.name"),
        ("teacher.trains", "teacher.train"),
        ("measure.thread", "measure.threads"),
        ("push.rep", "push.repo"),
    ],
)
def test_unknown_keys_get_the_nearest_name(path, near):
    values = at(path, 1)
    for section, least in (("data", DATA), ("model", {"name": "x"}), ("push", {"repo": "x"})):
        if section in values:
            values[section] = {**least, **values[section]}
    message = refusal(values, source="my.yaml")
    assert message.startswith(f"my.yaml: {path} is not a key here; did you mean {near}? Allowed: ")
    section: Any = Recipe
    for key in path.split(".")[:-1]:
        section = next(
            c
            for c in [section.model_fields[key].annotation, *get_args(section.model_fields[key].annotation)]
            if isinstance(c, type) and issubclass(c, BaseModel)
        )
    assert message.endswith("Allowed: " + ", ".join(sorted(section.model_fields)))


@pytest.mark.parametrize("key", ["zzz", "str", "int", "a[b", "z'z", "0", "a.b", "list[str]", "ä", "x" * 200])
def test_unknown_keys_without_a_near_name(key):
    message = refusal({"prune": {key: 1}})
    assert message.startswith(f"recipe: prune.{key} is not a key here. Allowed: at_least, coverage, criterion, ")


def test_keys_that_are_empty():
    assert refusal({"": 1}).startswith("recipe: '' is not a key here. Allowed: contract, data, ")
    assert refusal({"prune": {"": 1}}).startswith("recipe: prune.'' is not a key here. Allowed: at_least, ")


@pytest.mark.parametrize("key", ["a\nb", "a\r\nb", "a\x85b", "a\u2028b", "a\x0bb\x1cc"])
def test_line_breaks_in_keys_stay_out_of_the_message(key):
    assert "not a key here" in refusal({key: 1})
    assert "not a key here" in refusal({"prune": {key: 1}}, source="a\nb")


@pytest.mark.parametrize(
    ("path", "value", "allowed"),
    [
        ("prune.target.sparsity", 1.0, "less than 1"),
        ("prune.target.sparsity", -0.1, "greater than or equal to 0"),
        ("prune.target.sparsity", float("nan"), "less than 1"),
        ("prune.target.sparsity", float("inf"), "less than 1"),
        ("prune.target.sparsity", "0.5", "valid number"),
        ("prune.target.sparsity", True, "valid number"),
        ("prune.target.sparsity", {}, "valid number"),
        ("prune.target", 0.5, "valid dictionary"),
        ("prune.schedule.start", 1.0, "less than 1"),
        ("prune.schedule.end", 0, "greater than 0"),
        ("prune.schedule.end", float("nan"), "less than or equal to 1"),
        ("prune.schedule.power", 0, "greater than 0"),
        ("prune.schedule.updates", 0, "greater than or equal to 1"),
        ("prune.schedule.updates", 5.0, "valid integer"),
        ("prune.schedule.updates", 10**6, "less than or equal to 10000"),
        ("prune.multiple_of.heads", 0, "greater than or equal to 1"),
        ("prune.at_least.neurons", -1, "greater than or equal to 0"),
        ("prune.units", [], "at least 1 item"),
        ("prune.units", "heads", "valid list"),
        ("prune.uniform", "yes", "valid boolean"),
        ("prune.uniform", 1, "valid boolean"),
        ("distill.task.weight", -1, "greater than or equal to 0"),
        ("distill.task.weight", float("inf"), "finite number"),
        ("distill.task.weight", float("nan"), "finite number"),
        ("distill.logits.temperature", 0, "greater than 0"),
        ("distill.logits.temperature", 101, "less than or equal to 100"),
        ("distill.hidden.weight", float("nan"), "finite number"),
        ("quantize.presets", [], "at least 1 item"),
        ("quantize.skip", [1], "valid string"),
        ("measure.batch", 0, "greater than or equal to 1"),
        ("measure.rounds", 2, "greater than or equal to 3"),
        ("measure.threads", 0, "greater than or equal to 1"),
        ("measure.device", 0, "valid string"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**32, "less than 4294967296"),
        ("seed", 1.0, "valid integer"),
        ("seed", True, "valid integer"),
        pytest.param("seed", 10**5000, "less than 4294967296", id="huge"),
        ("output", 5, "valid string"),
        ("train", [1], "valid dictionary"),
        ("teacher.train", "x", "valid dictionary"),
    ],
)
def test_values_out_of_range_and_of_wrong_types(path, value, allowed):
    message = refusal(at(path, value), source="my.yaml")
    where, shown = re.fullmatch(r"my\.yaml: ([\w.]+): (.+) is not allowed: .*", message).groups()
    assert where in (path, f"{path}.0") and allowed in message
    assert shown == (repr(value)[:77] if value != 10**5000 else "this int") or shown == "1"


@pytest.mark.parametrize(
    ("path", "value", "near"),
    [
        ("task", "text-clasification", "text-classification"),
        ("prune.criterion.name", "magnitud", "magnitude"),
        ("prune.criterion.name", "first-order", "first_order"),
        ("prune.schedule.name", "polynom", "polynomial"),
        ("prune.scope", "globall", "global"),
        ("prune.cut", "gradually", "gradual"),
        ("prune.units", ["head"], "heads"),
        ("prune.units", ["heads", "neuron"], "neurons"),
        ("distill.hidden.layers", "al", "all"),
        ("quantize.presets", ["nf5"], "nf4"),
        ("quantize.dtype", "float31", "float32"),
    ],
)
def test_wrong_words_get_the_nearest_one(path, value, near):
    message = refusal(at(path, value), source="my.yaml")
    wrong = value if isinstance(value, str) else value[-1]
    assert re.match(
        rf"my\.yaml: {re.escape(path)}(\.\d)?: '{wrong}' is not allowed; did you mean {near}\? Allowed: '", message
    )
    assert f"'{near}'" in message.partition("Allowed: ")[2]


@pytest.mark.parametrize("value", [5, None, True, 0.5, [], {}, ["magnitude"], pytest.param(10**5000, id="huge"), "\n"])
def test_words_that_are_no_words(value):
    assert "Allowed: 'obs', 'first_order'" in refusal(at("prune.criterion.name", value))


def test_a_criterion_is_a_name_or_a_mapping():
    for value in ("fisher", {"name": "fisher"}):
        assert Recipe.from_dict({"prune": {"criterion": value}}).prune.criterion.name == "fisher"
    recipe = Recipe.from_dict({"prune": {"criterion": {"name": "obs", "samples": 2048}}})
    assert recipe.prune.criterion.samples == 2048
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe
    assert "prune.criterion" in refusal(at("prune.criterion", 3))


@pytest.mark.parametrize(
    ("target", "quantity", "goals"),
    [
        ({}, "sparsity", [0.5]),
        ({"speedup": 2}, "speedup", [2.0]),
        ({"speedup": [1.5, 2, 4]}, "speedup", [1.5, 2.0, 4.0]),
        ({"latency_ms": [20.0, 10.0]}, "latency_ms", [20.0, 10.0]),
        ({"parameters": 12_000_000}, "parameters", [12e6]),
        ({"flops": 0.5, "max_drop": 1.0}, "flops", [0.5]),
        ({"max_drop": 1.0}, "max_drop", []),
    ],
)
def test_targets(target, quantity, goals):
    found = Recipe.from_dict({"prune": {"target": target}}).prune.target
    assert (found.quantity, found.goals) == (quantity, goals)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"speedup": 2, "flops": 0.5}, r"prune\.target: give one of speedup, flops, not 2"),
        ({"speedup": [2, 1.5]}, r"prune\.target: speedup lists \[2\.0, 1\.5\]: each target must be harder"),
        ({"latency_ms": [10.0, 20.0]}, r"latency_ms lists .* harder"),
        ({"speedup": []}, r"speedup lists \[\]"),
        ({"speedup": [2, 2]}, r"none twice"),
        ({"speedup": 0.5}, r"prune\.target\.speedup: 0\.5 is not allowed: .*greater than or equal to 1"),
        ({"latency_ms": 0}, r"greater than 0"),
        ({"max_drop": -1}, r"greater than or equal to 0"),
    ],
)
def test_targets_that_are_refused(target, message):
    assert re.search(message, refusal({"prune": {"target": target}}))


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"uniform": True, "units": ["heads", "layers"]}, r"uniform and units: layers"),
        ({"scope": "site", "units": ["heads", "sublayers"]}, r"scope: site takes the same share"),
        ({"cut": "end", "repair": True}, r"cut: end only closes"),
        ({"cut": "end", "target": {"speedup": [2, 3]}}, r"cut: end only closes"),
    ],
)
def test_what_does_not_go_together(prune, message):
    assert re.search(message, refusal({"prune": prune}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prune": {"schedule": {"start": 0.5, "end": 0.5}}}, r"prune\.schedule: end \(0\.5\) must be after start \(0\.5\)"),
        ({"prune": {"units": ["heads", "heads"]}}, r"prune: units names a kind twice"),
        ({"distill": {"logits": {"weight": 0}}}, r"distill: all weights but that of task are 0.*leave out distill"),
        ({"distill": {"hidden": {"layers": []}}}, r"distill\.hidden: layers must be 'all', 'last', 'skip', 'dynamic' or pairs"),
        ({"distill": {"relations": {"layers": "dynamic"}}}, r"distill\.relations: layers: dynamic is for hidden states only"),
        ({"distill": {"logits": {"beta": 0.5}}}, r"distill\.logits: beta belongs to jensen_shannon and decoupled, not to kl"),
        ({"distill": {"logits": {"loss": "jensen_shannon", "beta": 1.0}}}, r"distill\.logits: beta of jensen_shannon is a share"),
        ({"distill": {"logits": {"temperature": {"first": 2.0, "last": 0.0}}}}, r"distill\.logits: temperature must stay above 0"),
        ({"distill": {"task": {"weight": {"first": 1.0, "last": 0.0, "start": 0.5, "end": 0.2}}}}, r"distill\.task\.weight.*: end \(0\.2\) must be after start"),
        ({"teacher": {"name": "a", "average": 0.9}}, r"teacher: average lets the student teach itself"),
        ({"distill": {"hidden": {"layers": [[0, 1], [2]]}}}, r"distill\.hidden: layers must be .*\[\[0, 1\], \[2, 5\]\]"),
        ({"distill": {"hidden": {"layers": [[0, -1]]}}}, r"distill\.hidden: layers must be"),
        ({"distill": {"hidden": {"layers": [[0, "x"]]}}}, r"distill\.hidden\.layers\.0\.1: 'x' is not allowed: .*valid integer"),
        ({"data": {}}, r"data: give data\.name .* or data\.train"),
        ({"data": {**DATA, "text": []}}, r"data: text takes one column name or a list of two"),
        ({"data": {**DATA, "text": ["a", "b", "c"]}}, r"data: text takes one column name or a list of two"),
        ({"data": {**DATA, "text": ["a", 3]}}, r"data\.text\.1: 3 is not allowed: .*valid string"),
        ({"data": {**DATA, "text": 3}}, r"data\.text: 3 is not allowed: .*valid string"),
        ({"model": {}}, r"model\.name: \{\} is not allowed: field required"),
        ({"push": {"private": True}}, r"push\.repo: .* field required"),
        ({"train": {"output_dir": "x"}}, r"train\.output_dir contradicts output; set output only"),
        ({"train": {"seed": 1}}, r"train\.seed contradicts seed; set seed only"),
        ({"teacher": {"train": {"seed": 1}}}, r"teacher\.train\.seed contradicts seed"),
        ({"push": {"repo": "x"}, "train": {"push_to_hub": True}}, r"train\.push_to_hub contradicts push"),
        ({"train": {1: 2}}, r"train\.1: 1 is not allowed: .*string"),
        ({1: 2}, r"1: 1 is not allowed: keys should be strings"),
    ],
)  # fmt: skip
def test_parts_that_contradict_each_other(values, message):
    assert re.match(rf"my\.yaml: {message}", refusal(values, source="my.yaml"))


def test_push_to_hub_is_fine_without_a_push_section():
    assert Recipe.from_dict({"train": {"push_to_hub": True}}).train == {"push_to_hub": True}


@pytest.mark.parametrize("values", [None, [], [1], "prune", 5, True])
def test_a_recipe_is_a_mapping(values):
    assert refusal(values) == f"recipe: must be a mapping of sections, got {type(values).__name__}"


def test_a_constant_schedule_has_no_end():
    assert Recipe.from_dict({"prune": {"schedule": {"name": "constant", "start": 0.9}}}).prune.schedule.end == 0.6


def test_nothing_of_a_structure_without_end_is_printed():
    endless: list = []
    endless.append(endless)
    assert "[[...]] is not allowed" in refusal({"seed": endless})
    wide: Any = "x"
    for _ in range(4):
        wide = [wide] * 20
    assert len(refusal({"seed": wide})) < 200


# ---- files ----


def file_refusal(path, **kwargs):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(path, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prune: {target: {sparsity: 2}}", r"prune\.target\.sparsity: 2 is not allowed"),
        (b"prunee: {}", r"prunee is not a key here; did you mean prune\?"),
        (b"- prune\n- distill\n", r"must be a mapping of sections, got list"),
        (b"prune", r"must be a mapping of sections, got str"),
        (b"a: b: c", r"is not valid YAML: mapping values are not allowed here .*line 1, column 5"),
        (b"prune: [", r"is not valid YAML: while parsing"),
        (b"prune:\n\t- x", r"is not valid YAML: .*'\\t'"),
        (b"\x00\x01\x02", r"is not valid YAML: unacceptable character"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", r"is not a text file in UTF-8"),
        (b"seed: \xe9", r"is not a text file in UTF-8"),
        (b"!!python/object/apply:os.system [true]", r"is not valid YAML: could not determine a constructor"),
        (b"? [a]\n: 1", r"is not valid YAML: .*unhashable key"),
        (b"seed: 2020-99-99", r"is not valid YAML: month must be in 1\.\.12"),
        (b"seed: *nowhere", r"is not valid YAML: found undefined alias"),
        (b"seed: 0x" + b"f" * 5000, r"seed: this int is not allowed: .*less than 4294967296"),
        (b"seed: 1\nseed: 2", r"is not valid YAML: 'seed' stands twice .*line 2"),
        (b"seed: &a [*a]", r"is not valid YAML: a value contains itself"),
        (b"prune: &a {prune: *a}", r"is not valid YAML: a value contains itself"),
        (b'"a\\nb": 1', r"a b is not a key here"),
        (b"seed: 1\n---\nseed: 2", r"is not valid YAML: expected a single document"),
        (b"[" * 3000, r"is not valid YAML: maximum recursion depth"),
    ],
)
def test_files_that_are_no_recipe(content, message, tmp_path):
    path = tmp_path / "my recipe.yaml"
    path.write_bytes(content)
    assert re.match(message, file_refusal(path)), file_refusal(path)


def test_files_that_cannot_be_read(tmp_path):
    assert file_refusal(tmp_path / "none.yaml") == "cannot be read: No such file or directory"
    assert file_refusal(tmp_path) == "cannot be read: Is a directory"
    (tmp_path / "file").write_text("")
    assert file_refusal(tmp_path / "file" / "x.yaml") == "cannot be read: Not a directory"


@pytest.mark.parametrize("content", ["", "# nothing yet\n", "---\n", "{}", "null"])
def test_an_empty_file_is_an_empty_recipe(content, tmp_path):
    (tmp_path / "x.yaml").write_text(content)
    assert Recipe.from_yaml(tmp_path / "x.yaml") == Recipe()


# ---- overrides ----


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("prune: {target: {sparsity: 0.5}, units: [heads]}\nseed: 1\ndistill:\n")
    return path


@pytest.mark.parametrize(
    ("overrides", "path", "expected"),
    [
        (["prune.target.sparsity=0.7"], "prune.target.sparsity", 0.7),
        (["prune.target.sparsity=0.7", "prune.target.sparsity=0.1"], "prune.target.sparsity", 0.1),
        (["prune.units=[heads, neurons]"], "prune.units", ["heads", "neurons"]),
        (["prune={target: {sparsity: 0.9}}"], "prune.units", ["heads", "neurons"]),
        (["prune=null"], "prune", None),
        (["prune="], "prune", None),
        (["prune.schedule.name=linear"], "prune.schedule.name", "linear"),
        (["measure.threads=2"], "measure.threads", 2),
        ([" seed = 7 "], "seed", 7),
        (["model.name=a=b"], "model.name", "a=b"),
        (["train.learning_rate=1.0e-4"], "train", {"learning_rate": 1e-4}),
        (["train.num_train_epochs=2", "train.bf16=true"], "train", {"num_train_epochs": 2, "bf16": True}),
        (["output=runs/[1]"], "output", "runs/[1]"),
        ([], "seed", 1),
        (None, "prune.target.sparsity", 0.5),
    ],
)
def test_overrides(recipe_file, overrides, path, expected):
    value: Any = Recipe.from_yaml(recipe_file, overrides=overrides)
    for key in path.split("."):
        value = getattr(value, key)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.target.sparsity", r"'prune\.target\.sparsity' is not an override; write key\.key=value, such as"),
        ("", r"'' is not an override"),
        ("=1", r"'=1' is not an override"),
        (" =1", r"' =1' is not an override"),
        ("seed=[", r"seed: '\[' is not valid YAML"),
        ("seed=2020-99-99", r"seed: '2020-99-99' is not valid YAML"),
        ("seed=!!python/name:os.system", r"seed: .* is not valid YAML"),
        ("seed=" + "[" * 3000, r"seed: '\[+\.\.\. is not valid YAML"),
        ("seed.x=1", r"seed\.x: a part of this key is not a section"),
        ("seed.x.y=1", r"seed\.x\.y: a part of this key is not a section"),
        ("prune.target.sparsity=2", r"prune\.target\.sparsity: 2 is not allowed: .*less than 1"),
        (
            "prune.target.sparcity=0.2",
            r"prune\.target\.sparcity is not a key here; did you mean prune\.target\.sparsity\?",
        ),
        ("sed=2", r"sed is not a key here; did you mean seed\?"),
        ("prune..sparsity=1", r"'prune\.\.sparsity=1' is not an override"),
        ("prune.=1", r"'prune\.=1' is not an override"),
        (".=1", r"'\.=1' is not an override"),
        ("a\nb=1", r"a b is not a key here"),
        ("a\nb", r"'a\\nb' is not an override"),
    ],
)
def test_overrides_that_are_refused(recipe_file, override, message):
    said = file_refusal(recipe_file, overrides=[override])
    assert re.match(message, said), said


def test_overrides_below_an_empty_section(tmp_path):
    (tmp_path / "x.yaml").write_text("distill:\n")
    assert Recipe.from_yaml(tmp_path / "x.yaml", overrides=["distill.task.weight=0.25"]).distill.task.weight == 0.25


def test_exponents_without_a_point_are_numbers(tmp_path):
    (tmp_path / "x.yaml").write_text("train: {learning_rate: 5e-5}")
    recipe = Recipe.from_yaml(tmp_path / "x.yaml", overrides=["train.weight_decay=1E-2"])
    assert recipe.train == {"learning_rate": 0.00005, "weight_decay": 0.01}


def test_overrides_of_what_is_no_mapping(tmp_path):
    (tmp_path / "x.yaml").write_text("[1, 2]")
    assert "not a section" in file_refusal(tmp_path / "x.yaml", overrides=["seed=1"])


# ---- fuzz ----

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
words = st.sampled_from(
    [
        "heads",
        "neurons",
        "global",
        "site",
        "linear",
        "constant",
        "random",
        "magnitude",
        "all",
        "last",
        "nf4",
        "int8",
        "auto",
    ]
)
numbers = st.sampled_from([0, 1, 2, 8, 0.0, 0.25, 0.5, 0.9, 1.0, -1, float("nan"), float("inf"), 10**30])
plausible = (
    words | numbers | st.booleans() | st.lists(words | numbers, max_size=3) | st.lists(st.lists(numbers, max_size=2))
)


def sections(section):
    """Mappings with the known keys of a section and values that are right, wrong, or sections themselves."""
    optional = {}
    for key, field in section.model_fields.items():
        inner = [
            c
            for c in (field.annotation, *get_args(field.annotation))
            if isinstance(c, type) and issubclass(c, BaseModel)
        ]
        optional[key] = (sections(inner[0]) if inner else st.nothing()) | plausible | anything
    return st.fixed_dictionaries({}, optional=optional)


recipes = sections(Recipe) | st.dictionaries(
    st.sampled_from([*Recipe.model_fields, "prunee"]) | st.text(max_size=6), anything
)


def check_fuzzed(make):
    try:
        recipe = make()
    except RecipeError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, message
        assert message.startswith("my.yaml: ") and len(message) < 2000
        return
    assert isinstance(recipe, Recipe)


@settings(max_examples=250, deadline=None)
@given(values=recipes)
def test_fuzzed_recipes_are_read_or_refused(values):
    check_fuzzed(lambda: Recipe.from_dict(values, source="my.yaml"))


@settings(max_examples=120, deadline=None)
@given(section=st.sampled_from(sorted(Recipe.model_fields)), data=st.data())
def test_fuzzed_sections_are_read_or_refused(section, data):
    """One section at a time gets further than all at once, where the first mistake ends it."""
    value = data.draw(sections(Recipe).filter(lambda values: section in values))[section]
    check_fuzzed(lambda: Recipe.from_dict({section: value}, source="my.yaml"))


@settings(max_examples=100, deadline=None)
@given(values=st.dictionaries(st.sampled_from(sorted(PruneConfig.model_fields)), plausible), seed=st.integers(0, 100))
def test_what_is_read_survives_yaml(values, seed):
    try:
        recipe = Recipe.from_dict({"prune": values, "seed": seed})
    except RecipeError:
        return
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


@settings(max_examples=100, deadline=None)
@given(content=st.text(max_size=60) | st.text("prune:{}[]-&*!?|>'\"\n\t #,0", max_size=40))
def test_fuzzed_files_are_read_or_refused(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(Recipe.from_yaml(path), Recipe)
    except RecipeError as error:
        assert len(str(error).splitlines()) == 1 and str(error).startswith(f"{path}: ")


@settings(max_examples=100, deadline=None)
@given(
    override=st.text(max_size=20)
    | st.builds("{}={}".format, st.sampled_from(["seed", "prune.cut", "x.y"]), st.text(max_size=12))
)
def test_fuzzed_overrides_are_read_or_refused(override, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "overridden.yaml"
    path.write_text("seed: 1\nprune: {}\n")
    try:
        assert isinstance(Recipe.from_yaml(path, overrides=[override]), Recipe)
    except RecipeError as error:
        assert len(str(error).splitlines()) == 1 and str(error).startswith(f"{path}: ")


def test_nothing_to_distill_is_only_said_of_the_teacher():
    assert DistillConfig(task={"weight": 0}).logits.weight == 0.5
    assert TeacherConfig().name is None
