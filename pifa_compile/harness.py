"""Tasks of lm-eval on a model, dense and with each compression run, the compressed ones compiled by the backend.

The dense model is not compiled: it is what the others are compared with. ``perplexity`` is a task too, of texts on disk
and of the windows that ``quality`` reads, and downloads nothing.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pifa_compile.errors import InputError
from pifa_compile.loading import is_causal
from pifa_compile.quality import (
    Quality,
    Reading,
    Variant,
    given_as,
    is_factored,
    misfit,
    model_density,
    told_apart,
    told_rows,
    windows_for,
)
from pifa_compile.quiet import errors_only
from pifa_compile.store import Run, Store

#: The name of the task that is ours.
PERPLEXITY = "perplexity"


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    runs: Sequence[tuple[Store, Run]],
    tasks: Sequence[str],
    texts: Mapping[str, str],
    *,
    limit: int | None = None,
    reading: Reading | None = None,
    name: str = "",
    factored: Mapping[str, nn.Module] | None = None,
    say: Callable[[str], object] | None = None,
) -> Quality:
    """Measure a causal language model on tasks of lm-eval (or their YAML files), dense and compiled with each run.

    texts     by name, what the task ``perplexity`` reads: a row of figures for each, under the text's name
    limit     documents of a task, or windows of a text, at most
    reading   of texts; its ``batch`` is that of all tasks
    factored  models that have their factors already, by the names of their places: rows beside the dense ``model``
    say       receives a line before each row is measured

    Figures are lm-eval's, "stderr" behind a name its standard error; a filter is named where it is not the only one.
    Raises InputError where lm-eval is missing, for a task that there is not or whose data cannot be loaded, for a run
    of another model, and for a model that is no causal language model.
    """
    if not is_causal(model):
        raise InputError(f"{type(model).__name__} is no causal language model, which tasks are for; leave out --tasks")
    how, others = reading or Reading(), factored or {}
    for _, run in runs:
        if problem := misfit(run, model):
            raise InputError(f"{problem}; name another run, or compress this model first")
    with errors_only("lm_eval"):
        tests = _Tests(model, tokenizer, tasks, texts, how, limit)
        measuring = told_rows(runs, others, say)
        next(measuring)
        variants = [Variant(*given_as(model), tests.measure(_compiled(model) if is_factored(model) else model))]
        for store, run in runs:
            next(measuring)
            found = tests.measure(_compiled(model, run=run.run_id, store=str(store.root)))
            variants.append(Variant(run.run_id, run.density, model_density(run, model), found))
        for other in others.values():
            next(measuring)
            variants.append(Variant(*given_as(other), tests.measure(_compiled(other))))
    return Quality(name or type(model).__name__, tests.protocol, told_apart(variants, runs, others))


class _Tests:
    """The tasks, loaded once, and how each was read."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        tasks: Sequence[str],
        texts: Mapping[str, str],
        how: Reading,
        limit: int | None,
    ) -> None:
        try:
            import lm_eval
        except ImportError as error:
            cure = "install it with: pip install 'pifa-compile[eval]'"
            raise InputError(f"tasks need the package lm-eval; {cure}") from error
        from lm_eval.tasks import TaskManager

        self._tokenizer, self._batch, self._limit = tokenizer, how.batch, limit
        self._manager = manager = TaskManager()  # reading its index takes long: once
        known = [PERPLEXITY, *manager.all_tasks]
        for task in tasks:
            if task not in known and not (task.endswith((".yaml", ".yml")) and Path(task).is_file()):
                near = ", ".join(difflib.get_close_matches(task, known, n=5, cutoff=0.5))
                cure = f"did you mean {near}?" if near else "`lm_eval ls tasks` lists them"
                raise InputError(f"there is no task {task!r}; {cure}")
        self.protocol: dict[str, str] = {}
        self._labels: dict[str, str] = {}  # of texts, by the names of their tasks
        self._tasks = [self._load(manager, task) for task in tasks if task != PERPLEXITY]
        for task in (task for made in self._tasks for task in made["tasks"].values()):
            cut = "all documents" if limit is None else f"{limit} documents at most"
            shots = task.get_config("num_fewshot") or 0
            version = f"lm-eval {lm_eval.__version__}, version {_version(task)} of the task"
            self.protocol[task.task_name] = f"{version}; {cut}, {shots} shots"
        if PERPLEXITY in tasks:
            self._labels = {f"{PERPLEXITY}-{number}": label for number, label in enumerate(texts)}
            self._tasks += [self._windows(model, key, label, texts[label], how) for key, label in self._labels.items()]

    @staticmethod
    def _load(manager: Any, task: str) -> Any:
        try:
            return manager.load([task])
        except Exception as error:  # hubs and data sets raise many kinds
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"cannot load the task {task!r}: {first}") from error

    def _windows(self, model: nn.Module, key: str, label: str, text: str, how: Reading) -> Any:
        from pifa_compile.harness_model import WindowsTask

        windows, protocol = windows_for(model, self._tokenizer, text, how)
        windows = windows[: self._limit]
        cut = "" if self._limit is None else f", {len(windows)} of the windows"
        self.protocol[label] = f"{protocol}; as a task of lm-eval{cut}"
        return {"tasks": {key: WindowsTask(key, windows.tolist())}}

    def measure(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """Figures by task."""
        from lm_eval import simple_evaluate

        from pifa_compile.harness_model import HarnessModel

        lm = HarnessModel(pretrained=model, tokenizer=copy.deepcopy(self._tokenizer), batch_size=self._batch)
        tasks = [task for made in self._tasks for task in made["tasks"].values()]
        given: dict[str, Any] = {
            "limit": self._limit,
            "bootstrap_iters": 1000,
            "log_samples": False,
            "task_manager": self._manager,
        }
        found = simple_evaluate(lm, tasks=tasks, **given)["results"]
        names = {label: key for key, label in self._labels.items()}
        return {task: _figures(found[names.get(task, task)]) for task in self.protocol}


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a task's result: {"acc,none": 0.5, "acc_stderr,none": 0.1} gives acc and acc_stderr."""
    numbers = {k: v for k, v in result.items() if "," in k and isinstance(v, float | int)}
    filters = {key.partition(",")[2] for key in numbers}
    names = {key: key.partition(",")[0] if len(filters) == 1 else key.replace(",", " ") for key in numbers}
    known = {key for key, value in numbers.items() if not ("_stderr" in key and math.isnan(value))}
    return {names[key]: float(value) for key, value in numbers.items() if key in known}


def _version(task: Any) -> object:
    given = (task.get_config("metadata") or {}).get("version")
    return given if given is not None else task.VERSION


def _compiled(model: nn.Module, **options: str) -> nn.Module:
    """A copy that shares every tensor with the model, and runs compiled by the backend."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    made = copy.deepcopy(model, shared)
    made.compile(backend="pifa", options=options or None)
    return made
