""" scikit-learn's handwritten digits, 1797 images of 8 x 8 pixels (UCI ML repository), with a fixed split """
from typing import Any, List, Tuple

from ._output import CommandError

NUM_HELD_OUT = 360


def load_digits() -> Tuple[List[Any], Any]:
    """Load PIL images (8 x 8, grey) and labels (N,), shuffled with a fixed seed, the last NUM_HELD_OUT for validation.

    Raises CommandError if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise CommandError('The digits come with scikit-learn: pip install "timm_sepool[quickstart]".') from e
    import torch
    from PIL import Image

    digits = load_digits()
    images = [Image.fromarray((image * (255 / 16)).astype('uint8')) for image in digits.images]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    return [images[i] for i in order], torch.from_numpy(digits.target[order])
