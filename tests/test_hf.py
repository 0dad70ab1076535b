"""Prepared models in transformers' own format: what is written, what is built from it, and what happens without us."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pifa_compile
from pifa_compile import Joint, PifaLinear, Svd, cli
from pifa_compile.errors import FactorError, InputError
from pifa_compile.hf import PifaConfig
from pifa_compile.hf.card import model_card
from pifa_compile.hf.config import GUARD, LayerForm
from pifa_compile.hf.layers import build, describe
from pifa_compile.modules import PairLinear, factored_layers

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
KEY = "quantization_config"
CAUSAL = SIZES | {"vocab_size": 96, "max_position_embeddings": 64, "num_key_value_heads": 2}


def make(kind):
    """A random model of a kind, and inputs for it."""
    tokens = {"input_ids": torch.randint(1, 96, (2, 7))}
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**CAUSAL, attention_bias=True)), tokens
    if kind == "tied":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**CAUSAL, tie_word_embeddings=True)), tokens
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=96, n_positions=64)
        return transformers.GPT2LMHeadModel(config), tokens
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=96)), tokens
    if kind == "t5":
        config = transformers.T5Config(
            d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=96, decoder_start_token_id=0,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config), tokens | {"decoder_input_ids": tokens["input_ids"]}
    config = transformers.ViTConfig(**SIZES, image_size=16, patch_size=4)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


def prepare(model, recipe=None):
    """The model with factored layers, and the run that they are from."""
    recipe = recipe or Svd(density=0.6, rank_multiple=1)
    run = pifa_compile.compress(model.eval(), recipe, progress=False).run
    return pifa_compile.apply_(model, run=run.run_id), run


def outputs(model, inputs):
    with torch.no_grad():
        found = model(**inputs)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def same(a, b):
    """That two models have the same tensors under the same names, bit by bit, and in the same dtypes."""
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)
    return True


def tensors_of(folder):
    return {key: t for path in folder.glob("*.safetensors") for key, t in load_file(path).items()}


@pytest.fixture
def exported(tmp_path):
    """A tied language model with joint layers: (model, folder)."""
    model, _ = prepare(make("tied")[0], Joint(density=0.6, rank_multiple=1))
    return model, pifa_compile.export(model, tmp_path / "exported")


RECIPES = {
    "svd": Svd(density=0.6, rank_multiple=1),
    "pair": Svd(density=0.6, rank_multiple=1, form="pair"),
    "joint": Joint(density=0.6, rank_multiple=1, joint=("q+k+v", "gate+up", "wi_0+wi_1")),
    "joint pair": Joint(density=0.6, rank_multiple=1, form="pair"),
}


@pytest.mark.parametrize(
    ("kind", "method"),
    [(kind, "svd") for kind in ("llama", "gpt2", "bert", "t5", "vit")]
    + [(kind, "joint") for kind in ("llama", "bert", "t5", "vit")]
    + [("tied", "pair"), ("tied", "joint pair")],
)
def test_round_trips_are_exact_in_one_file_and_in_many(kind, method, tmp_path):
    dense, inputs = make(kind)
    model, run = prepare(dense, RECIPES[method])
    expected = outputs(model, inputs)
    pifa_compile.export(model, tmp_path / "one", run=run)
    loaded, info = type(model).from_pretrained(tmp_path / "one", output_loading_info=True)
    assert same(loaded, model)
    moved = copy.deepcopy(loaded)  # from the file's mapping, where alignment may change the last bit of a product
    assert torch.equal(outputs(moved, inputs), expected)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert describe(loaded) == describe(model)
    assert sum(1 for _ in factored_layers(loaded)) == sum(len(r.layers) for r in run.layers if r.object)

    loaded.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    assert same(type(model).from_pretrained(tmp_path / "many"), model)
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[key], many[key]) for key in one)


def test_a_large_model_is_exported_without_its_dense_weights(tmp_path):
    """``load`` never makes them, nor does what follows."""
    dense, _ = make("llama")
    dense.save_pretrained(tmp_path / "dense")
    run = pifa_compile.compress(dense, Svd(density=0.6), name=str(tmp_path / "dense"), progress=False).run
    folder = pifa_compile.export(pifa_compile.load(tmp_path / "dense"), tmp_path / "out", run=run)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert same(loaded, pifa_compile.apply_(dense, run=run.run_id))


def test_layers_that_share_rows_share_them_again_and_the_file_has_them_once(exported):
    model, folder = exported
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    attention = loaded.model.layers[0].self_attn
    assert attention.k_proj.pivot_rows is attention.q_proj.pivot_rows
    assert "model.layers.0.self_attn.k_proj.pivot_rows" not in tensors_of(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


def test_no_dense_weight_of_a_factored_layer_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # all in this thread, which is the one that is watched
    model, _ = prepare(make("llama")[0])
    shapes = {(layer.out_features, layer.in_features) for _, layer in factored_layers(model)}
    pifa_compile.export(model, tmp_path / "out")
    made = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.update((tuple(t.shape), t.device.type) for t in tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    with Watch():
        loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert same(loaded, model)
    assert (32, 32) in shapes and ((32, 32), "meta") in made
    assert ((96, 32), "cpu") in made, "the embedding is watched, so the factored layers are too"
    assert not {(shape, "cpu") for shape in shapes} & made
    assert not shapes & {tuple(t.shape) for t in tensors_of(tmp_path / "out").values()}


@pytest.mark.parametrize("backend", ["pifa", "inductor"])
@torch.no_grad()
def test_loaded_layers_compile(exported, backend):
    block = transformers.AutoModelForCausalLM.from_pretrained(exported[1]).model.layers[0].mlp
    x = torch.randn(2, 7, 32)
    exact = block(x)
    assert torch.allclose(torch.compile(block, backend=backend)(x), exact, atol=1e-6)


def test_a_loaded_model_compiles_with_all_its_layers(exported):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(exported[1])
    inputs = {"input_ids": torch.randint(1, 96, (2, 7)), "use_cache": False}
    exact = outputs(loaded, inputs)
    compiled = torch.compile(loaded, backend="pifa", options={"inner": "eager"})
    assert torch.allclose(outputs(compiled, inputs), exact, atol=1e-5)
    assert counters["pifa"]["prepared"] == 14


def test_the_base_model_and_another_head_find_their_layers(exported):
    model, folder = exported
    assert same(transformers.AutoModel.from_pretrained(folder), model.model)
    other, info = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert same(other.model, model.model)
    assert info["missing_keys"] == {"score.weight"}


def test_layers_around_a_base_model_are_left_out_of_it(tmp_path):
    """BERT's head for masked words has a dense layer of its own, which the base model has not."""
    dense = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, vocab_size=96))
    model, _ = prepare(dense)
    assert isinstance(model.cls.predictions.transform.dense, PifaLinear)
    folder = pifa_compile.export(model, tmp_path / "out")
    assert same(transformers.BertModel.from_pretrained(folder, add_pooling_layer=False), model.bert)
    config = transformers.ViTConfig(**SIZES, quantization_config=json.loads((folder / "config.json").read_text())[KEY])
    with pytest.raises(InputError, match="has none of the 13 factored layers"):
        transformers.ViTModel.from_pretrained(folder, config=config)


def test_dtypes_at_loading_and_afterwards(tmp_path):
    dense = make("llama")[0].bfloat16()
    model, _ = prepare(dense, Svd(density=0.6, rank_multiple=1, coefficients="float16"))
    folder = pifa_compile.export(model, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert same(loaded, model)
    layer = loaded.model.layers[0].mlp.up_proj
    assert (layer.pivot_rows.dtype, layer.coefficients.dtype) == (torch.bfloat16, torch.float16)
    wide = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    layer = wide.model.layers[0].mlp.up_proj
    assert torch.equal(layer.coefficients, model.model.layers[0].mlp.up_proj.coefficients.float())
    assert {p.dtype for p in loaded.float().parameters()} == {torch.float32}
    assert loaded.half().dtype == torch.float16


def test_what_transformers_asks_of_a_quantizer(exported):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(exported[1])
    quantizer = loaded.hf_quantizer
    assert quantizer.is_compileable and quantizer.is_trainable and quantizer.is_qat_trainable
    assert quantizer.is_serializable()
    loaded(input_ids=torch.randint(1, 96, (2, 7)), labels=torch.randint(1, 96, (2, 7))).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_dequantize_and_restore_make_a_model_that_needs_nobody(exported, tmp_path):
    model, folder = exported
    inputs = {"input_ids": torch.randint(1, 96, (2, 7))}
    exact = outputs(model, inputs)
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder).dequantize()
    dense.save_pretrained(tmp_path / "dequantized")
    pifa_compile.restore_(transformers.AutoModelForCausalLM.from_pretrained(folder)).save_pretrained(
        tmp_path / "restored"
    )
    for name in ("dequantized", "restored"):
        assert KEY not in json.loads((tmp_path / name / "config.json").read_text())
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert isinstance(again.model.layers[0].mlp.up_proj, nn.Linear)
        assert torch.allclose(outputs(again, inputs), exact, atol=1e-5)


def test_what_is_saved_is_what_the_model_has_now(exported, tmp_path):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(exported[1])
    pifa_compile.restore_(loaded.model.layers[0])
    loaded.save_pretrained(tmp_path / "less")
    config = json.loads((tmp_path / "less" / "config.json").read_text())[KEY]
    assert len(config["layers"]) == 7 and all(name.startswith("model.layers.1.") for name in config["layers"])
    assert same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "less"), loaded)


# --- what must not happen ---------------------------------------------------------------------------------------------


def edit(folder, change):
    """Change the tensors of a folder's only file of weights."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("key", ["pivot_rows", "coefficients", "row_order"])
def test_a_factor_that_is_not_in_the_checkpoint_is_an_error_with_its_name(exported, key):
    name = f"model.layers.1.mlp.down_proj.{key}"
    edit(exported[1], lambda tensors: tensors.pop(name))
    with pytest.raises(InputError, match=f"does not have {name};"):
        transformers.AutoModelForCausalLM.from_pretrained(exported[1])


def test_shared_rows_that_are_not_in_the_checkpoint_are_an_error_with_their_name(exported):
    name = "model.layers.0.self_attn.q_proj.pivot_rows"
    edit(exported[1], lambda tensors: tensors.pop(name))
    with pytest.raises(InputError, match=f"does not have {name};"):
        transformers.AutoModelForCausalLM.from_pretrained(exported[1])


def test_a_row_order_that_is_none_is_an_error_with_the_layer_s_name(exported):
    name = "model.layers.1.mlp.down_proj"
    edit(exported[1], lambda tensors: tensors[f"{name}.row_order"].zero_())
    with pytest.raises(FactorError, match=f"{name}: the row order"):
        transformers.AutoModelForCausalLM.from_pretrained(exported[1])


def test_a_tensor_of_a_layer_that_is_not_there_is_missed(exported):
    path = exported[1] / "config.json"
    config = json.loads(path.read_text())
    layers = config["quantization_config"]["layers"]
    name = next(name for name, form in layers.items() if form["form"] == "pifa")
    layers[name]["shares"] = {"pivot_rows": "nowhere"}
    path.write_text(json.dumps(config))
    edit(exported[1], lambda tensors: tensors.pop(f"{name}.pivot_rows"))
    with pytest.raises(InputError, match=f"{name} shares its pivot_rows with nowhere, which the model has not"):
        transformers.AutoModelForCausalLM.from_pretrained(exported[1])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"version": 2}, "it is of version 2, this release knows version 1"),
        ({"bits": 4}, "it is of version 1 with bits"),
        ({"tuned": {"tuning": {"loss": "lm"}, "before": {}, "after": {}, "source": ""}}, "what it says of tuning"),
        ({"layers": {"a": {"form": "pifa"}}}, "a is "),
        ({"layers": {"a": {"form": "other", "rank": 3, "bias": False}}}, "a is "),
        ({"layers": {"a": {"form": "pifa", "rank": 0, "bias": False}}}, "a is "),
        ({"layers": {"a": {"form": "pifa", "rank": 3, "bias": False, "coefficients": "nn"}}}, "a is "),
        ({"layers": {"a": {"form": "pair", "rank": 3, "bias": False, "shares": {"pivot_rows": "b"}}}}, "a is "),
    ],
)
def test_a_config_of_another_kind_is_refused(change, problem):
    with pytest.raises(InputError, match=problem):
        PifaConfig(**{"layers": {}} | change)


@pytest.mark.parametrize(
    ("module", "form"),
    [
        (nn.Embedding(4, 8), LayerForm("pifa", 2, False)),
        (nn.Linear(8, 4), LayerForm("pifa", 5, True)),
        (nn.Linear(8, 4), LayerForm("pair", 5, True)),
        (nn.Linear(8, 4), LayerForm("pifa", 2, True, order=3)),
    ],
)
def test_a_form_that_does_not_fit_its_layer_is_refused(module, form):
    with pytest.raises(InputError, match="somewhere is "):
        build("somewhere", form, module)


@pytest.mark.parametrize("module", [nn.Linear(8, 12), nn.Conv2d(8, 12, 1, bias=False)])
@pytest.mark.parametrize("form", ["pifa", "pair"])
def test_a_layer_is_built_as_the_one_that_its_form_is_of(module, form):
    model = nn.Sequential(module)
    pifa_compile.compress(model, Svd(density=0.7, rank_multiple=1, form=form), progress=False)
    dense = copy.deepcopy(model[0])
    (layer,) = pifa_compile.apply_(model)
    made = build("0", describe(model)["0"], dense)
    assert type(made) is type(layer) is (PifaLinear if form == "pifa" else PairLinear)
    assert [(k, t.shape, t.dtype) for k, t in made.state_dict().items()] == [
        (k, t.shape, t.dtype) for k, t in layer.state_dict().items()
    ]
    assert (made.layout, made.channel, made.rows) == (layer.layout, layer.channel, layer.rows)


def test_models_are_not_compressed_while_they_are_loaded(tmp_path):
    make("llama")[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=PifaConfig({}))


def test_export_refuses_what_it_cannot_write(tmp_path):
    dense = make("llama")[0]
    with pytest.raises(InputError, match="no factored layers"):
        pifa_compile.export(dense, tmp_path / "new")
    model, _ = prepare(dense)
    dense.save_pretrained(tmp_path / "used")
    with pytest.raises(InputError, match="not an empty folder"):
        pifa_compile.export(model, tmp_path / "used")
    with pytest.raises(InputError, match="is no model of transformers"):
        pifa_compile.export(model.model.layers, tmp_path / "new")
    with pytest.raises(InputError, match="cannot load the tokenizer and other files of nobody/nothing"):
        pifa_compile.export(model, tmp_path / "new", source="nobody/nothing")
    assert not (tmp_path / "new").exists()


# --- other processes --------------------------------------------------------------------------------------------------


def python(code, *arguments, **environment):
    """Standard output of a program in a process of its own, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_without_this_package_nothing_is_drawn_at_random(exported, tmp_path):
    """What transformers does by itself: an unknown method is a warning, and weights it does not find are drawn. So each
    layer has a weight of an impossible shape; the same folder without them shows what they prevent."""
    _, folder = exported
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    edit(bare, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.endswith(f"_proj.{GUARD}")])
    found, told = python(
        """
        import json, sys
        import transformers

        def load(kind, folder):
            try:
                return sorted(kind.from_pretrained(folder, output_loading_info=True)[1]["missing_keys"])
            except RuntimeError as error:
                return str(error)

        causal, base = transformers.AutoModelForCausalLM, transformers.AutoModel
        kinds = {"causal": causal, "base": base, "named": transformers.LlamaForCausalLM}
        found = {name: load(kind, sys.argv[1]) for name, kind in kinds.items()}
        print(json.dumps(found | {"bare": load(causal, sys.argv[2]), "ours": "pifa_compile" in sys.modules}))
        """,
        folder,
        bare,
    )
    assert not found["ours"]
    assert all("mismatch" in found[kind] for kind in ("causal", "base", "named"))
    assert "Unknown quantization type, got pifa" in told
    assert len(found["bare"]) == 14 and "model.layers.0.mlp.up_proj.weight" in found["bare"]


def test_loading_and_calling_imports_no_lowering_and_compiling_still_lowers_the_operator(exported):
    """Inductor's own would take two seconds and 50 MB, which is more than many a model."""
    _, folder = exported
    found, _ = python(
        """
        import json, sys
        import pifa_compile, torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
        layer, x = model.model.layers[0].mlp.up_proj, torch.randn(3, 32)
        with torch.no_grad():
            model(torch.ones(1, 4, dtype=torch.int64))
            wanted, before = layer(x), "torch._inductor.lowering" in sys.modules
            from torch._inductor.utils import run_and_get_code

            y, (code,) = run_and_get_code(torch.compile(layer), x)
        print(json.dumps([before, "torch.ops.pifa" in code, float((y - wanted).abs().max())]))
        """,
        folder,
    )
    assert found[:2] == [False, False] and found[2] < 1e-5


@pytest.mark.parametrize(
    "imports",
    [
        "import pifa_compile; import transformers",
        "from transformers.quantizers import AutoHfQuantizer; import pifa_compile",
        "import pifa_compile.hf.quantizer",
        "import pifa_compile.hf.config",
    ],
)
def test_the_order_of_imports_does_not_matter(imports):
    found, _ = python(
        f"""
        import json, sys
        {imports}
        from transformers.quantizers import auto
        kinds = auto.AUTO_QUANTIZER_MAPPING.get("pifa"), auto.AUTO_QUANTIZATION_CONFIG_MAPPING.get("pifa")
        loaders = auto.__loader__, auto.__spec__.loader
        heavy = [name for name in ("pifa_compile.modules", "torch._inductor") if name in sys.modules]
        print(json.dumps([*(kind.__name__ for kind in kinds), *(type(loader).__name__ for loader in loaders), *heavy]))
        """
    )
    assert found == ["PifaQuantizer", "PifaConfig", "SourceFileLoader", "SourceFileLoader"]


def test_importing_this_package_imports_neither_transformers_nor_torch():
    found, _ = python("import json, sys, pifa_compile; print(json.dumps(sorted(sys.modules)))")
    assert not {"transformers", "torch"} & set(found)


def test_with_trust_remote_code_the_folder_imports_this_package_or_names_it(exported, tmp_path):
    model, folder = exported
    again = tmp_path / "again"
    (refused, *found), _ = python(
        """
        import json, sys
        from importlib.abc import MetaPathFinder
        import transformers

        class Block(MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name.partition(".")[0] == "pifa_compile":
                    raise ModuleNotFoundError(f"No module named {name!r}")

        def load():
            return transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)

        sys.meta_path.insert(0, Block())
        try:
            load()
        except ImportError as error:
            found = [str(error)]
        del sys.meta_path[0]
        model = load()
        model.save_pretrained(sys.argv[2])
        layer = model.model.layers[0].mlp.up_proj
        print(json.dumps([*found, type(model).__module__, type(layer).__name__, type(model)._auto_class]))
        """,
        folder,
        again,
        HF_HOME=str(tmp_path / "home"),
    )
    assert "packages that were not found in your environment: pifa_compile" in refused
    assert found == ["transformers.models.llama.modeling_llama", "PifaLinear", None]
    assert "auto_map" not in json.loads((again / "config.json").read_text())
    assert same(transformers.AutoModelForCausalLM.from_pretrained(again), model)


# --- the command and the folder ---------------------------------------------------------------------------------------


def test_the_command_writes_all_that_a_shared_model_needs(language_folder, tmp_path, capsys):
    out = tmp_path / "out"
    dense = transformers.AutoModelForCausalLM.from_pretrained(language_folder)
    run = pifa_compile.compress(dense, Svd(density=0.5), progress=False).run
    arguments = ["export", str(out), "--model", str(language_folder), "--format", "hf", "--density", "0.5", "--json"]
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    weights = out / "model.safetensors"
    assert found == {"path": str(out), "format": "hf", "run": run.run_id, "bytes": weights.stat().st_size}
    own = {"README.md", "config.json", "generation_config.json", "model.safetensors", "pifa_model.py"}
    assert {path.name for path in out.iterdir()} == own | {"tokenizer.json", "tokenizer_config.json"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (language_folder / name).read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model(**tokenizer("abc", return_tensors="pt")).logits.shape == (1, 3, 256)
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "pifa_model.LlamaForCausalLM"
    assert config[KEY]["requires"] == "import pifa_compile"
    assert config[KEY]["recipe"] == run.header.recipe

    assert cli.main(arguments) == 1
    assert "not an empty folder" in capsys.readouterr().err


def test_the_card_has_the_figures_of_model_and_run(tmp_path):
    dense = make("tied")[0]
    before = sum(p.numel() for p in dense.parameters())
    model, run = prepare(dense, Joint(density=0.6, rank_multiple=1))
    card = (pifa_compile.export(model, tmp_path / "out", run=run, source=None) / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: ")
    assert "import pifa_compile" in card and "LlamaForCausalLM.from_pretrained" in card
    assert f"| the whole model | {before:,} |".replace(" ", "") in card.replace(" ", "")
    assert f"{run.totals.dense_numbers - dense_left(run):,}" in card
    kept = sum(r.numbers for r in run.layers if r.object)
    assert f"{kept:,}" in card
    assert run.run_id in card and '"density": 0.6' in card
    record = run.by_name["model.layers.1.mlp.down_proj"]
    row = next(line for line in card.splitlines() if "model.layers.1.mlp.down_proj" in line)
    assert [cell.strip() for cell in row.split("|")[1:6]] == [
        record.name, "32 x 64", "pifa", str(record.rank), f"{record.numbers:,}",
    ]  # fmt: skip
    assert f"{record.truncation:.1e}" in row and f"{record.error:.1e}" in row
    assert "pivot_rows of model.layers.0.self_attn.q_proj" in card


@pytest.mark.parametrize(("source", "base"), [("someone/some-model", True), ("/a/folder/some-model", False)])
def test_the_card_names_a_base_model_of_the_hub_and_no_folder_of_somebody_s(source, base):
    model, run = prepare(make("tied")[0])
    card = model_card(model, describe(model), source, run, run.header.recipe)
    assert ('base_model: "someone/some-model"' in card) == base
    assert "# some-model in" in card and "/a/folder" not in card


@pytest.mark.parametrize("wrong", [{"tuned": {"steps": 1}}, {"imported": {"source": "pairs"}}])
def test_what_no_folder_could_be_loaded_with_is_refused_before_one_is_written(tmp_path, wrong):
    model, _ = prepare(make("tied")[0])
    with pytest.raises(InputError, match="what it says of"):
        pifa_compile.export(model, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()
    pifa_compile.export(model, tmp_path / "out")


def dense_left(run):
    return sum(r.dense_numbers for r in run.layers if r.object is None)


def test_the_card_of_an_imported_model_names_its_source_and_the_dense_model_s_licence(tmp_path, language_folder):
    import shutil

    from safetensors.torch import load_file, save_file

    dense, pairs = tmp_path / "dense", tmp_path / "private" / "pairs-of-mine"
    shutil.copytree(language_folder, dense)
    (dense / "README.md").write_text("---\nlicense: mit\nbase_model: someone/a-llama\n---\n# A model\n")
    pairs.mkdir(parents=True)
    tensors = load_file(dense / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    weight = tensors.pop(f"{name}.weight")
    left, right = torch.randn(weight.shape[0], 8), torch.randn(8, weight.shape[1])
    tensors |= {f"{name}.ALinear.weight": left, f"{name}.BLinear.weight": right}
    save_file(tensors, pairs / "model.safetensors")
    report = pifa_compile.import_pairs(pairs, dense)
    out = pifa_compile.export(report.model, tmp_path / "out", source=dense, imported=report.origin())
    card = (out / "README.md").read_text()
    assert 'license: "mit"' in card and 'base_model: "someone/a-llama"' in card
    assert "Pairs of the checkpoint pairs-of-mine, in the format asvd." in card
    row = next(line for line in card.splitlines() if f"| {name} " in line)
    assert [cell.strip() for cell in row.split("|")][4] == "8" and row.rstrip(" |").endswith("8")
    files = [path for path in out.rglob("*") if path.suffix in (".md", ".json", ".py")]
    assert files and all(str(tmp_path) not in path.read_text() for path in files)
    again = type(report.model).from_pretrained(out)
    assert again.config.quantization_config.imported["formats"] == ["asvd"]
