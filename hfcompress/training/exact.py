"""The base of all our trainers: a loss that is the same however a batch is split, and checkpoints that really load.

Plain transformers 5.19 to 5.23 multiplies the loss of BERT, RoBERTa and DistilBERT by the number of accumulated batches and
processes, and skips the weights of ViT and its kin on resume (their names on disk differ from those in memory).
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import HfApi
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from hfcompress.anatomy import Change
from hfcompress.distillation.teachers import without_adapters
from hfcompress.hub import PushError, RouteCheck, save_probe, write_card
from hfcompress.hub.commit import create_repo, full_name, refuse_both, require_access
from hfcompress.hub.push import adapter_fields, push_base, send_folder, send_progress
from hfcompress.hub.verify import PROBE_FILE, require_loadable
from hfcompress.measurement.memory import memory_named, peak_memory_bytes
from hfcompress.training.items import ItemCounts, count_items
from hfcompress.training.sharded import ShardedMixin, class_of

logger = logging.getLogger(__name__)

# In the output folder, what is being pushed in the background; what begins with an underscore is never pushed itself.
PUSHING_FOLDER = "_pushing"


class NotFiniteError(ValueError):
    """A loss became infinite or not a number; the message is one line that names step and term."""


class ExactTrainerMixin(ShardedMixin):
    """Overrides of `Trainer` that every trainer of ours shares.

    * `get_batch_samples`: counts what losses are averaged over, for the whole optimizer step.
    * `create_optimizer`, `training_step`: care for what is trained beside the model.
    * `compute_loss`: divides by these counts, so that accumulation and processes do not change the gradient.
    * `train`: adds what was done to the model's record.
    * `log`: adds the mean of each loss term since the last log.
    * `push_to_hub`, `create_model_card`: verify before they push in one commit, and write our card.
    * `init_hf_repo`, `_push_from_checkpoint`: ask a busy Hub again, and push model and checkpoint together.
    """

    # The loss is normalized over the accumulated batch; Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Releases without `loss_is_scaled_for_ga` ask this instead. It only says that counts are worth passing.
        self.model_accepts_loss_kwargs = True
        self._route_checks: list[RouteCheck] | None = None
        self._adapter_base: str | None = None
        self._hub = HfApi()  # runs pushes in the background, one after the other
        self._term_sums: dict[str, torch.Tensor] = {}
        self._broken_at: dict[str, torch.Tensor] = {}
        self._beside: list[nn.Parameter] = []
        self._terms_since_step = 0
        self._testing = False  # the loss is looked at as in training, with the model in eval mode
        if self.args.n_gpu > 1:
            logger.warning(
                "several GPUs are visible to one process; DataParallel is slow and breaks distillation, so one GPU is used. "
                "Start with `accelerate launch` to use all"
            )
            self.args._n_gpu = 1
            self._train_batch_size = self.args.train_batch_size

    def _record_steps(self) -> None:
        """Add what this run did to the record in the model's config; the mixins each add their step."""

    def _begin_run(self) -> None:
        """Forget what an earlier call of `train` left, before a new one starts."""
        self._term_sums.clear()
        self._broken_at.clear()
        if self.is_world_process_zero():  # of a run that was killed
            shutil.rmtree(Path(str(self.args.output_dir)) / PUSHING_FOLDER, ignore_errors=True)

    def _run_facts(self) -> dict[str, Any]:
        sections = {"distill", "prune", "qat"}
        recipe = getattr(self, "recipe", None)
        return super()._run_facts() | {
            "recipe": None if recipe is None else recipe.model_dump(mode="json", include=sections, exclude_none=True)
        }

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does, then write down in the model's record what was done.

        Raises:
            CheckpointError: The checkpoint is damaged or belongs to another run.
            NotFiniteError: A loss term is not finite.
        """
        self._begin_run()
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        self._record_steps()
        return output

    # ---- what is trained beside the model ----

    def _kept_features(self) -> tuple[tuple[int, ...], int] | None:
        """The hidden features that pruning has left, counted in the model as it was at the start, and how many it had then; None for all."""
        return None

    def _follow_narrowing(self, kept: tuple[int, ...]) -> list[Change]:  # noqa: ARG002
        """After hidden features went: cut what is trained beside the model along. Returns what was replaced, for the optimizer.

        Args:
            kept: The features that stay, counted in the model as it was before.
        """
        return []

    def _make_beside(self) -> list[nn.Parameter]:
        """Make what is trained but is no part of the model, once the optimizer is there; the mixins each add theirs.

        Nothing wraps these parameters: their gradients are averaged over processes here, and what made them sets them to zero.
        """
        return []

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer as Trainer does, with a group for what is trained beside the model."""
        optimizer = super().create_optimizer(*(() if model is None else (model,)))
        self._beside = self._make_beside()
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        fresh = [parameter for parameter in self._beside if id(parameter) not in known]
        if fresh and self.sharding != "none":
            self._optimize_apart(fresh)
        elif fresh:
            optimizer.add_param_group({"params": fresh, "weight_decay": 0.0})
        return optimizer

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One batch forward and backward as in Trainer, and the gradients beside the model averaged over processes."""
        with memory_named(self._say_student_is_too_large):
            loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[arg-type]
        if self.args.world_size > 1 and self.accelerator.sync_gradients:
            for parameter in self._beside:
                if parameter.grad is not None:
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= self.args.world_size
        return loss

    def _examples(self, purpose: str) -> tuple[Any, Callable[[list[Any]], Any]]:
        """The training data, and what makes batches of them, as the data loader has them: without columns that go."""
        dataset, collate = self.train_dataset, self.data_collator
        if isinstance(dataset, datasets.Dataset):
            return self._remove_unused_columns(dataset, description=purpose), collate
        return dataset, self._get_collator_with_removed_columns(collate, description=purpose)

    def _say_student_is_too_large(self) -> str:
        return (
            f"step {self.state.global_step + 1}: the model that is trained ran out of memory. {self._smaller_batch}; "
            "or train with gradient_checkpointing, in bf16, or with shorter examples"
        )

    @property
    def _smaller_batch(self) -> str:
        batch, steps = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        less = max(batch // 2, 1)
        return (
            f"Use a smaller per_device_train_batch_size with more gradient_accumulation_steps, which gives the same result (now {batch} and "
            f"{steps}; try {less} and {steps * -(-batch // less)})"
        )

    def _example_batches(self, samples: int, *, own_part: bool, what: str, instead: str) -> list[Any]:
        """Batches of training examples, long with long: a random choice by seed, of which each process has its part, or all have all.

        Raises:
            ValueError: `what` needs examples that the dataset cannot give; `instead` says what to do.
        """
        if self.train_dataset is None or not hasattr(self.train_dataset, "__len__"):
            raise ValueError(
                f"{what} looks at examples by number, which a streamed dataset does not have; {instead}, or a dataset with a length"
            )
        total = len(self.train_dataset)  # type: ignore[arg-type]
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(self.args.seed))[:samples].tolist()
        if own_part:
            chosen = chosen[self.args.process_index :: self.args.world_size] or chosen[:1]
        dataset, collate = self._examples("calibration")
        examples = sorted((dataset[index] for index in chosen), key=_size)
        batch = max(1, self.args.per_device_eval_batch_size)
        return [collate(examples[start : start + batch]) for start in range(0, len(examples), batch)]

    # ---- loss ----

    @property
    def _predicts_next_token(self) -> bool:
        model = self.accelerator.unwrap_model(self.model)
        base = without_adapters(model)
        name = class_of(base).__name__
        return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and not base.config.is_encoder_decoder

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
            self._watch(name, value)
        if any(value.device.type == "cpu" for value in terms.values()):
            self._require_finite_terms()

    def _watch(self, name: str, value: torch.Tensor) -> None:
        """Note the first step whose term is not finite, without waiting for the device."""
        if getattr(self.accelerator, "scaler", None) is not None:
            return  # in float16 a step that overflows is left out and the scale is lowered
        step = torch.full((), float(self.state.global_step + 1), device=value.device)
        bad = torch.where(torch.isfinite(value), torch.inf, step)
        before = self._broken_at.get(name)
        self._broken_at[name] = bad if before is None else torch.minimum(before, bad)

    def _require_finite_terms(self) -> None:
        found = {name: float(step) for name, step in self._broken_at.items() if float(step) < float("inf")}
        if found:
            name, step = min(found.items(), key=lambda item: item[1])
            raise NotFiniteError(
                f"step {step:.0f}: the loss term {name} is not finite, so training stopped and nothing was saved since; lower learning_rate "
                "or max_grad_norm, use bf16 in place of fp16, or look at the examples, and go on from the last checkpoint"
            )

    def _require_finite(self) -> None:
        self._require_finite_terms()
        super()._require_finite()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, with the mean of each loss term since the last log as loss_<term>, and the most memory held so far."""
        self._require_finite_terms()
        if "loss" in logs:
            logs = {**logs, "peak_memory_mb": round(peak_memory_bytes(self.args.device) / 1e6)}
        steps = self.state.global_step - self._terms_since_step
        if "loss" in logs and self._term_sums and steps > 0:
            names = sorted(self._term_sums)
            sums = torch.stack([self._term_sums[name] for name in names])
            values = (self.accelerator.reduce(sums, reduction="mean") / steps).tolist()
            if len(names) > 1:
                logs = {**logs, **{f"loss_{name}": value for name, value in zip(names, values, strict=True)}}
            self._term_sums.clear()
        super().log(logs, *args, **kwargs)

    # ---- Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, as Trainer does when training is to be pushed, so that what is refused is refused at once.

        Raises:
            PushError: The Hub refused, or cannot be reached.
        """
        if self.is_world_process_zero():
            private = self.args.hub_private_repo if private is None else private
            self.hub_model_id = create_repo(self._repo_name, private=private, token=token or self.args.hub_token)
            self.push_in_progress = None

    @property
    def _repo_name(self) -> str:
        return str(self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Push as Trainer does, in one commit, after the saved folder loaded in fresh processes with the same outputs.

        Args:
            commit_message: Of the commit.
            blocking: Wait for the upload; the folder is verified before this returns in any case.
            token: Instead of `args.hub_token`.
            revision: Branch, instead of `args.hub_revision`.
            private: Make the repository private if it is created now, instead of `args.hub_private_repo`.
            create_pr: Open a pull request instead of committing.
            **kwargs: For `create_model_card`.

        Returns:
            The commit, or a future of it if not `blocking`; None on all processes but the first.

        Raises:
            VerificationError: It does not load as the card would promise; nothing was pushed.
            PushError: The Hub refused, or cannot be reached.
        """
        revision = revision if revision is not None or create_pr else self.args.hub_revision
        refuse_both(revision, create_pr)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        token = token or self.args.hub_token
        self.hub_model_id = full_name(self._repo_name, token)
        require_access(self.hub_model_id, create_pr=create_pr, token=token)
        folder = Path(str(self.args.output_dir))
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # one process alone cannot run the model
            (folder / PROBE_FILE).unlink(missing_ok=True)
        else:
            save_probe(self.accelerator.unwrap_model(self.model), folder)
        self._route_checks = require_loadable(folder)
        where: dict[str, Any] = {
            "token": token,
            "revision": revision,
            "private": self.args.hub_private_repo if private is None else private,
            "create_pr": create_pr,
            "message": commit_message or "End of training",
        }
        self._adapter_base = push_base(folder, self.hub_model_id, **where)
        kwargs.setdefault("model_name", self.hub_model_id.rpartition("/")[2])
        own_tags = getattr(self.model, "model_tags", None) or []
        given = kwargs.pop("tags", None) or []
        kwargs["tags"] = list(dict.fromkeys([*([given] if isinstance(given, str) else given), *own_tags])) or None
        self.create_model_card(**kwargs)
        send = functools.partial(send_folder, folder, self.hub_model_id, base=self._adapter_base, **where)
        return send() if blocking else self._hub.run_as_future(send)

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
            checks=self._route_checks,
            scores=scores,
            language=language,
            license=license,
            tags=tags,
            datasets=dataset_tags,
            **({"base_model": finetuned_from} | adapter_fields(self._adapter_base)),
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push what a checkpoint holds in the background, model and checkpoint in one commit; training goes on whatever comes of it.

        In contrast to the last push nothing is verified and nothing promised: the card says that training was not over.
        """
        if self._staging or not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not (self.args.hub_always_push or self.push_in_progress is None or self.push_in_progress.is_done()):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        source, step = Path(checkpoint_folder), self.state.global_step
        stage = Path(str(self.args.output_dir)) / PUSHING_FOLDER / source.name  # the checkpoint may be rotated away
        shutil.rmtree(stage, ignore_errors=True)
        shutil.copytree(source, stage, copy_function=_link_or_copy)
        places = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: source.name}
        place = places.get(HubStrategy(self.args.hub_strategy))
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        when = f"step {step}" if by_steps else f"epoch {int(self.state.epoch or 0)}"
        repo, token, revision = self._repo_name, self.args.hub_token, self.args.hub_revision

        def push() -> None:
            try:
                send_progress(
                    stage,
                    repo,
                    step=step,
                    checkpoint=None if place is None else (place, stage),
                    message=f"Training in progress, {when}",
                    token=token,
                    revision=revision,
                )
            except (PushError, ValueError, OSError) as error:
                logger.warning("training goes on, but the state of step %d is not on the Hub: %s", step, error)
            finally:
                shutil.rmtree(stage, ignore_errors=True)

        running: list[Any] = (
            [] if self.push_in_progress is None else [job for job in self.push_in_progress.jobs if not job.done()]
        )
        self.push_in_progress = PushInProgress([*running, self._hub.run_as_future(push)])


def _link_or_copy(source: str, target: str) -> None:
    """A second name for a file that nobody writes to any more; a copy where the disk knows no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _size(example: Any) -> int:
    """Length of a text, for batches with little padding."""
    ids = example.get("input_ids") if hasattr(example, "get") else None
    return len(ids) if ids is not None else 0
