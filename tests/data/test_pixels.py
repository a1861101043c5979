"""Image files of every number type and orientation, as upright RGB images of 8 bits."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from conftest import described
from lalora_app.data.examples import Examples, split
from lalora_app.data.images import encode_images
from lalora_app.data.pixels import decoded
from lalora_app.settings.errors import DataError

ORIENTATION = 0x0112


def stored(array, kind="TIFF", **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def ramp(highest, dtype, size=32):
    return np.linspace(0, highest, size * size).reshape(size, size).astype(dtype)


def gray(image):
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_12_an_image_stands_as_datasets_and_browsers_show_it(orientation, kind):
    from datasets import Image as Feature

    array = np.zeros((32, 48, 3), np.uint8)
    array[:8], array[:, :8, 0] = 255, 200  # no two orientations look alike
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = stored(array, kind, exif=exif)
    shown = Feature().decode_example({"bytes": content, "path": None})
    assert np.array_equal(np.asarray(decoded(content)), np.asarray(shown.convert("RGB")))
    assert decoded(content).size == ((48, 32) if orientation < 5 else (32, 48))


@pytest.mark.parametrize(
    ("array", "white", "highest"),
    [
        (ramp(65535, np.uint16), 0.0, 65535),
        (ramp(30000, np.uint16), 0.0, 65535),
        (ramp(4095, np.uint16), 4095.0, 4095),
        (ramp(4095, np.uint16), 65535.0, 65535),
        (ramp(60000, np.int32), 60000.0, 60000),
        (ramp(1, np.float32), 0.0, 1),
        (ramp(0.25, np.float32), 0.0, 1),
        (ramp(255, np.float32), 255.0, 255),
    ],
)
def test_12_wide_types_are_scaled_by_their_range(array, white, highest):
    expected = np.rint(array.astype(np.float64) * 255 / highest)
    assert np.array_equal(gray(decoded(stored(array), white)), expected)


def test_a_png_of_16_bits_is_scaled_too():
    array = ramp(65535, np.uint16)
    assert np.array_equal(gray(decoded(stored(array, "PNG"))), np.rint(array / 257))


def test_a_tiff_that_says_12_bits_is_scaled_by_them(monkeypatch):
    """Pillow writes no TIFF of 12 bits; its reader names the bits in a tag."""
    array = ramp(4095, np.uint16)
    image = Image.open(io.BytesIO(stored(array)))
    image.load()
    image.tag_v2[258] = (12,)
    monkeypatch.setattr(Image, "open", lambda file: image)
    assert np.array_equal(gray(decoded(b"")), np.rint(array * (255 / 4095)))


def test_an_upright_image_of_16_bits():
    array = ramp(65535, np.uint16)[:16]
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    content = stored(array, "PNG", exif=exif)
    assert np.array_equal(gray(decoded(content)), np.rot90(np.rint(array / 257), k=-1))


REFUSED = {
    "12 bits in 16": (
        ramp(4095, np.uint16),
        0.0,
        r"end at 4095, as if it had 12 bits.*white-level",
    ),
    "32-bit integers": (ramp(60000, np.int32), 0.0, r"do not tell which value is white"),
    "floats above 1": (
        ramp(255, np.float32),
        0.0,
        r"go from 0 to 255, and must be from 0 to 1: name the value of white in data\.white-level",
    ),
    "above white": (ramp(5000, np.uint16), 4095.0, r"to 5000, and must be from 0 to 4095: name"),
    "negative": (ramp(1, np.float32) - 0.5, 0.0, r"go from -0\.5 to 0\.5, and must be .* 1$"),
    "endless": (np.full((8, 8), np.inf, np.float32), 0.0, r"must be from 0 to 1$"),
    "no number": (np.full((8, 8), np.nan, np.float32), 0.0, r"nan"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_would_lose_content_is_refused(case):
    array, white, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        decoded(stored(array), white)


def png_of_16_bit_colours(array):
    """Return a PNG file; Pillow writes none with colours of 16 bits. array: (height, width, n)."""
    height, width, channels = array.shape
    colour_type = {2: 4, 3: 2, 4: 6}[channels]

    def chunk(name, content):
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_16_bits_are_taken_by_their_upper_bits(channels):
    array = np.stack([ramp(65535, np.uint16)] * channels, axis=-1)
    shades = array[..., 0] >> 8
    for white in (0.0, 65535.0):
        assert np.array_equal(gray(decoded(png_of_16_bit_colours(array), white)), shades)
    with pytest.raises(ValueError, match=r"white-level=4095 must be 0 or 65535 for colours of 16"):
        decoded(png_of_16_bit_colours(array), 4095.0)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_12_bits_in_16_are_not_lost_in_silence(channels):
    array = np.stack([ramp(4095, np.uint16)] * channels, axis=-1)
    array[..., 3:] = 65535  # opaque
    content = png_of_16_bit_colours(array)
    with pytest.raises(ValueError, match=r"^its 16-bit colours end below 4096, .* with 8 bits"):
        decoded(content)
    assert gray(decoded(content, 65535.0)).max() == 15  # dark, as the user says
    assert gray(decoded(png_of_16_bit_colours(np.zeros_like(array)))).max() == 0


def test_modes_of_8_bits_are_converted_as_pillow_does():
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(array)
    for mode in ("1", "L", "P", "LA", "RGBA", "CMYK"):
        file = io.BytesIO()
        image.convert(mode).save(file, "TIFF" if mode == "CMYK" else "PNG")
        expected = image.convert(mode).convert("RGB")
        assert np.array_equal(np.asarray(decoded(file.getvalue())), np.asarray(expected)), mode


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_whose_zero_is_white_is_inverted_or_refused(dtype):
    array = ramp(np.iinfo(dtype).max, dtype)
    content = stored(array, tiffinfo={262: 0})
    raw_first = content[-array.nbytes :][: array.itemsize]  # of the pixel that comes first
    if dtype is np.uint8:
        assert raw_first == b"\xff"  # white is stored as 0, so black is stored as 255
        assert np.array_equal(gray(decoded(content)), array)
        return
    with pytest.raises(ValueError, match=r"^its value 0 is white"):
        decoded(content)


def test_a_black_image_of_16_bits_is_black():
    assert gray(decoded(stored(np.zeros((8, 8), np.uint16)))).max() == 0


def test_a_palette_with_transparency_is_read_without_a_warning():
    image = Image.fromarray(ramp(255, np.uint8)).convert("RGB").convert("P")
    file = io.BytesIO()
    image.save(file, "PNG", transparency=bytes(range(256)))
    shown = np.asarray(decoded(file.getvalue()))
    assert np.array_equal(shown, np.asarray(image.convert("RGB")))


def test_images_of_8_bits_are_not_scaled():
    array = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(gray(decoded(stored(array, "PNG"), 4095.0)), array)


def test_a_bad_image_is_told_with_row_and_file(tmp_path):
    for name, array in {"a": ramp(4095, np.uint16), "b": ramp(65535, np.uint16)}.items():
        (tmp_path / name).mkdir()
        for i in range(20):
            (tmp_path / name / f"{i}.tif").write_bytes(stored(array + np.uint16(i)))
    data = described(tmp_path, input_column="image", labels="a,b")
    train, _ = split(data)
    with pytest.raises(DataError) as caught:
        encode_images(train, 32, 32)
    first = next(i for i in range(len(train)) if train.labels[i] == 0)
    assert str(caught.value).startswith(
        f"data.input-column: row {train.row(first)} (a/{train.names[first].split('/')[1]}) is no "
        "readable image: its 16-bit values end at"
    )


PNG = stored(np.zeros((32, 32), np.uint8), "PNG")
UNKNOWN = "its 5 bytes are damaged, or of no image format that Pillow knows"
DAMAGED = {
    "no image": (b"hello", UNKNOWN),
    "a cut PNG": (PNG[:50], "truncated"),
    "a cut JPEG": (stored(ramp(255, np.uint8), "JPEG")[:-100], "truncated"),
    "a cut TIFF": (stored(ramp(255, np.uint8))[:-100], "truncated"),
}


@pytest.mark.parametrize("case", list(DAMAGED))
def test_a_damaged_image_is_told_with_a_reason_that_is_the_same_each_time(case):
    content, reason = DAMAGED[case]
    examples = Examples((PNG, content), (0, 1), names=("a/0.png", "b/1.png"))
    with pytest.raises(DataError, match=r": row 1 \(b/1\.png\) is no readable image: ") as caught:
        encode_images(examples, 32, 32)
    assert reason in str(caught.value).replace("Truncated", "truncated")
    assert "object at" not in str(caught.value)


def test_the_white_level_of_the_config_reaches_the_images(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(20):
            (tmp_path / name / f"{i}.tif").write_bytes(stored(ramp(4000 + i, np.uint16)))
    data = described(tmp_path, input_column="image", labels="a,b", white_level=4095.0)
    train, _ = split(data)
    assert int(encode_images(train, 32, 32).batch([0]).inputs.max()) in range(248, 252)
