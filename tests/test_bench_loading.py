"""The benchmark of loading: three ways, each in a process of its own."""

import json

import loading
import pytest


@pytest.mark.slow
def test_what_has_factors_is_smaller(tmp_path, capsys):
    report = loading.main(["--layers", "1", "--width", "256", "--out", str(tmp_path / "rows.json")])
    by = {row["load"]: row for row in report.rows}
    assert list(by) == ["dense", "exported", "from the store"]
    assert by["exported"]["MB of tensors"] == pytest.approx(by["from the store"]["MB of tensors"], rel=0.01)
    assert by["exported"]["MB of tensors"] < by["dense"]["MB of tensors"]
    assert all(row["MB peak"] > 0 and row["s"] > 0 for row in report.rows)
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 3
    assert "from the store" in capsys.readouterr().out
