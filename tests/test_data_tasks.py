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


def test_trainval_is_train_then_val(task):
    both = task.trainval
    assert torch.equal(both.images, torch.cat([task.train.images, task.val.images])) and len(both) == 18
