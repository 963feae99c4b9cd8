"""The page: its bars are the schedule's, a browser draws them, and it needs nothing but itself."""

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from megalemur.config.load import load_run
from megalemur.plan.better import look_for_better
from megalemur.plan.cluster import load_cluster
from megalemur.plan.gantt import MOST_BARS, chart
from megalemur.plan.page import page
from megalemur.plan.terminal import facts
from megalemur.plan.whole import make_plan
from tests.support.browser import dom, screenshot

RUN = Path(__file__).parents[3] / "launch/runs/llama2_70b_pretrain.yaml"
H100 = load_cluster("h100_sxm", RUN)
SMALL = ("data.global_batch_size=32", "parallel.chunks=1")  # 8 stages, 16 micro-batches


def planned(*overrides):
    return make_plan(load_run(RUN, overrides), H100)


def total(bars, *kinds):
    return sum(bar.seconds for bar in bars if bar.kind in kinds)


def test_the_bars_of_a_stage_fill_the_step_without_overlap():
    plan = planned(*SMALL)
    drawn = chart(plan)
    assert len(drawn.panels) == 1 and drawn.left_out == 0
    (bars,) = drawn.panels
    end = drawn.ranges[0][1]
    assert end == pytest.approx(plan.step.seconds - plan.step.breakdown["other"])
    for stage in range(8):
        of_it = sorted((bar for bar in bars if bar.stage == stage), key=lambda bar: bar.start)
        assert of_it[0].start == 0
        for before, after in pairwise(of_it):
            assert after.start == pytest.approx(before.start + before.seconds, abs=1e-7)
        assert of_it[-1].start + of_it[-1].seconds == pytest.approx(end)
        assert Counter(bar.kind for bar in of_it)["forward"] == Counter(bar.kind for bar in of_it)["backward"] == 16
    critical = [bar for bar in bars if bar.stage == plan.step.critical_stage]
    assert total(critical, "bubble") == pytest.approx(plan.step.breakdown["bubble"])
    assert total(critical, "message") == pytest.approx(plan.step.breakdown["pipeline_messages"])


def test_a_step_of_40000_operations_is_shown_at_its_ends():
    plan = planned()
    drawn = chart(plan)
    assert sum(len(panel) for panel in drawn.panels) < 6000
    (first, last), whole = drawn.ranges, chart(plan, most=10**6)
    assert first[0] == 0 and last[1] == whole.ranges[0][1]
    assert drawn.left_out == pytest.approx(last[0] - first[1]) and drawn.left_out > 0
    for panel, (begin, end) in zip(drawn.panels, drawn.ranges, strict=True):
        assert all(begin <= bar.start and bar.start + bar.seconds <= end + 1e-9 for bar in panel)
        for stage in range(8):
            assert total(
                [bar for bar in panel if bar.stage == stage], *set(bar.kind for bar in panel)
            ) == pytest.approx(end - begin)


def test_a_deep_pipeline_is_shown_until_it_is_full():
    plan = planned("parallel.pipeline=16")  # 94 forward operations, then the first backward one
    first, last = chart(plan).panels
    for stage in (0, 15):
        kinds = Counter(bar.kind for bar in first if bar.stage == stage)
        assert min(kinds["forward"], kinds["backward"]) > 2, (stage, kinds)
        assert Counter(bar.kind for bar in last if bar.stage == stage)["backward"] > 50
    # negative control: as few bars as a short pipeline needs end before that
    assert all(bar.kind != "backward" for bar in chart(plan, MOST_BARS).panels[0] if bar.stage == 0)


def test_one_layout_makes_no_heat_map():
    single = [f"parallel.{name}=1" for name in ("tensor", "pipeline", "chunks", "data")]
    plan = planned("model.preset=tiny", *single, "parallel.sequence=false", "data.sequence_length=256")
    better = look_for_better(plan.config, H100)
    assert set(better.by_tensor_and_pipeline()) == {(1, 1)}
    text = page(plan, better)
    assert 'id="layouts"' not in text and 'id="front"' in text and "layouts on 1 GPU looked at" in text


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    plan = planned(*SMALL, "run.name=</title><script>document.title='owned'</script>")
    path = tmp_path_factory.mktemp("page") / "plan.html"
    path.write_text(page(plan, look_for_better(plan.config, H100)), encoding="utf-8")
    return plan, path


@pytest.fixture(scope="module")
def browsed(written, tmp_path_factory):
    text, log = dom(written[1], tmp_path_factory.mktemp("chromium"))
    return text[text.rindex("<body>") :], text, log


def test_a_browser_draws_every_chart(browsed, written):
    body, _, log = browsed
    plan, _ = written
    fills = Counter(re.findall(r"fill: (rgb\(\d+, \d+, \d+\))", body))
    assert fills["rgb(76, 143, 214)"] >= 8 * 16  # forward operations
    assert fills["rgb(87, 167, 115)"] >= 8 * 16  # backward
    for name in ("pipeline", "memory", "time", "layouts", "front"):
        assert re.search(rf'<div id="{name}"', body)
    assert body.count("main-svg") >= 5
    layouts = body[body.index('<div id="layouts"') : body.index('<div id="front"')]
    cells = look_for_better(plan.config, H100).by_tensor_and_pipeline().values()
    assert "<image" in layouts and all(f">{cell.seconds:.3g}</text>" in layouts for cell in cells)
    for name, value in facts(plan):
        assert f"<th>{name}</th><td>{value}</td>" in body
    assert "Uncaught" not in log and "Refused to" not in log


def test_a_name_is_text_and_nothing_is_fetched(browsed, written):
    body, text, _ = browsed
    assert "<title>Plan of &lt;/title&gt;&lt;script&gt;" in text
    assert "document.title='owned'</script>" not in body
    source = written[1].read_text()
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=", source.split("</head>")[1])
    assert "default-src 'none'" in source


@pytest.mark.parametrize("dark", [False, True])
def test_a_picture_of_it_has_marks_of_every_kind(written, tmp_path, dark):
    from PIL import Image

    width, height = 1280, 3000
    picture = Image.open(screenshot(written[1], tmp_path, width=width, height=height, dark=dark)).convert("RGB")
    assert picture.size == (width, height)
    pixels = Counter(picture.getdata())
    for colour, least in (
        ((76, 143, 214), 20_000),  # forward, weights, time
        ((87, 167, 115), 20_000),  # backward, activations
        ((180, 101, 180), 3_000),  # optimizer state
        ((208, 48, 46), 300),  # the card's limit
    ):
        assert pixels[colour] > least, colour
    ground = (23, 25, 28) if dark else (255, 255, 255)
    assert pixels.most_common(1)[0][0] == ground
