"""A plan as one page that needs nothing else: charts by plotly, whose script it carries. Imported for --html alone."""

import html
from collections.abc import Iterable
from itertools import chain
from string import Template

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from megalemur.plan.better import Better
from megalemur.plan.gantt import Kind, chart
from megalemur.plan.terminal import (
    MEMORY_KINDS,
    breakdown,
    facts,
    layout_text,
    nothing_found,
    part_bytes,
    seconds_text,
)
from megalemur.plan.whole import Plan

_GB = 1e9
_COLOURS: dict[Kind, str] = {
    "forward": "#4c8fd6",
    "backward": "#57a773",
    "message": "#e0a030",
    "bubble": "rgba(128,128,128,0.3)",
    "gradients": "#b465b4",
    "optimizer": "#d0605e",
}
_NAMES: dict[Kind, str] = {
    "forward": "forward",
    "backward": "backward",
    "message": "messages",
    "bubble": "bubble",
    "gradients": "gradients, parameters",
    "optimizer": "optimizer",
}
_MEMORY_COLOURS = ("#4c8fd6", "#58b5c4", "#b465b4", "#57a773", "#e0a030", "#a0a0a0")
_LIMIT = "#d0302e"
_ONE_COLOUR = "#4c8fd6"

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>Plan of $name</title>
<style>
:root { color-scheme: light dark; --ink: #222; --soft: #666; --ground: #fff; --line: #e4e4e4; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --soft: #999; --ground: #17191c; --line: #34383d; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
       max-width: 1200px; margin: 2em auto; padding: 0 1.5em; }
h1 { font-size: 1.5em; margin-bottom: .2em; } h2 { font-size: 1.1em; margin: 2em 0 .2em; }
p { color: var(--soft); margin: .2em 0; }
table { border-collapse: collapse; margin: 1em 0; }
th { text-align: left; font-weight: normal; color: var(--soft); padding: .15em 1.5em .15em 0; white-space: nowrap;
     vertical-align: top; }
code { font-size: .9em; overflow-wrap: anywhere; }
.js-plotly-plot text { fill: var(--ink) !important; }
.js-plotly-plot .gridlayer path, .js-plotly-plot .zerolinelayer path { stroke: var(--line) !important; }
.js-plotly-plot .hoverlayer text { fill: #222 !important; }
.js-plotly-plot .heatmaplayer text, .js-plotly-plot .hm text { fill: #111 !important; }
</style>
<script>$script</script>
</head>
<body>
<h1>Plan of $name</h1>
<p>$verdict</p>
$body
</body>
</html>
""")


def page(plan: Plan, better: Better) -> str:
    """The page's HTML, about 5 MB, nearly all of it plotly's script.

    Args:
        plan: the plan.
        better: the search beside it.
    """
    limit, fullest = plan.cluster.memory_bytes / _GB, plan.fullest.total / _GB
    verdict = f"{'Fits' if plan.fits else 'Does not fit'}: {fullest:.1f} GB of {limit:.1f} GB on the fullest stage."
    body = [_facts(plan), *_gantt(plan), *_memory(plan), *_time(plan), *_search(plan, better)]
    name = html.escape(plan.config.run.name)
    return _PAGE.substitute(name=name, verdict=verdict, script=get_plotlyjs(), body="\n".join(body))


def _section(title: str, says: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n<p>{html.escape(says)}</p>"


def _facts(plan: Plan) -> str:
    rows = "\n".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in facts(plan)
    )
    return f'<table id="facts">\n{rows}\n</table>'


def _drawn(figure: go.Figure, name: str, height: int) -> str:
    """A figure on a transparent ground; texts and grid take the page's colours."""
    figure.update_layout(
        height=height,
        margin={"l": 70, "r": 30, "t": 40, "b": 50},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#999"},
    )
    unused = ["lasso2d", "select2d", "zoomIn2d", "zoomOut2d", "autoScale2d"]
    config = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": unused}
    return figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)


def _stage_axis(stages: int) -> dict[str, object]:
    """Stage 0 on top; every label as long as they stand apart."""
    step = 1 if stages <= 32 else -(-stages // 16)
    return {"tickmode": "array", "tickvals": list(range(0, stages, step)), "range": [stages - 0.5, -0.5]}


def _gantt(plan: Plan) -> Iterable[str]:
    drawn = chart(plan)
    figure = make_subplots(cols=len(drawn.panels), shared_yaxes=True, horizontal_spacing=0.02)
    shown = {bar.kind for bar in chain.from_iterable(drawn.panels)}
    for kind in (kind for kind in _COLOURS if kind in shown):
        named = False
        for column, panel in enumerate(drawn.panels, start=1):
            bars = [bar for bar in panel if bar.kind == kind]
            if not bars:
                continue
            figure.add_trace(
                go.Bar(
                    orientation="h",
                    name=_NAMES[kind],
                    legendgroup=kind,
                    showlegend=not named,
                    marker={"color": _COLOURS[kind], "line": {"width": 0.5, "color": "rgba(255,255,255,0.6)"}},
                    y=[bar.stage for bar in bars],
                    base=[bar.start for bar in bars],
                    x=[bar.seconds for bar in bars],
                    hovertext=[f"stage {bar.stage}: {bar.says}, {seconds_text(bar.seconds)}" for bar in bars],
                    hoverinfo="text",
                ),
                row=1,
                col=column,
            )
            named = True
    for column, edges in enumerate(drawn.ranges, start=1):
        figure.update_xaxes(range=list(edges), title="seconds", zeroline=False, row=1, col=column)
    figure.update_yaxes(_stage_axis(plan.job.pipeline))
    figure.update_yaxes(title="stage", col=1)
    figure.update_layout(barmode="overlay", bargap=0.25)
    says = f"One step of {plan.job.micro_batches:,} micro-batches. Messages within layers are part of their operations."
    if drawn.left_out > 0:
        says += f" Shown are its beginning and its end; the {seconds_text(drawn.left_out)} between repeat the pattern."
    yield _section("Pipeline", says)
    yield _drawn(figure, "pipeline", 140 + 26 * min(plan.job.pipeline, 32))


def _memory(plan: Plan) -> Iterable[str]:
    figure = go.Figure()
    stages = [stage.stage for stage in plan.memory]
    for (name, fields, _), colour in zip(MEMORY_KINDS, _MEMORY_COLOURS, strict=True):
        sizes = [part_bytes(stage, fields) / _GB for stage in plan.memory]
        hover = [f"stage {stage}: {size:.1f} GB of {name}" for stage, size in zip(stages, sizes, strict=True)]
        figure.add_trace(go.Bar(name=name, x=stages, y=sizes, marker_color=colour, hovertext=hover, hoverinfo="text"))
    limit = plan.cluster.memory_bytes / _GB
    figure.add_hline(y=limit, line={"color": _LIMIT, "width": 2, "dash": "dash"})
    figure.add_annotation(
        text=f"{limit:.1f} GB: {html.escape(plan.cluster.gpu)}",
        x=1, xref="paper", y=limit, yanchor="bottom", xanchor="right", showarrow=False,
    )  # fmt: skip
    top = 1.12 * max(limit, plan.fullest.total / _GB)
    figure.update_layout(barmode="stack", bargap=0.3)
    figure.update_xaxes(title="stage", tickmode="linear", dtick=1 if len(stages) <= 32 else 4)
    figure.update_yaxes(title="GB on a rank", range=[0, top])
    yield _section("Memory", "Each stage at its fullest moment.")
    yield _drawn(figure, "memory", 420)


def _time(plan: Plan) -> Iterable[str]:
    names, seconds = zip(*breakdown(plan), strict=True)
    labels = [f"{seconds_text(value)} ({value / plan.step.seconds:.1%})" for value in seconds]
    figure = go.Figure(
        go.Bar(orientation="h", y=names, x=seconds, text=labels, textposition="outside", marker_color=_ONE_COLOUR)
    )
    figure.update_traces(hoverinfo="skip", cliponaxis=False)
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title="seconds", range=[0, 1.2 * max(seconds)])
    yield _section("Time", f"Where the {seconds_text(plan.step.seconds)} of a step go, on the stage with most to do.")
    yield _drawn(figure, "time", 120 + 30 * len(names))


def _search(plan: Plan, better: Better) -> Iterable[str]:
    best = better.best
    cards = f"{better.gpus:,} GPU{'s' * (better.gpus != 1)}"
    found = f"{better.found.tried:,} layouts on {cards} looked at, {len(better.found.candidates):,} fit."
    if best is None:
        yield _section("Layouts", f"{found[:-1]}: {nothing_found(better)}.")
        return
    if len(better.by_tensor_and_pipeline()) > 1:
        yield _section("Layouts", f"{found} The fastest step of each tensor- and pipeline-parallel size, in seconds.")
        yield _drawn(_heat_map(better), "layouts", 420)
    else:
        yield _section("Layouts", found)
    yield _section("Time and memory", "Nothing else is both faster and smaller than a layout on the line.")
    yield _drawn(_front(plan, better), "front", 420)


def _heat_map(better: Better) -> go.Figure:
    cells = better.by_tensor_and_pipeline()
    tensors = sorted({tensor for tensor, _ in cells})
    pipelines = sorted({pipeline for _, pipeline in cells})
    rows = [[cells.get((tensor, pipeline)) for pipeline in pipelines] for tensor in tensors]
    figure = go.Figure(
        go.Heatmap(
            x=[f"PP {pipeline}" for pipeline in pipelines],
            y=[f"TP {tensor}" for tensor in tensors],
            z=[[None if cell is None else cell.seconds for cell in row] for row in rows],
            text=[["" if cell is None else f"{cell.seconds:.3g}" for cell in row] for row in rows],
            texttemplate="%{text}",
            hovertext=[["does not fit" if cell is None else layout_text(cell.job) for cell in row] for row in rows],
            hoverinfo="text",
            hoverongaps=False,
            xgap=2,
            ygap=2,
            # from light to lighter: dark texts stand on every cell
            colorscale=[[0, "#57a773"], [0.5, "#e8dfa0"], [1, "#e8a080"]],
            colorbar={"title": "s", "thickness": 14},
        )
    )
    figure.update_xaxes(showgrid=False, side="bottom")
    figure.update_yaxes(showgrid=False)
    return figure


def _front(plan: Plan, better: Better) -> go.Figure:
    front = better.front
    on_it = {id(candidate) for candidate in front}
    others = [candidate for candidate in better.found.candidates if id(candidate) not in on_it][:1500]
    figure = go.Figure()
    for name, candidates, mode, colour in (
        ("layouts that fit", others, "markers", "#b8b8b8"),
        ("Pareto front", front, "lines+markers", _ONE_COLOUR),
    ):
        figure.add_trace(
            go.Scatter(
                name=name,
                mode=mode,
                x=[candidate.seconds for candidate in candidates],
                y=[candidate.peak_bytes / _GB for candidate in candidates],
                hovertext=[layout_text(candidate.job) for candidate in candidates],
                hoverinfo="text+x+y",
                marker={"color": colour, "size": 5 if mode == "markers" else 8},
            )
        )
    if better.gpus == plan.job.world_size:
        now = {"x": [plan.step.seconds], "y": [plan.fullest.total / _GB]}
        marker = {"color": _LIMIT, "size": 12, "symbol": "diamond"}
        figure.add_trace(go.Scatter(name="the run file", mode="markers", marker=marker, **now))
    figure.update_xaxes(title="seconds a step", type="log")
    figure.update_yaxes(title="GB on the fullest stage", rangemode="tozero")
    return figure
