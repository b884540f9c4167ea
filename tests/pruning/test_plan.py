"""The plan and the cut: what is replaced, what is written down, what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from hfcompress.anatomy import StructureError, find_sites
from hfcompress.checkpoints.record import add_step, read_steps, read_units
from hfcompress.pruning import Plan, cut, original_units
from tests.families import CONFIGS, choose_units, make_model, task_class


def test_a_plan_is_plain_data():
    plan = Plan(choose_units(find_sites(make_model("bert")), "both"))
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan and len(again.keep) == 6
    assert all(type(units) is tuple for units in again.keep.values())


@pytest.mark.parametrize("pattern", ["both", "empty"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_replaced_parameter_is_reported_once(name, pattern):
    model = make_model(name, task_class(name))
    keep = choose_units(find_sites(model), pattern)
    before = dict(model.named_parameters())
    values = {path: parameter.detach().clone() for path, parameter in before.items()}
    changes = cut(model, Plan(keep))
    after = dict(model.named_parameters())

    replaced = {id(p) for p in before.values()} - {id(p) for p in after.values()}
    assert sorted(id(change.old) for change in changes) == sorted(replaced) and len(replaced) >= 6
    added = {id(p) for p in after.values()} - {id(p) for p in before.values()}
    assert sorted(id(change.new) for change in changes if change.new is not None) == sorted(added)

    paths = {id(parameter): path for path, parameter in before.items()}
    gone = 0
    for change in changes:
        path = paths[id(change.old)]
        assert torch.equal(change.old, values[path]), "the old parameter was changed"
        if change.new is None:
            gone += 1
            assert path not in after
            continue
        assert after[path] is change.new
        assert change.index.dtype == torch.int64
        assert torch.equal(change.new, change.old.index_select(change.dim, change.index))
        assert change.new.is_contiguous() and change.new.requires_grad
    assert bool(gone) is (pattern == "empty" and name != "bloom")
    untouched = before.keys() & after.keys() - {paths[id(change.old)] for change in changes}
    assert all(after[path] is before[path] for path in untouched) and untouched


@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen3"])
def test_parameters_keep_their_kind(name):
    model = make_model(name).bfloat16()
    frozen = [path for site in find_sites(model)[:2] for path in site.readers]
    for path in frozen:
        model.get_submodule(path).requires_grad_(False)
    cut(model, Plan(choose_units(find_sites(model), "both")))
    for path, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16 and type(parameter) is torch.nn.Parameter
        assert parameter.requires_grad is (path.rpartition(".")[0] not in frozen)
    assert not model.training
    model.train()
    cut(model, Plan({find_sites(model)[0].name: ()}))
    assert all(module.training for module in model.modules())


def test_the_record_says_what_is_left_of_what():
    model = make_model("llama")
    assert original_units(model) == {
        f"decoder.{n}.{kind}": units for n in range(3) for kind, units in (("heads", 2), ("neurons", 48))
    }
    cut(model, Plan({"decoder.0.heads": (1,), "decoder.2.neurons": tuple(range(30)), "decoder.1.heads": (0, 1)}))
    assert model.config.hfcompress == {
        "version": 1,
        "units": {"decoder.0.heads": [1, 2], "decoder.2.neurons": [30, 48]},
    }
    cut(model, Plan({"decoder.2.neurons": tuple(range(10)), "decoder.0.heads": ()}))
    assert read_units(model.config) == {"decoder.0.heads": (0, 2), "decoder.2.neurons": (10, 48)}
    assert original_units(model)["decoder.2.neurons"] == 48 and original_units(model)["decoder.0.heads"] == 2
    assert json.loads(json.dumps(model.config.to_dict()))["hfcompress"] == model.config.hfcompress


def test_recorded_steps_survive_a_cut():
    model = make_model("bert")
    add_step(model.config, "distill", teacher="somebody", temperature=2.0)
    cut(model, Plan({"encoder.0.heads": (1,)}))
    add_step(model.config, "prune", sparsity=0.5)
    cut(model, Plan({"encoder.1.heads": (1,)}))
    assert [step["step"] for step in read_steps(model.config)] == ["distill", "prune"]
    assert read_units(model.config) == {"encoder.0.heads": (1, 4), "encoder.1.heads": (1, 4)}


def test_a_plan_that_drops_nothing_changes_nothing():
    model = make_model("bert")
    before = [id(parameter) for parameter in model.parameters()]
    assert cut(model, Plan({})) == []
    assert cut(model, Plan({site.name: tuple(range(site.units)) for site in find_sites(model)})) == []
    assert [id(parameter) for parameter in model.parameters()] == before
    assert not hasattr(model.config, "hfcompress")


@pytest.mark.parametrize(
    "keep",
    [
        {"encoder.0.heads": (1, 0)},
        {"encoder.0.heads": (0, 0)},
        {"encoder.0.heads": (0, 4)},
        {"encoder.0.heads": (-1,)},
        {"encoder.0.head": (0,)},
        {"encoder.0.heads": (0,), "encoder.7.neurons": (0,)},
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(keep):
    model = make_model("bert")
    before = [id(parameter) for parameter in model.parameters()]
    with pytest.raises(StructureError, match=r"units to keep must be ascending|no such site"):
        cut(model, Plan(keep))
    assert [id(parameter) for parameter in model.parameters()] == before
    assert not hasattr(model.config, "hfcompress")


def test_a_plan_for_what_is_gone_is_refused():
    model = make_model("bert")
    cut(model, Plan({"encoder.0.heads": ()}))
    assert cut(model, Plan({"encoder.0.heads": ()})) == []
    with pytest.raises(StructureError, match="units to keep"):
        cut(model, Plan({"encoder.0.heads": (0,)}))


@pytest.mark.parametrize("record", [[], {"version": 3}, {"version": 1, "units": {"encoder.0.heads": [9, 4]}}])
def test_a_bad_record_in_the_config_is_refused(record):
    model = make_model("bert")
    model.config.hfcompress = record
    with pytest.raises(StructureError, match=r"config\.hfcompress"):
        cut(model, Plan({"encoder.0.heads": (0,)}))
    assert find_sites(model)[0].units == 4
