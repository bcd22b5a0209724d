"""Charts as PNG images: positions of lines and dots, and characters without a glyph."""

import numpy as np
import pytest
from PIL import ImageColor

from diffusion_lab.report.chart import LineChart
from diffusion_lab.report.chart_png import COLOURS, _ascii, chart_png


def colour(series: int) -> tuple[int, ...]:
    return ImageColor.getrgb(COLOURS[series])


def test_chart_draws_lines_and_dots_at_their_values() -> None:
    """The line rises from the lower left to the upper right; the dot is in the center."""
    xs = [k / 30 for k in range(31)]
    line = LineChart("A", "", "t", "", {"σ": (xs, xs), "ends": ([0.5], [0.5])})
    picture = chart_png([line])
    assert picture.size == (480, 330)
    pixels = np.asarray(picture).astype(int)
    blue = (np.abs(pixels - colour(0)).sum(2) < 60)[72:283]  # the plot area
    bottom, top = 280 - 206 * 0.04 / 1.08, 74 + 206 * 0.04 / 1.08
    for share in (0.1, 0.3, 0.8):
        column = round(64 + share * 402)
        rows = np.nonzero(blue[:, column])[0] + 72
        assert rows.mean() == pytest.approx(bottom - share * (bottom - top), abs=2)
    orange = np.argwhere((np.abs(pixels - colour(1)).sum(2) < 60)[72:283])
    assert orange.mean(0) == pytest.approx([177 - 72, 265], abs=2)
    assert chart_png([line, line]).size == (960, 330)


def test_chart_without_points_is_drawn_and_no_chart_is_an_error() -> None:
    empty = LineChart("A", "", "t", "", {"a": ([1.0], [float("nan")])}, log_y=True)
    assert np.asarray(chart_png([empty])).min() < 100
    with pytest.raises(ValueError, match="no chart"):
        chart_png([])


def test_characters_missing_in_the_font_are_replaced_by_ascii() -> None:
    assert _ascii("−1.5·10⁻³ σ_t²") == "-1.5·10^-3 sigma_t^2"
