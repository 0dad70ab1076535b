"""Checkpoints with the low-rank pairs of other methods, as factors."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import pifa_compile
from pifa_compile.cli import main
from pifa_compile.errors import InputError
from pifa_compile.importing import FORMATS, import_pairs
from pifa_compile.layers import linear_weights
from pifa_compile.modules import PifaLinear, factored_layers

MODELS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=64, tie_word_embeddings=True,
        )
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
            word_embed_proj_dim=32, max_position_embeddings=32,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)),
}  # fmt: skip
K = 7
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def paired(model, format, dtype=torch.float32, leave=(), inner_bias=False):
    """A state dict in which layers are pairs of rank K, and what the model then computes, in float64.

    leave  layers that stay dense
    """
    model, state = model.to(dtype).eval(), None
    exact = copy.deepcopy(model).double()
    state = dict(model.state_dict())
    for weight in list(linear_weights(model)):
        if weight.reason is not None or weight.name.endswith(leave or "\0"):
            continue
        m, n = weight.shape
        right = (torch.randn(K, n) / n**0.5).to(dtype)
        left = (torch.randn(m, K) / K**0.5).to(dtype)
        parent, _, name = weight.name.rpartition(".")
        names = FORMATS.get(format, format).format(
            layer=weight.name, parent=parent, name=name, stem=name.removesuffix("_proj")
        )
        first, second = names.split(",")
        del state[f"{weight.name}.weight"]
        state |= {f"{first}.weight": right, f"{second}.weight": left}
        bias = state.pop(f"{weight.name}.bias", None)
        module = exact.get_submodule(weight.name)
        matrix = left.double() @ right.double()
        module.weight.data = matrix.T.contiguous() if weight.layout == "in_out" else matrix
        if bias is not None:
            state[f"{second}.bias"] = bias = torch.randn(m).to(dtype)
            module.bias.data = bias.double()
            if inner_bias:
                state[f"{first}.bias"] = torch.randn(K).to(dtype)
                module.bias.data = bias.double() + left.double() @ state[f"{first}.bias"].double()
    with torch.no_grad():
        return state, exact(IDS).logits


def config_folder(model, tmp_path):
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "config")
    return tmp_path / "config"


@pytest.mark.parametrize("format", [*FORMATS, "{parent}.{name}_down,{parent}.{name}_up"])
@pytest.mark.parametrize("name", MODELS)
def test_every_format_of_every_model(name, format, tmp_path, relative):
    model = MODELS[name]()
    state, wanted = paired(model, format, inner_bias=name == "opt")
    pattern = format if format not in FORMATS else None  # a known one is found by its names
    report = import_pairs(state, config_folder(model, tmp_path), pattern=pattern)
    layers = dict(factored_layers(report.model))
    assert layers and all(isinstance(layer, PifaLinear) and layer.rank == K for layer in layers.values())
    assert [row["name"] for row in report.rows] == list(layers)
    assert all(row["numbers"] < row["numbers_pair"] and row["error"] < 1e-5 for row in report.rows)
    with torch.no_grad():
        assert relative(report.model(IDS).logits, wanted) < 1e-5
        assert (
            relative(torch.compile(report.model, backend="pifa", options={"inner": "eager"})(IDS).logits, wanted) < 1e-5
        )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_sixteen_bits(dtype, bound, tmp_path, relative):
    model = MODELS["llama"]()
    state, wanted = paired(model, "sequential", dtype)
    report = import_pairs(state, config_folder(model, tmp_path), dtype=dtype)
    assert {p.dtype for p in report.model.parameters()} == {dtype}
    with torch.no_grad():
        assert relative(report.model(IDS).logits, wanted) < bound


def test_layers_that_the_method_left_alone_load_as_they_are(tmp_path, relative):
    model = MODELS["llama"]()
    state, wanted = paired(model, "svd-llm", leave=("down_proj", "o_proj"))
    report = import_pairs(state, config_folder(model, tmp_path))
    assert type(report.model.model.layers[0].mlp.down_proj) is nn.Linear
    with torch.no_grad():
        assert relative(report.model(IDS).logits, wanted) < 1e-5


def test_the_command_writes_what_transformers_loads(tmp_path, capsys, relative):
    model = MODELS["llama"]()
    state, wanted = paired(model, "svd-llm")
    source = config_folder(model, tmp_path)
    keys = list(state)
    weight_map = {}
    for i in range(2):  # in two files
        part = {key: state[key].contiguous().clone() for key in keys[i::2]}
        save_file(part, source / f"part-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{i}.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert main(["import", str(source), "--out", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["numbers"] < told["numbers_pair"] < told["numbers_dense"] and len(told["layers"]) == 14
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert relative(loaded(IDS).logits, wanted) < 1e-5
    assert main(["import", str(source), "--out", str(tmp_path / "again")]) == 0
    assert "14 layers: " in capsys.readouterr().out
    assert main(["import", str(source), "--out", str(tmp_path / "out")]) == 1
    assert "is there already" in capsys.readouterr().err


def test_a_pickle_is_never_read_unasked(tmp_path, capsys, relative):
    model = MODELS["llama"]()
    state, wanted = paired(model, "asvd")
    folder, path = config_folder(model, tmp_path), tmp_path / "model.pt"
    torch.save({"model": state}, path)
    with pytest.raises(InputError, match=r"is a pickle, which can run code .*save_file.*allow_pickle=True"):
        import_pairs(path, folder)
    assert main(["import", str(path), "--model", str(folder), "--out", str(tmp_path / "out")]) == 1
    assert "--allow-pickle" in capsys.readouterr().err
    with torch.no_grad():
        assert relative(import_pairs(path, folder, allow_pickle=True).model(IDS).logits, wanted) < 1e-5


def test_a_folder_with_one_pickle_is_read_and_one_with_several_is_not(tmp_path, relative):
    model = MODELS["llama"]()
    state, wanted = paired(model, "asvd")
    folder = config_folder(model, tmp_path)
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin is a pickle, which can run code"):
        import_pairs(folder)
    with torch.no_grad():
        assert relative(import_pairs(folder, allow_pickle=True).model(IDS).logits, wanted) < 1e-5
    torch.save(state, folder / "other.pt")
    with pytest.raises(InputError, match=r"several pickles: other.pt, pytorch_model.bin; name one of them"):
        import_pairs(folder, allow_pickle=True)


class Loud:
    """What runs when it is unpickled."""

    ran = False

    def __reduce__(self):
        return setattr, (Loud, "ran", True)


def test_a_pickle_of_more_than_tensors_is_not_unpickled(tmp_path):
    folder, path = config_folder(MODELS["llama"](), tmp_path), tmp_path / "model.bin"
    for content in ({"x": torch.ones(1), "y": Loud()}, Loud()):
        torch.save(content, path)
        with pytest.raises(InputError, match=r"more than tensors, or damaged.*save_file"):
            import_pairs(path, folder, allow_pickle=True)
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(InputError, match="save_file"):
        import_pairs(path, folder, allow_pickle=True)
    for content in ([torch.ones(1)], {"model": {"x": 1}}):
        torch.save(content, path)
        with pytest.raises(InputError, match=r"model.bin is no state dict; convert it"):
            import_pairs(path, folder, allow_pickle=True)
    assert not Loud.ran


def spoiled(state, change):
    """One thing of the first layer's pair is wrong."""
    first, second = (f"model.layers.0.self_attn.q_proj.{i}.weight" for i in (0, 1))
    right, left = state[first], state[second]
    change(state, first, second, right, left)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, a, b, x, y: s.pop(b), r"has model\S*q_proj.0.weight but no model\S*q_proj.1.weight"),
        (lambda s, a, b, x, y: s.update({a: y, b: x}), r"q_proj: .*\(32, 7\).*\(7, 32\) make no 32 x 32.*way round"),
        (lambda s, a, b, x, y: s.update({a: x[:, :-1]}), r"q_proj: .*\(7, 31\).* make no 32 x 32 weight; name"),
        (lambda s, a, b, x, y: s.update({a: x[:-1]}), r"q_proj: .*\(6, 32\).*\(32, 7\) make no 32 x 32"),
        (lambda s, a, b, x, y: s.update({a: x.half()}), r"q_proj: .*float16.*float32"),
        (lambda s, a, b, x, y: s.update({a: x.to(torch.int8)}), r"q_proj: .*int8 of shape \(7, 32\); only"),
        (lambda s, a, b, x, y: s.update({b: y * torch.nan}), r"q_proj: .*finite"),
        (lambda s, a, b, x, y: s.update({b: y * 0}), r"q_proj: .*zero"),
        (lambda s, a, b, x, y: s.update({a.replace("0.w", "w"): y @ x}), "a dense weight and a pair"),
        (lambda s, a, b, x, y: s.update({"else.weight": x}), "has no place for: else.weight"),
        (lambda s, a, b, x, y: s.update({a.replace("0.w", "lora_A.w"): x}), "lora_A is of an adapter"),
        (lambda s, a, b, x, y: s.pop("model.norm.weight"), "has no model.norm.weight"),
        (lambda s, a, b, x, y: s.update({"model.norm.weight": x}), r"norm.weight is \(7, 32\).* and \(32,\) in"),
        (lambda s, a, b, x, y: s.update({f"{a[:-8]}BLinear.weight": x, f"{a[:-8]}ALinear.weight": y}), "several"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error_with_the_layer_s_name(change, message, tmp_path):
    model = MODELS["llama"]()
    state, _ = paired(model, "sequential")
    with pytest.raises(InputError, match=message):
        import_pairs(spoiled(state, change), config_folder(model, tmp_path))


@pytest.mark.parametrize("half", ["0", "1"])
def test_biases_of_a_pair_fit_or_are_refused_with_the_layer_s_name(half, tmp_path):
    model = MODELS["opt"]()
    state, _ = paired(model, "sequential", inner_bias=True)
    folder = config_folder(model, tmp_path)
    key = next(key for key in state if key.endswith(f".k_proj.{half}.bias"))
    size = len(state[key])
    with pytest.raises(InputError, match=rf"k_proj: \S+\.{half}\.bias has shape \({size - 1},\), not \({size},\)"):
        import_pairs(state | {key: state[key][:-1]}, folder)


def test_a_bias_that_the_checkpoint_has_not_is_missed(tmp_path):
    model = MODELS["opt"]()
    state, _ = paired(model, "sequential")
    state = {key: t for key, t in state.items() if ".k_proj." not in key or not key.endswith(".bias")}
    with pytest.raises(InputError, match=r"k_proj: OPTForCausalLM has a bias there, and the checkpoint has no \S+bias"):
        import_pairs(state, config_folder(model, tmp_path))


def test_what_is_no_checkpoint_of_pairs(tmp_path):
    model = MODELS["llama"]()
    folder = config_folder(model, tmp_path)
    with pytest.raises(
        InputError, match=r"no pair of weights for a linear layer of LlamaForCausalLM by any known.*asvd"
    ):
        import_pairs(model.state_dict(), folder)
    with pytest.raises(InputError, match="no pattern like"):
        import_pairs(model.state_dict(), folder, pattern="{layer}.a")
    with pytest.raises(InputError, match=r"no pattern like.*did you mean 'svd-llm'"):
        import_pairs(model.state_dict(), folder, pattern="svdllm")
    with pytest.raises(InputError, match=r"^cannot load the checkpoint nobody/nothing: [^\n]+$"):
        import_pairs("nobody/nothing", folder)
    with pytest.raises(InputError, match=r"has no model.safetensors; save it with model.save_pretrained"):
        import_pairs(tmp_path, folder)
    with pytest.raises(InputError, match="give model="):
        import_pairs(model.state_dict())
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match=r"model.safetensors is no safetensors file, or is damaged"):
        import_pairs(tmp_path, folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["SVDLlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"no class SVDLlamaForCausalLM; name the dense model with model= \(--model\)"):
        import_pairs(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "is no index"),
        ("[", "is no index"),
        (
            '{"weight_map": {"a": "../other.safetensors"}}',
            "names '../other.safetensors', which is not a file beside it",
        ),
        ('{"weight_map": {"a": 1}}', "names 1, which is not a file beside it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "names gone.safetensors, which is not there"),
    ],
)
def test_an_index_that_lies(index, message, tmp_path):
    folder = config_folder(MODELS["llama"](), tmp_path)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=message):
        import_pairs(folder)
    with pytest.raises(InputError, match=message):
        pifa_compile.checkpoint.checkpoint_files(folder)
