"""The page in a real browser without a network: picture, table, keyboard, light and dark, speed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hotset.dashboards.page.folder import FolderSource
from hotset.dashboards.page.run import Run
from hotset.policies.types import BlockId, Format, Tier
from tests.browser.conftest import page_server
from tests.dashboards.recorded import (
    SECOND_NS,
    START_NS,
    joined,
    landed,
    span,
    spec_of,
    trace_line,
    write_run,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.browser.conftest import Visit

END_NS = START_NS + 9 * SECOND_NS
MOVED = BlockId(2, 3)
ROW = 1  # layers are 1 to 4

KIND_OF_PIXEL = """([store, row, expert]) => {
  const shown = hotset.grid.sample(store, row, expert).join();
  const swatch = (kind) => {
    const probe = document.createElement("i");
    probe.className = `k${kind}`;
    document.body.append(probe);
    const colour = getComputedStyle(probe).backgroundColor.match(/\\d+/g).join();
    probe.remove();
    return colour;
  };
  return [...Array(11).keys()].filter((kind) => swatch(kind) === shown);
}"""


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A recorded run of four layers of eight experts, with a stall of half a second."""
    folder = write_run(tmp_path / "small")
    moving = {"code": "ok", "source": "worker-0", "format": "bf16", "reason": "demand", "layer": 2,
              "index": 3, "bytes": 4096}  # fmt: skip
    spans = [
        span("hotset.transfer", START_NS + 5 * SECOND_NS, START_NS + 6 * SECOND_NS, **moving),
        span("hotset.wait", END_NS - SECOND_NS, END_NS - SECOND_NS // 2, linked=1),
    ]
    (folder / "trace-n.jsonl").write_bytes(trace_line("worker-1", "hbm", spans))
    source = FolderSource(folder, clock_ns=lambda: END_NS)
    with page_server(source, now_ns=END_NS) as address:
        yield address


def choose(visit: Visit, view: str) -> None:
    visit.page.select_option("#view", label=view)
    visit.until("!hotset.grid.dirty")


def test_a_known_cell_changes_after_a_move(url: str, visit: Callable[..., Visit]) -> None:
    page = visit(url)
    held = {}
    for store in ("worker-0", "worker-1"):
        choose(page, f"{store} (hbm)")
        number = int(page.page.input_value("#view"))
        for second in (4, 7):
            page.at(second * SECOND_NS)
            kind = page.page.evaluate(KIND_OF_PIXEL, [number, ROW, MOVED.index])
            held[store, second] = kind == [1]
    assert held == {
        ("worker-0", 4): True, ("worker-0", 7): False,
        ("worker-1", 4): False, ("worker-1", 7): True,
    }  # fmt: skip
    page.at(5 * SECOND_NS + SECOND_NS // 2)
    flights = page.page.locator("#flights tbody")
    assert flights.locator("tr", has_text="moving").inner_text().split()[:3] == [
        "2.3", "worker-0", "worker-1",
    ]  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", ["the copy nearest to compute", "all stores", "worker-0 (hbm)"])
def test_table_and_canvas_agree(
    url: str, visit: Callable[..., Visit], scheme: str, view: str
) -> None:
    page = visit(url, color_scheme=scheme)
    choose(page, view)
    if view == "all stores":
        page.page.focus("#grid")
        page.page.keyboard.press("PageDown")  # from the pool, which has everything, to a worker
        page.until("!hotset.grid.dirty && hotset.grid.cursor.store === 1")
    kinds = set()
    for row in range(4):
        page.page.select_option("#layer", str(row))
        line = "document.querySelector('#cells tbody tr')"
        page.until(f"!hotset.grid.dirty && {line}.dataset.row === '{row}'")
        store = page.page.evaluate("hotset.grid.cursor.store")
        for expert in range(8):
            line = page.page.locator("#cells tbody tr").nth(expert)
            told = int(line.get_attribute("data-kind") or -1)
            assert page.page.evaluate(KIND_OF_PIXEL, [store, row, expert]) == [told]
            copies = line.locator("td").nth(1).inner_text()
            assert ("cxl-0" in copies) is True
            kinds.add(told)
    assert len(kinds) > 1


def test_everything_works_with_keys_alone(url: str, visit: Callable[..., Visit]) -> None:
    page = visit(url).page
    seen: list[str] = []
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        if seen[-1] == "grid":
            break
    assert {"play", "slider", "speed", "follow", "view"} <= set(seen)
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    assert page.inner_text("#cell").startswith("Layer 2, expert 3: HBM, full precision")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "() => " + "document.getElementById('whysummary').textContent.includes('worker-1')"
    )
    page.keyboard.press("PageDown")
    assert page.input_value("#view") != "best"
    page.focus("#slider")
    before = page.input_value("#slider")
    page.keyboard.press("Home")
    page.wait_for_function("() => Boolean(" + "hotset.state.model.moment.offset_ns === 0" + ")")
    assert (before, page.input_value("#slider")) == ("1000", "0")
    assert not page.is_checked("#follow")
    page.focus("#block")
    page.keyboard.press("Control+A")
    page.keyboard.type("3.1")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "() => " + "document.getElementById('whysummary').textContent.includes('layer 3')"
    )


def test_names_and_roles_are_there_for_screen_readers(
    url: str, visit: Callable[..., Visit]
) -> None:
    page = visit(url).page
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, #grid, [role=region]")]
          .filter((node) => !(node.labels?.length || node.textContent.trim()
            || node.getAttribute("aria-label") || node.getAttribute("aria-labelledby")))
          .map((node) => node.outerHTML)"""
    )
    assert nameless == []
    assert page.locator("h1").count() == 1
    assert page.get_attribute("#cell", "aria-live") == "polite"
    assert page.get_attribute("html", "lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_letters_stand_out_from_their_cells(
    url: str, visit: Callable[..., Visit], scheme: str
) -> None:
    """Contrast by WCAG of letters, text and notes; 4.5 is the bound for normal text."""
    page = visit(url, color_scheme=scheme).page
    grid = page.evaluate("({colours: hotset.grid.colours, letters: hotset.grid.letters})")
    pairs = list(zip(grid["colours"][1:], grid["letters"][1:], strict=True))
    names = ("--ink", "--soft", "--panel", "--paper", "--alarm", "--alarm-paper")
    colour = {
        name: page.evaluate(
            "(n) => getComputedStyle(document.documentElement).getPropertyValue(n).trim()", name
        )
        for name in names
    }
    pairs += [(colour["--panel"], colour["--ink"]), (colour["--panel"], colour["--soft"])]
    pairs += [(colour["--paper"], colour["--ink"]), (colour["--alarm-paper"], colour["--alarm"])]
    assert [pair for pair in pairs if contrast(*pair) < 4.5] == []


def contrast(one: str, other: str) -> float:
    """Ratio of relative luminances (WCAG 2)."""
    lights = sorted(luminance(text) for text in (one, other))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def luminance(text: str) -> float:
    digits = text.removeprefix("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


class Large:
    """100 devices of 61 layers x 256 experts, in which copies come all the time."""

    live = False

    def __init__(self) -> None:
        self.run = Run.of(spec_of(Path("large"), layers=61, experts=256))
        self.run.brain = None  # nothing decides here; the picture is what is measured
        drawn = np.random.default_rng(3)
        for device in range(100):
            self.run.feed(joined(f"worker-{device:02}", Tier.HBM, at_ns=START_NS, slots=4000))
        forms = (Format.BF16, Format.INT8, Format.BF16Z)
        for step in range(60_000):
            block = BlockId(int(drawn.integers(1, 62)), int(drawn.integers(256)))
            store = f"worker-{int(drawn.integers(100)):02}"
            at_ns = START_NS + step * 1_000_000
            self.run.feed(landed(store, block, at_ns=at_ns, form=forms[step % 3]))

    def poll(self) -> bool:
        return False


MEASURE = """(seconds) => new Promise((done) => {
  const { grid, link } = hotset;
  const [frames, moments, start] = [grid.frames, link.moments, performance.now()];
  let ticks = 0;
  let longest = 0;
  let before = start;
  const tick = (now) => {
    ticks += 1;
    longest = Math.max(longest, now - before);
    before = now;
    grid.invalidate();
    const passed = (performance.now() - start) / 1000;
    if (passed < seconds) { requestAnimationFrame(tick); return; }
    done({ ticks: ticks / passed, drawn: (grid.frames - frames) / passed,
      moments: (link.moments - moments) / passed, longest });
  };
  requestAnimationFrame(tick);
})"""


@pytest.mark.slow
def test_a_hundred_devices_stay_above_twenty_frames(visit: Callable[..., Visit]) -> None:
    with page_server(Large(), now_ns=START_NS + 60 * SECOND_NS) as address:
        page = visit(address).page
        page.select_option("#view", "all")
        page.wait_for_function("() => Boolean(" + "!hotset.grid.dirty" + ")")
        page.select_option("#speed", "1")
        page.click("#play")
        best: dict[str, Any] = {"drawn": 0}
        for _ in range(3):  # a machine that others use: the least disturbed of three
            found = page.evaluate(MEASURE, 4)
            print(found)
            best = max(best, found, key=lambda one: one["drawn"])
        assert page.evaluate("hotset.state.model.cells.length") == 100 * 61 * 256
        assert best["drawn"] > 20
        assert best["ticks"] > 20
        assert best["moments"] > 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshots(url: str, visit: Callable[..., Visit], scheme: str, tmp_path: Path) -> None:
    """Pictures to look at; kept where HOTSET_SCREENSHOTS says."""
    folder = Path(os.environ.get("HOTSET_SCREENSHOTS", tmp_path))
    page = visit(url, color_scheme=scheme)
    page.page.focus("#grid")
    page.page.keyboard.press("ArrowDown")
    page.page.keyboard.press("Enter")
    page.until("document.querySelector('#story tbody tr')")
    target = folder / f"page-{scheme}.png"
    page.page.screenshot(path=target)
    assert target.stat().st_size > 10_000
