"""What runs were measured at: kept beside the run, replaced when measured again, and never believed when damaged."""

import hashlib
import json
import os
import warnings
from dataclasses import replace

import pytest
from test_store import write

from pifa_compile.errors import RecordError, UnknownRunError
from pifa_compile.store import Evaluation, Store, evaluations, files

EVALUATION = Evaluation(
    run_id="run",
    text="a.txt",
    digest=f"sha256:{'0' * 64}",
    protocol="4 windows of 16 tokens",
    dtype="float32",
    density=0.5,
    model_density=0.75,
    figures={"perplexity": 12.5, "excess": -0.5},
    dense={"perplexity": 13.0, "excess": 0.0},
    created="2025-01-02T03:04:05Z",
    versions={"torch": "2"},
)


@pytest.fixture
def filled(store):
    """A store with a finished run called "run"."""
    write(store)
    return store


def paths(store, run_id="run"):
    return sorted(evaluations.folder(store.root, run_id).glob("*"))


def read_with_warnings(store, run_id="run"):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = store.evaluations(run_id)
    return found, [str(warning.message) for warning in told]


def rewrite(path, change):
    """The file with another content and a checksum that fits it."""
    body = json.loads(path.read_text())
    del body["sha256"]
    change(body)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps(body | {"sha256": hashlib.sha256(text.encode()).hexdigest()}))


def test_what_is_kept_is_read_again_by_the_beginning_of_the_runs_name(filled):
    later = replace(EVALUATION, protocol="other windows", created="2025-01-03T00:00:00Z")
    for evaluation in (later, EVALUATION):
        filled.keep_evaluation(evaluation)
    assert Store(filled.root).evaluations("ru") == [EVALUATION, later]


@pytest.mark.parametrize(
    ("change", "files_"),
    [
        ({"figures": {"perplexity": 1.0}, "created": "2026-01-01T00:00:00Z", "text": "renamed.txt"}, 1),
        ({"digest": f"sha256:{'1' * 64}"}, 2),
        ({"protocol": "5 windows"}, 2),
        ({"dtype": "bfloat16"}, 2),
    ],
)
def test_the_same_measurement_replaces_the_one_before(filled, change, files_):
    changed = replace(EVALUATION, **change)
    for evaluation in (EVALUATION, changed):
        filled.keep_evaluation(evaluation)
    assert len(paths(filled)) == files_
    assert changed in filled.evaluations("run")


def test_only_a_run_that_is_there_has_evaluations(filled, tmp_path):
    for run_id in ("ru", "none"):
        with pytest.raises(UnknownRunError):
            filled.keep_evaluation(replace(EVALUATION, run_id=run_id))
    with pytest.raises(UnknownRunError):
        filled.evaluations("none")
    assert not (filled.root / "evaluations").exists() and filled.evaluations("run") == []


@pytest.mark.parametrize(
    "change",
    [
        {"figures": {"perplexity": float("nan")}},
        {"dense": {"perplexity": "12"}},
        {"figures": {"perplexity": True}},
        {"density": -1.0},
        {"digest": "0" * 64},
        {"digest": None},
        {"created": "yesterday"},
        {"versions": {"torch": 2}},
        {"protocol": ""},
        {"figures": {"x": 10**400}},
    ],
)
def test_impossible_fields_are_refused(change):
    with pytest.raises(RecordError, match=next(iter(change))):
        replace(EVALUATION, **change)


def deep(path):
    path.write_text("[" * 60_000)


def nan(path):
    path.write_text(path.read_text().replace("12.5", "NaN"))


def other_number(path):
    path.write_text(path.read_text().replace("12.5", "2.5"))


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "binary": lambda path: path.write_bytes(b"\xff\x00"),
    "a list": lambda path: path.write_text("[]"),
    "deep": deep,
    "not a number": nan,
    "another number": other_number,
    "large": lambda path: path.write_bytes(b" " * (evaluations.MAX_FILE + 1)),
    "a pipe": a_pipe,
    "outside": lambda path: (path.unlink(), path.symlink_to("/etc/hostname")),
    "newer": lambda path: rewrite(path, lambda body: body.update(version=2)),
    "of another run": lambda path: rewrite(path, lambda body: body["evaluation"].update(run_id="run2")),
    "more fields": lambda path: rewrite(path, lambda body: body["evaluation"].update(more=1)),
    "no object": lambda path: rewrite(path, lambda body: body.update(evaluation=[])),
    "bad field": lambda path: rewrite(path, lambda body: body["evaluation"].update(created=[])),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_is_not_as_it_was_written_is_a_warning(filled, damage):
    good = replace(EVALUATION, protocol="another")
    filled.keep_evaluation(EVALUATION)
    (path,) = paths(filled)
    damage(path)
    filled.keep_evaluation(good)
    found, told = read_with_warnings(filled)
    assert found == [good]
    assert len(told) == 1 and str(path) in told[0]
    filled.keep_evaluation(EVALUATION)  # measured again, it is whole again
    assert read_with_warnings(filled) == (filled.evaluations("run"), [])
    assert len(filled.evaluations("run")) == 2


def test_files_of_other_names_are_nobodys(filled):
    filled.keep_evaluation(EVALUATION)
    for name in ("notes.txt", f"{'A' * 64}.json", f"{files.TEMPORARY}-x"):
        (evaluations.folder(filled.root, "run") / name).write_text("{}")
    assert read_with_warnings(filled) == ([EVALUATION], [])


def test_a_file_that_is_removed_meanwhile_is_no_damage(filled, monkeypatch):
    for protocol in ("one", "two"):
        filled.keep_evaluation(replace(EVALUATION, protocol=protocol))
    first, second = paths(filled)
    read = files.read

    def reading(root, path, limit):
        second.unlink(missing_ok=True)
        return read(root, path, limit)

    monkeypatch.setattr(files, "read", reading)
    found, told = read_with_warnings(filled)
    assert len(found) == 1 and told == [] and paths(filled) == [first]


def test_a_flood_of_files_is_cut_and_told(filled, monkeypatch):
    monkeypatch.setattr(evaluations, "MOST", 2)
    for number in range(4):
        filled.keep_evaluation(replace(EVALUATION, protocol=str(number)))
    found, told = read_with_warnings(filled)
    assert len(found) == 2 and "it has 4 files, of which 2 are read" in told[0]


def test_deleting_a_run_removes_its_evaluations_and_nothing_else(filled):
    write(filled, "other")
    other = replace(EVALUATION, run_id="other")
    for evaluation in (EVALUATION, other):
        filled.keep_evaluation(evaluation)
    filled.delete_run("run")
    assert not evaluations.folder(filled.root, "run").exists()
    assert filled.evaluations("other") == [other]


def test_gc_removes_evaluations_of_runs_that_are_gone_and_leftovers(filled):
    write(filled, "gone")
    for run_id in ("run", "gone"):
        filled.keep_evaluation(replace(EVALUATION, run_id=run_id))
    leftover = evaluations.folder(filled.root, "run") / f"{files.TEMPORARY}-killed"
    leftover.write_text("half")
    for path in (filled.root / "runs").glob("gone.*"):
        path.unlink()  # as a version does that knows nothing of evaluations
    filled.gc(min_age=-1)
    assert not evaluations.folder(filled.root, "gone").exists() and not leftover.exists()
    assert filled.evaluations("run") == [EVALUATION]


def test_links_are_removed_and_not_followed(filled, tmp_path):
    filled.keep_evaluation(EVALUATION)
    (path,) = paths(filled)
    outside = tmp_path / "outside"
    evaluations.folder(filled.root, "run").rename(outside)
    evaluations.folder(filled.root, "run").symlink_to(outside)
    found, told = read_with_warnings(filled)
    assert found == [] and "a link leads out of the store" in told[0]
    filled.delete_run("run")
    assert (outside / path.name).is_file() and not evaluations.folder(filled.root, "run").is_symlink()


def test_runs_without_evaluations_have_no_folder(filled):
    filled.gc(min_age=-1)
    filled.delete_run("run")
    assert not (filled.root / "evaluations").exists()
