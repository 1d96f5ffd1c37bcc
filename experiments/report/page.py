"""A report as one HTML file that needs nothing else, with charts by Bokeh."""

from __future__ import annotations

import base64
import html
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from functools import cache, partial
from typing import Any

import numpy as np
from bokeh.document import Document
from bokeh.embed import components
from bokeh.layouts import gridplot
from bokeh.models import (
    ColumnDataSource,
    CustomJSTickFormatter,
    HoverTool,
    Legend,
    LegendItem,
    LinearColorMapper,
    LogTicker,
    Range1d,
    glyphs,
)
from bokeh.plotting import figure
from bokeh.resources import Resources
from matplotlib import colormaps
from matplotlib.colors import to_hex

import rlsched
from rlsched.experiments.report.blocks import (
    DETAILED,
    Chart,
    Heat,
    Line,
    Panel,
    Picture,
    Section,
    Text,
    fineness,
    thinned,
)
from rlsched.experiments.report.pictures import height_of, largest, png, title_of

LARGEST = 5_000_000  # bytes of a page
# Points of a curve and dots per inch of a picture, in the order in which they are tried until the page is small enough.
FINENESS = ((1000, 110), (400, 110), (200, 70), (100, 70), (50, 50))
DIVERGING = [to_hex(colormaps["RdBu_r"](value)) for value in np.linspace(0, 1, 101)]
NEAR, MARK = 9, 4  # pixels: of the point that a pointer is on, and of one that is shown
CHARACTERS = 120  # of a line of a legend
SHORT = """
const size = Math.abs(tick), short = Number(tick.toPrecision(4));
return size >= 1e5 || (size < 1e-3 && size > 0) ? short.toExponential().replace("e+", "e") : String(short);
"""
STYLE = """
:root { color-scheme: light dark; --text: #222; --quiet: #666; --line: #ddd; --page: #fff; --code: #f5f5f5 }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --quiet: #999; --line: #444; --page: #181a1b; --code: #242627 }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 0 auto;
  padding: 1em 2em; max-width: 1180px }
h1 { margin-bottom: 0 } h2 { margin-top: 2em; border-bottom: 1px solid var(--line) } h3 { margin: 1.5em 0 0.3em }
p { max-width: 60em; margin: 0.4em 0 } nav a { margin-right: 1.2em; white-space: nowrap } a { color: inherit }
.quiet { color: var(--quiet) } .table { overflow-x: auto }
table { border-collapse: collapse; margin: 0.6em 0; font-size: 0.92em }
td, th { border: 1px solid var(--line); padding: 0.2em 0.6em; text-align: left; font-variant-numeric: tabular-nums }
pre { background: var(--code); padding: 0.8em; overflow-x: auto; line-height: 1.35; font-size: 0.85em }
code { background: var(--code); padding: 0 0.2em } pre code { padding: 0 }
img { max-width: 100%; background: #fff } summary { cursor: pointer; margin: 0.4em 0 }
"""
# Bokeh draws on a canvas, which no style sheet reaches.
PAINT = """
const scheme = matchMedia("(prefers-color-scheme: dark)");
function paint() {
  const [text, line] = scheme.matches ? ["#ddd", "#444"] : ["#222", "#ddd"];
  for (const doc of Bokeh.documents) for (const model of doc._all_models.values()) {
    if (model.type.endsWith("Axis")) model.setv({axis_label_text_color: text, major_label_text_color: text,
      axis_line_color: line, major_tick_line_color: line, minor_tick_line_color: null});
    if (model.type == "Grid") model.setv({grid_line_color: line});
    if (model.type == "Title") model.setv({text_color: text});
    if (model.type == "Legend") model.setv({label_text_color: text});
    if (model.type == "Figure") model.setv({outline_line_color: line});
  }
}
function begin() { Bokeh.documents.length ? paint() : setTimeout(begin, 50) }
addEventListener("load", begin);
scheme.addEventListener("change", paint);
"""


def page(title: str, sections: Sequence[Section]) -> bytes:
    """The page, of at most `LARGEST` bytes: curves have as many points as that allows.

    Raises:
        ValueError: it is larger whatever is left out.
    """
    draw = cache(png)  # which takes longer than all else
    for points, dpi in FINENESS:
        content = _page(title, sections, points, partial(draw, dpi=dpi))
        if len(content) <= LARGEST:
            return content
    raise ValueError(
        f"a page has at most {LARGEST / 1e6:g} MB, and this one would have {len(content) / 1e6:.1f}: report fewer runs "
        "at once"
    )


def _page(title: str, sections: Sequence[Section], points: int, draw: Callable[[Picture], bytes]) -> bytes:
    charts = [block for section in sections for block in section.blocks if isinstance(block, Chart)]
    script, divs = components(_roots(charts, points)) if charts else ("", [])
    places = iter(divs)
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="quiet">by rlsched {rlsched.__version__}, {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}</p>',
        "<nav>",
        *(f'<a href="#{i}">{html.escape(section.title)}</a>' for i, section in enumerate(sections)),
        "</nav>",
    ]
    for i, section in enumerate(sections):
        body.append(f'<h2 id="{i}">{html.escape(section.title)}</h2>')
        for block in section.blocks:
            body += _block(block, section.title, places, draw)
    if any(fineness(panel) > points for chart in charts for panel in chart.panels):
        body.append(
            f'<p class="quiet">So that the page stays small, curves have about {points} points, with their extremes, '
            f"and {points // DETAILED} decisions of a run at most are shown.</p>"
        )
    bokeh = Resources(mode="inline", components=["bokeh"]).render_js() if charts else ""
    paint = f"<script>{PAINT}</script>" if charts else ""
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style>{bokeh}"
    )
    lines = [
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>',
        *body,
        f"{script}\n{paint}\n</body></html>\n",
    ]
    return "\n".join(lines).encode()


def _block(
    block: Text | Chart | Picture, heading: str, places: Iterator[str], draw: Callable[[Picture], bytes]
) -> Iterator[str]:
    match block:
        case Text(markdown, summary):
            text = f'<div class="table">{_safe(markdown)}</div>'
            yield _folded(summary, text) if summary else text
        case Chart():
            yield f"<h3>{html.escape(block.title)}</h3>" if block.title != heading else ""
            yield _safe(block.note) if block.note else ""
            yield next(places)
        case Picture():
            data = base64.b64encode(draw(block)).decode()
            image = f'<img alt="{html.escape(block.title)}" src="data:image/png;base64,{data}">'
            yield _folded(block.title, image) if block.is_folded else f"<h3>{html.escape(block.title)}</h3>{image}"


def _safe(markdown: str) -> str:
    """Markdown as TensorBoard shows it: without what a browser could run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what TensorBoard brings along
        from tensorboard.plugin_util import markdown_to_safe_html
    shown: str = markdown_to_safe_html(markdown)
    return shown


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def _roots(charts: Sequence[Chart], points: int) -> list[Any]:
    """The charts, in Bokeh, in one document: it goes through all of them whenever one is added, unless it is frozen."""
    document = Document()
    with document.models.freeze():
        for chart in charts:
            document.add_root(_drawn(chart, points))
    return document.roots


def _drawn(chart: Chart, points: int) -> Any:
    """The chart, in Bokeh: panels with one x-range and one legend, which hides what is clicked."""
    has_heat = any(isinstance(panel, Heat) for panel in chart.panels)
    drawn: list[Any] = []
    shown: dict[str, list[Any]] = {}
    for place, panel in enumerate(chart.panels):
        plot = figure(
            height=height_of(panel) + (28 if place == len(chart.panels) - 1 else 0),
            title=title_of(panel),
            tools="xpan,xwheel_zoom,box_zoom,reset,save",
            active_scroll=None,
            x_axis_type="log" if chart.is_log else "linear",
            y_axis_type="log" if isinstance(panel, Panel) and panel.is_log else "linear",
            min_border_left=150 if has_heat else 75,
            min_border_right=20,
            background_fill_color=None,
            border_fill_color=None,
            sizing_mode="stretch_width",
            **({"x_range": drawn[0].x_range} if drawn else {}),
        )
        plot.title.text_font_size, plot.title.text_font_style = "9pt", "normal"
        plot.xaxis.formatter = CustomJSTickFormatter(code=SHORT)
        thin = thinned(panel, points)
        if isinstance(thin, Heat):
            _heat(plot, thin, chart.x)
        else:
            plot.yaxis.formatter = CustomJSTickFormatter(code=SHORT)
            _lines(plot, thin, chart.x, shown)
        drawn.append(plot)
    drawn[-1].xaxis.axis_label = chart.x
    if len(shown) > 1:
        columns = max(1, CHARACTERS // (max(map(len, shown)) + 6))
        legend = Legend(
            items=[LegendItem(label=label, renderers=drawn_of) for label, drawn_of in shown.items()],
            click_policy="hide",
            ncols=min(columns, len(shown)),
            border_line_color=None,
            background_fill_color=None,
            label_text_font_size="9pt",
            padding=2,
            margin=2,
        )
        drawn[0].add_layout(legend, "above")
        drawn[0].height += 8 + 24 * math.ceil(len(shown) / min(columns, len(shown)))
    options = {"logo": None}
    return gridplot([[plot] for plot in drawn], sizing_mode="stretch_width", toolbar_options=options)


def _lines(plot: Any, panel: Panel, x_label: str, shown: dict[str, list[Any]]) -> None:
    if panel.is_log:
        _logarithmic(plot, panel)
    has_details = any(line.details for line in panel.lines)
    points: dict[str, list[Any]] = {}  # by what is told of them: a tool for each would make the page slow
    for line in panel.lines:
        source = ColumnDataSource(_columns(line, is_log=panel.is_log))
        color = to_hex(line.color)
        look: dict[str, Any] = {"line_color": color, "line_dash": line.dash, "line_width": 1.6}
        curve = glyphs.Step(x="x", y="y", mode="after", **look) if line.holds else glyphs.Line(x="x", y="y", **look)
        alpha, size = (1.0, MARK) if line.has_marks else (0.0, NEAR)
        mark = glyphs.Scatter(
            x="x", y="y", size=size, fill_color=color, line_color=None, fill_alpha=alpha, hit_dilation=2.0
        )
        drawn = [plot.add_glyph(source, glyph, name=line.label) for glyph in (curve, mark)]
        if line.details or not has_details:  # one tells of others that lie on it
            points.setdefault(_tooltip(line, x_label), []).append(drawn[-1])
        shown.setdefault(line.label, []).extend(drawn)
    for tooltip, marks in points.items():
        plot.add_tools(_pointed_at(marks, tooltip, set().union(*(mark.data_source.data for mark in marks)) - {"x"}))


def _columns(line: Line, *, is_log: bool) -> dict[str, Any]:
    """What is kept of a line: single precision, which is half as large."""
    y = np.where(line.y > 0, line.y, np.nan) if is_log else line.y
    columns: dict[str, Any] = {"x": line.x.astype(np.float32), "y": y.astype(np.float32)}
    for number, values in enumerate(line.details.values()):
        for part, column in enumerate(values.reshape(len(values), -1).T):
            columns[f"d{number}_{part}"] = column.astype(np.float32)
    return columns


def _tooltip(line: Line, x_label: str) -> str:
    """What is told of a point, as HTML."""
    told = f"<b>$name</b><br>{_plain(x_label)} @x{{0,0.[000]}}: @y{{%.4g}}"
    has_parts = any(values.ndim > 1 for values in line.details.values())
    rows: list[tuple[str, ...]] = [("", "seen", "part in the action")] if has_parts else []
    for number, (name, values) in enumerate(line.details.items()):
        if values.ndim > 1:
            rows.append((_plain(name), f"@d{number}_0{{%.3g}}", f"@d{number}_1{{%+.3f}}"))
        else:
            rows.append((_plain(name), *[""] * has_parts, f"@d{number}_0{{%.3g}}"))
    cells = ["".join(f'<td style="padding-right:1em">{cell}</td>' for cell in row) for row in rows]
    table = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<div>{told}<table style="font-size:11px;line-height:1.15">{table}</table></div>'


def _pointed_at(drawn: list[Any], tooltip: str, columns: Iterable[str]) -> HoverTool:
    """Tells of what the pointer is on; these columns are formatted as by printf."""
    printf = {f"@{column}": "printf" for column in columns}
    return HoverTool(renderers=drawn, tooltips=tooltip, formatters=printf, visible=False)


def _plain(text: str) -> str:
    """Text in a tooltip, where @ begins the name of a column."""
    return html.escape(text).replace("@", "&#64;").replace("$", "&#36;")


def _logarithmic(plot: Any, panel: Panel) -> None:
    """Limits of at least a decade, and a few plain numbers."""
    values = np.concatenate([line.y for line in panel.lines] or [np.ones(1)])
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    middle = math.sqrt(low) * math.sqrt(high)
    plot.y_range = Range1d(min(low / 1.25, middle / 3.3), max(1.25 * high, 3.3 * middle))
    plot.yaxis.ticker = LogTicker(mantissas=[1, 2, 5] if high < 50 * low else [1], desired_num_ticks=5)


def _heat(plot: Any, panel: Heat, x_label: str) -> None:
    n, most = len(panel.edges) - 1, largest(panel)
    count = len(panel.rows)
    bottom = np.repeat(np.arange(count), n)
    columns = {
        "left": np.tile(panel.edges[:-1], count).astype(np.float32),
        "right": np.tile(panel.edges[1:], count).astype(np.float32),
        "bottom": bottom.astype(np.float32),
        "top": (bottom + 1).astype(np.float32),
        "value": panel.values.reshape(-1).astype(np.float32),
    }
    fill = {"field": "value", "transform": LinearColorMapper(palette=DIVERGING, low=-most, high=most)}
    sides: dict[str, Any] = {side: side for side in ("left", "right", "top", "bottom")}
    cells = plot.add_glyph(ColumnDataSource(columns), glyphs.Quad(**sides, fill_color=fill, line_color=None))
    plot.y_range = Range1d(count, 0)
    plot.yaxis.ticker = [i + 0.5 for i in range(count)]
    plot.yaxis.major_label_overrides = {i + 0.5: name for i, name in enumerate(panel.rows)}
    plot.yaxis.major_label_text_font_size = "8pt"
    plot.ygrid.visible = False
    tooltip = f"<div>{_plain(x_label)} @left{{0,0}}: @value{{%+.3f}}</div>"
    plot.add_tools(_pointed_at([cells], tooltip, ["value"]))
