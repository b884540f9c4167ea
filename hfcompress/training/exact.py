"""The base of all our trainers: a loss that is the same however a batch is split, and checkpoints that really load.

Plain transformers 5.19 to 5.23 multiplies the loss of BERT, RoBERTa and DistilBERT by the number of accumulated batches and
processes, and skips the weights of ViT and its kin on resume (their names on disk differ from those in memory).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hfcompress.anatomy import (
    Change,
    StructureError,
    drop_layers,
    family_of,
    find_sites,
    find_stream,
    keep_hidden,
    keep_units,
)
from hfcompress.anatomy.depth import layer_lists
from hfcompress.anatomy.sites import RECORD_VERSION, Stack, find_stacks
from hfcompress.checkpoints.adapters import save_record
from hfcompress.checkpoints.portable import MODELING_FILE
from hfcompress.checkpoints.record import read_units
from hfcompress.distillation.teachers import without_adapters
from hfcompress.hub import RouteCheck, save_probe, write_card
from hfcompress.hub.verify import require_loadable
from hfcompress.training.items import ItemCounts, count_items
from hfcompress.training.optimizers import rebuild_reducer, replace_parameters

if TYPE_CHECKING:
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object  # mixed into Trainer and Seq2SeqTrainer alike

logger = logging.getLogger(__name__)

TRAINING_ARGUMENTS_FILE = "training_args.json"


class ExactTrainerMixin(_TrainerBase):
    """Overrides of `Trainer` that every trainer of ours shares.

    * `get_batch_samples`: counts what losses are averaged over, for the whole optimizer step.
    * `compute_loss`: divides by these counts, so that accumulation and processes do not change the gradient.
    * `train`: adds what was done to the model's record.
    * `log`: adds the mean of each loss term since the last log.
    * `_load_from_checkpoint`, `_load_best_model`: load through `from_pretrained`, which knows names and shapes on disk.
    * `push_to_hub`, `create_model_card`: verify before they push, and write our card.
    * `_save`: writes the training arguments as JSON instead of a pickle.
    """

    # The loss is normalized over the accumulated batch; Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Releases without `loss_is_scaled_for_ga` ask this instead. It only says that counts are worth passing.
        self.model_accepts_loss_kwargs = True
        self._route_checks: list[RouteCheck] | None = None
        self._term_sums: dict[str, torch.Tensor] = {}
        self._terms_since_step = 0
        self._testing = False  # the loss is looked at as in training, with the model in eval mode
        if self.args.n_gpu > 1:
            logger.warning(
                "several GPUs are visible to one process; DataParallel is slow and breaks distillation, so one GPU is used. "
                "Start with `accelerate launch` to use all"
            )
            self.args._n_gpu = 1
            self._train_batch_size = self.args.train_batch_size
        self._warn_about_ignored_fsdp()

    def _warn_about_ignored_fsdp(self) -> None:
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not self.is_fsdp_enabled:
            logger.warning(
                "FSDP was asked for, but Accelerate ignores it on this device: plain data parallelism is used"
            )

    def _record_steps(self) -> None:
        """Add what this run did to the record in the model's config; the mixins each add their step."""

    def _begin_run(self) -> None:
        """Forget what an earlier call of `train` left, before a new one starts."""
        self._term_sums.clear()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does, then write down in the model's record what was done."""
        self._begin_run()
        output = super().train(*args, **kwargs)
        self._record_steps()
        return output

    def _examples(self, purpose: str) -> tuple[Any, Callable[[list[Any]], Any]]:
        """The training data, and what makes batches of them, as the data loader has them: without columns that go."""
        dataset, collate = self.train_dataset, self.data_collator
        if isinstance(dataset, datasets.Dataset):
            return self._remove_unused_columns(dataset, description=purpose), collate
        return dataset, self._get_collator_with_removed_columns(collate, description=purpose)

    # ---- loss ----

    @property
    def _predicts_next_token(self) -> bool:
        model = self.accelerator.unwrap_model(self.model)
        base = without_adapters(model)
        return type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and not base.config.is_encoder_decoder

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], ItemCounts]:
        """The batches of one optimizer step and the number of items in them, over all processes."""
        batches: list[Any] = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        counts = count_items(batches, shifted=self._predicts_next_token, device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
            return batches, ItemCounts.from_tensor(counts, scale=float(self.accelerator.num_processes))
        return batches, ItemCounts.from_tensor(counts)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Sum of the loss terms, each the mean over its items in the whole optimizer step.

        In evaluation the mean is over the batch at hand. Inputs are never changed.
        """
        if isinstance(num_items_in_batch, ItemCounts):
            counts = num_items_in_batch
        else:
            device = self.args.device
            counts = ItemCounts.from_tensor(count_items([inputs], shifted=self._predicts_next_token, device=device))
        outputs, terms = self._loss_terms(model, inputs, counts)
        if not terms:
            raise ValueError(
                f"there is no loss to train on: the batch has {', '.join(inputs)} and no labels, and nothing is distilled"
            )
        loss = torch.stack([term.float() for term in terms.values()]).sum() * counts.scale
        if model.training:
            self._add_up({name: term.detach() * counts.scale for name, term in terms.items()})
        return (loss, outputs) if return_outputs else loss

    def _loss_terms(
        self, model: nn.Module, inputs: Mapping[str, Any], counts: ItemCounts
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """Outputs of the model, and the loss terms by name; here only that of the labels."""
        outputs = self._run_model(model, inputs)
        task = self._task_loss(outputs, inputs, counts)
        return outputs, {} if task is None else {"task": task}

    def _run_model(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        custom = self.compute_loss_func is not None or self.label_smoother is not None
        return model(**{name: value for name, value in inputs.items() if not (custom and name == "labels")})

    def _task_loss(self, outputs: Any, inputs: Mapping[str, Any], counts: ItemCounts) -> torch.Tensor | None:
        """The loss on the labels as a sum over this batch divided by the labels of the optimizer step."""
        labels = inputs.get("labels")
        if self.compute_loss_func is not None:
            # The function is told how many items there are, as Trainer does, and has to divide by that itself.
            return self.compute_loss_func(outputs, labels, num_items_in_batch=counts.labels)
        shifted = self._predicts_next_token
        if self.label_smoother is not None and labels is not None:
            loss = self.label_smoother(outputs, labels, shift_labels=shifted)
        else:
            loss = outputs.get("loss") if isinstance(outputs, dict) else (outputs[0] if labels is not None else None)
        if loss is None:
            return None
        mean_over = count_items([inputs], shifted=shifted, device=loss.device)[1]
        # A batch whose labels are all ignored has no mean; it adds nothing.
        loss = torch.where(mean_over > 0, loss, torch.zeros_like(loss))
        return loss * mean_over / counts.labels.clamp(min=1)

    # ---- logs ----

    def _add_up(self, terms: Mapping[str, torch.Tensor]) -> None:
        if not self._term_sums:
            self._terms_since_step = self.state.global_step
        for name, value in terms.items():
            total = self._term_sums.get(name)
            self._term_sums[name] = value.float() if total is None else total + value.float()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, with the mean of each loss term since the last log as loss_<term>."""
        steps = self.state.global_step - self._terms_since_step
        if "loss" in logs and self._term_sums and steps > 0:
            names = sorted(self._term_sums)
            sums = torch.stack([self._term_sums[name] for name in names])
            values = (self.accelerator.reduce(sums, reduction="mean") / steps).tolist()
            if len(names) > 1:
                logs = {**logs, **{f"loss_{name}": value for name, value in zip(names, values, strict=True)}}
            self._term_sums.clear()
        super().log(logs, *args, **kwargs)

    # ---- checkpoints ----

    def _loads_plainly(self, model: nn.Module) -> bool:
        """Whether a checkpoint of this model is a folder that `from_pretrained` of its class reads."""
        return (
            isinstance(model, PreTrainedModel)
            and getattr(model, "quantization_method", None) is None
            and not getattr(model, "_hf_peft_config_loaded", False)
            and not self.is_deepspeed_enabled
            and not self.is_fsdp_enabled
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        if self._loads_plainly(target):
            changes = load_weights(target, resume_from_checkpoint)
            if changes and self.optimizer is not None:  # the user's own, or that of an earlier run
                replace_parameters(getattr(self.optimizer, "optimizer", self.optimizer), changes)
                rebuild_reducer(self.model_wrapped)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if not self._loads_plainly(self.model):
            super()._load_best_model()
            return
        logger.info("loading the best model from %s (score %s)", best, self.state.best_metric)
        load_weights(self.model, best)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir if output_dir is not None else self.args.output_dir)
            (folder / "training_args.bin").unlink(missing_ok=True)
            arguments = json.loads(self.args.to_json_string())
            for private in ("output_dir", "logging_dir"):  # paths of this machine
                arguments.pop(private, None)
            (folder / TRAINING_ARGUMENTS_FILE).write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")
            model = self.accelerator.unwrap_model(self.model)
            if without_adapters(model) is not model:
                save_record(model.config, folder)

    # ---- Hub ----

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push as Trainer does, after the saved folder loaded in fresh processes with the same outputs.

        Raises:
            VerificationError: It does not; nothing was pushed.
        """
        self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            save_probe(self.accelerator.unwrap_model(self.model), self.args.output_dir)
            self._route_checks = require_loadable(self.args.output_dir)
        return super().push_to_hub(*args, **kwargs)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,  # noqa: ARG002
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,  # noqa: ARG002
        dataset_args: str | list[str] | None = None,  # noqa: ARG002
    ) -> None:
        """Write our card in place of Trainer's: what was done, how to load it, what was measured."""
        if not self.is_world_process_zero():
            return
        evaluations = [entry for entry in self.state.log_history if any(key.startswith("eval_") for key in entry)]
        skipped = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
        scores = {
            name: value
            for name, value in (evaluations[-1] if evaluations else {}).items()
            if name.startswith("eval_") and not name.endswith(skipped)
        }
        write_card(
            self.args.output_dir,
            repo_id=self.hub_model_id or model_name,
            base_model=finetuned_from,
            checks=self._route_checks,
            scores=scores,
            language=language,
            license=license,
            tags=tags,
            datasets=dataset_tags,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer copies the files it knows from the checkpoint; a pruned model needs one more to load without hfcompress.
        source = Path(checkpoint_folder) / MODELING_FILE
        if self.is_world_process_zero() and source.is_file():
            shutil.copy(source, Path(self.args.output_dir) / MODELING_FILE)
        super()._push_from_checkpoint(checkpoint_folder)


def load_weights(model: PreTrainedModel, folder: str | Path) -> list[Change]:
    """Load a checkpoint into a live model, in place, cutting the model to the checkpoint's shapes first.

    Args:
        model: The model; its units, layers and hidden features may be more than the checkpoint's, never fewer.
        folder: A folder that `save_pretrained` wrote.

    Returns:
        The parameters that were replaced because they were cut, for an optimizer that holds the old ones.

    Raises:
        StructureError: The checkpoint is of another architecture or size, or holds more than the model has left.
        OSError: The folder holds no checkpoint.
    """
    # The class would read any config as its own.
    model_type = type(model.config).get_config_dict(folder)[0].get("model_type")
    if model_type != model.config.model_type:
        raise StructureError(f"{folder} holds a {model_type}, the model is a {model.config.model_type}")
    fresh = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True)
    changes = [] if _misfit(model, fresh) is None else _match_shapes(model, fresh, folder)
    misfit = _misfit(model, fresh)
    if misfit is not None:
        name, here, there = misfit
        raise StructureError(f"{folder} does not fit the model: {name} is {there} there and {here} here")
    model.load_state_dict(fresh.state_dict())
    record = getattr(fresh.config, "hfcompress", None)
    if record is not None:
        ours = getattr(model.config, "hfcompress", None) or {}
        model.config.hfcompress = {**record, **{key: ours[key] for key in ("units", "layers", "hidden") if key in ours}}
    return changes


def _misfit(model: nn.Module, fresh: nn.Module) -> tuple[str, Any, Any] | None:
    """The first name whose tensors differ in shape, with both shapes (None where there is no such tensor)."""
    ours, theirs = ({n: tuple(t.shape) for n, t in m.state_dict().items()} for m in (model, fresh))
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            return name, ours.get(name), theirs.get(name)
    return None


def _match_shapes(model: PreTrainedModel, fresh: PreTrainedModel, folder: str | Path) -> list[Change]:
    """Cut `model` to the layers, units and hidden features of `fresh`, in place, and record it."""
    try:
        family_of(model)
    except StructureError:
        return []  # an architecture without sites was never cut
    changes = _match_layers(model, fresh, folder)
    changes += _match_units(model, fresh, folder)
    return changes + _match_hidden(model, fresh, folder)


def _match_layers(model: PreTrainedModel, fresh: PreTrainedModel, folder: str | Path) -> list[Change]:
    """Drop layers that `fresh` does not have: those stay that have the units, and are of the kinds, that it has.

    Which ones matters no further, because their weights are loaded.
    """
    stacks = {stack.name: (stack, layers) for stack, _, layers in find_stacks(model, family_of(model)) or []}
    keep = {}
    for stack, _, layers in find_stacks(fresh, family_of(fresh)) or []:
        if stack.name not in stacks or len(layers) > len(stacks[stack.name][1]):
            has = len(stacks[stack.name][1]) if stack.name in stacks else 0
            raise StructureError(
                f"{folder} has {len(layers)} layers in {stack.name}, the model only {has}; start from the unpruned model"
            )
        if len(layers) == len(stacks[stack.name][1]):
            continue
        ours, theirs = (_kinds(m, stack, n) for m, n in ((model, len(stacks[stack.name][1])), (fresh, len(layers))))
        chosen = _subsequence(ours, theirs)
        if chosen is None:
            raise StructureError(
                f"{folder} has layers in {stack.name} that are of another kind than the model's, or have more units; start "
                "from the unpruned model"
            )
        keep[stack.name] = chosen
    return drop_layers(model, keep)


_Kind = tuple[tuple[Any, ...], dict[str, int]]


def _kinds(model: PreTrainedModel, stack: Stack, count: int) -> list[_Kind]:
    """For each layer, what the config's lists with one entry per layer say of it, and its units by role."""
    config = getattr(model.config, stack.config) if stack.config else model.config
    said = list(zip(*(getattr(config, name) for name in layer_lists(config, count)), strict=True)) or [()] * count
    units: list[dict[str, int]] = [{} for _ in range(count)]
    for site in find_sites(model):
        if site.stack == stack.name and site.layer is not None:
            units[site.layer][site.name.rpartition(".")[2]] = site.units
    return list(zip(said, units, strict=True))


def _subsequence(whole: Sequence[_Kind], part: Sequence[_Kind]) -> tuple[int, ...] | None:
    """The first indices of `whole`, ascending, whose layers are like those of `part`; None if there are none."""
    found, start = [], 0
    for said, units in part:
        fits = (
            n
            for n in range(start, len(whole))
            if whole[n][0] == said and all(whole[n][1].get(role, 0) >= left for role, left in units.items())
        )
        index = next(fits, None)
        if index is None:
            return None
        found.append(index)
        start = index + 1
    return tuple(found)


def _match_hidden(model: PreTrainedModel, fresh: PreTrainedModel, folder: str | Path) -> list[Change]:
    """Cut the hidden width to that of `fresh`, and record it."""
    if _misfit(model, fresh) is None:
        return []
    try:
        ours, left = find_stream(model), find_stream(fresh).width
    except StructureError:
        return []  # such an architecture was never cut; the caller says what differs
    if left > ours.width:
        raise StructureError(
            f"{folder} has {left} hidden features, the model only {ours.width}; start from the unpruned model"
        )
    changes = keep_hidden(model, torch.arange(left))
    if changes:
        record = getattr(model.config, "hfcompress", None) or {}
        model.config.hfcompress = {"version": RECORD_VERSION, **record, "hidden": [left, ours.before]}
    return changes


def _match_units(model: PreTrainedModel, fresh: PreTrainedModel, folder: str | Path) -> list[Change]:
    """Cut units to those of `fresh`, and record it."""
    sites = find_sites(model)
    left = {site.name: site.units for site in find_sites(fresh)}
    before = {site.name: site.units for site in sites} | {
        name: pair[1] for name, pair in read_units(model.config).items()
    }
    if left.keys() != {site.name for site in sites}:
        raise StructureError(f"{folder} has {len(left)} places to prune, the model {len(sites)}: they differ in layers")
    for site in sites:
        if left[site.name] > site.units:
            raise StructureError(
                f"{folder} has {left[site.name]} units in {site.name}, the model only {site.units}; start from the unpruned model"
            )
    changes = keep_units(
        model, sites, {site.name: torch.arange(left[site.name]) for site in sites if left[site.name] < site.units}
    )
    units = {name: [left[name], before[name]] for name in left if left[name] != before[name]}
    if units:
        record = dict(getattr(model.config, "hfcompress", None) or {"version": RECORD_VERSION})
        model.config.hfcompress = {**record, "units": units}
    return changes
