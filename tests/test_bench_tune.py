"""bench/tune.py: rows of the dense, compressed and tuned model, kept in a file and taken from it."""

import json

import tune as bench

from pifa_compile import tuning


def test_rows_are_measured_printed_and_kept(language_folder, tmp_path, capsys, monkeypatch):
    for name in ("calibration", "judged"):
        (tmp_path / f"{name}.txt").write_text(f"a {name} text of a few words and more. " * 60)
    rows = tmp_path / "rows.json"
    command = [str(language_folder), str(tmp_path / "judged.txt"), "--calibration", str(tmp_path / "calibration.txt")]
    command += ["--densities", "0.5", "--steps", "2", "--length", "64", "--windows", "2", "--json", str(rows)]
    bench.main(command)
    found = {row["case"]: row for row in json.loads(rows.read_text())}
    assert list(found) == ["dense", "compressed", "lm", "distill"]
    assert all(row["scores"]["judged.txt"] > 1 and row["made"]["machine"] for row in found.values())
    assert found["lm"]["run"] == found["compressed"]["run"]
    assert found["distill"]["tuning"]["done"] == 2 and "divergence" in found["distill"]["tuning"]["after"]
    table = capsys.readouterr().out
    assert all(f"{row['scores']['judged.txt']:.2f}" in table for row in found.values())
    monkeypatch.setattr(tuning, "train", None)  # a second call computes nothing
    bench.main(command)
    assert capsys.readouterr().out == table
