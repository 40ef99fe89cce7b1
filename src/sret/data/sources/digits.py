"""Loads the 1,797 handwritten digits of scikit-learn, 8x8 grey pixels (UCI ML hand-written digits, test part)."""

import numpy as np
from PIL import Image

from sret.data.dataset import ImageData, Samples


def load_digits() -> ImageData:
    """The data set "digits", without splits."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # 17 levels, 0..16
    samples = Samples([Image.fromarray(image) for image in pixels], [int(label) for label in bunch.target])
    return ImageData.of("digits", {"all": samples}, [str(digit) for digit in range(10)])
