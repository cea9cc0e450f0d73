"CoOp's data sets on fabricated trees of a few tiny pictures: layouts, class names, checks, and what is decoded."
import json
import re
import shutil

import numpy as np
import pytest
import torch
from fixture_trees import class_picture
from PIL import Image
from scipy.io import savemat

from hierprompt.data.benchmarks import list_tasks, load_task
from hierprompt.data.coop import COOP, split_in_three, split_off_val, verify
from hierprompt.data.fewshot import few_shot, manifest
from hierprompt.data.preprocess import PREPROCESS, to_square

KEYS = [task.key for task in COOP.values()]
NAMES = {  # key -> names as the set itself writes them, in label order, and as prompts want them
    "caltech101": (["Faces", "Leopards", "sea_horse"], ["face", "leopard", "sea horse"]),
    "dtd": (["banded", "polka-dotted", "woven"], ["banded", "polka-dotted", "woven"]),
    "eurosat": (["AnnualCrop", "Forest", "SeaLake"], ["Annual Crop Land", "Forest", "Sea or Lake"]),
    "fgvc_aircraft": (["Spitfire", "707-320", "Boeing 717"], ["Spitfire", "707-320", "Boeing 717"]),
    "food101": (["apple_pie", "baby_back_ribs", "waffles"], ["apple pie", "baby back ribs", "waffles"]),
    "oxford_flowers": (["pink primrose", "sweet pea", "rose"], ["pink primrose", "sweet pea", "rose"]),
    "oxford_pets": (["Abyssinian", "american_bulldog", "Great_Pyrenees"], ["abyssinian", "american bulldog", "great pyrenees"]),
    "stanford_cars": (["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "smart fortwo Convertible 2012"],
                      ["2000 AM General Hummer SUV", "2012 Ram C/V Cargo Van Minivan", "2012 smart fortwo Convertible"]),
    "sun397": (["/a/abbey", "/a/airplane_cabin", "/c/church/outdoor"], ["abbey", "airplane cabin", "outdoor church"]),
    "ucf101": (["ApplyEyeMakeup", "Archery", "YoYo"], ["Apply Eye Makeup", "Archery", "Yo Yo"]),
    "imagenet": (["n01440764", "n01443537", "n02119789"], ["tench", "goldfish", "kit fox"])}
COUNTS = {"train": 10, "val": 4, "test": 6}   # 50 / 20 / 30 of 20


def paths(key):
    "part -> [(path under the pictures' folder, label)] in the form that the set has."
    names = NAMES[key][0]
    number = {"train": 0, "val": 10, "test": 14}
    def path(part, label, i):
        n = number[part] + i
        if key == "fgvc_aircraft": return f"{1000 * label + n}.jpg"
        if key == "oxford_flowers": return f"image_{20 * label + n + 1:05}.jpg"
        if key == "oxford_pets": return f"{names[label]}_{n}.jpg"
        if key == "stanford_cars": return f"cars_{'test' if part == 'test' else 'train'}/{20 * label + n:05}.jpg"
        if key == "sun397": return f"{names[label][1:]}/sun_{n}.jpg"
        if key == "ucf101": return f"{'_'.join(re.findall('[A-Z][a-z]*', names[label]))}/v_{names[label]}_g{n}.jpg"
        if key == "imagenet": return f"{'val' if part == 'test' else 'train'}/{names[label]}/{n:03}.JPEG"
        return f"{names[label]}/{n:03}.jpg"
    return {part: [(path(part, label, i), label) for label in range(3) for i in range(count)] for part, count in COUNTS.items()}


def make(root, key, split_file=True, size=(36, 30)):
    "One set under `root`, with its split file or with the lists that the set itself ships."
    task = COOP[f"coop_{key}"]
    folder, lists, names = root / task.folders[0], paths(key), NAMES[key][0]
    for part in lists.values():
        for i, (path, label) in enumerate(part):
            (file := folder / task.images / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(class_picture(label, i, size)).save(file, "JPEG")
    if task.split_file and split_file:
        (folder / task.split_file).write_text(json.dumps({part: [[p, k, names[k]] for p, k in items] for part, items in lists.items()}))
    elif writer := OWN.get(key): writer(folder, lists, names)
    return folder


def write(file, lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")


def own_aircraft(folder, lists, names):
    write(folder / "variants.txt", names)
    for part, items in lists.items(): write(folder / f"images_variant_{part}.txt", [f"{p[:-4]} {names[k]}" for p, k in items])


def own_pets(folder, lists, names):
    for part, items in {"trainval": lists["train"] + lists["val"], "test": lists["test"]}.items():
        write(folder / f"annotations/{part}.txt", [f"{p[:-4]} {k + 1} 1 1" for p, k in items])


def own_sun(folder, lists, names):
    write(folder / "ClassName.txt", names)
    write(folder / "Training_01.txt", ["/" + p for p, _ in lists["train"] + lists["val"]])
    write(folder / "Testing_01.txt", ["/" + p for p, _ in lists["test"]])


def own_ucf(folder, lists, names):
    write(folder / "ucfTrainTestlist/classInd.txt", [f"{i} {name}" for i, name in enumerate(names, 1)])
    line = lambda p, k: f"{names[k]}/{p.split('/')[1][:-4]}.avi"
    write(folder / "ucfTrainTestlist/trainlist01.txt", [f"{line(p, k)} {k + 1}" for p, k in lists["train"] + lists["val"]])
    write(folder / "ucfTrainTestlist/testlist01.txt", [line(p, k) for p, k in lists["test"]])


def own_flowers(folder, lists, names):
    items = sorted(lists["train"] + lists["val"] + lists["test"])
    savemat(folder / "imagelabels.mat", {"labels": np.array([[k + 1 for _, k in items]], np.uint8)})
    (folder / "cat_to_name.json").write_text(json.dumps({str(k + 1): name for k, name in enumerate(names)}))


def own_cars(folder, lists, names):
    (folder / "devkit").mkdir()
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(names, object)})
    for file, items in {
        "devkit/cars_train_annos.mat": lists["train"] + lists["val"],
        "cars_test_annos_withlabels.mat": lists["test"],
    }.items():
        rows = np.array([(p.split("/")[1], k + 1) for p, k in items], [("fname", object), ("class", np.uint8)])
        savemat(folder / file, {"annotations": rows})


def own_imagenet(folder, lists, names):
    write(folder / "classnames.txt", ["n00000001 somewhere else", *(f"{wnid} {name}" for wnid, name in zip(names, NAMES["imagenet"][1]))])


OWN = {"fgvc_aircraft": own_aircraft, "oxford_pets": own_pets, "sun397": own_sun, "ucf101": own_ucf, "oxford_flowers": own_flowers,
       "stanford_cars": own_cars, "imagenet": own_imagenet}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("coop")
    for key in KEYS: make(root / "json", key)
    for key in KEYS: make(root / "own", key, split_file=False)
    return root


@pytest.fixture
def dtd(pristine, tmp_path):
    shutil.copytree(pristine / "json/dtd", tmp_path / "dtd")
    return tmp_path


def edit(root, change):
    "Changes the split file of DTD."
    file = root / "dtd/split_zhou_DescribableTextures.json"
    lists = json.loads(file.read_text())
    change(lists)
    file.write_text(json.dumps(lists))


def faults(report): return "\n".join(f.text for f in report.findings if not f.note)
def notes(report): return "\n".join(f.text for f in report.findings if f.note)


def test_the_eleven_are_the_specification():
    table = {
        "caltech101": (100, 4128, 1649, 2465),
        "dtd": (47, 2820, 1128, 1692),
        "eurosat": (10, 13500, 5400, 8100),
        "fgvc_aircraft": (100, 3334, 3333, 3333),
        "food101": (101, 50500, 20200, 30300),
        "oxford_flowers": (102, 4093, 1633, 2463),
        "oxford_pets": (37, 2944, 736, 3669),
        "stanford_cars": (196, 6509, 1635, 8041),
        "sun397": (397, 15880, 3970, 19850),
        "ucf101": (101, 7639, 1898, 3783),
        "imagenet": (1000, 1281167, 0, 50000),
    }
    assert {task.key: (task.num_classes, *task.sizes) for task in COOP.values()} == table
    assert list_tasks("coop") == [f"coop_{key}" for key in table]
    files = {
        "caltech101": "Caltech101",
        "dtd": "DescribableTextures",
        "eurosat": "EuroSAT",
        "food101": "Food101",
        "oxford_flowers": "OxfordFlowers",
        "oxford_pets": "OxfordPets",
        "stanford_cars": "StanfordCars",
        "sun397": "SUN397",
        "ucf101": "UCF101",
    }
    assert {t.key: t.split_file for t in COOP.values() if t.split_file} == {key: f"split_zhou_{name}.json" for key, name in files.items()}
    places = {
        "caltech101": "caltech-101/101_ObjectCategories",
        "dtd": "dtd/images",
        "eurosat": "eurosat/2750",
        "fgvc_aircraft": "fgvc_aircraft/images",
        "food101": "food-101/images",
        "oxford_flowers": "oxford_flowers/jpg",
        "oxford_pets": "oxford_pets/images",
        "stanford_cars": "stanford_cars/.",
        "sun397": "sun397/SUN397",
        "ucf101": "ucf101/UCF-101-midframes",
        "imagenet": "imagenet/images",
    }
    assert {t.key: f"{t.folders[0]}/{t.images}" for t in COOP.values()} == places


@pytest.mark.parametrize("key", KEYS)
def test_every_layout(key, pristine):
    task = load_task(f"coop_{key}", pristine / "json", 32, shots=3, seeds=(1, 2), strict=False)
    assert task.class_names == NAMES[key][1] and task.group == "coop"
    assert task.test.labels.tolist() == [k for _, k in paths(key)["test"]]
    lists = {part: [p for p, _ in items] for part, items in paths(key).items()}
    for seed in (1, 2):
        train, val = few_shot(task, seed)
        assert train.labels.bincount().tolist() == [3, 3, 3] and val.labels.bincount().tolist() == [3, 3, 3]
        told = manifest(task)["seeds"][str(seed)]
        known = lists if key != "imagenet" else dict.fromkeys(("train", "val"), lists["train"] + lists["val"])
        for part in ("train", "val"): assert {item for item, *_ in told[part]["items"]} <= set(known[part])
        assert not {i[0] for i in told["train"]["items"]} & {i[0] for i in told["val"]["items"]}
    assert len(task.train) <= 18 and str(pristine) not in json.dumps(task.source)
    assert task.source["preprocess"] == {**vars(PREPROCESS["clip"])}


@pytest.mark.parametrize("key", [key for key in KEYS if COOP[f"coop_{key}"].split_file])
def test_lists_without_a_split_file(key, pristine):
    task = COOP[f"coop_{key}"]
    parts = task.listings(task.find(pristine / "own"))
    own_test = key in ("oxford_pets", "stanford_cars", "sun397", "ucf101")
    assert [len(parts[part]) for part in ("train", "val", "test")] == ([33, 9, 18] if own_test else [30, 12, 18])
    assert task.gone(parts) == [] and task.classes(parts, strict=False) == NAMES[key][1]
    known = {p: k for items in paths(key).values() for p, k in items}
    for found in parts.values(): assert all(known[p] == k for p, k in zip(found.files, found.labels))
    assert not set(parts["train"].files) & set(parts["val"].files) and not set(parts["train"].files) & set(parts["test"].files)
    if own_test: assert set(parts["test"].files) == {p for p, _ in paths(key)["test"]}
    again = task.listings(task.find(pristine / "own"))
    assert all(again[part].files == parts[part].files for part in parts)


def test_the_generic_rule_is_noted(pristine):
    task = load_task("coop_eurosat", pristine / "own", 32, shots=1, strict=False)
    assert "not the published ones" in task.source["protocol"]
    assert "split_zhou_EuroSAT.json" in notes(verify(pristine / "own", ["coop_eurosat"], strict=False))
    assert "generic" not in load_task("coop_eurosat", pristine / "json", 32, shots=1, strict=False).source["protocol"]


def test_generic_shares():
    items = [(f"{k}/{i}", k, str(k)) for k, n in enumerate([10, 15, 47]) for i in range(n)]
    parts = split_in_three(items)
    shares = [[sum(item[1] == k for item in parts[part]) for part in ("train", "val", "test")] for k in range(3)]
    assert shares == [[5, 2, 3], [8, 3, 4], [24, 9, 14]] and sorted(sum(parts.values(), [])) == sorted(items)
    assert split_in_three(items[::-1]) == parts
    off = split_off_val(items, [("t", 0, "0")])
    assert [len(off[p]) for p in ("train", "val", "test")] == [72 - 2 - 3 - 9, 14, 1]
    with pytest.raises(ValueError, match="class '0' has 2 training images"): split_off_val(items[:2], [])


def test_ignored_folders_of_caltech(pristine, tmp_path):
    shutil.copytree(pristine / "own/caltech-101", tmp_path / "caltech-101")
    for name in ("BACKGROUND_Google", "Faces_easy"):
        shutil.copytree(tmp_path / "caltech-101/101_ObjectCategories/Faces", tmp_path / f"caltech-101/101_ObjectCategories/{name}")
    task = COOP["coop_caltech101"]
    assert task.classes(task.listings(task.find(tmp_path)), strict=False) == ["face", "leopard", "sea horse"]


def test_aircraft_labels_follow_variants_not_the_alphabet(pristine):
    task = load_task("coop_fgvc_aircraft", pristine / "json", 32, shots=1, strict=False)
    assert task.class_names == ["Spitfire", "707-320", "Boeing 717"] != sorted(task.class_names)


def test_imagenet_val_is_held_out_of_train_and_flagged(pristine):
    task = load_task("coop_imagenet", pristine / "json", 32, shots=8, seeds=(1,), strict=False)
    told = manifest(task)["seeds"]["1"]
    assert all(item.startswith("train/") for part in told.values() for item, *_ in part["items"])
    assert len(told["val"]["items"]) == 3 * 4 and "validation list is the test set" in task.source["protocol"]
    assert "validation list is the test set" in notes(verify(pristine / "json", ["coop_imagenet"], strict=False))


def test_only_what_is_needed_is_decoded(dtd):
    task = load_task("coop_dtd", dtd, 32, shots=2, seeds=(1,), strict=False)
    used = {item for part in task.source["fewshot"]["items"].values() for item in part}
    spare = [p for part in ("train", "val") for p, _ in paths("dtd")[part] if p not in used]
    assert len(spare) == 30 + 12 - 12
    for path in spare: (dtd / "dtd/images" / path).write_bytes(b"no picture")
    again = load_task("coop_dtd", dtd, 32, shots=2, seeds=(1,), strict=False)
    assert torch.equal(again.train.images, task.train.images)
    with pytest.raises(ValueError, match="cannot decode image"): load_task("coop_dtd", dtd, 32, shots=8, strict=False)


def test_pictures_are_the_listed_ones_in_clips_preprocessing(dtd):
    task = load_task("coop_dtd", dtd, 32, shots=2, seeds=(1,), strict=False)
    item = task.source["fewshot"]["items"]["train"][3]
    picture = Image.open(dtd / "dtd/images" / item).convert("RGB")
    assert torch.equal(task.train.images[3], to_square(picture, PREPROCESS["clip"], 32))


def test_cache_gives_the_same_images(dtd, tmp_path):
    plain = load_task("coop_dtd", dtd, 32, shots=2, strict=False)
    cached = load_task("coop_dtd", dtd, 32, shots=2, strict=False, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3 and torch.equal(plain.test.images, cached.test.images)


def test_missing_images_stop_with_count_and_three_names(dtd):
    gone = [p for p, _ in paths("dtd")["train"]][:5]
    for path in gone: (dtd / "dtd/images" / path).unlink()
    with pytest.raises(FileNotFoundError) as caught: load_task("coop_dtd", dtd, 32, shots=1, strict=False)
    text = str(caught.value)
    assert f"the train list names images that are not in {dtd / 'dtd/images'} (5): {', '.join(gone[:3])}, ...;" in text
    assert gone[3] not in text and "unpack the pictures there, or take the split_zhou_DescribableTextures.json that belongs to them" in text


@pytest.mark.parametrize("key,home", [("dtd", "images"), ("stanford_cars", "cars_test"), ("imagenet", "images/val")])
def test_missing_folder_of_pictures(key, home, pristine, tmp_path):
    task = COOP[f"coop_{key}"]
    shutil.copytree(pristine / "json" / task.folders[0], tmp_path / task.folders[0])
    shutil.rmtree(tmp_path / task.folders[0] / home)
    with pytest.raises(FileNotFoundError, match=home.split("/")[-1]): load_task(task.name, tmp_path, 32, strict=False)
    report = verify(tmp_path, [task.name], strict=False)
    assert not report.ok and home in faults(report)


def test_missing_set_and_missing_lists(dtd, pristine, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder food-101 in"): load_task("coop_food101", dtd, 32)
    shutil.copytree(pristine / "own/oxford_pets/images", tmp_path / "oxford_pets/images")
    with pytest.raises(ValueError, match="split_zhou_OxfordPets.json or annotations/trainval.txt is missing"):
        load_task("coop_oxford_pets", tmp_path, 32)


def test_strict_refuses_other_sizes(dtd):
    with pytest.raises(ValueError) as caught: load_task("coop_dtd", dtd, 32)
    for text in (
        "the lists hold 3 classes, not 47",
        "train lists 30 images, not 2820",
        "val lists 12 images, not 1128",
        "test lists 18 images, not 1692",
    ):
        assert text in str(caught.value)


def test_strict_accepts_the_published_sizes(dtd, monkeypatch):
    monkeypatch.setitem(COOP, "coop_dtd", type(COOP["coop_dtd"])(**{**vars(COOP["coop_dtd"]), "num_classes": 3, "sizes": (30, 12, 18)}))
    assert load_task("coop_dtd", dtd, 32, shots=1).num_classes == 3
    assert verify(dtd, ["coop_dtd"]).ok


SPOILED = {
    "no list 'val'": lambda lists: lists.pop("val"),
    "train: ['x.jpg', 0] is not [path, label, class name]": lambda lists: lists["train"].append(["x.jpg", 0]),
    "val: ['x.jpg', '0', 'y'] is not": lambda lists: lists["val"].append(["x.jpg", "0", "y"]),
    "label 0 is called banded and braided": lambda lists: lists["test"].__setitem__(0, [lists["test"][0][0], 0, "braided"]),
    "listed twice in train (1)": lambda lists: lists["train"].append(lists["train"][0]),
    "both in train and in test (1)": lambda lists: lists["test"].append(lists["train"][0]),
    "no image of label 1": lambda lists: [lists.update({p: [e for e in lists[p] if e[1] != 1]}) for p in list(lists)],
    "class id -1": lambda lists: lists["train"].__setitem__(0, [lists["train"][0][0], -1, "banded"]),
}


@pytest.mark.parametrize("text", SPOILED)
def test_spoiled_split_files(text, dtd):
    edit(dtd, SPOILED[text])
    with pytest.raises(ValueError, match=re.escape(text)): load_task("coop_dtd", dtd, 32, strict=False)
    assert text in faults(verify(dtd, ["coop_dtd"], strict=False))


def test_split_file_that_is_no_json(dtd):
    (dtd / "dtd/split_zhou_DescribableTextures.json").write_text('{"train": [')
    with pytest.raises(ValueError, match="split_zhou_DescribableTextures.json"): load_task("coop_dtd", dtd, 32, strict=False)


def test_classes_may_have_one_name(dtd):
    "As in CLIP's list for ImageNet: one logit a class, see `tune_clip`."
    def rename(lists):
        for entries in lists.values():
            for entry in entries: entry[2] = entry[2] if entry[1] == 0 else "striped"
    edit(dtd, rename)
    assert load_task("coop_dtd", dtd, 32, shots=1, strict=False).class_names[1:] == ["striped", "striped"]


def test_names_that_are_ours_already_stay(pristine, tmp_path):
    make(tmp_path, "ucf101")
    file = tmp_path / "ucf101/split_zhou_UCF101.json"
    lists = json.loads(file.read_text())
    renamed = {"ApplyEyeMakeup": "Apply_Eye_Makeup", "Archery": "Archery", "YoYo": "Yo_Yo"}
    file.write_text(json.dumps({part: [[p, k, renamed[name]] for p, k, name in items] for part, items in lists.items()}))
    assert load_task("coop_ucf101", tmp_path, 32, shots=1, strict=False).class_names == NAMES["ucf101"][1]


def test_verify_finds_everything_at_once(pristine, tmp_path):
    root = shutil.copytree(pristine / "json", tmp_path / "data")
    shutil.rmtree(root / "sun397")
    (root / "food-101/images" / paths("food101")["test"][0][0]).unlink()
    broken = root / "oxford_pets/images" / paths("oxford_pets")["val"][1][0]
    broken.write_bytes(broken.read_bytes()[:400])
    report = verify(root, strict=False)
    assert {row["task"]: row["faults"] for row in report.rows if row["faults"]} == {
        "coop_sun397": 1,
        "coop_food101": 1,
        "coop_oxford_pets": 1,
    }
    assert [row["folder"] for row in report.rows if row["task"] == "coop_sun397"] == ["missing"] and not report.ok
    for text in ("no folder sun397", "the test list names images", f"cannot decode image {broken}"): assert text in faults(report)
    assert verify(root, ["coop_oxford_pets"], strict=False, content=False).ok
    whole = verify(pristine / "json", strict=False)
    assert whole.ok and [row["train"] for row in whole.rows] == [30] * 10 + [42]
    strict = verify(pristine / "json", ["coop_dtd"], content=False)
    assert "train lists 30 images, not 2820" in faults(strict)


def test_unknown_names(dtd):
    with pytest.raises(KeyError, match="unknown task 'coop_dtdd'.*Did you mean 'coop_dtd'"): load_task("coop_dtdd", dtd)
    with pytest.raises(KeyError, match="unknown task"): verify(dtd, ["coop_mnist"])
    with pytest.raises(ValueError, match="needs root"): load_task("coop_dtd")


def test_lists_that_cannot_be_read(pristine, tmp_path):
    root = shutil.copytree(pristine / "own", tmp_path / "own")
    lists = root / "fgvc_aircraft/images_variant_val.txt"
    lists.write_text(lists.read_text() + "99 Concorde\n")
    with pytest.raises(ValueError, match="cannot read the lists in .*fgvc_aircraft: KeyError 'Concorde'"):
        load_task("coop_fgvc_aircraft", root, 32, strict=False)
    for file in sorted((root / "eurosat/2750/Forest").iterdir())[2:]: file.unlink()
    with pytest.raises(ValueError, match="class 'Forest' has 2 images: too few for 50 / 20 / 30 %"):
        load_task("coop_eurosat", root, 32, strict=False)
    assert {row["faults"] for row in verify(root, ["coop_fgvc_aircraft", "coop_eurosat"], strict=False).rows} == {1}
