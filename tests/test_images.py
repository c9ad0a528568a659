"""Picture files: what they carry, and that none is lost or half written."""

import errno
import json
import os
import stat
import struct
import zlib
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from diffusers.utils import load_image
from PIL import ExifTags, Image

from flux2_mlx import InputError, Settings, read_metadata, save_image
from flux2_mlx.imaging.files import check_output, check_preview, open_image
from flux2_mlx.imaging.preprocess import reference_array, reference_size, to_pil, to_unit

SETTINGS = Settings(
    prompt='a red fox 🦊, "quoted"\nsecond line',
    model="klein-4b",
    seed=42,
    width=96,
    height=64,
    num_steps=4,
    guidance=1.0,
    schedule="flux2",
    noise="torch",
    dtype="float32",
    max_sequence_length=512,
    negative_prompt="blur",
)


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8))


def save(image, path):
    return save_image(image, path, SETTINGS.metadata(), SETTINGS.parameters())


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".PNG"])
def test_every_format_carries_its_settings(image, tmp_path, suffix):
    written = save(image, tmp_path / f"fox{suffix}")
    assert read_metadata(written) == json.loads(json.dumps(SETTINGS.metadata()))
    with Image.open(written) as reread:
        assert reread.size == (32, 16)
        if reread.format == "PNG":
            assert np.array_equal(np.asarray(reread), np.asarray(image))
            assert reread.info["parameters"] == SETTINGS.parameters()
        else:
            comment = reread.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
            assert comment == b"UNICODE\0" + SETTINGS.parameters().encode("utf-16-be")


def test_the_parameters_line():
    assert SETTINGS.parameters() == (
        'a red fox 🦊, "quoted"\nsecond line\nNegative prompt: blur\nSteps: 4, Sampler: Euler, Schedule type: flux2, '
        f"CFG scale: 1, Seed: 42, Size: 96x64, Model: klein-4b, Version: flux2_mlx {SETTINGS.version}"
    )


def test_an_existing_file_is_kept(image, tmp_path):
    path = tmp_path / "fox.png"
    path.write_bytes(b"precious")
    assert save(image, path) == tmp_path / "fox-2.png"
    assert save(image, path) == tmp_path / "fox-3.png"
    assert path.read_bytes() == b"precious"


def test_an_interrupt_while_the_file_gets_its_name_leaves_nothing(image, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    monkeypatch.setattr(os, "link", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(image, tmp_path / "fox.png")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(KeyboardInterrupt):
        save(image, tmp_path / "fox.png")
    assert list(tmp_path.iterdir()) == []


def no_links(*_):
    """os.link on a file system that has none, as exFAT."""
    raise PermissionError(errno.EPERM, "Operation not permitted")


def test_names_are_free_where_there_are_no_links(image, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    assert [save(image, tmp_path / "fox.png").name for _ in range(3)] == ["fox.png", "fox-2.png", "fox-3.png"]
    assert len(list(tmp_path.iterdir())) == 3
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1


def test_a_name_that_is_too_long_once_numbered_is_refused(tmp_path):
    check_output(tmp_path / ("x" * 245 + ".png"))
    with pytest.raises(InputError, match="File name too long"):
        check_output(tmp_path / ("x" * 249 + ".png"))


def test_settings_that_do_not_fit_a_jpeg_are_left_out_with_a_warning(image, tmp_path):
    metadata = {"prompt": "fox " * 20_000}
    for suffix in ("png", "webp"):
        assert read_metadata(save_image(image, tmp_path / f"fox.{suffix}", metadata, "line")) == metadata
    with pytest.warns(UserWarning, match="the prompt is too long for a JPEG"):
        save_image(image, str(tmp_path / "fox.jpg"), metadata, "line")
    assert (tmp_path / "fox.jpg").stat().st_size > 100


def test_a_file_is_readable_as_the_umask_says(image, tmp_path):
    before = os.umask(0o027)
    try:
        written = save(image, tmp_path / "fox.png")
        assert stat.S_IMODE(written.stat().st_mode) == 0o640
    finally:
        os.umask(before)


@pytest.mark.parametrize(("code", "text"), [(errno.ENOSPC, "the disk is full"), (errno.EIO, "Input/output error")])
def test_a_failed_write_leaves_nothing(image, tmp_path, monkeypatch, code, text):
    def half(self, file, **_):
        Path(file).write_bytes(b"half a picture")
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(InputError, match=f"cannot write .*fox.png: {text}"):
        save(image, tmp_path / "fox.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["fox.bmp", "fox", "fox.png.txt"])
def test_other_formats_are_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"the suffix must be one of \.png, \.jpg"):
        check_output(tmp_path / name)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        check_output(tmp_path / "gone" / "fox.png")


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_metadata_of_what_is_no_picture(tmp_path, content):
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.png: cannot be read"):
        read_metadata(path)


@pytest.mark.parametrize("text", [None, "not json", "[1]", "[" * 100_000])
def test_metadata_of_another_programs_picture(image, tmp_path, text):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if text is not None:
        info.add_text("flux2_mlx", text)
    image.save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(InputError, match="has no settings of flux2_mlx"):
        read_metadata(tmp_path / "x.png")


def test_a_decompression_bomb_is_refused(tmp_path):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        png += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    (tmp_path / "x.png").write_bytes(png)
    with pytest.raises(InputError, match=r"x\.png: cannot be read: not an image"):
        read_metadata(tmp_path / "x.png")


def test_rounding_is_half_to_even_and_values_are_clipped():
    decoded = mx.array([[[[-2.0, -1.0, 0.0]], [[1.0, 3.0, 2 * 2.5 / 255 - 1]]]])
    unit = np.array(to_unit(decoded))[0]
    assert np.asarray(to_pil(unit)).tolist() == [[[0, 0, 128]], [[255, 255, 2]]]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("fox.png", "must be a PIL.Image.Image, got str"),
        (Image.new("RGB", (63, 80)), "63 x 80 is too small: at least 64"),
        (Image.new("RGB", (64, 520)), "64 x 520 is too elongated: at most 8 to 1"),
    ],
)
def test_bad_references(image, message):
    with pytest.raises(InputError, match=message):
        reference_array(image)


# ------------------------------------------------------------------------------------------------ files that are read


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_upright(image, tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    upright = open_image(tmp_path / "a.png")
    assert upright.size == ((16, 32) if orientation > 4 else (32, 16))
    assert np.array_equal(np.asarray(upright), np.asarray(load_image(str(tmp_path / "a.png"))))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "1", "P", "YCbCr"])
def test_every_mode_becomes_the_colours_that_it_shows(image, tmp_path, mode):
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "YCbCr") else "a.png")
    image.convert(mode).save(path)
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(load_image(str(path))))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(tmp_path, mode):
    levels = np.zeros((8, 8, 4), np.uint8)
    levels[:, 4:, 3] = 255  # the right half black, the left one transparent black
    picture = Image.fromarray(levels)
    if mode == "P":
        picture = Image.fromarray(levels[..., 3] // 255).convert("P")
        picture.putpalette([9, 9, 9, 0, 0, 0])
        picture.info["transparency"] = 0
    picture.convert(mode).save(tmp_path / "a.png")
    opened = np.asarray(open_image(tmp_path / "a.png"))
    assert (opened[:, :4] == 255).all()
    assert (opened[:, 4:] == 0).all()


def test_sixteen_bits_become_eight(tmp_path):
    levels = np.array([[0, 257, 128 * 257 + 100, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert np.asarray(open_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_transparent_level_of_sixteen_bits_becomes_white(tmp_path):
    levels = np.array([[0, 257, 300, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png", transparency=257)
    assert np.asarray(open_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 255, 1, 255]
    assert np.asarray(open_image(tmp_path / "a.png", alpha=True))[0, :, 3].tolist() == [255, 0, 255, 255]


def test_twelve_bits_become_eight(tmp_path):
    """A TIFF of four grey pixels, which Pillow reads and cannot write."""
    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 6}
    pixels = bytes.fromhex("000 010 800 fff".replace(" ", ""))
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    (tmp_path / "a.tiff").write_bytes(struct.pack("<2sHI", b"II", 42, 14) + pixels + directory)
    assert np.asarray(open_image(tmp_path / "a.tiff"))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_damaged_exif_turns_nothing(image, tmp_path):
    image.save(tmp_path / "a.png", exif=b"Exif\0\0garbage")
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), np.asarray(image))


def test_a_photo_with_a_preview_beside_it_is_a_picture(image, tmp_path):
    image.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[image.resize((8, 4))])
    assert open_image(tmp_path / "a.jpg").size == image.size


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp"])
def test_a_film_is_refused(image, tmp_path, suffix):
    image.save(tmp_path / f"a{suffix}", save_all=True, append_images=[image.rotate(90)])
    with pytest.raises(InputError, match=rf"a\{suffix}: has several frames"):
        open_image(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tiff"])
def test_half_a_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"a\{suffix}: cannot be read: "):
        open_image(path)


def test_what_is_no_picture_is_refused(image, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_text("not a picture")
    (tmp_path / "b.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "c.tiff")
    image.save(tmp_path / "d.png")
    Image.fromarray(np.full((4, 4), 200, np.int32)).save(tmp_path / "e.tiff")
    for name, expected in {
        "a.png": "it is no image of a known format$",
        "b.heic": "HEIC; on a Mac, sips -s format png",
        "c.tiff": "no known range",
        "e.tiff": "no known range",
        "nowhere.png": "No such file",
        ".": "Is a directory",
    }.items():
        with pytest.raises(InputError, match=rf"cannot be read: .*{expected}"):
            open_image(tmp_path / name)
    monkeypatch.setattr("flux2_mlx.imaging.files.MAX_PIXELS", 400)
    with pytest.raises(InputError, match=r"d\.png: has more than 400 pixels; scale it down"):
        open_image(tmp_path / "d.png")


@pytest.mark.parametrize("size", [(64, 64), (103, 70), (1300, 1100), (4000, 501)])
def test_a_reference_has_the_size_that_was_told(size):
    picture = Image.new("RGB", size)
    assert reference_array(picture).shape == (1, *reference_size(picture), 3)


def test_eps_runs_no_program(tmp_path, monkeypatch):
    """Pillow has Ghostscript render it, whatever the file's name is."""
    ran = tmp_path / "ran"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {ran}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n")
    for read in (open_image, read_metadata):
        with pytest.raises(InputError, match=r"a\.png: cannot be read"):
            read(path)
    with pytest.raises(InputError, match="exists and is no preview"):
        check_preview(path)
    assert not ran.exists()


def test_sixteen_bits_take_no_wider_copies(tmp_path):
    """A wide image would take eight bytes a pixel more at once."""
    import tracemalloc

    Image.fromarray(np.zeros((2048, 2048), np.uint16)).save(tmp_path / "a.png")
    tracemalloc.start()
    open_image(tmp_path / "a.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 2048**2 + 2 * 256 * 2048 * 8
