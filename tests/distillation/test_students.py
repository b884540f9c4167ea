"""Students made from teachers of every family: what is copied, what is computed, and what loads again."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertConfig, PreTrainedTokenizerFast

from hfcompress.anatomy import StructureError, find_sites
from hfcompress.checkpoints.portable import MODELING_FILE
from hfcompress.distillation import Teacher, copy_weights, derive_student, make_student, match_vocabularies
from hfcompress.measurement import count_parameters
from hfcompress.pruning import Plan, cut
from tests.families import (
    CONFIGS,
    auto_class,
    largest_difference,
    make_config,
    make_inputs,
    make_model,
    predictions,
    run_model,
    task_class,
)
from tests.references import skip_layers, stack_lengths

# One of each kind, where a look at all would only take longer.
KINDS = ("bert", "albert", "modernbert", "swin", "gpt2", "llama", "falcon", "t5", "whisper", "hubert", "clip", "dinov2")
SHARED_LAYERS = ("albert", "albert:groups")
# Their first layer makes the position bias of all, is followed by a convolution, or has no norm.
FIRST_STAYS = ("t5", "t5:gated", "modernbert")
# Two towers, stages, grouped convolutions, and an attention of torch's own that fixes its width.
NO_STREAM = ("clip", "siglip", "swin", "wav2vec2", "hubert", "siglip_vision_model")
NO_HEADS = ("bloom", "falcon:mqa")
# What no plain config says: neurons beside a multiple of the hidden width, or shared with a head; embeddings of an own width
# that the new one happens to be; decoders with other heads than the encoder.
NOT_NATIVE = ("dinov2", "siglip", "siglip_vision_model", "swin", "electra", "bart", "mbart", "whisper")


def teacher_of(name, **changes):
    return make_model(name, task_class(name), **changes), make_inputs(name, task_class(name))


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(teacher, state, config):
    now = teacher.state_dict()
    assert now.keys() == state.keys() and len(now) > 5
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())
    assert teacher.config.to_dict() == config


def assert_trains(model, inputs):
    """Gradients reach every parameter that they reach in a model as it comes from its config."""
    reference = type(model)._from_config(copy.deepcopy(model.config)).eval()
    for one in (model, reference):
        predictions(one(**inputs)).float().square().mean().backward()
    wanted = {key for key, parameter in reference.named_parameters() if parameter.grad is not None}
    reached = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == wanted and len(reached) > 5
    frozen = {key for key, parameter in reference.named_parameters() if not parameter.requires_grad}
    assert {key for key, parameter in model.named_parameters() if not parameter.requires_grad} == frozen


@pytest.mark.parametrize("name", CONFIGS)
def test_a_student_with_all_layers_is_the_teacher(name):
    teacher, inputs = teacher_of(name)
    teacher = Teacher(teacher).model  # frozen, as trainers keep it
    state, config = state_of(teacher), teacher.config.to_dict()
    layers = {stack: range(count) for stack, count in stack_lengths(teacher).items()}
    student, copied = derive_student(teacher, layers=layers)
    assert largest_difference(run_model(student, inputs), run_model(teacher, inputs)) < 1e-5
    assert (copied.parameters, copied.fresh) == (count_parameters(teacher), ())
    ours = {tensor.data_ptr() for tensor in (*student.parameters(), *student.buffers()) if tensor.numel()}
    assert not ours & {tensor.data_ptr() for tensor in (*teacher.parameters(), *teacher.buffers())}
    assert student.config is not teacher.config and not student.training
    assert not hasattr(student.config, "hfcompress")
    assert_trains(student, inputs)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert_untouched(teacher, state, config)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in SHARED_LAYERS])
def test_chosen_layers_compute_what_the_teacher_computes_without_the_others(name, tmp_path):
    teacher, inputs = teacher_of(name)
    keep = {stack: (0, 2) if count == 3 else (0,) for stack, count in stack_lengths(teacher).items()}
    state, config = state_of(teacher), teacher.config.to_dict()
    student = make_student(teacher, layers=keep)
    assert_untouched(teacher, state, config)
    reference = copy.deepcopy(teacher)
    assert skip_layers(reference, keep) >= 1
    expected = predictions(run_model(reference, inputs))
    found = predictions(run_model(student, inputs))
    assert torch.equal(found, expected)
    assert float((found - predictions(run_model(teacher, inputs))).abs().max()) > 1e-3
    before = stack_lengths(teacher)
    assert student.config.hfcompress["layers"] == {
        stack: [len(index), before[stack]] for stack, index in keep.items() if len(index) < before[stack]
    }
    student.save_pretrained(tmp_path)
    assert MODELING_FILE not in os.listdir(tmp_path)
    again = auto_class(name, task_class(name)).from_pretrained(tmp_path)
    assert torch.equal(predictions(run_model(again, inputs)), expected)


@pytest.mark.parametrize("name", KINDS)
def test_a_number_of_layers_spreads_them(name):
    teacher, inputs = teacher_of(name)
    student = make_student(teacher, layers=1)
    assert set(stack_lengths(student).values()) == {1}
    assert predictions(run_model(student, inputs)).isfinite().all()
    stacks = stack_lengths(teacher)
    if name in SHARED_LAYERS:
        assert student.config.num_hidden_layers == 1 and stack_lengths(student) == stacks
        return
    site = next(site for site in find_sites(teacher) if site.kind == "neurons" and site.layer == 0)
    path = site.readers[0]
    last = path.replace(".0.", f".{stacks[site.stack] - 1}.", 1) if name != "swin" else None
    weights = [model.get_submodule(p).weight for model, p in ((student, path), (teacher, path))]
    if name in FIRST_STAYS:
        assert torch.equal(*weights)
    elif last is not None:
        assert torch.equal(weights[0], teacher.get_submodule(last).weight) and not torch.equal(*weights)


def test_every_second_layer_and_the_two_ends():
    teacher = make_model("bert", num_hidden_layers=6)

    def layers_of(student):
        originals = [layer.output.dense.weight for layer in teacher.encoder.layer]
        found = [layer.output.dense.weight for layer in student.encoder.layer]
        return [next(n for n, w in enumerate(originals) if torch.equal(w, weight)) for weight in found]

    assert layers_of(make_student(teacher, layers=3)) == [1, 3, 5]
    assert layers_of(make_student(teacher, layers=4)) == [1, 2, 4, 5]
    assert layers_of(make_student(teacher, layers=[0, 2, 3])) == [0, 2, 3]
    t5 = make_model("t5", "AutoModelForSeq2SeqLM", num_layers=5, num_decoder_layers=3)
    student = make_student(t5, layers={"encoder": 3, "decoder": [0]})
    originals = [block.layer[1].DenseReluDense.wi.weight for block in t5.encoder.block]
    found = [block.layer[1].DenseReluDense.wi.weight for block in student.encoder.block]
    assert all(torch.equal(one, originals[n]) for one, n in zip(found, (0, 2, 4), strict=True))
    assert (student.config.num_layers, student.config.num_decoder_layers) == (3, 1)


def test_layers_that_share_their_weights_run_less_often(tmp_path):
    teacher, inputs = teacher_of("albert")
    student = make_student(teacher, layers=2)
    base = teacher.albert
    hidden = base.encoder.embedding_hidden_mapping_in(base.embeddings(inputs["input_ids"]))
    mask = (1.0 - inputs["attention_mask"][:, None, None, :].float()) * torch.finfo(torch.float32).min
    for _ in range(2):
        hidden = base.encoder.albert_layer_groups[0].albert_layers[0](hidden, mask)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    expected = teacher.classifier(base.pooler_activation(base.pooler(hidden[:, 0])))
    torch.testing.assert_close(run_model(student, inputs)["logits"], expected.detach(), atol=1e-5, rtol=1e-4)
    assert teacher.config.num_hidden_layers == 3
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    assert again.config.num_hidden_layers == 2


# ---- width ----


@pytest.mark.parametrize("name", CONFIGS)
def test_width_by_magnitude_is_what_cutting_gives_and_loads_plainly(name, tmp_path):
    teacher, inputs = teacher_of(name)
    state, config = state_of(teacher), teacher.config.to_dict()
    wanted = {"neurons": 24, "heads": 2, "hidden": 16}
    wanted = {key: n for key, n in wanted.items() if (key, name) not in {("heads", one) for one in NO_HEADS}}
    wanted = {key: n for key, n in wanted.items() if key != "hidden" or name not in NO_STREAM}
    student = make_student(teacher, **wanted)
    assert_untouched(teacher, state, config)
    before = {site.name: site for site in find_sites(teacher)}
    for site in find_sites(student):
        if site.kind == "neurons":
            assert site.units == min(24, before[site.name].units)
        elif "heads" in wanted:
            assert site.units * site.query_heads == min(2, before[site.name].units * before[site.name].query_heads)
    outputs = predictions(run_model(student, inputs))
    student.save_pretrained(tmp_path)
    again = auto_class(name, task_class(name)).from_pretrained(tmp_path)
    assert torch.equal(predictions(run_model(again, inputs)), outputs)
    complete = len(wanted) == 3 and name not in NOT_NATIVE
    if complete:
        assert MODELING_FILE not in os.listdir(tmp_path), "plain transformers has to load it"
        written = type(again.config).from_pretrained(tmp_path)
        assert written.hidden_size == 16 and not set(getattr(written, "hfcompress", {})) & {"units", "hidden"}
        assert_trains(student, inputs)


def test_the_families_that_load_plainly_are_most():
    narrow = [name for name in CONFIGS if name not in (*NO_STREAM, *NO_HEADS, *NOT_NATIVE)]
    assert len(narrow) >= 28


def test_the_largest_stay():
    """By hand, in a model where importance was planted."""
    teacher, inputs = teacher_of("bert")
    with torch.no_grad():
        for layer in teacher.bert.encoder.layer:
            attention = layer.attention
            for part in (attention.self.query, attention.self.key, attention.self.value):
                part.weight[8:24] *= 10  # heads 1 and 2 of 4
            layer.intermediate.dense.weight[[3, 30, 47]] *= 10
        for module in teacher.modules():
            if isinstance(module, torch.nn.Linear) and module.in_features == 32:
                module.weight[:, [1, 17]] *= 10
        teacher.bert.embeddings.word_embeddings.weight[:, 5] *= 100
    keep = {site.name: (1, 2) if site.kind == "heads" else (3, 30, 47) for site in find_sites(teacher)}
    expected = copy.deepcopy(teacher)
    cut(expected, Plan(keep))
    student = make_student(teacher, heads=2, neurons=3)
    assert largest_difference(run_model(student, inputs), run_model(expected, inputs)) < 1e-5
    assert student.config.hfcompress == expected.config.hfcompress
    narrow = make_student(teacher, hidden=3)
    table = teacher.bert.embeddings.word_embeddings.weight[:, [1, 5, 17]]
    assert torch.equal(narrow.bert.embeddings.word_embeddings.weight, table)
    assert narrow.config.hfcompress["hidden"] == [3, 32]


def test_layers_and_width_at_once_from_a_pruned_teacher():
    teacher, inputs = teacher_of("bert")
    keep = {"encoder.1.neurons": tuple(range(40)), "encoder.2.heads": (0, 3)}
    cut(teacher, Plan(keep))
    same = make_student(teacher)
    assert largest_difference(run_model(same, inputs), run_model(teacher, inputs)) < 1e-5
    assert same.config.hfcompress == teacher.config.hfcompress
    student = make_student(teacher, layers=[1, 2], neurons=30)
    assert student.config.hfcompress["layers"] == {"encoder": [2, 3]}
    assert student.config.hfcompress["units"] == {
        "encoder.0.neurons": [30, 48],
        "encoder.1.heads": [2, 4],
        "encoder.1.neurons": [30, 48],
    }


# ---- from a config ----


def test_a_whole_config_takes_what_fits():
    teacher, _ = teacher_of("bert")
    config = make_config("bert", num_hidden_layers=2, intermediate_size=20)
    student, copied = derive_student(teacher, config=config)
    assert student.config.intermediate_size == 20 and student.config is not config
    ours, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    fresh = set()
    for name, parameter in ours.items():
        number = {"0": "1", "1": "2"}  # of three layers the second and the last
        parts = name.split(".")
        origin = ".".join([*parts[:3], number[parts[3]], *parts[4:]]) if ".layer." in name else name
        if theirs[origin].shape == parameter.shape:
            assert torch.equal(parameter, theirs[origin])
        else:
            fresh.add(name)
    assert (
        fresh
        == set(copied.fresh)
        == {name for name in ours if "intermediate" in name or ".output.dense.w" in name}
        - {name for name in ours if "attention.output" in name}
    )
    assert copied.fresh_parameters == sum(ours[name].numel() for name in fresh) == 2 * (20 * 32 + 20 + 32 * 20)
    assert copied.parameters == count_parameters(student) - copied.fresh_parameters


@pytest.mark.parametrize("name", KINDS)
def test_the_same_config_copies_everything(name):
    teacher, inputs = teacher_of(name)
    student, copied = derive_student(teacher, config=teacher.config)
    assert (copied.fresh, copied.parameters) == ((), count_parameters(teacher))
    assert largest_difference(run_model(student, inputs), run_model(teacher, inputs)) < 1e-5
    random, copied = derive_student(teacher, initialize="random")
    assert copied.parameters == 0 and copied.fresh_parameters == count_parameters(random) == count_parameters(teacher)
    assert largest_difference(run_model(random, inputs), run_model(teacher, inputs)) > 1e-4


@pytest.mark.parametrize("name", ["bert", "t5", "bart", "llama", "vit", "qwen2"])
def test_fields_change_after_layers_were_chosen(name):
    teacher, _ = teacher_of(name)
    neurons = "d_ff" if name == "t5" else "encoder_ffn_dim" if name == "bart" else "intermediate_size"
    student, copied = derive_student(teacher, layers=1, config={neurons: 20})
    assert getattr(student.config, neurons) == 20 and set(stack_lengths(student).values()) == {1}
    assert copied.fresh and copied.parameters > copied.fresh_parameters
    torch.manual_seed(3)
    first = make_student(teacher, layers=1, config={neurons: 20}, initialize="random")
    torch.manual_seed(3)
    second = type(teacher)._from_config(copy.deepcopy(first.config))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_labels_in_another_order_and_other_labels():
    names = {0: "bad", 1: "fair", 2: "good"}
    teacher, inputs = teacher_of("bert", id2label=names, label2id={name: n for n, name in names.items()})
    expected = run_model(teacher, inputs)["logits"]
    turned = make_student(teacher, config={"id2label": {0: "good", 1: "bad", 2: "fair"}})
    torch.testing.assert_close(run_model(turned, inputs)["logits"], expected[:, [2, 0, 1]], rtol=0, atol=1e-6)
    assert turned.config.label2id == {"good": 0, "bad": 1, "fair": 2}
    other, copied = derive_student(teacher, config={"id2label": {0: "x", 1: "y", 2: "z"}})
    assert copied.fresh == ("classifier.weight", "classifier.bias") and copied.fresh_parameters == 3 * 33
    assert not torch.equal(other.classifier.weight, teacher.classifier.weight)
    fewer, copied = derive_student(teacher, config={"num_labels": 2})
    assert copied.fresh == ("classifier.weight", "classifier.bias") and fewer.num_labels == 2
    # Names that nobody gave say nothing.
    unnamed = make_config("bert", num_labels=3)
    assert torch.equal(make_student(teacher, config=unnamed).classifier.weight, teacher.classifier.weight)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5:gated", "bart", "bert"])
def test_padded_vocabularies_share_their_rows(name):
    teacher, inputs = teacher_of(name)
    student, copied = derive_student(teacher, config={"vocab_size": 104})
    ours, theirs = run_model(student, inputs)["logits"], run_model(teacher, inputs)["logits"]
    if name == "bert":
        assert torch.equal(ours, theirs)
    else:
        assert ours.shape[-1] == 104
        torch.testing.assert_close(ours[..., :100], theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(student.get_input_embeddings().weight[:100], teacher.get_input_embeddings().weight)
    is_tied = student.get_output_embeddings() is None or teacher.config.tie_word_embeddings
    assert copied.fresh_parameters == 4 * 32 * (1 if is_tied else 2)
    back = make_student(student, config={"vocab_size": 100})
    if name != "bert":
        torch.testing.assert_close(run_model(back, inputs)["logits"], theirs, rtol=1e-5, atol=1e-5)


def tokenizer(words):
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, "a"))
    )


def test_vocabularies():
    one, padded, other = (make_model("gpt2", "AutoModelForCausalLM", vocab_size=n) for n in (100, 104, 90))
    assert match_vocabularies(one, one) == match_vocabularies(padded, one) == match_vocabularies(one, padded) == 100
    with pytest.raises(ValueError, match=r"student \(100\) and teacher \(90\) differ: more than padding; .*loss: uld$"):
        match_vocabularies(one, other)
    words = [f"w{n}" for n in range(100)]
    full, short, turned = tokenizer(["a", *words[1:]]), tokenizer(["a", *words[1:80]]), tokenizer(["a", *words[:0:-1]])
    match = match_vocabularies
    assert match(one, padded, student_tokenizer=full, teacher_tokenizer=full) == 100
    assert match(one, other, student_tokenizer=short) == 90  # 80 tokens: the rest is padding in both
    with pytest.raises(ValueError, match="the tokenizer has 100 tokens"):
        match(one, other, teacher_tokenizer=full)
    with pytest.raises(ValueError, match=r"token 'w1' is 1 and 99; .*uld"):
        match(one, one, student_tokenizer=full, teacher_tokenizer=turned)
    with pytest.raises(ValueError, match="token 'w80' is 80 and absent"):
        match(one, one, student_tokenizer=full, teacher_tokenizer=short)
    with pytest.raises(ValueError, match="ViTForImageClassification has no vocabulary"):
        match(one, make_model("vit", "AutoModelForImageClassification"))


def test_whole_models_of_real_sizes_differ_by_padding():
    """Sizes of published models, without their weights."""
    with torch.device("meta"):
        models = {
            n: make_model_of(n) for n in (30_522, 30_527, 50_257, 50_265, 50_272, 50_304, 151_936, 152_064, 128_256)
        }
    assert match_vocabularies(models[50_265], models[50_272]) == 50_265
    assert match_vocabularies(models[152_064], models[151_936]) == 151_936
    for pair in ((30_522, 30_527), (50_257, 50_265), (128_256, 50_304)):
        with pytest.raises(ValueError, match="differ"):
            match_vocabularies(*(models[n] for n in pair))


def make_model_of(vocabulary):
    from transformers import BertModel

    return BertModel(BertConfig(vocab_size=vocabulary, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("name", "choices", "message"),
    [
        ("bert", {"layers": 4}, r"encoder: layers=4 is not allowed: the teacher has 3, so give 1 to 3"),
        ("bert", {"layers": 0}, r"layers=0 is not allowed"),
        ("bert", {"layers": [0, 5]}, "must be ascending, between 0 and 2"),
        ("bert", {"layers": {"decoder": 2}}, "no such stack: decoder; the model has encoder"),
        ("albert", {"layers": 9}, "the teacher has 3"),
        ("bert", {"heads": 5}, "heads=5 is not allowed: the teacher has 4"),
        ("bert", {"neurons": 49}, "neurons=49 is not allowed: the teacher has 48"),
        ("bert", {"hidden": 33}, "hidden=33 is not allowed: the teacher has 32"),
        ("llama", {"heads": 3}, "2 heads share a key, so give a multiple of 2"),
        ("bloom", {"heads": 2}, "heads of BloomForCausalLM cannot be cut"),
        ("swin", {"hidden": 8}, "hidden width"),
        ("bert", {"config": {"hiden_size": 8}}, r"BertConfig has no field 'hiden_size' \(did you mean hidden_size\?\)"),
        ("qwen2", {"config": {"num_hidden_layers": 2}}, "`num_hidden_layers` .2. must be equal"),
        ("bert", {"config": {"vocab_size": 77}}, r"student \(77\) and teacher \(100\) differ.*loss: uld"),
        ("bert", {"config": BertConfig(), "layers": 2}, "a whole config says layers already"),
        ("vit", {"config": BertConfig()}, "config is a BertConfig, the teacher's is a ViTConfig"),
        ("bert", {"initialize": "zeros"}, "initialize='zeros' is not allowed"),
    ],
)
def test_what_is_refused(name, choices, message):
    teacher, _ = teacher_of(name)
    state, config = state_of(teacher), teacher.config.to_dict()
    with pytest.raises(ValueError, match=message) as caught:
        make_student(teacher, **choices)
    assert "\n" not in str(caught.value)
    assert_untouched(teacher, state, config)


def test_only_whole_models_in_full_precision():
    from transformers import MambaConfig, MambaModel

    with pytest.raises(ValueError, match="is a Linear, which is no transformers model"):
        make_student(torch.nn.Linear(2, 2))
    with pytest.raises(StructureError, match="it has no attention"):
        make_student(MambaModel(MambaConfig(hidden_size=8, num_hidden_layers=2, vocab_size=9)), layers=1)
    quantized = make_model("bert")
    quantized.pooler.dense.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="the teacher is quantized"):
        make_student(quantized, layers=1)


def test_dtype_and_settings_of_generation_follow():
    teacher = make_model("gpt2", "AutoModelForCausalLM").to(torch.bfloat16)
    teacher.generation_config.max_new_tokens = 7
    for student in (make_student(teacher, layers=2), make_student(teacher, config={"n_inner": 16})):
        assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
        assert student.generation_config.max_new_tokens == 7
        assert student.generation_config is not teacher.generation_config


def test_hooks_stay_with_the_teacher():
    teacher, inputs = teacher_of("bert")
    seen = []
    teacher.bert.encoder.layer[0].register_forward_hook(lambda *_: seen.append(1))
    run_model(make_student(teacher, layers=2), inputs)
    assert seen == []
    run_model(teacher, inputs)
    assert seen == [1]


def test_layers_pair_by_depth_in_a_deeper_student():
    teacher = make_model("bert", num_hidden_layers=2)
    student = make_model("bert", num_hidden_layers=4, seed=1)
    copied = copy_weights(student, teacher)
    assert copied.fresh == ()
    weights = [layer.output.dense.weight for layer in teacher.encoder.layer]
    for layer, number in zip(student.encoder.layer, (0, 0, 1, 1), strict=True):
        assert torch.equal(layer.output.dense.weight, weights[number])
