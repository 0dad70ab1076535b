"""For which modules a factored layer may stand in: by class, by asking, and never where somebody reads the weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from zoo import ZOO

import pifa_compile
from pifa_compile import PifaLinear, Svd
from pifa_compile.substitution import why_not


class Plain(nn.Linear):
    """Another way to write the same, as Falcon has it."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Router(nn.Linear):
    """As Llama 4's: it gives two things."""

    def forward(self, x):
        scores = super().forward(x)
        return scores, scores.topk(2)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Picky(nn.Linear):
    def forward(self, x, *, key):
        return super().forward(x)


class Adapter(nn.Linear):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.extra = nn.Parameter(torch.zeros(1))


class PlainConvolution(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight, self.bias)


class Doubled(nn.Conv1d):
    def forward(self, x):
        return super().forward(torch.cat([x, x], -1))


def instance_forward():
    module = nn.Linear(8, 8)
    module.forward = lambda x: x
    return module


CASES = [
    (lambda: nn.Linear(8, 12), None),
    (lambda: nn.Conv2d(8, 12, 1), None),
    (lambda: Plain(8, 12), None),
    (lambda: Plain(8, 12, bias=False), None),
    (lambda: Plain(8, 12, device="meta"), None),
    (lambda: Plain(8, 12, dtype=torch.bfloat16), None),
    (lambda: PlainConvolution(8, 12, 1), None),
    (lambda: Router(8, 12), "its class Router does more than a linear layer"),
    (lambda: Scaled(8, 12), "Scaled does more"),
    (lambda: Picky(8, 12), "Picky does more"),
    (lambda: Adapter(8, 12), "Adapter does more"),
    (lambda: Doubled(8, 12, 1), "Doubled does more"),
    (instance_forward, "somebody put another forward on it"),
]


@pytest.mark.parametrize(("make", "reason"), CASES)
def test_a_class_that_does_more_is_left_alone(make, reason):
    found = why_not(nn.Sequential(make()), "0")
    assert found is None if reason is None else reason in found


def test_the_weight_that_attention_reads():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    assert why_not(model, "0.out_proj") == "its MultiheadAttention reads the weight and does not call the layer"


def test_a_hook_would_be_lost():
    model = nn.Sequential(nn.Linear(8, 8))
    handle = model[0].register_forward_hook(lambda module, args, output: 2 * output)
    assert why_not(model, "0") == "it has hooks"
    handle.remove()
    assert why_not(model, "0") is None


def test_a_checkpoint_with_attention_of_torch_keeps_its_dense_weights(store, tmp_path, caplog):
    """SigLIP pools by one: its projections are in the run, and only a graph can take them."""
    species = ZOO["siglip"]
    model = species.make()
    model.save_pretrained(tmp_path / "model")
    pifa_compile.compress(model, Svd(density=0.95, rank_multiple=1), name=str(tmp_path / "model"), progress=False)
    both = pifa_compile.load(tmp_path / "model"), pifa_compile.apply_(copy.deepcopy(model))
    assert caplog.text.count("(and 1 more) stays dense in the prepared model: its MultiheadAttention reads") == 2
    with torch.no_grad():
        for prepared in both:
            attention = prepared.vision_model.head.attention
            assert torch.equal(attention.in_proj_weight, model.vision_model.head.attention.in_proj_weight)
            found, wanted = (m(**species.inputs()).logits_per_image for m in (prepared, model))
            assert torch.allclose(found, wanted, atol=1e-4)


def test_a_prepared_model_keeps_what_a_subclass_does(store, caplog):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.route = Plain(32, 48), Router(48, 24)

        def forward(self, x):
            return self.route(torch.relu(self.up(x)))

    model, x = Model().eval(), torch.randn(3, 32)
    pifa_compile.compress(model, Svd(density=0.6, rank_multiple=1), progress=False)
    prepared = pifa_compile.apply_(copy.deepcopy(model))
    assert isinstance(prepared.up, PifaLinear) and type(prepared.route) is Router
    assert "route stays dense in the prepared model: its class Router does more than a linear layer" in caplog.text
    with torch.no_grad():
        scores, (best, _) = prepared(x)
        assert torch.allclose(best, scores.topk(2).values)
        compiled = torch.compile(model, backend="pifa", options={"inner": "eager"})
        assert compiled(x)[0].shape == scores.shape  # a graph shows the layer inside: both are replaced there
    assert torch._dynamo.utils.counters["pifa"]["replaced"] == 2
