"""The report of an evaluation: what its files and the terminal say of the same figures."""

import html
import json
import re

import pytest
from PIL import Image

from utils.evaluation.figures import Figure, Group
from utils.evaluation.report import Point, Report, described

TITLES = {"fid": ("FID", "lower"), "kid": ("KID", "lower"), "accuracy": ("class accuracy", "higher")}


def figure(value: float, num_samples: int = 50) -> Figure:
    return Figure(value, value - 0.1, value + 0.1, num_samples, "half-sampling", note="a note")


def make_report(points: list[Point], **changes) -> Report:
    settled = {"facts": {"samples": "some"}, "titles": TITLES, "notes": ["<a & b>"], "sweep": None, "arguments": {}}
    return Report(**(settled | {"points": points} | changes))


def test_figures_of_different_features_never_share_a_table():
    groups = [Group("A", {"fid": figure(1)}, {"kid": "too few"}), Group("B", {"fid": figure(2)}, {})]
    report = make_report([Point("", groups)])
    lines = report.text().splitlines()
    first, second = (lines.index(f"in the features of {name}") for name in "AB")
    assert [i for i, line in enumerate(lines) if "FID (lower is better)" in line] == [first + 1, second + 1]
    assert "n = 50" in lines[first + 1]
    assert "half-sampling; a note" in lines[first + 1]
    assert lines[first + 2] == "  KID: not measured, too few"
    assert lines[-2:] == [report.brackets, "<a & b>"]
    assert re.findall("<h2>(.*?)</h2>", report.html()) == ["In the features of A", "In the features of B"]


def test_points_stand_side_by_side_under_a_heading_of_their_own():
    points = [
        Point(
            "samples",
            [Group("Genes", {"kid": figure(1)}, {"fid": "no reason"})],
            details=[Group("D", {}, {"fid": "x"})],
        ),
        Point("real", [Group("Genes", {"kid": figure(2, num_samples=9), "accuracy": figure(3, num_samples=9)}, {})]),
    ]
    report = make_report(points, heading="{}", brackets="Brackets hold B.", remark="Remark.")
    text = report.text()
    rows = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    assert rows[1:3] == [["samples", "real"], ["n = 50", "n = 9"]]  # the largest of each column
    assert ["KID (lower is better)", "1 [0.9, 1.1]", "2 [1.9, 2.1]"] in rows
    assert "FID: not measured, no reason" in text
    assert "not measured, x" not in text  # details are in the files alone
    assert "FID: not measured, x" in report.html()
    assert "Brackets hold B. Remark." in report.html()


def test_a_figure_on_fewer_samples_than_its_column_says_so():
    point = Point("samples", [Group("Genes", {"kid": figure(1), "fid": figure(2, num_samples=7)}, {})])
    assert "2 [1.9, 2.1] n = 7" in make_report([point], heading="{}").text()


def test_files_hold_every_group_and_need_nothing_beside_them(tmp_path):
    picture = ("two < three", Image.new("RGB", (2, 2)))
    point = Point("p", [Group("A", {"fid": figure(1)}, {})], [picture], details=[Group("B", {}, {"kid": "few"})])
    make_report([point], arguments={"seed": 3}).write(tmp_path / "new")
    values = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert list(values) == ["compared", "notes", "sweep", "points", "arguments"]
    (written,) = values["points"]
    assert [group["features"] for group in written["groups"]] == ["A", "B"]
    assert written["groups"][0]["figures"]["fid"] == vars(figure(1))
    assert written["groups"][1]["not_measured"] == {"kid": "few"}
    page = (tmp_path / "new" / "report.html").read_text()
    assert html.escape("<a & b>") in page
    assert "<a & b>" not in page
    assert "p: two &lt; three" in page
    assert "src='data:image/png;base64," in page


@pytest.mark.parametrize(("lacking", "charts"), [(None, 2), ("accuracy", 1), ("fid", 0)])
def test_charts_of_a_sweep_need_their_figures_at_every_point(lacking, charts):
    """FID over accuracy and over the swept value."""
    points = []
    for i, value in enumerate(("1", "3")):
        figures = {"fid": figure(i), "accuracy": figure(i + 0.5)}
        if i:
            figures = {name: each for name, each in figures.items() if name != lacking}
        points.append(Point(f"guidance_scale {value}", [Group("A", figures, {})]))
    assert make_report(points, sweep="guidance_scale").html().count("<svg") == charts
    assert "<svg" not in make_report(points).html()


def test_settings_in_one_line():
    assert described({"steps": 4, "scale": 2.0, "seed": 0}, without={"scale": 1}) == "steps 4, seed 0"
