"""How factors are trained, and what came of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tabulate import tabulate

from pifa_compile.errors import RecipeError

#: The share of the steps in which the learning rate rises.
WARM_UP = 0.05


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How factors are trained. Raises RecipeError for what is impossible.

    loss         "distill": the divergence from the dense model's outputs; "lm": the loss of the next token of the text
    steps        of AdamW, each with one batch
    lr           learning rate at its largest: it rises for a twentieth of the steps, then falls as a cosine to zero
    batch        windows in a step; for a model that is not causal lines, of which it takes more (64), as they are short
    length       tokens in a window that is cut from a text; the most tokens of a line
    seed         of the order of the windows
    temperature  that the logits of both models are divided by where they are compared
    mix          share of the loss of the next token in a distillation, from 0 to 1
    clip         largest norm of a gradient
    also         patterns of names of parameters that train beside the factors and biases of factored layers, such as
                 "*norm*" or "*embed_tokens*"
    checks       how many times the held-out part is measured, and the state kept if it is the best so far
    """

    loss: Literal["distill", "lm"] = "distill"
    steps: int = 200
    lr: float = 3e-5
    batch: int = 8
    length: int = 256
    seed: int = 0
    temperature: float = 1.0
    mix: float = 0.0
    clip: float = 1.0
    also: tuple[str, ...] = ()
    checks: int = 5

    def __post_init__(self) -> None:
        if self.loss not in ("distill", "lm"):
            raise RecipeError(f"loss is {self.loss!r}; give 'distill' or 'lm'")
        for name in ("steps", "batch", "checks"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)!r}; give a whole number from 1")
        for name in ("lr", "temperature", "clip"):
            if not _is_number(value := getattr(self, name)) or value <= 0:
                raise RecipeError(f"{name} is {value!r}; give a number above 0")
        if type(self.length) is not int or self.length < 2:
            raise RecipeError(f"length is {self.length!r}; give a whole number from 2")
        if type(self.seed) is not int:
            raise RecipeError(f"seed is {self.seed!r}; give a whole number")
        if not _is_number(self.mix) or not 0 <= self.mix <= 1:
            raise RecipeError(f"mix is {self.mix!r}; give a share from 0 to 1")
        if not isinstance(self.also, list | tuple) or not all(isinstance(p, str) for p in self.also):
            raise RecipeError(f"also is {self.also!r}; give a list of patterns")
        if self.loss == "lm" and (self.mix or self.temperature != 1):
            raise RecipeError("mix and temperature are of the loss 'distill'; leave them out")
        object.__setattr__(self, "also", tuple(self.also))

    def to_json(self) -> dict[str, Any]:
        """All settings as JSON."""
        return asdict(self) | {"also": list(self.also)}

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0, as a share of the largest."""
        warm = max(1, round(WARM_UP * self.steps))
        return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / self.steps)))


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TuningReport:
    """What came of a tuning. Figures are of the held-out part, by name; ``loss`` is the one that chose the best state.

    source       what the text is called
    items        windows (of a model that is not causal: lines) to train on; ``held_out`` those that were not
    numbers      that were trained
    before       figures at the start; ``after`` those of the state that the model has now
    done         steps that were made; ``best`` is the one whose state is kept, 0 the start
    course       (step, held-out loss), as often as it was measured
    interrupted  whether Ctrl-C ended it early
    """

    tuning: Tuning
    source: str
    items: int
    held_out: int
    numbers: int
    before: dict[str, float]
    after: dict[str, float]
    done: int
    best: int
    course: list[tuple[int, float]]
    seconds: float
    interrupted: bool

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON, which has no number for a loss that is not finite."""
        course = [[step, loss if math.isfinite(loss) else None] for step, loss in self.course]
        return asdict(self) | {"tuning": self.tuning.to_json(), "course": course}

    def __str__(self) -> str:
        how, kept = self.tuning, f"step {self.best}" if self.best else "the start, as nothing was better"
        settings = f"{how.loss}, lr {how.lr:g}, {how.batch} in a batch, seed {how.seed}"
        rows = [[name.replace("_", " "), self.before[name], self.after[name]] for name in self.before]
        return "\n".join(
            (
                f"{self.done} of {how.steps} steps ({settings}) on {self.source}, {self.items} windows or lines",
                f"{self.numbers:,} numbers trained, {self.seconds:.0f} s; kept: {kept}",
                "",
                tabulate(rows, [f"{self.held_out} held out", "before", "after"], "simple", floatfmt=".4f"),
            )
        )
