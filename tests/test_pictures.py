"From a file to what people see: orientation, transparency, deep grey, formats, frames, very large pictures, bad files."
import math
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from fixture_trees import class_picture, make_fgvc_tree
from PIL import ExifTags, Image

from hierprompt.data import preprocess as module
from hierprompt.data.benchmarks import load_task
from hierprompt.data.listing import BadPictures, Listing, read_splits
from hierprompt.data.preprocess import FORMATS, PREPROCESS, decode, picture_formats, picture_suffixes, to_square, whole_size

Turn = Image.Transpose
UNDONE = {1: None, 2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE, 6: Turn.ROTATE_90,
          7: Turn.TRANSVERSE, 8: Turn.ROTATE_270}  # orientation -> how an upright picture is stored
WRITES = [name for name in ("PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "QOI", "SGI", "PCX", "TGA")
          if name in picture_formats() and Image.init() is not None and name in Image.SAVE]


def pixels(image): return np.asarray(image).astype(int)


def quarters(width=48, height=32):
    "A picture that looks different in every orientation."
    array = np.full((height, width, 3), 40, np.uint8)
    array[:height // 2, :width // 2] = (230, 30, 30)
    array[height // 2:, :width // 2] = (30, 200, 30)
    return Image.fromarray(array)


def stored(orientation):
    picture, exif = quarters(), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return (picture.transpose(UNDONE[orientation]) if UNDONE[orientation] is not None else picture), exif


# orientation

@pytest.mark.parametrize("orientation", UNDONE)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "mpo"])
def test_orientation_is_applied(tmp_path, suffix, orientation):
    picture, exif = stored(orientation)
    options = dict(lossless=True) if suffix == "webp" else dict(quality=98, subsampling=0) if suffix in ("jpg", "mpo") else {}
    picture.save(tmp_path / f"x.{suffix}", exif=exif, **options)
    image = decode(tmp_path / f"x.{suffix}")
    assert image.size == (48, 32) and np.abs(pixels(image) - pixels(quarters())).max() <= (40 if options and suffix != "webp" else 0)


def test_orientation_of_xmp(tmp_path):
    picture, _ = stored(6)
    picture.save(tmp_path / "x.jpg", xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6"/></x:xmpmeta>')
    assert decode(tmp_path / "x.jpg").size == (48, 32)


@pytest.mark.parametrize("entry", [b"Exif\0\0", b"Exif\0\0rubbish", b"Exif\0\0II*\0\xff\xff\xff\xff",
                                   b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_entry_leaves_the_picture_as_it_is(tmp_path, entry):
    quarters().save(tmp_path / "x.jpg", exif=entry, dpi=(72, 72))
    assert decode(tmp_path / "x.jpg").size == (48, 32)


@pytest.mark.parametrize("value", [0, 9, 77])
def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path, value):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    quarters().save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(decode(tmp_path / "x.png"), quarters())


# transparency: on the left black, on the right nothing

def half_black(mode):
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:, :4] = 255
    image = Image.merge("LA", [Image.new("L", (8, 8)), Image.fromarray(alpha)])
    return image.convert("RGBA").convert(mode) if mode != "LA" else image


def palette(transparency):
    image = Image.new("P", (8, 8))
    image.paste(1, (4, 0, 8, 8))
    image.putpalette([0, 0, 0, 90, 90, 90])
    image.info["transparency"] = transparency
    return image


def premultiplied(image, path):
    "A TIFF whose tag says that colours are multiplied by alpha already."
    image.save(path)
    told, entry = path.read_bytes(), struct.pack("<HHI", 338, 3, 1)
    assert told.count(entry + b"\2\0") == 1
    path.write_bytes(told.replace(entry + b"\2\0", entry + b"\1\0"))


def keyed(mode, through):
    "No alpha channel: one colour that is seen through."
    array = np.zeros((8, 8) + ((3,) if mode == "RGB" else ()), np.uint16 if mode == "I;16" else np.uint8)
    array[:, 4:] = through
    return Image.fromarray(array)


TRANSPARENT = {
    "rgba.png": lambda p: half_black("RGBA").save(p), "la.png": lambda p: half_black("LA").save(p),
    "rgba.webp": lambda p: half_black("RGBA").save(p, lossless=True), "rgba.tif": lambda p: half_black("RGBA").save(p),
    "la.tif": lambda p: half_black("LA").save(p), "pa.tif": lambda p: half_black("PA").save(p),
    "rgba.tga": lambda p: half_black("RGBA").save(p),
    "La.tif": lambda p: premultiplied(half_black("LA"), p), "RGBa.tif": lambda p: premultiplied(half_black("RGBA"), p),
    "one.png": lambda p: palette(1).save(p, transparency=1), "one.gif": lambda p: palette(1).save(p, transparency=1),
    "many.png": lambda p: palette(b"\xff\x00").save(p, transparency=b"\xff\x00"),
    "l.png": lambda p: keyed("L", 77).save(p, transparency=77), "rgb.png": lambda p: keyed("RGB", 77).save(p, transparency=(77, 77, 77)),
    "deep.png": lambda p: keyed("I;16", 7777).save(p, transparency=7777), "rgba.jp2": lambda p: half_black("RGBA").save(p),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparency_lies_on_white(tmp_path, name):
    TRANSPARENT[name](tmp_path / name)
    seen = pixels(decode(tmp_path / name))
    assert seen[:, :4].max() == 0 and seen[:, 4:].min() == 255


def test_half_transparent_is_mixed_and_opaque_is_exact(tmp_path):
    random = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    random[:8, :, 3], random[8:, :, 3] = 255, 128
    Image.fromarray(random).save(tmp_path / "x.png")
    seen = pixels(decode(tmp_path / "x.png"))
    assert np.array_equal(seen[:8], random[:8, :, :3])
    assert np.abs(seen[8:] - (random[8:, :, :3] * (128 / 255) + 255 * (127 / 255))).max() <= 1


def test_premultiplied_grey_is_undone(tmp_path):
    array = np.stack([np.full((8, 8), 60, np.uint8), np.full((8, 8), 120, np.uint8)], -1)   # grey 60 of 120: 50 % of 127
    premultiplied(Image.merge("LA", [Image.fromarray(array[..., i].copy()) for i in (0, 1)]), tmp_path / "x.tif")
    assert np.abs(pixels(decode(tmp_path / "x.tif")) - (60 + 135)).max() <= 2


# deep grey

RAMP = np.linspace(0, 65535, 256)[None].repeat(4, 0)


def twelve_bits(path):
    "A little-endian TIFF of 12 bits a pixel."
    values = np.linspace(0, 4095, 256).astype(int)
    row = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values.reshape(-1, 2).tolist())
    tags = [(256, 4, 256), (257, 4, 4), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 4, 4),
            (279, 4, 4 * len(row))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + 4 * len(row)) + 4 * row + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0")


def pgm(path, most, plain=False):
    values = (RAMP / 65535 * most).astype(int)
    body = " ".join(map(str, values.ravel())).encode() if plain else values.astype(">u2").tobytes()
    path.write_bytes(f"P{2 if plain else 5} 256 4 {most}\n".encode() + body)


def deep(path, kind="u2", scale=1.0, **options): Image.fromarray((RAMP * scale).astype(kind)).save(path, **options)


DEEP = {
    "x.png": deep, "x.tif": deep, "big.tif": lambda p: deep(p, ">u2"), "x.jp2": deep,
    "packed.tif": lambda p: deep(p, compression="tiff_lzw"),
    "white_is_zero.tif": lambda p: Image.fromarray((65535 - RAMP).astype(np.uint16)).save(p, tiffinfo={262: 0}),
    "twelve.tif": twelve_bits, "x.pgm": lambda p: pgm(p, 65535), "ten.pgm": lambda p: pgm(p, 1023),
    "plain.pgm": lambda p: pgm(p, 65535, True),
    "floats.tif": lambda p: deep(p, "f4", 1 / 65535), "floats.pfm": lambda p: deep(p, "f4", 1 / 65535)}


@pytest.mark.parametrize("name", DEEP)
def test_deep_grey_is_scaled(tmp_path, name):
    DEEP[name](tmp_path / name)
    seen = pixels(decode(tmp_path / name))
    assert np.abs(seen[0] - np.arange(256)[:, None]).max() <= 1 and (seen == seen[:1]).all()


AMBIGUOUS = {name: np.array([values] * 2, kind) for name, kind, values in [
    ("whole", np.int32, [300, 9]), ("small", np.int32, [3, 0]), ("signed", np.int32, [-1, 9]), ("bytes", np.float32, [200, 9]),
    ("nan", np.float32, [.5, np.nan]), ("inf", np.float32, [.5, np.inf]), ("negative", np.float32, [-.1, .5]),
    ("above", np.float32, [1.001, .5])]}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_numbers_without_a_white_are_refused(tmp_path, name):
    Image.fromarray(AMBIGUOUS[name]).save(tmp_path / f"{name}.tif")
    with pytest.raises(ValueError, match=rf"cannot decode image .*{name}.tif: it holds numbers from .* save it with 8 or 16 bits"):
        decode(tmp_path / f"{name}.tif")


# other modes, formats, frames

@pytest.mark.parametrize("kind", WRITES)
def test_every_format_is_read_whatever_it_is_called(tmp_path, kind):
    lossless = {"WEBP": dict(lossless=True)}.get(kind, {})
    quarters().save(tmp_path / "x.PNG", kind, **lossless)
    assert np.array_equal(decode(tmp_path / "x.PNG"), quarters())


def test_every_format_has_suffixes():
    assert {"JPEG", "PNG", "TIFF", "WEBP"} <= set(picture_formats()) <= set(FORMATS)
    assert {".jpg", ".jpeg", ".jfif", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".ppm", ".mpo"} <= picture_suffixes()
    assert not {".eps", ".ps", ".pdf", ".wmf", ".emf", ".psd", ".h5", ".mpg", ".txt"} & picture_suffixes()


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_keeps_its_colours(tmp_path, suffix):
    quarters().convert("CMYK").save(tmp_path / f"x.{suffix}")
    assert np.abs(pixels(decode(tmp_path / f"x.{suffix}")) - pixels(quarters()))[4:12, 4:20].max() <= 6


def test_lab_and_one_bit(tmp_path):
    Image.new("RGB", (8, 8), (200, 40, 40)).convert("LAB").save(tmp_path / "lab.tif")
    assert np.abs(pixels(decode(tmp_path / "lab.tif")) - (200, 40, 40)).max() <= 4
    Image.fromarray(np.eye(8) > 0).save(tmp_path / "bits.png")
    assert np.array_equal(pixels(decode(tmp_path / "bits.png"))[..., 0], 255 * np.eye(8))


@pytest.mark.parametrize("suffix", ["gif", "png", "tif", "webp"])
def test_of_several_frames_the_first(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:], **(dict(lossless=True) if suffix == "webp" else {}))
    with Image.open(tmp_path / f"x.{suffix}") as image: assert image.n_frames == 3
    assert np.array_equal(decode(tmp_path / f"x.{suffix}"), frames[0])


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n"
FOREIGN = {"x.eps": POSTSCRIPT, "ps.png": POSTSCRIPT, "x.pdf": b"%PDF-1.4\n", "x.wmf": b"\xd7\xcd\xc6\x9a\0\0" + bytes(60),
           "x.h5": b"\x89HDF\r\n\x1a\n" + bytes(60), "x.fits": b"SIMPLE  =                    T" + b" " * 2850,
           "x.psd": b"8BPS\0\1" + bytes(60), "x.png": b"<html>", "x.gif": b"GIF89a"}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_raster_picture_is_refused_and_starts_nothing(tmp_path, name, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    (tmp_path / "bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / name).write_bytes(FOREIGN[name])
    with pytest.raises(ValueError, match=f"cannot decode image .*{name}: "): decode(tmp_path / name)
    assert not (tmp_path / "called").exists()


def test_empty_missing_and_folder(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    for name, why in (("empty.png", "the file is empty"), ("folder.png", "Is a directory"), ("none.png", "No such file")):
        with pytest.raises(ValueError, match=f"cannot decode image .*{name}: .*{why}"): decode(tmp_path / name)


# very large pictures

def chunk(kind, body): return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_bomb_is_refused_with_the_remedy(tmp_path, side):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))
    with pytest.warns(Image.DecompressionBombWarning) if side == 10_000 else pytest.MonkeyPatch.context():
        with pytest.raises(ValueError, match="x.png: .*make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS"): decode(tmp_path / "x.png")


def photo(width, height):
    coarse = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("name", ["backbone", "clip", "paper"])
def test_a_large_picture_is_reduced_and_looks_the_same(tmp_path, monkeypatch, suffix, name):
    photo(1200, 900).save(tmp_path / f"x.{suffix}")
    preset, whole = PREPROCESS[name], decode(tmp_path / f"x.{suffix}", 128)
    assert whole.size == (1200, 900)                                     # of an ordinary size: as it is
    monkeypatch.setattr(module, "LARGE", 100_000)
    assert decode(tmp_path / f"x.{suffix}").size == (1200, 900)          # nobody said how small it may be
    small = decode(tmp_path / f"x.{suffix}", preset.least(32))
    assert preset.least(32) == 128 <= min(small.size) and math.prod(small.size) <= 100_000
    both = [to_square(image, preset, 32).int() for image in (whole, small)]
    assert (both[0] - both[1]).abs().max() <= (4 if preset.antialias else 30) and (both[0] - both[1]).abs().float().mean() < 2


def test_a_large_jpeg_is_never_held_whole(tmp_path, monkeypatch):
    photo(800, 800).save(tmp_path / "x.jpg")
    monkeypatch.setattr(module, "LARGE", 10_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
    with pytest.warns(Image.DecompressionBombWarning): assert decode(tmp_path / "x.jpg", 64).size == (100, 100)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match="it has 640,000 pixels, more than 500,000"):
        decode(tmp_path / "x.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode(tmp_path / "x.jpg").size == (800, 800)


def test_a_reduced_picture_is_upright(tmp_path, monkeypatch):
    picture, exif = quarters(480, 320).transpose(Turn.ROTATE_90), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture.save(tmp_path / "x.jpg", exif=exif)
    monkeypatch.setattr(module, "LARGE", 10_000)
    small = decode(tmp_path / "x.jpg", 40)
    assert small.size == (60, 40) and np.abs(pixels(small)[4:16, 4:24] - (230, 30, 30)).max() < 12


def test_of_a_long_strip_only_the_middle_is_resized():
    strip = Image.fromarray(np.arange(4000, dtype=np.uint32).astype(np.uint8)[None].repeat(2, 0)).convert("RGB")
    for image in (strip, strip.transpose(Turn.ROTATE_90)):
        assert to_square(image, PREPROCESS["clip"], 32).shape == (3, 32, 32)
    shorter = strip.crop((2000 - 17, 0, 2000 + 17, 2))                   # 17 times as long: the middle decides
    assert (to_square(shorter, PREPROCESS["clip"], 32).int() - to_square(strip, PREPROCESS["clip"], 32).int()).abs().max() <= 6


# sizes

@pytest.mark.parametrize("size", [True, "32", None, 32.0, (32, 32), [32], np.float64(32), torch.zeros(2)])
def test_image_sizes_of_a_wrong_type(size, tmp_path):
    for call in (lambda: whole_size(size), lambda: load_task("folder", tmp_path, image_size=size),
                 lambda: load_task("emoji", image_size=size)):
        with pytest.raises(TypeError, match="image_size="): call()


@pytest.mark.parametrize("size", [0, -1, np.int64(0)])
def test_image_sizes_below_one(size, tmp_path):
    for call in (lambda: PREPROCESS["paper"].store_size(size), lambda: load_task("folder", tmp_path, image_size=size)):
        with pytest.raises(ValueError, match="image_size="): call()


def test_numpy_sizes_are_sizes():
    assert whole_size(np.int64(32)) == 32 and type(whole_size(np.uint8(32))) is int


# many files

def test_all_bad_files_of_all_parts_are_named_at_once(tmp_path):
    parts, bad = {}, []
    for part in ("train", "val", "test"):
        for i in range(9):
            file = tmp_path / f"{part}{i}.png"
            Image.fromarray(class_picture(i, 0)).save(file)
            if i % 2: file.write_bytes(b"" if i % 3 else file.read_bytes()[:80])
            if i % 2: bad.append(file.name)
        parts[part] = Listing(tmp_path, [f"{part}{i}.png" for i in range(9)], [0] * 9)
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(BadPictures) as caught: read_splits(parts, PREPROCESS["paper"], 16, cache, "demo")
        text = str(caught.value)
        assert len(caught.value.faults) == 12 == len(bad) and "12 of 27 images cannot be used" in text and "and 2 more" in text
        assert all(name in text for name in bad[:10]) and "the file is empty" in text and "truncated" in text
        assert not list((tmp_path / "cache").glob("*.npy"))


def test_a_benchmark_names_all_its_bad_files(tmp_path):
    make_fgvc_tree(tmp_path, ["cub200"])
    home = tmp_path / "CUB_200_2011/images/001.kind_0"
    for name in ("train_0.jpg", "val_1.jpg", "test_2.jpg"): (home / name).write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match=r"(?s)3 of 27 images.*train_0.jpg.*val_1.jpg.*test_2.jpg"):
        load_task("cub200", tmp_path, image_size=32, strict=False)
