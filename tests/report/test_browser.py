"""Reports in a headless browser without a network: sorting, zoom, animation, no errors."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, browser
from conftest import Command
from PIL import Image

from diffusion_lab.report.page import Animation, LineChart, Picture, Table, write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
FIRST = "[...document.querySelectorAll('tbody tr')].map((row) => row.cells[{}].textContent)"
SEEN = "[...document.querySelectorAll('.film img')].map((image) => !image.hidden)"


@pytest.fixture
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found
        assert found.problems == []


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A page with one section of each interactive kind."""
    shot = tmp_path / "a.png"
    Image.new("RGB", (60, 20), (200, 0, 0)).save(shot)
    frames = [(f"step {k}", Image.new("RGB", (30, 30), (0, k, 0))) for k in range(4)]
    rows = [["b", 2.0, "9 ± 1"], ["a", 10.0, "—"], ["c", -1.0, "27.5 ± 0.1"]]
    sections = [
        Picture("Picture", "", shot),
        Animation("Film", "", frames),
        Table("Table", "", ["name", "number", "with error"], rows),
        LineChart("Curve", "", "x", "y", {"a": ([1, 2], [3, 4])}),
    ]
    return write_report(tmp_path / "report.html", "Page", "", sections)


def test_tables_sort_on_click(chromium: Browser, page: Path) -> None:
    chromium.open(page)
    for column, orders in enumerate(
        (
            [["a", "b", "c"], ["c", "b", "a"]],
            [["−1", "2", "10"], ["10", "2", "−1"]],
            [
                ["9 ± 1", "27.5 ± 0.1", "—"],
                ["27.5 ± 0.1", "9 ± 1", "—"],
            ],  # missing values stay last
        )
    ):
        for order, direction in zip(orders, ("ascending", "descending"), strict=True):
            chromium.click("th button", column)
            assert chromium.evaluate(FIRST.format(column)) == order
            said = f"document.querySelectorAll('th')[{column}].getAttribute('aria-sort')"
            assert chromium.evaluate(said) == direction
    assert chromium.evaluate("document.querySelectorAll('[aria-sort]').length") == 1


def test_images_zoom_by_an_integer_factor(chromium: Browser, page: Path) -> None:
    chromium.open(page, width=1280, height=900)
    opened = "document.getElementById('zoom').open"
    assert chromium.evaluate(opened) is False
    chromium.click(".picture")
    assert chromium.evaluate(opened) is True
    # The factor is 20 for a width of 60 in 1280 - 32 pixels; the height would allow 43.
    assert chromium.evaluate("document.querySelector('#zoom img').offsetWidth") == 20 * 60
    chromium.click("#zoom")
    assert chromium.evaluate(opened) is False
    chromium.click(".picture")
    for kind in ("keyDown", "keyUp"):
        chromium.call("Input.dispatchKeyEvent", type=kind, key="Escape", windowsVirtualKeyCode=27)
    assert chromium.evaluate(opened) is False


def test_wide_image_is_enlarged_beyond_the_width_of_a_phone(chromium: Browser, page: Path) -> None:
    chromium.open(page, width=390, height=844)
    chromium.click(".picture")
    # The image is three times as high as it would be at the width of 390 - 32.
    assert chromium.evaluate("document.querySelector('#zoom img').offsetWidth") == 3 * 358
    zoom = "document.getElementById('zoom')"
    assert chromium.evaluate(f"{zoom}.scrollLeft = 9999; {zoom}.scrollLeft") == 3 * 358 - 390
    assert chromium.evaluate(f"{zoom}.scrollLeft = 0; {zoom}.firstChild.offsetLeft") == 0


def test_animation_plays_and_follows_its_slider(chromium: Browser, page: Path) -> None:
    chromium.open(page)
    assert chromium.evaluate(SEEN) == [False, False, False, True]
    chromium.evaluate(
        "(() => { const slider = document.querySelector('.player input'); slider.value = 1;"
        "slider.dispatchEvent(new Event('input')); })()"
    )
    assert chromium.evaluate(SEEN) == [False, True, False, False]
    assert chromium.evaluate("document.querySelector('output').textContent") == "step 1"
    chromium.click(".film .picture")
    shown = "document.querySelector('#zoom img').dataset.label"
    assert chromium.evaluate(shown) == "step 1"
    chromium.click("#zoom")
    chromium.evaluate(
        "window.seen = []; new MutationObserver(() => window.seen.push(document.querySelector("
        "'output').textContent)).observe(document.querySelector('output'), {childList: true})"
    )
    chromium.click(".player button")
    button = "document.querySelector('.player button').textContent"
    assert chromium.evaluate(button) == "Stop"
    ended = f"new Promise((done) => setInterval(() => {button} === 'Play' && done(true), 20))"
    assert chromium.evaluate(ended)
    assert chromium.evaluate("window.seen") == ["step 2", "step 3"]


def test_requests_of_a_page_are_blocked_and_detected(page: Path) -> None:
    """The other tests rely on this: a request that the policy blocks is reported as a problem."""
    with browser() as found:
        found.open(page)
        found.evaluate("new Image().src = 'https://example.com/a.png'; null")
        found.evaluate("new Promise((done) => setTimeout(done, 200))")
        assert any("Content Security Policy" in text for text in found.problems)


def test_reports_of_all_commands_render_without_errors(
    chromium: Browser, tiny: Command, lab: Command
) -> None:
    options = ["trainer.val_check_interval=2", "samples.every_n_steps=2", "trainer.max_steps=4"]
    assert tiny("-m", "seed=0,1", *options, "hydra.sweep.dir=s").code == 0
    small = ["num_images=2", "num_samples=2", "trainer.accelerator=cpu", "run=s/0"]
    for task in ("denoise", "generate", "inpaint_box"):
        more = [] if task != "generate" else ["num_samples=4"]
        own = [text for text in small if task != "generate" or not text.startswith("num_")]
        options = [f"task={task}", "sampler.steps=3", f"hydra.run.dir={task}", *own, *more]
        assert lab("eval", *options).code == 0
    for directory in ("s", "s/0", "denoise", "generate", "inpaint_box"):
        for width, dark in product((1280, 390), (False, True)):
            chromium.open(Path(directory) / "report.html", width=width, dark=dark)
            assert chromium.evaluate("document.querySelectorAll('section').length") >= 3
            # Nothing is wider than the window, and every image is loaded.
            assert chromium.evaluate("document.documentElement.scrollWidth") <= width
            broken = "[...document.images].filter((image) => !image.naturalWidth).length"
            assert chromium.evaluate(broken) == 0
