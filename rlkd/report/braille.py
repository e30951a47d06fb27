"""A canvas of braille dots: 2 × 4 in one character. (plotext's interface is another one in every major version.)"""

import math

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # Unicode U+2800, by row and column


class Canvas:
    """`width` × `height` characters; dots are addressed from the bottom left, as fractions 0 … 1 of the canvas."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._dots = [[0] * width for _ in range(height)]
        self._marks: dict[tuple[int, int], str] = {}  # characters over the dots, by row and column

    def line(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """Dots from one point to the other."""
        far = max(abs(x1 - x0) * self.width * 2, abs(y1 - y0) * self.height * 4)
        steps = max(1, math.ceil(far))
        for i in range(steps + 1):
            self._dot(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps)

    def _dot(self, x: float, y: float) -> None:
        column, row = self._place(x, self.width * 2), self.height * 4 - 1 - self._place(y, self.height * 4)
        self._dots[row // 4][column // 2] |= DOTS[row % 4][column % 2]

    def mark(self, x: float, y: float, low: float, high: float) -> None:
        """A point with its interval."""
        column = self._place(x, self.width)
        top, bottom = (self.height - 1 - self._place(v, self.height) for v in (high, low))
        for row in range(top, bottom + 1):
            self._marks.setdefault((row, column), "│")
        self._marks[self.height - 1 - self._place(y, self.height), column] = "●"

    def rows(self) -> list[str]:
        """The canvas, top row first."""
        return [
            "".join(self._marks.get((r, c)) or (chr(0x2800 + d) if d else " ") for c, d in enumerate(row))
            for r, row in enumerate(self._dots)
        ]

    @staticmethod
    def _place(fraction: float, places: int) -> int:
        return min(places - 1, max(0, round(fraction * (places - 1))))
