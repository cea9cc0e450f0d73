"A folder of one's own: how parts are spelled, what counts as a picture, links, levels, names, and what is said of the rest."
import os
import shutil
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fixture_trees import make_folder_tree
from PIL import Image

from hierprompt.data.benchmarks import load_task
from hierprompt.data.listing import is_clutter
from hierprompt.data.preprocess import PREPROCESS


def load(root, **options): return load_task("folder", root, image_size=16, **options)


def total(task): return sum(task.source["counts"].values())


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (12, 12, 3), np.uint8)).save(path)
    return path


def tree(root, *classes, n=3):
    for name in classes:
        for i in range(n): picture(root / name / f"{i}.png", i)
    return root


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# parts

@pytest.mark.parametrize("names", [("Train", "Val", "Test"), ("TRAIN", "VALID", "TEST"), ("training", "validation", "testing"),
                                   ("trn", "dev", "tst"), ("train_set", "val-set", "Test Data"), ("train2017", "val2017", "test2017"),
                                   ("Training Images", "Validation Images", "Test Images"), ("1_train", "2_dev", "3_test")])
def test_spellings_of_the_parts(tmp_path, names, quiet):
    for name in names: tree(tmp_path / name, "cat", "dog")
    task = load(tmp_path)
    assert task.class_names == ["cat", "dog"] and task.source["counts"] == {"train": 6, "val": 6, "test": 6}
    assert task.source["protocol"] == "train / val / test folders"


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "testing"), ("train", "val"), ("train",), ("dev", "test")])
def test_parts_that_are_missing_are_named(tmp_path, names):
    for name in names: tree(tmp_path / name, "cat", "dog")
    with pytest.raises(ValueError, match="has no .*folder beside .*give train, val and test, or class folders only"): load(tmp_path)


@pytest.mark.parametrize("names", [("Train", "train", "val", "test"), ("train", "val", "validation", "test"), ("train", "training")])
def test_two_folders_for_one_part(tmp_path, names):
    for name in names: tree(tmp_path / name, "cat", "dog")
    with pytest.raises(ValueError, match="has several folders for (train|val) .*leave one"): load(tmp_path)


def test_a_class_of_trains(tmp_path, quiet):
    assert load(tree(tmp_path, "bus", "car", "train")).class_names == ["bus", "car", "train"]


def test_parts_without_classes(tmp_path):
    for part in ("train", "val", "test"): picture(tmp_path / part / "0.png")
    with pytest.raises(ValueError, match="train has no class folders"): load(tmp_path)


@pytest.mark.parametrize("other", ["Cat", unicodedata.normalize("NFD", "caf\u00e9")])
def test_classes_that_differ_in_spelling_between_parts(tmp_path, other):
    mine = "cat" if other == "Cat" else unicodedata.normalize("NFC", other)
    for part in ("train", "val", "test"): tree(tmp_path / part, "dog", other if part == "test" else mine)
    with pytest.raises(ValueError, match="classes of .*train and .*test differ: .*capitals or accents only"): load(tmp_path)


def test_a_folder_beside_the_parts_is_said(tmp_path):
    for part in ("train", "val", "test", "extra"): tree(tmp_path / part, "cat", "dog")
    with pytest.warns(UserWarning, match=r"what lies beside the folders that count \(1\): extra"): task = load(tmp_path)
    assert total(task) == 18 and "extra" in task.source["left_out"]


# the level

@pytest.mark.parametrize("inner", [("photos/cat", "photos/dog"), ("a/cat", "a/dog", "b/cat", "b/dog"), ("photos/cat", "scans/dog"),
                                   ("data/train/cat", "data/val/cat", "data/test/cat"),
                                   ("Lernen/cat", "Lernen/dog", "Probe/cat", "Probe/dog"), ("cat/2021", "cat/2022", "dog")])
def test_one_level_too_high(tmp_path, inner):
    tree(tmp_path, *inner)
    with pytest.raises(ValueError, match=r"holds no pictures but folders of them.*give root="): load(tmp_path)


def test_a_wrong_level_inside_a_part(tmp_path):
    for part in ("train", "val", "test"): tree(tmp_path / part / "photos", "cat", "dog")
    with pytest.raises(ValueError, match="train/photos holds no pictures but folders of them"): load(tmp_path)


def test_deeper_folders_that_are_a_layout(tmp_path, quiet):
    tree(tmp_path / "one", "n01/images", "n02/images")
    assert load(tmp_path / "one").class_names == ["n01", "n02"]
    tree(tmp_path / "two", "cat", "cat/more", "dog")
    assert total(load(tmp_path / "two")) == 9


@pytest.mark.parametrize("inner", ["cat", "photos/cat"])
def test_one_class(tmp_path, inner):
    tree(tmp_path, inner)
    with pytest.raises(ValueError, match="has one class folder, .*: a task needs two or more"): load(tmp_path)


def test_an_empty_class_says_what_lies_there(tmp_path):
    tree(tmp_path, "cat", "dog")
    (tmp_path / "owl").mkdir()
    with pytest.raises(ValueError, match="no images in class folders owl of"): load(tmp_path)
    (tmp_path / "owl/0.heic").touch()
    with pytest.raises(ValueError, match="no images in class folders owl of .*no pictures by their suffix: owl/0.heic"): load(tmp_path)


# clutter and what is left out

CLUTTERED = ["cat/@eaDir/0.png/SYNOPHOTO_THUMB_M.png", "cat/.thumbnails/0.png", "cat/.@__thumb/0.png", "cat/._0.png", "__MACOSX/cat/0.png",
             "#recycle/0.png", "$RECYCLE.BIN/0.png",
             "System Volume Information/x.png", "lost+found/0.png", ".ipynb_checkpoints/0.png",
             "cat/.ipynb_checkpoints/0-checkpoint.png", "@eaDir/cat/0.png", ".git/0.png", "cat/.DS_Store", "dog/Thumbs.db",
             "dog/desktop.ini"]


@pytest.mark.parametrize("split", [False, True])
def test_clutter_counts_for_nothing_and_is_not_said(tmp_path, quiet, split):
    for part in ("train", "val", "test") if split else ("",):
        tree(tmp_path / part, "cat", "dog")
        for name in CLUTTERED: picture(tmp_path / part / name) if name.endswith(".png") else (tmp_path / part / name).touch()
    if split: picture(tmp_path / "__MACOSX/train/cat/0.png")
    task = load(tmp_path)
    assert task.class_names == ["cat", "dog"] and total(task) == (18 if split else 6) and "left_out" not in task.source


def test_names_that_only_look_like_clutter():
    assert not any(map(is_clutter, ("cat", "@home", "#1", "$5", "thumbs up", "recycling", "_x", "lost")))


def test_what_is_left_out_is_said_once(tmp_path):
    tree(tmp_path, "cat", "dog")
    for name in ("cat/a.heic", "cat/b.HEIC", "dog/notes.txt", "dog/raw"): (tmp_path / name).touch()
    picture(tmp_path / "cover.png")
    (tmp_path / "README.md").touch()
    with pytest.warns(UserWarning) as told: task = load(tmp_path)
    text = str(told[0].message)
    assert len(told) == 1 and told[0].filename == __file__
    for part in ("files that are no pictures by their suffix (2 .heic, 1 .txt, 1 no suffix)", "cat/a.heic", "dog/raw", "cover.png"):
        assert part in text
    assert task.source["left_out"] in text and "README" not in text and total(task) == 6 and str(tmp_path) not in text


def test_suffixes_in_capitals_and_directories_with_suffixes(tmp_path, quiet):
    tree(tmp_path, "cat", "dog")
    (tmp_path / "cat/0.png").rename(tmp_path / "cat/0.PNG")
    picture(tmp_path / "dog/x.png/1.png")
    assert total(load(tmp_path)) == 7


def test_a_postscript_file_is_left_out_and_given_to_nobody(tmp_path):
    tree(tmp_path, "cat", "dog")
    (tmp_path / "cat/x.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n")
    with pytest.warns(UserWarning, match="1 .eps"): assert total(load(tmp_path)) == 6


def test_all_bad_pictures_are_named(tmp_path):
    tree(tmp_path, "cat", "dog", n=10)
    bad = [tmp_path / name for name in ("cat/1.png", "cat/7.png", "dog/3.png")]
    for file in bad: file.write_bytes(b"")
    with pytest.raises(ValueError, match="3 of 20 images cannot be used") as caught: load(tmp_path)
    assert all(f"cannot decode image {file}: the file is empty" in str(caught.value) for file in bad)


# links

def test_loops_end_and_nothing_counts_twice(tmp_path, quiet):
    root = tree(tmp_path / "root", "cat", "dog")
    (root / "cat/again").symlink_to(root / "cat")
    (root / "cat/up").symlink_to(root)
    (root / "dog/far").symlink_to(tmp_path)
    (root / "dog/twin.png").symlink_to(root / "dog/0.png")
    picture(tmp_path / "more/9.png", 9)
    for name in ("one", "two"): (root / "cat" / name).symlink_to(tmp_path / "more")
    (tmp_path / "more/back").symlink_to(root / "cat")
    task = load(root)
    assert task.class_names == ["cat", "dog"] and total(task) == 7


def test_links_to_pictures_and_folders_are_followed(tmp_path, quiet):
    pool = tree(tmp_path / "pool", "cat", "dog", n=4)
    root = tmp_path / "root"
    (root / "cat").mkdir(parents=True)
    for file in sorted((pool / "cat").iterdir()): (root / "cat" / file.name).symlink_to(file)
    (root / "dog").symlink_to(pool / "dog")
    assert total(load(root)) == 8
    (tmp_path / "link").symlink_to(root)
    assert load(tmp_path / "link").name == "link"


def test_one_file_in_two_classes_or_parts(tmp_path):
    root = tree(tmp_path / "a", "cat", "dog")
    (root / "dog/x.png").symlink_to(root / "cat/0.png")
    with pytest.raises(ValueError, match=r"to the same file \(1: .*cat/0.png and .*dog/x.png\)"): load(root)
    (root / "dog/x.png").unlink()
    (root / "kitten").symlink_to(root / "cat")
    with pytest.raises(ValueError, match=r"to the same file \(3: .*\.\.\.\)"): load(root)
    for part in ("train", "val", "test"): tree(tmp_path / "b" / part, "cat", "dog")
    shutil.rmtree(tmp_path / "b/val/cat")
    (tmp_path / "b/val/cat").symlink_to(tmp_path / "b/train/cat")
    with pytest.raises(ValueError, match=r"to the same file \(3: .*\.\.\.\)"): load(tmp_path / "b")


def test_broken_links(tmp_path):
    root = tree(tmp_path / "root", "cat", "dog")
    (root / "cat/gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "cat/self.png").symlink_to(root / "cat/self.png")
    with pytest.warns(UserWarning, match=r"links that lead nowhere \(2\): cat/gone.png, cat/self.png"): assert total(load(root)) == 6
    (root / "owl").symlink_to(tmp_path / "owls")
    with pytest.raises(ValueError, match=r"has links that lead nowhere \(owl\): mend or remove them"): load(root)


# the root

def test_every_way_to_say_where(tmp_path, monkeypatch, quiet):
    root = tree(tmp_path / "my pictures", "cat", "dog")
    monkeypatch.chdir(root)
    cache = tmp_path / "cache"
    tasks = [load(given, cache=cache) for given in (root, str(root), f"{root}/", ".", Path("."), "../my pictures", "./", os.curdir)]
    monkeypatch.chdir(root / "cat")
    tasks += [load("..", cache=cache), load(Path("../../my pictures"))]
    assert {task.name for task in tasks} == {"my pictures"} and {task.source["origin"] for task in tasks} == {"folder my pictures"}
    assert all(torch.equal(task.test.images, tasks[0].test.images) for task in tasks)
    assert all(file.name.startswith("my-pictures-") for file in cache.iterdir())


def test_roots_that_are_none(tmp_path):
    (tmp_path / "pictures.zip").touch()
    with pytest.raises(ValueError, match="pictures.zip is a file: .*an archive must be unpacked"): load(tmp_path / "pictures.zip")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"): load(tmp_path / "nowhere")
    for root in (5, b"x", ["a"], True):
        with pytest.raises(TypeError, match="is not a path"): load(root)


@pytest.mark.parametrize("name", ["a b", "caf\u00e9", "\u732b", "C++", "50%", "a'b", "#1", "_x", "-", "no.dots", "[a]", "@home", "A"])
def test_class_names_stay_as_they_are(tmp_path, name, quiet):
    tree(tmp_path, name, "zebra", "a")
    task = load(tmp_path)
    assert task.class_names == sorted([name, "zebra", "a"])
    assert type(task).load(task.save(tmp_path / "t.safetensors")).class_names == task.class_names


# what is done to the pictures

def test_a_folder_is_antialiased_and_a_benchmark_is_the_papers(tmp_path):
    y, x = np.mgrid[:160, :160]
    checks = Image.fromarray((255 * ((x + y) % 2)).astype(np.uint8))
    for name in ("cat", "dog"):
        for i in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            checks.save(tmp_path / name / f"{i}.png")
    task = load(tmp_path)
    assert task.train.images.float().std() < 8 and task.source["preprocess"]["antialias"]
    assert load(tmp_path, preprocess="paper").source["preprocess"] == vars(PREPROCESS["paper"])
    assert load(tmp_path, preprocess=None).source["preprocess"] == task.source["preprocess"] == vars(PREPROCESS["backbone"])
    assert load_task("emoji", image_size=16).source["preprocess"] == vars(PREPROCESS["paper"])


def test_the_split_is_what_it_was(tmp_path):
    "Which pictures are drawn depends on seed, class and sorted names alone."
    task = load(make_folder_tree(tmp_path / "mine", n=20))
    import random
    names = [f"{i:03}{('.jpg', '.png')[i % 2]}" for i in range(20)]
    drawn = random.Random("0/amber").sample([tmp_path / "mine/amber" / name for name in names], 20)
    first = Image.open(sorted(drawn[2:4])[0]).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(task.test.images[0].permute(1, 2, 0), first)


@pytest.mark.parametrize("seed", [True, 1.0, "1", None])
def test_a_seed_is_a_whole_number(tmp_path, seed):
    with pytest.raises(TypeError, match=f"seed = {seed!r} is not a whole number"): load(make_folder_tree(tmp_path / "mine"), seed=seed)


def test_a_seed_of_numpy_splits_as_python_s(tmp_path):
    tree = make_folder_tree(tmp_path / "mine", n=20)
    one, other = load(tree, seed=3), load(tree, seed=np.int64(3))
    assert one.source == other.source and torch.equal(one.train.images, other.train.images)
