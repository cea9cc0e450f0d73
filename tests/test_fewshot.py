"Few-shot draws against a slow loop on Python's global generator, the container of several seeds, and the sentences of Adapt spec 4.3."
import random

import numpy as np
import pytest
import torch

from hierprompt.data.fewshot import SEEDS, SHOTS, TEMPLATES, Templates, draw, few_shot, manifest, plan, prompt_name, val_shots
from hierprompt.data.tasks import Split, Task

LABELS = [random.Random(5).choice([7, 0, 3, 3, 3, 1]) for _ in range(90)] + [2, 2]   # uneven, unordered, one class of two


def slow(train, val, shots, seed):
    "What Adapt spec 4.2 says, one item at a time, on the global generator."
    random.seed(seed)
    found = []
    for labels, n in ((train, shots), (val, min(shots, 4))):
        order = []
        for label in labels:
            if label not in order: order.append(label)
        picked = []
        for label in order:
            mine = [i for i in range(len(labels)) if labels[i] == label]
            picked += random.sample(mine, n) if len(mine) >= n else mine
        found.append(picked)
    return found


def make(shots, seeds=SEEDS, val=True):
    "A task whose pixels are the position in the list; train and val lists are counted apart."
    lists = {"train": LABELS, "val": LABELS[::-1]} if val else {"train": LABELS}
    items = {part: [f"{part} {i}" for i in range(len(labels))] for part, labels in lists.items()}
    few = plan(items, lists, shots, seeds)
    def split(part, keep):
        labels = lists.get(part, LABELS)
        return Split(
            torch.tensor(keep, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2).contiguous(),
            torch.tensor([labels[i] for i in keep]),
        )
    parts = {part: split(part, keep) for part, keep in few.keep.items()}
    return Task("demo", "demo", [f"c_{i}" for i in range(8)], **parts, test=split("train", [0]), source={"fewshot": few.about})


def drawn(split): return split.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16, 60])
def test_draws_are_the_slow_loops(shots):
    task = make(shots)
    for seed in SEEDS:
        train, val = few_shot(task, seed)
        expected = slow(LABELS, LABELS[::-1], shots, seed)
        assert [drawn(train), drawn(val)] == expected
        assert train.labels.tolist() == [LABELS[i] for i in expected[0]] and val.labels.tolist() == [LABELS[::-1][i] for i in expected[1]]


def test_fixed_draw():
    "The lists of a seed must never change."
    assert draw([0] * 10 + [1] * 10, 3, random.Random(1)) == [2, 1, 4, 11, 17, 18]


def test_small_classes_give_all_they_have():
    train, val = few_shot(make(16), 2)
    assert (train.labels == 2).sum() == 2 and (val.labels == 2).sum() == 2
    assert all((train.labels == k).sum() == min(16, LABELS.count(k)) for k in set(LABELS))


def test_the_union_is_stored_once_and_in_order():
    task = make(4)
    for part in ("train", "val"):
        stored = drawn(getattr(task, part))
        wanted = {i for seed in SEEDS for i in drawn(few_shot(task, seed)[part == "val"])}
        assert stored == sorted(wanted)


def test_seeds_do_not_depend_on_each_other_and_not_on_the_global_generator():
    random.seed(0)
    before = random.getstate()
    alone, together = make(4, (2,)), make(4)
    assert random.getstate() == before
    assert drawn(few_shot(alone, 2)[0]) == drawn(few_shot(together, 2)[0])
    assert alone.source["fewshot"]["hashes"]["2"] == together.source["fewshot"]["hashes"]["2"]
    assert drawn(few_shot(together, 1)[0]) != drawn(few_shot(together, 2)[0])


def test_without_a_val_list_val_is_held_out_of_train():
    task = make(8, val=False)
    for seed in SEEDS:
        train, val = few_shot(task, seed)
        assert drawn(train) == slow(LABELS, LABELS, 8, seed)[0] and not set(drawn(train)) & set(drawn(val))
        rest = {k: LABELS.count(k) - min(8, LABELS.count(k)) for k in set(LABELS)}
        assert {k: (val.labels == k).sum().item() for k in rest} == {k: min(4, n) for k, n in rest.items()}


def test_what_the_source_says_survives_a_file(tmp_path):
    task = make(4, (1, 3))
    again = Task.load(task.save(tmp_path / "demo.safetensors"))
    assert again.source == task.source and drawn(few_shot(again, 3)[0]) == drawn(few_shot(task, 3)[0])
    about = task.source["fewshot"]
    assert (about["shots"], about["val_shots"], list(about["rows"])) == (4, 4, ["1", "3"])
    assert "4 a class, seeds 1, 3" in task._repr_markdown_() and "hashes" not in task._repr_markdown_()


def test_unknown_seed_and_plain_task():
    with pytest.raises(KeyError, match="unknown seed of demo '4'.*Known: 1, 2, 3"): few_shot(make(2), 4)
    split = make(2).train
    with pytest.raises(ValueError, match="task plain has no few-shot draws: load one of benchmark 'coop' or 'embedded_clip'"):
        few_shot(Task("plain", "demo", [str(i) for i in range(8)], split, split, split), 1)


@pytest.mark.parametrize("shots, error", [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), (None, TypeError)])
def test_bad_shots(shots, error):
    with pytest.raises(error, match=f"shots = {shots} is"): make(shots)


@pytest.mark.parametrize("seeds", [(), (1, 1), [1, np.int64(1)]])
def test_bad_seeds(seeds):
    with pytest.raises(ValueError, match="seeds=.*give at least one whole number, and none twice"): make(2, seeds)


@pytest.mark.parametrize("seed", ["1", 1.0, True, None])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(TypeError, match=f"a seed of the draws = {seed!r} is not a whole number"): make(2, (2, seed))


def test_numbers_of_numpy_draw_as_python_s():
    one, other = make(2, (1, 2)), make(np.int64(2), np.array([1, 2]))
    assert one.source == other.source and torch.equal(one.train.images, other.train.images)


def test_manifest_lists_and_hashes():
    task = make(2)
    told = manifest(task)
    train, val = few_shot(task, 3)
    for part, split in (("train", train), ("val", val)):
        items = told["seeds"]["3"][part]["items"]
        assert items == [[f"{part} {i}", k, f"c_{k}"] for i, k in zip(drawn(split), split.labels.tolist())]
    hashes = [told["seeds"][str(seed)][part]["hash"] for seed in SEEDS for part in ("train", "val")]
    assert len(set(hashes)) == 6


def test_hash_sees_names_labels_and_order():
    base = plan({"train": ["a", "b"], "val": ["a"]}, {"train": [0, 1], "val": [0]}, 1, (1,)).about["hashes"]["1"]["train"]
    others = [(["a", "c"], [0, 1]), (["a", "b"], [0, 2]), (["b", "a"], [1, 0])]
    for items, labels in others:
        assert plan({"train": items, "val": ["a"]}, {"train": labels, "val": [0]}, 1, (1,)).about["hashes"]["1"]["train"] != base


def test_defaults_are_the_tables():
    assert (SHOTS, SEEDS, [val_shots(n) for n in (1, 4, 16)]) == (16, (1, 2, 3), [1, 4, 4])


def test_templates_are_the_specification():
    zero_shot = {
        "oxford_pets": "a photo of a {}, a type of pet.",
        "oxford_flowers": "a photo of a {}, a type of flower.",
        "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
        "dtd": "{} texture.",
        "eurosat": "a centered satellite photo of {}.",
        "food101": "a photo of {}, a type of food.",
        "ucf101": "a photo of a person doing {}.",
        "stanford_cars": "a photo of a {}.",
        "sun397": "a photo of a {}.",
        "caltech101": "a photo of a {}.",
        "imagenet": "a photo of a {}.",
    }
    prograd = {
        "oxford_pets": "a type of pet, a photo of a {}.",
        "oxford_flowers": "a type of flower, a photo of a {}.",
        "fgvc_aircraft": "a type of aircraft, a photo of a {}.",
        "dtd": "a texture of {}.",
        "eurosat": "a centered satellite photo of {}.",
        "food101": "a type of food, a photo of {}.",
        "ucf101": "a photo of a person doing {}.",
    }
    assert {key: t.zero_shot for key, t in TEMPLATES.items()} == zero_shot
    assert {key: t.prograd for key, t in TEMPLATES.items()} == {key: prograd.get(key, "a photo of a {}.") for key in zero_shot}
    assert {key: t.kgcoop for key, t in TEMPLATES.items()} == {**zero_shot, "dtd": "a photo of a {}, a type of texture."}


@pytest.mark.parametrize("text", ["a photo.", "{} or {}"])
def test_template_without_one_place(text):
    with pytest.raises(ValueError, match="must have one"): Templates(prograd=text)


def test_prompt_name(): assert prompt_name("polka_dotted") == "polka dotted"
