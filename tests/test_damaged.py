"""Objects of a run that are not what was written: an error with what mends it, or the same factors made again."""

from __future__ import annotations

import copy
import gc
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import pifa_compile
from pifa_compile import Joint, Svd, SvdLlm, cli, pivoting
from pifa_compile.errors import DamagedError
from pifa_compile.prepare import apply_run_
from pifa_compile.store import Run, Store
from pifa_compile.store.objects import object_path


class Mlp(nn.Module):
    """Two layers that read one input, and one after them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.gate_proj(x)) * self.up_proj(x))


@pytest.fixture
def model():
    return Mlp().eval().requires_grad_(False)


X = torch.randn(64, 32, generator=torch.Generator().manual_seed(5))


def objects(run: Run, store: Store) -> list[Path]:
    return [object_path(store.root, record.object) for record in run.layers if record.object]


def cut(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(bytes(data))


def swap(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def remove(path: Path, other: Path) -> None:
    path.unlink()


KINDS = pytest.mark.parametrize("spoil", [cut, flip, swap, remove])


def inputs(model: nn.Module) -> torch.Tensor:
    return X.to(next(model.parameters()).dtype)


def compiled(model: nn.Module, **options: Any) -> torch.Tensor:
    """Compiled anew, with nothing of earlier compilations in memory."""
    torch.compiler.reset()
    gc.collect()
    counters.clear()
    with torch.no_grad():
        return torch.compile(model, backend="pifa", options={"inner": "eager", **options})(inputs(model))


def prepared(model: nn.Module, **options: Any) -> torch.Tensor:
    counters.clear()
    return pifa_compile.apply_(copy.deepcopy(model), **options)(inputs(model))


WAYS = pytest.mark.parametrize("use", [compiled, prepared])
RECIPES = pytest.mark.parametrize(
    "recipe", [Svd(density=0.6, rank_multiple=1), Svd(density=0.5, form="pair"), Joint(density=0.6)]
)


@KINDS
@WAYS
def test_by_default_it_is_an_error_with_the_call_that_mends_it(model, store, spoil, use):
    run = pifa_compile.compress(model, Svd(density=0.6, rank_multiple=1), progress=False).run
    wanted = use(model)
    first, second, _ = objects(run, store)
    spoil(second, first)
    with pytest.raises(Exception, match="up_proj: ") as caught:
        use(model)
    text = str(caught.value)
    assert second.name in text
    call = re.search(r"make it again with (pifa_compile\.compress\(.*\)), which", text)
    assert call is not None
    report = eval(call[1], {"pifa_compile": pifa_compile, "MODEL": model})
    assert report.run_id == run.run_id and store.verify(run.run_id) == []
    assert torch.equal(use(model), wanted)


@KINDS
@WAYS
@RECIPES
def test_recompute_makes_the_same_again_and_warns_once(model, store, spoil, use, recipe):
    run = pifa_compile.compress(model, recipe, progress=False).run
    wanted = use(model)
    *_, first, second = objects(run, store)
    before = second.read_bytes()
    spoil(second, first)
    with pytest.warns(UserWarning) as told:
        assert torch.equal(use(model, damaged="recompute"), wanted)
    (warning,) = (str(w.message) for w in told if "made again" in str(w.message))
    assert run.run_id in warning and "of 1 layers" in warning and warning.endswith("made again: down")
    assert counters["pifa"]["factored"] == 1
    assert second.read_bytes() == before and store.run(run.run_id) == run
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(use(model, damaged="error"), wanted)
    assert counters["pifa"]["factored"] == 0


@WAYS
def test_a_layer_that_was_kept_as_a_pair_is_made_again_as_one(model, store, use, monkeypatch):
    monkeypatch.setitem(pivoting.ERROR_LIMITS, torch.float32, 1e-12)
    run = pifa_compile.compress(model, Svd(density=0.6, rank_multiple=1), progress=False).run
    assert {record.form for record in run.layers} == {"pair"}
    wanted = use(model)
    *_, first, second = objects(run, store)
    before = second.read_bytes()
    swap(second, first)
    with pytest.warns(UserWarning, match="made again: down"):
        assert torch.equal(use(model, damaged="recompute"), wanted)
    assert counters["pifa"]["factored"] == 1
    assert second.read_bytes() == before and store.run(run.run_id) == run


@WAYS
def test_a_joint_group_that_is_lost_is_made_again_from_all_its_layers(model, store, use):
    run = pifa_compile.compress(model, Joint(density=0.6), progress=False).run
    wanted = use(model)
    for path in objects(run, store):
        flip(path, path)
    with pytest.warns(UserWarning, match=r"of 2 layers .* again: gate_proj\+up_proj, down"):
        assert torch.equal(use(model, damaged="recompute"), wanted)
    model.up_proj = nn.Linear(32, 64).requires_grad_(False)
    for path in objects(run, store):
        flip(path, path)
    with pytest.raises(Exception, match="cannot be made again here, because the weight of up_proj is not at hand"):
        use(model, damaged="recompute")


def test_from_the_environment(model, store, monkeypatch):
    run = pifa_compile.compress(model, Svd(density=0.6), progress=False).run
    wanted = prepared(model)
    cut(*objects(run, store)[:2])
    monkeypatch.setenv("PIFA_DAMAGED", "recompute")
    with pytest.warns(UserWarning, match="made again"):
        assert torch.equal(prepared(model), wanted)


@WAYS
def test_a_cast_of_the_weight_is_not_what_was_factored(model, store, use):
    run = pifa_compile.compress(model, Svd(density=0.6), progress=False).run
    cut(*objects(run, store)[:2])
    reason = "the weight of gate_proj is bfloat16 here, and was factored in float32; make it again with"
    with pytest.raises(Exception, match=reason):
        use(model.bfloat16(), damaged="recompute")


def other_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Singular vectors as another library might give them: of the other sign."""
    from pifa_compile.compression import mend

    real: Callable[..., Any] = mend.spectrum

    def spectrum(*arguments):
        found = real(*arguments)
        return type(found)(found.u.neg() * 1.000001, found.s, found.vh.neg())

    monkeypatch.setattr(mend, "spectrum", spectrum)


@WAYS
def test_what_comes_out_otherwise_on_another_machine_is_named_by_the_run(model, store, use, monkeypatch):
    run = pifa_compile.compress(model, Svd(density=0.6, rank_multiple=1), progress=False).run
    wanted = use(model)
    cut(*objects(run, store)[:2])
    other_digits(monkeypatch)
    with pytest.warns(UserWarning, match="made again: gate_proj"):
        found = use(model, damaged="recompute")
    assert not torch.equal(found, wanted) and torch.allclose(found, wanted, atol=1e-5)
    again = store.run(run.run_id)
    assert again.complete and store.verify(run.run_id) == []
    assert again.by_name["gate_proj"].object != run.by_name["gate_proj"].object
    assert again.by_name["down"] == run.by_name["down"]
    assert torch.equal(use(model), found)


def test_what_a_first_call_made_is_made_again_from_the_same_inputs_and_from_no_others(model, store):
    wanted = compiled(model, density=0.6)
    (run,) = store.runs()
    path = objects(run, store)[1]
    before = path.read_bytes()
    cut(path, path)
    with pytest.raises(Exception, match=r"options=.*damaged.*recompute.*inputs of that first call.*Store\.delete_run"):
        compiled(model, density=0.6)
    assert torch.equal(compiled(model, density=0.6, damaged="recompute"), wanted)
    assert path.read_bytes() == before and counters["pifa"]["factored"] == 1
    cut(path, path)
    with pytest.raises(Exception, match="it was calibrated on the inputs of a first call, which are not at hand"):
        prepared(model, damaged="recompute")
    torch.compiler.reset()
    gc.collect()
    again = torch.compile(model, backend="pifa", options={"inner": "eager", "damaged": "recompute"})
    with torch.no_grad(), pytest.raises(Exception, match="calibrated on other inputs than those of this call"):
        again(2 * X)
    part = torch.compile(model.up_proj, backend="pifa", options={"inner": "eager", "damaged": "recompute"})
    with torch.no_grad(), pytest.raises(Exception, match="made of other layers than those of this graph"):
        part(X)


def test_an_object_that_is_not_what_its_run_says_is_never_made_to_fit(model, store):
    """A whole object under the name of another layer's, in a run whose checksum holds."""
    from dataclasses import replace

    run = pifa_compile.compress(model, Svd(density=0.6), progress=False).run
    gate, up, down = run.layers
    store.delete_run(run.run_id)
    with store.write_run(run.header) as writer:
        for record in (gate, replace(up, object=down.object), down):
            writer.add(record)
        writer.finish()
    for policy in ("error", "recompute"):
        with pytest.raises(DamagedError, match=r"up_proj: .*form, shape and rank are"):
            prepared(model, damaged=policy)


# --- models by name --------------------------------------------------------------------------------------------------


def of_folder(folder: Path, recipe: Any, store: Store, **settings: Any) -> Run:
    from pifa_compile.loading import load_model

    model, tokenizer = load_model(folder)
    return pifa_compile.compress(model, recipe, tokenizer=tokenizer, name=str(folder), progress=False, **settings).run


def command_in(text: str) -> list[str]:
    import shlex

    found = re.search(r"`pifa (compress .*?)`", text)
    assert found is not None, text
    return shlex.split(found[1])


@pytest.mark.parametrize(
    "recipe", [Svd(density=0.6, rank_multiple=1, skip=("*down*",)), SvdLlm(density=0.6, windows=4)]
)
def test_a_run_of_a_folder_is_made_again_by_the_command_in_the_error(language_folder, store, recipe, capsys):
    text = "words of a text " * 400 if isinstance(recipe, SvdLlm) else None
    run = of_folder(language_folder, recipe, store, text=text)
    flip(*objects(run, store)[:2])
    before = objects(run, store)[0].read_bytes()
    with pytest.raises(DamagedError, match="load has no dense weights to make it again from") as caught:
        pifa_compile.load(language_folder)
    arguments = command_in(str(caught.value))
    if text is not None:
        file = store.root.parent / "text.txt"
        file.write_text(text)
        arguments[arguments.index("TEXT")] = str(file)
    assert cli.main(arguments) == cli.DONE
    assert [r.run_id for r in store.runs()] == [run.run_id] and store.verify(run.run_id) == []
    assert objects(run, store)[0].read_bytes() != before
    pifa_compile.load(language_folder)


def test_what_was_calibrated_on_a_text_is_not_made_again_without_it(language_folder, store):
    from pifa_compile.loading import load_model

    run = of_folder(language_folder, SvdLlm(density=0.6, windows=4), store, text="words of a text " * 400)
    flip(*objects(run, store)[:2])
    model, _ = load_model(language_folder)
    with pytest.raises(DamagedError, match=r"it was calibrated on a text, which is not at hand; .*--text TEXT"):
        apply_run_(model, damaged="recompute")
