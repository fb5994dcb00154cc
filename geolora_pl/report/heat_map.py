"""Heat maps as pixels, for loggers: Pillow draws one in milliseconds, and it is there anyway."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
_RAMP: tuple[Colour, ...] = ((239, 243, 250), (107, 157, 208), (11, 55, 112))  # from low to high, one hue
_INK, _PAPER = (33, 37, 41), (255, 255, 255)
_MARGIN, _LINE, _FONT = 16, 32, 24


def heat_map(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    low: float,
    high: float,
    cell: tuple[int, int],
    numbers: bool = False,
) -> Image.Image:
    """Draw a table of values as colours.

    Args:
        values: The values by row and column; ``None`` leaves a cell empty.
        rows: A label for every row; one that is empty is left out.
        columns: A label for every column; one that is empty is left out.
        title: A line above it.
        low: The value of the lightest colour.
        high: The value of the darkest colour; if it is not above ``low``, all cells have the colour in the middle.
        cell: Width and height of a cell in pixels.
        numbers: Whether cells also show their values.

    Example:
        >>> heat_map([[4.0, None]], ["fc"], ["0", "1"], "rank", 0, 8, cell=(20, 16)).mode
        'RGB'
    """
    font = ImageFont.load_default(size=_FONT)
    width, height = cell
    left = _MARGIN + max((round(font.getlength(row)) for row in rows), default=0) + 12
    top = _MARGIN + _LINE + 8
    ends = [left + (j + 0.5) * width + font.getlength(column) / 2 for j, column in enumerate(columns)]
    right = round(max(left + width * len(columns), _MARGIN + font.getlength(title), *ends))
    picture = Image.new("RGB", (right + _MARGIN, top + height * len(rows) + _LINE + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, _MARGIN), title, _INK, font)
    parts = [[None if v is None else _part(v, low, high) for v in row] for row in values]
    pixels = Image.new("RGB", (len(columns), len(rows)))
    pixels.putdata([_PAPER if part is None else _colour(part) for of_row in parts for part in of_row])
    size = (width * len(columns), height * len(rows))
    picture.paste(pixels.resize(size, Image.Resampling.NEAREST), (left, top))
    if width > 16:  # smaller cells touch
        for x in range(left + width - 1, left + size[0], width):
            draw.line((x, top, x, top + size[1]), _PAPER, 2)
    if height > 16:
        for y in range(top + height - 1, top + size[1], height):
            draw.line((left, y, left + size[0], y), _PAPER, 2)
    for i, row in enumerate(rows):
        draw.text((left - 12, top + (i + 0.5) * height), row, _INK, font, anchor="rm")
        for j, part in enumerate(parts[i] if numbers else ()):
            if part is not None:
                place = (left + (j + 0.5) * width, top + (i + 0.5) * height)
                draw.text(place, f"{values[i][j]:g}", _PAPER if part > 0.5 else _INK, font, anchor="mm")
    for j, column in enumerate(columns):
        draw.text((left + (j + 0.5) * width, top + height * len(rows) + 4), column, _INK, font, anchor="ma")
    return picture


def _part(value: float, low: float, high: float) -> float:
    return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.5


def _colour(part: float) -> Colour:
    position = part * (len(_RAMP) - 1)
    i = min(int(position), len(_RAMP) - 2)
    red, green, blue = (round(a + (position - i) * (b - a)) for a, b in zip(_RAMP[i], _RAMP[i + 1], strict=True))
    return red, green, blue
