"""Attention that torch captures as one call: written out, its linear layers are found, and it gives the same."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from zoo import lower_rank_

import pifa_compile
from pifa_compile import Mpifa, Svd
from pifa_compile.passes import attention
from pifa_compile.passes.attention import open_attention

WIDTH, HEADS, BATCH, LENGTH, SOURCE = 32, 4, 2, 7, 5


class Attention(nn.Module):
    """nn.MultiheadAttention in one way to call it."""

    def __init__(self, function, **settings) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, **settings)
        self.function = function

    def forward(self, x, source):
        return self.function(self.inner, x, source)


def padding():
    return torch.tensor([[False] * LENGTH, [False] * (LENGTH - 2) + [True] * 2])


def ahead():
    return torch.ones(LENGTH, LENGTH).triu(1).bool()


FIRST = {"batch_first": True}
# name: (settings of the module, the call, linear layers that are found, of these replaced)
CASES = {
    "self": ({}, lambda a, x, s: a(x, x, x), 2, 2),
    "self, batch first": (FIRST, lambda a, x, s: a(x, x, x), 2, 2),
    "self, no bias": (FIRST | {"bias": False}, lambda a, x, s: a(x, x, x), 2, 2),
    "self, no weights": (FIRST, lambda a, x, s: a(x, x, x, need_weights=False)[0], 2, 2),
    "self, all weights": (FIRST, lambda a, x, s: a(x, x, x, average_attn_weights=False), 2, 2),
    "self, weights alone": (FIRST, lambda a, x, s: a(x, x, x)[1], 2, 2),
    "self, mask": ({}, lambda a, x, s: a(x, x, x, attn_mask=torch.ones(BATCH, BATCH).triu(1).bool()), 2, 2),
    "self, causal": (
        {},
        lambda a, x, s: a(x, x, x, attn_mask=ahead()[:2, :2], is_causal=True, need_weights=False)[0],
        2,
        2,
    ),
    "self, unbatched": ({}, lambda a, x, s: a(*[x[0]] * 3), 4, 1),
    "self, zero attention": ({"add_zero_attn": True}, lambda a, x, s: a(x, x, x), 2, 2),
    "self, bias of keys": ({"add_bias_kv": True}, lambda a, x, s: a(x, x, x), 2, 2),
    "cross": (FIRST, lambda a, x, s: a(x, s, s), 3, 1),
    "cross, three tensors": (FIRST, lambda a, x, s: a(x, s, s + 1), 4, 1),
    "cross, of other widths": (FIRST | {"kdim": WIDTH, "vdim": 24}, lambda a, x, s: a(x, s, s[..., :24]), 4, 4),
}


def compressed(model):
    torch.manual_seed(0)
    lower_rank_(model.eval())
    pifa_compile.compress(model, Svd(density=0.95, rank_multiple=1), progress=False)
    return model


def layers_of(folder):
    """The rows of the one dump in a folder."""
    (table,) = folder.glob("*/linears.json")
    return json.loads(table.read_text())["linears"]


def close(found, wanted):
    pairs = zip(*(torch.utils._pytree.tree_leaves(v) for v in (found, wanted)), strict=True)
    return all(torch.allclose(f, w, atol=1e-5) for f, w in pairs)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_every_call_gives_the_same(case, fast, store):
    settings, function, found, replaced = CASES[case]
    model = compressed(Attention(function, **settings))
    x, source = torch.randn(BATCH, LENGTH, WIDTH), torch.randn(BATCH, SOURCE, WIDTH)
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with torch.no_grad():
            y = torch.compile(model, backend="pifa", fullgraph=True, options={"inner": "eager"})(x, source)
            assert close(y, model(x, source))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert (counters["pifa"]["matched"], counters["pifa"]["replaced"]) == (found, replaced)


def test_sizes_that_change(store):
    model = compressed(Attention(lambda a, x, s: a(x, x, x), **FIRST))
    compiled = torch.compile(model, backend="pifa", dynamic=True, options={"inner": "eager"})
    with torch.no_grad():
        for batch, length in [(2, 7), (3, 9), (5, 4)]:
            x = torch.randn(batch, length, WIDTH)
            assert close(compiled(x, x), model(x, x))
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["pifa"]["replaced"] == 2


def test_dropout_and_gradients_stay(store, relative):
    """Frozen weights in training: the same numbers are dropped, and inputs get the same gradient."""
    model = compressed(Attention(lambda a, x, s: a(x, x, x)[0], dropout=0.5)).train().requires_grad_(False)
    x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    compiled = torch.compile(model, backend="pifa", options={"inner": "eager"})
    gradients = []
    for call in (model, compiled):
        torch.manual_seed(3)
        gradients.append(torch.autograd.grad(call(x, x).square().sum(), x)[0])
    assert relative(*gradients[::-1]) < 1e-5
    assert counters["pifa"]["replaced"] == 2


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_plain_transformer(store, batch_first, norm_first, activation):
    model = nn.Transformer(
        WIDTH, HEADS, 1, 1, 48, activation=activation, batch_first=batch_first, norm_first=norm_first
    )
    compressed(model)
    source, target = torch.randn(BATCH, SOURCE, WIDTH), torch.randn(BATCH, LENGTH, WIDTH)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    with torch.no_grad():
        exact = model(source, target)
        y = torch.compile(model, backend="pifa", fullgraph=True, options={"inner": "eager"})(source, target)
        assert close(y, exact)
        # Encoder: projections, two layers. Decoder: the same, and a cross attention, whose input projection is split.
        assert (counters["pifa"]["matched"], counters["pifa"]["replaced"]) == (11, 9)
        assert close(pifa_compile.apply_(copy.deepcopy(model))(source, target), exact)


MASKS = {
    "padding": {"src_key_padding_mask": padding()},
    "causal": {"mask": ahead(), "is_causal": False},
    "both": {"mask": ahead(), "src_key_padding_mask": padding(), "is_causal": False},
    "causal, in numbers": {"mask": nn.Transformer.generate_square_subsequent_mask(LENGTH), "is_causal": True},
}


@pytest.mark.filterwarnings("ignore")  # nn.TransformerEncoder warns of mixed masks
@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("fast", [True, False])
def test_masks_of_a_transformer(case, fast, store):
    model = compressed(nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True), 2))
    x, keep = torch.randn(BATCH, LENGTH, WIDTH), torch.ones(BATCH, LENGTH).bool()
    if "src_key_padding_mask" in MASKS[case]:
        keep = ~padding()  # what stands in the place of padding is anybody's guess
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with torch.no_grad():
            y = torch.compile(model, backend="pifa", fullgraph=True, options={"inner": "eager"})(x, **MASKS[case])
            assert close(y[keep], model(x, **MASKS[case])[keep])
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert (counters["pifa"]["matched"], counters["pifa"]["replaced"]) == (8, 8)


def test_what_cannot_be_written_out_says_why(store, tmp_path):
    """Every second of an unknown number of tokens: a size that is no sum or product of the graph's own."""
    model = compressed(Attention(lambda a, x, s: a(*[x[:, ::2].contiguous()] * 3)[0], **FIRST))
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        options = {"inner": "eager", "dump": tmp_path}
        compiled = torch.compile(model, backend="pifa", dynamic=True, options=options)
        assert close(compiled(x, x), model(x, x))
        report = pifa_compile.dry_run(model, x, x, dynamic=True)
    for rows in (layers_of(tmp_path), report.rows):
        (row,) = rows
        assert row["name"] == "inner.in_proj_weight" and row["state"] == "dense"
        assert "is not known in the graph" in row["reason"]


def test_the_fast_path_between_different_tensors_stays(store, tmp_path):
    """No module of torch's calls it so."""

    def between(a, x, s):
        weights = a.in_proj_weight, a.in_proj_bias, a.out_proj.weight, a.out_proj.bias
        return torch._native_multi_head_attention(x, s, s, WIDTH, HEADS, *weights, need_weights=False)[0]

    model = compressed(Attention(between, **FIRST))
    x, source = torch.randn(BATCH, LENGTH, WIDTH), torch.randn(BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        y = torch.compile(model, backend="pifa", options={"inner": "eager", "dump": tmp_path})(x, source)
        assert close(y, model(x, source))
    (row,) = layers_of(tmp_path)
    assert row["state"] == "dense" and "between different tensors in the fast path" in row["reason"]


def part_without_overrides(x, *rest, **settings):
    with torch._C.DisableTorchFunction():
        y = x * 2
    return y + x, None


def with_a_property(*given, **settings):
    y, weights = attention._attention(*given, **settings)
    return y.mT.mT, weights


# What another release of torch may compute with: (the body, layers that are replaced, why others stay)
BODIES = {
    "a property": (with_a_property, 2, None),
    "a part that nobody sees": (part_without_overrides, 0, "a tensor comes from outside of the graph"),
}


@pytest.mark.parametrize("case", BODIES)
def test_what_torch_computes_is_followed_or_told(case, store, tmp_path, monkeypatch):
    body, replaced, reason = BODIES[case]
    monkeypatch.setitem(attention._BODIES, F.multi_head_attention_forward, body)
    model = compressed(Attention(lambda a, x, s: a(x, x, x)[0]))
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        y = torch.compile(model, backend="pifa", options={"inner": "eager", "dump": tmp_path})(x, x)
        assert close(y, model(x, x))
    assert counters["pifa"]["replaced"] == replaced
    assert all((reason or "") in (row["reason"] or "") for row in layers_of(tmp_path))


def test_outputs_that_are_handed_on_together_stay_so(store):
    """In a graph of Dynamo's each output is taken out of the call by itself."""
    results = []

    def backend(gm, inputs):
        (call,) = (n for n in gm.graph.nodes if n.target is F.multi_head_attention_forward)
        with gm.graph.inserting_after(call):
            together = gm.graph.call_function(tuple, (call,))
        before = [n.name for n in gm.graph.nodes]
        results.append(open_attention(gm, None))
        assert [n.name for n in gm.graph.nodes] == before
        gm.graph.erase_node(together)
        return gm

    model, x = Attention(lambda a, x, s: a(x, x, x)), torch.randn(BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        assert close(torch.compile(model, backend=backend)(x, x), model(x, x))
    ((_, changed, ((_, reason),)),) = (vars(result).values() for result in results)
    assert changed == 0 and "handed on together" in reason


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_a_size_that_is_known_only_in_the_call_is_told(store, tmp_path):
    model = compressed(Attention(lambda a, x, s: a(*[x[s.sum((1, 2)) > 0]] * 3)[0], **FIRST))
    x = torch.randn(BATCH + 3, LENGTH, WIDTH)
    with torch.no_grad():
        y = torch.compile(model, backend="pifa", options={"inner": "eager", "dump": tmp_path})(x, x)
        assert close(y, model(x, x))
    (row,) = layers_of(tmp_path)
    assert row["state"] == "dense" and "is not known in the graph" in row["reason"]


def test_a_calibrated_method_says_why_it_leaves_attention_dense(store):
    model = nn.TransformerEncoderLayer(WIDTH, HEADS, 48)
    batches = [{"src": torch.randn(4, 16, WIDTH)} for _ in range(4)]
    report = pifa_compile.compress(
        model.eval(), Mpifa(density=0.6, allocation="uniform", weighting="none"), text=batches, progress=False
    )
    reasons = {r.name: r.reason for r in report.run.layers if r.object is None}
    assert set(reasons) == {"self_attn.in_proj_weight", "self_attn.out_proj"}
    assert "held by its attention" in reasons["self_attn.in_proj_weight"]
    assert "reads nothing" in reasons["self_attn.out_proj"]


def test_a_prepared_model_leaves_the_projection_that_attention_reads(store, caplog):
    model = compressed(nn.TransformerEncoderLayer(WIDTH, HEADS, 48))
    prepared = pifa_compile.apply_(model)
    assert type(prepared.self_attn.out_proj) is not pifa_compile.PifaLinear
    assert isinstance(prepared.linear1, pifa_compile.PifaLinear)
    told = "self_attn.out_proj (and 1 more) stays dense in the prepared model: its MultiheadAttention reads"
    assert told in caplog.text
