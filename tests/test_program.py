"""Exported programs: operators of torch alone, any batch, and no need of this package where they run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from torch.export import Dim

import pifa_compile
from pifa_compile import Joint, Svd, cli
from pifa_compile.errors import InputError
from pifa_compile.program import export_program, save_program


class Attention(nn.Module):
    """Two layers that read one input, and so can share rows, and a 1x1 convolution of their difference."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.mix = nn.Linear(24, 32), nn.Linear(24, 32), nn.Conv1d(32, 24, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix((self.q_proj(x) - self.k_proj(x)).transpose(1, 2))


def prepared(recipe, dtype=torch.float32):
    model = Attention().to(dtype).eval()
    return pifa_compile.apply_(model, run=pifa_compile.compress(model, recipe, progress=False).run_id)


RECIPES = [
    (Svd(density=0.6, rank_multiple=1), torch.float32),
    (Svd(density=0.6, rank_multiple=1, form="pair"), torch.float32),
    (Joint(density=0.6, rank_multiple=1), torch.float32),
    (Svd(density=0.6, rank_multiple=1, coefficients="float16"), torch.bfloat16),
]


@pytest.mark.parametrize(("recipe", "dtype"), RECIPES)
@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_layers_are_exported_in_operators_of_torch_alone(recipe, dtype, strict):
    model = prepared(recipe, dtype)
    example, x = torch.randn(2, 5, 24, dtype=dtype), torch.randn(7, 5, 24, dtype=dtype)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: Dim("batch")},), strict=strict)
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert {target.namespace for target in called} == {"aten"}
    assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("kind", ["causal", "encoder"])
@torch.no_grad()
def test_a_transformers_model_takes_any_batch_and_any_length(kind, language_folder, encoder_folder):
    folder = language_folder if kind == "causal" else encoder_folder
    auto = transformers.AutoModelForCausalLM if kind == "causal" else transformers.AutoModel
    model = auto.from_pretrained(folder)
    pifa_compile.apply_(model, run=pifa_compile.compress(model, Joint(density=0.7), progress=False).run_id)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    program = export_program(model, dict(tokenizer(["ab cd", "efghi"], return_tensors="pt")))
    inputs = dict(tokenizer(["some", "words of unequal length", "x"], return_tensors="pt", padding=True))
    found, expected = program.module()(inputs), model(**inputs)
    name = "logits" if kind == "causal" else "last_hidden_state"
    assert torch.allclose(found[name], expected[name], atol=1e-6)
    assert all(isinstance(t, torch.Tensor) for t in found.values())
    assert model.config.to_dict().get("use_cache", True), "the model itself still has its cache"


RUN = """
import sys
from importlib.abc import MetaPathFinder

class Block(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("pifa_compile", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Block())
import torch
path, compiled, inputs, out = sys.argv[1:]
run = torch._inductor.aoti_load_package(path) if compiled == "True" else torch.export.load(path).module()
torch.save(run(torch.load(inputs)), out)
"""


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@torch.no_grad()
def test_programs_run_where_this_package_cannot_be_imported(compiled, tmp_path):
    model = prepared(Joint(density=0.6, rank_multiple=1))
    program = export_program(model, {"x": torch.randn(2, 5, 24)})
    path = save_program(program, tmp_path / "model.pt2", compiled=compiled)
    x = torch.randn(6, 5, 24)
    torch.save({"x": x}, tmp_path / "in.pt")
    command = [sys.executable, "-c", RUN, str(path), str(compiled), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = torch.load(tmp_path / "out.pt").values()
    assert torch.allclose(found, model(x), atol=1e-6)


def test_the_command_writes_a_program(language_folder, tmp_path, capsys):
    dense = transformers.AutoModelForCausalLM.from_pretrained(language_folder)
    pifa_compile.compress(dense, Svd(density=0.5), progress=False)
    out = tmp_path / "model.pt2"
    arguments = ["export", str(out), "--model", str(language_folder), "--format", "pt2"]
    assert cli.main(arguments) == 0
    told = "torch.export.load(...).module() takes one dictionary of tensors: input_ids, attention_mask"
    assert told in capsys.readouterr().out
    ids = torch.randint(0, 256, (3, 11))
    found = torch.export.load(out).module()({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    with torch.no_grad():
        expected = pifa_compile.apply_(dense)(input_ids=ids).logits
    assert torch.allclose(found["logits"], expected, atol=1e-5)
    assert cli.main(arguments) == 1
    assert "is there already" in capsys.readouterr().err
    assert cli.main([*arguments, "--max-shard-size", "1GB"]) == cli.USAGE
    assert "the others write one file" in capsys.readouterr().err


def test_what_cannot_be_exported_is_refused_in_a_line(tmp_path):
    with pytest.raises(InputError, match="no factored layers"):
        export_program(Attention(), {"x": torch.randn(2, 5, 24)})
    model = prepared(RECIPES[0][0])
    with pytest.raises(InputError, match=r"^Attention cannot be exported by this release of torch: [^\n]+$"):
        export_program(model, {"x": torch.randn(2, 5, 23)})
    program = export_program(model, {"x": torch.randn(2, 5, 24)})
    with pytest.raises(InputError, match=r"must end in \.pt2"):
        save_program(program, tmp_path / "model")
