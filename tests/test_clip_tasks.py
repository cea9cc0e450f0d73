"The embedded few-shot image-text tasks: their names, pools and pictures, and CLIP's preprocessing."
import re

import numpy as np
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torchvision.transforms import v2

from hierprompt.core import to_dict
from hierprompt.data.benchmarks import list_tasks, load_task
from hierprompt.data.embedded.clip_tasks import CLIP_TASKS, EMOJI, OBJECTS, UNCLEAR, drawn_objects
from hierprompt.data.embedded.packs import read_pack
from hierprompt.data.embedded.tasks import load_embedded
from hierprompt.data.fewshot import draw_both, few_shot, manifest
from hierprompt.data.preprocess import PREPROCESS, get_preprocess, to_square
from hierprompt.data.tasks import PARTS, Task
from hierprompt.engine.hosts import NORMALIZE

CLASSES = {"clip_emoji": 60, "clip_fashion": 10, "clip_climate": 5, "clip_cards": 54, "clip_flags": 50}
SMALL = ["clip_emoji", "clip_fashion", "clip_climate"]   # the others render scenes: a second or more each
WHOLE = {"clip_fashion": "fashion_mnist", "clip_climate": "koeppen"}


@pytest.fixture(scope="module")
def packs(): return {name: read_pack(task.pack) for name, task in CLIP_TASKS.items()}


@pytest.fixture(scope="module")
def tasks(): return {name: load_task(name, image_size=32, preprocess="backbone") for name in SMALL}


def pools(name, packs):
    "part -> rows of the pack that are in the task."
    labels, part = CLIP_TASKS[name].labels(packs[name]), packs[name].columns["part"]
    return {p: np.flatnonzero((part == i) & (labels >= 0)) for i, p in enumerate(PARTS)}


def test_registry():
    assert list_tasks("embedded_clip") == list(CLASSES) == list(CLIP_TASKS)
    assert {name: len(task.class_names) for name, task in CLIP_TASKS.items()} == CLASSES
    assert {task.group for task in CLIP_TASKS.values()} == {"embedded_clip"}
    assert CLIP_TASKS["clip_cards"].packs == ("cards", "textures") and CLIP_TASKS["clip_emoji"].packs == ("emoji",)


@pytest.mark.parametrize("name", CLASSES)
def test_names_are_plain_and_every_sentence_fits_16_tokens(name):
    task, encode = CLIP_TASKS[name], SimpleTokenizer().encode
    assert len(set(task.class_names)) == len(task.class_names)
    assert all(re.fullmatch("[a-z0-9]+([ -][a-z0-9]+)*", c) for c in task.class_names)
    sentences = [text.format(c) for text in set(to_dict(task.templates).values()) for c in task.class_names]
    assert max(len(encode(s)) + 2 for s in sentences) <= 16
    assert task.templates.prograd.endswith("{}.")


@pytest.mark.parametrize("name", ["clip_fashion", "clip_cards", "clip_flags"])
def test_names_stand_in_the_packs_order(name, packs):
    for ours, theirs in zip(CLIP_TASKS[name].class_names, packs[name].columns["class_names"].tolist(), strict=True):
        words = set(re.findall("[a-z0-9]+", theirs.lower()))
        assert words & set(re.findall("[a-z0-9]+", ours.rstrip("s"))) or words & set(ours.split()), (ours, theirs)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_taught_and_tested(name, packs):
    labels, rows = CLIP_TASKS[name].labels(packs[name]), pools(name, packs)
    train, test = (np.bincount(labels[rows[p]], minlength=CLASSES[name]) for p in ("train", "test"))
    assert test.min() >= 1 and len(rows["val"]) > 0
    if name == "clip_emoji": assert set(train) == {1, 2}
    else: assert train.min() >= 14


def test_emoji_are_objects_that_both_sides_drew(packs):
    pack = packs["clip_emoji"]
    concept, vendor, part = (pack.columns[key] for key in ("concept", "vendor", "part"))
    group = pack.columns["class_names"][pack.columns["label"]]
    assert [name.replace("_", " ") for name in drawn_objects(pack)] == list(EMOJI)
    assert not {name.replace("_", " ") for name in UNCLEAR} & set(EMOJI)
    for name in EMOJI:
        mine = concept == name.replace(" ", "_")
        assert set(vendor[mine & (part < 2)]) == {"twemoji", "fluent"} and set(vendor[mine & (part == 2)]) <= {"noto_v1", "fxemoji"}
        assert set(group[mine]) <= set(OBJECTS)
    rows = pools("clip_emoji", packs)
    labels = CLIP_TASKS["clip_emoji"].labels(pack)
    assert all(concept[i] == EMOJI[labels[i]].replace(" ", "_") for p in PARTS for i in rows[p])


@pytest.mark.parametrize("name", SMALL)
def test_draws_are_coops_rule_on_the_packs_pools(name, packs, tasks):
    labels, rows, task = CLIP_TASKS[name].labels(packs[name]), pools(name, packs), tasks[name]
    for seed in (1, 2, 3):
        expected = draw_both(labels[rows["train"]].tolist(), labels[rows["val"]].tolist(), 16, seed)
        for split, part in zip(few_shot(task, seed), ("train", "val")):
            mine = rows[part][expected[part]]
            assert split.labels.tolist() == labels[mine].tolist()
            pictures = [to_square(packs[name].images[i].convert("RGB"), PREPROCESS["backbone"], 32) for i in mine[:20]]
            assert torch.equal(split.images[:20], torch.stack(pictures))
            told = manifest(task)["seeds"][str(seed)][part]["items"]
            assert [item for item, *_ in told] == [f"{CLIP_TASKS[name].pack} {i}" for i in mine]


@pytest.mark.parametrize("name", WHOLE)
def test_the_test_set_is_the_embedded_tasks(name, tasks):
    whole = load_embedded(WHOLE[name], 32)
    assert torch.equal(tasks[name].test.images, whole.test.images) and torch.equal(tasks[name].test.labels, whole.test.labels)


def test_scenes_are_the_embedded_tasks(packs):
    "Only chosen scenes are rendered; they are the same pictures as in the whole task."
    from hierprompt.data.embedded.clip_tasks import chosen
    from hierprompt.data.embedded.scenes import render_scene
    from hierprompt.data.embedded.tasks import SCENE_SIZE, pack_images
    textures = read_pack("textures").images
    for name in ("clip_cards", "clip_flags"):
        pack, rows = packs[name], np.array([3, 850, 1500])
        scenes = [render_scene(pack.images, textures, pack.columns["scene"][i], SCENE_SIZE[pack.name]) for i in rows]
        assert [image.tobytes() for image in pack_images(chosen(pack, rows))] == [scene.tobytes() for scene in scenes]


def test_shots_and_seeds(tasks):
    task = load_task("clip_climate", image_size=32, preprocess="backbone", shots=2, seeds=(5,))
    train, val = few_shot(task, 5)
    assert train.labels.bincount().tolist() == val.labels.bincount().tolist() == [2] * 5 and len(task.train) == 10
    with pytest.raises(KeyError, match="unknown seed of clip_climate '1'"): few_shot(task, 1)
    assert len(few_shot(tasks["clip_climate"], 1)[0]) == 80


def test_source_and_file(tasks, tmp_path):
    task = tasks["clip_climate"]
    assert task.source["template"] == task.source["templates"]["zero_shot"] == "a satellite photo of {}."
    assert {"origin", "licence", "protocol", "preprocess", "counts"} <= set(task.source)
    again = Task.load(task.save(tmp_path / "task.safetensors"))
    assert again.source == task.source and torch.equal(few_shot(again, 2)[0].images, few_shot(task, 2)[0].images)


def test_options_that_do_not_fit():
    with pytest.raises(
        ValueError, match="clip_fashion is embedded and takes no root or options but \\('shots', 'seeds'\\): root=None, {'strict': True}"
    ):
        load_task("clip_fashion", strict=True)
    with pytest.raises(ValueError, match="takes no root or options: root=None, {'shots': 4}"): load_task("fashion_mnist", shots=4)
    with pytest.raises(ValueError, match="shots = 0"): load_task("clip_fashion", shots=0)


def test_the_default_preprocessing_of_a_benchmark():
    assert get_preprocess("paper", "coop") == get_preprocess("clip") and get_preprocess("paper", "embedded_clip") == get_preprocess(
        "backbone"
    )
    assert NORMALIZE["clip"] == ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))   # Adapt spec 4.4


@pytest.mark.parametrize("frame", [(500, 333), (333, 500), (100, 100), (90, 300)])
def test_clips_preprocessing_is_torchvisions(frame):
    coarse = np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8)
    photo = Image.fromarray(coarse).resize(frame, Image.Resampling.BICUBIC)
    theirs = v2.Compose([v2.Resize(224, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.PILToTensor()])(photo)
    assert torch.equal(to_square(photo, PREPROCESS["clip"], 224), theirs)


def test_climates_stand_in_koeppens_order(packs):
    assert [name[0] for name in packs["clip_climate"].columns["class_names"]] == list("ABCDE")
    assert CLIP_TASKS["clip_climate"].class_names == ("tropical forest", "desert", "temperate land", "snowy forest", "ice")
