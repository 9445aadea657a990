"""digits: 1,797 real handwritten digits, 8 x 8 grey, shipped with the package; a fixed quarter of every class is the test set.

From the UCI "Optical Recognition of Handwritten Digits" test set (Alpaydin and Kaynak 1998, CC BY 4.0), the images that
scikit-learn's `load_digits` gives; values 0..16 stored as they are.
"""

from pathlib import Path

import numpy as np
import torch

from .resident import Arrays
from .source import portions


def arrays() -> Arrays:
    """train 1,347 and test 450 images as uint8 (N, 1, 8, 8), values 0..240."""
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as stored:
        x = torch.from_numpy(stored["x"]).mul(15)[:, None]
        y = torch.from_numpy(stored["y"]).long()
    train, test = portions(y, 1.0, 0.25)
    return Arrays(
        name="digits",
        classes=tuple("0123456789"),
        train=(x[train], y[train]),
        test=(x[test], y[test]),
        mean=(0.2866,),  # of the training images, on the scale where 255 is 1
        std=(0.3538,),
        pad=1,
        pad_mode="zero",
        flip=False,  # a mirrored 2 is no digit
    )
