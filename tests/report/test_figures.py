import re
from itertools import pairwise

import pytest

from geolora_pl.report import figures

RANKS = {f"m.{i}.{kind}": [(0, 2.0), (10, 2.0 + i), (20, 3.0 + i)] for i in range(3) for kind in ("q", "v")}


def legend(figure):
    """The names of the lines, in a legend or where the lines end."""
    (ax,) = figure.axes
    ends = [text.get_text() for text in ax.texts if text.get_transform() == ax.transAxes]
    return [text.get_text() for box in figure.legends for text in box.get_texts()] or sorted(ends)


def test_curves_have_a_line_each_and_its_points():
    figure = figures.curves({"a": [(0, 1.0), (5, 3.0)], "b": [(2, 4.0)]}, "loss")
    (ax,) = figure.axes
    assert [line.get_xydata().tolist() for line in ax.lines] == [[[0, 1], [5, 3]], [[2, 4]]]
    assert ax.lines[1].get_marker() == "o"  # one point is no line
    assert (legend(figure), ax.get_title(loc="left")) == (["a", "b"], "loss")


def test_long_curves_are_thinned_to_means_and_end_where_they_end():
    thin = figures.thin([(step, float(step % 2)) for step in range(1000)])
    assert len(thin) <= 400
    assert thin[-1][0] == 999
    assert all(0.3 < value < 0.7 for _, value in thin[:-1])


def test_the_mean_rank_of_a_kind_is_that_of_its_layers():
    figure = figures.ranks_over_steps(RANKS, "ranks")
    (ax,) = figure.axes
    assert legend(figure) == ["q", "v"]
    assert [line.get_ydata().tolist() for line in ax.lines] == [[2, 3, 4]] * 2


def test_the_mean_rank_begins_at_the_start_where_the_first_step_is_known_too():
    (ax,) = figures.ranks_over_steps({"m.0.q": [(0, 2.0), (0, 4.0), (1, 5.0)]}, "ranks").axes
    assert ax.lines[0].get_xydata().tolist() == [[0, 2], [1, 5]]


def test_the_rank_map_has_kinds_in_rows_and_depth_in_columns():
    ranks = {"m.0.q": 1, "m.1.q": 5, "m.0.v": 9}
    (ax,) = figures.rank_map(ranks, "map").axes
    assert {text.get_position(): text.get_text() for text in ax.texts} == {(0, 0): "1", (1, 0): "5", (0, 1): "9"}
    darkness = [sum(patch.get_facecolor()[:3]) for patch in ax.patches]
    assert darkness[0] > darkness[1] > darkness[2]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["q", "v"]


def test_bars_of_an_adapter_change_where_its_rank_does():
    (ax,) = figures.ranks_by_adapter({"m.0.q": [(0, 2.0), (10, 2.0), (20, 5.0), (40, 5.0)]}, "ranks").axes
    bars = [patch.get_path().get_extents().intervalx.tolist() for patch in ax.patches]
    assert bars == [[0, 20], [20, 40]]
    assert sum(ax.patches[0].get_facecolor()[:3]) > sum(ax.patches[1].get_facecolor()[:3])


def test_many_adapters_over_many_steps_are_few_shapes_of_bounded_size():
    ranks = {f"m.{i}.q": [(step, float((step + i) % 16)) for step in range(200)] for i in range(400)}
    (ax,) = figures.ranks_by_adapter(ranks, "ranks").axes
    assert len(ax.patches) <= 9
    assert sum(len(patch.get_path().vertices) for patch in ax.patches) <= 5 * 25_000
    ends = [patch.get_path().get_extents().intervalx for patch in ax.patches]
    assert min(start for start, _ in ends) == 0
    assert 199 <= max(end for _, end in ends) < 200
    lightest = max(ax.patches, key=lambda patch: sum(patch.get_facecolor()[:3])).get_path()
    assert lightest.contains_point((0.2, 0))  # rank 0 at the start


@pytest.mark.parametrize("layers", [1, 70])
def test_one_layer_and_many_are_drawn_in_a_page(layers):
    ranks = {f"m.{i}.q": [(0, 4.0)] for i in range(layers)}
    assert figures.ranks_by_adapter(ranks, "").get_figheight() < 12
    assert figures.rank_map(dict.fromkeys(ranks, 4), "").axes


def test_lines_in_one_place_have_all_their_names_apart_and_are_all_seen():
    """Two kinds of layer had the same mean rank, and the page showed one line and two names somewhere else."""
    same, other = [(0, 2.0), (9, 4.0)], [(0, 2.0), (9, 4.01)]
    figure = figures.curves({"query": same, "key": same, "value": other}, "ranks")
    (ax,) = figure.axes
    heights = sorted(text.get_position()[1] for text in ax.texts)
    assert legend(figure) == ["key", "query", "value"]
    assert all(b - a > 0.07 for a, b in pairwise(heights))
    assert heights[-1] <= 1
    assert [text.get_color() for text in ax.texts] == [
        line.get_color() for line in (ax.lines[0], ax.lines[1], ax.lines[2])
    ]
    assert [line.is_dashed() for line in ax.lines] == [False, True, False]


def test_many_lines_and_long_names_have_a_legend():
    many = {f"a rather long name of a run {i}": [(0, 1.0), (5, float(i))] for i in range(3)}
    figure = figures.curves(many, "loss")
    assert not figure.axes[0].texts
    assert legend(figure) == list(many)


def test_what_a_lower_rank_would_lose_ends_above_tau_and_tau_is_a_line():
    figure = figures.tails({"m.0.q": [4.0, 3.0], "m.1.q": []}, 0.3, "lost")
    (ax,) = figure.axes
    first, second, tau = ax.lines
    assert first.get_xydata().tolist() == [[0, 1], [1, pytest.approx(0.6)]]
    assert len(second.get_xdata()) == 0
    assert list(tau.get_ydata()) == [0.3, 0.3]
    assert "tau 0.3" in [text.get_text() for text in ax.texts]
    assert len(figures.tails({"m.0.q": [4.0, 3.0]}, None, "lost").axes[0].lines) == 1


@pytest.mark.parametrize("largest", [0.9, 1.1, 3000.0])
def test_a_logarithmic_scale_has_numbers_and_no_formulas(largest):
    r"""The page wrote $\mathdefault{10^{0}}$ beside the singular values."""
    figure = figures.spectra({"m.0.q": [largest, largest / 2, largest / 4]}, "spectra")
    assert "mathdefault" not in figures.svg(figure, "", "log")


def test_spectra_leave_out_what_a_logarithm_cannot_show():
    (ax,) = figures.spectra({"m.0.q": [1.0, 0.1, 0.0], "m.1.q": []}, "spectra").axes
    assert [len(line.get_xdata()) for line in ax.lines] == [2, 0]


def test_an_svg_stands_in_a_page_takes_its_colours_from_there_and_names_nothing_else():
    figure = figures.curves({"a": [(0, 1.0), (5, 3.0)], "b": [(0, 2.0), (5, 1.0)]}, "<loss>")
    drawn = figures.svg(figure, "what it shows", "one")
    assert drawn.startswith("<svg ")
    assert drawn.endswith("</svg>")
    assert 'role="img" aria-label="what it shows"' in drawn
    assert "://" not in drawn
    assert "&lt;loss&gt;" in drawn
    assert {"--ink", "--faint", "--line", "--s0", "--s1"} <= set(re.findall(r"var\((--[\w-]+)\)", drawn))
    assert not re.findall(r"#[0-9a-f]{6}(?=[;\"])", drawn)
    ids = set(re.findall(r' id="([^"]*)"', drawn))
    others = set(re.findall(r' id="([^"]*)"', figures.svg(figure, "", "two")))
    assert ids
    assert not ids & others


def test_a_legend_has_names_that_begin_with_an_underscore():
    series = {"_loss": [(0, 1.0), (1, 2.0)], "_score": [(0, 2.0), (1, 1.0)]}
    kinds = {"_a.0.q": [(0, 2.0), (1, 3.0)], "_b.0.q": [(0, 2.0), (1, 3.0)]}
    for figure, names in (
        (figures.curves(series, "both"), ["_loss", "_score"]),
        (figures.ranks_over_steps(kinds, "ranks"), ["_a.*.q", "_b.*.q"]),
        (figures.spectra({"_a.0.q": [1.0], "_b.0.q": [1.0]}, "spectra"), ["_a.*.q", "_b.*.q"]),
    ):
        assert legend(figure) == names


@pytest.mark.parametrize("draw", [figures.curves, figures.ranks_over_steps])
def test_the_name_of_a_line_stands_where_the_line_ends(draw):
    """The names stood at the top of the page's picture of ranks, far from their lines, which had fallen to a half."""
    series = {"0.a": [(0, 20.0), (9, 4.0)], "0.b": [(0, 2.0), (9, 11.0)]}
    figure = draw(series, "ranks")
    (ax,) = figure.axes
    figure.draw_without_rendering()
    to_axes = ax.transData + ax.transAxes.inverted()
    ends = sorted(float(to_axes.transform(line.get_xydata()[-1])[1]) for line in ax.lines)
    named = sorted(text.get_position()[1] for text in ax.texts if text.get_transform() == ax.transAxes)
    assert named == pytest.approx(ends, abs=1e-6)


def test_a_run_has_its_name_and_colour_where_others_have_no_points():
    """Of two runs one had logged a metric: its line had no name, and the colour of the other run beside it."""
    both, one = figures.curves({"a": [(0, 1.0), (1, 2.0)], "b": [(0, 3.0)]}, "both"), [(0, 1.0), (1, 2.0)]
    alone = figures.curves({"a": [], "b": one}, "one")
    assert alone.axes[0].lines[0].get_color() == both.axes[0].lines[1].get_color()
    assert legend(alone) == ["b"]
    assert legend(figures.curves({"b": one}, "one run")) == []


def test_a_name_in_any_script_is_drawn_without_a_warning():
    """Two runs with Chinese names were compared: matplotlib warned of its font, though the page has the text itself."""
    series = {"学习率一": [(0, 1.0), (5, 3.0)], "学习率二": [(0, 2.0), (5, 2.5)]}
    drawn = figures.svg(figures.curves(series, "损失"), "", "salt")
    assert all(f">{text}</text>" in drawn for text in (*series, "损失"))
