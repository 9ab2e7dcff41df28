"""The options that all examples of the paper's experiments have."""

import argparse
import pathlib


def options(
    description: str, out: str, epochs: int, quick: str, *, images: bool = True
) -> argparse.ArgumentParser:
    """Returns a parser of them; scripts add their own.

    Args:
        description: The script's docstring.
        out: Where results go by default.
        epochs: Epochs of training by default.
        quick: What `--quick` does.
        images: Whether images may be given, as `images.load_images` reads them.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    if images:
        parser.add_argument("--data", help="an .npz file with x_train, y_train, ...; or mnist")
    parser.add_argument("--epochs", type=int, default=epochs, help="epochs of training, at most")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(out))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser
