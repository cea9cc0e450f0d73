import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import v2

from hierprompt.data.preprocess import (
    AUGMENT,
    PREPROCESS,
    Preprocess,
    augment,
    center_crop,
    decode,
    get_preprocess,
    random_crop,
    random_flip,
    random_resized_crop,
    to_square,
)
from hierprompt.engine.hosts import NORMALIZE


def generator(seed=0): return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def photo():
    random = np.random.default_rng(0)
    coarse = random.integers(0, 255, (12, 20, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((500, 333), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", PREPROCESS)
@pytest.mark.parametrize("size", [32, 56, 224])
@pytest.mark.parametrize("frame", [(500, 333), (333, 500), (300, 300), (20, 90)])
def test_stored_size_of_every_preset(name, size, frame, photo):
    preset = PREPROCESS[name]
    square = to_square(photo.resize(frame), preset, size)
    expected = size if preset.short_side in (None, 224) else round(preset.short_side * size / 224)
    assert square.shape == (3, expected, expected) and square.dtype == torch.uint8


def test_presets_are_the_specification():
    facts = {"paper": ("squash", "bilinear", False, "imagenet"), "released": ("squash", "bicubic", True, "inception"),
             "vpt": ("squash", "bilinear", False, "imagenet"), "noah": ("squash", "bicubic", True, "imagenet"),
             "noah_vpt": ("squash", "bicubic", True, "inception"), "ship": ("squash", "bicubic", True, "inception"),
             "sa2vp": ("squash", "bilinear", True, "inception"), "ssf": ("squash", "bicubic", True, "inception"),
             "da_vpt": ("short_side_crop", "bicubic", True, "imagenet"), "paper_fgvc": ("short_side_crop", "bilinear", True, "imagenet")}
    for name, fact in facts.items():
        preset = PREPROCESS[name]
        assert (preset.resize, preset.interpolation, preset.antialias, preset.normalize) == fact, name
    assert NORMALIZE["inception"] == ((0.5,) * 3, (0.5,) * 3)
    assert [get_preprocess(name, "fgvc").store_size(224) for name in ("paper", "released", "ssf")] == [256, 256, 248]


def test_squash_with_antialias_is_pil(photo):
    expected = np.asarray(photo.resize((56, 56), Image.Resampling.BICUBIC))
    assert np.array_equal(to_square(photo, PREPROCESS["released"], 56).permute(1, 2, 0), expected)


def test_short_side_crop_is_torchvision(photo):
    theirs = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])(photo)  # PIL input: PIL's bilinear
    ours = center_crop(to_square(photo, PREPROCESS["paper_fgvc"], 224), 224)
    assert torch.equal(ours, theirs)


def test_plain_bilinear_is_tensorflows_formula(photo):
    "Half-pixel centres, two samples per axis, no antialiasing: written out in numpy."
    pixels = np.asarray(photo, np.float64)
    def axis(length, size):
        place = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, None)
        low = np.minimum(np.floor(place).astype(int), length - 1)
        return low, np.minimum(low + 1, length - 1), place - low
    (y0, y1, fy), (x0, x1, fx) = axis(333, 56), axis(500, 56)
    top = pixels[y0][:, x0] * (1 - fx)[None, :, None] + pixels[y0][:, x1] * fx[None, :, None]
    bottom = pixels[y1][:, x0] * (1 - fx)[None, :, None] + pixels[y1][:, x1] * fx[None, :, None]
    expected = top * (1 - fy)[:, None, None] + bottom * fy[:, None, None]
    ours = to_square(photo, PREPROCESS["paper"], 56).permute(1, 2, 0).numpy()
    assert np.abs(ours - expected).max() <= 0.5 + 1e-3


def test_antialias_differs_when_shrinking_only():
    y, x = np.mgrid[:200, :200]
    checks = Image.fromarray((255 * ((x + y) % 2)).astype(np.uint8)).convert("RGB")
    pair = [to_square(checks, Preprocess("squash", "bilinear", aa), 40).float() for aa in (False, True)]
    assert pair[1].std() < 5 < (pair[0] - pair[1]).abs().max()


@pytest.mark.parametrize("mode,suffix", [("RGB", "png"), ("L", "png"), ("RGBA", "png"), ("P", "gif"), ("CMYK", "jpg"),
                                         ("1", "png"), ("LA", "png"), ("RGB", "webp")])
def test_every_mode_becomes_rgb(tmp_path, photo, mode, suffix):
    photo.convert(mode).save(tmp_path / f"x.{suffix}")
    image = decode(tmp_path / f"x.{suffix}")
    assert image.mode == "RGB" and image.size == photo.size


def test_deep_grey_is_scaled_not_clipped(tmp_path):
    Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(decode(tmp_path / "deep.png"))[..., 0].ravel(), np.arange(256))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_truncated_image_is_named(tmp_path, photo, suffix):
    path = tmp_path / f"cut.{suffix}"
    photo.save(path)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"cannot decode image .*cut.{suffix}"): decode(path)


def test_bad_preprocess_values():
    with pytest.raises(ValueError, match="only short_side_crop has a short side"): Preprocess("short_side_crop")
    with pytest.raises(ValueError, match="short_side=200 is less"): Preprocess("short_side_crop", short_side=200)
    with pytest.raises(KeyError, match="unknown preprocess preset 'papr'.*paper"): get_preprocess("papr")


def numbered(batch, side):
    "Every pixel tells its image, row and column in its three channels."
    n, y, x = torch.meshgrid(torch.arange(batch), torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([n, y, x], 1).to(torch.uint8)


def test_random_crop_is_a_window_of_each_image():
    images = numbered(200, 12)
    crops = random_crop(images, 9, generator())
    for i, crop in enumerate(crops):
        top, left = crop[1, 0, 0].item(), crop[2, 0, 0].item()
        assert torch.equal(crop, images[i, :, top:top + 9, left:left + 9])
    places = {(c[1, 0, 0].item(), c[2, 0, 0].item()) for c in crops}
    assert len(places) == 16  # all 4 x 4 places occur in 200 draws


def test_random_flip_mirrors_half():
    images = numbered(400, 6)
    flipped = random_flip(images, generator())
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(flipped[~mirrored], images[~mirrored]) and 160 < mirrored.sum() < 240


def test_resized_crop_is_interpolation_of_the_window(monkeypatch):
    from hierprompt.data import preprocess as module
    window = torch.tensor([[4., 8., 24., 30.]])
    monkeypatch.setattr(module, "_windows", lambda images, generator: window.expand(len(images), 4))
    coarse = torch.rand(2, 3, 6, 6, generator=generator()) * 200 + 20
    smooth = F.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 255).to(torch.uint8)
    ours = random_resized_crop(smooth, 32, generator())
    theirs = F.interpolate(smooth[:, :, 4:28, 8:38].float(), (32, 32), mode="bicubic").clamp(0, 255).round()
    assert (ours.float() - theirs)[:, :, 3:-3, 3:-3].abs().max() <= 1


def test_whole_window_resized_is_the_image_itself(monkeypatch):
    from hierprompt.data import preprocess as module
    images = numbered(3, 40)
    monkeypatch.setattr(module, "_windows", lambda images, generator: torch.tensor([[0., 0., 40., 40.]]).expand(3, 4))
    assert torch.equal(random_resized_crop(images, 40, generator()), images)


@pytest.mark.parametrize("name", AUGMENT)
def test_augment_is_seeded_and_keeps_type(name):
    images = (numbered(8, 40) * 5)
    one, two, other = (augment(images, name, 32, generator(seed)) for seed in (1, 1, 2))
    assert one.shape == (8, 3, 32, 32) and one.dtype == torch.uint8 and torch.equal(one, two)
    assert name == "none" or not torch.equal(one, other)


def test_augment_refuses_what_cannot_be_meant():
    images = numbered(2, 32)
    with pytest.raises(KeyError, match="unknown augmentation 'mixup'"): augment(images, "mixup", 32, generator())
    with pytest.raises(ValueError, match="needs larger stored images than 32 px"): augment(images, "crop_flip", 32, generator())
    with pytest.raises(ValueError, match="load the task with image_size=40"): augment(images, "none", 40)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", AUGMENT)
def test_a_cpu_generator_gives_the_same_views_on_a_gpu(name):
    images = numbered(16, 40) * 5
    here, there = augment(images, name, 32, generator()), augment(images.cuda(), name, 32, generator())
    assert there.is_cuda and (here.float() - there.cpu().float()).abs().max() <= 1
