"""HTML reports: content of the page, escaping, and no external resources."""

import base64
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusion_lab.report.image_grid import save_png
from diffusion_lab.report.page import (
    Animation,
    ConfigSection,
    KeyValueSection,
    LineChart,
    Picture,
    Section,
    Table,
    write_report,
)

NASTY = "<b>\"A\" & 'B'</b> $title ${x}"
VOID = {"meta", "link", "img", "br", "input"}


class Page(HTMLParser):
    """Collects elements and their text, and checks that elements are closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = source
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.stack: list[str] = []
        self.feed(source)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and data.strip():
            self.texts.append((self.stack[-1], data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def page(tmp_path: Path, *sections: Section, title: str = "Run", summary: str = "") -> Page:
    path = write_report(tmp_path / "report.html", title, summary, sections)
    return Page(path.read_text(encoding="utf-8"))


def picture(tmp_path: Path, name: str, width: int = 9, title: str = "Faces") -> Picture:
    path = save_png(torch.rand(3, 6, width) * 2 - 1, tmp_path / name)
    return Picture(title, "Four faces", path)


def chart(tmp_path: Path, curve: LineChart) -> ElementTree.Element:
    """The SVG element of a chart; parsing fails if it is not well-formed."""
    source = page(tmp_path, curve).source
    drawings = [ElementTree.fromstring(s) for s in re.findall(r"<svg.*?</svg>", source, re.S)]
    return next(svg for svg in drawings if svg.get("role") == "img")


def paths(svg: ElementTree.Element) -> list[list[list[tuple[float, float]]]]:
    """The unbroken pieces of every line, each a list of points."""
    found = [p.get("d") for p in svg.iter("path") if "line" in p.get("class").split()]
    return [
        [
            [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", piece)]
            for piece in d.split("M")[1:]
        ]
        for d in found
    ]


def test_images_are_embedded_byte_for_byte(tmp_path: Path) -> None:
    pictures = [picture(tmp_path, "a.png"), picture(tmp_path, "b.png", width=700)]
    images = page(tmp_path, *pictures).all("img")
    assert len(images) == 2
    for section, image in zip(pictures, images, strict=True):
        head, code = image["src"].split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(code, validate=True) == section.path.read_bytes()
        assert image["alt"] == "Faces: Four faces"
    # A small image is enlarged by an integer factor; a large one keeps its size.
    assert [(i["width"], i["height"]) for i in images] == [("36", "24"), ("700", "6")]


def decoded(image: dict[str, str | None]) -> tuple[str, Image.Image]:
    head, code = image["src"].split(",")
    return head, Image.open(io.BytesIO(base64.b64decode(code, validate=True)))


def test_animation_contains_its_frames_and_shows_the_last(tmp_path: Path) -> None:
    frames = [(f"step {k}", Image.new("RGB", (9, 6), (k, 2 * k, 7))) for k in (10, 20, 30)]
    found = page(tmp_path, Animation("Way", "From noise", frames))
    images = found.all("img")
    assert [("hidden" in image, image["data-label"]) for image in images] == [
        (True, "step 10"), (True, "step 20"), (False, "step 30"),
    ]  # fmt: skip
    for image, (_, frame) in zip(images, frames, strict=True):
        head, there = decoded(image)
        assert head == "data:image/png;base64" and there.tobytes() == frame.tobytes()
        assert (image["width"], image["height"], image["class"]) == ("36", "24", "pixels")
    (slider,) = found.all("input")
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "2", "2")
    assert found.text("output") == ["step 30"] and found.text("b") == ["Figure 1"]
    with pytest.raises(ValueError, match="'Way' has no frame"):
        page(tmp_path, Animation("Way", "", []))


def test_large_frame_is_compressed_with_a_small_error(tmp_path: Path) -> None:
    """The frame is a smooth image with little noise, like a photo."""
    ramp = torch.linspace(0, 200, 512)[None, :, None] + 20 * torch.rand(512, 512, 3)
    frame = Image.fromarray(ramp.to(torch.uint8).numpy())
    found = page(tmp_path, Animation("Way", "", [("a", frame)]))
    head, there = decoded(found.all("img")[0])
    assert head == "data:image/webp;base64" and there.size == frame.size
    assert len(found.source) < 150_000  # the PNG file has 480,000 bytes
    one, two = (
        torch.frombuffer(bytearray(f.convert("L").tobytes()), dtype=torch.uint8).float()
        for f in (frame, there)
    )
    assert float((one - two).square().mean().sqrt()) < 3  # of 255; the noise alone has 3.9


def test_page_has_no_external_resources(tmp_path: Path) -> None:
    curve = LineChart("Loss", "", "step", "loss", {"a": ([1, 2], [3, 4])})
    table = Table("Errors", "", ["a"], [[1.0]])
    sections = [
        picture(tmp_path, "a.png"),
        curve,
        table,
        KeyValueSection("F", {"a": "b"}),
        ConfigSection("C", "x"),
    ]
    found = page(tmp_path, *sections)
    assert "http://" not in found.source and "https://" not in found.source
    assert "@import" not in found.source and "url(" not in found.source
    for tag, attributes in found.elements:
        for name in ("src", "srcset", "href", "action", "data", "poster"):
            value = attributes.get(name)
            allowed = ("#", "data:") if name == "href" else ("data:",)
            assert value is None or value.startswith(allowed), (tag, name)
    policy = {m["http-equiv"]: m["content"] for m in found.all("meta") if "http-equiv" in m}
    assert policy["Content-Security-Policy"].startswith("default-src 'none'; img-src data:;")


def test_all_text_is_escaped(tmp_path: Path) -> None:
    shot = picture(tmp_path, "a.png")
    sections = [
        Picture(NASTY, NASTY, shot.path),
        Animation(NASTY, NASTY, [(NASTY, Image.new("RGB", (4, 4)))]),
        Table(NASTY, NASTY, [NASTY], [[NASTY]]),
        LineChart(NASTY, NASTY, NASTY, NASTY, {NASTY: ([1, 2], [3, 4])}),
        KeyValueSection(NASTY, {NASTY: NASTY}),
        ConfigSection(NASTY, NASTY),
    ]
    found = page(tmp_path, *sections, title=NASTY, summary=NASTY)
    assert found.text("title") == [NASTY] * 2  # of the page, and of the line in the chart
    assert found.text("h1") == found.text("p")[:1] == [NASTY]
    assert found.text("td") == found.text("dt") == found.text("dd") == [NASTY]
    assert [text.strip() for text in found.text("pre")] == [NASTY]
    assert NASTY in found.text("button") and NASTY in found.text("span")
    assert found.text("figcaption") == [NASTY] * 3
    assert found.text("output") == [found.all("img")[1]["data-label"]] == [NASTY]
    assert found.all("input")[0]["aria-label"] == NASTY
    assert found.text("text").count(NASTY) == 2
    assert found.all("img")[0]["alt"] == f"{NASTY}: {NASTY}"
    assert not [text for text in found.text("b") if "A" in text]


def test_table_of_contents_links_to_unique_sections(tmp_path: Path) -> None:
    titles = ["Loss & error", "Loss, error", "σ", "Zoom", "Loss & error"]
    found = page(tmp_path, *(KeyValueSection(title, {}) for title in titles))
    anchors = [section["id"] for section in found.all("section")]
    assert anchors == ["loss-error", "loss-error-2", "section", "zoom-2", "loss-error-3"]
    links = [a["href"] for a in found.all("a")]
    assert links == [f"#{a}" for a in anchors] + [f"#{a}" for a in anchors]
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_figures_and_tables_are_numbered(tmp_path: Path) -> None:
    table = Table("T", "", ["a"], [[1]])
    curve = LineChart("C", "", "x", "y", {})
    found = page(
        tmp_path, picture(tmp_path, "a.png"), table, KeyValueSection("F", {}), curve, table
    )
    assert found.text("b") == ["Figure 1", "Table 1", "Figure 2", "Table 2"]


def test_summary_is_split_into_paragraphs_at_empty_lines(tmp_path: Path) -> None:
    found = page(tmp_path, summary="One\nline.\n\n  Two. \n \n")
    assert found.text("p") == ["One\nline.", "Two."]


def test_columns_of_numbers_have_sort_keys(tmp_path: Path) -> None:
    rows = [
        ["a", 3.14159, 7, "27.3 ± 0.1", "5 %", "64 px"],
        ["b", -100.0, 12, "—", "-12.5 %", "128 px"],
        ["c", math.nan, 5, "9 ± 2", "", "7"],
        ["d", math.inf, 1, "1e-3", "0 %", "x"],
    ]
    found = page(tmp_path, Table("T", "", list("uvwxyz"), rows))
    marked = [th.get("class") for th in found.all("th")]
    assert marked == [None, "number", "number", "number", "number", None]
    cells = found.all("td")
    keys = [[cells[6 * i + j].get("data-value") for i in range(4)] for j in range(6)]
    assert keys[0] == keys[5] == [None] * 4
    assert keys[1] == ["3.14159", "-100.0", None, "Infinity"]
    assert keys[2] == ["7.0", "12.0", "5.0", "1.0"]
    assert keys[3] == ["27.3", None, "9.0", "0.001"]
    assert keys[4] == ["5.0", "-12.5", None, "0.0"]
    texts = [text for text in found.text("td") if re.search(r"3\.14|100|nan|inf", text)]
    assert texts == ["3.142", "−100.000", "nan", "inf"]


def test_booleans_are_shown_as_words(tmp_path: Path) -> None:
    found = page(tmp_path, Table("T", "", ["a"], [[True], [False]]))
    assert found.text("td") == ["True", "False"]
    assert found.all("th")[0].get("class") is None


def test_floats_over_many_decades_are_not_rounded_to_zero(tmp_path: Path) -> None:
    found = page(tmp_path, Table("T", "", ["a"], [[1.2e-6], [0.0031], [12.5], [2.0e7]]))
    assert found.text("td") == ["1.2·10⁻⁶", "0.0031", "12.5", "2·10⁷"]


def test_every_table_header_is_a_button(tmp_path: Path) -> None:
    found = page(tmp_path, Table("T", "", ["a", "b"], [[1, 2]]), picture(tmp_path, "a.png"))
    assert [b.get("class") for b in found.all("button")] == [None, None, "picture"]
    (script,) = found.text("script")
    for part in ("tBodies", "dataset.value", "aria-sort", "showModal()", "zoom.close()", "fit()"):
        assert part in script
    assert found.all("dialog") == [{"id": "zoom", "aria-label": "Enlarged picture"}]


def test_page_has_metadata_and_a_dark_mode(tmp_path: Path) -> None:
    found = page(tmp_path, title="Run 7")
    assert found.source.startswith("<!DOCTYPE html>")
    assert {"charset": "utf-8"} in found.all("meta")
    names = {meta.get("name"): meta.get("content") for meta in found.all("meta")}
    assert names["viewport"] == "width=device-width, initial-scale=1"
    (style,) = found.text("style")
    assert "@media (prefers-color-scheme: dark)" in style
    assert "image-rendering: pixelated" in style


def test_configuration_is_collapsed_and_keeps_its_lines(tmp_path: Path) -> None:
    text = "model:\n  width: 64\n\n  # end"
    found = page(tmp_path, ConfigSection("Configuration", text))
    assert "open" not in found.all("details")[0]
    assert found.text("summary") == ["4 lines"]
    assert found.text("pre") == ["\n" + text]  # the first newline is not part of a <pre>


def test_points_of_a_line_are_at_their_positions(tmp_path: Path) -> None:
    svg = chart(tmp_path, LineChart("C", "", "step", "loss", {"a": ([0, 5, 10], [0, 1, 0.5])}))
    # The plot is from x = 64 to 706 and from y = 30 to 290, with 4% margins above and below.
    bottom, top = 290 - 260 * 0.04 / 1.08, 30 + 260 * 0.04 / 1.08
    ((piece,),) = paths(svg)
    assert [p for point in piece for p in point] == pytest.approx(
        [64, bottom, 385, top, 706, (top + bottom) / 2], abs=0.06
    )
    assert len(list(svg.iter("circle"))) == 3
    texts = [text.text for text in svg.iter("text")]
    assert texts[:6] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert texts[6:] == ["0", "2", "4", "6", "8", "10", "loss", "step"]


def test_logarithmic_axes_space_decades_evenly(tmp_path: Path) -> None:
    data = {"a": ([1e-3, 1e-1, 10], [1, 1e3, 1e6])}
    svg = chart(tmp_path, LineChart("C", "", "t", "loss", data, log_x=True, log_y=True))
    ((piece,),) = paths(svg)
    (x0, y0), (x1, y1), (x2, y2) = piece
    assert (x0, x1, x2) == pytest.approx((64, 385, 706), abs=0.06)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.06) and y0 > y1 > y2
    texts = [text.text for text in svg.iter("text")]
    assert texts[:7] == ["10⁰", "10¹", "10²", "10³", "10⁴", "10⁵", "10⁶"]
    assert texts[7:12] == ["0.001", "0.01", "0.1", "1", "10"]


def test_undrawable_points_leave_a_gap_and_are_counted(tmp_path: Path) -> None:
    ys = [1.0, 2.0, math.nan, 3.0, -1.0, 4.0, 5.0]
    curve = LineChart("C", "", "x", "y", {"a": (range(7), ys)}, log_y=True)
    svg = chart(tmp_path, curve)
    ((first, lone, last),) = paths(svg)
    assert (len(first), len(lone), len(last)) == (2, 1, 2)
    # A point between two gaps has no line; a stroke of length zero shows it as a dot.
    assert re.search(r"M[\d. ]+h0M[\d. ]+L[\d. ]+$", [p.get("d") for p in svg.iter("path")][-1])
    assert page(tmp_path, curve).text("small") == ["(2 of 7 points cannot be drawn)"]
    linear = LineChart("C", "", "x", "y", {"a": (range(7), ys)})
    assert page(tmp_path, linear).text("small") == ["(1 of 7 points cannot be drawn)"]


def test_dense_curve_is_decimated_but_keeps_its_extrema(tmp_path: Path) -> None:
    ys = [math.sin(i / 50) for i in range(20_000)]
    ys[12_345], ys[4_321] = 9.0, -9.0
    ((piece,),) = paths(chart(tmp_path, LineChart("C", "", "x", "y", {"a": (range(20_000), ys)})))
    assert 1000 < len(piece) <= 1501
    x, y = min(piece, key=lambda p: p[1])
    assert (x, y) == pytest.approx((64 + 642 * 12_345 / 19_999, 30 + 260 * 0.04 / 1.08), abs=0.06)
    x, y = max(piece, key=lambda p: p[1])
    assert (x, y) == pytest.approx((64 + 642 * 4_321 / 19_999, 290 - 260 * 0.04 / 1.08), abs=0.06)
    assert [x for x, _ in piece] == sorted(x for x, _ in piece)


def test_dense_curve_keeps_its_gaps(tmp_path: Path) -> None:
    ys = [1.0 + i % 2 for i in range(4_000)]
    ys[2_000:2_100] = [math.nan] * 100
    ((before, after),) = paths(
        chart(tmp_path, LineChart("C", "", "x", "y", {"a": (range(4_000), ys)}))
    )
    ends = [64 + 642 * i / 3_999 for i in (2_000, 2_100)]
    assert (before[-1][0], after[0][0]) == pytest.approx(ends, abs=1.1)


def test_every_series_has_its_own_line_style(tmp_path: Path) -> None:
    data = {name: ([0, 1], [k, k + 1]) for k, name in enumerate("abc")}
    curve = LineChart("C", "", "x", "y", data)
    svg = chart(tmp_path, curve)
    assert svg.get("aria-label") == "C: y over x"
    styles = [p.get("class") for p in svg.iter("path") if p.find("title") is not None]
    assert styles == ["line s0", "line s1", "line s2"]
    assert page(tmp_path, curve).text("span") == ["a", "b", "c"]


def test_a_series_of_dots_has_no_line(tmp_path: Path) -> None:
    data = {"line": ([0, 1], [0, 1]), "dots": ([0, 0.5, 1], [0, 0.5, 1])}
    svg = chart(tmp_path, LineChart("C", "", "x", "y", data, dots=["dots"]))
    assert [p.get("class") for p in svg.iter("path") if p.find("title") is not None] == ["line s0"]
    assert [c.get("class") for c in svg.iter("circle")] == ["dot s0"] * 2 + ["dot s1"] * 3


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("value", [1.0, 250.0, 3e-9])
def test_constant_curve_is_in_the_middle(tmp_path: Path, value: float, log: bool) -> None:
    curve = LineChart("C", "", "x", "y", {"a": ([1, 2], [value, value])}, log_y=log)
    ((piece,),) = paths(chart(tmp_path, curve))
    assert [y for _, y in piece] == [160.0, 160.0]


@pytest.mark.parametrize("data", [{}, {"a": ([], [])}, {"a": ([1, 2], [math.nan] * 2)}])
def test_chart_without_points_has_a_message(tmp_path: Path, data: dict) -> None:
    svg = chart(tmp_path, LineChart("C", "", "x", "y", data))
    assert [text.text for text in svg.iter("text")] == ["There is no point to draw."]


def test_tick_labels_group_digits_and_use_powers_of_ten(tmp_path: Path) -> None:
    svg = chart(tmp_path, LineChart("C", "", "x", "y", {"a": ([0, 200_000], [-2e-5, 2e-5])}))
    texts = [text.text for text in svg.iter("text")]
    assert [t.replace("\u202f", " ") for t in texts[5:10]] == [
        "0",
        "50 000",
        "100 000",
        "150 000",
        "200 000",
    ]
    assert texts[:5] == ["−2·10⁻⁵", "−10⁻⁵", "0", "10⁻⁵", "2·10⁻⁵"]


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        (Table("T", "", ["a", "b"], [[1, 2], [1]]), ValueError, "row 1 of the table 'T' has 1"),
        (LineChart("C", "", "x", "y", {"a": ([1], [1, 2])}), ValueError, "'a' has 1 x for 2 y"),
        (Picture("P", "", Path(__file__)), ValueError, "not a PNG"),
        (Picture("P", "", Path("missing.png")), FileNotFoundError, "missing.png"),
    ],
)
def test_invalid_section_is_an_error_and_keeps_the_old_page(
    tmp_path: Path, section: Section, error: type[Exception], message: str
) -> None:
    path = write_report(tmp_path / "report.html", "Old", "", [])
    old = path.read_bytes()
    with pytest.raises(error, match=message):
        write_report(path, "New", "", [section])
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    write_report(path, "New", "", [])
    assert path.read_bytes() != old


def test_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    sections = [picture(tmp_path, "a.png"), Table("T", "", ["a"], [[1.5]])]
    pages = [write_report(tmp_path / n, "Run", "", sections).read_bytes() for n in ("a", "b")]
    assert pages[0] == pages[1]


def test_many_single_dots_have_labels_that_do_not_overlap(tmp_path: Path) -> None:
    data = {f"method {k}": ([100.0], [1 + k / 1000]) for k in range(9)} | {"far": ([1.0], [9.0])}
    curve = LineChart("C", "", "cost", "distance", data, log_x=True)
    svg = chart(tmp_path, curve)
    heights = {t.text: float(t.get("y")) for t in svg.iter("text") if t.text in data}
    assert heights.keys() == data.keys() and len(list(svg.iter("circle"))) == 10
    crowd = sorted(y for name, y in heights.items() if name != "far")
    assert min(b - a for a, b in pairwise(crowd)) >= 11 and crowd[0] > 0
    assert page(tmp_path, curve).source.count('class="legend"') == 0
    few = LineChart("C", "", "x", "y", dict(list(data.items())[:3]))
    assert page(tmp_path, few).source.count('class="legend"') == 1
