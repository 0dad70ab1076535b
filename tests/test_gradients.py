"""Gradient moments by hand, and block by block: the same as from a backward pass of the whole model."""

import pytest
import torch
from torch import nn

from pifa_compile.compression.blocks import find_groups, find_stacks, without_cache
from pifa_compile.compression.flows import capture, find_plan, watch_block
from pifa_compile.compression.gradients import BackwardWalk, gradient_moments, runs_apart
from pifa_compile.compression.losses import draws
from pifa_compile.layers import linear_weights
from pifa_compile.store.scratch import Scratch

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 40}
ENCODER = SIZES | {"intermediate_size": 24, "max_position_embeddings": 32}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES | {"intermediate_size": 24, "num_key_value_heads": 1}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 40}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 8, "max_position_embeddings": 32},
    ),
    "bert": ("BertModel", "BertConfig", ENCODER),
    "t5": (
        "T5EncoderModel",
        "T5Config",
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2, "vocab_size": 40},
    ),
}


def small(kind, batches=3, seed=0):
    """A random model in float64 and batches with padding, where it is no causal model."""
    import transformers

    torch.manual_seed(seed)
    name, config, settings = MODELS[kind]
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval().double()
    found = [{"input_ids": torch.randint(0, 40, (2, 10))} for _ in range(batches)]
    if kind in ("bert", "t5"):
        for batch in found:
            batch["attention_mask"] = torch.ones(2, 10, dtype=torch.int64)
            batch["attention_mask"][1, 6:] = 0
    return model, found


def names_of(model):
    return [w.name for w in linear_weights(model) if w.reason is None]


def walked(model, batches, names, form, store):
    """Gradient moments of every layer, moments of what the first layers of groups read, and the walk."""
    (stack,) = find_stacks(model)
    plan = find_plan(model, [stack], names, batches[0])
    scratch = Scratch(store.root, "run")
    walk = BackwardWalk(model, stack, names, batches, form, 0, scratch, torch.device("cpu"))
    (rows,) = capture(model, plan, batches, {}, walk.forward)
    found, read = {}, {}
    with without_cache(model):
        for _, sums, moments in walk.blocks(rows, [[g.names[0] for g in groups] for groups in plan.inside[0]]):
            found |= sums
            read |= moments
    return found | walk.outside, read, (walk, rows)


@pytest.mark.parametrize("form", ["full", "diagonal"])
@pytest.mark.parametrize("kind", MODELS)
def test_block_by_block_it_is_the_same_as_at_once(kind, form, store, relative):
    model, batches = small(kind)
    names = names_of(model)
    wanted = gradient_moments(model, names, batches, form)
    found, read, _ = walked(model, batches, names, form, store)
    assert set(found) == set(wanted)
    assert len(found) >= 12
    if kind in ("bert", "t5"):
        assert draws(model, names, batches) > 1
    for name in wanted:
        assert found[name].samples == wanted[name].samples, name
        assert relative(found[name].mean(), wanted[name].mean()) < 1e-6, name
    count = 3 * 16 if "attention_mask" in batches[0] else 3 * 20
    assert {moments.count for moments in read.values()} == {count}
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_layers_before_the_blocks_have_their_gradients_too(store):
    model, batches = small("opt")
    names = names_of(model)
    found, _, _ = walked(model, batches, names, "full", store)
    assert {"model.decoder.project_in", "model.decoder.project_out"} <= set(found)


def test_a_block_can_be_visited_again(store):
    """From the gradients that are kept at its output, and hidden states that come from walking forwards."""
    model, batches = small("llama")
    found, _, (walk, rows) = walked(model, batches, names_of(model), "full", store)
    with without_cache(model):
        hidden = [row.hidden for row in rows]
        for index in range(2):
            visit = walk.visit(index)
            for number, (row, states) in enumerate(zip(rows, hidden, strict=True)):
                visit.add(row, states, walk.gradients(index + 1, number))
            assert len(visit.found) == 7
            for name, moments in visit.found.items():
                assert torch.equal(moments.mean(), found[name].mean()), name
            hidden = watch_block(walk.stack.blocks[index], index, rows, hidden, {})


def test_by_hand():
    """A linear model with a squared loss would need labels; its projections' gradients are known exactly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    model.forward = lambda x: nn.Sequential.forward(model, x)
    found = gradient_moments(model, ["0", "1"], [{"x": torch.randn(40, 5, dtype=torch.float64)} for _ in range(50)])
    assert torch.equal(found["1"].mean().diagonal(), torch.ones(3, dtype=torch.float64)), "signs"
    assert found["1"].samples == 2000
    signs = found["1"].mean()
    w = model[1].weight.detach()
    assert torch.allclose(found["0"].mean(), w.T @ signs @ w)


class Entangled(nn.Module):
    """A model whose first layer reaches the blocks, or the loss, by another way too."""

    def __init__(self, way):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.way = way

    def forward(self, x):
        early = self.first(x)
        h = early
        for block in self.blocks:
            h = block(h, early if self.way == "blocks" else None)
        return h + early if self.way == "loss" else h


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, h, other=None):
        return torch.tanh(self.linear(h)) + (0 if other is None else other)


@pytest.mark.parametrize("way", ["nothing else", "blocks", "loss"])
def test_a_model_with_another_way_into_its_blocks_is_not_walked(way):
    torch.manual_seed(0)
    model = Entangled(way)
    (stack,) = find_stacks(model)
    assert runs_apart(model, stack, ["first"], {"x": torch.randn(3, 4)}) is (way == "nothing else")


def test_the_groups_of_a_block_do_not_change_while_gradients_are_walked(store):
    model, batches = small("llama")
    before = find_groups(model, names_of(model), batches[0])
    walked(model, batches, names_of(model), "full", store)
    assert find_groups(model, names_of(model), batches[0]) == before, "no hook is left behind"
