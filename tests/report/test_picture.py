import numpy as np

from geolora_pl.report.heat_map import heat_map


def brightness(picture, row, column, rows, columns, cell):
    """Of the corner of a cell, which no number covers."""
    pixels = np.asarray(picture.convert("L"))
    left = picture.width - 16 - columns * cell[0]
    assert picture.height == 56 + rows * cell[1] + 48
    top = 56
    return int(pixels[top + row * cell[1] + 1, left + column * cell[0] + 1])


def test_colours_follow_the_values_and_an_empty_cell_stays_empty():
    cell = (40, 24)
    values = [[0.0, 4.0, 8.0], [None, 99.0, -5.0]]
    picture = heat_map(values, ["a", "b"], ["0", "1", "2"], "t", 0, 8, cell)
    found = [[brightness(picture, i, j, 2, 3, cell) for j in range(3)] for i in range(2)]
    assert found[0][0] > found[0][1] > found[0][2]
    assert found[1] == [255, found[0][2], found[0][0]]  # beyond the ends as at them


def test_values_that_are_all_alike_have_the_colour_in_the_middle():
    """Colours go over the ranks that are there, and at the start of a run all of them are 2."""
    alike, ends = (
        heat_map([[2.0]], [""], [""], "", 2, 2, (40, 24)),
        heat_map([[0, 1]], [""], ["", ""], "", 0, 1, (40, 24)),
    )
    dark, light = (brightness(ends, 0, j, 1, 2, (40, 24)) for j in (1, 0))
    assert dark < brightness(alike, 0, 0, 1, 1, (40, 24)) < light


def test_labels_and_numbers_are_drawn_and_need_room():
    plain = heat_map([[1.0]], [""], [""], "", 0, 2, (30, 20))
    labelled = heat_map([[1.0]], ["a long label"], ["x"], "", 0, 2, (30, 20))
    numbered = heat_map([[1.0]], [""], [""], "", 0, 2, (30, 20), numbers=True)
    assert labelled.width > plain.width + 40
    assert plain.size == numbered.size
    assert np.asarray(plain).tolist() != np.asarray(numbered).tolist()
