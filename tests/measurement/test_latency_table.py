from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch

from hfcompress.anatomy import StructureError, find_layers, find_sites, keep_units
from hfcompress.anatomy.sites import linear_features
from hfcompress.measurement import latency, latency_table
from hfcompress.measurement.latency_table import (
    LatencyTable,
    ShapeTimes,
    TableError,
    default_cache_dir,
    fast_multiple,
    grid,
    isotonic,
    measure_latency_table,
    relative_error,
)
from tests.families import make_inputs, make_model

HEADS_MS = np.array([0.0, 3.0, 5.0, 6.5, 7.75])  # what a number of heads adds: less and less
FIXED_MS, NEURON_MS, EMBEDDINGS_MS = 2.0, 0.125, 10.0
FAMILIES = {  # what reads the heads and their width, what reads the neurons
    "bert": ("attention.output.dense", 8, "output.dense"),
    "gpt2": ("attn.c_proj", 8, "mlp.c_proj"),
    "llama": ("self_attn.o_proj", 16, "mlp.down_proj"),
    "t5": (None, 8, None),
}
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


class World:
    """A machine on which layers take the time above, and that others may disturb."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.forwards = 0
        self.disturbed = lambda: 1.0

    def perf_counter(self) -> float:
        return self.now_s

    def pass_ms(self, time_ms: float) -> None:
        self.now_s += time_ms * self.disturbed() / 1000


def layer_ms(layer, name: str) -> float:
    if name == "t5":
        readers = {n: m for n, m in layer.named_modules() if n.endswith((".o", ".wo"))}
        heads = sum(HEADS_MS[m.in_features // 8] for n, m in readers.items() if n.endswith(".o"))
        return FIXED_MS + heads + NEURON_MS * next(m.in_features for n, m in readers.items() if n.endswith(".wo"))
    reader, width, down = FAMILIES[name]
    units = linear_features(layer.get_submodule(reader))[0] // width
    return FIXED_MS + HEADS_MS[units] + NEURON_MS * linear_features(layer.get_submodule(down))[0]


@pytest.fixture
def world(monkeypatch) -> World:
    world = World()
    monkeypatch.setattr(latency, "time", world)
    monkeypatch.setattr(latency_table, "_clock", lambda device: None)
    return world


def make(name: str, world: World, monkeypatch, **changes):
    """A model in that world: its layers and its embeddings take time, everything else takes none."""
    model = make_model(name, **changes)
    for kind in {type(layer) for layer in find_layers(model)}:
        forward = kind.forward

        def slow(self, *args, _forward=forward, **kwargs):
            world.pass_ms(layer_ms(self, name))
            return _forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", slow)
    lookup = torch.nn.Embedding.forward
    vocabulary = model.get_input_embeddings().num_embeddings

    def slow_lookup(self, *args):
        if self.num_embeddings == vocabulary:
            world.forwards += 1
            world.pass_ms(EMBEDDINGS_MS)
        return lookup(self, *args)

    monkeypatch.setattr(torch.nn.Embedding, "forward", slow_lookup)
    return model


def measure(model, name: str, **changes) -> LatencyTable:
    settings = {"rounds": 2, "warmup": 1, "widths": 4, "cache_dir": None}
    return measure_latency_table(model, make_inputs(name), **(settings | changes))


def cut(model, units: dict[str, int]) -> None:
    keep_units(model, find_sites(model), {name: torch.arange(count) for name, count in units.items()})


def uneven(model, seed: int) -> dict[str, int]:
    generator = np.random.default_rng(seed)
    return {site.name: int(generator.integers(0, site.units + 1)) for site in find_sites(model)}


@pytest.mark.parametrize(
    ("name", "scope"),
    [("bert", "layers"), ("bert", "model"), ("gpt2", "model"), ("llama", "layers"), ("t5", "model"), ("t5", "layers")],
)
def test_predictions_are_the_times_of_the_model_that_is_really_cut(world, monkeypatch, name, scope):
    model = make(name, world, monkeypatch)
    costs = measure(model, name, scope=scope).costs(model)
    # Two stacks have the embeddings of the second between them; the first are before all layers.
    outside = (scope == "model") * EMBEDDINGS_MS + (name == "t5") * EMBEDDINGS_MS
    assert costs.rest == pytest.approx(outside)
    assert list(costs.fixed.values()) == pytest.approx([FIXED_MS] * len(find_layers(model)))
    for seed in range(3):
        units = uneven(model, seed)
        other = make_model(name)
        cut(other, units)
        expected = outside + sum(layer_ms(layer, name) for layer in find_layers(other))
        assert costs.total(units) == pytest.approx(expected)
    assert costs.total({}) == pytest.approx(outside + sum(layer_ms(layer, name) for layer in find_layers(model)))
    assert all(line[0] == 0 and (np.diff(line) >= 0).all() for line in costs.sites.values())


def test_a_pruned_model_is_measured_up_to_what_it_has(world, monkeypatch):
    model = make("bert", world, monkeypatch)
    cut(model, {"encoder.0.heads": 0, "encoder.1.heads": 2, "encoder.2.neurons": 7, "encoder.1.neurons": 0})
    table = measure(model, "bert")
    costs = table.costs(model)
    assert {name: len(line) - 1 for name, line in costs.sites.items()} == {
        site.name: site.units for site in find_sites(model)
    }
    assert costs.total({}) == pytest.approx(sum(layer_ms(layer, "bert") for layer in find_layers(model)))
    (times,) = table.shapes.values()
    assert times.units["heads"] == (0, 1, 2, 3, 4) and times.units["neurons"][-1] == 48
    cut(model, {"encoder.2.heads": 1})
    assert measure(model, "bert").shapes != table.shapes  # at most two heads are left
    with pytest.raises(TableError, match=r"encoder\.0\.heads has 4 units, measured were up to 2"):
        measure(model, "bert").costs(make_model("bert"))


def test_a_layer_that_runs_again_counts_again(world, monkeypatch):
    monkeypatch.setitem(FAMILIES, "albert", ("attention.dense", 8, "ffn_output"))
    model = make("albert", world, monkeypatch)
    costs = measure(model, "albert").costs(model)
    (layer,) = find_layers(model)
    assert costs.total({}) == pytest.approx(model.config.num_hidden_layers * layer_ms(layer, "albert"))


def test_what_disturbs_some_rounds_does_not_matter(world, monkeypatch):
    model = make("bert", world, monkeypatch)
    quiet = measure(model, "bert")
    generator, disturbed = np.random.default_rng(0), []

    def disturb() -> float:
        disturbed.append(generator.random() < 0.15)
        return 4.0 if disturbed[-1] else 1.0

    world.disturbed = disturb
    noisy = measure(model, "bert", rounds=9)
    assert 0.1 < np.mean(disturbed) < 0.2
    assert noisy.costs(model).total({}) == pytest.approx(quiet.costs(model).total({}))
    (one,), (other,) = quiet.shapes.values(), noisy.shapes.values()
    assert other.times_ms["heads"] == pytest.approx(one.times_ms["heads"])


def test_rounds_are_repeated_where_times_spread_but_not_for_ever(world, monkeypatch):
    model = make("bert", world, monkeypatch, **SMALL)
    measure(model, "bert")
    in_quiet, world.forwards = world.forwards, 0
    generator = np.random.default_rng(0)
    world.disturbed = lambda: float(generator.uniform(1.0, 2.0))
    measure(model, "bert")
    points = (in_quiet - 1) // 3  # warm-up and two rounds of each, and one forward that counts
    assert points > 8 and world.forwards == 1 + points * (3 + 3 * 2)


def test_error_of_a_median_is_what_it_scatters_by():
    generator = np.random.default_rng(0)
    draws = generator.normal(10, 1, size=(2000, 25))
    expected = np.std(np.median(draws, axis=1)) / 10
    assert np.mean([relative_error(row) for row in draws]) == pytest.approx(expected, rel=0.1)


def test_what_sublayers_cost_beside_each_other_is_in_the_times():
    times = {(): 2.0, (("heads", 1),): 5.0, (("heads", 2),): 8.0, (("neurons", 4),): 6.0}
    times |= {(("heads", 1), ("neurons", 2)): 2 + 1.1 * 5, (("heads", 2), ("neurons", 4)): 2 + 1.1 * 10}
    result = latency_table._times_of_shape({"heads": (0, 1, 2), "neurons": (0, 4)}, times, uses=1)
    assert result.fixed_ms == 2
    assert result.times_ms["heads"] == pytest.approx((0, 3.3, 6.6))
    assert result.times_ms["neurons"] == pytest.approx((0, 4.4))
    np.testing.assert_allclose(result.line_ms("neurons", 3), [0, 1.1, 2.2, 3.3])


def test_noise_below_the_empty_layer_does_not_make_times_fall():
    times = {(): 2.0, (("heads", 1),): 1.0, (("heads", 2),): 4.0, (("heads", 3),): 3.0}
    result = latency_table._times_of_shape({"heads": (0, 1, 2, 3)}, times, uses=2)
    assert result.times_ms["heads"] == pytest.approx((0, 0, 3, 3))


@pytest.mark.parametrize("seed", range(4))
def test_isotonic_is_the_nearest_rising_line(seed):
    values = np.random.default_rng(seed).normal(size=12) + 0.1 * np.arange(12)
    means = [[values[i : j + 1].mean() if i <= j else None for j in range(12)] for i in range(12)]
    expected = [max(min(means[i][j] for j in range(k, 12)) for i in range(k + 1)) for k in range(12)]
    np.testing.assert_allclose(isotonic(values), expected)
    assert isotonic([]).shape == (0,)


@pytest.mark.parametrize(("units", "points"), [(1536, 16), (3072, 20), (100, 16), (17, 16), (4, 16), (0, 16)])
def test_grid_has_both_ends_and_is_finer_where_it_is_small(units, points):
    counts = grid(units, points, multiple=16)
    steps = np.diff(counts)
    assert counts[0] == 0 and counts[-1] == units and (steps > 0).all() and len(counts) <= points + 1
    assert all(count % 16 == 0 for count in counts[:-1]) or units <= points
    if units > 1000:
        assert len(counts) >= points - 1 and steps[0] < steps[-2] / 2


def test_laps_on_other_devices_are_taken_together(world, monkeypatch):
    model = make("bert", world, monkeypatch)
    timer = latency_table._LapTimer(model, make_inputs("bert"), "encoder", lambda: None)
    last_two = [layer_ms(layer, "bert") for layer in find_layers(model)[-2:]]
    waits = []
    monkeypatch.setattr(timer.timer, "now", lambda: waits.append(1) or world.now_s)
    with timer.hooked():
        assert timer.run() == pytest.approx(last_two)
        timer.each = False
        assert timer.run() == pytest.approx((np.mean(last_two),))
    assert len(waits) == 3 + 2
    with pytest.raises(ValueError, match="did not run all layers"):  # the hooks are gone
        timer.run()


# ---- on disk ----


def test_a_table_is_measured_once(world, monkeypatch, tmp_path):
    model = make("bert", world, monkeypatch, **SMALL)
    first = measure(model, "bert", cache_dir=tmp_path / "new")
    (file,) = (tmp_path / "new").iterdir()
    assert LatencyTable.from_dict(json.loads(file.read_text())) == first
    world.forwards = 0
    assert measure(model, "bert", cache_dir=tmp_path / "new") == first
    assert world.forwards == 6, "a look at whether it is still true"
    again = measure(model, "bert", cache_dir=tmp_path / "new", refresh=True)
    assert world.forwards > 0 and again.shapes.keys() == first.shapes.keys()
    assert list((tmp_path / "new").iterdir()) == [file]


def test_a_table_of_a_busy_machine_is_measured_again(world, monkeypatch, tmp_path, caplog):
    model = make("bert", world, monkeypatch)
    world.disturbed = lambda: 3.0
    busy = measure(model, "bert", cache_dir=tmp_path)
    assert measure(model, "bert", cache_dir=tmp_path) == busy, "still busy"
    world.disturbed = lambda: 1.0
    with caplog.at_level(logging.WARNING, logger="hfcompress"):
        quiet = measure(model, "bert", cache_dir=tmp_path)
    assert quiet.costs(model).total({}) == pytest.approx(busy.costs(model).total({}) / 3)
    assert "the machine was busy when it was made; measured again" in caplog.text
    world.disturbed = lambda: 3.0
    assert measure(model, "bert", cache_dir=tmp_path) == quiet, "a busy machine does not replace a good table"


def test_other_conditions_are_measured_apart(world, monkeypatch, tmp_path):
    model = make("bert", world, monkeypatch, **SMALL)
    threads = torch.get_num_threads()
    measure(model, "bert", cache_dir=tmp_path)
    others = [
        lambda: measure(model, "bert", cache_dir=tmp_path, threads=threads + 1),
        lambda: measure(model, "bert", cache_dir=tmp_path, scope="model"),
        lambda: measure(model, "bert", cache_dir=tmp_path, widths=2),
        lambda: measure(model, "bert", cache_dir=tmp_path, warmup=0),
        lambda: measure_latency_table(
            model, make_inputs("bert", length=8), rounds=2, warmup=1, widths=4, cache_dir=tmp_path
        ),
        lambda: measure_latency_table(
            model, make_inputs("bert", batch=1), rounds=2, warmup=1, widths=4, cache_dir=tmp_path
        ),
        lambda: measure(model.bfloat16(), "bert", cache_dir=tmp_path),
    ]
    for number, other in enumerate(others):
        other()
        assert len(list(tmp_path.iterdir())) == number + 2
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "spoil",
    [
        lambda values: "{not json",
        lambda values: "[]",
        lambda values: json.dumps({**values, "version": 99}),
        lambda values: json.dumps({**values, "conditions": {"device": "another"}}),
        lambda values: json.dumps({**values, "shapes": {key: {} for key in values["shapes"]}}),
        lambda values: json.dumps(values).replace('"times_ms": {"heads": [0.0,', '"times_ms": {"heads": [9.0,'),
        lambda values: json.dumps(values).replace('"units": {"heads": [0, 1,', '"units": {"heads": [0, 2,'),
    ],
    ids=["no json", "no table", "version", "conditions", "empty", "first time", "counts"],
)
def test_a_file_that_cannot_be_used_is_measured_again(world, monkeypatch, tmp_path, caplog, spoil):
    model = make("bert", world, monkeypatch, **SMALL)
    first = measure(model, "bert", cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    good = file.read_text()
    bad = spoil(json.loads(good))
    assert json.dumps(json.loads(good)) != bad
    file.write_text(bad)
    with caplog.at_level(logging.WARNING, logger="hfcompress"):
        again = measure(model, "bert", cache_dir=tmp_path)
    assert again.costs(model).total({}) == pytest.approx(first.costs(model).total({}))
    assert len(caplog.records) == 1 and str(file) in caplog.text and "measured again" in caplog.text
    assert LatencyTable.from_dict(json.loads(file.read_text())) == again


def test_a_folder_that_cannot_be_written_costs_a_warning(world, monkeypatch, tmp_path, caplog):
    model = make("bert", world, monkeypatch, **SMALL)
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, logger="hfcompress"):
        assert measure(model, "bert", cache_dir=tmp_path / "file").shapes
    assert "is not kept" in caplog.text


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("HFCOMPRESS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "hfcompress"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "hfcompress"
    monkeypatch.setenv("HFCOMPRESS_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"
    table = measure_latency_table(make_model("bert", **SMALL), make_inputs("bert"), rounds=1, warmup=0, widths=2)
    assert [file.suffix for file in (tmp_path / "own").iterdir()] == [".json"] and table.shapes


# ---- on the real clock ----


def test_a_real_measurement_leaves_everything_as_it_was():
    model = make_model("llama").train()
    called = []
    model.layers[0].register_forward_hook(lambda *_: called.append(1))
    state, settings = {key: value.clone() for key, value in model.state_dict().items()}, model.config.to_dict()
    threads = torch.get_num_threads()
    table = measure(model, "llama", threads=2, scope="model")
    assert table.conditions["threads"] == 2 and torch.get_num_threads() == threads
    assert table.conditions["inputs"] == {"input_ids": [2, 9], "attention_mask": [2, 9]} and table.conditions["padded"]
    assert model.training and not called and model.config.to_dict() == settings
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    costs = table.costs(model)
    assert costs.quantity == "latency_ms" and costs.rest >= 0 and all(ms > 0 for ms in costs.fixed.values())
    assert {name: len(line) for name, line in costs.sites.items()} == {s.name: s.units + 1 for s in find_sites(model)}


def test_wrong_requests():
    model = make_model("bert")
    for changes in ({"rounds": 0}, {"warmup": -1}, {"widths": 1}, {"threads": 0}):
        with pytest.raises(ValueError, match="must be at least 1, 0, 2 and 1"):
            measure(model, "bert", **changes)
    with pytest.raises(ValueError, match="scope='sites' is not known"):
        measure(model, "bert", scope="sites")
    with pytest.raises(StructureError, match="cannot be cut"):
        measure_latency_table(torch.nn.Linear(2, 2), {"input": torch.zeros(2, 2)}, cache_dir=None)
    table = LatencyTable({"other": ShapeTimes(1.0, {"heads": (0,)}, {"heads": (0.0,)})}, 0.0, {})
    with pytest.raises(TableError, match=r"encoder\.0 .* was not measured"):
        table.costs(model)
    assert fast_multiple("cpu") == 16 and fast_multiple(torch.device("cuda", 1)) == 64
