"""A recipe from beginning to end: teacher, student, quantized variants, measurement, cards, push.

Each stage writes its folder and leaves a mark; started again, a run goes on where it was. Training may use several processes;
what comes after is done by the first alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from hfcompress.checkpoints.adapters import read_config
from hfcompress.checkpoints.damage import damage_named
from hfcompress.checkpoints.io import load
from hfcompress.config import (
    AssistantConfig,
    DataConfig,
    DistillConfig,
    ModelConfig,
    QuantizeConfig,
    Recipe,
    RecipeError,
    RecoverConfig,
    Target,
)
from hfcompress.distillation import make_student
from hfcompress.hub import push_folder, save_probe, verify_folder, write_card
from hfcompress.hub.contract import ContractError, Status, best_verdict, describe, judge, verdict
from hfcompress.hub.lineage import describe_source
from hfcompress.hub.picture import curves_of, save_tradeoff_picture
from hfcompress.hub.predictions import PREDICTIONS_FILE
from hfcompress.hub.report import REPORT_FILE
from hfcompress.hub.results import RESULTS_FILE, public_name, read_results, repository_of, without_paths
from hfcompress.hub.verify import VerificationError
from hfcompress.measurement import Metric, provenance
from hfcompress.measurement.provenance import hide_secrets
from hfcompress.quantization import (
    DYNAMIC,
    add_adapters,
    own_device_map,
    quantize,
    refit_weights,
    require_dynamic,
    without_dropout,
)
from hfcompress.runs.arguments import training_arguments
from hfcompress.runs.examples import drop
from hfcompress.runs.fresh import run_fresh
from hfcompress.runs.processors import copy_processor
from hfcompress.runs.quantizing import quantize_folder
from hfcompress.runs.teaching import CACHE_FOLDER, open_teachers
from hfcompress.runs.vocabulary import counts_in, cut_for
from hfcompress.tasks import PreparedTask, prepare
from hfcompress.tasks.writing import WritingScores
from hfcompress.training import (
    CompressionTrainer,
    DistillationTrainer,
    PlainTrainer,
    Seq2SeqCompressionTrainer,
    Seq2SeqDistillationTrainer,
    Seq2SeqPlainTrainer,
)
from hfcompress.training.pruning import goal_folder
from hfcompress.training.sharded import digest, loading_whole

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"
TEACHER, STUDENT = "teacher", "student"
SMALLER = "teacher-vocabulary"  # the teacher with the student's vocabulary
_DONE, _HISTORY = "done.json", "history.json"
_POINTS = 200  # of a curve, in results.json
TRADEOFF_FILE = "tradeoff.png"


class Run:
    """One run of a recipe in its folder.

    Args:
        recipe: With `task`, `data`, `output`, and `model` or `teacher`.
        command: What was typed, for the card.
        restart: Throw away what an earlier run left in the folder.

    Raises:
        RecipeError: A section that the run needs is missing, or the folder holds a run of another recipe.
    """

    def __init__(self, recipe: Recipe, *, command: str, restart: bool = False) -> None:
        self.recipe = with_default_speedups(recipe)
        self.command = command
        self.verdict: Status = "met"
        self.data, self.task_name, self.output = self._require()
        self.state = PartialState() if torch.accelerator.is_available() or not _several() else PartialState(cpu=True)
        if self.state.is_main_process:
            self._claim_output(restart)
        self.state.wait_for_everyone()

    def _require(self) -> tuple[DataConfig, str, Path]:
        recipe = self.recipe
        for section in ("task", "data", "output"):
            if getattr(recipe, section) is None:
                raise RecipeError(f"the recipe needs {section} to be run")
        if recipe.model is None and (recipe.teacher is None or recipe.teacher.name is None):
            raise RecipeError(
                "the recipe needs model.name (to fine-tune and compress) or teacher.name (already fine-tuned)"
            )
        if not any((recipe.distill, recipe.prune, recipe.qat, recipe.quantize)):
            raise RecipeError("the recipe asks for nothing: add distill, prune, qat or quantize")
        if self._cuts_vocabulary():
            self._refuse_vocabularies()
        for preset in recipe.quantize.presets if recipe.quantize is not None else ():
            if preset in DYNAMIC:
                require_dynamic(preset)
        assert recipe.data is not None and recipe.task is not None and recipe.output is not None
        return recipe.data, recipe.task, Path(recipe.output)

    def _refuse_vocabularies(self) -> None:
        """Say what does not go with a smaller vocabulary.

        Raises:
            RecipeError: One line that says what, and what to do instead.
        """
        recipe = self.recipe
        if recipe.task is None or recipe.task.startswith(("image", "audio")):
            raise RecipeError(f"prune.units: vocabulary is for texts, and {recipe.task} has none; leave it out")
        if recipe.task == "feature-extraction":
            raise RecipeError(
                "prune.units: vocabulary and feature-extraction do not go together yet, whose score compares outputs text by text in the "
                "same tokens; cut the teacher with hfcompress vocabulary first"
            )
        names = recipe.teacher.names if recipe.teacher is not None else []
        if len(names) > 1 or (names and recipe.model is not None):
            raise RecipeError(
                "prune.units: vocabulary cuts the one teacher, whose copy the student is; name either model or one teacher, or cut each with "
                "hfcompress vocabulary first"
            )

    def _claim_output(self, restart: bool) -> None:
        path = self.output / RECIPE_FILE
        restarted = restart and path.is_file()
        if restarted:
            self._forget()
        if path.is_file():
            if path.read_text(encoding="utf-8") != self.recipe.to_yaml():
                raise RecipeError(
                    f"{self.output} holds a run of another recipe ({path}); give another output, or start anew with --restart"
                )
        elif not restarted and self.output.is_dir() and any(self.output.iterdir()):
            raise RecipeError(f"{self.output} is not empty and holds no run; give another output")
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            path.write_text(self.recipe.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"{self.output} cannot be written: {error.strerror}") from None

    def _forget(self) -> None:
        """Remove what a run leaves in its folder, and nothing else that may be there."""
        marks = list(self.output.glob(f".*.{_DONE}"))
        names = {TEACHER, STUDENT, *(mark.name[1:].removesuffix(f".{_DONE}") for mark in marks)}
        for name in sorted(names):
            for folder in (self.output / name, self.output / f"{name}-checkpoints"):
                shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(self.output / CACHE_FOLDER, ignore_errors=True)
        files = (RECIPE_FILE, RESULTS_FILE, PREDICTIONS_FILE, TRADEOFF_FILE, REPORT_FILE)
        logs = self.output.glob(f".*.{_HISTORY}")
        for path in (*marks, *logs, *(self.output / name for name in files)):
            path.unlink(missing_ok=True)

    # ---- stages ----

    def run(self) -> list[dict[str, Any]] | None:
        """All stages. Returns the rows of the table on the main process, None on the others."""
        task = self.prepare()
        with loading_whole():
            teacher = self.make_teacher(task)
        if self._cuts_vocabulary():
            task, teacher = self.cut_vocabulary(task)
        if self.recipe.distill or self.recipe.prune or self.recipe.qat:
            self.make_student(task, teacher)
            models = {TEACHER: self._teacher_folder(), **self._goal_folders(), "student": self.output / STUDENT}
        else:
            models = {TEACHER: self._teacher_folder()}
        self.state.wait_for_everyone()
        name = "pruned" if self.recipe.prune is not None else "distilled" if self.recipe.distill else "trained"
        if self.recipe.qat is not None:
            name += f" in {self.recipe.qat.format}"
        models = {name if key == "student" else key: folder for key, folder in models.items()}
        models |= self.make_quantized(next(reversed(models)), next(reversed(models.values())), task)
        if not self.state.is_main_process:
            return None
        rows = self.measure(models)
        self.judge(rows)
        self._complete(rows)
        self.write_cards(models, rows)
        if self._goal_folders():
            self._draw(rows)
        self._choose(rows, models)
        if self.recipe.push is not None:
            self.push(models)
        return rows

    def _goal_folders(self) -> dict[str, Path]:
        """The models that a run with several targets leaves on its way, the last target's excepted."""
        target = self._target()
        if target is None:
            return {}
        names = {
            f"pruned {_goal(target.quantity, goal)}": goal_folder(target.quantity, goal) for goal in target.goals[:-1]
        }
        return {name: self.output / f"{STUDENT}-{folder}" for name, folder in names.items()}

    def _target(self) -> Target | None:
        return self.recipe.prune.target if self.recipe.prune is not None else None

    def _draw(self, rows: list[dict[str, Any]]) -> None:
        """Score against latency of everything that was measured."""
        ends = ("value", "low", "high")
        points = [(r["name"], r["latency"]["median_ms"], *(r["metric"][end] for end in ends)) for r in rows]
        save_tradeoff_picture(points, self.output / TRADEOFF_FILE, metric=rows[0]["metric"]["name"])
        self._say(f"Score against latency is drawn in {self.output / TRADEOFF_FILE}")

    def _choose(self, rows: list[dict[str, Any]], models: dict[str, Path]) -> None:
        """Say which model is the fastest that loses no more than the recipe allows."""
        target = self._target()
        if target is None or target.max_drop is None:
            return
        lost = {row["name"]: drop(Metric(**rows[0]["metric"]), Metric(**row["metric"])) for row in rows[1:]}
        within = [row for row in rows[1:] if lost[row["name"]] <= target.max_drop]
        if not within:
            least = min(rows[1:], key=lambda row: lost[row["name"]])["name"]
            self._say(f"No model loses {target.max_drop} points or less; the least is lost by {least}")
            return
        best = max(within, key=lambda row: row["speedup"]["median"])
        facts = f"{best['speedup']['median']:.2f}x, {lost[best['name']]:.2f} lost"
        self._say(f"The fastest that loses at most {target.max_drop}: {models[best['name']]} ({facts})")

    def _cuts_vocabulary(self) -> bool:
        return self.recipe.prune is not None and "vocabulary" in self.recipe.prune.units

    def cut_vocabulary(self, task: PreparedTask) -> tuple[PreparedTask, nn.Module]:
        """Cut the vocabulary of the teacher to what the training data use; the task in these tokens, and the model to start from.

        Teacher and student then read and predict the same tokens. Texts all of whose tokens stayed give what they gave before.
        """
        assert self.recipe.prune is not None
        folder = self.output / SMALLER
        if self.state.is_main_process and not self._is_done(SMALLER):
            shutil.rmtree(folder, ignore_errors=True)
            vocabulary = task.processing_class.get_vocab()
            columns = ["input_ids", *(["labels"] if task.generates else [])]
            counts = counts_in(task.train_dataset, max(vocabulary.values()) + 1, columns=columns)
            done = cut_for(self._teacher_folder(), [], folder, self.recipe.prune, counts=counts)
            self._say(f"The vocabulary keeps {done.tokens[1]:,} of {done.tokens[0]:,} tokens")
            self._mark_done(SMALLER)
        self.state.wait_for_everyone()
        task = self.prepare(ModelConfig(name=str(folder)))
        with loading_whole(), damage_named(folder):
            teacher = getattr(transformers, task.auto_class).from_pretrained(folder, dtype=torch.float32)
        if self.recipe.model is not None:
            return task, self._named(teacher)
        teacher.config._name_or_path = self._named_teacher()
        return task, teacher

    def _taught_folder(self) -> Path:
        """What the student learns from."""
        return self.output / SMALLER if self._cuts_vocabulary() else self._teacher_folder()

    def prepare(self, model: ModelConfig | None = None) -> PreparedTask:
        """Read and encode the data, for the recipe's model or another one."""
        recipe = self.recipe
        source = model or recipe.model or ModelConfig(name=str(self._named_teacher()))
        teacher_labels = None
        named = self._named_teacher()
        if named is not None and recipe.model is not None:
            names = read_config(named).id2label
            teacher_labels = [names[number] for number in sorted(names)]
        return prepare(
            self.data,
            task=self.task_name,
            model_name=source.name,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            seed=recipe.seed,
            must_match=model is not None or recipe.model is None,
            label_names=teacher_labels,
            main_first=self.state.main_process_first,
        )

    def _teacher_folder(self) -> Path:
        named = self._named_teacher()
        return Path(named) if named is not None and Path(named).is_dir() else self.output / TEACHER

    def _named_teacher(self) -> str | None:
        """The fine-tuned model that the recipe names; of several the first."""
        names = self.recipe.teacher.names if self.recipe.teacher is not None else []
        return names[0] if names else None

    def make_teacher(self, task: PreparedTask) -> nn.Module:
        """The fine-tuned model to start from and to be measured against: loaded if the recipe names one, else trained."""
        named = self._named_teacher()
        folder = self.output / TEACHER
        cls = getattr(transformers, task.auto_class)
        if named is not None:
            with damage_named(named):
                teacher = cls.from_pretrained(named, dtype=torch.float32)
            if not Path(named).is_dir() and self.state.is_main_process:
                teacher.save_pretrained(folder)  # measured from disk like every other model
                copy_processor(named, folder)
            return teacher
        assert self.recipe.model is not None
        if self._is_done(TEACHER):
            logger.info("the teacher in %s is there already", folder)
            with damage_named(folder):
                return self._named(cls.from_pretrained(folder, dtype=torch.float32))
        if not task.label_columns:
            self._say(f"{self.recipe.model.name} is the teacher as it is: the task has no labels to fine-tune it on")
            return self._named(self._keep(TEACHER, task, self._start(task)))
        self._say(f"Fine-tuning {self.recipe.model.name} as the teacher")
        settings = {**self.recipe.train, **(self.recipe.teacher.train if self.recipe.teacher is not None else {})}

        def make(args: Any, common: dict[str, Any]) -> Any:
            trainer = Seq2SeqPlainTrainer if task.generates else PlainTrainer
            return trainer(model=self._start(task), args=args, **common)

        return self._named(self._train(TEACHER, task, make, settings))

    def _named(self, teacher: nn.Module) -> nn.Module:
        """The fine-tuned teacher, under the name of what it was made from, for the record."""
        assert self.recipe.model is not None
        teacher.config._name_or_path = self.recipe.model.base_model or self.recipe.model.name  # type: ignore[union-attr]
        return teacher

    def _start(self, task: PreparedTask) -> nn.Module:
        """The recipe's model with the task's head."""
        assert self.recipe.model is not None
        transformers.set_seed(self.recipe.seed)  # the head is initialised at random
        with damage_named(self.recipe.model.name):
            return getattr(transformers, task.auto_class).from_pretrained(
                self.recipe.model.name,
                revision=self.recipe.model.revision,
                trust_remote_code=self.recipe.model.trust_remote_code,
                dtype=torch.float32,
                **task.model_kwargs,
            )

    def make_student(self, task: PreparedTask, teacher: nn.Module) -> nn.Module:
        """The compressed model: starts from the teacher's weights, or from the recipe's model if both are named."""
        folder = self.output / STUDENT
        if self._is_done(STUDENT):
            logger.info("the student in %s is there already", folder)
            return load(folder)
        recipe = self.recipe
        teacher_folder = self._taught_folder()
        if recipe.distill is not None:
            teacher_folder = self.make_assistants(task, teacher)
        doing = [
            word
            for word, section in (("pruning", recipe.prune), ("distilling", recipe.distill), ("quantizing", recipe.qat))
            if section is not None
        ]
        self._say(f"{', '.join(doing).capitalize()}: training the student")

        def make(args: Any, common: dict[str, Any]) -> Any:
            student = self._first_student(task, teacher)
            learn_from = (
                open_teachers(recipe, teacher_folder, student, args, task, self.output)
                if recipe.distill is not None
                else None
            )
            compressing = Seq2SeqCompressionTrainer if task.generates else CompressionTrainer
            return compressing(model=student, teacher=learn_from, recipe=recipe, args=args, **common)

        return self._train(STUDENT, task, make, recipe.train)

    def _first_student(self, task: PreparedTask, teacher: nn.Module) -> nn.Module:
        """What the student is before it is trained: the recipe's own model, or the teacher or a part of it."""
        recipe = self.recipe
        if recipe.student is not None:
            transformers.set_seed(recipe.seed)
            return make_student(teacher, **recipe.student.model_dump())  # type: ignore[arg-type]
        both = recipe.model is not None and self._named_teacher() is not None
        return self._start(task) if both else copy.deepcopy(teacher)

    def make_assistants(self, task: PreparedTask, teacher: nn.Module) -> Path:
        """The models between teacher and student, each distilled from the one before. Returns the folder of the last."""
        before = self._taught_folder()
        config = self.recipe.teacher
        for number, assistant in enumerate(config.assistants if config is not None else [], start=1):
            name = f"assistant-{number}"
            if not self._is_done(name):
                self._say(f"Distilling assistant {number} of {assistant.layers} layers from {before.name}")
                self._make_assistant(name, assistant, task, teacher, taught=before)
            before = self.output / name
        return before

    def _make_assistant(
        self, name: str, config: AssistantConfig, task: PreparedTask, teacher: nn.Module, *, taught: Path
    ) -> None:
        plain = Recipe(distill=self.recipe.distill, data=self.recipe.data, teacher=self.recipe.teacher)

        def make(args: Any, common: dict[str, Any]) -> Any:
            student = make_student(teacher, layers=config.layers)  # type: ignore[arg-type]
            learn_from = open_teachers(plain, taught, student, args, task, self.output / f"{name}-checkpoints")
            trainer = Seq2SeqDistillationTrainer if task.generates else DistillationTrainer
            return trainer(model=student, teacher=learn_from, recipe=plain, args=args, **common)

        self._train(name, task, make, {**self.recipe.train, **config.train})

    def _train(
        self,
        name: str,
        task: PreparedTask,
        make: Callable[[Any, dict[str, Any]], Any],
        settings: dict[str, Any],
        section: str = "teacher.train",
    ) -> nn.Module:
        """Train one model, going on from its last checkpoint if there is one, and save it."""
        checkpoints = self.output / f"{name}-checkpoints"
        section = "train" if name == STUDENT else section
        args = self._arguments(task, checkpoints, settings, section)
        common = {
            "train_dataset": task.train_dataset,
            "eval_dataset": task.eval_dataset,
            "processing_class": task.processing_class,
            "data_collator": task.data_collator,
            "compute_metrics": task.compute_metrics,
            "preprocess_logits_for_metrics": task.preprocess_logits_for_metrics,
        }
        with loading_whole():
            trainer = make(args, common)
        last = trainer.find_checkpoint()
        if last is not None:
            self._say(f"Going on from {last}")
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        trainer.save_model(str(self.output / name))
        if self.state.is_main_process:
            log = json.dumps(_thinned(trainer.state.log_history))
            (self.output / f".{name}.{_HISTORY}").write_text(log, encoding="utf-8")
        if name == STUDENT and self.state.is_main_process:
            self._collect_goals(checkpoints)
        self._require_agreement(trainer)
        model = self._trained_model(name, trainer)
        if name == STUDENT and self._stored_dtype() is not None:
            if self.state.is_main_process:
                self._store_like_the_teacher(self.output / name)
            self.state.wait_for_everyone()
            model = load(self.output / name)
        self._finish(name, model)
        return model

    def _stored_dtype(self) -> torch.dtype | None:
        """The 16 bits in which the teacher came that the student was made from; None if there are no such."""
        named = self._named_teacher()
        if named is None or self.recipe.model is not None or self.recipe.qat is not None:
            return None
        dtype = read_config(named).dtype
        return dtype if dtype in (torch.bfloat16, torch.float16) else None

    def _store_like_the_teacher(self, folder: Path) -> None:
        """Training needs 32 bits; a file of them would be twice as large as the teacher's, and compared with it unfairly."""
        dtype = self._stored_dtype()
        if dtype is not None:
            load(folder, dtype=dtype).save_pretrained(folder)  # type: ignore[operator]

    def _arguments(self, task: PreparedTask, output: Path, settings: dict[str, Any], section: str) -> Any:
        """The training arguments of a stage, with what the task asks for.

        Raises:
            RecipeError: The recipe asks for what the task cannot do.
        """
        scores = task.compute_metrics
        if scores.in_order and settings.get("train_sampling_strategy") == "group_by_length":
            raise RecipeError(
                f"{section}.train_sampling_strategy: group_by_length also shuffles what is evaluated on, and {self.task_name} needs its"
                " order; leave it out"
            )
        best = str(settings.get("metric_for_best_model", "")).removeprefix("eval_") == task.metric_name
        return training_arguments(
            output,
            settings,
            seed=self.recipe.seed,
            section=section,
            generate_up_to=scores.longest if isinstance(scores, WritingScores) else None,
            defaults={"greater_is_better": scores.higher_is_better} if best else None,
        )

    def _keep(self, name: str, task: PreparedTask, model: Any) -> nn.Module:
        """Save a model that needs no training."""
        if self.state.is_main_process:
            model.save_pretrained(self.output / name)
            task.processing_class.save_pretrained(self.output / name)
        self._finish(name, model)
        return model

    def _finish(self, name: str, model: nn.Module) -> None:
        if self.state.is_main_process:
            save_probe(model, self.output / name)
            self._mark_done(name)
        self.state.wait_for_everyone()

    def _collect_goals(self, checkpoints: Path) -> None:
        """Put the models of the targets on the way beside the student."""
        for folder in self._goal_folders().values():
            left = checkpoints / folder.name.removeprefix(f"{STUDENT}-")
            if left.is_dir():
                shutil.rmtree(folder, ignore_errors=True)
                shutil.move(left, folder)
                self._store_like_the_teacher(folder)
                save_probe(load(folder), folder)
                self._mark_done(folder.name)

    def _trained_model(self, name: str, trainer: Any) -> nn.Module:
        """The model that was trained; where it is in shards, what was saved of it."""
        if trainer.sharding == "none":
            return trainer.accelerator.unwrap_model(trainer.model)
        self.state.wait_for_everyone()
        with loading_whole():
            return load(self.output / name)

    def _require_agreement(self, trainer: Any) -> None:
        """Make sure that all processes ended with the same shapes, the same plan and, where each holds them all, the same weights."""
        if self.state.num_processes == 1:
            return
        pruner = getattr(trainer, "pruner", None)
        model = trainer.accelerator.unwrap_model(trainer.model)
        digests = gather_object([digest(model, None if pruner is None else pruner.units())])
        if len(set(digests)) > 1:
            raise RuntimeError(
                "the processes hold different weights after training; please report this with your recipe"
            )
        self._say(f"{len(digests)} processes hold the same plan and weights ({digests[0][:12]})")

    def make_quantized(self, name: str, folder: Path, task: PreparedTask) -> dict[str, Path]:
        """The variants that the recipe asks for, each in a folder of its own, and their adapters beside them."""
        config = self.recipe.quantize
        if config is None:
            return {}
        variants = {}
        for preset in config.presets:
            target = self.output / f"{folder.name if folder.name != TEACHER else STUDENT}-{preset}"
            self._quantize(folder, preset, target)
            variants[f"{name} + {preset}"] = target
            if config.recover is not None:
                variants[f"{name} + {preset} + adapter"] = self._recover(folder, preset, target, config.recover, task)
        return variants

    def _quantize(self, folder: Path, preset: str, target: Path, around: RecoverConfig | None = None) -> None:
        """Write one variant, unless it is there; `around` adapters that will be put on it, if these say so."""
        config = self.recipe.quantize
        assert config is not None
        if self.state.is_main_process and not self._is_done(target.name):
            self._say(f"Quantizing with {preset}")
            if config.while_loading(preset):
                self._quantize_while_loading(folder, preset, target, config, around)
            else:
                self._round(folder, preset, target, config)
            self._mark_done(target.name)
        self.state.wait_for_everyone()

    def _quantize_while_loading(
        self, folder: Path, preset: str, target: Path, config: QuantizeConfig, around: RecoverConfig | None
    ) -> None:
        model = quantize(folder, preset, **config.settings_of(preset))
        if around is not None:
            full = load(folder, device_map=own_device_map())
            refit_weights(model, full, rank=around.rank, iterations=around.iterations, targets=around.targets)
        model.save_pretrained(target)  # type: ignore[operator]
        save_probe(model, target)
        copy_processor(folder, target)

    def _round(self, folder: Path, preset: str, target: Path, config: QuantizeConfig) -> None:
        """Write a variant whose weights hfcompress rounds; stopped, it goes on with the layers that are done."""
        shutil.rmtree(target, ignore_errors=True)
        kept = self.output / f".{target.name}-layers"
        quantize_folder(
            str(folder),
            target,
            preset,
            data=None if config.samples is None else self.data,
            samples=config.samples or 1,
            skip=tuple(config.skip),
            dtype=None if config.dtype == "auto" else getattr(torch, config.dtype),
            keep=None if config.samples is None else kept,
            seed=self.recipe.seed,
            command=self.command,
            say=self._say,
        )
        shutil.rmtree(kept, ignore_errors=True)

    def _recover(self, folder: Path, preset: str, target: Path, config: RecoverConfig, task: PreparedTask) -> Path:
        """Adapters for a quantized model that bring it nearer to what the student learned from."""
        adapter, base = self.output / f"{target.name}-adapter", target
        if self._is_done(adapter.name):
            return adapter
        if config.iterations > 1:
            base = self.output / f"{target.name}-base"
            self._quantize(folder, preset, base, config)
        self._say(f"Training adapters on {base.name}")
        recipe = Recipe(
            distill=config.distill or self.recipe.distill or DistillConfig(),
            data=self.recipe.data,
            teacher=self.recipe.teacher,
        )
        checkpoints = self.output / f"{adapter.name}-checkpoints"

        def make(args: Any, common: dict[str, Any]) -> Any:
            transformers.set_seed(self.recipe.seed)  # half of an adapter may be random
            quiet: dict[str, Any] = without_dropout(read_config(base))
            model: Any = load(base.resolve(), device_map=own_device_map(), **quiet)
            full: Any = load(folder, device_map=own_device_map())
            settings = config.model_dump(include={"rank", "alpha", "targets", "init", "dropout"})
            student = add_adapters(model, full, **settings)
            for parameter in full.parameters():
                parameter.requires_grad_(parameter.dim() == 1)  # about as little as adapters, for the count of memory
            # Assistants taught the student; here the teacher itself does, whose cache is another then.
            assisted = self.recipe.teacher is not None and self.recipe.teacher.assistants
            cache = checkpoints if assisted else self.output
            learn_from = open_teachers(recipe, self._taught_folder(), full, args, task, cache)
            distilling = Seq2SeqDistillationTrainer if task.generates else DistillationTrainer
            return distilling(model=student, teacher=learn_from, recipe=recipe, args=args, **common)

        self._train(adapter.name, task, make, {**self.recipe.train, **config.train}, "quantize.recover.train")
        return adapter

    def measure(self, models: dict[str, Path]) -> list[dict[str, Any]]:
        """Load everything that was saved in a fresh process, score and time it there."""
        self._say("Loading everything again in a fresh process, scoring and timing it")
        # What the training left to the child would slow it down or change its threads.
        arguments = [f"{name}={folder}" for name, folder in models.items()]
        if not run_fresh("hfcompress.runs.measure_saved", str(self.output), *arguments):
            raise RuntimeError(f"what was saved in {self.output} could not be measured in a fresh process (see above)")
        return read_results(self.output)["rows"]

    def write_cards(self, models: dict[str, Path], rows: list[dict[str, Any]]) -> None:
        """Check that each new folder loads by every way, and write its card."""
        self._say("Checking that each folder loads by every way its card names")
        results = read_results(self.output)
        base = self.recipe.model.base_model if self.recipe.model is not None else None
        for folder in models.values():
            if folder.parent != self.output or folder.name == TEACHER:
                continue
            checks = verify_folder(folder)
            failed = [check for check in checks if not check.ok]
            if failed:
                raise VerificationError(f"{folder} does not load through {failed[0].route}: {failed[0].error}")
            mine = [{**row, "folder": "." if row["folder"] == folder.name else row["folder"]} for row in rows]
            own = {
                **results,
                "rows": mine,
                "name": f"{self.output.resolve().name}-{folder.name}",
                "command": self.command,
            }
            own["base_model"] = base
            (folder / RESULTS_FILE).write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
            if (self.output / PREDICTIONS_FILE).is_file():
                shutil.copyfile(self.output / PREDICTIONS_FILE, folder / PREDICTIONS_FILE)
            write_card(folder, base_model=base, checks=checks)

    def judge(self, rows: list[dict[str, Any]]) -> Status:
        """Hold every new model against the recipe's contract, say it and keep it; one that keeps it is enough.

        Returns:
            The verdict on the run; "met" without a contract.
        """
        contract = self.recipe.contract
        if contract is None or len(rows) < 2:
            return "met"
        verdicts: list[Status] = []
        for row in rows[1:]:
            clauses = judge(contract, row)
            verdicts.append(verdict(clauses))
            row["verdict"] = {"status": verdicts[-1], "clauses": [clause.to_dict() for clause in clauses]}
            self._say(f"Contract of {row['name']}: {verdicts[-1]}")
            for clause in clauses:
                sys.stderr.write(f"   {describe(clause)}\n")
        self.verdict = best_verdict(verdicts)
        return self.verdict

    def _complete(self, rows: list[dict[str, Any]]) -> None:
        """Put into `results.json` what the process that measured did not know."""
        results = {
            **read_results(self.output),
            "rows": rows,
            "name": self.output.resolve().name,
            "command": self.command,
        }
        (self.output / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    def push(self, models: dict[str, Path]) -> None:
        """Push the student, and each variant to a repository of its own; what fails the contract stays here."""
        assert self.recipe.push is not None
        for folder in models.values():
            if folder.parent == self.output and folder.name != TEACHER:
                repo = self.recipe.push.repo + folder.name.removeprefix(STUDENT)
                try:
                    commit = push_folder(
                        folder, repo, private=self.recipe.push.private, revision=self.recipe.push.revision
                    )
                except ContractError as error:
                    self._say(f"Not pushed: {error}")
                    continue
                self._say(f"Pushed {folder} to {commit.repo_url}")

    # ---- marks ----

    def _is_done(self, name: str) -> bool:
        return (self.output / f".{name}.{_DONE}").is_file()

    def _mark_done(self, name: str) -> None:
        digest = hashlib.sha256(self.recipe.to_yaml().encode()).hexdigest()
        (self.output / f".{name}.{_DONE}").write_text(json.dumps({"recipe_sha256": digest}), encoding="utf-8")

    def _say(self, text: str) -> None:
        if self.state.is_main_process:
            sys.stderr.write(f"\n== {text}\n")
            sys.stderr.flush()


def _goal(quantity: str, goal: float) -> str:
    """A target in few letters: "2x" of a speedup."""
    return f"{goal:g}x" if quantity == "speedup" else f"{quantity} {goal:g}"


def with_default_speedups(recipe: Recipe) -> Recipe:
    """In training the fastest model within a drop is chosen among several: the recipe's targets, or these."""
    if recipe.prune is None or recipe.prune.target.max_drop is None or recipe.prune.target.quantity != "max_drop":
        return recipe
    values = recipe.model_dump(exclude_unset=True)
    values["prune"]["target"]["speedup"] = [1.5, 2.0, 3.0, 4.0]
    return Recipe.from_dict(values)  # checked anew: not every setting goes with several targets


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def run_recipe(recipe: Recipe, *, command: str, restart: bool = False) -> list[dict[str, Any]] | None:
    """Run a recipe from beginning to end; see `Run`."""
    return Run(recipe, command=command, restart=restart).run()


def origins_of(names: Sequence[str]) -> dict[str, str]:
    """Which model each was made from, by their names in a run, the baseline first.

    Example:
        >>> origins_of(["teacher", "pruned 2x", "pruned", "pruned + int8"])
        {'pruned 2x': 'teacher', 'pruned': 'pruned 2x', 'pruned + int8': 'pruned'}
    """
    origins, last = {}, names[0]
    for name in names[1:]:
        below = name.rpartition(" + ")[0]
        origins[name] = below or last
        last = last if below else name
    return origins


def _thinned(log: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """A trainer's log, numbers only, with at most so many entries of each kind, evenly spread."""
    numbers = [{k: v for k, v in entry.items() if isinstance(v, (int, float))} for entry in log]
    kinds: dict[tuple[str, ...], list[int]] = {}
    for place, entry in enumerate(numbers):
        kinds.setdefault(tuple(sorted(curves_of([entry]))), []).append(place)
    kept = {
        places[round(i)]
        for places in kinds.values()
        for i in np.linspace(0, len(places) - 1, min(len(places), _POINTS))
    }
    return [numbers[place] for place in sorted(kept)]


def results_of(recipe: Recipe, task: PreparedTask, rows: list[dict[str, Any]], output: Path) -> dict[str, Any]:
    """The content of `results.json`."""
    data = recipe.data
    assert data is not None
    about: dict[str, Any] = {
        "name": data.title or data.name or Path(str(data.train)).name,
        "train_n": len(task.train_dataset),
        "eval_n": len(task.eval_dataset),
        "fingerprint": task.fingerprint,
    }
    if recipe.prune is not None:
        about["calibration_n"] = min(recipe.prune.criterion.samples, len(task.train_dataset))
    if repository_of(data.name) and data.name is not None:
        split = {"config": data.config, "split": data.eval}
        about |= {"repository": data.name, **{key: value for key, value in split.items() if value}}
    logs = sorted(output.glob(f".*.{_HISTORY}"))
    return {
        "rows": rows,
        "task": recipe.task,
        "data": about,
        "lineage": lineage_of(recipe, about["name"]),
        "history": {path.name[1:].removesuffix(f".{_HISTORY}"): json.loads(path.read_text("utf-8")) for path in logs},
        "recipe": without_paths(json.loads(hide_secrets(recipe.model_dump_json(exclude_unset=True)))),
        **({} if recipe.contract is None else {"contract": recipe.contract.model_dump(exclude_none=True)}),
        **provenance(seed=recipe.seed),
    }


def lineage_of(recipe: Recipe, data_name: str) -> dict[str, Any]:
    """What base, teacher and data are called, and their licences as far as those are said."""
    named = recipe.teacher.names[0] if recipe.teacher is not None and recipe.teacher.names else None
    found = {}
    start = recipe.model.name if recipe.model is not None else named  # without a model, the teacher's copy
    if start is not None:
        known = recipe.model.base_model if recipe.model is not None else None
        found["base"] = describe_source(known or public_name(start), start)
    if named is not None:
        found["teacher"] = describe_source(public_name(named), named)
    if recipe.data is not None:
        source = recipe.data.name or recipe.data.train
        found["data"] = describe_source(data_name, source, kind="dataset")
    return found
