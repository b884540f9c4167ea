"""The trainers: `Trainer` and `Seq2SeqTrainer` with distillation, with pruning, and with both.

All arguments, callbacks and methods of transformers' trainers go on working. In a script two lines change:

    from hfcompress import CompressionTrainer, Recipe
    trainer = CompressionTrainer(model=student, teacher=teacher, recipe=Recipe.from_yaml("recipe.yaml"), args=args, ...)
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Seq2SeqTrainer, Trainer

from hfcompress.config import Recipe
from hfcompress.training.aware import QATMixin
from hfcompress.training.distilling import DistillationMixin
from hfcompress.training.exact import ExactTrainerMixin
from hfcompress.training.pruning import PruningMixin


class _Named:
    """Says which sections of the recipe a trainer serves, and refuses the others."""

    _serves: tuple[str, ...] = ()

    def __init__(self, model: nn.Module | None = None, *args: Any, recipe: Recipe | None = None, **kwargs: Any) -> None:
        if recipe is not None:
            for section in ("distill", "prune", "qat"):
                if getattr(recipe, section) is not None and section not in self._serves:
                    raise ValueError(
                        f"{type(self).__name__} does not do what the recipe's section {section!r} asks for; "
                        "use CompressionTrainer, or leave the section out"
                    )
            if not any(getattr(recipe, section) is not None for section in self._serves):
                raise ValueError(f"the recipe has none of the sections {type(self).__name__} serves: {self._serves}")
        super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]


class DistillationTrainer(DistillationMixin, _Named, Trainer):
    """`Trainer` with a teacher.

    Args:
        model: The student.
        teacher: The teacher, or where to load it from with the student's class. It is frozen in place.
        recipe: Its `distill` section says what is compared; without a recipe, the defaults of `DistillConfig`.
        **kwargs: Everything that `Trainer` takes.

    Raises:
        ValueError: No teacher, or one whose predictions cannot be compared with the student's.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> def model():
        ...     sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        ...     return BertForSequenceClassification(BertConfig(**sizes, vocab_size=20))
        >>> data = [{"input_ids": [3, 4, 5], "labels": 0}, {"input_ids": [6, 7, 8], "labels": 1}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = TrainingArguments(folder, max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
        ...     trainer = DistillationTrainer(model=model(), teacher=model(), args=args, train_dataset=data)
        ...     result = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        >>> result.global_step
        1
    """

    _serves = ("distill",)


class PruningTrainer(PruningMixin, _Named, Trainer):
    """`Trainer` that prunes heads and neurons gradually while it trains.

    Args:
        model: The model to prune, in place.
        recipe: Its `prune` section says what goes and when; without a recipe, the defaults of `PruneConfig`.
        **kwargs: Everything that `Trainer` takes.
    """

    _serves = ("prune",)


class CompressionTrainer(DistillationMixin, PruningMixin, QATMixin, _Named, Trainer):
    """`Trainer` that prunes, distils and trains with rounded weights, all at once or one of them.

    Args:
        model: The student, pruned in place.
        teacher: The teacher; needed if the recipe has a `distill` section.
        recipe: What to do: sections `distill`, `prune`, `qat`; without a recipe, the defaults of the first two.
        **kwargs: Everything that `Trainer` takes.
    """

    _serves = ("distill", "prune", "qat")

    def __init__(self, model: nn.Module | None = None, *args: Any, recipe: Recipe | None = None, **kwargs: Any) -> None:
        recipe = recipe if recipe is not None else Recipe.from_dict({"distill": {}, "prune": {}})
        super().__init__(model, *args, recipe=recipe, **kwargs)


class Seq2SeqDistillationTrainer(DistillationMixin, _Named, Seq2SeqTrainer):
    """`Seq2SeqTrainer` with a teacher; see `DistillationTrainer`."""

    _serves = ("distill",)


class Seq2SeqPruningTrainer(PruningMixin, _Named, Seq2SeqTrainer):
    """`Seq2SeqTrainer` that prunes; see `PruningTrainer`."""

    _serves = ("prune",)


class Seq2SeqCompressionTrainer(DistillationMixin, PruningMixin, QATMixin, _Named, Seq2SeqTrainer):
    """`Seq2SeqTrainer` that prunes, distils and trains with rounded weights; see `CompressionTrainer`."""

    _serves = ("distill", "prune", "qat")

    def __init__(self, model: nn.Module | None = None, *args: Any, recipe: Recipe | None = None, **kwargs: Any) -> None:
        recipe = recipe if recipe is not None else Recipe.from_dict({"distill": {}, "prune": {}})
        super().__init__(model, *args, recipe=recipe, **kwargs)


class PlainTrainer(ExactTrainerMixin, Trainer):
    """`Trainer` whose loss does not depend on accumulation and processes, and whose checkpoints load for every architecture.

    For teachers and baselines; takes what `Trainer` takes.
    """


class Seq2SeqPlainTrainer(ExactTrainerMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` with what `PlainTrainer` adds to `Trainer`."""
