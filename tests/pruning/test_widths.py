"""The hidden width as a unit: which width is chosen, with everything else that may go, and what is refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hfcompress
from hfcompress.anatomy import StructureError, find_sites, find_stream
from hfcompress.checkpoints.record import read_hidden
from hfcompress.config import MeasureConfig, PruneConfig, Recipe, RecipeError
from hfcompress.measurement import count_parameters
from hfcompress.measurement.costs import Costs, flops_costs, parameter_costs
from hfcompress.measurement.latency import example_inputs
from hfcompress.pruning import BudgetError, Plan, Pruner, cut, repair_stream, stream_surgeon
from hfcompress.pruning.budgets import Budget
from hfcompress.pruning.widths import Widths, narrower_widths, rank_features
from tests.families import largest_difference, make_inputs, make_model, run_model, task_class

AT_ONCE = {"name": "constant", "start": 0.0}
MEASURE = MeasureConfig(batch=2, length=8, rounds=3, warmup=0, threads=1, device="cpu")
TIGHT = {"heads": 3, "neurons": 36}
SPARE = (3, 4, 9, 14, 15, 20, 27, 30)  # features that nothing reads


def batches(name: str, *, count: int = 4, size: int = 8) -> list[dict[str, torch.Tensor]]:
    return [make_inputs(name, task_class(name), batch=size, seed=seed) for seed in range(count)]


def with_spare_features(name: str, *, seed: int = 0) -> Any:
    """A model in which no linear layer reads some of the features."""
    model = make_model(name, task_class(name), seed=seed, tie_word_embeddings=False)
    cleared = 0
    with torch.no_grad():
        for entry in find_stream(model).dims:
            if entry.role == "reads":
                dict(model.named_parameters())[entry.name].index_fill_(entry.dim, torch.tensor(SPARE), 0.0)
                cleared += 1
    assert cleared >= 7
    return model


def configure(**changes: Any) -> PruneConfig:
    base = {
        "target": {"parameters": 0.6, "scope": "layers"},
        "units": ["heads", "neurons", "hidden"],
        "criterion": "obs",
        "schedule": AT_ONCE,
        "multiple_of": {"neurons": 4, "hidden": 4},
        "at_least": {"neurons": 4},
    }
    return PruneConfig.model_validate({**base, **changes})


def prune(model: Any, name: str, **changes: Any) -> Pruner:
    pruner = Pruner(model, configure(**changes), total_steps=1, batches=lambda: batches(name), measure=MEASURE)
    pruner.step(0)
    assert pruner.done
    return pruner


# ---- ranking and repair ----


@pytest.mark.parametrize("name", ["bert", "vit", "llama", "gpt2"])
def test_what_nothing_reads_goes_first_and_costs_nothing(name):
    model = with_spare_features(name)
    curve = stream_surgeon(model, batches(name))
    spare = set(SPARE)
    if name == "bert":  # the pooler writes features, too, and what it writes to is read by nobody either
        assert len(curve.order) == 32
    assert set(curve.order[: len(spare)].tolist()) == spare
    assert float(curve.loss[len(spare)]) < 1e-6 * float(curve.loss[-1]) < float(curve.loss[len(spare) + 1])


def test_criteria_that_look_at_weights_need_no_examples():
    model = make_model("bert", task_class("bert"))
    with torch.no_grad():
        for entry in find_stream(model).dims:
            parameter = dict(model.named_parameters()).get(entry.name)
            if parameter is not None and entry.copies == 1:
                parameter.index_fill_(entry.dim, torch.tensor([5, 7]), 0.0)
    for criterion in ("magnitude", "magnitude_l1"):
        assert set(rank_features(model, criterion, []).order[:2].tolist()) == {5, 7}
    drawn = [rank_features(model, "random", [], seed=seed).order.tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and sorted(drawn[0]) == list(range(32))


@pytest.mark.parametrize("name", ["bert", "vit", "llama", "gpt2", "t5", "bart"])
def test_repair_brings_predictions_back_on_data_it_has_not_seen(name):
    auto = task_class(name)
    dense = make_model(name, auto)
    seen, unseen = batches(name, count=8, size=16), make_inputs(name, auto, batch=12, seed=99)
    kept = torch.tensor(stream_surgeon(dense, seen).kept(28))
    narrow = copy.deepcopy(dense)
    cut(narrow, Plan({}, hidden=tuple(kept.tolist())))
    repaired = copy.deepcopy(narrow)
    weights = {path: parameter.clone() for path, parameter in dense.named_parameters()}
    repair_stream(repaired, dense, kept, seen)
    assert all(torch.equal(parameter, weights[path]) for path, parameter in dense.named_parameters())

    def error(model: Any) -> float:
        return float((run_model(model, unseen)["logits"] - run_model(dense, unseen)["logits"]).square().mean())

    assert error(repaired) < 0.8 * error(narrow)
    changed = sum(not torch.equal(a, b) for a, b in zip(repaired.parameters(), narrow.parameters(), strict=True))
    assert changed >= 6


# ---- the choice ----


def kl(model: Any, other: Any, held: list[dict[str, torch.Tensor]]) -> float:
    """Nats per example, summed over real positions, worked out here."""
    total = examples = 0.0
    for inputs in held:
        p, q = (log_softmax(run_model(each, inputs)["logits"].double(), -1) for each in (model, other))
        each = kl_div(q, p, reduction="none", log_target=True).sum(-1)
        total += float(each.sum() if each.dim() == 1 else (each * inputs["attention_mask"]).sum())
        examples += len(each)
    return total / examples


@pytest.mark.parametrize(
    ("name", "spare", "most"),
    [("bert", False, None), ("bert", False, TIGHT), ("vit", False, TIGHT), ("llama", True, None)],
)
def test_no_other_width_loses_less(name, spare, most):
    dense = with_spare_features(name) if spare else make_model(name, task_class(name))
    data = batches(name)
    held, fitted = data[3::4], [batch for number, batch in enumerate(data) if number % 4 != 3]
    settings = {} if most is None else {"at_least": most}
    goal = 0.5 * parameter_costs(dense, scope="layers").total({})
    order = stream_surgeon(dense, data)
    losses = {}
    for width in (32, 28, 24, 20, 16):
        narrow = copy.deepcopy(dense)
        features = order.kept(width)
        if width < 32:
            cut(narrow, Plan({}, hidden=features))
            repair_stream(narrow, dense, torch.tensor(features), fitted)
        config = configure(target={"parameters": goal, "scope": "layers"}, units=["heads", "neurons"], **settings)
        try:
            pruner = Pruner(narrow, config, total_steps=1, batches=lambda: fitted)
        except BudgetError:
            continue
        pruner.step(0)
        losses[width] = kl(dense, narrow, held)
    assert len(losses) >= (2 if most else 4)
    model = copy.deepcopy(dense)
    pruner = prune(model, name, target={"parameters": 0.5, "scope": "layers"}, **settings)
    width = find_stream(model).width
    assert losses[width] == min(losses.values())
    assert (width < 32) == (spare or most is not None), "in one case the width stays, in the others it does not"
    assert pruner.cost() <= goal and pruner.totals()["hidden"] == width
    if spare:
        gone = set(range(32)) - set(pruner.features)
        assert len(pruner.features) == width and (width < 24 or gone <= set(SPARE))
        assert pruner.narrowed == pruner.features


def test_a_wide_model_is_found_where_the_full_width_cannot_reach_the_target():
    model = make_model("bert", task_class("bert"))
    tight = {"target": {"parameters": 0.6, "scope": "layers"}, "at_least": {"heads": 4, "neurons": 44}}
    with pytest.raises(BudgetError, match=r"target parameters 0.6 is out of reach"):
        prune(copy.deepcopy(model), "bert", **tight, units=["heads", "neurons"])
    pruner = prune(model, "bert", **tight)
    assert find_stream(model).width == 16 and pruner.cost() <= 0.6 * pruner.budget.dense
    with pytest.raises(BudgetError, match=r"target parameters 0.4 is out of reach"):
        prune(
            make_model("bert", task_class("bert")),
            "bert",
            **{**tight, "target": {"parameters": 0.4, "scope": "layers"}},
        )


@pytest.mark.parametrize("quantity", ["parameters", "flops", "sparsity"])
def test_alone_the_widest_that_fits_is_taken(quantity):
    model = make_model("bert", task_class("bert"))
    goal = 0.3 if quantity == "sparsity" else 0.7

    def cost(model: Any) -> float:
        if quantity == "flops":
            return flops_costs(model, example_inputs(model, batch=1, length=8), scope="model").total({})
        if quantity == "sparsity":
            return float(sum(site.parameters_per_unit * site.units for site in find_sites(model)))
        return float(count_parameters(model))

    allowed = cost(model) * (1 - goal if quantity == "sparsity" else goal)
    pruner = prune(model, "bert", target={quantity: goal}, units=["hidden"], multiple_of={"hidden": 2})
    width = find_stream(model).width
    assert cost(model) <= allowed and width % 2 == 0 and width < 32
    wider = make_model("bert", task_class("bert"))
    cut(wider, Plan({}, hidden=tuple(range(width + 2))))
    assert cost(wider) > allowed
    assert pruner.units() == {} and pruner.totals()["heads"] == 12
    if quantity == "sparsity":
        assert pruner.sparsity() == pytest.approx(1 - cost(model) / (allowed / 0.7), abs=1e-9)


def milliseconds(model: Any, *_: Any, **__: Any) -> Costs:
    """A clock that is not disturbed: a thousand parameters take a millisecond."""
    costs = parameter_costs(model, scope="model")
    sites = {name: line / 1000 for name, line in costs.sites.items()}
    fixed = {name: value / 1000 for name, value in costs.fixed.items()}
    return Costs("latency_ms", costs.rest / 1000, fixed, sites)


def test_times_are_those_of_the_width(monkeypatch):
    model = make_model("bert", task_class("bert"))
    whole = milliseconds(model).total({})
    asked, timed = [], []

    class Watch:
        def __init__(self, model: Any, *_: Any, **__: Any) -> None:
            self.costs, self.width = milliseconds(model), find_stream(model).width

        def time(self, units: dict[str, int], *, layers: Any) -> tuple[float, float]:
            timed.append(self.width)
            spent = self.costs.total(units, layers=layers)
            return spent, whole / spent

    def costs(model: Any, *_: Any, **__: Any) -> Costs:
        asked.append(find_stream(model).width)
        return milliseconds(model)

    monkeypatch.setattr("hfcompress.pruning.pruner.costs_of", costs)
    monkeypatch.setattr("hfcompress.pruning.pruner.Stopwatch", Watch)
    config = configure(target={"speedup": 1.5}, at_least={"heads": 3, "neurons": 40})
    budget = Budget(milliseconds(model), whole, (whole / 1.5,))
    pruner = Pruner(model, config, total_steps=1, batches=lambda: batches("bert"), budget=budget)
    pruner.step(0)
    width = find_stream(model).width
    assert width < 32 and set(timed) == {width} and width in asked
    [reached] = pruner.reached
    assert reached["speedup"] >= 1.5 and reached["latency_ms"] == pytest.approx(count_parameters(model) / 1000)


def test_narrower_copies_are_made_once(monkeypatch):
    model = with_spare_features("bert")
    config = configure(target={"parameters": 0.6, "scope": "layers"}, at_least={"heads": 3, "neurons": 40})
    widths = Widths(model, config, batches("bert"), repairs=True)
    found = []
    for goal in (0.6, 0.55):
        candidate = copy.deepcopy(model)
        own = config.model_copy(update={"target": config.target.model_copy(update={"parameters": goal})})
        pruner = Pruner(candidate, own, total_steps=1, batches=lambda: batches("bert"), widths=widths)
        if found:
            monkeypatch.setattr("hfcompress.pruning.widths.stream_surgeon", None)  # would fail if it were asked again
        pruner.step(0)
        found.append(find_stream(candidate).width)
    assert all(width < 32 for width in found)


def test_the_widths_that_are_tried():
    config = configure(multiple_of={"neurons": 16, "hidden": 64})
    assert narrower_widths(768, 768, config) == [640, 576, 512, 384]  # the nearest multiples of 672, 576, 480, 384
    assert narrower_widths(32, 32, config) == []
    assert narrower_widths(768, 768, configure(multiple_of={"hidden": 64}, at_least={"hidden": 600})) == [640]


# ---- everything together ----

ALL = ["heads", "neurons", "sublayers", "layers", "hidden"]


@pytest.mark.parametrize("name", ["bert", "vit", "llama", "gpt2", "t5"])
def test_all_units_together_are_pruned_saved_and_loaded(name, tmp_path):
    auto = task_class(name)
    model = make_model(name, auto)
    # So little may go otherwise that the width has to.
    tight = {"at_least": {"heads": 3, "neurons": 44}, "units": ALL}
    pruner = prune(model, name, target={"parameters": 0.27, "scope": "layers"}, **tight)
    assert pruner.cost() <= 0.27 * pruner.budget.dense
    left, before = read_hidden(model.config)
    assert left < before == 32 and {"layers", "units"} & model.config.hfcompress.keys()
    inputs = make_inputs(name, auto)
    model.save_pretrained(tmp_path)
    again = hfcompress.load(tmp_path)
    assert type(again).__name__ == type(model).__name__
    assert largest_difference(run_model(again, inputs), run_model(model, inputs)) < 1e-6


@pytest.mark.parametrize("criterion", ["magnitude", "random", "fisher", "first_order"])
def test_every_kind_of_criterion_finds_a_width(criterion):
    model = make_model("bert", task_class("bert"))
    pruner = prune(model, "bert", criterion=criterion, at_least={"heads": 3, "neurons": 40})
    assert find_stream(model).width < 32 and pruner.cost() <= 0.6 * pruner.budget.dense


def test_several_targets_narrow_step_by_step():
    model = make_model("bert", task_class("bert"))
    config = configure(target={"parameters": [0.8, 0.6], "scope": "layers"}, units=["hidden"])
    pruner = Pruner(model, config, total_steps=4, batches=lambda: batches("bert"))
    kept, widths = tuple(range(32)), []
    for step in range(5):
        changes = pruner.step(step)
        if pruner.narrowed is not None:
            assert changes
            kept = tuple(kept[place] for place in pruner.narrowed)
            widths.append(find_stream(model).width)
    assert len(widths) == 2 and widths[0] > widths[1] and kept == pruner.features
    facts = json.loads(json.dumps(pruner.state()[0]))
    other = Pruner(model, config, total_steps=4, batches=lambda: batches("bert"))
    other.load_state(facts, pruner.state()[1])
    assert (other.features, other.hidden_before, other.step(4)) == (kept, 32, [])


def test_uniform_keeps_to_what_the_plain_config_says(tmp_path):
    tight = {"at_least": {"heads": 2, "neurons": 40}, "uniform": True}
    model = make_model("llama", task_class("llama"))
    prune(model, "llama", **tight)
    assert find_stream(model).width < 32
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    inputs = make_inputs("llama", task_class("llama"))
    assert largest_difference(run_model(plain.eval(), inputs), run_model(model, inputs)) < 1e-6
    with pytest.raises(
        BudgetError, match="uniform: the plain config of bert cannot say that hidden features are missing"
    ):
        prune(make_model("bert", task_class("bert")), "bert", units=["hidden"], uniform=True)
    bert = make_model("bert", task_class("bert"))
    prune(bert, "bert", target={"parameters": 0.8, "scope": "layers"}, uniform=True, units=["neurons", "hidden"])
    assert read_hidden(bert.config) is None
    bert.save_pretrained(tmp_path / "bert")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert").config.intermediate_size < 48


# ---- what is refused ----


def test_models_that_have_no_width_to_cut():
    model = make_model("bert")
    with pytest.raises(ValueError, match=r"would change what BertModel gives, .* prune a model with a head"):
        Pruner(model, configure(), total_steps=1, batches=lambda: batches("bert"))
    with pytest.raises(StructureError, match="hidden width"):
        Pruner(make_model("clip", task_class("clip")), configure(), total_steps=1, batches=lambda: [])
    with pytest.raises(ValueError, match=r"the criterion obs and repair and units: hidden need examples"):
        Pruner(make_model("bert", task_class("bert")), configure(), total_steps=1)
    with pytest.raises(
        ValueError, match=r"units: vocabulary goes before texts are encoded, .* hfcompress vocabulary first"
    ):
        Pruner(
            make_model("bert", task_class("bert")),
            configure(units=["vocabulary", "neurons"]),
            total_steps=1,
            batches=lambda: [],
        )


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"units": ["neurons", "hidden"], "cut": "end"}, "cut: end only closes heads, neurons and sublayers"),
        (
            {"units": ["neurons", "hidden"], "criterion": "learned"},
            "learned has no gates on hidden features; use another",
        ),
        ({"units": ["vocabulary"], "target": {"speedup": 2.0}}, "vocabulary alone changes the number of parameters"),
        ({"units": ["vocabulary"]}, "give one target.parameters, or more units"),
        ({"units": ["vocabulary"], "target": {"parameters": [0.8, 0.5]}}, "of the whole model, once, and no speed"),
        ({"units": ["vocabulary"], "target": {"parameters": 0.5, "scope": "layers"}}, "of the whole model"),
        ({"units": ["hidden"], "coverage": 0.0}, "prune.coverage: 0.0 is not allowed"),
        ({"units": ["hiden"]}, "did you mean hidden"),
    ],
)
def test_recipes_that_ask_for_what_cannot_be(section, message):
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.from_dict({"prune": section})
    assert "\n" not in str(caught.value)
