"""The command: exit codes, JSON alone on standard output, and a line instead of a traceback for a user's mistake."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from pifa_compile import cli, reports
from pifa_compile.store import LayerRecord, RunHeader, Store
from pifa_compile.store.objects import object_path
from pifa_compile.store.writer import document_path

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

#: The data-free method, as most of these tests are not about what a method finds.
COMPRESS = ("compress", "--method", "svd")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a small language model with seven linear layers and an output embedding."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, intermediate_size=64)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pifa(capsys):
    """``pifa(*arguments)``: exit code, standard output and standard error of the command."""

    def call(*arguments):
        capsys.readouterr()
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as end:  # as argparse ends
            code = end.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def run_id(pifa, llama, store):
    """A run at density 0.5 in the default store."""
    assert pifa(*COMPRESS, llama, "--density", 0.5)[0] == 0
    return store.runs()[0].run_id


def failed(result, code, *words):
    """That a command ended with this code, said these words in a message of its own, and nothing else."""
    assert result[0] == code
    assert result[1] == ""
    assert "Traceback" not in result[2]
    assert result[2].splitlines()[0].startswith("pifa: error: ")
    assert all(word in result[2] for word in words), result[2]
    return True


# --- compress ---------------------------------------------------------------------------------------------------------


def test_compress_prints_the_layers_the_run_and_the_places(pifa, llama, store):
    code, out, err = pifa(*COMPRESS, llama, "--density", 0.5)
    (run,) = store.runs()
    assert code == 0
    assert out == f"{reports.CompressionReport(run, store.root, parameters(llama))}\n"
    assert run.header.model == llama
    assert f"run {run.run_id}: 7 of 8 linear layers replaced" in out
    assert out.endswith(f"store: {store.root}\n")
    assert "8/8" in err
    assert "pifa: error" not in err


def parameters(folder):
    return sum(p.numel() for p in transformers.LlamaForCausalLM.from_pretrained(folder).parameters())


def test_compress_prints_json_alone(pifa, llama, store):
    code, out, _ = pifa(*COMPRESS, llama, "--density", 0.5, "--json")
    (run,) = store.runs()
    assert code == 0
    assert json.loads(out) == reports.CompressionReport(run, store.root, parameters(llama)).summary()


def test_compress_takes_the_settings_of_a_recipe(pifa, llama, tmp_path):
    place = tmp_path / "elsewhere"
    settings = ["--rank-multiple", 4, "--pivoting", "qr", "--form", "pair", "--skip", "*.q_proj", "--skip", "*.mlp.*"]
    code, out, _ = pifa(
        *COMPRESS, llama, "--density", 0.6, "--dtype", "bfloat16", "--store", place, *settings, "--json"
    )
    (run,) = Store(place).runs()
    assert code == 0
    recipe = json.loads(out)["recipe"]
    wanted = {"density": 0.6, "rank_multiple": 4, "pivoting": "qr", "form": "pair", "skip": ["*.q_proj", "*.mlp.*"]}
    assert wanted.items() <= recipe.items()
    assert [r.form for r in run.layers] == ["dense", "pair", "pair", "pair", "dense", "dense", "dense", "dense"]
    assert run.layers[1].details["dtype"] == "bfloat16"
    assert not (tmp_path / "store").exists()


def test_compress_sets_any_field_of_a_recipe(pifa, llama, tmp_path):
    fields = ("--set", 'joint=["gate+up"]', "--set", "rank-multiple=4", "--set", "pivoting=lu")
    assert pifa("compress", llama, "--method", "joint", "--density", 0.5, "--store", tmp_path, *fields)[0] == 0
    (run,) = Store(tmp_path).runs()
    recipe = run.header.recipe
    assert (recipe["joint"], recipe["rank_multiple"], recipe["pivoting"]) == (["gate+up"], 4, "lu")
    assert sum(bool(record.members) for record in run.layers) == 1
    wrong = pifa(*COMPRESS, llama, "--density", 0.5, "--store", tmp_path, "--set", "windows=4")
    assert failed(wrong, cli.USAGE, "'svd'", "'windows'")
    assert pifa(*COMPRESS, llama, "--density", 0.5, "--set", "windows")[0] == cli.USAGE


def test_compress_takes_the_best_method_that_the_model_allows(pifa, language_folder, encoder_folder, tmp_path):
    few = ("--set", "windows=2", "--set", "window_length=16", "--rank-multiple", 1, "--device", "cpu")
    assert pifa("compress", language_folder, "--density", 0.5, "--store", tmp_path / "a", *few)[0] == 0
    (run,) = Store(tmp_path / "a").runs()
    assert (run.header.recipe["method"], run.header.calibration["source"]) == ("mpifa", "self")
    code, _, err = pifa("compress", encoder_folder, "--density", 0.5, "--store", tmp_path / "b")
    assert code == 0 and "give one with --text" in err
    (run,) = Store(tmp_path / "b").runs()
    assert run.header.recipe["method"] == "svd"


def test_a_second_compress_computes_nothing(pifa, llama, run_id):
    torch._dynamo.utils.counters.clear()
    assert pifa(*COMPRESS, llama, "--density", 0.5)[0] == 0
    assert torch._dynamo.utils.counters["pifa"]["factored"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--density", 2], ["density is 2.0; it is the fraction of parameters that is kept"]),
        (["--density", 1], ["leave the density out"]),
        (["--density", "nan"], ["density is nan"]),
        (["--density", 0.5, "--method", "sdv"], ["unknown method 'sdv'", "did you mean 'svd'"]),
        (["--density", 0.5, "--pivoting", "maxvoll"], ["did you mean 'maxvol'"]),
        (["--density", 0.5, "--rank-multiple", 0], ["rank_multiple is 0"]),
        (["--density", 0.5, "--form", "dense"], ["give 'pifa' or 'pair'"]),
    ],
)
def test_a_bad_recipe_is_a_mistake_of_usage(pifa, arguments, words, tmp_path):
    """Told before the model is looked for."""
    assert failed(pifa("compress", "/no/such/model", *arguments), 2, *words)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("arguments", [["--density", "60%"], [], ["--density", 0.5, "--dtype", "int8"], ["--dens", 1]])
def test_arguments_that_cannot_be_read_are_a_mistake_of_usage(pifa, llama, arguments):
    code, out, err = pifa("compress", llama, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: pifa compress")


@pytest.mark.parametrize("command", ["compress", "dry-run"])
@pytest.mark.parametrize("model", ["/no/such/model", "nobody/nothing-of-the-kind"])
def test_a_missing_model_fails(pifa, command, model, tmp_path):
    assert failed(pifa(command, model, "--density", 0.5, "--json"), 1, f"cannot load the model {model}: ")
    assert not (tmp_path / "store").exists()


def test_a_store_that_cannot_be_written_fails(pifa, llama, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert failed(pifa(*COMPRESS, llama, "--density", 0.5, "--store", tmp_path / "file"), 1, str(tmp_path / "file"))


def test_an_interruption_says_that_the_work_is_kept(pifa, llama, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pifa_compile.compression.compress", interrupt)
    assert failed(pifa(*COMPRESS, llama, "--density", 0.5), 130, "interrupted; layers that were finished are kept")


def test_a_mistake_of_our_own_keeps_its_traceback(llama, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("pifa_compile.compression.compress", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main([*COMPRESS, llama, "--density", "0.5"])


# --- dry-run ----------------------------------------------------------------------------------------------------------


def test_dry_run_plans_a_density_without_writing(pifa, llama, tmp_path):
    code, out, _ = pifa("dry-run", llama, "--density", 0.5, "--json")
    found = json.loads(out)
    assert (code, found["run"], found["planned"], found["graphs"]) == (0, None, True, 1)
    assert len(found["linears"]) == 8
    assert not (tmp_path / "store").exists()


def test_dry_run_reads_the_run_that_there_is(pifa, llama, run_id):
    code, out, _ = pifa("dry-run", llama, "--run", run_id[:8], "--batch", 3)
    assert code == 0
    assert f"factors from run {run_id}" in out
    assert "model.layers.0.mlp.down_proj" in out


def test_an_unknown_run_fails_in_a_line(pifa, llama, run_id):
    """Although it is found out inside of torch.compile, which wraps the error."""
    assert failed(pifa("dry-run", llama, "--run", "svd-0.9"), 1, "'svd-0.9' is no run in", run_id)
    assert failed(pifa("inspect", "svd-0.9"), 1, "'svd-0.9' is no run in", run_id)


def test_several_runs_that_fit_are_listed(pifa, llama, run_id, store):
    assert pifa(*COMPRESS, llama, "--density", 0.6)[0] == 0
    assert failed(pifa("dry-run", llama), 1, "2 compression runs fit", *(run.run_id for run in store.runs()))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--method", "svd"], "needs a density"), (["--density", 7], "density=7.0"), (["--run", ""], "non-empty string")],
)
def test_impossible_options_are_a_mistake_of_usage(pifa, arguments, word):
    """Told before the model is looked for."""
    assert failed(pifa("dry-run", "/no/such/model", *arguments), 2, word)


@pytest.mark.parametrize("arguments", [["--run", "a", "--density", 0.5], ["--batch", 0], ["--batch", "x"]])
def test_contradictory_or_impossible_arguments_are_a_mistake_of_usage(pifa, llama, arguments):
    code, out, err = pifa("dry-run", llama, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: pifa dry-run")


def test_dry_run_says_that_it_has_inputs_for_text_only(pifa, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=16)
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    assert failed(pifa("dry-run", tmp_path / "vit"), 1, "takes pixel_values", "call pifa_compile.dry_run(model, input")


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_lists_the_runs(pifa, llama, run_id, store):
    code, out, err = pifa("inspect")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith(f"{run_id}: {llama}, ")
    assert ", density 0.5, " in out
    assert out.endswith(f"store: {store.root}\n")
    code, out, _ = pifa("inspect", "--json")
    runs = [reports.run_summary(run) for run in store.runs()]
    assert (code, json.loads(out)) == (0, {"store": str(store.root), "problems": [], "runs": runs})


def test_inspect_of_an_empty_store(pifa, store):
    assert pifa("inspect") == (0, f"no runs yet\nstore: {store.root}\n", "")
    assert json.loads(pifa("inspect", "--json")[1])["runs"] == []
    assert not store.root.exists()


def test_inspect_shows_the_layers_of_a_run(pifa, run_id, store):
    code, out, _ = pifa("inspect", run_id[:8])
    assert code == 0
    assert out == f"{reports.render_run(store.run(run_id))}\nstore: {store.root}\n"
    code, out, _ = pifa("inspect", run_id, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["layers"] == [r.to_json() for r in store.run(run_id).layers]
    assert (found["run"], found["store"], found["problems"]) == (run_id, str(store.root), [])


@pytest.mark.parametrize("sort", reports.SORTS)
def test_inspect_sorts_the_layers(pifa, run_id, store, sort):
    code, out, _ = pifa("inspect", run_id, "--sort", sort)
    assert (code, out) == (0, f"{reports.render_run(store.run(run_id), sort)}\nstore: {store.root}\n")


def test_an_order_needs_a_run(pifa, run_id):
    assert failed(pifa("inspect", "--sort", "rank"), 2, "--sort is the order of the layers of one run; name the run")
    code, _, err = pifa("inspect", run_id, "--sort", "colour")
    assert code == 2
    assert all(sort in err for sort in reports.SORTS)


@pytest.mark.parametrize("one", [True, False])
def test_verify_finds_a_damaged_object(pifa, run_id, store, one):
    arguments = ["inspect", *([run_id] if one else []), "--verify"]
    code, out, _ = pifa(*arguments)
    assert (code, out.splitlines()[-1]) == (0, "verified: every object is whole and fits its record")
    layer = store.run(run_id).layers[2]
    path = object_path(store.root, layer.object)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    code, out, _ = pifa(*arguments)
    assert code == 3
    (problem,) = (line for line in out.splitlines() if line.startswith("problem: "))
    assert f"{path}: its content is not what its name says" in problem
    code, out, _ = pifa(*arguments, "--json")
    assert (code, json.loads(out)["problems"]) == (3, [problem.removeprefix("problem: ")])
    assert pifa("inspect", run_id)[0] == 0


def test_a_damaged_run_is_told(pifa, run_id, store):
    path = document_path(store.root, run_id)
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.6", 1))
    assert failed(pifa("inspect", run_id), 1, str(path), "it is not what was written; remove it with Store.delete_run")
    for command in (["inspect", run_id, "--verify"], ["verify", run_id]):
        assert failed(pifa(*command), 3, str(path), "it is not what was written")
    code, out, err = pifa("inspect")
    assert (code, err) == (0, "")
    assert f"problem: {path}: it is not what was written" in out
    assert pifa("inspect", "--verify")[0] == 3


def test_names_in_a_store_do_not_steer_the_terminal(pifa, store):
    hostile = "\x1b]0;owned\x07\x9b2J\u202ename\ud800"
    header = RunHeader("run", hostile, {"method": "svd"}, 1, "2025-01-02T03:04:05Z")
    with store.write_run(header) as writer:
        sizes = {"shape": (3, 4), "rank": 0, "numbers": 12, "bytes": 0, "seconds": 0.0, "reason": hostile}
        writer.add(LayerRecord(name=f"x{hostile}", digests={}, object=None, form="dense", **sizes))
        writer.finish()
    for arguments in (["inspect"], ["inspect", "run"], ["verify"], ["inspect", "run", "--json"]):
        code, out, _ = pifa(*arguments)
        assert code == 0 and not set(out) & set("\x1b\x07\x9b\u202e\ud800")
    assert "owned" in pifa("inspect", "run")[1]


def test_a_store_of_a_newer_version_fails(pifa, llama, run_id, store):
    (store.root / "store.json").write_text('{"format": "pifa-compile store", "version": 2}')
    for arguments in (["inspect"], ["inspect", run_id, "--verify"], [*COMPRESS, llama, "--density", 0.5]):
        assert failed(pifa(*arguments), 1, "version of the store is 2, this version knows 1; update pifa-compile")


def test_an_unfinished_run_says_so(pifa, run_id, store):
    run = store.run(run_id)
    store.delete_run(run_id)
    with store.write_run(run.header) as writer:
        writer.add(run.layers[0])
    assert f"made {run.header.created} (unfinished)\n" in pifa("inspect")[1]
    assert f"run {run_id} (unfinished: 1 of 8 layers)" in pifa("inspect", run_id)[1]


def test_inspect_writes_a_page(pifa, run_id, store, tmp_path):
    path = tmp_path / "new" / "run.html"
    code, out, err = pifa("inspect", run_id[:8], "--html", path)
    assert (code, err) == (0, "")
    assert f"\npage: {path}\nstore: {store.root}\n" in out
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and run_id in page
    assert json.loads(pifa("inspect", run_id, "--html", path, "--json")[1])["page"] == str(path)


def test_a_page_needs_a_run_and_a_place(pifa, run_id, tmp_path):
    assert failed(pifa("inspect", "--html", tmp_path / "page.html"), 2, "--html is the page of one run; name the run")
    assert failed(pifa("inspect", run_id, "--html", tmp_path), 1, f"cannot write the page {tmp_path}: ")


# --- diff -------------------------------------------------------------------------------------------------------------


def test_diff_ends_well_whether_runs_differ_or_not(pifa, llama, run_id, store):
    assert pifa(*COMPRESS, llama, "--density", 0.7)[0] == 0
    other = next(run.run_id for run in store.runs() if run.run_id != run_id)
    code, out, err = pifa("diff", run_id, other)
    assert (code, err) == (0, "")
    assert re.search(r"^recipe: density +0\.5 +0\.7$", out, re.MULTILINE) and "same weights" in out
    assert out.endswith(f"store: {store.root}\n")
    code, out, _ = pifa("diff", run_id, other[:7], "--json")
    found = json.loads(out)
    assert (code, found["equal"], found["same_weights"]) == (0, False, True)
    assert found["settings"]["recipe: density"] == [0.5, 0.7]
    assert len(found["layers"]) == 8 and found["store"] == str(store.root)
    code, out, _ = pifa("diff", run_id, run_id)
    assert code == 0 and "no difference" in out
    assert failed(pifa("diff", run_id, "nothing"), 1, "'nothing' is no run in", run_id)
    assert pifa("diff", run_id)[0] == 2


# --- env, and the command as a program --------------------------------------------------------------------------------


def test_env_tells_versions_and_places(pifa, store):
    code, out, err = pifa("env")
    found = json.loads(pifa("env", "--json")[1])
    assert (code, err) == (0, "")
    assert out == "".join(f"{key:20} {value}\n" for key, value in found.items())
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]  # PyPI's wheel does not name its CUDA
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["store"] == str(store.root)
    assert found["backend registered"] is True
    assert {"pifa-compile", "triton", "transformers", "safetensors", "system", "threads", "cuda"} < set(found)


@pytest.mark.parametrize("arguments", [["--help"], ["compress", "--help"], ["inspect", "--help"], ["--version"]])
def test_help_is_no_mistake(pifa, arguments):
    code, out, err = pifa(*arguments)
    assert (code, err) == (0, "")
    assert out


@pytest.mark.parametrize("arguments", [[], ["compres"], ["--densities"]])
def test_no_command_is_a_mistake_of_usage(pifa, arguments):
    code, out, err = pifa(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: pifa")


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_reader_that_has_enough_is_no_failure(run_id, arguments):
    """With little output, which Python holds back until its end, and with much."""
    reader, writer = os.pipe()
    os.close(reader)
    path = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-m", "pifa_compile.cli", "inspect", *arguments, *([run_id] if arguments else [])]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=os.environ | path)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
