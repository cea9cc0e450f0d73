"""The embedded tasks of real images: what is in them, what separates their parts, whom they come from, and what happens when a file is
spoiled."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from hierprompt.core import sha256_file
from hierprompt.data.benchmarks import list_tasks, load_task
from hierprompt.data.embedded.packs import content_hash, find_packs, nearest, pack_about, picture_hash, read_pack, write_pack
from hierprompt.data.embedded.scenes import SCENE, Style, draw_scenes, render_scene
from hierprompt.data.embedded.tasks import EMBEDDED, SCENE_SIZE, load_embedded, provenance
from hierprompt.data.probes import linear_probe, probes, raw_pixels
from hierprompt.data.tasks import PARTS, Split, Task
from hierprompt.seg.compose import RECIPES

PACKED = [name for name, task in EMBEDDED.items() if task.packs]
PACKS = sorted({pack for task in EMBEDDED.values() for pack in task.packs})
MAIN = {name: EMBEDDED[name].packs[0] for name in PACKED}
CLASSES = {"fashion_mnist": 10, "emoji": 8, "textured_digits": 10, "koeppen": 5, "land_share": 5, "cards": 54, "flags": 50}


@pytest.fixture(scope="module")
def packs(): return {name: read_pack(name) for name in PACKS}


def part(pack, p, key): return pack.columns[key][pack.columns["part"] == p]


def test_registry():
    assert list_tasks("embedded") == list(EMBEDDED) and len(EMBEDDED) == 11
    groups = {group: sum(t.group == group for t in EMBEDDED.values()) for group in ("natural", "specialized", "structured", "fine_grained")}
    assert groups == {"natural": 3, "specialized": 2, "structured": 4, "fine_grained": 2}


@pytest.mark.parametrize("name", PACKED)
def test_sizes_and_balance(name, packs):
    columns = packs[MAIN[name]].columns
    assert len(columns["class_names"]) == CLASSES[name]
    counts = [np.bincount(columns["label"][columns["part"] == p], minlength=CLASSES[name]) for p in range(3)]
    assert [c.sum() for c in counts[:2]] == [800, 200] and 600 <= counts[2].sum() <= 2000
    assert counts[0].max() - counts[0].min() <= (40 if name == "land_share" else 8)  # the supply of tiles is uneven
    assert min(c.min() for c in counts) >= 1


@pytest.mark.parametrize("name", PACKS)
def test_every_file_is_the_one_described(name, packs):
    pack = packs[name]
    assert content_hash(pack.images, pack.columns) == pack.about["content"]
    assert pack.about["bytes"] == (find_packs() / f"{name}.npz").stat().st_size and pack.about["images"] == len(pack)
    notebook = find_packs().parents[1] / pack.about["built_by"]
    assert notebook.is_file()


def test_nothing_else_and_not_much():
    folder = find_packs()
    known = sorted({*PACKS, *(pack for recipe in RECIPES.values() for pack in recipe.packs)})
    assert sorted(p.stem for p in folder.glob("*.npz")) == known == sorted(p.stem for p in folder.glob("*.json"))
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 15e6


def test_licences():
    text = (find_packs() / "LICENSES.md").read_text()
    of_segmentation = [{"pack": p, **s} for p in ("climate_maps", "objects") for s in pack_about(p)["sources"]]
    for source in provenance() + of_segmentation:
        assert f"| {source['pack']} | {source['package']} {source['version']}" in text
        assert "GPL" not in source["licence"] and "BY-SA" not in source["licence"]
        assert len(source["sha256"]) == 64 and source["author"] and source["took"]
    links = {line.split("(licences/")[1].split(")")[0] for line in text.splitlines() if "(licences/" in line}
    assert links == {p.name for p in (find_packs() / "licences").iterdir()}


def test_fashion_mnist_parts_are_different_pictures(packs):
    pack = packs["fashion_mnist"]
    assert not set(part(pack, 0, "index")) & set(part(pack, 1, "index"))
    assert len(set(part(pack, 2, "index"))) == 2000


def test_emoji_vendors_are_disjoint(packs):
    pack = packs["emoji"]
    for p in (0, 1): assert set(part(pack, p, "vendor")) == {"twemoji", "fluent"}
    assert set(part(pack, 2, "vendor")) == {"noto_v1", "fxemoji"}
    pairs = list(zip(pack.columns["vendor"], pack.columns["concept"]))
    assert len(set(pairs)) == len(pairs)


def test_emoji_drawings_are_not_shared(packs):
    pack = packs["emoji"]
    bits = np.stack([picture_hash(image) for image in pack.images])
    test = pack.columns["part"] == 2
    assert nearest(bits[test], bits[~test]).min() > 3


@pytest.mark.parametrize("name", ["koeppen", "land_share"])
def test_stripes_are_disjoint(name, packs):
    pack = packs[name]
    stripe = [set(part(pack, p, "left") // 300 % 3) for p in range(3)]
    assert stripe == [{0, 1}, {0, 1}, {2}]
    places = set(zip(pack.columns["top"].tolist(), pack.columns["left"].tolist()))
    assert len(places) == len(pack)
    assert all(top % 30 == 0 and left % 30 == 0 for top, left in places)


def test_decks_and_designers_are_disjoint(packs):
    assert [set(part(packs["cards"], p, "deck")) for p in range(3)] == [{0, 1}, {2}, {3}]
    assert [set(part(packs["flags"], p, "vendor")) for p in range(3)] == [{0, 1, 2}, {3}, {4, 5}]


def test_digits_are_disjoint_with_their_neighbours(packs):
    pack = packs["digits"]
    for p in range(3):
        scenes = part(pack, p, "scene")
        assert {pack.columns["part"][i] for key in ("picture", "left", "right") for i in scenes[key]} == {p}
    assert len(set(pack.columns["index"])) == 3000


@pytest.mark.parametrize("name", ["digits", "cards", "flags"])
def test_textures_are_disjoint(name, packs):
    window = [part(packs[name], p, "scene")["window"] for p in range(3)]
    for p in (0, 1): assert (window[p][:, 1] + window[p][:, 2]).max() <= 256
    assert window[2][:, 1].min() >= 256 and (window[2][:, 1] + window[2][:, 2]).max() <= 512


@pytest.mark.parametrize("name", ["digits", "cards", "flags"])
def test_labels_of_scenes_are_those_of_their_pictures(name, packs):
    columns = packs[name].columns
    picture = columns["scene"]["picture"]
    if name == "digits": assert (picture == np.arange(3000)).all()
    else: assert (columns["label"] == picture % CLASSES[name]).all()


@pytest.mark.parametrize("name", ["koeppen", "emoji"])
def test_a_task_is_its_pack(name, packs):
    task = load_embedded(name, image_size=32)
    assert task.image_size == 32 and task.group == EMBEDDED[name].group and task.num_classes == CLASSES[name]
    for p, split in enumerate(PARTS): assert getattr(task, split).labels.tolist() == part(packs[name], p, "label").tolist()
    assert {"origin", "licence", "protocol", "preprocess", "counts"} <= set(task.source)
    again = load_task(name, image_size=32, preprocess="backbone")
    assert torch.equal(task.test.images, again.test.images)


def test_presets_differ_and_unknown_ones_stop():
    a, b = (load_embedded("land_share", 28, preset).test.images for preset in ("backbone", "paper"))
    assert not torch.equal(a, b)
    with pytest.raises(KeyError, match="preprocess preset"): load_embedded("koeppen", 28, "papre")


def test_scenes_repeat_and_differ(packs):
    pack, textures = packs["flags"], packs["textures"].images
    scenes = pack.columns["scene"][:3]
    first, again = ([render_scene(pack.images, textures, s, SCENE_SIZE["flags"]).tobytes() for s in scenes] for _ in range(2))
    assert first == again and len(set(first)) == 3
    assert draw_scenes([0], Style((.5, 1), 10), np.random.default_rng(0), False).dtype == SCENE


@pytest.fixture
def copied(tmp_path):
    for file in find_packs().glob("koeppen.*"): shutil.copy(file, tmp_path)
    return tmp_path


@pytest.mark.parametrize("where", [10, 5000, -10])
def test_a_changed_byte_is_found(copied, where):
    data = bytearray((copied / "koeppen.npz").read_bytes())
    data[where] ^= 1
    (copied / "koeppen.npz").write_bytes(data)
    with pytest.raises(ValueError, match="koeppen.npz is damaged.*git checkout"): load_embedded("koeppen", root=copied)


def test_a_truncated_file_is_found(copied):
    data = (copied / "koeppen.npz").read_bytes()
    (copied / "koeppen.npz").write_bytes(data[:len(data) // 2])
    with pytest.raises(ValueError, match="is damaged"): read_pack("koeppen", copied)


def test_missing_files_are_named(copied):
    (copied / "koeppen.npz").unlink()
    with pytest.raises(FileNotFoundError, match="70_blue_marble"): read_pack("koeppen", copied)
    with pytest.raises(FileNotFoundError, match="emoji.json"): load_embedded("emoji", root=copied)
    with pytest.raises(FileNotFoundError, match="no folder of packs"): load_embedded("emoji", root=copied / "none")


def test_a_foreign_file_is_not_a_pack(copied):
    np.savez(copied / "koeppen.npz", numbers=np.arange(3))
    about = json.loads((copied / "koeppen.json").read_text())
    (copied / "koeppen.json").write_text(json.dumps({**about, "sha256": sha256_file(copied / "koeppen.npz")}))
    with pytest.raises(ValueError, match="is not a pack"): read_pack("koeppen", copied)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_packs_are_lossless(tmp_path, mode):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    arrays = [np.random.default_rng(i).integers(0, 256, (9 + i, 13, *channels), np.uint8) for i in range(4)]
    about = {"built_by": "here", "licence": "CC0-1.0", "sources": []}
    write_pack(tmp_path, "x", [Image.fromarray(a) for a in arrays], {"label": np.arange(4)}, about)
    for image, array in zip(read_pack("x", tmp_path).images, arrays): assert np.array_equal(np.asarray(image), array)


def test_probe_learns_and_reports_percent():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    points = np.eye(3)[labels] * 6 + rng.normal(size=(300, 3))
    assert linear_probe(points[:200], labels[:200], points[200:], labels[200:]) > 95
    images = torch.zeros(30, 3, 8, 8, dtype=torch.uint8)
    split = Split(images, torch.arange(30) % 3)
    table = probes(Task("t", "natural", ["a", "b", "c"], split, split, split))
    assert raw_pixels(images).shape == (30, 2352) and set(table) == {"majority", "raw pixels"} and abs(table["majority"] - 100 / 3) < 1e-6
