import json
import re

import numpy as np
import pytest
import torch
from fixture_trees import class_split

from hierprompt.data.tasks import PARTS, Split, Task


@pytest.fixture
def task():
    return Task("demo", "natural", ["a", "b", "c"], *(class_split(n, 3, seed) for seed, n in enumerate((12, 6, 9))), {"origin": "drawn"})


def test_save_load_roundtrip(task, tmp_path):
    again = Task.load(task.save(tmp_path / "deep" / "demo.safetensors"))
    assert (again.name, again.group, again.class_names, again.source) == (task.name, task.group, task.class_names, task.source)
    for part in PARTS:
        assert torch.equal(getattr(again, part).images, getattr(task, part).images)
        assert torch.equal(getattr(again, part).labels, getattr(task, part).labels)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["demo.safetensors"]


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_task_file_is_refused_by_name(task, tmp_path, keep):
    path = task.save(tmp_path / "demo.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="demo.safetensors is not a complete task file"): Task.load(path)


def test_foreign_safetensors_file_is_refused(tmp_path):
    from safetensors.torch import save_file
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is not a complete task file"): Task.load(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="none.safetensors"): Task.load(tmp_path / "none.safetensors")


def test_save_that_fails_leaves_the_old_file(task, tmp_path):
    path = task.save(tmp_path / "demo.safetensors")
    before = path.read_bytes()
    task.source["bad"] = float("nan")
    with pytest.raises(ValueError): task.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_subset_is_seeded_ordered_and_plain():
    split = class_split(100, 4, 0, size=8)
    split.images[:, 0, 0, 0] = torch.arange(100)
    some = split.subset(30, seed=3)
    ids = some.images[:, 0, 0, 0].long()
    assert len(some) == 30 and torch.equal(ids, ids.sort().values) and len(set(ids.tolist())) == 30
    assert torch.equal(some.labels, ids % 4)
    assert torch.equal(some.images, split.subset(30, seed=3).images)
    assert not torch.equal(some.images, split.subset(30, seed=4).images)
    for n in (0, -1, 101):
        with pytest.raises(ValueError, match=f"subset of {n} images"): split.subset(n)


def test_subset_and_trainval_do_not_touch_the_global_generator(task):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    task.train.subset(3), task.trainval
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("label,shown", [(3, "label 3, outside 0..2"), (-1, "label -1, outside 0..2")])
def test_label_outside_the_classes(task, label, shown):
    labels = task.val.labels.clone()
    labels[2] = label
    with pytest.raises(ValueError, match=f"demo: val holds {shown}"):
        Task("demo", "natural", ["a", "b", "c"], task.train, Split(task.val.images, labels), task.test)


def test_empty_split_is_refused(task):
    empty = Split(task.val.images[:0], task.val.labels[:0])
    with pytest.raises(ValueError, match="the val split is empty"): Task("demo", "natural", ["a", "b", "c"], task.train, empty, task.test)


def test_labels_must_be_int64(task):
    with pytest.raises(ValueError, match="torch.int32, not torch.int64"): Split(task.val.images, task.val.labels.int())


@pytest.mark.parametrize("kind", ["numpy", "list", "pictures", "None", "tuple"])
def test_images_that_are_no_tensor(task, kind):
    from PIL import Image
    images = {"numpy": task.val.images.numpy(), "list": task.val.images.tolist(), "None": None, "tuple": tuple(task.val.images),
              "pictures": [Image.new("RGB", (32, 32))] * 6}[kind]
    with pytest.raises(TypeError, match=r"images are .*, not a tensor: torch.from_numpy\(array\).*uint8"):
        Split(images, task.val.labels)


@pytest.mark.parametrize("labels", [[0] * 6, np.zeros(6, np.int64), np.zeros(6, np.int32), None, range(6), "abcdef"])
def test_labels_that_are_no_tensor(task, labels):
    with pytest.raises(TypeError, match=r"labels are .*, not a tensor: torch.as_tensor\(labels\)"): Split(task.val.images, labels)


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.float32, torch.bool, torch.float64])
def test_labels_of_another_kind(task, kind):
    with pytest.raises(ValueError, match=f"labels are {kind}, not torch.int64: give labels.long"):
        Split(task.val.images, task.val.labels.to(kind))


@pytest.mark.parametrize("kind", [torch.float16, torch.float64, torch.int64, torch.bool])
def test_images_of_another_kind(task, kind):
    with pytest.raises(ValueError, match=f"images are {kind}, not torch.uint8"): Split(task.val.images.to(kind), task.val.labels)


def test_splits_of_nothing_and_of_two_devices(task):
    with pytest.raises(ValueError, match="no pixel"): Split(torch.zeros(2, 3, 0, 0, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels of shape \\(6, 1\\)"): Split(task.val.images, task.val.labels[:, None])
    with pytest.raises(ValueError, match="images are on meta, labels on cpu: move both"): Split(task.val.images.to("meta"), task.val.labels)
    assert len(Split(task.val.images[:0], task.val.labels[:0])) == 0


@pytest.mark.parametrize("names", [("a", "b", "c"), np.array(["a", "b", "c"]), ["a", "b", "c"]])
def test_class_names_become_a_list_of_strings(task, names, tmp_path):
    made = Task("demo", "natural", names, task.train, task.val, task.test)
    assert made.class_names == ["a", "b", "c"] and all(type(name) is str for name in made.class_names)
    assert Task.load(made.save(tmp_path / "t.safetensors")).class_names == made.class_names


@pytest.mark.parametrize("names, error, text", [
    ("abc", TypeError, "class_names wants a list of texts in their order, got str"), (None, TypeError, "got NoneType"),
    (3, TypeError, "class_names wants a list"),
    ({"a": 0, "b": 1, "c": 2}, TypeError, "wants a list"), ({"a", "b", "c"}, TypeError, "wants a list"),
    (torch.arange(3), TypeError, "is no text"), ([0, 1, 2], TypeError, "class_names[0] = 0 is no text"),
    (["a", None, "c"], TypeError, "class_names[1] = None"), (["a", "b", ""], ValueError, "class_names[2] = '' is empty"),
    ([], ValueError, "is empty")])
def test_class_names_that_are_none(task, names, error, text):
    with pytest.raises(error, match=re.escape(text)): Task("demo", "natural", names, task.train, task.val, task.test)


@pytest.mark.parametrize("change, error, text", [
    ({"name": ""}, ValueError, "name = '' is empty"), ({"name": None}, TypeError, "name = None is not a string"),
    ({"group": " "}, ValueError, "group"), ({"group": 3}, TypeError, "group = 3"), ({"val": None}, TypeError, "val is NoneType, no Split"),
    ({"source": "drawn"}, TypeError, "source = 'drawn' is not a dict"),
    ({"test": (1, 2)}, TypeError, "test is tuple, no Split: Split(images, labels) is one")])
def test_tasks_of_wrong_things(task, change, error, text):
    with pytest.raises(error, match=re.escape(text)): Task(**vars(task) | change)


DAMAGE = {
    "no metadata": (lambda about: None, "its metadata has no key 'task'"), "no json": (lambda about: "{", "Expecting"),
    "a list": (lambda about: "[1]", "task wants a mapping"),
    "a key is gone": (lambda about: json.dumps({k: v for k, v in about.items() if k != "class_names"}), "task lacks class_names"),
    "an unknown key": (lambda about: json.dumps(about | {"licence": "x"}), "unknown key 'licence'"),
    "names are a string": (lambda about: json.dumps(about | {"class_names": "abc"}), "task.class_names = 'abc' is not a list"),
    "names are numbers": (lambda about: json.dumps(about | {"class_names": [0, 1, 2]}), "task.class_names[0] = 0 is not of type str"),
    "too few names": (lambda about: json.dumps(about | {"class_names": ["a"]}), "label 2, outside 0..0"),
    "a source is text": (lambda about: json.dumps(about | {"source": "x"}), "task.source = 'x' is not of type dict"),
    "a name is a number": (lambda about: json.dumps(about | {"name": 3}), "task.name = 3 is not of type str")}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_metadata_is_told_with_path_key_and_remedy(task, tmp_path, damage):
    from safetensors.torch import load_file, save_file
    change, text = DAMAGE[damage]
    path = task.save(tmp_path / "demo.safetensors")
    written = change({key: getattr(task, key) for key in ("name", "group", "class_names", "source")})
    save_file(load_file(path), path, None if written is None else {"task": written})
    with pytest.raises(ValueError, match="demo.safetensors is not a complete task file .*: delete it and write it again") as caught:
        Task.load(path)
    assert text in str(caught.value)


@pytest.mark.parametrize("key, value, text", [
    ("val.images", None, "val.images"), ("test.labels", None, "test.labels"),
    ("val.images", torch.zeros(6, 3, 32, 32), "val: images are torch.float32"),
    ("train.labels", torch.zeros(3, dtype=torch.int64), "train: 12 images but labels of shape (3,)")])
def test_damaged_tensors_are_told_with_path_and_part(task, tmp_path, key, value, text):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    path = task.save(tmp_path / "demo.safetensors")
    with safe_open(path, "pt") as file: about = file.metadata()
    tensors = load_file(path)
    if value is None: del tensors[key]
    else: tensors[key] = value
    save_file(tensors, path, about)
    with pytest.raises(ValueError, match="demo.safetensors is not a complete task file .*: delete it") as caught: Task.load(path)
    assert text in str(caught.value)


def test_trainval_is_train_then_val(task):
    both = task.trainval
    assert torch.equal(both.images, torch.cat([task.train.images, task.val.images])) and len(both) == 18
