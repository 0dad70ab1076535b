"""Blocks and groups found in small random models of ten architectures, with no table of names."""

import pytest
import torch
from torch import nn

from pifa_compile.compression.blocks import (
    Call,
    find_groups,
    find_stacks,
    runs_in_order,
    stop,
    stopping,
    token_rows,
    without_cache,
)
from pifa_compile.compression.gradients import gradient_moments
from pifa_compile.layers import linear_weights

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
GATED = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = [ATTENTION, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
BERT = [
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    ("attention.output.dense",),
    ("intermediate.dense",),
    ("output.dense",),
]

#: Class, config class, settings, name of the list of blocks, groups of its first block.
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GATED, "model.layers", LLAMA),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GATED, "model.layers", LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", GATED, "model.layers", LLAMA),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GATED | {"head_dim": 8}, "model.layers", LLAMA),
    "phi": (
        "PhiForCausalLM",
        "PhiConfig",
        GATED | {"num_key_value_heads": 4},
        "model.layers",
        [(*ATTENTION, "mlp.fc1"), ("self_attn.dense",), ("mlp.fc2",)],
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0},
        "transformer.h",
        [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "pad_token_id": 0},
        "model.decoder.layers",
        [ATTENTION, ("self_attn.out_proj",), ("fc1",), ("fc2",)],
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        SMALL | {"intermediate_size": 48, "max_position_embeddings": 64},
        "gpt_neox.layers",
        [("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)],
    ),
    "bert": (
        "BertModel",
        "BertConfig",
        SMALL | {"intermediate_size": 48, "max_position_embeddings": 64},
        "encoder.layer",
        BERT,
    ),
    "vit": (
        "ViTModel",
        "ViTConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        | {"image_size": 32, "patch_size": 8},
        None,
        None,
    ),
}


def small_model(kind, seed=0):
    """A random model of an architecture, and a batch for it."""
    import transformers

    torch.manual_seed(seed)
    name, config, settings, *_ = MODELS[kind]
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    if kind == "vit":
        return model, {"pixel_values": torch.randn(2, 3, 32, 32)}
    return model, {"input_ids": torch.randint(0, 64, (2, 12))}


def names_of(model):
    return [w.name for w in linear_weights(model) if w.reason is None]


@pytest.mark.parametrize("kind", MODELS)
def test_the_groups_of_ten_architectures_are_found(kind):
    model, batch = small_model(kind)
    (stack,) = find_stacks(model)
    groups = [group.names for group in find_groups(model, names_of(model), batch)]
    found = [[n.removeprefix(p) for n in g] for p in stack.prefixes[:1] for g in groups if g[0].startswith(p)]
    if kind == "vit":
        assert len(found[0]) == 3
        assert [len(g) for g in found] == [3, 1, 1, 1]
    else:
        assert stack.name == MODELS[kind][3]
        assert [tuple(g) for g in found] == MODELS[kind][4]
    assert len(stack.blocks) == 2
    assert runs_in_order(model, stack, batch)
    assert sorted(n for g in groups for n in g) == sorted(names_of(model)), "every layer is in one group"


@pytest.mark.parametrize("kind", MODELS)
def test_a_block_can_be_run_on_its_own(kind):
    """What a block was called with is enough to run it again, on other hidden states too."""
    model, batch = small_model(kind)
    (stack,) = find_stacks(model)
    calls, hidden = [], []

    def note(module, arguments, keywords):
        call, states = Call.of(arguments, keywords)
        calls.append(call)
        hidden.append(states)

    with torch.no_grad(), without_cache(model):
        handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in stack.blocks]
        model(**batch)
        for handle in handles:
            handle.remove()
        assert torch.equal(calls[0].run(stack.blocks[0], hidden[0]), hidden[1])
        assert not torch.equal(calls[0].run(stack.blocks[0], 2 * hidden[0]), hidden[1])


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_reach_every_layer(kind):
    model, batch = small_model(kind)
    before = [p.requires_grad for p in model.parameters()]
    names = [n for n in names_of(model) if "pooler" not in n]
    found = gradient_moments(model, names, [batch])
    assert set(found) == set(names)
    for name, moments in found.items():
        assert float(moments.mean().diagonal().sum()) > 0, name
        assert moments.samples >= 24
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_repeated_blocks_has_no_stack():
    assert find_stacks(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))) == []
    assert find_stacks(nn.ModuleList(nn.Linear(8, 8) for _ in range(3))) == [], "layers are no blocks"
    stacked = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)))
    (stack,) = find_stacks(stacked)
    assert (stack.name, stack.prefixes) == ("", ("0.", "1.", "2."))


def test_blocks_that_do_not_run_one_after_the_other_are_no_stack():
    class Branches(nn.Module):
        def __init__(self, chained):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
            self.chained = chained

        def forward(self, x):
            total = x
            for block in self.blocks:
                total = block(total) if self.chained else total + block(x)
            return total

    for chained in (True, False):
        model = Branches(chained)
        (stack,) = find_stacks(model)
        assert runs_in_order(model, stack, {"x": torch.randn(2, 4)}) is chained


def test_rows_of_padding_and_of_channels():
    x = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    layer, pointwise = nn.Linear(4, 4), nn.Conv2d(3, 5, 1)
    assert torch.equal(token_rows(x, layer, mask), x[mask.bool()])
    assert torch.equal(token_rows(x.flatten(0, 1), layer, mask), x[mask.bool()])
    assert torch.equal(token_rows(x[:, 0], layer, mask), x[:, 0]), "one row per text: nothing to leave out"
    image = torch.randn(2, 3, 4, 4)
    assert torch.equal(token_rows(image, pointwise), image.movedim(1, -1).reshape(-1, 3))


def test_a_pass_may_be_ended_early():
    with stopping():
        stop()
        raise AssertionError("stop() goes on")
    with pytest.raises(KeyError), stopping():
        raise KeyError
