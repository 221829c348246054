import pytest

from cmr_fast.cli.demo import demo
from cmr_fast.errors import InputError


def test_demo_trains_searches_and_reports_and_runs_again(tmp_path, capsys):
    out = tmp_path / "demo"
    first = demo(out, epochs=1, count=80)
    text = capsys.readouterr().out
    assert "distance" in text and "shares" in text and "mAP(all)" in text and "ACMR" in text and "CMIMH" in text
    assert "worst case of a query" in text
    for made in ("acmr/model.safetensors", "cmimh/model.safetensors", "images.cmrx", "report/index.html"):
        assert (first / made).is_file()
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    (out / "mine.txt").write_text("mine")

    second = demo(out, epochs=1, count=80)
    assert second != first and (second / "report" / "index.html").is_file()
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    assert (out / "mine.txt").read_text() == "mine"
    weights = "acmr/model.safetensors"
    assert (first / weights).stat().st_size == (second / weights).stat().st_size


def test_demo_refuses_a_file_for_a_folder(tmp_path):
    (tmp_path / "demo").write_text("")
    with pytest.raises(InputError, match="is a file"):
        demo(tmp_path / "demo")
