"""Digits placed on a canvas: which ones, where, and which pixel belongs to which."""

import numpy as np
from images import load_images

SIZE, DIGIT = 40, 14  # pixels along a side, of the canvas and of a digit
BACKGROUND = 10  # the class of a pixel that is of no digit


def canvases(
    data: str | None, seed: int, most: int, limit: int | None = None
) -> list[dict[str, np.ndarray]]:
    """Returns canvases for training and for testing.

    Args:
        data: Where the digits come from, as for `images.load_images`.
        seed: Of what is drawn.
        most: Number of digits on a canvas: 1 to `most`, as likely each.
        limit: How many digits to take of either, at most.

    Returns:
        For either: `x`, float32, (n, 40, 40, 1), 0 to 1; `digits`, (n, 10), 1 where a digit is on
        the canvas; `place`, (n, 2), row and column of the last one's centre; and `pixels`, (n, 40,
        40), the digit a pixel belongs to, or `BACKGROUND`.
    """
    return [
        _placed(x, y, most, np.random.default_rng((seed, which)))
        for which, (x, y) in enumerate(load_images(data, seed, limit))
    ]


def _placed(
    x: np.ndarray, y: np.ndarray, most: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    small = x.reshape(len(x), DIGIT, 2, DIGIT, 2).mean(axis=(2, 4))
    canvas = np.zeros((len(x), SIZE, SIZE, 1), "float32")
    digits = np.zeros((len(x), 10), "float32")
    place = np.zeros((len(x), 2), "float32")
    pixels = np.full((len(x), SIZE, SIZE), BACKGROUND)
    for n in range(len(x)):
        others = rng.integers(0, len(x), rng.integers(0, most))
        for which in (*others, n):
            corner = rng.integers(0, SIZE - DIGIT + 1, 2)
            here = (n, *(slice(at, at + DIGIT) for at in corner))
            ink = small[which] > 0.2
            canvas[here][ink, 0] = small[which][ink]
            pixels[here][ink] = y[which]
            place[n] = corner + DIGIT / 2
            digits[n, y[which]] = 1
    return {"x": canvas, "digits": digits, "place": place, "pixels": pixels}
