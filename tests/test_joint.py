"""Layers that share one factorization: which ones, every way to part them, and that they are served right."""

import copy
import json
import pickle

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import pifa_compile
from pifa_compile.compression.joint import alternatives, first_way, joint_sets
from pifa_compile.errors import RecipeError
from pifa_compile.recipes import Joint, Mpifa, SvdLlm
from pifa_compile.store import Member, Store

ATTENTION = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
BERT = [f"encoder.layer.3.attention.self.{part}" for part in ("query", "key", "value")]


@pytest.mark.parametrize("names", [ATTENTION, BERT])
def test_words_stand_for_what_models_call_their_layers(names):
    q, k, v = names
    assert joint_sets(names, ["q+k"]) == [(q, k)]
    assert joint_sets(names, ["q+k+v", "q+k"]) == [(q, k, v), (q, k)]
    assert joint_sets(names[:1], ["q+k"]) == [], "a set needs a layer for every part"
    assert joint_sets(names, ["gate+up"]) == []


def test_patterns_of_a_part_or_of_the_whole_name():
    q, k, v = ATTENTION
    assert joint_sets(ATTENTION, ["k_*+v_*"]) == [(k, v)]
    assert joint_sets(ATTENTION, ["*.0.*.q_proj+*.0.*.v_proj"]) == [(q, v)]
    assert joint_sets(ATTENTION, ["*.1.*.q_proj+*.1.*.v_proj"]) == []


def test_a_set_stays_within_one_module():
    names = [f"decoder.{i}.cross.{part}_proj" for i in range(2) for part in "kv"]
    assert joint_sets(names, ["k+v"]) == [tuple(names[:2]), tuple(names[2:])]
    experts = [f"experts.{i}.{part}_proj" for i in range(2) for part in ("gate", "up")]
    assert joint_sets(experts, ["gate+up"]) == [tuple(experts[:2]), tuple(experts[2:])]


def test_every_way_to_part_the_layers():
    assert alternatives("qkv", []) == [[("q",), ("k",), ("v",)]]
    assert alternatives("qkv", [("q", "v")]) == [[("q",), ("k",), ("v",)], [("q", "v"), ("k",)]]
    found = alternatives("qkvo", [("q", "k"), ("v", "o"), ("q", "k", "v")])
    assert len(found) == 5
    assert [("q", "k"), ("v", "o")] in found
    assert [("q", "k", "v"), ("o",)] in found
    assert all(sorted(name for part in way for name in part) == sorted("qkvo") for way in found)


def test_of_overlapping_sets_the_first_is_taken():
    sets = [("q", "k"), ("k", "v"), ("v", "o")]
    assert first_way("qkvo", sets) == [("q", "k"), ("v", "o")]
    assert first_way("oqkv", sets[1:2]) == [("o",), ("q",), ("k", "v")]


# --- a whole model ---------------------------------------------------------------------------------------------------


RECIPES = [
    Joint(density=0.6, rank_multiple=4),
    Joint(density=0.6, rank_multiple=4, joint=("q+k+v", "gate+up"), form="pair"),
    Mpifa(density=0.5, rank_multiple=4, allocation="uniform", joint=("q+k+v",), refit="inputs"),
    Mpifa(density=0.5, rank_multiple=1, allocation="relative", joint=("q+k", "gate+up")),
    SvdLlm(density=0.5, rank_multiple=1, joint=("k_*+v_*",)),
]


@pytest.fixture(scope="module")
def llama():
    """Grouped-query attention, so that the parts of a set have different sizes; a bias on some."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "vocab_size": 61}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.3) if name.endswith("bias") else None
    return model


@pytest.fixture(params=RECIPES, ids=lambda r: f"{r.method}-{r.form}")
def run(request, llama, tmp_path):
    text = {} if request.param.method == "joint" else {"text": torch.randint(0, 61, (6, 24))}
    return pifa_compile.compress(llama, request.param, store=tmp_path, progress=False, **text).run


def weights_of(run, store):
    """The weight that stands for each layer of a run, computed from the records alone."""
    found = {}
    for record in run.layers:
        if record.object is None:
            continue
        rows = store.factors(record).weight()
        start = 0
        for member in record.members or [Member(record.name, {}, record.shape[0])]:
            found[member.name] = rows[start : start + member.m]
            start += member.m
    return found


def test_a_run_with_joint_layers_serves_every_way(llama, run, tmp_path):
    """Both in the graph and as modules, against a dense model with the weights that the records stand for."""
    joined = [record for record in run.layers if record.members]
    assert joined
    assert run.totals.layers == 15, "14 layers and the output embedding, members one by one"
    dense = copy.deepcopy(llama)
    for name, weight in weights_of(run, Store(tmp_path)).items():
        dense.get_submodule(name).weight.data = weight.float()
    ids = torch.randint(0, 61, (3, 17))
    with torch.no_grad():
        wanted = dense(ids).logits
        prepared = pifa_compile.apply_(copy.deepcopy(llama), store=tmp_path)
        options = {"store": tmp_path, "inner": "eager"}
        counters.clear()
        torch._dynamo.reset()
        found = {
            "modules": prepared(ids).logits,
            "transparent": torch.compile(llama, backend="pifa", options=options)(ids).logits,
            "prepared": torch.compile(prepared, backend="pifa", options=options)(ids).logits,
            "restored": pifa_compile.restore_(copy.deepcopy(prepared))(ids).logits,
        }
    for way, logits in found.items():
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4, msg=lambda text, way=way: f"{way}: {text}")
    assert counters["pifa"]["replaced"] == sum(len(r.layers) for r in run.layers if r.object)


def test_layers_of_one_set_share_their_pivot_rows(llama, tmp_path):
    """Also when the model moves to another dtype; and the model has the numbers that the run says."""
    recipe = Joint(density=0.6, rank_multiple=4)
    report = pifa_compile.compress(llama, recipe, store=tmp_path, progress=False)
    model = pifa_compile.apply_(copy.deepcopy(llama), store=tmp_path)
    q, k = (model.get_submodule(name) for name in ATTENTION[:2])
    assert q.pivot_rows is k.pivot_rows
    assert (q.out_features, k.out_features, q.rank) == (32, 16, k.rank)
    pivots = sum(r.rank for r in report.run.layers if r.object)  # the row order counts as one number per pivot
    facts = report.summary()
    kept = facts["model_density"] * facts["model_numbers"]
    assert sum(p.numel() for p in model.parameters()) + pivots == pytest.approx(kept)
    again = pickle.loads(pickle.dumps(model.to(torch.bfloat16)))
    q, k = (again.get_submodule(name) for name in ATTENTION[:2])
    assert q.pivot_rows is k.pivot_rows
    assert q.pivot_rows.dtype == torch.bfloat16


def test_one_layer_of_a_set_alone_runs_on_its_part(llama, tmp_path):
    """The graph holds k but not q: its factors are the shared pivot rows and its own coefficients."""
    pifa_compile.compress(llama, Joint(density=0.6, rank_multiple=4), store=tmp_path, progress=False)
    run = Store(tmp_path).runs()[0]
    k = llama.get_submodule(ATTENTION[1])
    x = torch.randn(5, 32)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(lambda x: k(x) * 2, backend="pifa", options={"store": tmp_path, "inner": "eager"})(x)
    weight = weights_of(run, Store(tmp_path))[ATTENTION[1]]
    wanted = 2 * (x.double() @ weight.T + k.bias.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_both_in_one_graph_make_one_operator(llama, tmp_path):
    """q and k read one tensor: one product with the pivot rows, one with the coefficients, for both."""
    pifa_compile.compress(llama, Joint(density=0.6, rank_multiple=4, joint=("q+k",)), store=tmp_path, progress=False)
    attention = llama.model.layers[0].self_attn
    options = {"store": tmp_path, "inner": "eager", "dump": tmp_path / "dump"}
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(lambda x: (attention.q_proj(x), attention.k_proj(x)), backend="pifa", options=options)(
            torch.randn(5, 32)
        )
    (after,) = (tmp_path / "dump").glob("*/replace.after.py")
    assert after.read_text().count("torch.ops.pifa.linear") == 1
    (table,) = (tmp_path / "dump").glob("*/linears.json")
    rows = json.loads(table.read_text())["linears"]
    assert [row["state"] for row in rows] == ["pifa, joint"] * 2
    record = Store(tmp_path).runs()[0].by_name[ATTENTION[0]]
    assert sum(row["numbers_after"] for row in rows) == record.numbers


def test_an_interrupted_joint_run_equals_one_that_was_not(llama, tmp_path, monkeypatch):
    recipe = Mpifa(density=0.5, rank_multiple=2, allocation="relative", joint=("q+k", "gate+up"))
    text = torch.randint(0, 61, (6, 24))
    whole = pifa_compile.compress(llama, recipe, text=text, store=tmp_path / "whole", progress=False).run
    original, calls = Store.put_factors, []

    def failing(self, factors):
        calls.append(factors)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, factors)

    monkeypatch.setattr(Store, "put_factors", failing)
    with pytest.raises(KeyboardInterrupt):
        pifa_compile.compress(llama, recipe, text=text, store=tmp_path / "cut", progress=False)
    again = pifa_compile.compress(llama, recipe, text=text, store=tmp_path / "cut", progress=False).run
    assert len(calls) == 1 + sum(r.object is not None for r in whole.layers), "what was finished was not done again"
    assert {r.name: r.object for r in again.layers} == {r.name: r.object for r in whole.layers}


@pytest.mark.parametrize("joint", ["q+k", ["q"], ["q+"], [7], None])
def test_what_is_no_group_is_refused(joint):
    with pytest.raises(RecipeError, match="'gate\\+up'"):
        Joint(density=0.5, joint=joint)
