"Tiny trees in the layouts in which users of MMSegmentation have ADE20K and PASCAL Context; the colour of a pixel tells its class."
from pathlib import Path

import numpy as np
from PIL import Image


def pair(stored, seed, size=(40, 32)):
    """(height, width, 3) image and (height, width) mask for a (width, height): vertical bands of the stored values, each in a colour of
    its own."""
    random = np.random.default_rng(seed)
    width, height = size
    mask = np.repeat(np.array(stored, np.uint8), -(-width // len(stored)))[:width][None].repeat(height, 0)
    colour = np.random.default_rng(7).integers(40, 216, (256, 3))[mask]
    return (colour + random.normal(0, 8, colour.shape)).clip(0, 255).astype(np.uint8), mask


def save(folder, names, stem, stored, seed, size):
    "One image (.jpg) and its mask (.png)."
    image, mask = pair(stored, seed, size)
    for home, suffix, array in ((names[0], ".jpg", image), (names[1], ".png", mask)):
        (folder / home).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / home / f"{stem}{suffix}")


def make_ade20k_tree(root, n=(6, 4), size=(40, 32), classes=150):
    "ADEChallengeData2016: 0 is unlabelled, class k is stored as k + 1."
    root = Path(root)
    for seed, (part, stem, count) in enumerate((("training", "ADE_train", n[0]), ("validation", "ADE_val", n[1]))):
        for i in range(count):
            stored = [0, 1 + i % classes, 1 + (7 * i + 3) % classes, classes]
            save(root, (f"images/{part}", f"annotations/{part}"), f"{stem}_{i + 1:08}", stored, 100 * seed + i, size)
    return root


def make_pascal_context_tree(root, n=(6, 4), size=(40, 32), classes=60):
    "VOCdevkit/VOC2010 with converted annotations: 0 is the background."
    root = Path(root)
    lists = root / "ImageSets/SegmentationContext"
    lists.mkdir(parents=True)
    for seed, (part, count) in enumerate(zip(("train", "val"), n)):
        stems = [f"2008_{1000 * (seed + 1) + i:06}" for i in range(count)]
        for i, stem in enumerate(stems):
            stored = [0, 1 + i % (classes - 1), 1 + (7 * i + 3) % (classes - 1), 255]
            save(root, ("JPEGImages", "SegmentationClassContext"), stem, stored, 100 * seed + i, size)
        (lists / f"{part}.txt").write_text("\n".join(stems) + "\n")
    return root
