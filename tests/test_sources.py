"""What may be calibrated on: DataLoaders, data sets and other iterables become texts or batches, and the model runs."""

import itertools
import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pifa_compile
from pifa_compile import Mpifa, SvdLlm
from pifa_compile.cli import main
from pifa_compile.compression.calibration import calibrate_on
from pifa_compile.compression.sources import read_source
from pifa_compile.errors import InputError
from pifa_compile.loading import load_model

IDS = torch.randint(256, (20, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def language(language_folder):
    return load_model(language_folder)


@pytest.fixture(scope="module")
def encoder(encoder_folder):
    return load_model(encoder_folder)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 12)).eval()


def read(given, model, tokens=10**6, length=16):
    return read_source(given, model, tokens, length)


def same(batches, wanted):
    assert [set(b) for b in batches] == [set(b) for b in wanted]
    assert all(torch.equal(b[key], w[key]) for b, w in zip(batches, wanted, strict=True) for key in w)


def test_a_dataloader_of_mappings(encoder):
    rows = [{"input_ids": ids, "attention_mask": torch.ones(16, dtype=torch.int64)} for ids in IDS]
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in IDS.split(8)]
    same(read(DataLoader(rows, batch_size=8), encoder[0]), batches)
    same(read(iter(batches), encoder[0]), batches)


@pytest.mark.parametrize("labels", [False, True])
def test_a_dataloader_of_tensors_and_labels(labels):
    x, y = torch.randn(20, 12), torch.arange(20)
    data = TensorDataset(x, y) if labels else x
    same(read(DataLoader(data, batch_size=8), network()), [{"input": part} for part in x.split(8)])
    same(read([(part, None) for part in x.split(8)], network()), [{"input": part} for part in x.split(8)])


def test_tensors_go_to_the_first_argument(language):
    same(read(DataLoader(IDS, batch_size=8), language[0]), [{"input_ids": part} for part in IDS.split(8)])


def test_texts_in_any_packing(encoder):
    texts = [f"Sentence {i}." for i in range(5)]
    rows = [{"text": t, "label": i} for i, t in enumerate(texts)]
    for given in (iter(texts), DataLoader(texts, batch_size=2), [texts[:3], tuple(texts[3:])], rows):
        assert read(given, encoder[0]) == texts
    assert read(DataLoader(rows, batch_size=2), encoder[0]) == texts
    assert read([], encoder[0]) == []


def test_rows_of_a_tokenised_data_set(language):
    rows = [{"input_ids": ids.tolist(), "attention_mask": [1] * 16, "id": f"row {i}"} for i, ids in enumerate(IDS[:3])]
    wanted = [{"input_ids": ids[None], "attention_mask": torch.ones(1, 16, dtype=torch.int64)} for ids in IDS[:3]]
    same(read(rows, language[0]), wanted)
    same(read([{"input_ids": ids} for ids in IDS[:3]], language[0]), [{"input_ids": ids[None]} for ids in IDS[:3]])


def test_no_more_is_read_than_is_asked_for(language):
    seen = []

    def endless(make):
        for i in itertools.count():
            seen.append(i)
            yield make()

    masked = {"input_ids": IDS[:8], "attention_mask": torch.ones(8, 16).tril()}  # 36 tokens in it
    cases = [(lambda: {"input_ids": IDS[:8]}, 2), (lambda: masked, 6), (lambda: torch.randn(8, 16, 5), 2)]
    cases += [(lambda: torch.randn(100, 5), 3), (lambda: torch.randn(2, 3, 8, 8), 7), (lambda: torch.randn(999, 5), 2)]
    for make, count in cases:
        seen.clear()
        model = network() if isinstance(make(), torch.Tensor) else language[0]
        assert len(read(endless(make), model, tokens=206)) == len(seen) == count


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ([1, 2], "cannot calibrate on a int"),
        ([[1, 2]], "cannot calibrate on a list with a int"),
        (["a", 1], "there is a int among the texts"),
        ([{"a": "x", "b": "y"}], "which column is the text"),
    ],
)
def test_what_cannot_be_calibrated_on(given, problem):
    with pytest.raises(InputError, match=problem):
        read(given, network())


def test_a_model_without_a_named_argument_wants_mappings():
    class Model(nn.Module):
        def forward(self, *arguments):
            return arguments

    with pytest.raises(InputError, match=r"Model\.forward has no named argument"):
        read([torch.ones(2, 2)], Model())


# --- to the end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [SvdLlm, Mpifa])
def test_a_network_is_compressed_on_a_dataloader(store, recipe):
    x, y = torch.randn(64, 12), torch.arange(64)
    settings = {"store": store, "progress": False}
    recipe = recipe(density=0.6, rank_multiple=1)
    runs = [
        pifa_compile.compress(network(), recipe, text=given, **settings).run
        for given in (DataLoader(TensorDataset(x, y), batch_size=8), DataLoader(x, batch_size=8), x)
    ]
    assert len({run.run_id for run in runs}) == 1, "the same batches are the same calibration"
    assert all(r.object is not None for r in runs[0].layers)
    assert runs[0].header.calibration["source"] == "batches"


def test_a_language_model_is_calibrated_on_the_same_windows_in_any_packing(language):
    given = [DataLoader(IDS[:16], batch_size=8), [{"input_ids": part} for part in IDS[:16].split(8)]]
    found = [calibrate_on(language[0], each, windows=16, length=16) for each in given]
    assert found[0].identity == found[1].identity
    assert (len(found[0].batches), len(found[0].held_out)) == (1, 1)


def test_the_command_takes_the_name_of_a_dataset(language_folder, store, tmp_path, monkeypatch, capsys):
    import sys
    from types import SimpleNamespace

    rows = [{"text": f"A sentence about the number {i}, and some words more."} for i in range(60)]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: iter(rows)))
    command = ["compress", str(language_folder), "--density", "0.5", "--method", "svd-llm", "--json"]
    assert main([*command, "--text", "datasets:someone/rows,split=test"]) == 0
    run = store.run(json.loads(capsys.readouterr().out)["run"])
    (tmp_path / "text.txt").write_text("\n\n".join(row["text"] for row in rows))
    assert main([*command, "--text", str(tmp_path / "text.txt")]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == run.run_id, "it is the same text"
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main([*command, "--text", "datasets:someone/rows"]) == 1
    assert "pip install 'pifa-compile[calibrate]'" in capsys.readouterr().err


def test_a_dataset_of_the_real_package(encoder, language, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra 'calibrate' is not installed")
    texts = [f"Sentence number {i} of a small data set." for i in range(6)]
    rows = datasets.Dataset.from_dict({"text": texts, "label": list(range(6))})
    for given in (rows, rows["text"], rows.to_iterable_dataset(), DataLoader(rows, batch_size=2)):
        assert read(given, encoder[0]) == texts
    tokenised = rows.map(lambda row: encoder[1](row["text"]), remove_columns=["text", "label"])
    wanted = [encoder[1](text, return_tensors="pt") for text in texts]
    for given in (tokenised, tokenised.with_format("torch")):
        found = read(given, encoder[0])
        assert all(torch.equal(b["input_ids"], w["input_ids"]) for b, w in zip(found, wanted, strict=True))
