"""A task of 1,000 classes that needs no download: Chinese characters, drawn in Debian's fonts.

    apt-get install fonts-noto-cjk
    python benchmarks/characters.py characters.npz
    python benchmarks/fit_cost.py resnet --data characters.npz --images 20000 --variants random

The first characters of GB 2312, which are common ones, each in four typefaces, turned, scaled and
shifted by chance: 24 images of 32 x 32 for each. The file is as the other benchmarks take it.
"""

import argparse
import glob

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 32
FONTS = "/usr/share/fonts/opentype/noto/Noto*CJK-*.ttc"


def characters(count):
    """The first characters of GB 2312, level 1: 94 in each of its rows."""
    codes = range(count)
    return [bytes([0xB0 + code // 94, 0xA1 + code % 94]).decode("gb2312") for code in codes]


def drawn(character, font, rng):
    """An image, uint8: white on black."""
    large = Image.new("L", (2 * SIZE, 2 * SIZE))
    ImageDraw.Draw(large).text((SIZE, SIZE), character, fill=255, font=font, anchor="mm")
    angle, shift = rng.uniform(-12, 12), rng.uniform(-5, 5, 2)
    return np.asarray(
        large.rotate(angle, Image.Resampling.BILINEAR, translate=tuple(shift)).resize((SIZE, SIZE))
    )


def task(classes, each, seed=0):
    """Images, uint8, shape (classes * each, 32, 32), and labels."""
    paths = sorted(glob.glob(FONTS))
    if not paths:
        raise SystemExit(f"Found no font at {FONTS}. Install fonts-noto-cjk.")
    fonts = [ImageFont.truetype(path, size) for path in paths for size in (40, 46, 52)]
    rng = np.random.default_rng(seed)
    images = [
        drawn(character, fonts[rng.integers(len(fonts))], rng)
        for character in characters(classes)
        for _ in range(each)
    ]
    return np.stack(images), np.repeat(np.arange(classes), each)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="the .npz to write")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--each", type=int, default=24, help="number of images of each")
    args = parser.parse_args()
    x, y = task(args.classes, args.each)
    np.savez(args.out, x_train=x, y_train=y)
    print(f"{len(x):,} images of {args.classes:,} characters")


if __name__ == "__main__":
    main()
