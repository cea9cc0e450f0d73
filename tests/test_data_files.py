import json
import os
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from fixture_trees import class_picture, make_fgvc_tree, make_folder_tree, make_vtab_tree

from hierprompt.core import write_json
from hierprompt.data import fgvc, listing, vtab
from hierprompt.data.benchmarks import list_tasks, load_task
from hierprompt.data.listing import Listing, check_listings
from hierprompt.data.tasks import Task


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("trees")
    make_vtab_tree(root / "vtab", ["cifar100", "svhn", "kitti", "sun397"])
    make_fgvc_tree(root / "fgvc", ["cub200", "stanford_cars"])
    return root


@pytest.fixture
def trees(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "trees")


def texts(report, note=False): return "\n".join(f.text for f in report.findings if f.note is note)


# VTAB-1k

def test_the_nineteen_tasks():
    assert len(list_tasks("vtab")) == 19 and len(list_tasks("fgvc")) == 5
    sizes = {name: task.sizes for name, task in vtab.VTAB.items()}
    assert all(s[:2] == (800, 200) for s in sizes.values())
    assert sizes["kitti"][2] == 711 and sizes["dsprites_ori"][2] == 73_728 and sizes["resisc45"][2] == 6_300
    assert [vtab.VTAB[n].num_classes for n in ("sun397", "smallnorb_azi", "smallnorb_ele", "clevr_dist")] == [397, 18, 9, 6]


def test_load_vtab(trees):
    task = load_task("cifar100", trees / "vtab", image_size=32, strict=False)
    assert (task.name, task.group, task.num_classes) == ("cifar100", "natural", 100)
    assert task.source["counts"] == {"train": 24, "val": 8, "test": 12}
    assert task.source["preprocess"]["interpolation"] == "bilinear" and task.class_names[7] == "class 7"
    assert task.train.labels.tolist() == [i % 4 for i in range(24)]
    assert str(trees) not in json.dumps(task.source)


def test_pictures_are_the_listed_ones(tmp_path):
    make_vtab_tree(tmp_path, ["svhn"], suffix=".png")
    task = load_task("svhn", tmp_path, image_size=32, strict=False)
    assert np.array_equal(task.train.images[5].permute(1, 2, 0), class_picture(1, 5, (32, 32)))


@pytest.mark.parametrize("task,folder", [("cifar100", "cifar100"), ("cifar100", "cifar"), ("oxford_iiit_pet", "oxford_pet"),
                                         ("oxford_iiit_pet", "oxford_iiit_pet")])
def test_folder_names_of_both_launchers(tmp_path, task, folder):
    made = make_vtab_tree(tmp_path, [task], n=(4, 4, 4)) / vtab.VTAB[task].folders[0]
    made.rename(tmp_path / folder)
    assert len(load_task(task, tmp_path, image_size=16, strict=False).test) == 4


def test_wrong_counts_stop_a_strict_load(trees):
    message = "(?s)task svhn in .* has 3 faults.*train lists 24 images, not 800.*test lists 12 images, not 26032"
    with pytest.raises(ValueError, match=message):
        load_task("svhn", trees / "vtab")


def test_good_tree_verifies(trees):
    report = vtab.verify(trees / "vtab", ["cifar100", "svhn", "kitti", "sun397"], strict=False)
    assert report.ok, texts(report)
    assert "no training image of class 4, 5, 6" in texts(report, note=True)  # four classes only: notes, no faults
    assert [row["train"] for row in report.rows] == [24] * 4 and "0 faults" in report._repr_markdown_()


def test_strict_verify_names_counts_and_missing_tasks(trees):
    report = vtab.verify(trees / "vtab")
    assert not report.ok and len(report.rows) == 19
    assert sum("is missing: no folder" in f.text for f in report.findings) == 15
    assert "no folder cifar or" not in texts(report) and "test lists 12 images, not 711" in texts(report)
    assert "no training image of class 4" in texts(report)  # svhn has 10 classes: a fault
    assert any(f.note and f.task == "sun397" for f in report.findings)  # 397 classes: a note


def change(path, number, line):
    lines = path.read_text().splitlines()
    lines[number] = line
    path.write_text("\n".join(lines) + "\n")


FAULTS = {  # name: (what is done to the task's folder, what the message says)
    "class id out of range": (lambda t: change(t / "train800.txt", 2, "images/train800/000002.jpg 10"),
                              r"train: class id 10 \(images/train800/000002.jpg\) is outside 0..9"),
    "labels from one": (lambda t: change(t / "test.txt", 0, "images/test/000000.jpg 11"), "test: class id 11"),
    "line without a label": (lambda t: change(t / "val200.txt", 3, "images/val200/000003.jpg"), "val200.txt line 4"),
    "negative label": (lambda t: change(t / "val200.txt", 3, "images/val200/000003.jpg -1"), "val200.txt line 4"),
    "missing image": (lambda t: (t / "images/test/000004.jpg").unlink(),
                      r"missing files of test \(1\): images/test/000004.jpg"),
    "missing list": (lambda t: (t / "val200.txt").unlink(), "list val200.txt is missing"),
    "listed twice": (lambda t: change(t / "test.txt", 1, "images/test/000000.jpg 0"),
                     r"listed twice in test \(1\): images/test/000000.jpg"),
    "train image in test": (lambda t: change(t / "test.txt", 1, "images/train800/000001.jpg 1"),
                            r"both in train and in test \(1\): 000001.jpg"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_stops_the_load_and_is_named_by_verify(trees, fault):
    break_it, message = FAULTS[fault]
    break_it(trees / "vtab/svhn")
    with pytest.raises(ValueError, match=message): load_task("svhn", trees / "vtab", strict=False)
    report = vtab.verify(trees / "vtab", ["cifar100", "svhn", "kitti"], strict=False)
    assert not report.ok and {f.task for f in report.findings if not f.note} == {"svhn"}
    assert re.search(message, texts(report))


def cut(path, keep): path.write_bytes(path.read_bytes()[:keep])


JOINED = "images/train800val200"
CONTENT = {
    "truncated image": (lambda t: cut(t / "images/val200/000001.jpg", -100), "000001.jpg: image file is truncated"),
    "no image at all": (lambda t: (t / "images/test/000001.jpg").write_text("<html>"),
                        "cannot decode image .*test/000001.jpg"),
    "joined list missing": (lambda t: (t / "train800val200.txt").unlink(), "list train800val200.txt is missing"),
    "joined list too short": (lambda t: (t / "train800val200.txt").write_text(f"{JOINED}/000000.jpg 0\n"),
                              r"lists 1 images, not 24 \+ 8"),
    "joined labels differ": (lambda t: change(t / "train800val200.txt", 0, f"{JOINED}/000000.jpg 3"), "has other labels"),
    "joined images differ": (lambda t: shutil.copy(t / "images/test/000000.jpg", t / JOINED / "000000.jpg"),
                             "1 images of train800val200 are not in"),
    "joined image missing": (lambda t: (t / JOINED / "000009.jpg").unlink(), r"missing files of train800val200 \(1\)"),
}


@pytest.mark.parametrize("fault", CONTENT)
def test_verify_reads_the_files(trees, fault):
    break_it, message = CONTENT[fault]
    break_it(trees / "vtab/svhn")
    assert vtab.verify(trees / "vtab", ["svhn"], strict=False, content=False).ok
    report = vtab.verify(trees / "vtab", ["svhn"], strict=False)
    assert not report.ok and re.search(message, texts(report)), texts(report)


def test_truncated_image_stops_the_load(trees):
    CONTENT["truncated image"][0](trees / "vtab/svhn")
    with pytest.raises(ValueError, match="cannot decode image .*val200/000001.jpg"): load_task("svhn", trees / "vtab", strict=False)


def test_verify_collects_several_faults_at_once(trees):
    for name in ("class id out of range", "missing image", "line without a label"): FAULTS[name][0](trees / "vtab/svhn")
    for name in ("truncated image", "joined image missing"): CONTENT[name][0](trees / "vtab/svhn")
    report = vtab.verify(trees / "vtab", ["svhn"], strict=False)
    for part in ("class id 10", "000004.jpg", "line 4", "truncated", "files of train800val200"): assert part in texts(report)


def test_long_lists_of_names_are_cut():
    many = Listing(listing.Path("/nowhere"), [f"{i}.jpg" for i in range(50)], [0] * 50)
    found = check_listings("x", {"train": many, "val": Listing(many.folder), "test": Listing(many.folder)}, 1, None)
    assert "9.jpg and 40 more" in found[0].text


# fine-grained

def test_load_fgvc(trees):
    task = load_task("cub200", trees / "fgvc", image_size=32, strict=False)
    assert task.image_size == round(256 * 32 / 224) and task.group == "fine_grained"
    assert task.class_names == ["001.kind_0", "002.kind_1", "003.kind_2"]
    assert task.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert load_task("stanford_cars", trees / "fgvc", image_size=32, preprocess="ssf", strict=False).image_size == round(248 * 32 / 224)


def test_a_class_that_one_list_lacks_does_not_shift_the_others(trees):
    path = trees / "fgvc/CUB_200_2011/val.json"
    entries = {file: i for file, i in json.loads(path.read_text()).items() if i != 1}
    write_json(path, entries)
    task = load_task("cub200", trees / "fgvc", image_size=32, strict=False)
    assert task.val.labels.tolist() == [1, 1, 2, 2]


def test_fgvc_faults(trees):
    home = trees / "fgvc/CUB_200_2011"
    (home / "test.json").write_text('{"a": 1')
    entries = json.loads((home / "val.json").read_text())
    write_json(home / "val.json", entries | {"x.jpg": "seven"})
    (home / "images/001.kind_0/train_0.jpg").unlink()
    report = fgvc.verify(trees / "fgvc", ["cub200", "nabirds"], strict=False)
    for part in ("test.json is not valid JSON", "class id 'seven' of x.jpg", "001.kind_0/train_0.jpg", "no folder nabirds"):
        assert part in texts(report), part
    with pytest.raises(ValueError, match="has 3 faults"): load_task("cub200", trees / "fgvc", strict=False)
    with pytest.raises(ValueError, match="the lists hold 3 classes, not 196"): load_task("stanford_cars", trees / "fgvc")


# folders

def test_folder_is_split_by_seed_and_class(tmp_path):
    make_folder_tree(tmp_path / "mine", n=20)
    task = load_task("folder", tmp_path / "mine", image_size=32)
    assert task.name == "mine" and task.class_names == ["amber", "jade", "onyx"]
    assert task.source["counts"] == {"train": 48, "val": 6, "test": 6}
    assert all(torch.equal(s.labels.bincount(), s.labels.bincount()[:1].expand(3)) for s in (task.train, task.val, task.test))
    assert torch.equal(task.test.images, load_task("folder", tmp_path / "mine", image_size=32).test.images)
    assert not torch.equal(task.test.images, load_task("folder", tmp_path / "mine", image_size=32, seed=1).test.images)


def test_three_images_are_enough_for_a_class_and_two_are_not(tmp_path):
    task = load_task("folder", make_folder_tree(tmp_path / "three", n=3), image_size=32)
    assert task.source["counts"] == {"train": 3, "val": 3, "test": 3}
    make_folder_tree(tmp_path / "two", n=2)
    with pytest.raises(ValueError, match="class 'amber' of .* has 2 images"): load_task("folder", tmp_path / "two")


def test_folder_with_given_splits(tmp_path):
    root = make_folder_tree(tmp_path / "mine", n=4, split=True)
    task = load_task("folder", root, image_size=32, preprocess="da_vpt")
    assert task.source["counts"] == {"train": 12, "val": 12, "test": 12}
    shutil.rmtree(root / "test" / "jade")
    with pytest.raises(ValueError, match="train and .*test differ: jade"): load_task("folder", root)
    shutil.rmtree(root / "test")
    with pytest.raises(ValueError, match="has no test folder"): load_task("folder", root)


def test_folder_faults(tmp_path):
    root = make_folder_tree(tmp_path / "mine")
    (root / "jade" / ".hidden.png").write_text("x")
    (root / "jade" / "readme.txt").write_text("x")
    with pytest.warns(UserWarning, match="no pictures by their suffix .*jade/readme.txt"):
        assert len(load_task("folder", root, image_size=32).trainval) == 27
    (root / "jade" / "readme.txt").unlink()
    (root / "void").mkdir()
    with pytest.raises(ValueError, match="no images in class folders void"): load_task("folder", root)
    (root / "void").rmdir()
    (root / "jade" / "000.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match="cannot decode image .*jade/000.jpg"): load_task("folder", root)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"): load_task("folder", tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="has no class folders"): load_task("folder", tmp_path / "bare")


# by name

def test_unknown_names_and_options(trees):
    with pytest.raises(KeyError, match="unknown benchmark 'imagenet'"): list_tasks("imagenet")
    with pytest.raises(ValueError, match="task 'svhn' of vtab needs root="): load_task("svhn")
    with pytest.raises(FileNotFoundError, match="task dtd is missing: no folder dtd in"): load_task("dtd", trees / "vtab")
    with pytest.raises(KeyError, match="Did you mean 'ship'"): load_task("svhn", trees / "vtab", preprocess="shipp")
    with pytest.raises(TypeError, match="sead"): load_task("svhn", trees / "vtab", sead=1)
    with pytest.raises(KeyError, match="unknown task 'dsprites'"): vtab.verify(trees / "vtab", ["dsprites"])


@pytest.mark.parametrize("name", [None, 5, ["folder"], {"folder"}])
def test_names_that_are_no_strings(name):
    with pytest.raises(KeyError, match="unknown task .*Known: .*folder"): load_task(name)


def test_unknown_task_is_refused_with_a_hint():
    with pytest.raises(KeyError, match="unknown task 'cifar10'.*Did you mean 'cifar100'"): load_task("cifar10")


# cache

def cached(trees, folder, **options):
    return load_task("svhn", trees / "vtab", image_size=32, strict=False, cache=folder, **options)


def test_cache_gives_the_same_tensors_without_decoding(trees, tmp_path, monkeypatch):
    plain = load_task("svhn", trees / "vtab", image_size=32, strict=False)
    first = cached(trees, tmp_path / "cache")
    monkeypatch.setattr(listing, "decode", lambda *given: pytest.fail("decoded again"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = cached(trees, tmp_path / "cache")
    for task in (first, second):
        assert torch.equal(task.train.images, plain.train.images) and torch.equal(task.test.images, plain.test.images)
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_writing_to_a_cached_split_does_not_change_the_file(trees, tmp_path):
    task = cached(trees, tmp_path / "cache")
    before = task.train.images.clone()
    task.train.images.zero_()
    assert torch.equal(cached(trees, tmp_path / "cache").train.images, before)


@pytest.mark.parametrize("what", ["preprocess", "size", "file"])
def test_stale_cache_is_not_used(trees, tmp_path, what):
    cached(trees, tmp_path / "cache")
    if what == "file":
        path = trees / "vtab/svhn/images/test/000000.jpg"
        shutil.copy(trees / "vtab/svhn/images/test/000001.jpg", path)
        os.utime(path, ns=(1, 1))
        task = cached(trees, tmp_path / "cache")
        assert torch.equal(task.test.images[0], task.test.images[1])
    elif what == "size": load_task("svhn", trees / "vtab", image_size=16, strict=False, cache=tmp_path / "cache")
    else: cached(trees, tmp_path / "cache", preprocess="released")
    assert len(list((tmp_path / "cache").iterdir())) == (4 if what == "file" else 6)


def test_interrupted_cache_is_neither_left_nor_read(trees, tmp_path, monkeypatch):
    calls, decode = [], listing.decode
    def dying(*given):
        calls.append(given)
        if len(calls) > 10: raise KeyboardInterrupt
        return decode(*given)
    monkeypatch.setattr(listing, "decode", dying)
    with pytest.raises(KeyboardInterrupt): cached(trees, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.npy"))
    monkeypatch.setattr(listing, "decode", decode)
    plain = load_task("svhn", trees / "vtab", image_size=32, strict=False)
    assert torch.equal(cached(trees, tmp_path / "cache").train.images, plain.train.images)


def test_leftover_of_a_killed_process_is_ignored(trees, tmp_path):
    (tmp_path / "cache").mkdir()
    half = tmp_path / "cache/.svhn-train-0123456789abcdef.99-dead.tmp.npy"
    half.write_bytes(b"\x93NUMPY half")
    assert len(cached(trees, tmp_path / "cache").train) == 24


def test_damaged_cache_is_refused_by_name(trees, tmp_path):
    cached(trees, tmp_path / "cache")
    file = next((tmp_path / "cache").glob("svhn-train-*.npy"))
    whole = file.read_bytes()
    for keep in (0, 50, 4000):
        file.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=f"cache file .*{file.name} is damaged"): cached(trees, tmp_path / "cache")
    np.save(file.with_suffix(""), np.zeros(3))
    with pytest.raises(ValueError, match="holds float64"): cached(trees, tmp_path / "cache")


def test_cached_task_saves_and_loads(trees, tmp_path):
    task = cached(trees, tmp_path / "cache")
    assert torch.equal(Task.load(task.save(tmp_path / "t.safetensors")).test.images, task.test.images)


def test_a_changed_decoder_asks_for_another_cache(trees, tmp_path, monkeypatch):
    cached(trees, tmp_path / "cache")
    monkeypatch.setattr(listing, "DECODER", listing.DECODER + 1)
    cached(trees, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 6


# the fixture's classes can be learned

def test_fixture_classes_are_learnable(tmp_path):
    from sklearn.linear_model import LogisticRegression
    task = load_task("svhn", make_vtab_tree(tmp_path, ["svhn"]), image_size=16, strict=False)
    flat = lambda split: split.images.flatten(1).float().div(255).numpy()
    probe = LogisticRegression(max_iter=300).fit(flat(task.trainval), task.trainval.labels)
    assert probe.score(flat(task.test), task.test.labels) > 0.9
