"""Blocks that visit a device one at a time. The device is pretended: a visit there is a copy of the weights here."""

import pytest
import torch

from pifa_compile.compression import compress, devices
from pifa_compile.compression.blocks import find_stacks
from pifa_compile.compression.devices import blocks_on_demand, on_device
from pifa_compile.recipes import Mpifa, SvdLlm
from pifa_compile.store import Store

CPU = torch.device("cpu")


def llama(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=40)).eval()


@pytest.fixture
def pretend(monkeypatch):
    """Called, it begins to pretend, and returns a function that tells whether a module's weights are away: a visit
    copies, as `.to` between two devices does, so a weight is away while its storage is not that of home."""

    def begin():
        return pretended(monkeypatch)

    return begin


def pretended(monkeypatch):
    places = {}

    def is_on(t, device):
        return places.setdefault(id(t), t.data_ptr()) != t.data_ptr()

    real = torch.Tensor.to
    monkeypatch.setattr(devices, "_is_on", is_on)
    monkeypatch.setattr(devices, "_copy", lambda t, device: real(t, device, copy=True))
    return lambda module: {t.data_ptr() != places.get(id(t), t.data_ptr()) for t in module.parameters()} == {True}


def test_weights_come_home_as_they_were(pretend):
    model, away = llama(), pretend()
    block = model.model.layers[1]
    before = {name: (t.data_ptr(), t.clone()) for name, t in model.named_parameters()}
    with pytest.raises(RuntimeError, match="in the middle"), on_device(block, CPU):
        assert away(block)
        assert not away(model.model.layers[0])
        with on_device(block, CPU):
            pass
        assert away(block), "the outer visit goes on"
        raise RuntimeError("in the middle")
    for name, t in model.named_parameters():
        assert (t.data_ptr(), True) == (before[name][0], torch.equal(t, before[name][1])), name


def test_one_block_at_a_time(pretend):
    model, away = llama(), pretend()
    (stack,) = find_stacks(model)
    ids = torch.randint(0, 40, (2, 8))
    wanted = model(ids).logits
    seen = []
    with blocks_on_demand(model, CPU):
        for block in stack.blocks:
            linear = block.mlp.down_proj
            linear.register_forward_hook(lambda *_: seen.append([away(b) for b in stack.blocks]))
        assert torch.equal(model(ids).logits, wanted)
        assert away(model.lm_head)
        assert not any(map(away, stack.blocks))
    assert seen == [[i == j for j in range(3)] for i in range(3)]
    assert not away(model.lm_head)
    model(ids)
    assert seen[3:] == [[False] * 3] * 3, "nothing is left behind"


@pytest.mark.parametrize(
    "recipe",
    [Mpifa(density=0.5, rank_multiple=1), SvdLlm(density=0.5, rank_multiple=1, allocation="relative")],
    ids=lambda recipe: recipe.method,
)
def test_compression_on_another_device_moves_one_block_at_a_time_and_gives_the_same(pretend, tmp_path, recipe):
    text = torch.randint(0, 40, (10, 12))
    here = compress(llama(), recipe, text=text, store=Store(tmp_path / "a"), progress=False).run
    model, away = llama(), pretend()
    (stack,) = find_stacks(model)
    most, visits = [], []

    def note(block):
        def hook(*_):
            most.append(sum(map(away, stack.blocks)))
            visits.append(away(block))

        return hook

    for block in stack.blocks:
        block.mlp.act_fn.register_forward_hook(note(block))
        block.self_attn.q_proj.register_forward_pre_hook(note(block))
    there = compress(model, recipe, text=text, store=Store(tmp_path / "b"), progress=False, device="cpu").run
    assert set(most) == {1}
    assert all(visits)
    assert [(r.name, r.object, r.rank) for r in there.layers] == [(r.name, r.object, r.rank) for r in here.layers]
    assert not any(map(away, stack.blocks))
