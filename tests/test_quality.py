"""The table of `pifa eval`: every figure computed again by hand, runs found and refused, the command's words."""

import hashlib
import json
import math
import shutil

import pytest
import torch
from torch import nn

import pifa_compile
from pifa_compile import Store, Svd
from pifa_compile.cli import main
from pifa_compile.errors import InputError, UnknownRunError
from pifa_compile.layers import as_matrix
from pifa_compile.loading import load_model, minilm_folder
from pifa_compile.quality import Reading, evaluate, find_runs, keep_figures, misfit, with_run

TEXT = "".join(f"def f{i}(x):\n    return x + {i * i % 17}\n" for i in range(99))
READING = Reading(windows=6, length=32, batch=4)


@pytest.fixture(scope="module")
def language(language_folder):
    return load_model(language_folder)


@pytest.fixture
def runs(language, store):
    """A run at density 0.8 and one at 0.4."""
    for density in (0.8, 0.4):
        pifa_compile.compress(language[0], Svd(density=density, rank_multiple=1), store=store, progress=False)
    return store.runs()


@torch.no_grad()
def logits_with(model, store, run, ids):
    """Of the model with the run's low-rank weights written into its own."""
    dense = {name: t.clone() for name, t in model.state_dict().items()}
    for r in run.layers if run else ():
        if r.object is not None:
            as_matrix(model.get_submodule(r.name).weight, r.layout).copy_(store.factors(r).weight())
    found = model(input_ids=ids).logits[:, :-1].double()
    model.load_state_dict(dense)
    return found


@pytest.mark.parametrize("bos", [False, True])
def test_perplexity_and_agreement_are_those_of_the_low_rank_weights(language, store, runs, bos):
    model, tokenizer = language
    reading = Reading(windows=6, length=32, batch=4, bos=bos)
    found = evaluate(model, tokenizer, [(store, r) for r in runs], {"code.py": TEXT}, reading=reading, name="m")
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    ids = ids[: 6 * (32 - bos)].view(6, -1)
    if bos:
        ids = torch.cat([torch.full((6, 1), tokenizer.bos_token_id), ids], dim=1)
    dense = logits_with(model, store, None, ids)
    assert [v.name for v in found.variants] == ["dense", *(r.run_id for r in runs)]
    for variant, run in zip(found.variants, [None, *runs], strict=True):
        logits = logits_with(model, store, run, ids)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        same = (logits.argmax(-1) == dense.argmax(-1)).double().mean()
        figures = variant.figures["code.py"]
        assert figures["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert figures["same_top_1"] == pytest.approx(float(same), abs=2 / ids.numel())
        excess = math.exp(loss) - found.variants[0].figures["code.py"]["perplexity"]
        assert figures["excess"] == pytest.approx(excess, abs=1e-3)
    assert found.variants[0].figures["code.py"]["same_top_1"] == 1 > found.variants[2].figures["code.py"]["same_top_1"]
    words = ["6 windows of 32 tokens", "no overlap", f"{6 * 31} tokens scored", f"{len(TEXT):,} characters"]
    words.append("each beginning with the BOS token" if bos else "no BOS or other special token")
    assert all(word in found.protocol["code.py"] for word in words)


def test_densities_count_the_replaced_layers_and_the_whole_model(language, store, runs):
    model, tokenizer = language
    found = evaluate(model, tokenizer, [(store, runs[1])], {"a": TEXT}, reading=READING)
    replaced = [r for r in runs[1].layers if r.object is not None]
    dense, kept = sum(r.shape[0] * r.shape[1] for r in replaced), sum(r.numbers for r in replaced)
    total = sum(p.numel() for p in model.parameters())
    assert found.variants[1].density == pytest.approx(kept / dense)
    assert found.variants[1].model_density == pytest.approx((total - dense + kept) / total)
    assert sum(p.numel() for p in with_run(model, store, runs[1]).parameters()) < total


def test_a_variant_shares_what_it_does_not_replace_and_the_model_stays(language, store, runs):
    model, _ = language
    before = {name: t.data_ptr() for name, t in model.state_dict().items()}
    variant = with_run(model, store, runs[0])
    assert variant.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == before
    assert type(variant.model.layers[0].mlp.up_proj) is not type(model.model.layers[0].mlp.up_proj)


def test_runs_are_those_of_the_model_in_all_stores(language, store, runs, tmp_path):
    model, _ = language
    other = Store(tmp_path / "other")
    mine = pifa_compile.compress(model, Svd(density=0.6, rank_multiple=1), store=other, progress=False).run
    stranger = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    theirs = pifa_compile.compress(stranger, Svd(density=0.5, rank_multiple=1), store=other, progress=False).run
    found = find_runs(model, [store, other])
    assert [(s.root, r.run_id) for s, r in found] == [
        *((store.root, r.run_id) for r in runs),
        (other.root, mine.run_id),
    ]
    assert [r.run_id for _, r in find_runs(model, [store, other], [mine.run_id[:8], runs[0].run_id])] == [
        mine.run_id,
        runs[0].run_id,
    ]
    with pytest.raises(UnknownRunError, match=r"'svd-0\.9' is no run"):
        find_runs(model, [store, other], ["svd-0.9"])
    assert misfit(theirs, model) == f"run {theirs.run_id} knows 0 of the 14 linear weights of LlamaForCausalLM"
    with pytest.raises(InputError, match="knows 0 of the 14 linear weights of LlamaForCausalLM; name another run"):
        evaluate(model, None, [(other, theirs)], {"a": TEXT})


def test_similarity_of_an_encoder_and_its_nearest_neighbours(store):
    model, tokenizer = load_model(minilm_folder())
    run = pifa_compile.compress(model, Svd(density=0.7), store=store, progress=False).run
    subjects = ["The weather of the month", "A list of numbers", "The old town hall", "Compression of a matrix"]
    text = "\n".join(f"{s} is spoken of in sentence number {i}." for i in range(3) for s in subjects) + "\nshort\n"
    found = evaluate(model, tokenizer, [(store, run)], {"t": text}, reading=Reading(batch=4, length=16))
    dense, compressed = (v.figures["t"] for v in found.variants)
    assert dense == pytest.approx(dict.fromkeys(dense, 1.0), abs=1e-5)
    assert 0.3 < compressed["mean_cosine"] < 0.999
    assert compressed["worst_cosine"] <= compressed["mean_cosine"]
    assert compressed["same_neighbour"] * 12 == pytest.approx(round(compressed["same_neighbour"] * 12))
    assert "12 lines of more than 20 characters" in found.protocol["t"]
    with pytest.raises(InputError, match="1 lines of more than 20 characters; give three"):
        evaluate(model, tokenizer, [], {"t": text.splitlines()[0]})
    with pytest.raises(InputError, match="leave out the BOS token"):
        evaluate(model, tokenizer, [], {"t": text}, reading=Reading(bos=True))


def test_what_cannot_be_measured_is_refused(language):
    model, tokenizer = language
    with pytest.raises(InputError, match="a window cannot have 300 tokens; give 2 to 256"):
        evaluate(model, tokenizer, [], {"t": TEXT}, reading=Reading(length=300))
    with pytest.raises(InputError, match="less than one window"):
        evaluate(model, tokenizer, [], {"t": "short"}, reading=READING)
    with pytest.raises(InputError, match="has no token outputs"):
        evaluate(nn.Sequential(nn.Linear(2, 2)), tokenizer, [], {"t": "A line of some length.\n" * 9})
    tokenizer_without = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="no beginning-of-sequence token"):
        evaluate(model, tokenizer_without, [], {"t": TEXT}, reading=Reading(length=32, bos=True))


def test_the_command_prints_the_dense_model_first_and_its_protocol(language_folder, runs, store, tmp_path, capsys):
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for text in texts:
        text.write_text(TEXT)
    command = ["eval", str(language_folder), "--windows", "4", "--length", "16", "--store", str(store.root)]
    command += [word for text in texts for word in ("--text", str(text))]
    assert main(command) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == str(language_folder)
    assert lines[4].startswith("dense ")
    assert [line.split()[0] for line in lines[5:7]] == [r.run_id for r in runs]
    assert f"{texts[1]}: 4 windows of 16 tokens" in out
    assert main([*command, "--run", runs[1].run_id, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [v["name"] for v in found["variants"]] == ["dense", runs[1].run_id]
    assert set(found["variants"][1]["figures"]) == set(found["protocol"]) == {str(text) for text in texts}


def test_the_command_keeps_its_figures_beside_the_runs(language_folder, runs, store, tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text(TEXT)
    command = ["eval", str(language_folder), "--windows", "4", "--length", "16", "--text", str(text), "--json"]
    for _ in range(2):  # measured again, they replace themselves
        assert main(command) == 0
    found = json.loads(capsys.readouterr().out.partition("\n}\n")[2])
    for variant in found["variants"][1:]:
        (kept,) = store.evaluations(variant["name"])
        assert (kept.figures, kept.density) == (variant["figures"][str(text)], variant["density"])
        assert kept.model_density == variant["model_density"]
        assert kept.dense == found["variants"][0]["figures"][str(text)]
        assert (kept.text, kept.protocol, kept.dtype) == (str(text), found["protocol"][str(text)], "float32")
        assert kept.digest == f"sha256:{hashlib.sha256(TEXT.encode()).hexdigest()}"
    assert main([*command, "--run", runs[0].run_id, "--windows", "3"]) == 0
    assert [len(store.evaluations(run.run_id)) for run in runs] == [2, 1]


def test_figures_that_cannot_be_kept_are_a_warning(language, runs, store):
    model, tokenizer = language
    found = evaluate(model, tokenizer, [(store, runs[0])], {"a": TEXT}, reading=READING)
    found.variants[1].figures["a"]["perplexity"] = math.inf
    keep_figures(found, [(store, runs[0])], {"a": TEXT}, model)
    assert set(store.evaluations(runs[0].run_id)[0].figures) == {"excess", "same_top_1"}
    store.delete_run(runs[0].run_id)
    with pytest.warns(UserWarning, match=f"the figures of {runs[0].run_id} are not kept: .* is no run in"):
        keep_figures(found, [(store, runs[0])], {"a": TEXT}, model)


def test_the_command_says_what_it_cannot_do(language_folder, tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text(TEXT)
    command = ["eval", str(language_folder), "--text", str(text), "--length", "16", "--windows", "4"]
    assert main(command) == 0
    assert "only the dense one is measured" in capsys.readouterr().err
    assert main([*command, "--run", "nothing"]) == 1
    assert main([*command, "--device", "nowhere"]) == 2
    assert "--device nowhere" in capsys.readouterr().err
    assert main(["eval", str(language_folder), "--text", str(tmp_path / "none")]) == 1
    assert "cannot read the text" in capsys.readouterr().err


@pytest.fixture
def exported(language_folder, store, runs, tmp_path):
    model, _ = load_model(language_folder)
    prepared = pifa_compile.apply_(model, run=runs[1].run_id, store=store)
    return pifa_compile.export(prepared, tmp_path / "out", source=language_folder, run=runs[1])


def test_an_exported_folder_is_called_by_its_run_and_not_dense(language_folder, exported, runs, tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text(TEXT)
    words = ["--windows", "4", "--length", "16", "--text", str(text), "--json"]
    assert main(["eval", str(exported), *words]) == 0
    told = capsys.readouterr()
    (alone,) = json.loads(told.out)["variants"]
    assert alone["name"] == f"{runs[1].run_id}, exported" and set(alone["figures"][str(text)]) == {"perplexity"}
    assert "has its factors already; --dense MODEL" in told.err
    assert main(["eval", str(exported), "--dense", str(language_folder), *words]) == 0
    dense, *by_run, folder = json.loads(capsys.readouterr().out)["variants"]
    assert dense["name"] == "dense" and [v["name"] for v in by_run] == [r.run_id for r in runs]
    assert folder["name"] == alone["name"]
    for key in ("density", "model_density"):
        assert folder[key] == alone[key] == pytest.approx(by_run[1][key])
    assert folder["figures"][str(text)] == pytest.approx(by_run[1]["figures"][str(text)], rel=1e-4)
    assert folder["figures"][str(text)]["perplexity"] == pytest.approx(alone["figures"][str(text)]["perplexity"])
    assert [len(Store().evaluations(r.run_id)) for r in runs] == [1, 1]


def test_rows_of_one_name_say_which_store_or_folder_they_are_from(
    language_folder, exported, runs, store, tmp_path, capsys
):
    model, _ = load_model(language_folder)
    other = Store(tmp_path / "other")
    again = pifa_compile.compress(model, Svd(density=0.4, rank_multiple=1), store=other, progress=False).run
    assert again.run_id == runs[1].run_id
    shutil.copytree(exported, tmp_path / "copy")
    told = {"tuning": {"loss": "lm"}, "source": "a", "done": 1, "best": 1, "items": 1, "held_out": 1}
    told |= {"before": {}, "after": {}}
    pifa_compile.export(load_model(exported)[0], tmp_path / "tuned", source=exported, tuned=told)
    (tmp_path / "a.txt").write_text(TEXT)
    words = ["--windows", "4", "--length", "16", "--text", str(tmp_path / "a.txt"), "--json"]
    folders = [str(exported), str(tmp_path / "copy"), str(tmp_path / "tuned"), str(exported)]
    stores = [word for place in (store, other, store) for word in ("--store", str(place.root))]
    assert main(["eval", *folders, "--dense", str(language_folder), *stores, *words]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["model"] == str(language_folder)
    places = [r.run_id for r in (*runs, again)] + folders[:3]
    assert [line for line in told.err.splitlines() if line.startswith("measuring")] == [
        f"measuring {place} ({number} of 7)" for number, place in enumerate(["the model", *places], 1)
    ]
    lossy, name = runs[1].run_id, f"{runs[1].run_id}, exported"
    assert [v["name"] for v in found["variants"]] == [
        *("dense", runs[0].run_id, f"{lossy} in {store.root}", f"{lossy} in {other.root}"),
        *(f"{name} in {folders[0]}", f"{name} in {folders[1]}", f"{lossy}, tuned"),
    ]
    assert [len(place.evaluations(lossy)) for place in (store, other)] == [1, 1]
    wanted = [word for start in (lossy, lossy[:-2]) for word in ("--run", start)]
    assert main(["eval", str(language_folder), *wanted, *words]) == 0
    assert [v["name"] for v in json.loads(capsys.readouterr().out)["variants"]] == ["dense", lossy]


def test_what_dense_cannot_mean_is_refused(language_folder, exported, capsys):
    for models, dense in (
        ([language_folder], language_folder),
        ([exported], exported),
        ([exported, language_folder], language_folder),
    ):
        assert main(["eval", *map(str, models), "--dense", str(dense)]) == 2
        assert f"--dense names the dense model beside those that have their factors; see {models[-1]}" in (
            capsys.readouterr().err
        )
    assert main(["eval", str(exported), str(language_folder)]) == 2
    assert "name it with --dense MODEL" in capsys.readouterr().err
    assert main(["eval", str(exported), "--run", "svd"]) == 2
    assert "leave out --run" in capsys.readouterr().err


def test_an_exported_encoder_is_measured_against_the_dense_one(encoder_folder, store, tmp_path, capsys):
    model, _ = load_model(encoder_folder)
    run = pifa_compile.compress(model, Svd(density=0.5, rank_multiple=1), store=store, progress=False).run
    out = pifa_compile.export(pifa_compile.apply_(model), tmp_path / "out", source=encoder_folder, run=run)
    text = tmp_path / "a.txt"
    text.write_text("\n".join(f"Sentence number {i} of this short text." for i in range(9)))
    assert main(["eval", str(out), "--text", str(text)]) == 1
    assert "is measured against the dense one" in capsys.readouterr().err
    assert main(["eval", str(out), "--dense", str(encoder_folder), "--text", str(text), "--json"]) == 0
    _, by_run, folder = json.loads(capsys.readouterr().out)["variants"]
    assert folder["figures"][str(text)] == pytest.approx(by_run["figures"][str(text)], abs=1e-4)


def test_json_of_an_infinite_perplexity_is_json(language_folder, runs, tmp_path, capsys):
    broken = load_model(language_folder)[0]
    with torch.no_grad():
        broken.lm_head.weight.mul_(1e30)
    broken.save_pretrained(tmp_path / "broken")
    load_model(language_folder)[1].save_pretrained(tmp_path / "broken")
    text = tmp_path / "a.txt"
    text.write_text(TEXT)
    words = ["eval", str(tmp_path / "broken"), "--windows", "4", "--length", "16", "--text", str(text), "--json"]
    assert main(words) == 0

    def refuse(word):
        raise ValueError(word)

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert {v["figures"][str(text)]["perplexity"] for v in found["variants"]} == {"Infinity"}
