"""What is planned against what is taken: allocations of real steps, states of real optimizers, weights as bitsandbytes keeps them."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from hfcompress.distillation import kl_divergence
from hfcompress.distillation.placement import (
    activation_bytes,
    available_bytes,
    gradient_bytes,
    optimizer_bytes,
    plan_placement,
    weight_bytes,
)
from hfcompress.measurement import memory_bytes
from hfcompress.quantization import quantize
from tests.families import make_inputs, make_model, run_model, task_class

KINDS = (
    "bert",
    "deberta-v2",
    "beit",
    "swin",
    "gpt2",
    "llama",
    "falcon",
    "modernbert",
    "t5",
    "whisper",
    "hubert",
    "clip",
)


def blank(name, **changes):
    with torch.device("meta"):
        return make_model(name, task_class(name), **changes)


def inputs_of(name, batch=16):
    length = 14 if name in ("clip",) else 30
    inputs = make_inputs(name, task_class(name), batch=batch, length=length)
    inputs.pop("attention_mask", None)
    return inputs


def allocated(model, inputs, *, train):
    """The most that the allocator of the CPU had given out at once during a real step."""
    model.train(train)
    for parameter in model.parameters():
        if train and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen, torch.set_grad_enabled(train):
        outputs = model(**inputs)
        if train:
            total = torch.zeros(())
            for key, value in outputs.items():
                if not isinstance(value, torch.Tensor) or not value.requires_grad:
                    continue
                if "logits" in key:
                    rows = value.flatten(0, -2).float()
                    task = F.cross_entropy(rows, torch.zeros(len(rows), dtype=torch.long))
                    total = total + kl_divergence(value, torch.randn_like(value)) + task
                else:
                    total = total + value.float().mean()
            total.backward()
            del total
        del outputs
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert len(events) > 20
    return peak


@pytest.mark.parametrize("name", KINDS)
def test_activations_are_what_a_real_step_allocates(name):
    inputs = inputs_of(name)
    estimate = activation_bytes(blank(name), inputs)
    assert estimate == pytest.approx(allocated(make_model(name, task_class(name)), inputs, train=True), rel=0.05)


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit"])
def test_with_checkpointing_and_without_training(name):
    inputs, model = inputs_of(name), make_model(name, task_class(name))
    full = activation_bytes(blank(name), inputs)
    forward = activation_bytes(blank(name), inputs, train=False)
    assert forward == pytest.approx(allocated(model, inputs, train=False), rel=0.05)
    less = activation_bytes(blank(name), inputs, gradient_checkpointing=True)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert less == pytest.approx(allocated(model, inputs, train=True), rel=0.1)
    assert forward < less < full


def test_a_real_model_is_left_as_it_is_and_told_like_its_shape():
    """Positions that are cached once for all must not be without data afterwards."""
    for name in ("bert", "beit", "gpt2"):
        model, inputs = make_model(name, task_class(name)), inputs_of(name)
        before = run_model(model, inputs)
        seen = [id(parameter) for parameter in model.parameters()]
        assert activation_bytes(model, inputs) == activation_bytes(blank(name), inputs)
        assert [id(parameter) for parameter in model.parameters()] == seen and not model.training
        assert all(parameter.grad is None for parameter in model.parameters())
        after = run_model(copy.deepcopy(model), inputs)
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_activations_grow_with_the_batch_and_shrink_with_bfloat16():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    model = blank("bert", **sizes)
    inputs = {n: {"input_ids": torch.zeros(n, 60, dtype=torch.long)} for n in (16, 32)}
    one, two = (activation_bytes(model, inputs[n]) for n in (16, 32))
    assert two == pytest.approx(2 * one, rel=0.05)
    mixed = activation_bytes(model, inputs[32], autocast=torch.bfloat16)
    assert 0.5 * two < mixed < 0.95 * two
    frozen = copy.deepcopy(model)
    for parameter in frozen.bert.parameters():
        parameter.requires_grad_(False)
    assert activation_bytes(frozen, inputs[32]) < 0.5 * two


def test_a_device_without_kernels_for_empty_tensors_counts_as_the_cpu(monkeypatch):
    import hfcompress.distillation.placement as module

    original, devices = module._run_without_data, []

    def refuse(model, inputs, *, device, **settings):
        devices.append(device)
        if device == "cuda":
            raise NotImplementedError("no such kernel")
        return original(model, inputs, device=device, **settings)

    monkeypatch.setattr(module, "_run_without_data", refuse)
    expected = activation_bytes(blank("bert"), inputs_of("bert"))
    assert activation_bytes(blank("bert"), inputs_of("bert"), device="cuda:0") == expected
    assert devices == ["cpu", "cuda", "cpu"]


# ---- weights, gradients, optimizers ----


def test_weights_in_every_floating_type():
    looked_at = 0
    for name in KINDS:
        model = make_model(name, task_class(name))
        given = [getattr(torch, dtype) for dtype in ("float32", "bfloat16", "float16")]
        for dtype in given:
            converted = copy.deepcopy(model).to(dtype)
            assert weight_bytes(model, str(dtype)[6:]) == memory_bytes(converted)
            assert weight_bytes(converted) == memory_bytes(converted)
            looked_at += 1
    assert looked_at == 3 * len(KINDS)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_quantized_weights_are_what_bitsandbytes_keeps(name, tmp_path):
    sizes = {"n_embd": 64, "n_inner": 192} if name == "gpt2" else {"hidden_size": 64, "intermediate_size": 192}
    model = make_model(name, task_class(name), **sizes)
    model.save_pretrained(tmp_path)
    for precision in ("int8", "nf4", "nf4-dq"):
        loaded = quantize(tmp_path, precision, dtype="float32")
        assert weight_bytes(blank(name, **sizes), precision) == memory_bytes(loaded)
    with pytest.raises(ValueError, match="precision 'int4' is not known; allowed: float32"):
        weight_bytes(model, "int4")


def states_of(optimizer):
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for key, value in state.items()
        if torch.is_tensor(value) and key != "step"
    )


@pytest.mark.parametrize(
    ("optim", "make"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("adamw_torch_fused", lambda parameters: torch.optim.AdamW(parameters, fused=True)),
        ("sgd", torch.optim.SGD),
        ("adagrad", torch.optim.Adagrad),
        ("rmsprop", torch.optim.RMSprop),
        ("adafactor", None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_states_are_what_optimizers_keep(optim, make, dtype):
    from transformers.optimization import Adafactor

    model = make_model("bert", task_class("bert")).to(dtype)
    model.bert.embeddings.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = (make or (lambda ps: Adafactor(ps, lr=0.1, relative_step=False)))(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert gradient_bytes(model) == sum(p.grad.numel() * p.grad.element_size() for p in trained)
    found = optimizer_bytes(model, optim)
    assert found == pytest.approx(states_of(optimizer), abs=8 * len(trained))  # Adafactor keeps its RMS, too
    assert (found > 0) == (optim != "sgd")


def test_states_in_8_bits_by_hand():
    model = nn.ModuleDict({"embedding": nn.Embedding(100, 64), "large": nn.Linear(256, 64), "small": nn.Linear(8, 8)})
    plain = 2 * 4 * (6400 + 64 + 64 + 8)  # embeddings, biases and small weights keep 32 bits
    assert optimizer_bytes(model, "adamw_bnb_8bit") == plain + 2 * (16384 + 4 * 64)
    assert optimizer_bytes(model, "lion_8bit") == (plain + 2 * (16384 + 4 * 64)) // 2
    assert optimizer_bytes(model, "paged_adamw_32bit") == 2 * 4 * (6400 + 16448 + 72)
    assert optimizer_bytes(model, "galore_adamw") == optimizer_bytes(model, "adamw_torch")


# ---- the plan ----


def lm(layers, dtype=torch.float32):
    config = LlamaConfig(
        hidden_size=128, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=512, vocab_size=256
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(dtype)


def test_the_teacher_becomes_smaller_as_memory_does():
    student, teacher, settings = lm(1), lm(3), {"batch": 2, "length": 16}
    first = plan_placement(student, teacher, **settings, device_memory_bytes=10**9)
    own = first.total_bytes - first.teacher_bytes
    chosen = {}
    for precision in ("float32", "bfloat16", "int8", "nf4"):
        needed = int((own + weight_bytes(teacher, precision)) / 0.9) + 2
        plan = plan_placement(student, teacher, **settings, device_memory_bytes=needed)
        chosen[precision] = plan.teacher_precision
        assert plan.fits and plan.total_bytes == own + weight_bytes(teacher, precision)
    assert chosen == {name: name for name in ("float32", "bfloat16", "int8", "nf4")}
    short = plan_placement(student, teacher, **settings, device_memory_bytes=needed - 5)
    assert short.teacher_precision == "nf4" and not short.fits
    assert first.reason == "the teacher stays on cpu in float32 because it fits"
    half = plan_placement(student, lm(3, torch.float16), **settings, device_memory_bytes=10**9)
    assert half.teacher_precision == "float16" and half.teacher_bytes == first.teacher_bytes // 2


def test_it_goes_to_the_host_or_does_not_fit(monkeypatch):
    import hfcompress.distillation.placement as module

    original = module._run_without_data
    monkeypatch.setattr(
        module, "_run_without_data", lambda *given, **settings: original(*given, **{**settings, "device": "cpu"})
    )
    student, teacher = lm(1), lm(3)
    settings = {"batch": 2, "length": 16, "device": "cuda:0"}
    alone = plan_placement(student, None, **settings, device_memory_bytes=10**9)
    assert alone.teacher_bytes == 0 and alone.fits
    room = int(alone.total_bytes / 0.9) + 1000
    plan = plan_placement(student, teacher, **settings, device_memory_bytes=room, host_memory_bytes=10**9)
    assert (plan.teacher_device, plan.teacher_precision, plan.fits) == ("cpu", "float32", True)
    assert plan.total_bytes == alone.total_bytes
    assert "the teacher goes to the cpu in float32: on cuda:0 even nf4 is" in plan.reason
    assert "float32 on cpu, activations about" in plan.describe()
    crowded = plan_placement(student, teacher, **settings, device_memory_bytes=room, host_memory_bytes=10**6)
    assert not crowded.fits and "cache the teacher's outputs" in crowded.reason
    tight = plan_placement(student, None, **settings, device_memory_bytes=room - 5000)
    assert not tight.fits and "cache" not in tight.reason and "use a batch of 1, accumulating gradients" in tight.reason


def test_advice_is_right():
    student, teacher = lm(3), lm(3)
    settings = {"batch": 16, "length": 64}
    whole = plan_placement(student, teacher, **settings, device_memory_bytes=10**9)
    room = int(0.75 * whole.total_bytes)
    plan = plan_placement(student, teacher, **settings, device_memory_bytes=room)
    assert not plan.fits
    advised = int(plan.reason.partition("use a batch of ")[2].partition(",")[0])
    assert 1 <= advised < 16
    smaller = plan_placement(student, teacher, batch=advised, length=64, device_memory_bytes=room)
    assert smaller.fits
    assert "turn on gradient checkpointing (saves " in plan.reason
    again = plan_placement(student, teacher, **settings, device_memory_bytes=room, gradient_checkpointing=True)
    assert again.activation_bytes < plan.activation_bytes and "checkpointing" not in again.reason


def test_what_processes_share():
    student, teacher = lm(2), lm(2)
    settings = {"batch": 2, "length": 16, "device_memory_bytes": 10**9}
    plans = {
        name: plan_placement(student, teacher, **settings, world_size=4, sharding=name)
        for name in ("none", "zero2", "zero3", "fsdp")
    }
    one = plan_placement(student, teacher, **settings)
    weights = memory_bytes(student)
    trained = sum(p.numel() for p in student.parameters())
    assert (one.student_bytes, one.gradient_bytes, one.bucket_bytes) == (weights, 4 * trained, 0)
    assert one.optimizer_bytes == 8 * trained
    assert plans["none"].bucket_bytes == 4 * trained and plans["none"].total_bytes == one.total_bytes + 4 * trained
    assert (plans["zero2"].gradient_bytes, plans["zero2"].optimizer_bytes) == (trained, 2 * trained)
    assert plans["zero2"].student_bytes == weights and plans["zero2"].bucket_bytes == 0
    assert plans["zero3"] == plans["fsdp"] and plans["zero3"].student_bytes == weights // 4
    assert {plan.teacher_bytes for plan in plans.values()} == {weights}
    adapters = plan_placement(student, teacher, **settings, trainable_parameters=1000)
    assert adapters.gradient_bytes == pytest.approx(4000, abs=4) and adapters.optimizer_bytes == pytest.approx(
        8000, abs=8
    )


def test_a_large_teacher_is_divided_where_parameters_are():
    student, teacher = lm(1), lm(16)
    size = weight_bytes(teacher)
    settings = {"batch": 2, "length": 16, "world_size": 4}
    for name, room, expected in (
        ("fsdp", 5 * size + 5, size),
        ("fsdp", 5 * size - 5, size // 4),
        ("zero3", 5 * size - 5, size // 4),
        ("zero2", 5 * size - 5, size),
    ):
        plan = plan_placement(student, teacher, **settings, sharding=name, device_memory_bytes=room)
        assert plan.fits and (plan.teacher_bytes, plan.teacher_precision) == (expected, "float32")


def test_several_teachers_are_counted_together():
    student, teachers = lm(2), [lm(3), lm(4, torch.float16)]
    settings = {"batch": 2, "length": 16}
    alone = [plan_placement(student, model, **settings, device_memory_bytes=10**9) for model in teachers]
    both = plan_placement(student, teachers, **settings, device_memory_bytes=10**9)
    in_float = weight_bytes(teachers[0], "float32") + weight_bytes(teachers[1], "float32")
    assert (both.teacher_bytes, both.teacher_precision) == (in_float, "float32")
    assert both.teacher_activation_bytes == max(plan.teacher_activation_bytes for plan in alone)
    assert both.reason == "the teachers stay on cpu in float32 because they fit"
    room = int(both.total_bytes / 0.9) - 10
    assert plan_placement(student, teachers, **settings, device_memory_bytes=room).teacher_precision == "bfloat16"


def test_the_sum_is_of_what_is_said():
    plan = plan_placement(lm(2), lm(4), batch=2, length=16, device_memory_bytes=10**9, optim="adafactor", world_size=2)
    parts = ("student", "gradient", "bucket", "optimizer", "activation", "teacher", "teacher_activation")
    assert plan.total_bytes == sum(getattr(plan, f"{part}_bytes") for part in parts)
    said = plan.describe()
    assert said.startswith("student 2.4 MB, gradients 2.4 MB, gradient buckets 2.4 MB, adafactor ")
    assert said.endswith("of 1.0 GB per process on cpu; the teacher stays on cpu in float32 because it fits")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sharding": "zero1"}, "sharding 'zero1' is not known; allowed: none, zero2, zero3, fsdp"),
        ({"mixed_precision": "fp8"}, "mixed_precision 'fp8' is not known; allowed: no, bf16, fp16"),
        ({"length": None}, "takes 1 to"),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        plan_placement(lm(1), None, **{"batch": 2, "length": 16, **settings})


def test_what_is_available_is_shared():
    whole, half = available_bytes("cpu"), available_bytes("cpu", local_world_size=2)
    assert whole > 10**6 and half == pytest.approx(whole / 2, rel=0.2)
