"""Looking at a model on sample data: layer by layer, its activations and the gradients of its own predictions."""

from hfcompress.calibration.frozen import frozen
from hfcompress.calibration.moments import (
    InputMoments,
    Moments,
    gram,
    linear_weight,
    output_gradients,
    set_linear_weight,
    step_moments,
)
from hfcompress.calibration.predictions import (
    Loss,
    batch_loss,
    count_examples,
    divergence,
    prediction_mask,
    self_loss,
)
from hfcompress.calibration.streaming import StreamedLayers, give_back_memory, stream_layers
from hfcompress.calibration.tokens import real_tokens, token_mask
from hfcompress.calibration.walk import Batch, LayerWalk, to_device, with_decoder

__all__ = [
    "Batch",
    "InputMoments",
    "LayerWalk",
    "Loss",
    "Moments",
    "StreamedLayers",
    "batch_loss",
    "count_examples",
    "divergence",
    "frozen",
    "give_back_memory",
    "gram",
    "linear_weight",
    "output_gradients",
    "prediction_mask",
    "real_tokens",
    "self_loss",
    "set_linear_weight",
    "step_moments",
    "stream_layers",
    "to_device",
    "token_mask",
    "with_decoder",
]
