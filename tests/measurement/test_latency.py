from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import transformers
from torch import nn

from hfcompress.anatomy import StructureError, find_layers
from hfcompress.measurement import (
    Latency,
    compare_latency,
    count_flops,
    device_name,
    example_inputs,
    latency,
    measure_latency,
    speedup,
)
from tests.families import (
    AUDIO_FAMILIES,
    CONFIGS,
    DECODERS,
    IMAGE_FAMILIES,
    SEQ2SEQ,
    TEXT_TOWERS,
    TWO_TOWERS,
    make_inputs,
    make_model,
    predictions,
    run_model,
)

ROWS = {"x": torch.zeros(4, 8)}
MAX_LENGTH = {name: 64 for name in CONFIGS} | {"roberta": 62, "mpnet": 62, "distilbert": 512, "whisper": 32}
MAX_LENGTH |= dict.fromkeys((*TEXT_TOWERS, *TWO_TOWERS), 16) | dict.fromkeys(("falcon", "falcon:mqa"), 2048)
UNLIMITED = ("bloom", "t5", "t5:gated")  # positions are relative


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s

    def hook(self, seconds: float):
        def advance(*_: object) -> None:
            self.now_s += seconds

        return advance


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    return clock


class Net(nn.Module):
    """Takes the given milliseconds, one after the other, and writes its name into the log."""

    def __init__(self, clock: Clock, times_ms: list[float], *, name: str = "net", log: list[str] | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.clock, self.times_ms, self.name = clock, iter(times_ms), name
        self.log = [] if log is None else log
        self.seen: list[SimpleNamespace] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.now_s += next(self.times_ms) / 1000
        self.log.append(self.name)
        self.seen.append(
            SimpleNamespace(
                training=self.training, grad=torch.is_grad_enabled(), threads=torch.get_num_threads(), dtype=x.dtype
            )
        )
        return self.linear(x)


def test_percentiles_are_those_of_the_rounds_after_the_warmup(clock):
    times_ms = [5.0, 1.0, 4.0, 2.0, 3.0, 7.0]
    result = measure_latency(Net(clock, [1000.0, 2000.0, *times_ms]), ROWS, rounds=6, warmup=2)
    assert result.samples_ms == pytest.approx(times_ms)
    expected = np.percentile(times_ms, (10, 50, 90))
    assert (result.p10_ms, result.median_ms, result.p90_ms) == pytest.approx(tuple(expected))
    assert (result.rounds, result.warmup, result.batch, result.length) == (6, 2, 4, None)
    assert (result.dtype, result.scope, result.device) == ("float32", "model", device_name("cpu"))


def test_models_take_turns_and_each_round_begins_with_another(clock):
    log: list[str] = []
    models = {name: Net(clock, [1.0] * 9, name=name, log=log) for name in "abc"}
    result = compare_latency(models, ROWS, rounds=4, warmup=1)
    assert "".join(log) == "abcbcacababcbca"
    assert list(result) == ["a", "b", "c"]
    assert all(len(each.samples_ms) == 4 for each in result.values())


def test_speedup_is_of_rounds_and_a_drift_of_the_machine_does_not_matter(clock):
    drift = [1.0, 10.0, 3.0, 50.0, 7.0]
    models = {"slow": Net(clock, [6 * t for t in drift]), "fast": Net(clock, [2 * t for t in drift])}
    result = compare_latency(models, ROWS, rounds=5, warmup=0)
    ratio = speedup(result["slow"], result["fast"])
    assert (ratio.p10, ratio.median, ratio.p90) == pytest.approx((3.0, 3.0, 3.0))


def test_speedup_spread_by_hand():
    slow, fast = latency_of([4.0, 6.0, 8.0]), latency_of([2.0, 2.0, 2.0])
    ratio = speedup(slow, fast)
    assert (ratio.p10, ratio.median, ratio.p90) == pytest.approx((2.2, 3.0, 3.8))
    assert speedup(fast, slow).median == pytest.approx(1 / 3)


def latency_of(samples_ms: list[float], **changes) -> Latency:
    conditions = {"warmup": 0, "batch": 1, "length": 8, "device": "cpu", "threads": 1, "dtype": "float32"}
    conditions |= {"rounds": len(samples_ms), "scope": "model"}
    return Latency(1.0, 1.0, 1.0, samples_ms=tuple(samples_ms), **(conditions | changes))


@pytest.mark.parametrize(
    "change",
    [{"batch": 2}, {"length": 9}, {"device": "other"}, {"threads": 2}, {"scope": "layers"}, {"rounds": 3}],
    ids=lambda change: next(iter(change)),
)
def test_speedup_needs_the_same_conditions(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} differs"):
        speedup(latency_of([1.0, 2.0]), latency_of([1.0, 2.0], **change))


def test_speedup_may_compare_precisions():
    assert speedup(latency_of([2.0]), latency_of([1.0], dtype="bfloat16")).median == 2.0


def test_latency_is_plain_data_and_its_samples_are_not_shown():
    result = latency_of([1.0, 2.0])
    assert "samples" not in repr(result)
    plain = json.loads(json.dumps(result.to_dict()))
    assert set(plain) == {each.name for each in dataclasses.fields(Latency)} - {"samples_ms"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.batch = 3  # type: ignore[misc]


def test_the_model_runs_in_evaluation_mode_without_gradients_and_is_left_as_it_was(clock):
    net = Net(clock, [1.0] * 5)
    net.train()
    net.linear.eval()  # a part that was frozen by hand stays so
    threads = torch.get_num_threads()
    result = measure_latency(net, ROWS, rounds=3, warmup=2, threads=threads + 1)
    assert len(net.seen) == 5
    assert not any(each.training or each.grad for each in net.seen)
    assert {each.threads for each in net.seen} == {threads + 1} == {result.threads}
    assert torch.get_num_threads() == threads
    assert net.training
    assert not net.linear.training


def test_everything_is_restored_after_an_error(clock):
    model = make_model("bert").train()
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        measure_latency(model, {"input_ids": torch.zeros(2, 3)}, threads=threads + 1, scope="layers")
    assert model.training
    assert torch.get_num_threads() == threads
    layers = find_layers(model)
    assert not layers[0]._forward_pre_hooks
    assert not layers[-1]._forward_hooks


def test_a_four_bit_model_can_still_be_trained_afterwards(tmp_path):
    make_model("bert", "AutoModelForSequenceClassification", hidden_size=64).save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["classifier"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.bfloat16
    )
    linears = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for module in linears:
        module.support_avx512bf16_for_cpu = False
    inputs = make_inputs("bert")
    measure_latency(model, inputs, rounds=1, warmup=0)  # casts the biases of the 4-bit layers
    biases = [module.bias.requires_grad_(True) for module in linears]
    model.train()(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    assert sum(bias.grad is not None for bias in biases) == 3 * 6 + 1


# One stack of three layers, each run once.
@pytest.mark.parametrize(
    "name", ["bert", "vit", "gpt2", "opt", "llama", "deberta-v2", "wav2vec2", "swin", "mpnet", "bloom"]
)
def test_the_scope_of_layers_leaves_out_embeddings_and_head(name, clock):
    model = make_model(name)
    layers = find_layers(model)
    assert len(layers) == 3
    hooks = [len(layer._forward_pre_hooks) for layer in layers], [len(layer._forward_hooks) for layer in layers]
    assert hooks == ([0] * 3, [0] * 3)
    model.register_forward_pre_hook(clock.hook(100.0))
    model.register_forward_hook(clock.hook(1000.0))
    layers[0].register_forward_pre_hook(clock.hook(10.0))  # what others hooked on to a layer belongs to it
    layers[-1].register_forward_hook(clock.hook(20.0))
    for layer in layers:
        layer.register_forward_hook(clock.hook(1.0))
    inputs = make_inputs(name)
    in_layers = measure_latency(model, inputs, rounds=2, warmup=1, scope="layers")
    assert in_layers.samples_ms == pytest.approx((33_000.0, 33_000.0))
    assert in_layers.scope == "layers"
    whole = measure_latency(model, inputs, rounds=1, warmup=0)
    assert whole.median_ms == pytest.approx(1_133_000.0)
    assert [len(layer._forward_pre_hooks) for layer in layers] == [1, 0, 0]
    assert [len(layer._forward_hooks) for layer in layers] == [1, 1, 2]


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("albert", 3),  # one layer, three times
        ("albert:groups", 4),
        ("bart", 5),
        ("t5", 5),
        ("whisper", 5),
        ("clip", 5),  # the tower of images first
        ("siglip", 5),
    ],
)
def test_the_scope_of_layers_spans_all_stacks(name, runs, clock):
    model = make_model(name)
    model.register_forward_pre_hook(clock.hook(100.0))
    model.register_forward_hook(clock.hook(1000.0))
    for layer in find_layers(model):
        layer.register_forward_pre_hook(clock.hook(2.0))
        layer.register_forward_hook(clock.hook(1.0))
    measured = measure_latency(model, make_inputs(name), rounds=2, warmup=1, scope="layers")
    assert measured.samples_ms == pytest.approx((3000.0 * runs,) * 2)
    assert {len(layer._forward_hooks) for layer in find_layers(model)} == {1}, "hooks were left"


def test_layers_that_are_not_known_or_do_not_run_are_an_error(monkeypatch):
    with pytest.raises(StructureError):
        measure_latency(nn.Linear(8, 8), {"input": torch.zeros(4, 8)}, scope="layers")
    monkeypatch.setattr(latency, "_stacks", lambda _: [[nn.Identity()]])
    with pytest.raises(ValueError, match="BertModel did not run its first and last layer"):
        measure_latency(make_model("bert"), make_inputs("bert"), scope="layers")


def test_inputs_follow_each_model_in_type(clock):
    models = {"full": Net(clock, [1.0]), "half": Net(clock, [1.0]).bfloat16()}
    result = compare_latency(models, ROWS, rounds=1, warmup=0)
    assert [result[name].dtype for name in models] == ["float32", "bfloat16"]
    assert [models[name].seen[0].dtype for name in models] == [torch.float32, torch.bfloat16]
    assert ROWS["x"].dtype == torch.float32


def test_a_deeper_model_takes_longer_on_a_real_clock():
    shape = {"hidden_size": 128, "intermediate_size": 512}
    models = {str(n): make_model("bert", num_hidden_layers=n, **shape) for n in (1, 8)}
    inputs = example_inputs(models["1"], batch=4, length=32)
    result = compare_latency(models, inputs, rounds=7, warmup=2, scope="layers")
    assert (result["1"].batch, result["1"].length) == (4, 32)
    assert speedup(result["8"], result["1"]).median > 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rounds": 0}, "rounds=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"threads": 0}, "threads=0"),
        ({"scope": "encoder"}, "choose one of 'model', 'layers'"),
    ],
)
def test_numbers_out_of_range_are_an_error(wrong, message):
    with pytest.raises(ValueError, match=message):
        measure_latency(make_model("bert"), make_inputs("bert"), **wrong)


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match="no models"):
        compare_latency({}, ROWS)
    with pytest.raises(ValueError, match=r"inputs \(empty\) hold no tensor"):
        measure_latency(make_model("bert"), {})


@pytest.mark.parametrize("name", CONFIGS)
def test_example_inputs_are_valid_for_every_family(name):
    model = make_model(name)
    if name in IMAGE_FAMILIES or name in AUDIO_FAMILIES:
        inputs = example_inputs(model, batch=3)
        expected = {"input_values": (3, 16000)} if name in AUDIO_FAMILIES else {"pixel_values": (3, 3, 16, 16)}
        assert {key: tuple(value.shape) for key, value in inputs.items()} == expected
    else:
        length = MAX_LENGTH[name]
        inputs = example_inputs(model, batch=3, length=length)
        expected = dict.fromkeys(("input_ids", "attention_mask"), (3, length))
        if name in SEQ2SEQ:
            expected["decoder_input_ids"] = (3, length)
        if name in TWO_TOWERS:
            expected["pixel_values"] = (3, 3, 16, 16)
        if name == "whisper":
            expected = {"input_features": (3, 8, 24), "decoder_input_ids": (3, length)}
            assert example_inputs(model, batch=1)["decoder_input_ids"].shape == (1, 1)
        assert {key: tuple(value.shape) for key, value in inputs.items()} == expected
        assert name == "whisper" or inputs["attention_mask"].all()
        if name not in UNLIMITED:
            with pytest.raises(ValueError, match=f"length={length + 1}: .* takes 1 to {length} tokens"):
                example_inputs(model, batch=3, length=length + 1)
        if length == 2048:
            inputs = example_inputs(model, batch=3, length=8)
    assert predictions(run_model(model, inputs)).isfinite().all()
    assert count_flops(model, inputs) > 0


@pytest.mark.parametrize(
    ("name", "auto", "expected"),
    [
        ("bart", "AutoModelForCausalLM", {"input_ids", "attention_mask"}),
        ("bart", "AutoModelForSeq2SeqLM", {"input_ids", "attention_mask", "decoder_input_ids"}),
        ("t5", "AutoModelForTokenClassification", {"input_ids", "attention_mask"}),
        ("whisper", "AutoModelForCausalLM", {"input_ids", "attention_mask"}),
        ("whisper", "AutoModelForAudioClassification", {"input_features"}),
        ("whisper", "AutoModelForSpeechSeq2Seq", {"input_features", "decoder_input_ids"}),
        ("wav2vec2", "AutoModelForCTC", {"input_values"}),
        ("clip", "AutoModelForImageClassification", {"pixel_values"}),
        ("siglip", "AutoModelForZeroShotImageClassification", {"input_ids", "attention_mask", "pixel_values"}),
    ],
)
def test_example_inputs_are_those_of_the_part_that_a_head_uses(name, auto, expected):
    model = make_model(name, auto)
    inputs = example_inputs(model, batch=2, length=400 if name == "wav2vec2" else 6)
    assert set(inputs) == expected
    assert predictions(run_model(model, inputs)).isfinite().all()


def test_example_inputs_suit_classifiers_of_decoders_which_look_for_padding():
    for name in DECODERS:
        if name in ("opt", "gpt2"):
            continue
        model = make_model(name, "AutoModelForSequenceClassification")
        assert model(**example_inputs(model, batch=3, length=5)).logits.shape == (3, 2)
    assert len(DECODERS) == 16


def test_roberta_itself_has_no_more_positions_than_are_said():
    model = make_model("roberta")
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, MAX_LENGTH["roberta"] + 1), 5))


@pytest.mark.parametrize("pad", [0, 37, 99])
def test_token_ids_are_all_of_the_vocabulary_but_the_padding(pad):
    model = make_model("bert", pad_token_id=pad)
    ids = example_inputs(model, batch=200, length=64)["input_ids"]
    assert set(ids.unique().tolist()) == set(range(100)) - {pad}


@pytest.mark.parametrize("pad", [None, -1])
def test_without_a_padding_id_all_token_ids_occur(pad):
    model = make_model("llama")
    model.config.pad_token_id = pad
    ids = example_inputs(model, batch=200, length=64)["input_ids"]
    assert set(ids.unique().tolist()) == set(range(100))


def test_the_same_seed_gives_the_same_inputs_and_leaves_the_global_one():
    model = make_model("bert")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, again, other = (example_inputs(model, batch=2, length=9, seed=seed)["input_ids"] for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.rand(2), expected)


def test_images_have_the_type_of_the_model_and_may_be_oblong():
    model = make_model("vit", image_size=(16, 24), num_channels=1).to(torch.bfloat16)
    pixels = example_inputs(model, batch=2)["pixel_values"]
    assert pixels.shape == (2, 1, 16, 24)
    assert pixels.dtype == torch.bfloat16
    assert model(pixel_values=pixels).last_hidden_state.shape == (2, 1 + 2 * 3, 32)


def test_example_inputs_refuse_what_they_cannot_make():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    conformer = transformers.Wav2Vec2BertConfig(**sizes, feature_projection_input_dim=8)
    with pytest.raises(ValueError, match=r"Wav2Vec2BertModel .*build its inputs by hand"):
        example_inputs(transformers.Wav2Vec2BertModel(conformer), batch=1, length=4)
    with pytest.raises(ValueError, match="Linear"):
        example_inputs(nn.Linear(2, 2), batch=1, length=4)
    model = make_model("bert")
    for length in (None, 0, -3):
        with pytest.raises(ValueError, match=f"length={length}: BertModel takes 1 to 64"):
            example_inputs(model, batch=1, length=length)
    with pytest.raises(ValueError, match="batch=0"):
        example_inputs(model, batch=0, length=4)


def test_device_name_is_read_where_the_system_gives_it(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(latency, "Path", lambda _: cpuinfo)
    monkeypatch.setattr(latency.platform, "processor", lambda: "")
    monkeypatch.setattr(latency.platform, "machine", lambda: "riscv64")
    assert device_name("cpu") == "riscv64"
    monkeypatch.setattr(latency.platform, "processor", lambda: "arm")
    assert device_name("cpu") == "arm"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Acme 9000: fast\nmodel name\t: Other\n")
    assert device_name("cpu") == device_name(torch.device("cpu")) == "Acme 9000: fast"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert device_name("cuda:1") == "GPU 1"
    assert device_name("meta") == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_work_is_waited_for():
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8192, 8192))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight @ self.weight

    model = Product().cuda()
    result = measure_latency(model, {"x": torch.zeros(8192, 8192)}, rounds=3)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    x = torch.zeros(8192, 8192, device="cuda")
    start.record()
    model(x)
    end.record()
    end.synchronize()
    assert result.median_ms == pytest.approx(start.elapsed_time(end), rel=0.5)
    assert result.device == torch.cuda.get_device_name(0)
