"""Prepared models: linear layers that own factors in place of dense weights, so that memory really goes down.

apply_(model)      a model in memory: its linear layers become PifaLinear, the dense weights are let go
load(path)         a checkpoint and the store: dense weights of replaced layers are never made
restore_(model)    dense again, from the factors (C P, not the original weights)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from pifa_compile.checkpoint import checkpoint_files, read_into, tensors_of
from pifa_compile.compression.mend import Mender, damage
from pifa_compile.digest import digest_many
from pifa_compile.errors import DamagedError, InputError, NoRunError
from pifa_compile.factors import Factors
from pifa_compile.layers import LinearWeight, held_weights, linear_weights
from pifa_compile.modules import FactoredLinear, PairLinear, PifaLinear, as_parameters, factored_module
from pifa_compile.options import Settings, resolve
from pifa_compile.selection import check_shapes, choose_run, describe
from pifa_compile.store import LayerRecord, Run, Store
from pifa_compile.substitution import why_not

log = logging.getLogger(__name__)
StorePath = Store | str | os.PathLike[str] | None


def apply_(
    model: nn.Module,
    *,
    run: str | None = None,
    density: float | None = None,
    method: str | None = None,
    store: StorePath = None,
    trainable: bool = False,
    damaged: str | None = None,
) -> nn.Module:
    """Replace the linear layers of a model, in place, by the factors of one run; returns the model.

    run, density, method   which run of the store, as in the backend's options; the only one that fits by default
    trainable              whether the factors require gradients
    damaged                "error" or "recompute": what becomes of factors that are not what was written, as in the
                           backend's options

    Weights are recognised by content. Raises NoRunError if no run fits, AmbiguousRunError if several do, and
    DamagedError for factors that are not what was written. After an error the model is as it was; until all factors are
    read, it holds its dense weights beside them.
    """
    apply_run_(model, run=run, density=density, method=method, store=store, trainable=trainable, damaged=damaged)
    return model


def apply_run_(
    model: nn.Module,
    *,
    run: str | None = None,
    density: float | None = None,
    method: str | None = None,
    store: StorePath = None,
    trainable: bool = False,
    damaged: str | None = None,
) -> Run:
    """As ``apply_``; returns the run that was chosen."""
    opened, settings = _store_and_settings(store, run, density, method, damaged)
    weights = [w for w in linear_weights(model) if w.reason is None]
    digests = digest_many([w.parameter.detach() for w in weights])
    chosen = choose_run(opened, digests, settings)
    if chosen is None or not any(d in chosen.by_digest for d in digests):
        raise NoRunError(str(opened.root), [describe(r) for r in opened.runs()])
    check_shapes(chosen, ((d, w.layout, w.shape) for w, d in zip(weights, digests, strict=True)))
    by_parameter = {id(w.parameter): (w, d) for w, d in zip(weights, digests, strict=True)}
    own, names = _Own(opened, trainable), _names(model)
    mender = Mender(opened, chosen, settings.damaged, dict(zip(digests, weights, strict=True)))
    refused: dict[str, str] = {}
    replacements: list[tuple[list[str], nn.Module]] = []  # all are made before one is set
    for name, module in model.named_modules():
        weight, digest = by_parameter.get(id(module._parameters.get("weight")), (None, ""))
        record = chosen.by_digest.get(digest)
        if weight is not None and record is not None and record.object is not None and record.layout == weight.layout:
            if (reason := why_not(model, name)) is not None:
                refused[name] = reason
                continue
            place = weight.parameter.dtype, weight.parameter.device
            factors = mender.factors(record, own.factors, *place)
            made = _factored(module, weight, factors, record.rows_of(digest), trainable)
            replacements.append((names[id(module)], made.train(module.training)))
    held = [w for w in held_weights(model) if w.reason is None]
    for weight, digest in zip(held, digest_many([w.parameter.detach() for w in held]), strict=True):
        record = chosen.by_digest.get(digest)
        if record is not None and record.object is not None:
            refused[weight.name] = why_not(model, weight.name) or ""
    for places, replacement in replacements:
        _set_module(model, places, replacement)
    _tell(refused)
    mender.tell()
    return mender.run


def load(
    source: str | os.PathLike[str],
    *,
    run: str | None = None,
    store: StorePath = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> nn.Module:
    """A Hugging Face checkpoint (directory or id) with the factors of a run, ready to use and in eval mode.

    run      id of the run, or its beginning; by default the only run made of a model of this name
    dtype    of the model; default: the checkpoint's own
    verify   digest every replaced weight, one at a time, and refuse a run that belongs to other weights

    Dense weights of replaced layers are never made: the model is built without memory, factors come from the store, and
    the rest from the checkpoint's files.
    """
    opened = _open(store)
    chosen = opened.run(run) if run is not None else _run_of(opened, str(source))
    records = {name: (r, digests) for r in chosen.layers if r.object is not None for name, digests in r.layers}
    model = empty_model(source, dtype)
    wanted = next(model.parameters()).dtype
    layers = {w.name: w for w in (*linear_weights(model), *held_weights(model))}
    missing = sorted(set(records) - set(layers))
    if missing:
        raise InputError(
            f"run {chosen.run_id} has layers that {type(model).__name__} has not: {', '.join(missing[:5])}"
        )
    given = {name: next(iter(digests.values()), "") for name, (_, digests) in records.items()}
    check_shapes(chosen, ((given[name], layers[name].layout, layers[name].shape) for name in records))
    refused = {name: reason for name in records if (reason := why_not(model, name)) is not None}
    _tell(refused)
    records = {name: found for name, found in records.items() if name not in refused}
    own, names = _Own(opened), _names(model)
    for name, (record, _) in records.items():
        module = model.get_submodule(name)
        try:
            factors = own.factors(record, wanted, torch.device(device))
        except DamagedError as error:
            raise damage(opened, chosen, error, "load has no dense weights to make it again from") from error
        _set_module(model, names[id(module)], _factored(module, layers[name], factors, record.rows_of(given[name])))
    dense = {f"{name}.weight": (name, digests) for name, (_, digests) in records.items()}
    files = checkpoint_files(source)
    shown = files[0].parent
    read_into(model, tensors_of(files), shown, device, lambda key, t: _check(*dense[key], t, verify), skip=set(dense))
    return model.to(device).eval()


def restore_(model: nn.Module) -> nn.Module:
    """Replace every factored layer, in place, by a dense one with the weight that its factors stand for (C P)."""
    names = _names(model)
    for module in list(model.modules()):
        if isinstance(module, PifaLinear | PairLinear):
            _set_module(model, names[id(module)], _dense_module(module).train(module.training))
    return model


def empty_model(source: str | os.PathLike[str], dtype: torch.dtype | None = None) -> nn.Module:
    """The model that a checkpoint's config describes, with parameters on the meta device; raises InputError."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load {source}: {str(error).strip().splitlines()[0]}") from error
    if not config.architectures:
        raise InputError(f"the config of {source} names no architecture; write architectures into its config.json")
    architecture = config.architectures[0]
    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise InputError(f"{source}: this transformers release has no class {architecture}")
    own = getattr(torch, own) if isinstance(own := getattr(config, "dtype", None), str) else own
    with without_memory():
        model: nn.Module = kind(config)
    return model.to(dtype or own or torch.float32)


def _store_and_settings(
    store: StorePath, run: str | None, density: float | None, method: str | None, damaged: str | None
) -> tuple[Store, Settings]:
    given = {"run": run, "density": density, "method": method, "damaged": damaged}
    settings = resolve(None, {key: value for key, value in given.items() if value is not None})
    return (Store(settings.store) if store is None else _open(store)), settings


def _open(store: StorePath) -> Store:
    return store if isinstance(store, Store) else Store(None if store is None else Path(store))


def _run_of(store: Store, source: str) -> Run:
    fitting = [r for r in store.runs() if r.complete and r.header.model == source]
    if len(fitting) != 1:
        raise NoRunError(
            str(store.root), [describe(r) for r in store.runs()], f"{len(fitting)} runs were made of {source!r}"
        )
    return fitting[0]


class _Own:
    """Factors that belong to one model alone: it may train or overwrite them. Layers of one record share them."""

    def __init__(self, store: Store, trainable: bool = False) -> None:
        self._store, self._trainable = store, trainable
        self._made: dict[str | None, Factors] = {}

    def factors(self, record: LayerRecord, dtype: torch.dtype, device: torch.device) -> Factors:
        """The factors of a record in ``dtype`` on ``device``, with parameters for matrices."""
        if record.object not in self._made:
            factors = self._store.factors(record).to(dtype=dtype, device=device)
            self._made[record.object] = as_parameters(factors, self._trainable)
        return self._made[record.object]


def _factored(
    module: nn.Module,
    weight: LinearWeight,
    factors: Factors,
    rows: tuple[int, int] | None,
    trainable: bool = False,
) -> FactoredLinear:
    """What takes the place of a linear module."""
    kind: dict[str, Any] = {"layout": weight.layout, "channel": weight.channel}
    return factored_module(factors, module._parameters.get("bias"), rows=rows, requires_grad=trainable, **kind)


def _names(model: nn.Module) -> dict[int, list[str]]:
    """By the id of each module, all the names that the model has for it."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(name)
    return found


def _tell(refused: dict[str, str]) -> None:
    """One line for all layers that have factors and keep their dense weight, with the reason of the first."""
    if refused:
        name, reason = next(iter(refused.items()))
        others = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        log.warning("%s%s stays dense in the prepared model: %s", name, others, reason)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Let a module take the place of another, under all the names that the model has for that one."""
    _set_module(model, _names(model)[id(model.get_submodule(name))], module)


def _set_module(model: nn.Module, names: Sequence[str], module: nn.Module) -> None:
    """Let a module stand under each of the names."""
    for name in names:
        parent, _, last = name.rpartition(".")
        if not name:
            cure = "put it into a module, e.g. torch.nn.Sequential(model)"
            raise InputError(f"the model itself is a linear layer; {cure}")
        setattr(model.get_submodule(parent), last, module)


def _check(name: str, digests: dict[str, str], dense: Tensor, verify: bool) -> None:
    """Raise unless the checkpoint's weight is the one (or a cast of the one) that was compressed."""
    if verify and digest_many([dense])[0] not in digests.values():
        raise InputError(f"{name}: the checkpoint's weight is not the one that was compressed; name another run")


def _dense_module(module: FactoredLinear) -> nn.Module:
    """The dense layer of the kind that was replaced."""
    matrix = module.weight_matrix()
    dtype, (m, n) = matrix.dtype, matrix.shape
    made: nn.Module
    if module.layout == "conv1x1":
        dimensions = -module.channel - 1
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        made = kind(n, m, 1, bias=module.bias is not None, device="meta", dtype=dtype)
        matrix = matrix.view(m, n, *[1] * dimensions)
    elif module.layout == "in_out":
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            made = Conv1D(m, n)
        matrix = matrix.T.contiguous()
    else:
        made = nn.Linear(n, m, bias=module.bias is not None, device="meta", dtype=dtype)
    made.weight = nn.Parameter(matrix, requires_grad=next(module.parameters()).requires_grad)
    made.bias = module.bias
    return made


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules made inside have parameters on the meta device; buffers (rotary tables ...) are real."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        original(self, name, parameter)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(nn.Module, "register_parameter", register))
        for kind in (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d):
            stack.enter_context(mock.patch.object(kind, "reset_parameters", lambda self: None))
        yield
