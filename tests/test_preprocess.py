"""Preprocessing is torchvision's and timm's to the bit, and a packed set is whole or refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgecnn.device import preprocess
from edgecnn.device.packed import open_packed, write_packed
from edgecnn.device.preprocess import decode_image, normalise, open_image, to_mode, to_pixels
from edgecnn.device.spec import InputSpec
from edgecnn.errors import DataError, IntegrityError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIZES = [(8, 8), (33, 47), (47, 33), (256, 256), (31, 300), (301, 30), (64, 64), (65, 200)]  # width, height


def spec_of(channels=3, height=64, width=64, resize=73, fit="crop", interpolation="bilinear"):
    mean, std = IMAGENET if channels == 3 else ((0.5,), (0.25,))
    return InputSpec(channels, height, width, resize, fit, interpolation, mean, std)


def noise(size, mode="RGB", seed=0):
    bands = {"L": (), "RGB": (3,)}[mode]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *bands), dtype=np.uint8))


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_pixels_and_tensor_equal_torchvisions(interpolation, channels, fit):
    """Resize, CenterCrop, ToTensor and Normalize of torchvision give the same bits, also where the crop is larger or not square."""
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    seen = 0
    for size in SIZES:
        for height, width, resize in [(64, 64, 73), (64, 64, 64), (65, 63, 70), (48, 80, 81), (64, 64, 40), (33, 50, 40)]:
            spec = spec_of(channels, height, width, resize, fit, interpolation)
            first = transforms.Resize(resize if fit == "crop" else (height, width), InterpolationMode(interpolation))
            cut = transforms.Compose([first, transforms.CenterCrop((height, width))])
            image = noise(size, "RGB" if channels == 3 else "L")
            pixels = to_pixels(image, spec)
            assert pixels.dtype == np.uint8
            assert pixels.shape == (height, width, channels)
            assert np.array_equal(pixels, np.asarray(cut(image)).reshape(pixels.shape)), (size, spec)
            tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)])(cut(image)).numpy()
            assert normalise(pixels[None], spec)[0].tobytes() == tensor.tobytes()
            seen += 1
    assert seen == 48


@pytest.mark.parametrize(("interpolation", "crop_pct", "size"), [("bicubic", 0.875, 224), ("bicubic", 0.95, 96), ("bilinear", 1.0, 64)])
def test_tensor_equals_timms(interpolation, crop_pct, size):
    """timm's own evaluation transform gives the same bits."""
    from timm.data import create_transform

    theirs = create_transform((3, size, size), interpolation=interpolation, crop_pct=crop_pct, mean=IMAGENET[0], std=IMAGENET[1])
    spec = spec_of(3, size, size, int(size / crop_pct), "crop", interpolation)
    for place, shape in enumerate(SIZES):
        image = noise(shape, seed=place)
        assert normalise(to_pixels(image, spec)[None], spec)[0].tobytes() == theirs(image).numpy().tobytes(), shape


def test_every_byte_normalises_as_in_torch():
    """All 256 values in all channels equal torch's division and normalisation; the batch is contiguous N x C x H x W."""
    import torch

    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    ours = normalise(pixels, spec_of())
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)
    theirs = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float().div(255).sub(mean).div(std)
    assert ours.flags["C_CONTIGUOUS"]
    assert ours.dtype == np.float32
    assert ours.tobytes() == theirs.numpy().tobytes()


def test_normalise_leaves_its_input_alone():
    """A read-only batch, such as one mapped from a file, is accepted and not changed."""
    pixels = np.full((2, 4, 4, 1), 7, dtype=np.uint8)
    pixels.flags.writeable = False
    assert normalise(pixels, spec_of(1)).shape == (2, 1, 4, 4)


def test_every_kind_of_image_becomes_rgb_and_grey(tmp_path):
    """Whatever a format can hold opens, and converts as torchvision's ImageFolder converts it."""
    seen = 0
    for kind in ("PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG"):
        for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK"):
            path = tmp_path / f"Bild é {mode}.{kind}"
            try:
                path.write_bytes(encoded(noise((20, 30)).convert(mode), kind))
            except (OSError, ValueError):
                continue  # the format does not know the mode
            opened = open_image(path)
            with Image.open(path) as theirs:
                assert np.array_equal(np.asarray(to_mode(opened, 3)), np.asarray(theirs.convert("RGB"))), path.name
            assert to_mode(opened, 1).mode == "L"
            for channels in (1, 3):
                assert to_pixels(opened, spec_of(channels)).shape == (64, 64, channels)
            seen += 1
    assert seen >= 35


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    """Of a 16-bit image the upper byte counts; clipping would make nearly all of it white."""
    values = np.array([[0, 255, 256, 40000, 65535]], dtype=np.uint16)
    opened = decode_image(encoded(Image.fromarray(values), kind))
    assert np.asarray(to_mode(opened, 1)).tolist() == [[0, 0, 1, 156, 255]]
    assert np.asarray(to_mode(opened, 3))[0, :, 2].tolist() == [0, 0, 1, 156, 255]


def test_transparent_palette_converts_without_a_warning():
    """A palette with transparency gives its colours and no warning."""
    data = encoded(noise((9, 9)).quantize(4), "PNG", transparency=bytes([0, 128, 255, 7]))
    assert to_mode(decode_image(data), 3).mode == "RGB"


def test_exif_rotation_is_not_applied():
    """As in torchvision's ImageFolder, which the published weights were evaluated with."""
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(noise((40, 20)), "JPEG", exif=exif)).size == (40, 20)


def test_animation_gives_its_first_frame():
    """Of several frames the first counts."""
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert to_mode(decode_image(data), 3).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated_files_are_named(tmp_path, kind):
    """A file cut at a half is refused as a DataError of one line that names it."""
    whole = encoded(noise((50, 50)), kind)
    path = tmp_path / f"half.{kind}"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"half\.{kind}: .+ Replace the file") as caught:
        open_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_mutated_files_never_raise_anything_else():
    """Of 600 images with random bytes changed, each opens and prepares or is a DataError."""
    draw = np.random.default_rng(1)
    outcomes = {"opened": 0, "refused": 0}
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        whole = np.frombuffer(encoded(noise((24, 24)), kind), dtype=np.uint8)
        for _ in range(100):
            broken = whole.copy()
            broken[draw.integers(0, len(broken), 6)] = draw.integers(0, 256, 6)
            try:
                to_pixels(decode_image(broken.tobytes()), spec_of())
                outcomes["opened"] += 1
            except DataError:
                outcomes["refused"] += 1
    assert sum(outcomes.values()) == 600
    assert min(outcomes.values()) > 50


def test_not_an_image_says_why(tmp_path):
    """Text, an empty file, a folder, a pipe, a missing file: each is a DataError with its reason."""
    import os

    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    regular = "not a regular file"
    reasons = {"text": "known format", "empty": "is empty", "folder": regular, "pipe": regular, "none": "no such file"}
    for name, reason in reasons.items():
        with pytest.raises(DataError, match=reason):
            open_image(tmp_path / f"{name}.jpg")


def test_postscript_is_not_handed_to_its_interpreter():
    """An EPS file would start Ghostscript; it is not among the formats."""
    with pytest.raises(DataError, match="known format"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("side", [12_000, 20_000, 2**31 - 1])
def test_bombs_are_refused_before_decoding(side):
    """A small file that declares more pixels than the limit, ours or Pillow's own, is refused."""
    header = bytearray(encoded(Image.new("1", (8, 8)), "BMP"))
    header[18:26] = side.to_bytes(4, "little") * 2
    with pytest.raises(DataError, match="pixels"):
        decode_image(bytes(header))


def test_thin_images_are_refused_where_resizing_would_fill_the_memory():
    """1 x 60,000 pixels with the shorter side at 224 would be 3 billion pixels."""
    with pytest.raises(DataError, match="too thin"):
        to_pixels(Image.new("L", (1, 60_000)), spec_of(resize=224))
    assert to_pixels(Image.new("L", (1, 60_000)), spec_of(fit="squash")).shape == (64, 64, 3)


def test_floating_point_pixels_are_refused():
    """Nobody knows what is white in a 32-bit float image."""
    data = encoded(Image.new("F", (4, 4), 0.5), "TIFF")
    with pytest.raises(DataError, match="mode F"):
        decode_image(data)
    with pytest.raises(DataError, match="mode F"):
        to_pixels(Image.new("F", (4, 4)), spec_of())


def test_formats_exist_in_this_pillow():
    """The common formats are all there: a typing error in the list would silently drop one."""
    assert set(preprocess._known_formats()) >= {"JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"}


# ---- packed sets


def packed(folder: Path, count=5, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int64)
    return pixels, write_packed(folder, [f"ä/{i}" for i in range(count)], labels, iter(pixels), spec_of().geometry)


def test_packed_gives_back_what_was_written(tmp_path):
    """Pixels, labels, ids and geometry come back; the images are mapped, not read; no other file is left."""
    pixels, written = packed(tmp_path / "new" / "set")
    opened = open_packed(tmp_path / "new" / "set", check=True)
    assert isinstance(opened.images, np.memmap)
    assert np.array_equal(opened.images, pixels)
    assert opened.labels.tolist() == [0, 1, 2, 3, 4]
    assert opened.ids == tuple(f"ä/{i}" for i in range(5))
    assert opened.geometry == spec_of().geometry
    assert opened.sha256 == written.sha256
    assert sorted(one.name for one in (tmp_path / "new" / "set").iterdir()) == ["images.npy", "labels.npy", "set.json"]
    normalise(opened.images[:2], spec_of())


def test_packed_digest_is_of_content(tmp_path):
    """The same images give the same digest; another image or another label another one."""
    assert packed(tmp_path / "a")[1].sha256 == packed(tmp_path / "b")[1].sha256
    pixels, first = packed(tmp_path / "c", seed=1)
    other = write_packed(tmp_path / "d", first.ids, first.labels[::-1], iter(pixels), first.geometry)
    assert len({packed(tmp_path / "a")[1].sha256, first.sha256, other.sha256}) == 3


def test_every_flipped_bit_of_images_and_labels_is_found(tmp_path):
    """A flipped bit in the pixels or the labels opens, and fails the digest; one in a header may also fail to open."""
    found = 0
    for name in ("images.npy", "labels.npy"):
        packed(tmp_path)
        whole = (tmp_path / name).read_bytes()
        for at in np.random.default_rng(2).integers(128, len(whole), 25):
            broken = bytearray(whole)
            broken[at] ^= 1 << int(at) % 8
            (tmp_path / name).write_bytes(broken)
            open_packed(tmp_path)
            with pytest.raises(IntegrityError, match="digest"):
                open_packed(tmp_path, check=True)
            found += 1
    assert found == 50


def test_packed_sets_that_lie_are_refused(tmp_path):
    """Truncation, a missing file, other shapes, a newer format, and JSON that is none: each an IntegrityError."""
    cases = {
        "truncated": lambda f: (f / "images.npy").write_bytes((f / "images.npy").read_bytes()[:-1]),
        "no images": lambda f: (f / "images.npy").unlink(),
        "no labels": lambda f: (f / "labels.npy").unlink(),
        "no json": lambda f: (f / "set.json").unlink(),
        "half json": lambda f: (f / "set.json").write_text((f / "set.json").read_text()[:40]),
        "a list": lambda f: (f / "set.json").write_text("[]"),
        "fewer labels": lambda f: np.save(f / "labels.npy", np.arange(4)),
        "float images": lambda f: np.save(f / "images.npy", np.zeros((5, 64, 64, 3), np.float32)),
        "other size": lambda f: np.save(f / "images.npy", np.zeros((5, 32, 64, 3), np.uint8)),
        "pickle": lambda f: np.save(f / "labels.npy", np.array([print] * 5, dtype=object), allow_pickle=True),
        "count": lambda f: (f / "set.json").write_text(json.dumps({**json.loads((f / "set.json").read_text()), "count": 6})),
        "newer": lambda f: (f / "set.json").write_text(json.dumps({**json.loads((f / "set.json").read_text()), "schema": 99})),
    }
    for name, harm in cases.items():
        folder = tmp_path / name
        packed(folder)
        harm(folder)
        with pytest.raises(IntegrityError) as caught:
            open_packed(folder)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_interrupted_write_leaves_no_set(tmp_path):
    """Where the images stop coming, also over an older set, the folder is not a set; writing again mends it."""
    packed(tmp_path)

    def broken():
        yield np.zeros((64, 64, 3), np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_packed(tmp_path, ["a", "b"], np.zeros(2, np.int64), broken(), spec_of().geometry)
    with pytest.raises(IntegrityError, match=r"set\.json"):
        open_packed(tmp_path)
    pixels, _ = packed(tmp_path)
    assert np.array_equal(open_packed(tmp_path, check=True).images, pixels)


def test_wrong_images_are_a_bug_and_not_written():
    """Another shape, another number, equal ids: the caller's mistake, found before a set is there."""
    import tempfile

    good = np.zeros((64, 64, 3), np.uint8)
    cases = [
        (["a", "b"], [good]),
        (["a"], [good, good]),
        (["a"], [good[1:]]),
        (["a"], [good.astype(float)]),
        (["a", "a"], [good, good]),
        ([], []),
    ]
    for ids, pixels in cases:
        with tempfile.TemporaryDirectory() as folder:
            with pytest.raises(ValueError):
                write_packed(Path(folder), ids, np.zeros(len(ids), np.int64), pixels, spec_of().geometry)
            assert not (Path(folder) / "set.json").exists()
