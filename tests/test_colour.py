"""Colours of embedded profiles: read as what they show, held against the standards' own formulas."""

import itertools
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from flux2_mlx import save_image
from flux2_mlx.imaging.colour import to_srgb
from flux2_mlx.imaging.files import open_image
from flux2_mlx.inputs import Inputs
from flux2_mlx.training.dataset import read_dataset
from tests.test_images import SETTINGS

D50 = 0.9642, 1.0, 0.8249


def fixed(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc(space, tags, pcs=b"XYZ ", kind=b"mntr"):
    """The bytes of an ICC profile (ICC.1:2001) with these tags, and its description and white point."""
    text = b"test\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"wtpt": b"XYZ \0\0\0\0" + fixed(*D50),
        **tags,
    }
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"test", 0x02400000, kind, space, pcs)
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(*D50)
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + body


def gamma(value):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def rgb_profile(primaries, value):
    """A display's profile: columns (X, Y, Z), adapted to D50, and one gamma."""
    tags = {
        name: b"XYZ \0\0\0\0" + fixed(*xyz) for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)
    }
    return icc(b"RGB ", tags | {name: gamma(value) for name in (b"rTRC", b"gTRC", b"bTRC")})


# ICC's own figures for Display P3 (with the curve of sRGB nearly its gamma 2.2) and Adobe RGB (1998).
P3 = rgb_profile([(0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407)], 2.2)
GREY = icc(b"GRAY", {b"kTRC": gamma(1.8)})
# Linear Display P3 to linear sRGB, of CSS Color 4, section 18.
P3_TO_SRGB = np.array(
    [[1.2249401763, -0.2249401763, 0], [-0.0420569547, 1.0420569547, 0], [-0.0196375546, -0.0786360456, 1.0982736001]]
)


def encode(linear):
    """IEC 61966-2-1: linear light to levels of sRGB."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def cmyk_profile():
    """A printer whose colour is neutral: 100 - 50 * (C + M + Y) / 3 in L* without black, and black with it."""
    nodes = [(c, m, y, k) for c, m, y, k in itertools.product((0, 1), repeat=4)]
    grid = bytes(v for c, m, y, k in nodes for v in (0 if k else round(255 - 127.5 * (c + m + y) / 3), 128, 128))
    identity = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + identity * 4 + grid + identity * 3
    return icc(b"CMYK", {b"A2B0": lut}, pcs=b"Lab ", kind=b"prtr")


def patches(mode="RGB"):
    levels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    levels[:8] = np.array([[230, 40, 30], [30, 90, 220], [255, 255, 255], [0, 0, 0]], np.uint8).repeat(24, 0)
    return Image.fromarray(levels).convert(mode)


def shown_p3(image):
    return encode((np.asarray(image.convert("RGB")) / 255) ** 2.2 @ P3_TO_SRGB.T)


def off(image, expected):
    return np.abs(np.asarray(image, np.float64) - expected).max()


@pytest.mark.parametrize(
    ("suffix", "options"), [("png", {}), ("tiff", {}), ("webp", {"lossless": True}), ("jpg", {"quality": 100})]
)
def test_display_p3_becomes_srgb(tmp_path, suffix, options):
    path = tmp_path / f"a.{suffix}"
    image = Image.new("RGB", (64, 64), (230, 40, 30)) if suffix == "jpg" else patches()
    image.save(path, icc_profile=P3, **options)
    opened = open_image(path)
    assert "icc_profile" not in opened.info
    with Image.open(path) as bare:
        assert off(opened, shown_p3(bare)) <= 2
        assert off(bare, shown_p3(bare)) > 20


def test_a_palette_and_transparency_keep_their_alpha(tmp_path):
    image = patches("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(tmp_path / "a.png", icc_profile=P3)
    opened = open_image(tmp_path / "a.png", alpha=True)
    assert np.array_equal(opened.getchannel("A"), image.getchannel("A"))
    assert off(opened.convert("RGB"), shown_p3(image)) <= 2
    palette = patches().quantize(16)
    palette.save(tmp_path / "b.png", icc_profile=P3)
    assert off(open_image(tmp_path / "b.png"), shown_p3(palette)) <= 2


@pytest.mark.parametrize("bits", [8, 16])
def test_grey_of_another_gamma_becomes_srgb(tmp_path, bits):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(levels if bits == 8 else levels.astype(np.uint16) * 257)
    image.save(tmp_path / "a.png", icc_profile=GREY)
    opened = np.asarray(open_image(tmp_path / "a.png"))
    assert off(opened, encode((levels / 255) ** 1.8)[..., None]) <= 2


def test_grey_with_a_profile_for_colours_is_grey(tmp_path):
    patches("L").save(tmp_path / "a.png", icc_profile=P3)
    assert off(open_image(tmp_path / "a.png"), shown_p3(patches("L"))) <= 2


def test_cmyk_becomes_what_its_profile_says(tmp_path):
    inks = np.array([[[0, 0, 0, 0], [255, 255, 255, 0], [0, 0, 0, 255]]], np.uint8).repeat(8, 1).repeat(8, 0)
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.tiff", icc_profile=cmyk_profile())
    grey = encode(((50 + 16) / 116) ** 3)  # L* of 50, CIE 1976
    expected = np.array([255, grey, 0]).repeat(8)[:, None]
    assert off(open_image(tmp_path / "a.tiff"), expected) <= 2


def test_pixels_of_srgb_keep_their_values(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    patches().save(tmp_path / "a.png", icc_profile=profile)
    opened = open_image(tmp_path / "a.png")
    assert np.array_equal(opened, patches())
    assert "icc_profile" not in opened.info
    plain = patches()
    assert to_srgb(plain) is plain


@pytest.mark.parametrize(
    ("mode", "profile", "reason"),
    [
        ("RGB", b"no profile at all", "cannot open profile"),
        ("RGB", GREY, "it is for GRAY"),
        ("CMYK", P3, "it is for RGB"),
    ],
)
def test_a_profile_that_cannot_be_used_is_told_once(tmp_path, mode, profile, reason):
    path = tmp_path / "a.tiff"
    patches(mode).save(path, icc_profile=profile)
    with pytest.warns(
        UserWarning, match=rf"a\.tiff: the colour profile cannot be used \({reason}.*taken for sRGB"
    ) as told:
        opened = open_image(path)
    assert len(told) == 1
    assert np.array_equal(opened, patches(mode).convert("RGB"))


def test_a_missing_colour_library_is_told(tmp_path, monkeypatch):
    def missing(*_):
        raise ImportError("no littlecms")

    monkeypatch.setattr(ImageCms, "ImageCmsProfile", missing)
    patches().save(tmp_path / "a.png", icc_profile=P3)
    with pytest.warns(UserWarning, match="no littlecms"):
        assert np.array_equal(open_image(tmp_path / "a.png"), patches())


def test_a_mask_is_data(tmp_path):
    """Its numbers say how much is inpainted, whatever colours a profile means by them."""
    levels = np.linspace(0, 255, 64).round().astype(np.uint8)[None].repeat(64, 0)
    Image.fromarray(levels).save(tmp_path / "mask.png", icc_profile=GREY)
    patches().resize((64, 64)).save(tmp_path / "a.png", icc_profile=P3)
    opened = Inputs(prompt="", init_image=str(tmp_path / "a.png"), mask=str(tmp_path / "mask.png")).opened()
    assert np.array_equal(np.asarray(opened.mask)[..., 0], levels)


def test_images_of_pillow_are_converted_too(tmp_path):
    patches().save(tmp_path / "a.png", icc_profile=P3)
    with Image.open(tmp_path / "a.png") as image:
        opened = Inputs(prompt="", image=image, init_image=image).opened()
    assert off(opened.images[0], shown_p3(patches())) <= 2
    assert off(opened.init_image, shown_p3(patches())) <= 2
    assert "icc_profile" in image.info


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_what_a_mask_keeps_looks_the_same_in_every_format(pipe, tmp_path, suffix):
    before = Image.new("RGB", (96, 64), (230, 40, 30))
    before.save(tmp_path / "a.png", icc_profile=P3)
    mask = Image.new("L", before.size)
    mask.paste(255, (48, 32, 96, 64))
    image = pipe("a", init_image=tmp_path / "a.png", mask=mask, num_steps=1, seed=3, max_sequence_length=16).images[0]
    image.info["icc_profile"] = P3  # as a caller's image has it
    written = save_image(image, tmp_path / f"b.{suffix}", SETTINGS.metadata(), "")
    with Image.open(written) as reread:
        assert "icc_profile" not in reread.info
        kept = np.asarray(reread.convert("RGB"))[:, :24]
    assert off(kept, shown_p3(before)[:, :24]) <= (2 if suffix == "png" else 8)
    assert off(before, shown_p3(before)) > 20


def test_a_data_set_is_read_in_srgb(tmp_path):
    for k in range(3):
        patches().save(tmp_path / f"{k}.png", icc_profile=b"broken" if k == 0 else P3)
        (tmp_path / f"{k}.txt").write_text("a patch")
    with pytest.warns(UserWarning, match=r"0\.png: the colour profile cannot be used") as told:
        assert len(read_dataset(tmp_path, 64)) == 3
    assert len(told) == 1
