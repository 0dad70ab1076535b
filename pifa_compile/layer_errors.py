"""The errors that a run's records tell of its layers, computed again from the model and the factors on a text.

A layer's error is that of its outputs in the dense model, ||(W' - W) X|| / ||W X||; the least that any weight of its
rank reaches is the tail of the singular values of W X (Eckart and Young 1936). Records of data-free methods are in the
norm of the weight itself, where X is the identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from pifa_compile import _torch
from pifa_compile.compression.blocks import Batch
from pifa_compile.compression.calibration import calibrate_on
from pifa_compile.compression.inputs import input_moments
from pifa_compile.compression.measure import Measure
from pifa_compile.compression.moments import SecondMoments
from pifa_compile.digest import digest_many
from pifa_compile.layers import as_matrix, linear_weights
from pifa_compile.recipes import recipe_from_json
from pifa_compile.store import LayerRecord, Run, Store

#: What a figure that is computed again may differ by from the record: relative, and absolute for rounding.
RELATIVE, ABSOLUTE = 1e-2, 1e-6

RULE = f"""Wrong is an error below the least possible at its rank, and a figure that differs from its record by more
than {RELATIVE:.0%} where both are of the same text, or of the weights alone. On any other text figures may differ from
the records, and an error may be above 1, which a weight of zeros has."""


@dataclass(frozen=True)
class LayerCheck:
    """One layer's relative errors and the least possible at its rank: as recorded, and on this text.

    norm     of the record: "outputs" on the text held out by the run, or "weight"
    problem  what cannot be right, or None
    """

    layer: str
    rank: int
    norm: str
    recorded: float
    recorded_least: float
    achieved: float
    least: float
    problem: str | None


@dataclass(frozen=True)
class RunCheck:
    """All layers of a run, the worst first; ``same_text`` where the text is the run's own calibration text."""

    run: str
    same_text: bool
    tokens: int
    layers: list[LayerCheck]

    @property
    def problems(self) -> list[str]:
        return [f"run {self.run}: {check.layer}: {check.problem}" for check in self.layers if check.problem]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        norms = {check.norm for check in self.layers}
        recorded = "of the weight" if norms == {"weight"} else "on the text that the run held out"
        here = "the same text" if self.same_text else "this text"
        heads = ["layer", "rank", "recorded", "least", "here", "least here", ""]
        rows = [
            [c.layer, str(c.rank), *(f"{x:.4f}" for x in figures), c.problem or ""]
            for c in self.layers
            for figures in [(c.recorded, c.recorded_least, c.achieved, c.least)]
        ]
        table = tabulate(rows, heads, "simple", disable_numparse=True, colalign=["left", *["right"] * 5, "left"])
        where = f"recorded {recorded}; here: of outputs on {self.tokens:,} tokens of {here}"
        return f"run {self.run}: relative errors, {where}\n{table}"


def check_layers(store: Store, run: Run, model: nn.Module, tokenizer: Any, text: Path | str) -> RunCheck:
    """Compute the errors of a run's layers again on a text; the run must have been made of the model.

    Raises RecipeError if the run tells of a recipe that is none.

    Where text, tokenizer and model are those that the run was calibrated on, the part that it held out is measured, so
    that the figures must be those of its records; of any other text all windows are.
    """
    recipe = recipe_from_json(run.header.recipe)
    size = {"windows": getattr(recipe, "windows", 64), "length": getattr(recipe, "window_length", 256)}
    calibration = calibrate_on(model, text, tokenizer, **size, seed=run.header.seed)
    same = calibration.identity == run.header.calibration and bool(calibration.held_out)
    calibration = calibration.to(next(model.parameters()).device)
    batches = calibration.held_out if same else (*calibration.batches, *calibration.held_out)
    checks, tokens, data_free = [], 0, run.header.calibration is None
    for record, matrix, moments in _inputs(run, model, batches):
        made = store.factors(record, matrix.device).weight()
        tokens = moments.count
        checks.append(_check(record, matrix, made, Measure(moments.gram), same, data_free))
    return RunCheck(run.run_id, same, tokens, sorted(checks, key=lambda check: -check.achieved))


def _inputs(
    run: Run, model: nn.Module, batches: Sequence[Batch]
) -> Iterator[tuple[LayerRecord, Tensor, SecondMoments]]:
    """Every replaced layer that runs: its record, its dense weight (m x n; stacked for a group) and what it reads."""
    weights = [w for w in linear_weights(model) if w.reason is None]
    digests = digest_many([w.parameter.detach() for w in weights])
    matrices = {d: as_matrix(w.parameter, w.layout) for d, w in zip(digests, weights, strict=True)}
    records = {w.name: run.by_digest[d] for d, w in zip(digests, weights, strict=True)}
    names = [name for name, record in records.items() if record.object is not None]
    done: set[int] = set()
    for group, moments in input_moments(model, names, batches):
        for name in group.names:
            record = records[name]
            if id(record) not in done:
                done.add(id(record))
                parts = [next(matrices[d] for d in own.values() if d in matrices) for _, own in record.layers]
                yield record, torch.cat(parts) if len(parts) > 1 else parts[0], moments


def _check(
    record: LayerRecord, matrix: Tensor, made: Tensor, errors: Measure, same: bool, data_free: bool
) -> LayerCheck:
    achieved, least = errors(matrix, made, record.rank)
    recorded, recorded_least = record.truncation or 0.0, record.least_error or 0.0
    again: tuple[float, float] | None = None
    if data_free:
        again = _weight_errors(matrix, made, record.rank)
    elif same and record.details.get("dtype") == _torch.dtype_name(matrix.dtype):
        again = achieved, least
    known = recorded, recorded_least
    problem = find_problem((achieved, least), known, again, record.error or 0.0)
    return LayerCheck(
        record.name, record.rank, "weight" if data_free else "outputs", *known, achieved, least, problem
    )


def _weight_errors(matrix: Tensor, made: Tensor, r: int) -> tuple[float, float]:
    """||W' - W|| / ||W||, and the least at rank r."""
    wide = matrix.double()
    total = float(wide.norm())
    return float((made.to(wide) - wide).norm()) / total, float(torch.linalg.svdvals(wide)[r:].norm()) / total


def find_problem(
    here: tuple[float, float], recorded: tuple[float, float], again: tuple[float, float] | None, rounding: float
) -> str | None:
    """What RULE calls wrong, or None.

    here, recorded  (achieved, least) on the text, and as recorded
    again           what must be the recorded figures, or None where nothing has to
    rounding        relative error of the stored factors against the low-rank weight
    """
    achieved, least = here
    if achieved < least * (1 - RELATIVE) - ABSOLUTE:
        return "its error is below the least possible: the factors have a higher rank than the record"
    if again is not None:
        for word, value, wanted in zip(("error", "least possible error"), again, recorded, strict=True):
            if abs(value - wanted) > RELATIVE * wanted + rounding + ABSOLUTE:
                return f"its {word} is {value:.4g}, the record says {wanted:.4g}"
    return None
