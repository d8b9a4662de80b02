"""The report of an evaluation: a table for the terminal, and one HTML file that needs nothing beside it."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from utils.evaluation.figures import Figure
from utils.files import write_json, write_text

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
th { border-bottom: 1px solid #999; } td { border-bottom: 1px solid #eee; }
small { color: #666; } img, svg { max-width: 100%; } img { image-rendering: pixelated; } li { margin: .2rem 0; }
""".strip()
IN_FEATURES, NO_COMPARISON = "In the features of {}", "Figures of different features cannot be compared."
BRACKETS = "Brackets hold 95 % intervals over the draw of the samples; the reference counts as given."


@dataclass
class Point:
    """What was measured of one set of samples."""

    name: str  # of the point in a sweep; empty without one
    groups: list[Any]  # of eval_figures: features, figures, not_measured
    pictures: list[tuple[str, Image.Image]] = field(default_factory=list)  # caption and picture


def write(
    output_dir: Path,
    facts: dict[str, str],
    notes: list[str],
    points: list[Point],
    titles: dict[str, tuple[str, str]],
    sweep: str | None,
    arguments: dict[str, Any],
    heading: str = IN_FEATURES,
    remark: str = NO_COMPARISON,
    brackets: str = BRACKETS,
) -> None:
    """`metrics.json` and `report.html`. `facts` are what was compared; `sweep` the name of what the points differ
    in; `heading` stands above each group, `remark` and what `brackets` hold above all of them."""
    output_dir.mkdir(parents=True, exist_ok=True)
    measured = [
        {
            "point": point.name,
            "groups": [
                {
                    "features": group.features,
                    "figures": {name: asdict(figure) for name, figure in group.figures.items()},
                    "not_measured": group.not_measured,
                }
                for group in point.groups
            ],
        }
        for point in points
    ]
    values = {"compared": facts, "notes": notes, "sweep": sweep, "points": measured, "arguments": arguments}
    write_json(output_dir / "metrics.json", values)
    write_text(
        output_dir / "report.html",
        html_report("Evaluation", facts, notes, points, titles, sweep, heading, remark, brackets),
    )


# ---- terminal


def digits(value: float) -> str:
    """Four significant digits, without exponents for usual sizes."""
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"


def interval_of(figure: Figure) -> str:
    return f"[{digits(figure.low)}, {digits(figure.high)}]"


def title_of(name: str, titles: dict[str, tuple[str, str]]) -> str:
    title, better = titles[name]
    return f"{title} ({better} is better)" if better else title


def terminal_tables(points: list[Point], titles: dict[str, tuple[str, str]]) -> str:
    """One table for each point and each kind of features: figures of different features never share one."""
    lines = []
    for point in points:
        for group in point.groups:
            lines += ["", f"{point.name + ': ' if point.name else ''}in the features of {group.features}"]
            rows = [
                (
                    title_of(name, titles),
                    digits(figure.value),
                    interval_of(figure),
                    f"n = {figure.num_samples}",
                    figure.interval + (f"; {figure.note}" if figure.note else ""),
                )
                for name, figure in group.figures.items()
            ]
            widths = [max(len(row[i]) for row in rows) for i in range(5)] if rows else []
            lines += ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
            lines += [f"  {titles[name][0] if name in titles else name}: not measured, {why}" for name, why in
                      group.not_measured.items()]  # fmt: skip
    return "\n".join(lines)


def side_by_side(points: list[Point], titles: dict[str, tuple[str, str]]) -> str:
    """One table with a row for each figure and a column for each point; a figure on fewer samples than the rest of its
    column says how many."""
    counts = [
        max((f.num_samples for group in point.groups for f in group.figures.values()), default=0) for point in points
    ]
    rows = [["", *(point.name for point in points)], ["", *(f"n = {count}" for count in counts)]]
    reasons = []
    for features in dict.fromkeys(group.features for point in points for group in point.groups):
        of_points = [[group for group in point.groups if group.features == features] for point in points]
        figures = [{name: f for group in groups for name, f in group.figures.items()} for groups in of_points]
        rows += [[features, *("" for _ in points)]] if any(figures) else []
        for name in dict.fromkeys(name for each in figures for name in each):
            cells = [plain_cell(each.get(name), count) for each, count in zip(figures, counts, strict=True)]
            rows.append(["  " + title_of(name, titles), *cells])
        left_out = [pair for groups in of_points for group in groups for pair in group.not_measured.items()]
        reasons += [f"{titles[name][0] if name in titles else name}: not measured, {why}" for name, why in left_out]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(["", *lines, "", *dict.fromkeys(reasons)])


def plain_cell(figure: Figure | None, usual: int) -> str:
    """Value and interval, and the number of samples where it is not the usual one."""
    if figure is None:
        return ""
    text = f"{digits(figure.value)} {interval_of(figure)}"
    return text if figure.num_samples == usual else f"{text} n = {figure.num_samples}"


# ---- HTML


def html_report(
    title: str,
    facts: dict[str, str],
    notes: list[str],
    points: list[Point],
    titles: dict[str, tuple[str, str]],
    sweep: str | None,
    heading: str = IN_FEATURES,
    remark: str = NO_COMPARISON,
    brackets: str = BRACKETS,
) -> str:
    """The whole file."""
    parts = [f"<h1>{html.escape(title)}</h1>", html_table([("", ""), *facts.items()])]
    if notes:
        parts += ["<ul>", *(f"<li>{html.escape(note)}</li>" for note in notes), "</ul>"]
    parts.append(f"<p><small>{html.escape(brackets)} {html.escape(remark)}</small></p>")
    for features in dict.fromkeys(group.features for point in points for group in point.groups):
        group_title = html.escape(heading.format(features))
        parts += [f"<h2>{group_title}</h2>", features_table(features, points, titles)]
    if sweep:
        parts += sweep_charts(points, titles, sweep)
    for point in points:
        for caption, picture in point.pictures:
            title_of_picture = f"{point.name}: {caption}" if point.name else caption
            parts += [f"<h2>{html.escape(title_of_picture)}</h2>", inline_image(picture, title_of_picture)]
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{CSS}</style>"
    return f"<!doctype html>\n<html lang='en'><head>{head}</head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"


def html_table(rows: Sequence[Sequence[str]], escape: bool = True) -> str:
    """The first row is the head; cells are text, or HTML where they are not to be escaped."""
    clean = html.escape if escape else str
    head, *body = [[clean(cell) for cell in row] for row in rows]
    lines = ["<table>", "<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"] if any(head) else ["<table>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    return "\n".join([*lines, "</table>"])


def features_table(features: str, points: list[Point], titles: dict[str, tuple[str, str]]) -> str:
    """A row for each figure in these features, a column for each point that has some."""
    points = [point for point in points if any(group.features == features for group in point.groups)]
    by_point = [
        {
            name: figure
            for group in point.groups
            if group.features == features
            for name, figure in group.figures.items()
        }
        for point in points
    ]
    reasons = {
        name: why for point in points for group in point.groups if group.features == features
        for name, why in group.not_measured.items()
    }  # fmt: skip
    rows = [["", *(html.escape(point.name) for point in points)]]
    for name in dict.fromkeys(name for figures in by_point for name in figures):
        cells = [html_cell(figures[name]) if name in figures else "" for figures in by_point]
        rows.append([html.escape(title_of(name, titles)), *cells])
    left_out = "".join(
        f"<li>{html.escape(titles[name][0] if name in titles else name)}: not measured, {html.escape(why)}</li>"
        for name, why in reasons.items()
    )
    return html_table(rows, escape=False) + (f"<ul>{left_out}</ul>" if left_out else "")


def html_cell(figure: Figure) -> str:
    small = f"n = {figure.num_samples}, {figure.interval}" + (f"; {figure.note}" if figure.note else "")
    return f"<b>{digits(figure.value)}</b> {interval_of(figure)}<br><small>{html.escape(small)}</small>"


def inline_image(picture: Image.Image, caption: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{html.escape(caption, quote=True)}' src='data:image/png;base64,{data}'>"


# ---- curves


def sweep_charts(points: list[Point], titles: dict[str, tuple[str, str]], sweep: str) -> list[str]:
    """FID, or KID, of each kind of features over accuracy or CLIP score, whichever was measured, and over the swept
    value."""
    parts = []
    for features in dict.fromkeys(group.features for point in points for group in point.groups):
        distance = next((name for name in ("fid", "kid", "cmmd") if series(points, name, features)), None)
        if distance is None:
            continue
        ys = series(points, distance, features)
        for other in ("accuracy", "clip_score"):
            xs = series(points, other, None)
            if xs:
                title = f"{titles[distance][0]} against {titles[other][0]}"
                parts += [f"<h2>{title}</h2>", chart(xs, ys, titles[other][0], titles[distance][0], points)]
                parts.append(f"<p><small>{html.escape(features)}; each dot a {sweep}</small></p>")
        numbers = [float(point.name.split()[-1]) for point in points]
        xs = [Figure(value, value, value, 0, "") for value in numbers]
        parts += [f"<h2>{titles[distance][0]} over {sweep}</h2>", chart(xs, ys, sweep, titles[distance][0], points)]
        parts.append(f"<p><small>{html.escape(features)}</small></p>")
    return parts


def series(points: list[Point], name: str, features: str | None) -> list[Figure]:
    """A figure at every point, in these features or the first that have it; empty if one of the points lacks it."""
    groups = [group for point in points for group in point.groups if name in group.figures]
    features = features or (groups[0].features if groups else None)
    found = [group.figures[name] for group in groups if group.features == features]
    return found if len(found) == len(points) else []


def chart(xs: list[Figure], ys: list[Figure], x_title: str, y_title: str, points: list[Point]) -> str:
    """An SVG of ys over xs with the intervals of both as bars and the points' values beside the dots."""
    width, height, margin = 560, 340, 56

    def scale(values: list[float], start: float, end: float):
        low, high = min(values), max(values)
        room = 0.08 * (high - low) or 1.0
        low, high = low - room, high + room
        return low, high, lambda value: start + (value - low) / (high - low) * (end - start)

    x_low, x_high, x_at = scale([v for x in xs for v in (x.low, x.high)], margin, width - 16)
    y_low, y_high, y_at = scale([v for y in ys for v in (y.low, y.high)], height - margin, 16)
    lines = [f"<svg viewBox='0 0 {width} {height}' width='{width}' font-family='sans-serif' font-size='12'>"]
    lines.append(f"<path d='M{margin} 16V{height - margin}H{width - 16}' fill='none' stroke='#999'/>")
    for i in range(5):
        x, y = x_low + (i + 0.5) / 5 * (x_high - x_low), y_low + (i + 0.5) / 5 * (y_high - y_low)
        x_label, y_label = f"{x:.3g}", f"{y:.3g}"
        lines.append(f"<text x='{x_at(x):.1f}' y='{height - margin + 16}' text-anchor='middle'>{x_label}</text>")
        lines.append(f"<text x='{margin - 6}' y='{y_at(y) + 4:.1f}' text-anchor='end'>{y_label}</text>")
    lines.append(f"<text x='{width / 2}' y='{height - 12}' text-anchor='middle'>{html.escape(x_title)}</text>")
    turn = f"rotate(-90 14 {height / 2})"
    lines.append(
        f"<text x='14' y='{height / 2}' text-anchor='middle' transform='{turn}'>{html.escape(y_title)}</text>"
    )
    dots = [(x_at(x.value), y_at(y.value)) for x, y in zip(xs, ys, strict=True)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
    lines.append(f"<polyline points='{path}' fill='none' stroke='#36c'/>")
    for (x, y), horizontal, vertical, point in zip(dots, xs, ys, points, strict=True):
        bars = f"M{x:.1f} {y_at(vertical.low):.1f}V{y_at(vertical.high):.1f}"
        bars += f"M{x_at(horizontal.low):.1f} {y:.1f}H{x_at(horizontal.high):.1f}"
        lines.append(f"<path d='{bars}' stroke='#9bf'/><circle cx='{x:.1f}' cy='{y:.1f}' r='3.5' fill='#36c'/>")
        lines.append(f"<text x='{x + 7:.1f}' y='{y - 6:.1f}'>{html.escape(point.name.split()[-1])}</text>")
    return "\n".join([*lines, "</svg>"])
