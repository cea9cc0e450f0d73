"Tiny image trees in exactly the community layouts, with pictures whose classes can be learned: a colour and a stripe pattern per class."
import colorsys
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hierprompt.data.fgvc import FGVC
from hierprompt.data.tasks import Split
from hierprompt.data.vtab import VTAB, write_task


def class_picture(label: int, seed: int, size: tuple[int, int] = (40, 32)) -> np.ndarray:
    "(height, width, 3) uint8 for a (width, height): stripes in the class's colour and direction, with a random phase and noise."
    random = np.random.default_rng([label, seed])
    width, height = size
    y, x = np.mgrid[:height, :width]
    angle = np.pi * (label * 0.37 % 1)
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 0.8 + random.uniform(0, 2 * np.pi))
    colour = 255 * np.array(colorsys.hsv_to_rgb(label * 0.618 % 1, 0.9, 1.0))
    picture = (0.6 + 0.3 * wave)[..., None] * colour + random.normal(0, 12, (height, width, 1))
    return picture.clip(0, 255).astype(np.uint8)


def class_split(n: int, num_classes: int, seed: int, size: int = 32) -> Split:
    "n square pictures, labels 0, 1, 2, ... in turn."
    labels = [i % num_classes for i in range(n)]
    pictures = np.stack([class_picture(label, 1000 * seed + i, (size, size)) for i, label in enumerate(labels)])
    return Split(torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))


def make_vtab_tree(root,                 # ROOT of the layout
                   tasks=None,           # names; None: all 19
                   n=(24, 8, 12),        # images of train800, val200, test
                   size: int = 32,       # side of the pictures
                   classes: int = 4,     # how many of the task's classes occur, at most
                   suffix: str = ".jpg"):
    "VTAB-1k's layout with `n` images per list; load it with `strict=False`. Folder names are the shared archive's."
    for name in tasks or VTAB:
        count = min(classes, VTAB[name].num_classes)
        splits = [class_split(k, count, seed, size) for seed, k in enumerate(n)]
        write_task(Path(root) / VTAB[name].folders[0], *splits, suffix=suffix)
    return Path(root)


def make_fgvc_tree(root,                 # folder that will hold the sets' folders
                   tasks=None,           # names; None: all five
                   n=(4, 2, 3),          # images per class in train, val, test
                   classes: int = 3,
                   size=(48, 40)):       # width, height
    "The fine-grained sets' layout with VPT's json splits; ids count from 1; load it with `strict=False`."
    for name in tasks or FGVC:
        home = Path(root) / FGVC[name].folders[0]
        for seed, (part, number) in enumerate(zip(("train", "val", "test"), n)):
            entries = {}
            for label in range(classes):
                for i in range(number):
                    file = f"{label + 1:03}.kind_{label}/{part}_{i}.jpg"
                    _save(home / FGVC[name].images / file, class_picture(label, 1000 * seed + i, size))
                    entries[file] = label + 1
            (home / f"{part}.json").write_text(json.dumps(entries))
    return Path(root)


def make_folder_tree(root, classes=("amber", "jade", "onyx"), n: int = 10, split: bool = False, size=(40, 32)):
    "Class folders with `n` images each in mixed formats; with `split` inside train, val and test folders."
    for seed, part in enumerate(("train", "val", "test") if split else ("",)):
        for label, name in enumerate(classes):
            for i in range(n):
                _save(Path(root) / part / name / f"{i:03}{('.jpg', '.png')[i % 2]}", class_picture(label, 1000 * seed + i, size))
    return Path(root)


def _save(path: Path, picture: np.ndarray):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
