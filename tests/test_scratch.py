"""What a run can compute again: written, read, verified, and swept with the leftovers."""

import pytest
import torch

from pifa_compile.errors import DamagedError
from pifa_compile.store.scratch import Scratch


def test_tensors_and_facts_come_back(store):
    scratch = Scratch(store.root, "svd-0.5-abc")
    tensors = {"a": torch.randn(3, 4, dtype=torch.bfloat16), "b.weight": torch.randn(5, 2, dtype=torch.float64).T}
    scratch.put("one", tensors, {"ranks": {"x": 3}})
    found, facts = scratch.get("one")
    assert facts == {"ranks": {"x": 3}}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], t) and found[key].dtype == t.dtype for key, t in tensors.items())
    scratch.put("one", {})
    assert scratch.get("one") == ({}, {})
    assert scratch.has("one")
    scratch.drop("one")
    scratch.drop("one")
    assert not scratch.has("one")
    with pytest.raises(DamagedError, match="missing"):
        scratch.get("one")


@pytest.mark.parametrize("place", [-3, 20, 150])
def test_damage_is_seen(store, place):
    scratch = Scratch(store.root, "svd-0.5-abc")
    scratch.put("one", {"a": torch.randn(30)}, {"rank": 3})
    (path,) = (store.root / "scratch").iterdir()
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DamagedError, match="computed again"):
        scratch.get("one")


def test_runs_do_not_see_each_other_and_sweeping_takes_all(store):
    store.put_object({"t": torch.ones(2)}, {"factor_format": "float"})
    first, second = Scratch(store.root, "svd-0.5"), Scratch(store.root, "svd-0.5.1")
    for scratch in (first, second):
        scratch.put("one", {"a": torch.ones(2)})
    first.clear()
    assert (first.has("one"), second.has("one")) == (False, True)
    store.gc(min_age=0.0)
    assert not second.has("one")
