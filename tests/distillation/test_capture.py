"""What is seen inside models while they run, for every architecture, against what they return when asked."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface

from hfcompress.anatomy import StructureError, find_layers
from hfcompress.distillation import Wanted, capture
from tests.families import CONFIGS, ONLY_EAGER, TWO_TOWERS, make_inputs, make_model

# Their attention is their own code, or one stored layer runs several times.
OWN_ATTENTION = ("deberta-v2", "deberta-v2:shared", "falcon", "falcon:mqa", "bloom", "mpnet")
OTHER_NUMBERS = ("albert", "albert:groups", "swin", *TWO_TOWERS)


def softmax_by_hand(seen) -> torch.Tensor:
    """Scores, position bias, cap, mask and softmax written out."""
    keys = seen.keys.repeat_interleave(seen.queries.shape[1] // seen.keys.shape[1], dim=1)
    scaling = seen.queries.shape[-1] ** -0.5 if seen.scaling is None else seen.scaling
    scores = torch.einsum("bhqd,bhkd->bhqk", seen.queries, keys) * scaling
    if seen.softcap is not None:
        scores = torch.tanh(scores / seen.softcap) * seen.softcap
    if seen.bias is not None:
        scores = scores + seen.bias
    if seen.mask is not None and seen.mask.dtype == torch.bool:
        scores = scores.where(seen.mask, torch.tensor(-1e30))
    elif seen.mask is not None:
        scores = scores + seen.mask
    elif seen.is_causal:
        scores = scores.where(torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), torch.tensor(-1e30))
    return scores.softmax(-1)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in OWN_ATTENTION])
def test_attention_as_eager_attention_returns_it(name: str) -> None:
    model = make_model(name, attention="eager" if name in ONLY_EAGER else "sdpa").eval()
    eager, inputs = make_model(name, attention="eager").eval(), make_inputs(name)
    numbers = frozenset(range(len(find_layers(model))))
    with torch.no_grad():
        plain = model(**inputs)
        with capture(model, Wanted(hidden=numbers, attention=numbers)) as seen:
            looked_at = model(**inputs)
        asked = eager(**inputs, output_attentions=True)
    assert seen.hidden.keys() == seen.attention.keys() == numbers
    for key, value in plain.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, looked_at[key]), "looking changes nothing"
    if name in OTHER_NUMBERS:
        return
    names = ("encoder_attentions", "attentions", "decoder_attentions")
    maps = [one for key in names for one in (asked.get(key) or ())]
    assert len(maps) == len(numbers) >= 2
    for number, expected in enumerate(maps):
        torch.testing.assert_close(softmax_by_hand(seen.attention[number]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_attention_of_their_own_is_refused_and_hidden_states_are_not(name: str) -> None:
    model, inputs = make_model(name).eval(), make_inputs(name)
    with capture(model, Wanted(hidden=frozenset({1}))) as seen:
        model(**inputs)
    assert seen.hidden[1].shape[-1] == 32
    with pytest.raises(StructureError, match="compare hidden states instead"):  # noqa: SIM117
        with capture(model, Wanted(attention=frozenset({1}))):
            model(**inputs)


def test_nothing_is_left_behind() -> None:
    model, inputs = make_model("bert").eval(), make_inputs("bert")
    with pytest.raises(RuntimeError, match="stop"), capture(model, Wanted(frozenset({0}), frozenset({0}))) as seen:
        model(**inputs)
        raise RuntimeError("stop")
    before = dict(seen.hidden), dict(seen.attention)
    model(**inputs)
    assert (seen.hidden, seen.attention) == before
    assert not any(module._forward_hooks for module in model.modules())
    plain = AttentionInterface.get_interface(AttentionInterface(), "sdpa", None)
    assert plain.__name__ == "sdpa_attention_forward"


def test_two_models_at_once() -> None:
    """Student and teacher may run inside each other's context: each sees its own."""
    one, other, inputs = make_model("bert", seed=0), make_model("bert", seed=1), make_inputs("bert")
    wanted = Wanted(attention=frozenset({2}))
    with capture(one, wanted) as first:
        with capture(other, wanted) as second:
            other(**inputs)
        one(**inputs)
    assert not torch.equal(first.attention[2].queries, second.attention[2].queries)
    assert first.attention[2].queries.requires_grad
