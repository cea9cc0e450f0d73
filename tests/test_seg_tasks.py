"Segmentation tasks: what the embedded ones are made of, trees on disk, MMSegmentation's readers, and what is said of a spoilt tree."
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from seg_trees import make_ade20k_tree, make_pascal_context_tree, pair

from hierprompt.core import read_json, sha256_file
from hierprompt.data.embedded.packs import content_hash, find_packs, read_pack
from hierprompt.data.embedded.scenes import draw_scenes, ground, laid, lit
from hierprompt.data.tasks import PARTS
from hierprompt.seg import compose
from hierprompt.seg.compose import (
    KINDS,
    RECIPES,
    STYLE,
    TILE,
    ZONES,
    climate_maps,
    climate_places,
    climate_samples,
    object_samples,
    scene_objects,
    spread_places,
    stripe_part,
)

tasks = pytest.importorskip("hierprompt.seg.tasks", exc_type=ImportError)
import torch
from mmengine.registry import DefaultScope
from mmseg.evaluation import IoUMetric

from hierprompt.pipeline.segmentation_cells import most_frequent
from hierprompt.seg.tasks import (
    DATASETS,
    LOAD,
    SEG_TASKS,
    coloured,
    dataset_config,
    inspect_pair,
    overlay,
    read_mask,
    show_samples,
    verify,
    write_task,
)

THEIRS = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}]


@pytest.fixture(autouse=True)
def scope():
    "Names of transforms are MMSegmentation's, whatever a runner has left behind."
    with DefaultScope.overwrite_default_scope("mmseg"): yield


@pytest.fixture(scope="module")
def maps(): return climate_maps()


@pytest.fixture(scope="module")
def places(maps): return {part: climate_places(maps[1], part) for part in PARTS}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    "Both embedded tasks, small; nobody writes into them."
    home = tmp_path_factory.mktemp("written")
    return {name: write_task(name, home / name, 32, train=6, val=4, test=5) for name in RECIPES}


class Copies(dict):
    "name -> a copy of that tree, made when it is asked for."
    def __init__(self, originals, home): self.originals, self.home = originals, home

    def __missing__(self, name): return self.setdefault(name, shutil.copytree(self.originals[name], self.home / name))


@pytest.fixture(scope="module")
def originals(written, tmp_path_factory):
    home = tmp_path_factory.mktemp("published")
    return written | {"ade20k": make_ade20k_tree(home / "ade20k"), "pascal_context": make_pascal_context_tree(home / "pascal_context")}


@pytest.fixture
def trees(originals, tmp_path): return Copies(originals, tmp_path)


def contents(root): return {path.relative_to(root).as_posix(): sha256_file(path) for path in sorted(root.rglob("*")) if path.is_file()}


# --- packs


@pytest.mark.parametrize("name", ["climate_maps", "objects"])
def test_packs_are_the_ones_described(name):
    pack = read_pack(name)
    assert content_hash(pack.images, pack.columns) == pack.about["content"]
    assert (find_packs().parents[1] / pack.about["built_by"]).is_file() and pack.about["bytes"] < 3e6
    assert tuple(pack.columns["class_names"]) == {"climate_maps": ZONES, "objects": KINDS}[name]


def test_the_maps_agree_with_the_koeppen_task(maps):
    "Same picture, same zones: every stored tile is found where it says it lies, and its label covers more than 80 % of it."
    (earth, zone), pack = maps, read_pack("koeppen")
    for i in range(0, len(pack), 7):
        window = np.s_[pack.columns["top"][i]:pack.columns["top"][i] + 30, pack.columns["left"][i]:pack.columns["left"][i] + 30]
        assert (earth[window] == np.asarray(pack.images[i])).all()
        assert (zone[window] == 1 + pack.columns["label"][i]).mean() > .8
        assert (stripe_part(int(pack.columns["left"][i]) // 300) == "test") == (pack.columns["part"][i] == 2)


def test_the_map_is_registered_with_the_picture(maps):
    "Blue of open water falls on sea, and worse so if the map is moved or turned over."
    earth, zone = (array[:2240] for array in maps)
    water = earth[..., 2] > 1.6 * earth[..., 0] + 3
    agreement = [
        (water[::3, ::3] == (other[::3, ::3] == 0)).mean()
        for other in (zone, np.roll(zone, 8, 0), np.roll(zone, 8, 1), zone[::-1], zone[:, ::-1])
    ]
    assert agreement[0] > .98 and max(agreement[1:]) < agreement[0] - .005


def test_objects_are_unseen_in_test():
    facts = read_pack("objects").columns
    concepts = [set(facts["concept"][facts["part"] == p]) for p in range(3)]
    assert not concepts[0] & concepts[1] and not concepts[0] & concepts[2] and not concepts[1] & concepts[2]
    assert [set(facts["vendor"][facts["part"] == p]) for p in range(3)] == [
        {"twemoji", "fluent"},
        {"twemoji", "fluent"},
        {"noto_v1", "fxemoji"},
    ]
    assert all(set(facts["label"][facts["part"] == p]) == set(range(1, 11)) for p in range(3))


def test_objects_are_cut_to_their_bounds():
    for image in read_pack("objects").images[::10]:
        opaque = np.asarray(image)[..., 3] > 127
        assert (
            image.mode == "RGBA"
            and max(image.size) <= 192
            and opaque.any(0)[[0, -1]].all()
            and opaque.any(1)[[0, -1]].all()
            and not opaque.all()
        )


# --- climate


def test_tiles_lie_in_their_own_stripes_on_land(maps, places):
    zone = maps[1]
    assert [len(places[part]) for part in PARTS] == [1345, 166, 240]
    for part, found in places.items():
        assert {stripe_part(left // 300) for _, left in found.tolist()} == {part} and (found[:, 1] % 300).max() + TILE <= 300
        assert found[:, 0].max() + TILE <= .83 * 2700 and all((zone[y:y + TILE, x:x + TILE] > 0).mean() >= .5 for y, x in found[::9])


def test_only_training_tiles_overlap(maps, places):
    depth = {part: np.zeros(maps[1].shape, np.uint8) for part in PARTS}
    for part, found in places.items():
        for y, x in found: depth[part][y:y + TILE, x:x + TILE] += 1
    assert [depth[part].max() for part in PARTS] == [4, 1, 1]
    assert sum((d > 0).astype(int) for d in depth.values()).max() == 1


def test_every_zone_is_in_every_part(maps, places):
    for part, found in places.items():
        pixels = sum(np.bincount(maps[1][y:y + TILE, x:x + TILE].ravel(), minlength=6) for y, x in found)
        assert pixels.min() / pixels.sum() > .05, part


def test_a_tile_of_its_own_size_is_cut_from_the_maps(maps):
    for name, image, mask in climate_samples("val", 3, TILE, seed=2):
        y, x = map(int, name.split("_"))
        assert (np.asarray(image) == maps[0][y:y + TILE, x:x + TILE]).all() and (np.asarray(mask) == maps[1][y:y + TILE, x:x + TILE]).all()


def test_masks_are_resized_without_new_values():
    for (*_, mask), (*_, large) in zip(climate_samples("train", 4, TILE, 0), climate_samples("train", 4, 2 * TILE, 0)):
        assert (np.asarray(mask).repeat(2, 0).repeat(2, 1) == np.asarray(large)).all()


# --- objects


def test_masks_of_objects_are_exact():
    "Below the mask's edge the picture is the ground's, above it the drawing's; the mask is where the drawing is more than half opaque."
    pack, textures = read_pack("objects"), read_pack("textures").images
    for i in (0, 77, 300):
        scenes = draw_scenes([i], STYLE, np.random.default_rng(i), test=False)
        image, mask = map(np.asarray, compose.compose(pack.images, pack.columns["label"], textures, scenes, 96))
        top = laid(pack.images[i], scenes[0], 96)
        alpha, place = np.zeros((96, 96), np.uint8), [
            round(float(share) * (96 - side)) for share, side in zip(scenes[0]["place"], top.size)
        ]
        alpha[place[1]:place[1] + top.height, place[0]:place[0] + top.width] = np.asarray(top)[..., 3]
        assert ((mask == pack.columns["label"][i]) == (alpha > 127)).all() and set(np.unique(mask)) == {0, pack.columns["label"][i]}
        below = np.asarray(lit(ground(textures, scenes[0], 96), scenes[0]["light"]))
        assert (image[alpha == 0] == below[alpha == 0]).all() and (np.abs(image[alpha > 250].astype(int) - below[alpha > 250]) > 2).any(
            -1
        ).mean() > 0.7


def test_a_later_object_covers_an_earlier_one():
    square = lambda colour: Image.new("RGBA", (20, 20), colour)
    scenes = draw_scenes([0, 1], STYLE, np.random.default_rng(0), test=False)
    scenes["angle"], scenes["size"], scenes["light"], scenes["place"] = 0, .5, 1, [(.3, .3), (.5, .5)]
    image, mask = map(np.asarray, compose.compose([square("red"), square("blue")], [4, 9], [Image.new("L", (512, 512))] * 3, scenes, 60))
    assert set(np.unique(mask)) == {0, 4, 9} and (image[mask == 4] == (255, 0, 0)).all() and (image[mask == 9] == (0, 0, 255)).all()
    assert (mask == 9).sum() == 900 > (mask == 4).sum() > 200


@pytest.mark.parametrize("part", PARTS)
def test_scenes_show_drawings_of_their_part(part):
    pack, rng = read_pack("objects"), np.random.default_rng(0)
    shown = [scene_objects(pack, part, rng) for _ in range(60)]
    assert {len(some) for some in shown} == {1, 2, 3}
    assert {pack.columns["part"][i] for some in shown for i in some} == {PARTS.index(part)} and len(
        {pack.columns["label"][i] for some in shown for i in some}
    ) == 10


def test_test_scenes_lie_on_the_other_halves(monkeypatch):
    seen = []
    monkeypatch.setattr(compose, "draw_scenes", lambda *given, **named: seen.append(draw_scenes(*given, **named)) or seen[-1])
    for part in PARTS: list(object_samples(part, 10, 16, 0))
    columns = [(int(row["window"][1]), int(row["window"][1] + row["window"][2])) for scenes in seen for row in scenes]
    split = sum(map(len, seen[:20]))
    assert max(right for _, right in columns[:split]) <= 256 <= min(left for left, _ in columns[split:])


def test_places_are_towards_different_corners():
    for seed in range(20):
        found = spread_places(3, np.random.default_rng(seed))
        assert len({tuple(row) for row in (found > .5).tolist()}) == 3 and 0 <= found.min() and found.max() <= 1


# --- trees


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_arguments_give_the_same_files(name, written, tmp_path):
    again, other = (write_task(name, tmp_path / str(seed), 32, 6, 4, 5, seed) for seed in (0, 1))
    assert contents(again) == contents(written[name]) != contents(other)


@pytest.mark.parametrize("name", RECIPES)
def test_parts_do_not_depend_on_each_others_sizes(name, written, tmp_path):
    other = contents(write_task(name, tmp_path / name, 32, 3, 1, 5))
    whole = contents(written[name])
    assert all(whole[key] == value for key, value in other.items() if key != "task.json")
    assert {key for key in whole if "/test/" in key} == {key for key in other if "/test/" in key}


@pytest.mark.parametrize("name", RECIPES)
def test_a_tree_is_palette_pictures_and_a_record(name, written):
    root, task, about = written[name], SEG_TASKS[name], read_json(written[name] / "task.json")
    assert (
        about["counts"] == {"train": 6, "val": 4, "test": 5}
        and about["classes"] == task.classes
        and about["image_size"] == 32
        and about["seed"] == 0
    )
    assert sorted(about["packs"]) == sorted(RECIPES[name].packs) and len(set(about["sha256"].values())) == 3
    for part, n in about["counts"].items():
        names = [sorted(path.name for path in (root / folder / part).iterdir()) for folder in ("images", "annotations")]
        assert names[0] == names[1] and len(names[0]) == n
        for file in names[0]:
            with Image.open(root / "annotations" / part / file) as mask, Image.open(root / "images" / part / file) as image:
                assert mask.mode == "P" and image.mode == "RGB" and mask.size == image.size == (32, 32)
                assert mask.getpalette()[:3 * task.num_classes] == [value for colour in task.palette for value in colour]
                assert (np.asarray(mask.convert("RGB")) == coloured(np.asarray(mask), task.palette)).all()


def test_an_own_tree_is_replaced_and_anything_else_is_not(tmp_path):
    root = write_task("seg_objects", tmp_path / "tree", 16, 2, 1, 1)
    write_task("seg_climate", root, 16, 1, 1, 1)
    assert read_json(root / "task.json")["name"] == "seg_climate" and len(list((root / "images/train").iterdir())) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(FileExistsError, match="holds something else than a task: give another root"):
            write_task("seg_objects", tmp_path / name, 16, 1, 1, 1)
    (tmp_path / "empty").mkdir()
    write_task("seg_objects", tmp_path / "empty", 16, 1, 1, 1)
    assert (
        sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "mine", "tree"]
        and (tmp_path / "mine/letter.txt").read_text() == "dear"
    )


def test_a_move_that_fails_puts_the_old_tree_back(tmp_path, monkeypatch):
    root = write_task("seg_objects", tmp_path / "tree", 16, 2, 1, 1)
    before, rename = contents(root), tasks.Path.rename
    def failing(self, target):
        if self.suffix == ".tmp": raise OSError("disk is gone")
        return rename(self, target)
    monkeypatch.setattr(tasks.Path, "rename", failing)
    with pytest.raises(OSError, match="disk is gone"): write_task("seg_objects", root, 16, 1, 1, 1)
    assert contents(root) == before and [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    root = write_task("seg_objects", tmp_path / "tree", 16, 2, 1, 1)
    before = contents(root)
    def interrupt(*_): raise KeyboardInterrupt
    monkeypatch.setattr(tasks, "_part_hash", interrupt)
    for place in (root, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt): write_task("seg_objects", place, 16, 1, 1, 1)
    assert contents(root) == before and [path.name for path in tmp_path.iterdir()] == ["tree"]


@pytest.mark.parametrize("name, changed, error, text", [
    ("seg_climat", {}, KeyError, "unknown segmentation task 'seg_climat'. Did you mean 'seg_climate'?"),
    ("pascal_context", {}, ValueError, "pascal_context is not made here: unpack VOC2010"),
    ("seg_climate", {"test": 241}, ValueError, "test=241: there are 240 test tiles"),
    ("seg_climate", {"val": 0}, ValueError, "val=0: there are 166 val tiles"),
    ("seg_objects", {"train": 0}, ValueError, "train=0: at least one scene is needed"),
    ("seg_objects", {"image_size": 8}, ValueError, "image_size=8: pictures of less than 16 px")])
def test_wrong_arguments_of_write_task(name, changed, error, text, tmp_path):
    with pytest.raises(error) as caught:
        write_task(name, tmp_path / "tree", **({"image_size": 16, "train": 1, "val": 1, "test": 1} | changed))
    assert text in str(caught.value) and not list(tmp_path.iterdir())


# --- MMSegmentation's readers


def test_the_table_of_tasks():
    assert {name: (t.num_classes, t.background, t.reduce_zero_label, t.group) for name, t in SEG_TASKS.items()} == {
        "seg_climate": (6, None, False, "embedded"),
        "seg_objects": (11, 0, False, "embedded"),
        "ade20k": (150, None, True, "published"),
        "pascal_context": (60, 0, False, "published"),
    }
    for task in SEG_TASKS.values():
        assert len(task.palette) == task.num_classes == len(set(task.classes)) and task.source and task.licence and task.origin
        assert len({tuple(colour) for colour in task.palette}) >= task.num_classes - 7  # the published palettes use a few colours twice
    assert SEG_TASKS["ade20k"].published == {"train": 20210, "val": 2000} and SEG_TASKS["pascal_context"].published == {
        "train": 4998,
        "val": 5105,
    }


@pytest.mark.parametrize(
    "name, kind",
    [
        ("seg_climate", "EmbeddedSegDataset"),
        ("seg_objects", "EmbeddedSegDataset"),
        ("ade20k", "ADE20KDataset"),
        ("pascal_context", "PascalContextDataset"),
    ],
)
def test_every_tree_is_read_by_its_class(name, kind, trees):
    task = SEG_TASKS[name]
    sizes = {"embedded": (6, 4, 5), "published": (6, 4, 4)}[task.group]
    for split, n in zip(PARTS, sizes):
        dataset = DATASETS.build(dataset_config(name, trees[name], split, LOAD))
        assert type(dataset).__name__ == kind and len(dataset) == n
        assert list(dataset.metainfo["classes"]) == task.classes and [list(c) for c in dataset.metainfo["palette"]] == task.palette
        assert dataset.metainfo["reduce_zero_label"] == task.reduce_zero_label and dataset.label_map is None
        item = dataset[0]
        assert item["img"].shape[:2] == item["gt_seg_map"].shape and set(np.unique(item["gt_seg_map"])) <= {*range(task.num_classes), 255}


def test_values_of_ade20k_are_shifted_and_those_of_context_are_not(trees):
    ade = DATASETS.build(dataset_config("ade20k", trees["ade20k"], "train", LOAD))[0]["gt_seg_map"]
    stored = pair([0, 1, 4, 150], 0)[1]
    assert (ade[stored == 0] == 255).all() and all((ade[stored == k] == k - 1).all() for k in (1, 4, 150))
    context = DATASETS.build(dataset_config("pascal_context", trees["pascal_context"], "train", LOAD))[0]["gt_seg_map"]
    assert (context == pair([0, 1, 4, 255], 0)[1]).all() and 0 in context


def test_masks_of_ours_are_read_as_class_numbers(written):
    for name, root in written.items():
        for item in DATASETS.build(dataset_config(name, root, "test", LOAD)):
            with Image.open(item["seg_map_path"]) as mask: assert (np.asarray(mask) == item["gt_seg_map"]).all()
            with Image.open(item["img_path"]) as image: assert (np.asarray(image) == item["img"][..., ::-1]).all()


@pytest.mark.parametrize("name, split, text", [("ade", "train", "unknown segmentation task 'ade'"), ("ade20k", "training", "unknown split "
                                                                                                                           "'training'. "
                                                                                                                           "Did you mean "
                                                                                                                           "'train'?")])
def test_unknown_names(name, split, text):
    with pytest.raises(KeyError) as caught: dataset_config(name, "x", split, [])
    assert text in str(caught.value)


def test_a_tree_goes_through_the_training_transforms(written):
    "Crop, flip and packing of MMSegmentation: what a data loader of a runner yields."
    pipeline = [
        *LOAD,
        {"type": "RandomCrop", "crop_size": (28, 28), "cat_max_ratio": 0.75},
        {"type": "RandomFlip", "prob": 1.0},
        {"type": "PackSegInputs"},
    ]
    item = DATASETS.build(dataset_config("seg_objects", written["seg_objects"], "train", pipeline))[0]
    assert (
        item["inputs"].shape == (3, 28, 28)
        and item["data_samples"].gt_sem_seg.data.shape == (1, 28, 28)
        and item["data_samples"].metainfo["flip"]
    )


# --- one decoder


@pytest.mark.parametrize("name", SEG_TASKS)
def test_pictures_and_masks_are_those_of_mmsegmentation(name, trees):
    "Where nothing has to be turned or laid on white; JPEG within what two decoders differ by."
    for split in PARTS:
        for mine, theirs in zip(*(DATASETS.build(dataset_config(name, trees[name], split, steps)) for steps in (LOAD, THEIRS))):
            assert set(mine) == set(theirs) and mine["seg_fields"] == theirs["seg_fields"]
            assert all(mine[key] == theirs[key] for key in ("img_shape", "ori_shape", "img_path", "seg_map_path"))
            assert (mine["gt_seg_map"] == theirs["gt_seg_map"]).all() and mine["gt_seg_map"].dtype == theirs["gt_seg_map"].dtype
            apart = np.abs(mine["img"].astype(int) - theirs["img"]).max()
            assert mine["img"].dtype == np.uint8 and apart <= (0 if name in RECIPES else 3)


def test_chosen_classes_are_renamed_as_mmsegmentation_does(trees):
    chosen = {"metainfo": {"classes": ["sky", "wall"]}}
    ours, theirs = (DATASETS.build(dataset_config("ade20k", trees["ade20k"], "train", steps) | chosen) for steps in (LOAD, THEIRS))
    assert all((a["gt_seg_map"] == b["gt_seg_map"]).all() for a, b in zip(ours, theirs))


def turned(path, orientation, stored):
    "The file again, stored as told, with an EXIF entry."
    with Image.open(path) as old: picture = old.copy()
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.transpose(stored).save(path, exif=exif, **({"quality": 95} if path.suffix == ".jpg" else {}))


@pytest.mark.parametrize("both", [True, False])
def test_a_picture_that_its_entry_turns_and_its_mask(both, trees):
    image, mask = one(trees["ade20k"], "ade20k")
    dataset = DATASETS.build(dataset_config("ade20k", trees["ade20k"], "val", LOAD))
    place = next(i for i, info in enumerate(dataset.load_data_list()) if info["img_path"].endswith(image.name))
    before = dataset[place]
    for path in (image, mask)[:1 + both]: turned(path, 6, Image.Transpose.ROTATE_90)
    verify("ade20k", trees["ade20k"])
    after = dataset[place]
    assert (before["gt_seg_map"] == after["gt_seg_map"]).all() and before["img"].shape == after["img"].shape
    assert np.abs(before["img"].astype(int) - after["img"]).mean() < 8


def test_a_mask_drawn_on_the_lying_picture_is_refused(trees):
    image, mask = one(trees["ade20k"], "ade20k")
    turned(image, 6, Image.Transpose.ROTATE_90)
    with Image.open(mask) as old: lying = old.transpose(Image.Transpose.ROTATE_90)
    lying.save(mask)
    with pytest.raises(ValueError) as caught: verify("ade20k", trees["ade20k"])
    assert f"mask {mask} is 32 x 40 pixels, its image {image.name} is 40 x 32" in str(caught.value)


def test_a_bad_file_is_named_while_training_too(trees):
    image, mask = one(trees["ade20k"], "ade20k")
    dataset = DATASETS.build(dataset_config("ade20k", trees["ade20k"], "val", LOAD))
    place = next(i for i, info in enumerate(dataset.load_data_list()) if info["img_path"].endswith(image.name))
    mask.write_bytes(b"")
    with pytest.raises(ValueError, match=f"cannot decode mask {mask}: the file is empty"): dataset[place]
    mask.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    with pytest.raises(ValueError, match="it is none of JPEG"): read_mask(mask)
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"cannot decode image {image}"): dataset[place]


# --- verification


def test_what_is_in_order(originals):
    found = {name: verify(name, root, num_classes=SEG_TASKS[name].num_classes) for name, root in originals.items()}
    assert found["seg_climate"]["images"] == {"train": 6, "val": 4, "test": 5} and found["ade20k"]["images"] == {"train": 6, "val": 4}
    for name, report in found.items():
        json.dumps(report, allow_nan=False)
        assert report["classes"] == SEG_TASKS[name].num_classes and all(
            abs(sum(shares.values()) - 1) < 1e-9 and list(shares) == SEG_TASKS[name].classes for shares in report["shares"].values()
        )
    assert (
        found["ade20k"]["ignored"] == {"train": 0.25, "val": 0.25} == found["pascal_context"]["ignored"]
        and found["seg_objects"]["ignored"]["test"] == 0
    )
    assert (
        found["ade20k"]["notes"] == ["train has 6 images, the published set 20,210", "val has 4 images, the published set 2,000"]
        and not found["seg_climate"]["notes"]
    )
    assert found["ade20k"]["shares"]["train"]["wall"] > 0


def test_shares_are_those_of_the_masks(written):
    masks = np.stack([np.asarray(Image.open(path)) for path in sorted((written["seg_climate"] / "annotations/val").iterdir())])
    assert (
        list(verify("seg_climate", written["seg_climate"])["shares"]["val"].values())
        == (np.bincount(masks.ravel(), minlength=6) / masks.size).tolist()
    )


def test_strict_wants_the_published_numbers(trees):
    with pytest.raises(ValueError, match="train has 6 images, the published set 20,210"): verify("ade20k", trees["ade20k"], strict=True)
    verify("seg_objects", trees["seg_objects"], strict=True)


PLACES = {
    "seg_climate": ("images/val", "annotations/val", "0"),
    "seg_objects": ("images/test", "annotations/test", "00003"),
    "ade20k": ("images/validation", "annotations/validation", "ADE_val_00000002"),
    "pascal_context": ("JPEGImages", "SegmentationClassContext", "2008_002001"),
}


def one(root, name):
    "Image and mask of some picture of a tree."
    images, masks, stem = PLACES[name]
    mask = sorted(path for path in (root / masks).iterdir() if path.stem.startswith(stem))[0]
    return next((root / images).glob(f"{mask.stem}.*")), mask


def repaint(mask, **change):
    "The mask with another size, mode or a few pixels of another value."
    with Image.open(mask) as old: values = np.array(old)
    if "value" in change: values[:2, :3] = change["value"]
    image = Image.fromarray(values)
    if "size" in change: image = image.resize(change["size"])
    if "mode" in change: image = image.convert(change["mode"])
    image.save(mask)


VALUES = {
    "seg_climate": (6, "the 6 classes of seg_climate are stored as 0..5, 255 is ignored"),
    "seg_objects": (11, "the 11 classes of seg_objects are stored as 0..10, 255 is ignored"),
    "ade20k": (151, "the 150 classes of ade20k are stored as 1..150, 0 and 255 are ignored"),
    "pascal_context": (60, "the 60 classes of pascal_context are stored as 0..59, 255 is ignored"),
}


@pytest.mark.parametrize("name", SEG_TASKS)
def test_a_value_outside_the_classes(name, trees):
    mask, (value, text) = one(trees[name], name)[1], VALUES[name]
    repaint(mask, value=value)
    with pytest.raises(ValueError) as caught: verify(name, trees[name])
    assert f"mask {mask} holds the value {value} (6 pixels): {text}" in str(caught.value) and SEG_TASKS[name].origin in str(caught.value)


@pytest.mark.parametrize("name", SEG_TASKS)
def test_a_missing_mask(name, trees):
    mask = one(trees[name], name)[1]
    mask.unlink()
    with pytest.raises(ValueError) as caught: verify(name, trees[name])
    assert f"has 1 faults; {SEG_TASKS[name].origin}\n- mask {mask} is missing" in str(caught.value)


@pytest.mark.parametrize("name", SEG_TASKS)
def test_sizes_that_differ(name, trees):
    image, mask = one(trees[name], name)
    repaint(mask, size=(30, 31))
    with pytest.raises(ValueError) as caught: verify(name, trees[name])
    assert f"mask {mask} is 30 x 31 pixels, its image {image.name} is" in str(caught.value)


@pytest.mark.parametrize("mode", ["RGB", "I;16", "1", "RGBA"])
def test_masks_of_colours(mode, trees):
    mask = one(trees["ade20k"], "ade20k")[1]
    repaint(mask, mode=mode)
    with pytest.raises(ValueError, match="a mask holds class numbers in one channel of bytes"): verify("ade20k", trees["ade20k"])


@pytest.mark.parametrize("which, text", [(0, "cannot decode image"), (1, "cannot decode mask")])
def test_damaged_files(which, text, trees):
    path = one(trees["pascal_context"], "pascal_context")[which]
    path.write_bytes(path.read_bytes()[:-60 if which else -400])
    with pytest.raises(ValueError) as caught: verify("pascal_context", trees["pascal_context"])
    assert f"{text} {path}" in str(caught.value)


def test_many_faults_are_counted(trees):
    for mask in (trees["ade20k"] / "annotations/training").iterdir(): mask.unlink()
    one(trees["ade20k"], "ade20k")[1].unlink()
    with pytest.raises(ValueError) as caught: verify("ade20k", trees["ade20k"])
    assert "has 7 faults" in str(caught.value) and str(caught.value).count("is missing") == 5 and str(caught.value).endswith("and 2 more")


@pytest.mark.parametrize("name", SEG_TASKS)
def test_a_head_of_another_class_count(name, trees):
    with pytest.raises(ValueError, match=f"num_classes=7: {name} has {SEG_TASKS[name].num_classes} classes; give the head as many"):
        verify(name, trees[name], num_classes=7)


@pytest.mark.parametrize(
    "name, gone",
    [
        ("ade20k", "annotations/validation"),
        ("ade20k", "images/training"),
        ("pascal_context", "ImageSets/SegmentationContext/val.txt"),
        ("pascal_context", "SegmentationClassContext"),
        ("seg_climate", "images/test"),
        ("seg_climate", "task.json"),
    ],
)
def test_missing_folders_and_lists(name, gone, trees):
    path = trees[name] / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError) as caught: verify(name, trees[name])
    assert str(path) in str(caught.value) and (gone == "task.json" or SEG_TASKS[name].origin in str(caught.value))


def test_a_part_without_images(trees):
    for path in (trees["ade20k"] / "images/training").iterdir(): path.unlink()
    with pytest.raises(ValueError, match="images/training names no file with suffix .jpg; unpack ADEChallengeData2016.zip"):
        verify("ade20k", trees["ade20k"])
    (trees["pascal_context"] / "ImageSets/SegmentationContext/train.txt").write_text("")
    with pytest.raises(ValueError, match="SegmentationContext/train.txt names no file"): verify("pascal_context", trees["pascal_context"])


def test_a_listed_image_that_is_not_there(trees):
    image = one(trees["pascal_context"], "pascal_context")[0]
    image.unlink()
    with pytest.raises(ValueError) as caught: verify("pascal_context", trees["pascal_context"])
    assert str(image) in str(caught.value)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"classes": list(ZONES[:5])}, "has 5 classes"),
        ({"name": "seg_objects"}, "holds 'seg_objects' of format"),
        ({"format": "else"}, "of format 'else', not seg_climate"),
        ({"counts": {"train": 6, "val": 9, "test": 5}}, "val has 4 images, task.json says 9"),
    ],
)
def test_a_record_that_says_otherwise(change, text, trees):
    file = trees["seg_climate"] / "task.json"
    file.write_text(json.dumps(read_json(file) | change))
    with pytest.raises(ValueError) as caught: verify("seg_climate", trees["seg_climate"])
    assert text in str(caught.value) and 'write it again with write_task("seg_climate", ...)' in str(caught.value)


def test_files_that_were_exchanged_or_lost(trees):
    root = trees["seg_objects"]
    image, mask = one(root, "seg_objects")
    Image.open(sorted((root / "images/train").iterdir())[0]).save(image)
    with pytest.raises(ValueError, match="files of test are not those that were written"): verify("seg_objects", root)
    for path in (image, mask): path.unlink()
    with pytest.raises(ValueError, match="test has 4 images, task.json says 5"): verify("seg_objects", root)


def test_inspection_counts_pixels(trees):
    counts = inspect_pair(SEG_TASKS["ade20k"], *one(trees["ade20k"], "ade20k"))
    assert counts.shape == (256,) and counts.sum() == 40 * 32 and counts[0] == counts[150] == 320


# --- pictures and imports


def test_overlays_leave_background_and_ignored_pixels():
    image, mask = np.full((2, 3, 3), 100, np.uint8), np.array([[0, 1, 255], [2, 0, 5]], np.uint8)
    mixed = overlay(image, mask, SEG_TASKS["seg_objects"], share=1.0)
    assert (
        (mixed[mask == 0] == 100).all()
        and (mixed[mask == 255] == 100).all()
        and mixed[0, 1].tolist() == SEG_TASKS["seg_objects"].palette[1]
    )
    assert overlay(image, mask, SEG_TASKS["seg_climate"], share=0.5)[0, 0].tolist() == [60, 80, 120]
    assert coloured(mask, SEG_TASKS["seg_climate"].palette)[0, 2].tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", SEG_TASKS)
def test_samples_are_shown(name, trees):
    figure = show_samples(name, trees[name], "val", n=3)
    assert len([axis for axis in figure.axes if axis.images]) == 6 and any(axis.get_legend() for axis in figure.axes)


def test_neither_the_package_nor_the_composer_needs_mmsegmentation():
    code = ("import sys, hierprompt, hierprompt.seg, hierprompt.seg.compose; print([m for m in sys.modules if m.split('.')[0] in ('mmseg', "
            "'mmcv', 'mmengine')])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- what a mean over classes is to be compared with


@pytest.mark.parametrize("name", ["seg_climate", "seg_objects", "pascal_context"])
def test_the_most_frequent_class_is_worth_what_the_metric_says(name, originals):
    task, worth = SEG_TASKS[name], most_frequent(verify(name, originals[name])["shares"])
    dataset, areas = DATASETS.build(dataset_config(name, originals[name], "test", LOAD)), 0.0
    for item in (dataset[i] for i in range(len(dataset))):
        truth = torch.from_numpy(item["gt_seg_map"].astype(int))
        areas = (
            areas
            + torch.stack(
                IoUMetric.intersect_and_union(torch.full_like(truth, task.classes.index(worth["class"])), truth, task.num_classes, 255)
            ).double()
        )
    found = IoUMetric.total_area_to_metrics(*areas)
    assert worth["miou"] == pytest.approx(100 * np.nanmean(found["IoU"]), rel=1e-12)
    assert worth["macc"] == pytest.approx(100 * np.nanmean(found["Acc"]), rel=1e-12)


@pytest.mark.parametrize("key", ["format", "name", "classes", "counts", "sha256"])
def test_a_tree_that_does_not_say_what_it_is(key, tmp_path):
    root = write_task("seg_objects", tmp_path / "tree", 16, 2, 1, 1)
    about = json.loads((root / "task.json").read_text())
    for changed in ({k: v for k, v in about.items() if k != key}, about | {key: 3}):
        (root / "task.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"task.json: .*{key}.*write_task"): verify("seg_objects", root)
