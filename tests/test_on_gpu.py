"""The benchmark that tells everything of a GPU: here all of it, tiny, on a CPU, so that it works when there is one."""

import json

from helpers import ROOT, run_python

SECTIONS = {"correctness", "training", "decoding", "memory", "demo"}


def test_every_section_comes_to_its_end(tmp_path):
    code, out, err = run_python(ROOT / "tests" / "benchmarks" / "on_gpu.py", "--smoke", "--out", tmp_path)
    assert code == 0, out + err
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["section"] for row in rows} == SECTIONS
    assert not [row for row in rows if row["section"] == "correctness" and not row["ok"]]
    assert all(row["samples_per_s"] > 0 for row in rows if row["section"] == "training")
    assert any("baseline_samples_per_s" in row for row in rows)
    tables = (tmp_path / "tables.md").read_text()
    assert all(f"## {section}" in tables for section in SECTIONS)
    assert "all sections came to their end" in out
