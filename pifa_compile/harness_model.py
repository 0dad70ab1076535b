"""What lm-eval sees of us: a model in memory, and windows of text as a task. Importing this needs lm-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM

from pifa_compile.evaluation import perplexity_of


class HarnessModel(HFLM):
    """A model of transformers that also scores windows of tokens as they are, without writing and reading them."""

    def score_windows(self, requests: Sequence[Any]) -> list[float]:
        """The log-likelihood of all tokens of each window but its first, given those before."""
        windows = [request.args[0] for request in requests]
        asked = [(None, list(ids[:1]), list(ids[1:])) for ids in windows]
        return [float(found[0]) for found in self._loglikelihood_tokens(asked)]


class WindowsTask(Task):
    """Perplexity of windows of tokens: exp of the mean loss over all tokens but the first of each window."""

    VERSION = 1
    OUTPUT_TYPE = "score_windows"

    def __init__(self, name: str, windows: Sequence[Sequence[int]]) -> None:
        self._windows = [{"ids": tuple(ids)} for ids in windows]
        super().__init__()
        self.config.task, self.config.num_fewshot = name, 0  # given a config, lm-eval takes all of it for the name
        self.config.metadata = {"version": self.VERSION}

    def download(self, *_: Any, **__: Any) -> None:
        """Nothing: the windows are here."""

    @property
    def task_name(self) -> str:
        """The name of the text."""
        return str(self.config.task)

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[dict[str, Any]]:
        """One document for each window."""
        return self._windows

    def doc_to_text(self, doc: Any) -> str:
        return ""

    def doc_to_target(self, doc: Any) -> str:
        return ""

    def fewshot_context(self, *_: Any, **__: Any) -> str:
        """None: a window is its own context."""
        return ""

    def construct_requests(self, doc: Mapping[str, Any], ctx: Any, **settings: Any) -> Any:
        """One request for each window."""
        kept = {key: value for key, value in settings.items() if key in ("metadata",)}
        return Instance(request_type=self.OUTPUT_TYPE, doc=doc, arguments=(doc["ids"],), idx=0, **kept)

    def process_results(self, doc: Mapping[str, Any], results: Sequence[float]) -> dict[str, tuple[float, int]]:
        """The window's log-likelihood, and how many tokens it is of."""
        return {"perplexity": (results[0], len(doc["ids"]) - 1)}

    def aggregation(self) -> dict[str, Any]:
        """Over the tokens of all windows."""
        return {"perplexity": _mean_perplexity}

    def higher_is_better(self) -> dict[str, bool]:
        return {"perplexity": False}


def _mean_perplexity(items: Sequence[tuple[float, int]]) -> float:
    return perplexity_of(-sum(score for score, _ in items) / sum(count for _, count in items))
