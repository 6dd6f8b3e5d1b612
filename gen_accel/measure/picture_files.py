"""Pictures read from files by Pillow, with the file's name in every error."""

import hashlib
import re
import warnings
from pathlib import Path
from typing import IO

from PIL import Image


def read_picture(source: Path | IO[bytes], name: object) -> Image.Image:
    """Read and decode the picture in a file.

    Above Pillow's limit on pixels (`Image.MAX_IMAGE_PIXELS`) a warning says how large the picture
    is. Pictures of twice as many pixels are refused.

    Args:
        name: of the file, for messages.

    Raises:
        OSError: no such file, no picture, a broken one, or one that is too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                image.load()
    except Image.UnidentifiedImageError as error:
        raise OSError(f"{name} is no image that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise OSError(_too_large(name, error)) from error
    except OSError as error:
        if error.errno is not None:  # of the file system
            raise
        raise OSError(f"{name} is a broken image: {error}") from error
    except (SyntaxError, ValueError) as error:
        raise OSError(f"{name} is a broken image: {error}") from error
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        size = f"{image.width} x {image.height} = {image.width * image.height:,} pixels"
        warnings.warn(f"{name} is large, {size}: a smaller one is read faster", stacklevel=2)
    return image


def pixels(image: Image.Image) -> str:
    """Identify a picture by its size and a hash of its pixels."""
    return f"{image.width} x {image.height} {hashlib.sha256(image.tobytes()).hexdigest()}"


def _too_large(name: object, error: Exception) -> str:
    """Write the error; Pillow gives the number of pixels only in its message."""
    found = re.search(r"\d+", str(error))
    has = f"has {int(found[0]):,} pixels" if found else "has too many pixels"
    most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    return f"{name} {has}, and at most {most:,} are read: scale it down"
