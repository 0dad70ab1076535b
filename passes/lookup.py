"""Give every open linear layer its factors from the one compression run that is used, or the reason why it has none."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from pifa_compile import _torch
from pifa_compile.digest import digest_many
from pifa_compile.passes.plan import Context, LinearSite, PassResult
from pifa_compile.staleness import weight_state
from pifa_compile.store import Run

UNKNOWN = "no factors: the weight is not in run {run}; compress the whole model, or give a density"
NO_RUN = "no factors: no compression run fits; run pifa_compile.compress(model, ...) first, or give a density"
PREPARED = "dense in a model that has its factors already; name a run, or give a density, to replace it too"


def lookup(gm: fx.GraphModule, context: Context) -> PassResult:
    """Fill in ``record`` of the open sites from the run that ``context.find_run`` chooses; the graph stays as it is."""
    plan = context.plan
    sites = list(plan.weights().values())
    if not sites:
        return PassResult(0, 0)
    if _is_prepared(context) and context.settings.run is None and context.settings.density is None:
        # What its own run left dense stays so: another run of the store may have factors of it, of another density.
        for site in plan.sites:
            site.reason = PREPARED if site.open else site.reason
        return PassResult(len(sites), 0, plan.skipped())
    digests = dict(zip((s.weight for s in sites), weight_digests([s.parameter for s in sites]), strict=True))
    for site in plan.sites:
        site.digest = digests.get(site.weight) if site.open else None
    plan.run = context.find_run(sites)
    for site in plan.sites:
        if site.open:
            _fill(site, plan.run)
    return PassResult(len(sites), 0, plan.skipped())


def _is_prepared(context: Context) -> bool:
    """Whether layers of the graph came with factors of their own."""
    sites = context.plan.sites
    return any(s.prepared or _torch.innermost_module(s.node) in ("PifaLinear", "PairLinear") for s in sites)


def weight_digests(weights: Sequence[Tensor | None]) -> list[str]:
    """The content digests of weights; one that was digested before and not changed since is not read again.

    A change is seen as Tensor._version or the data pointer sees it: an in-place edit through ``.data`` is not.
    """
    tensors = [w for w in weights if w is not None]
    fresh = [w for w in tensors if _KNOWN.get(w, (None,))[0] != weight_state(w)]
    for weight, found in zip(fresh, digest_many([w.detach() for w in fresh]), strict=True):
        _KNOWN[weight] = (weight_state(weight), found)
    return [_KNOWN[w][1] for w in tensors]


_KNOWN: MutableMapping[Tensor, Any] = WeakTensorKeyDictionary()


def _fill(site: LinearSite, run: Run | None) -> None:
    site.record = run.by_digest.get(site.digest or "") if run is not None else None
    if run is None:
        site.reason = NO_RUN
    elif site.record is None:
        site.reason = UNKNOWN.format(run=run.header.run_id)
    elif site.record.layout != site.layout:
        site.reason = f"the factors in run {run.header.run_id} are of the weight's transpose"
    elif site.record.object is not None:
        site.rows = site.record.rows_of(site.digest or "")
    else:
        site.reason = site.record.reason or "left dense when the model was compressed"
