"""A saved model held against a contract: measured anew beside its baseline, on the same examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfcompress.checkpoints.adapters import ADAPTER_FILE, read_config
from hfcompress.config import ContractConfig, DataConfig, MeasureConfig, Recipe
from hfcompress.hub.card import pipeline_of
from hfcompress.hub.contract import Clause, Status, best_verdict, contract_of, judge, verdict
from hfcompress.hub.results import read_results
from hfcompress.runs.evaluation import Rate, measure_and_keep
from hfcompress.runs.measure_saved import prepare_for, rates_for
from hfcompress.runs.pipeline import RECIPE_FILE, TEACHER, origins_of
from hfcompress.tasks import TASKS, PreparedTask


@dataclass(frozen=True)
class Checked:
    """What came out.

    Attributes:
        rows: As `measure_folders` gives them, the baseline first.
        clauses: Name of each new model to the clauses of its contract.
    """

    rows: list[dict[str, Any]]
    clauses: dict[str, list[Clause]]

    @property
    def verdict(self) -> Status:
        """Of all models: it is enough that one keeps the contract."""
        return best_verdict([verdict(clauses) for clauses in self.clauses.values()])

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        models = {
            name: {"verdict": verdict(clauses), "clauses": [clause.to_dict() for clause in clauses]}
            for name, clauses in self.clauses.items()
        }
        return {"verdict": self.verdict, "models": models, "rows": self.rows}


@dataclass(frozen=True)
class _Subject:
    """What is to be checked.

    Attributes:
        models: Name to folder.
        run: The folder of the run that made them; None where there is none.
        results: Content of `results.json` in the folder that was given.
    """

    models: dict[str, Path]
    run: Path | None
    results: dict[str, Any]


def check_folder(
    folder: str | Path,
    contract: ContractConfig | None,
    *,
    baseline: str | Path | None = None,
    data: DataConfig | None = None,
    measure: dict[str, Any] | None = None,
    seed: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Checked:
    """Measure a model beside its baseline and hold it against a contract.

    Args:
        folder: Of a model, or of a run, whose new models are all measured.
        contract: The bounds; None takes those of the run's recipe.
        baseline: Folder of the model to compare with; None takes the run's teacher, or the folder beside that `results.json` names.
        data: What to score on; None takes that of the run.
        measure: Settings of `MeasureConfig` that differ from the run's.
        seed: Of random parts of the data; None takes that of the run.
        say: Told what is being done.

    Raises:
        ValueError: Baseline, data or contract are not known, or the folder holds no model; one line.
    """
    subject = _find(Path(folder))
    recipe = Recipe.from_yaml(subject.run / RECIPE_FILE) if subject.run is not None else Recipe()
    contract = contract or recipe.contract or _recorded_contract(subject)
    if contract is None:
        raise ValueError("there is nothing to check: give --max-drop, --min-speedup, --max-mb or --max-latency-ms")
    reference = _baseline(subject, recipe, Path(folder), baseline)
    folders = {_unused("baseline", subject.models): reference, **subject.models}
    config = MeasureConfig(**{**recipe.measure.model_dump(), **(measure or {})})
    rate: Rate | dict[str, Rate] | None = None
    task = None
    if contract.max_drop is not None:
        scored = _scored(recipe, data, list(folders.values()), seed=recipe.seed if seed is None else seed)
        task = prepare_for(scored, list(folders.values()))
        rate = rates_for(scored, folders, task, subject.run)
        say(f"Scoring on {len(task.eval_dataset):,} examples and timing {config.rounds} rounds")
    else:
        say(f"Timing {config.rounds} rounds")
    rows = _measure(folders, rate, config, task)
    return Checked(rows, {row["name"]: judge(contract, row) for row in rows[1:]})


def _measure(
    folders: dict[str, Path], rate: Rate | dict[str, Rate] | None, config: MeasureConfig, task: PreparedTask | None
) -> list[dict[str, Any]]:
    names = task.label_names if task is not None else ()
    return measure_and_keep(folders, rate, config, origins=origins_of(list(folders)), class_names=names).rows


def _unused(name: str, taken: dict[str, Path]) -> str:
    return name if name not in taken else _unused(f"{name}'", taken)


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / ADAPTER_FILE).is_file()


def _find(folder: Path) -> _Subject:
    """What a folder holds: a run with several models, or one model, maybe of a run."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give that of a saved model or of a run")
    results = read_results(folder)
    if (folder / RECIPE_FILE).is_file():
        rows = results.get("rows", [])[1:]
        models = {row["name"]: folder / row["folder"] for row in rows if _holds_model(folder / row["folder"])}
        if not models:
            raise ValueError(f"{folder} holds a run that has left no model yet; finish it with hfcompress run")
        return _Subject(models, folder, results)
    if not _holds_model(folder):
        raise ValueError(f"{folder} holds no config.json; give the folder of a saved model or of a run")
    name, above = folder.resolve().name, folder.resolve().parent
    of_run = (above / RECIPE_FILE).is_file() and any(
        r.get("folder") == name for r in read_results(above).get("rows", [])
    )
    return _Subject({name: folder}, above if of_run else None, results)


def _recorded_contract(subject: _Subject) -> ContractConfig | None:
    return contract_of(subject.results) if subject.results.get("contract") else None


def _baseline(subject: _Subject, recipe: Recipe, folder: Path, given: str | Path | None) -> Path:
    """The model to compare with: what was given, the run's teacher, or a folder beside."""
    candidates = [Path(given)] if given is not None else []
    if given is None and subject.run is not None:
        named = recipe.teacher.names[0] if recipe.teacher is not None and recipe.teacher.names else None
        candidates = [*([Path(named)] if named else []), subject.run / TEACHER]
    elif given is None:
        first = (subject.results.get("rows") or [{}])[0].get("folder")
        candidates = [folder.resolve().parent / first] if first and first != "." else []
    found = next((path for path in candidates if _holds_model(path)), None)
    if found is None:
        where = f"{given} holds no model" if given is not None else f"the baseline of {folder} is not beside it"
        raise ValueError(f"{where}; give the folder of the model it is compared with as --baseline")
    return found


def _scored(recipe: Recipe, data: DataConfig | None, folders: list[Path], *, seed: int) -> Recipe:
    """The recipe with the data to score on, and what they are for."""
    if data is None and recipe.data is None:
        raise ValueError("there is no run beside it that says what to score on; give --data")
    task = recipe.task or pipeline_of(read_config(folders[-1]))
    if task not in TASKS:
        raise ValueError(f"what {folders[-1]} is for is not known, so it cannot be scored; leave out --max-drop")
    values = recipe.model_dump(exclude_unset=True) | {"task": task, "seed": seed}
    if data is not None:
        values["data"] = data.model_dump(exclude_unset=True)
    return Recipe.from_dict(values)
