"""From an image file to the tensor a model takes, by its InputSpec.

The one implementation: training's evaluation, calibration and the board all go through here. Pixels equal
those of torchvision's `Resize(shorter side)` and `CenterCrop` on Pillow images, and the tensor equals
`ToTensor` and `Normalize`, bit for bit. As in torchvision's ImageFolder, an EXIF rotation is not applied,
a colour profile is not applied, transparency is dropped, and of an animation the first frame counts. Unlike there,
16 bits a pixel are scaled to 8 and not clipped to white.
"""

from __future__ import annotations

import io
import stat
import warnings
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgecnn.device.spec import InputSpec, Takes
from edgecnn.errors import DataError, is_the_machines

if TYPE_CHECKING:
    from PIL import Image

# Named, so that no other decoder of Pillow is reached by a file's first bytes: the one for EPS starts a program.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 89_478_485  # 256 MiB of RGB; where Pillow begins to warn of a decompression bomb
MAX_SIDE = 8192  # of an image that the model's file resizes by itself

_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", *_SIXTEEN_BITS)


@lru_cache(maxsize=1)
def _known_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    from PIL import Image

    Image.init()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what it warns of is refused here, in one line, or does not matter
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode_image(data: bytes) -> Image.Image:
    """Decode a whole image file held in memory.

    Raises:
        DataError: why it is not an image. The message is the reason alone: the caller knows the name.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise DataError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=_known_formats())
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS} that are accepted")
        image.load()
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise DataError(f"not an image of a known format ({', '.join(_known_formats())})") from None
    except Exception as fault:  # decoders raise almost every kind on a broken file
        if is_the_machines(fault):
            raise
        reason = str(fault).partition("\n")[0] or type(fault).__name__
        raise DataError(reason.removesuffix(".")) from None
    _refuse_unranged(image)
    return image


def open_image(path: Path) -> Image.Image:
    """Read and fully decode an image file.

    Raises:
        DataError: names the file that is not there, cannot be read or does not decode.
    """
    try:
        return decode_image(read_regular(path))
    except DataError as fault:
        raise DataError(f"{path}: {fault}. Replace the file, or leave it out.") from None


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file; a pipe or a device would block or never end.

    Raises:
        DataError: why it cannot be read; the reason alone, without the name.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError("not a regular file")
        return path.read_bytes()
    except OSError as fault:
        if is_the_machines(fault):
            raise
        raise DataError((fault.strerror or type(fault).__name__).lower()) from None


def _refuse_unranged(image: Image.Image) -> None:
    """Refuse pixels whose black and white are not defined by their format, such as 32-bit floats."""
    # Pillow before 10.3 opened the 16-bit PNG as "I".
    if image.mode not in _MODES and not (image.mode == "I" and image.format == "PNG"):
        raise DataError(f"pixels of Pillow mode {image.mode} have no defined range: save the image with 8 or 16 bits a channel")


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """The image in RGB (`channels` 3) or grey (1). Any augmentation in training starts from this.

    Raises:
        DataError: the pixels' range is not known; the reason alone, without the name.
    """
    from PIL import Image

    _refuse_unranged(image)
    wanted = {1: "L", 3: "RGB"}[channels]
    if image.mode in _SIXTEEN_BITS or image.mode == "I":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning about the transparency
    elif image.mode in ("PA", "La", "RGBa", "HSV"):
        image = image.convert({"La": "LA", "HSV": "RGB"}.get(image.mode, "RGBA"))  # they reach grey only by way of these
    return image if image.mode == wanted else image.convert(wanted)


def to_pixels(image: Image.Image, spec: InputSpec) -> npt.NDArray[np.uint8]:
    """The uint8 pixels that a file of `spec` is given: resized and cropped, or as they are where the file does that itself.

    Where the resized image is smaller than the crop, black is added around it, as torchvision does.

    Returns:
        uint8, H x W x C, of its own memory.

    Raises:
        DataError: so long and thin that resizing its shorter side would fill the memory, or not of the one size that the file takes.
    """
    from PIL import Image

    image = to_mode(image, spec.channels)
    if spec.image_size != "prepared":
        _refuse_size(image, spec)
        return np.array(image, dtype=np.uint8).reshape(image.height, image.width, spec.channels)
    if spec.fit == "squash":
        width, height = spec.width, spec.height
    elif image.width <= image.height:
        width, height = spec.resize, int(spec.resize * image.height / image.width)
    else:
        width, height = int(spec.resize * image.width / image.height), spec.resize
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{image.width} x {image.height} pixels are too thin: with the shorter side at {spec.resize} they become {width} x {height}"
        )
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling[spec.interpolation.upper()])

    short_w, short_h = max(0, spec.width - width), max(0, spec.height - height)
    # torchvision pads first (the odd pixel right and below), then rounds half to even where it crops.
    left = -(short_w // 2) if short_w else round((width - spec.width) / 2)
    top = -(short_h // 2) if short_h else round((height - spec.height) / 2)
    if (left, top, spec.width, spec.height) != (0, 0, width, height):
        image = image.crop((left, top, left + spec.width, top + spec.height))  # Pillow fills what lies outside with 0
    return np.array(image, dtype=np.uint8).reshape(spec.height, spec.width, spec.channels)


def _refuse_size(image: Image.Image, spec: InputSpec) -> None:
    """Refuse what a file that resizes by itself does not take. It reckons in 32-bit integers."""
    if spec.pixel_size not in (None, (image.height, image.width)):
        raise DataError(
            f"{image.height} x {image.width} pixels, height by width, and the model's file takes {spec.image_size}. "
            "Set the camera to that size, or make the bundle with image_size: any"
        )
    longest, shortest = max(image.size), min(image.size)
    resized = spec.resize * longest // shortest + 1
    if longest > MAX_SIDE or 2 * longest * resized >= 1 << 31 or longest**2 // min(spec.shape[1:]) >= 1 << 18:
        raise DataError(f"{image.height} x {image.width} pixels are too long or too thin for a file that resizes by itself")


def normalise(pixels: npt.NDArray[np.uint8], spec: InputSpec) -> npt.NDArray[np.float32]:
    """`(pixels / 255 - mean) / std`, each step rounded to float32 as torchvision's are.

    Args:
        pixels: uint8, N x H x W x C.
        spec: its mean and std; the pixels may have any height and width.

    Returns:
        float32, N x C x H x W, contiguous, of its own memory.
    """
    tensor = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
    tensor /= np.float32(255)
    tensor -= np.array(spec.mean, dtype=np.float32)[:, None, None]
    tensor /= np.array(spec.std, dtype=np.float32)[:, None, None]
    return tensor


def to_input(pixels: npt.NDArray[np.uint8], spec: InputSpec, takes: Takes) -> npt.NDArray[np.uint8] | npt.NDArray[np.float32]:
    """What a file that takes `takes` is given for prepared pixels: the one place that knows.

    Args:
        pixels: uint8, N x H x W x C, as `to_pixels` makes them.
        spec: the file's.
        takes: the runner's; the manifest says the same.
    """
    return np.ascontiguousarray(pixels) if takes == "uint8" else normalise(pixels, spec)
