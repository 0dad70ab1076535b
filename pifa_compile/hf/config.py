"""``PifaConfig``: what config.json says of the layers of a prepared model, enough to build them without memory.

m = out_features, n = in_features, r = rank. In config.json it is the ``quantization_config``, because that is where
transformers asks other packages to build a model's layers. In the checkpoint a layer ``X`` has, by its form,

    X.pivot_rows (r x n), X.coefficients, X.row_order      or      X.left (m x r), X.right (r x n)

and ``X.bias`` where it has one. ``X.weight`` is there too: one number, the version of this layout. A loader that knows
nothing of it would find no weights and, as transformers does, draw them at random with no more than a warning; of a
weight with an impossible shape each of them says that it does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from pifa_compile.errors import InputError

METHOD = "pifa"
VERSION = 1
GUARD = "weight"
REQUIRES = "import pifa_compile"
TENSORS = {"pifa": ("pivot_rows", "coefficients", "row_order"), "pair": ("left", "right")}


@dataclass(frozen=True)
class LayerForm:
    """How one layer is kept; with the linear layer that it replaces, all that is needed to build it.

    form          "pifa" or "pair"
    rank          r
    bias          whether the layer has one
    order         entries of the row order where the layer was factored together with others: its m rows, then the pivot
                  rows that are theirs; None where it was factored alone
    coefficients  dtype of the coefficients where it is not that of the pivot rows
    y_exponent    of the power of two that y_p is scaled by
    shares        {tensor: layer} for tensors that this layer has in common with one before it, and that are saved there
    """

    form: Literal["pifa", "pair"]
    rank: int
    bias: bool
    order: int | None = None
    coefficients: str | None = None
    y_exponent: int = 0
    shares: Mapping[str, str] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors of a layer of this form, the shared ones included."""
        return (*TENSORS[self.form], *(("bias",) if self.bias else ()))

    def to_json(self) -> dict[str, Any]:
        """JSON types, without what is as usual."""
        usual = {f.name: f.default for f in fields(self)}
        return {k: v for k, v in vars(self).items() if v != usual[k] and v != {}}

    @classmethod
    def from_json(cls, name: str, data: Any) -> LayerForm:
        """Raises InputError, which names the layer, for anything that ``to_json`` could not have made."""
        known = {f.name for f in fields(cls)}
        if not isinstance(data, dict) or not {"form", "rank", "bias"} <= set(data) <= known:
            raise config_error(f"{name} is {data!r}")
        found = cls(**data)
        dtype = None if found.coefficients is None else getattr(torch, found.coefficients, None)
        good = (
            found.form in TENSORS
            and _is_count(found.rank)
            and isinstance(found.bias, bool)
            and (found.order is None or _is_count(found.order))
            and (found.coefficients is None or isinstance(dtype, torch.dtype))
            and type(found.y_exponent) is int
            and isinstance(found.shares, dict)
            and set(found.shares) <= set(TENSORS[found.form])
        )
        if not good:
            raise config_error(f"{name} is {data!r}")
        return found


class PifaConfig(QuantizationConfigMixin):
    """The factored layers of a model, as config.json keeps them.

    layers   JSON of a ``LayerForm`` by the name of each layer
    version  of this layout
    run      id of the compression run that the factors come from, if that is known
    recipe   its recipe, as JSON
    tuned    how the factors were trained since then and what it gave, each time, in order, as ``TuningReport.to_json``;
             a single one may stand without a list
    imported where pairs of another method come from, as ``ImportReport.origin`` tells it

    Raises InputError for what this release cannot read.
    """

    def __init__(
        self,
        layers: Mapping[str, Any],
        *,
        version: int = VERSION,
        run: str | None = None,
        recipe: Mapping[str, Any] | None = None,
        tuned: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        imported: Mapping[str, Any] | None = None,
        requires: str = REQUIRES,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if version != VERSION or unknown:
            found = f"version {version}" + (f" with {', '.join(sorted(unknown))}" if unknown else "")
            raise config_error(f"it is of {found}, this release knows version {VERSION}; update pifa-compile")
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers' own are an enumeration of strings
        self.version = version
        self.requires = requires
        self.run = run
        self.recipe = None if recipe is None else dict(recipe)
        given = () if tuned is None else [tuned] if isinstance(tuned, Mapping) else tuned
        if not isinstance(given, list | tuple) or not all(_is_tuning(told) for told in given):
            raise config_error(f"what it says of tuning is {tuned!r}")
        self.tuned = [dict(told) for told in given]
        if imported is not None and not _is_import(imported):
            raise config_error(f"what it says of an import is {imported!r}")
        self.imported = None if imported is None else dict(imported)
        self.layers = {str(name): dict(data) for name, data in layers.items()}
        self.forms()

    def forms(self) -> dict[str, LayerForm]:
        """The layers' forms by name."""
        return {name: LayerForm.from_json(name, data) for name, data in self.layers.items()}


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_import(told: Any) -> bool:
    """Whether something says a checkpoint's name, its formats, and of each layer the inner size and the error."""
    if not isinstance(told, Mapping) or set(told) != {"source", "formats", "layers"}:
        return False
    formats, layers = told["formats"], told["layers"]
    return (
        isinstance(told["source"], str)
        and isinstance(formats, list | tuple)
        and all(isinstance(name, str) for name in formats)
        and isinstance(layers, Mapping)
        and all(isinstance(row, Mapping) and _is_count(row.get("inner")) for row in layers.values())
        and all(isinstance(row.get("error"), float | int | None) for row in layers.values())
    )


def _is_tuning(told: Any) -> bool:
    """Whether something has what is shown of a tuning: settings, counts, and the same figures before and after."""
    if not isinstance(told, Mapping) or not {"tuning", "before", "after", "source"} <= set(told):
        return False
    figures = told["before"], told["after"]
    return (
        isinstance(told["tuning"], Mapping)
        and "loss" in told["tuning"]
        and all(type(told.get(key)) is int for key in ("done", "best", "items", "held_out"))
        and all(isinstance(f, Mapping) and all(type(v) in (int, float) for v in f.values()) for f in figures)
        and set(figures[0]) == set(figures[1])
    )


def config_error(problem: str) -> InputError:
    """The error for a config that cannot be used."""
    return InputError(f"the quantization_config of method {METHOD!r} cannot be used: {problem}")
