"""The report of an evaluation: tables for the terminal, and one HTML file that needs nothing beside it."""

import base64
import html
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from utils.evaluation.figures import Figure, Group
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
    """What was measured on one set of samples."""

    name: str  # of the point in a sweep; empty without one
    groups: list[Group]
    pictures: list[tuple[str, Image.Image]] = field(default_factory=list)  # caption and picture
    details: list[Group] = field(default_factory=list)  # groups that are too many for the terminal

    def figures_in(self, features: str) -> dict[str, Figure]:
        """The figures of all groups of these features, by name."""
        return {
            name: f for group in self.all_groups() if group.features == features for name, f in group.figures.items()
        }

    def all_groups(self) -> list[Group]:
        """The groups, those for the files alone among them."""
        return self.groups + self.details


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an evaluation found: `write` leaves it in files, `text` is for the terminal."""

    facts: dict[str, str]  # what was compared
    points: list[Point]
    titles: dict[str, tuple[str, str]]  # of each figure, and which way is better
    notes: list[str]
    sweep: str | None  # name of the flag in which the points differ
    arguments: dict[str, Any]
    heading: str = IN_FEATURES  # above each group
    remark: str = NO_COMPARISON  # above all groups
    brackets: str = BRACKETS  # what the brackets behind a figure hold

    def write(self, folder: Path) -> None:
        """Writes `metrics.json` and `report.html`."""
        folder.mkdir(parents=True, exist_ok=True)
        points = [
            {"point": each.name, "groups": [asdict(group) for group in each.all_groups()]} for each in self.points
        ]
        values = {"compared": self.facts, "notes": self.notes, "sweep": self.sweep}
        write_json(folder / "metrics.json", values | {"points": points, "arguments": self.arguments})
        write_text(folder / "report.html", self.html())

    def title_of(self, name: str) -> str:
        """What a figure is called in tables, and which way is better."""
        title, better = self.titles[name]
        return f"{title} ({better} is better)" if better else title

    def reason(self, name: str, why: str) -> str:
        """Why a figure was not measured, as a sentence."""
        return f"{self.titles[name][0] if name in self.titles else name}: not measured, {why}"

    # ---- terminal

    def text(self) -> str:
        """The tables, what their brackets hold, and the notes. Figures of different features never share a table;
        other points stand side by side.
        """
        tables = self.tables_of_features() if self.heading == IN_FEATURES else self.side_by_side()
        return "\n".join([*tables, "", self.brackets, *self.notes])

    def tables_of_features(self) -> list[str]:
        """Lines of a table for each point and each kind of features."""
        lines = []
        for point in self.points:
            for group in point.groups:
                lines += ["", f"{point.name + ': ' if point.name else ''}in the features of {group.features}"]
                rows = [
                    [
                        self.title_of(name),
                        digits(figure.value),
                        interval_of(figure),
                        f"n = {figure.num_samples}",
                        figure.interval + (f"; {figure.note}" if figure.note else ""),
                    ]
                    for name, figure in group.figures.items()
                ]
                lines += [f"  {line}" for line in aligned(rows)]
                lines += [f"  {self.reason(name, why)}" for name, why in group.not_measured.items()]
        return lines

    def side_by_side(self) -> list[str]:
        """Lines of one table with a row for each figure and a column for each point, and why the rest is not measured.
        A figure on fewer samples than the others of its column says how many.
        """
        groups = [group for point in self.points for group in point.groups]
        counts = [
            max((f.num_samples for group in point.groups for f in group.figures.values()), default=0)
            for point in self.points
        ]
        rows = [["", *(point.name for point in self.points)], ["", *(f"n = {count}" for count in counts)]]
        reasons = []
        for features in unique(group.features for group in groups):
            figures = [point.figures_in(features) for point in self.points]
            rows += [[features, *("" for _ in self.points)]] if any(figures) else []
            for name in unique(name for each in figures for name in each):
                cells = [plain_cell(each.get(name), count) for each, count in zip(figures, counts, strict=True)]
                rows.append(["  " + self.title_of(name), *cells])
            of_these = [group for group in groups if group.features == features]
            reasons += [self.reason(name, why) for group in of_these for name, why in group.not_measured.items()]
        return ["", *aligned(rows), "", *unique(reasons)]

    # ---- HTML

    def html(self) -> str:
        """The whole file."""
        parts = ["<h1>Evaluation</h1>", html_table([("", ""), *self.facts.items()])]
        if self.notes:
            parts += ["<ul>", *(f"<li>{html.escape(note)}</li>" for note in self.notes), "</ul>"]
        parts.append(f"<p><small>{html.escape(self.brackets)} {html.escape(self.remark)}</small></p>")
        kinds = unique(group.features for point in self.points for group in point.all_groups())
        for features in kinds:
            parts += [f"<h2>{html.escape(self.heading.format(features))}</h2>", self.features_table(features)]
        for features in kinds if self.sweep else []:
            parts += self.sweep_charts(features)
        for point in self.points:
            for caption, picture in point.pictures:
                title = f"{point.name}: {caption}" if point.name else caption
                parts += [f"<h2>{html.escape(title)}</h2>", inline_image(picture, title)]
        head = f"<meta charset='utf-8'><title>Evaluation</title><style>{CSS}</style>"
        body = "\n".join(parts)
        return f"<!doctype html>\n<html lang='en'><head>{head}</head>\n<body>\n{body}\n</body></html>\n"

    def features_table(self, features: str) -> str:
        """A row for each figure in these features, a column for each point that has some."""
        with_some = [point for point in self.points if any(g.features == features for g in point.all_groups())]
        by_point = [point.figures_in(features) for point in with_some]
        rows = [["", *(html.escape(point.name) for point in with_some)]]
        for name in unique(name for figures in by_point for name in figures):
            cells = [html_cell(figures[name]) if name in figures else "" for figures in by_point]
            rows.append([html.escape(self.title_of(name)), *cells])
        groups = [group for point in with_some for group in point.all_groups() if group.features == features]
        reasons = {name: why for group in groups for name, why in group.not_measured.items()}
        left_out = "".join(f"<li>{html.escape(self.reason(name, why))}</li>" for name, why in reasons.items())
        return html_table(rows, escape=False) + (f"<ul>{left_out}</ul>" if left_out else "")

    def sweep_charts(self, features: str) -> list[str]:
        """FID, or KID, in these features over accuracy or CLIP score, whichever was measured, and over the swept
        value.
        """
        distance = next((name for name in ("fid", "kid", "cmmd") if self.series(name, features)), None)
        if distance is None:
            return []
        parts, ys, y_title = [], self.series(distance, features), self.titles[distance][0]
        labels = [point.name.split()[-1] for point in self.points]
        for other in ("accuracy", "clip_score"):
            if xs := self.series(other, None):
                x_title = self.titles[other][0]
                parts += [f"<h2>{y_title} against {x_title}</h2>", chart(xs, ys, x_title, y_title, labels)]
                parts.append(f"<p><small>{html.escape(features)}; each dot a {self.sweep}</small></p>")
        xs = [Figure(value, value, value, 0, "") for value in map(float, labels)]
        parts += [f"<h2>{y_title} over {self.sweep}</h2>", chart(xs, ys, str(self.sweep), y_title, labels)]
        return [*parts, f"<p><small>{html.escape(features)}</small></p>"]

    def series(self, name: str, features: str | None) -> list[Figure]:
        """A figure at every point, in these features or the first that have it; empty if a point is without it."""
        groups = [group for point in self.points for group in point.groups if name in group.figures]
        features = features or (groups[0].features if groups else None)
        found = [group.figures[name] for group in groups if group.features == features]
        return found if len(found) == len(self.points) else []


def unique(values: Iterable[str]) -> list[str]:
    """Each value once, in the order of its first appearance."""
    return list(dict.fromkeys(values))


def described(settings: Mapping[str, Any], without: Collection[str] = ()) -> str:
    """Settings in one line, those that a sweep sets left out."""
    return ", ".join(f"{name} {value}" for name, value in settings.items() if name not in without)


# ---- terminal


def digits(value: float) -> str:
    """Four significant digits, without exponents for usual sizes."""
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"


def interval_of(figure: Figure) -> str:
    """The interval of a figure in brackets."""
    return f"[{digits(figure.low)}, {digits(figure.high)}]"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def plain_cell(figure: Figure | None, usual: int) -> str:
    """Value and interval, and the number of samples where it is not the usual one."""
    if figure is None:
        return ""
    text = f"{digits(figure.value)} {interval_of(figure)}"
    return text if figure.num_samples == usual else f"{text} n = {figure.num_samples}"


# ---- HTML


def html_table(rows: Sequence[Sequence[str]], escape: bool = True) -> str:
    """The first row is the head; cells are text, or HTML where they are not to be escaped."""
    clean = html.escape if escape else str
    head, *body = [[clean(cell) for cell in row] for row in rows]
    lines = ["<table>", "<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"] if any(head) else ["<table>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    return "\n".join([*lines, "</table>"])


def html_cell(figure: Figure) -> str:
    """Value, interval, and below them the number of samples and how the interval was made."""
    small = f"n = {figure.num_samples}, {figure.interval}" + (f"; {figure.note}" if figure.note else "")
    return f"<b>{digits(figure.value)}</b> {interval_of(figure)}<br><small>{html.escape(small)}</small>"


def inline_image(picture: Image.Image, caption: str) -> str:
    """An image as HTML that needs no file beside it."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{html.escape(caption, quote=True)}' src='data:image/png;base64,{data}'>"


def chart(xs: list[Figure], ys: list[Figure], x_title: str, y_title: str, labels: list[str]) -> str:
    """An SVG of ys over xs with the intervals of both as bars and labels beside the dots."""
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
    for (x, y), horizontal, vertical, label in zip(dots, xs, ys, labels, strict=True):
        bars = f"M{x:.1f} {y_at(vertical.low):.1f}V{y_at(vertical.high):.1f}"
        bars += f"M{x_at(horizontal.low):.1f} {y:.1f}H{x_at(horizontal.high):.1f}"
        lines.append(f"<path d='{bars}' stroke='#9bf'/><circle cx='{x:.1f}' cy='{y:.1f}' r='3.5' fill='#36c'/>")
        lines.append(f"<text x='{x + 7:.1f}' y='{y - 6:.1f}'>{html.escape(label)}</text>")
    return "\n".join([*lines, "</svg>"])
