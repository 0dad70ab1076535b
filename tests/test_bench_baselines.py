"""bench/baselines.py: patterns, formulas by brute force, and the order of the methods in layer output error."""

import copy
import itertools

import baselines
import pytest
import torch

from pifa_compile.loading import load_model

g = torch.Generator().manual_seed(3)


@pytest.fixture(scope="module")
def layer():
    """A weight (24 x 32) and the moments of correlated inputs of different power."""
    mix = torch.randn(32, 32, generator=g, dtype=torch.float64) * torch.logspace(0, -1.5, 32, dtype=torch.float64)
    x = torch.randn(500, 32, generator=g, dtype=torch.float64) @ mix.T
    return torch.randn(24, 32, generator=g, dtype=torch.float64), x.T @ x


@pytest.fixture
def model(language_folder):
    return load_model(language_folder)[0]


def batches(count=6):
    ids = torch.randint(256, (count, 4, 32), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": part} for part in ids]


def is_two_of_four(weight):
    return bool(((weight.reshape(len(weight), -1, 4) != 0).sum(-1) == 2).all())


@pytest.mark.parametrize("pruner", baselines.PRUNERS.values(), ids=baselines.PRUNERS)
def test_two_of_every_four_are_left(layer, pruner):
    weight, gram = layer
    before = weight.clone()
    assert is_two_of_four(pruner(weight, gram))
    assert torch.equal(weight, before)


def test_magnitude_and_wanda_keep_the_highest_scores(layer):
    weight, gram = layer
    scores = {"magnitude 2:4": weight.abs(), "wanda 2:4": weight.abs() * gram.diagonal().sqrt()}
    for name, score in scores.items():
        found = baselines.PRUNERS[name](weight, gram)
        for row, start in itertools.product(range(24), range(0, 32, 4)):
            kept = sorted(range(start, start + 4), key=lambda j: -float(score[row, j]))[:2]
            wanted = [float(weight[row, j]) if j in kept else 0.0 for j in range(start, start + 4)]
            assert found[row, start : start + 4].tolist() == wanted


def test_sparsegpt_is_optimal_brain_surgery_in_the_order_of_the_columns(layer, monkeypatch):
    """By hand, with the inverse of what is left of H in place of a Cholesky factor; in several batches of columns."""
    weight, gram = layer
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    wanted = weight.clone()
    for start in range(0, 32, 4):
        powers = [torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(start, start + 4)]
        score = wanted[:, start : start + 4].square() / torch.stack(powers)
        kept = baselines.keep_two_of_four(score)
        for j in range(start, start + 4):
            inverse = torch.linalg.inv(hessian[j:, j:])
            lost = torch.where(kept[:, j - start], 0.0, wanted[:, j])
            wanted[:, j:] -= lost[:, None] * inverse[0] / inverse[0, 0]
    torch.testing.assert_close(baselines.sparsegpt(weight, gram), wanted, rtol=1e-8, atol=1e-8)
    monkeypatch.setattr(baselines, "COLUMNS", 8)
    torch.testing.assert_close(baselines.sparsegpt(weight, gram), wanted, rtol=1e-8, atol=1e-8)


def test_sparsegpt_takes_inputs_that_are_never_excited(layer):
    weight, gram = layer
    gram = gram.clone()
    gram[5], gram[:, 5] = 0, 0
    found = baselines.sparsegpt(weight, gram)
    assert torch.isfinite(found).all()
    assert (found[:, 5] == 0).all()


def test_the_order_of_the_methods_on_one_layer(layer):
    weight, gram = layer
    errors = [baselines.output_error(p(weight, gram), weight, gram) for p in baselines.PRUNERS.values()]
    assert errors[2] < errors[1] < errors[0] < 1


def test_a_model_is_pruned_block_by_block_and_the_order_holds(model):
    totals, pruned = {}, {}
    for name, pruner in baselines.PRUNERS.items():
        pruned[name] = copy.deepcopy(model)
        totals[name] = baselines.prune_(pruned[name], pruner, batches())
    assert totals["sparsegpt 2:4"] < totals["wanda 2:4"] < totals["magnitude 2:4"]
    for changed in pruned.values():
        for name, module in changed.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                assert is_two_of_four(module.weight)
        assert torch.equal(changed.lm_head.weight, model.lm_head.weight)


def test_a_layer_is_pruned_for_what_the_blocks_before_it_now_make(model):
    """The inputs of the second block are those behind the pruned first block, not those of the dense model."""
    changed = copy.deepcopy(model)
    baselines.prune_(changed, baselines.wanda, batches())
    partly = copy.deepcopy(model)
    partly.model.layers[0] = changed.model.layers[0]
    seen = []
    hook = lambda module, inputs: seen.append(inputs[0].double().flatten(0, 1))  # noqa: E731
    partly.model.layers[1].self_attn.q_proj.register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in batches():
            partly(**batch)
    x = torch.cat(seen)
    dense = model.model.layers[1].self_attn.q_proj.weight.detach().double()
    found = changed.model.layers[1].self_attn.q_proj.weight.double()
    torch.testing.assert_close(found, baselines.wanda(dense, x.T @ x), rtol=1e-5, atol=1e-6)


def test_models_to_begin_with(model):
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    made = {name: baselines.begin_with_(copy.deepcopy(model), name) for name in baselines.STARTS}
    found = {name: m.model.layers[0].mlp.up_proj.weight.detach() for name, m in made.items()}
    assert torch.equal(found["dense"], weight)
    kept = found["pruned"] != 0
    assert int(kept.sum()) * 2 == weight.numel()
    assert weight[kept].abs().min() >= weight[~kept].abs().max()
    assert is_two_of_four(found["pruned-2:4"])
    scale = weight.abs().amax(1, keepdim=True) / 127
    assert (found["int8"] - weight).abs().le(scale / 2 * 1.001).all()
    assert torch.allclose((found["int8"] / scale).round() * scale, found["int8"], atol=1e-7)
    assert all(torch.equal(m.lm_head.weight, model.lm_head.weight) for m in made.values())
