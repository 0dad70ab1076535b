"""Gradient moments over a whole run: kept or made again, in this process or in the next, always the same run."""

from dataclasses import replace

import pytest
import torch

from pifa_compile.compression import compress, output_moments
from pifa_compile.compression.gradients import BackwardWalk
from pifa_compile.recipes import Mpifa
from pifa_compile.store import Store

SETTINGS = {"density": 0.5, "rank_multiple": 1}
RECIPES = [
    Mpifa(**SETTINGS),
    Mpifa(**SETTINGS, weighting="diagonal", allocation="relative"),
    Mpifa(**SETTINGS, weighting="none"),
    Mpifa(**SETTINGS, allocation="uniform"),
]


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=40)).eval()


def bert():
    """A model with a layer after its blocks."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(**sizes, vocab_size=40, max_position_embeddings=32)).eval()


def run_of(model, recipe, root):
    ids = torch.randint(0, 40, (10, 12), generator=torch.Generator().manual_seed(1))
    text = ids if "CausalLM" in type(model).__name__ else [{"input_ids": part} for part in ids.split(5)]
    return compress(model, recipe, text=text, store=Store(root), progress=False).run


def facts(run):
    return [replace(r, seconds=0.0) for r in run.layers]


def scratch_names(root):
    folder = root / "scratch"
    return sorted(p.name.partition("~")[2] for p in folder.iterdir()) if folder.is_dir() else []


def interrupted(monkeypatch, model, recipe, root, count):
    """A run that was stopped before the ``count``-th layer was put into the store."""
    with monkeypatch.context() as patch:
        put, calls = Store.put_factors, []

        def put_some(self, factors):
            calls.append(factors)
            if len(calls) == count:
                raise KeyboardInterrupt
            return put(self, factors)

        patch.setattr(Store, "put_factors", put_some)
        with pytest.raises(KeyboardInterrupt):
            run_of(model, recipe, root)


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.weighting}-{r.allocation}")
def test_moments_that_are_made_again_give_the_same_run(tmp_path, monkeypatch, make, recipe):
    kept = run_of(make(), recipe, tmp_path / "kept")
    monkeypatch.setattr(output_moments, "KEPT_BYTES", 0)
    again = run_of(make(), recipe, tmp_path / "again")
    assert facts(kept) == facts(again)
    assert scratch_names(tmp_path / "kept") == scratch_names(tmp_path / "again") == []


@pytest.mark.parametrize("kept", [4 << 30, 0])
@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.weighting}-{r.allocation}")
def test_a_run_goes_on_without_another_backward_pass(tmp_path, monkeypatch, make, recipe, kept):
    whole = run_of(make(), recipe, tmp_path / "whole")
    monkeypatch.setattr(output_moments, "KEPT_BYTES", kept)
    interrupted(monkeypatch, make(), recipe, tmp_path / "store", 5)
    left = scratch_names(tmp_path / "store")
    assert "plan" in left
    solved = recipe.weighting != "none"
    by_gradients = kept == 0 and solved
    assert any(name.startswith("moments-") for name in left) is (solved and not by_gradients)
    assert any(name.startswith("gradients-") for name in left) is by_gradients
    assert not any(name.startswith("inputs-") for name in left)
    monkeypatch.setattr(BackwardWalk, "blocks", None)
    run = run_of(make(), recipe, tmp_path / "store")
    assert facts(run) == facts(whole)
    assert scratch_names(tmp_path / "store") == []


@pytest.mark.parametrize("lost", ["plan", "moments-1"])
def test_what_is_lost_is_computed_again(tmp_path, monkeypatch, lost):
    whole = run_of(llama(), RECIPES[0], tmp_path / "whole")
    interrupted(monkeypatch, llama(), RECIPES[0], tmp_path / "store", 5)
    (path,) = (tmp_path / "store" / "scratch").glob(f".*~{lost}")
    path.unlink()
    assert facts(run_of(llama(), RECIPES[0], tmp_path / "store")) == facts(whole)


def test_a_run_that_stopped_while_gradients_were_walked_begins_them_again(tmp_path, monkeypatch):
    whole = run_of(llama(), RECIPES[0], tmp_path / "whole")
    visit, calls = BackwardWalk.visit, []

    def stop(self, index):
        calls.append(index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return visit(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(BackwardWalk, "visit", stop)
        with pytest.raises(KeyboardInterrupt):
            run_of(llama(), RECIPES[0], tmp_path / "store")
    assert any(name.startswith("inputs-") for name in scratch_names(tmp_path / "store"))
    assert facts(run_of(llama(), RECIPES[0], tmp_path / "store")) == facts(whole)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.weighting}-{r.allocation}")
def test_pricing_changes_nothing_but_the_ranks(tmp_path, recipe):
    """Layers with a rank of their own have no price, and are not joined."""
    recipe = replace(recipe, joint=())
    priced = run_of(bert(), recipe, tmp_path / "priced")
    own = {r.name: {"rank": r.rank} if r.object else {"dense": True} for r in priced.layers}
    given = run_of(bert(), replace(recipe, overrides=own), tmp_path / "given")
    assert any(r.object for r in priced.layers)
    assert [(r.name, r.object, r.truncation) for r in given.layers] == [
        (r.name, r.object, r.truncation) for r in priced.layers
    ]
