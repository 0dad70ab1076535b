"""Linear weights are found in any model, once, with the matrix they hold and the reason why one must stay dense."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import pifa_compile
from pifa_compile.layers import (
    LinearWeight,
    as_matrix,
    held_weights,
    is_output_embedding_name,
    is_plain,
    layout_of,
    linear_weights,
    matrix_shape,
    output_embedding,
    supported_dtype,
)


@pytest.fixture(scope="module")
def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=8))


@pytest.mark.parametrize(
    ("module", "layout"),
    [
        (nn.Linear(5, 7), "out_in"),
        (Conv1D(7, 5), "in_out"),
        (nn.Conv1d(5, 7, 1), "conv1x1"),
        (nn.Conv2d(5, 7, 1), "conv1x1"),
        (nn.Conv3d(5, 7, 1), "conv1x1"),
        (nn.Conv2d(5, 7, 1, padding="same"), "conv1x1"),
        (nn.Conv2d(5, 7, 1, padding="valid", bias=False), "conv1x1"),
        (nn.Conv2d(5, 7, (1, 3)), None),
        (nn.Conv2d(5, 7, 1, stride=2), None),
        (nn.Conv2d(5, 7, 1, padding=1), None),
        (nn.Conv2d(4, 8, 1, groups=2), None),
        (nn.ConvTranspose2d(5, 7, 1), None),
        (nn.Embedding(5, 7), None),
        (nn.Bilinear(5, 7, 3), None),
        (nn.LayerNorm(5), None),
    ],
)
def test_a_module_holds_a_linear_layer_in_one_of_three_ways(module, layout):
    assert layout_of(module) == layout


@pytest.mark.parametrize("module", [nn.Linear(5, 7), Conv1D(7, 5), nn.Conv1d(5, 7, 1), nn.Conv2d(5, 7, 1)])
def test_the_matrix_does_what_the_module_does(module):
    """m x n, whatever the parameter's own shape is, and without a copy."""
    nn.init.normal_(module.weight)
    x = torch.randn(3, 5)
    spatial = module.weight.dim() - 2
    shaped = x.reshape(3, 5, *[1] * spatial) if spatial else x
    with torch.no_grad():
        wanted = module(shaped).reshape(3, 7) - module.bias
    matrix = as_matrix(module.weight, layout_of(module))
    assert matrix.shape == matrix_shape(module.weight, layout_of(module)) == (7, 5)
    torch.testing.assert_close(x @ matrix.T, wanted)
    assert matrix.data_ptr() == module.weight.data_ptr()
    assert not matrix.requires_grad


def test_weights_come_once_in_module_order_under_their_names():
    inner = nn.Linear(4, 6)
    chain = nn.Sequential(inner, nn.ReLU(), nn.Linear(6, 4))
    model = nn.ModuleDict({"b": chain, "a": nn.Conv1d(4, 4, 1), "again": inner})
    found = list(linear_weights(model))
    assert [(w.name, w.shape, w.layout) for w in found] == [
        ("b.0", (6, 4), "out_in"),
        ("b.2", (4, 6), "out_in"),
        ("a", (4, 4), "conv1x1"),
    ]
    assert found[0].parameter is inner.weight
    assert [w.reason for w in found] == [None] * 3


def test_a_weight_that_two_linear_layers_share_comes_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert [(w.name, w.reason) for w in linear_weights(model)] == [("0", None)]


def test_a_linear_model_is_found_without_a_name():
    assert [w.name for w in linear_weights(nn.Linear(4, 5))] == [""]


def test_gpt2_has_transposed_weights_and_a_tied_output(gpt2):
    found = {w.name: w for w in linear_weights(gpt2)}
    assert found["transformer.h.0.mlp.c_fc"].shape == (64, 16)
    assert found["transformer.h.0.mlp.c_fc"].layout == "in_out"
    assert found["lm_head"].reason == "output embedding, left dense by default"
    assert [w.name for w in found.values() if w.reason] == ["lm_head"]


class Model(nn.Module):
    """A language model in little, with an output embedding by any name."""

    def __init__(self, getter=True):
        super().__init__()
        self.embed, self.body, self.out = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
        if getter:
            self.get_output_embeddings = lambda: self.out


def test_the_output_embedding_is_what_the_model_says(gpt2):
    model = Model()
    assert output_embedding(model) is model.out
    assert output_embedding(gpt2) is gpt2.lm_head
    assert [(w.name, w.reason) for w in linear_weights(model)] == [
        ("body", None),
        ("out", "output embedding, left dense by default"),
    ]


@pytest.mark.parametrize("error", [NotImplementedError, AttributeError])
def test_a_model_that_has_no_output_embedding_may_say_so_by_an_error(error):
    def getter():
        raise error

    model = Model(getter=False)
    model.get_output_embeddings = getter
    assert output_embedding(model) is None
    assert [w.reason for w in linear_weights(model)] == [None, None]
    model.get_output_embeddings = lambda: None
    assert output_embedding(model) is None
    assert output_embedding(nn.Linear(2, 2)) is None


def test_a_layer_that_shares_the_output_weight_is_the_output_embedding_too():
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "out": nn.Linear(4, 4)})
    model["first"].weight = model["out"].weight
    model.get_output_embeddings = lambda: model["out"]
    assert [(w.name, w.reason) for w in linear_weights(model)] == [("first", "output embedding, left dense by default")]


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("lm_head", True), ("model.lm_head", True), ("embed_out", True), ("lm_head.dense", False), ("my_lm_head", False)],
)
def test_output_embeddings_are_known_by_name(name, is_one):
    assert is_output_embedding_name(name) == is_one


def test_a_weight_with_another_kind_of_user_stays_dense():
    model = Model(getter=False)
    model.out.weight = model.embed.weight
    reasons = {w.name: w.reason for w in linear_weights(model)}
    assert reasons == {"body": None, "out": "shared with a module that is no linear layer"}


def test_weights_that_cannot_be_factored_say_why():
    model = nn.ModuleDict({"int8": nn.Linear(4, 4), "meta": nn.Linear(4, 4, device="meta"), "none": nn.Linear(4, 4)})
    model["int8"].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    model["none"].register_parameter("weight", None)
    model["flat"] = nn.Linear(4, 4)
    model["flat"].weight = nn.Parameter(torch.ones(16))
    model["subclass"] = nn.Linear(4, 4)
    model["subclass"].weight = type("Packed", (nn.Parameter,), {})(torch.ones(4, 4))
    found = {w.name: w for w in linear_weights(model)}
    assert set(found) == {"int8", "meta", "flat", "subclass"}
    assert found["int8"].reason == "torch.int8 weight: only float64, float32, float16 and bfloat16 are replaced"
    for name, kind in [("meta", "on meta"), ("flat", r"of shape (16,)"), ("subclass", "is a Packed of")]:
        assert kind in found[name].reason
        assert found[name].reason.endswith("not a plain matrix")
    assert found["flat"].shape == (16, 1)


def test_only_floating_point_of_16_bits_and_more_is_supported():
    supported = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    others = {torch.int8, torch.int64, torch.complex64, torch.float8_e4m3fn, torch.bool}
    assert {d for d in supported | others if supported_dtype(d)} == supported


def test_plain_weights_have_content_in_rows():
    assert is_plain(torch.ones(2, 2))
    assert is_plain(nn.Parameter(torch.ones(2, 2)))
    assert not is_plain(torch.ones(2, 2, device="meta"))
    assert not is_plain(torch.eye(2).to_sparse())


def test_a_weight_knows_its_matrix():
    assert LinearWeight("a", torch.ones(3, 5), "in_out").shape == (5, 3)
    assert LinearWeight("a", torch.ones(3, 5, 1, 1), "conv1x1").shape == (3, 5)


class Router(nn.Module):
    """As mixtures of experts have it: a matrix of its own, and more than a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 8))


def test_a_matrix_of_another_kind_of_module_is_known_and_stays_dense():
    table = nn.Embedding(4, 8)
    model = nn.ModuleDict({"router": Router(), "table": table, "norm": nn.LayerNorm(8), "rnn": nn.RNN(8, 8)})
    (found,) = linear_weights(model)
    assert (found.name, found.shape) == ("router", (4, 8))
    assert found.reason == "the weight of Router, which is no linear layer"


def test_a_run_of_a_model_with_routers_is_one_of_the_whole_model(store):
    """Or else asking for its density would compress again."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.layer = Router(), nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(x) * F.linear(x, self.router.weight).amax(-1, keepdim=True)

    model = Routed().eval()
    pifa_compile.compress(model, pifa_compile.Svd(density=0.5, rank_multiple=1), progress=False)
    with torch.no_grad():
        torch.compile(model, backend="pifa", options={"density": 0.5, "inner": "eager"})(torch.randn(3, 8))
    assert len(store.runs()) == 1
    assert torch._dynamo.utils.counters["pifa"]["replaced"] == 1


def test_input_projections_of_attention_are_held_by_it():
    packed, apart = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    found = list(held_weights(nn.ModuleDict({"packed": packed, "apart": apart})))
    assert [(w.name, w.shape, w.reason) for w in found] == [
        ("packed.in_proj_weight", (24, 8), None),
        ("apart.q_proj_weight", (8, 8), None),
        ("apart.k_proj_weight", (8, 6), None),
        ("apart.v_proj_weight", (8, 4), None),
    ]
