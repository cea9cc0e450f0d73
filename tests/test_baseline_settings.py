"Settings of the baselines per task, and the public results of last and best epochs: complete, and as the specification has them."
import re

import pytest

from hierprompt.data.benchmarks import list_tasks
from hierprompt.papers.baseline_settings import read_baselines, task_settings
from hierprompt.results.figures import public_gain
from hierprompt.results.published import load_published, published_index

VTAB, FGVC = list_tasks("vtab"), list_tasks("fgvc")
INDEX = published_index()["baseline_settings"]
SCT = """cifar100 .013 1.0, caltech101 .006 .35, dtd .0032 .04, oxford_flowers102 .05 .11, oxford_iiit_pet .0007 .8, svhn .075 .03,
    sun397 .0017 .01, patch_camelyon .0072 .002, eurosat .06 .001, resisc45 .01 .01, diabetic_retinopathy .004 .0003,
    clevr_count .0033 .01, clevr_dist .0018 .005, dmlab .009 .1, kitti .0072 .0001, dsprites_loc .003 .001, dsprites_ori .01
    .05, smallnorb_azi .0062 .005, smallnorb_ele .0011 .0005"""
SSF = """caltech101 1e-3 .05 .1, cifar100 5e-3 5e-5 0, clevr_count 2e-3 .05 .1, clevr_dist 5e-2 .05 .1, diabetic_retinopathy 5e-3
    5e-5 .2, dmlab 5e-3 5e-5 .1, dsprites_loc 1e-2 5e-5 0, dsprites_ori 5e-3 5e-5 .2, dtd 5e-3 5e-5 0, oxford_flowers102 5e-3
    5e-5 0, patch_camelyon 5e-3 5e-5 0, oxford_iiit_pet 5e-3 5e-5 0, sun397 5e-3 5e-5 0, eurosat 3e-3 .05 .2, kitti 1e-2 5e-5 0,
    resisc45 2e-3 5e-5 .1, smallnorb_azi 2e-2 5e-5 .1, smallnorb_ele 5e-3 .05 .2, svhn 1e-2 5e-5 0, cub200 1e-2 .05 0, nabirds
    2e-4 .05 .1, oxford_flowers 1e-2 .05 .1, stanford_cars 2e-2 .05 0, stanford_dogs 2.5e-4 .05 0"""
SA2VP = """svhn 16 .5, resisc45 16 .5, dsprites_ori 16 .1, smallnorb_ele 32 .5, cub200 16 .1, nabirds 32 .1, oxford_flowers 8 .1,
    stanford_dogs 32 .1, stanford_cars 64 1.5, dtd 8 .1, eurosat 16 1.5, kitti 32 1.5"""
COVERS = {"noah": VTAB, "sct": VTAB, "ssf": VTAB + FGVC, "mp": FGVC, "mosa": VTAB + FGVC, "dam_vp": VTAB + FGVC, "e2vpt": VTAB + FGVC,
          "sa2vp": VTAB + FGVC, "gate_vpt": []}


def listed(text): return {task: tuple(map(float, numbers)) for task, *numbers in map(str.split, text.split(","))}


@pytest.mark.parametrize("method, settings, expected", [
    ("sct", ("lr", "weight_decay"), listed(SCT)),              # baselines spec 1.10
    ("ssf", ("lr", "weight_decay", "drop_path"), listed(SSF)), # 1.11
    ("sa2vp", ("rank", "add_scale"), listed(SA2VP)),           # 1.17
    ("mp", ("lr", "drop_path"), listed("cub200 1e-4 0, nabirds 1e-4 .05, oxford_flowers 1e-2 0, stanford_cars 2e-4 0, "
                                       "stanford_dogs 2.5e-4 0")),   # 1.13
    ("mosa", ("lr", "rank", "experts"), listed("cub200 1e-3 64 4, nabirds 5e-4 64 4, oxford_flowers 5e-3 64 4, stanford_dogs 5e-4 64 4, "
                                               "stanford_cars 5e-3 64 2, dtd 5e-3 16 4")),   # 1.14
    ("e2vpt", ("prompts", "kv_prompts"), listed("caltech101 32 5, cifar100 5 5, dsprites_loc 5 5, dsprites_ori 5 5, oxford_flowers102 1 1, "
                                                "patch_camelyon 10 10, kitti 10 5, cub200 5 5")),   # 1.16
])
def test_the_specification_has_the_same_numbers(method, settings, expected):
    found = task_settings(method)
    assert {task: tuple(found[task][name] for name in settings) for task in expected} == expected


@pytest.mark.parametrize("method", COVERS)
def test_a_method_has_the_same_settings_on_all_tasks_of_a_benchmark(method):
    found = task_settings(method)
    assert list(found) == COVERS[method] and set(COVERS) == set(read_baselines().method)
    for tasks in (VTAB, FGVC):   # where a release evaluates an average of the weights on some tasks, the others have no decay to name
        assert len({tuple(sorted(set(found[task]) - {"ema_decay"})) for task in tasks if task in found}) <= 1


def test_every_line_is_described_and_says_where_it_stands():
    rows = read_baselines()
    assert set(rows.setting) == set(INDEX["settings"]) and set(rows.task) <= {"vtab", "fgvc", *VTAB, *FGVC}
    assert rows.source.map(lambda source: bool(re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{7} \S+:\d+(-\d+)?", source))).all()
    assert set(rows.pretraining) <= {"", *load_published("davpt_table1").pretraining, "supervised_in1k"}


def test_sct_smooths_and_augments_as_the_specification_counts():
    found = task_settings("sct").values()
    assert sum(s["label_smoothing"] == 0.1 for s in found) == 12 and sum(s["rand_augment"] for s in found) == 11
    assert (min(s["scale"] for s in found), max(s["scale"] for s in found)) == (0.1, 1.0)


def test_pretrainings_differ_where_the_release_says_so():
    thresholds = {p: task_settings("dam_vp", p)["dtd"]["threshold"] for p in ("supervised_in21k", "mocov3_in1k", "supervised_in1k")}
    assert thresholds == {"supervised_in21k": 10, "mocov3_in1k": 18, "supervised_in1k": 31}   # 1.15
    assert task_settings("gate_vpt", "mae_in1k")["cub200"] == {"batch_size": 64, "lr": 0.1, "prompts": 100, "gate_init": 5}   # 1.18
    assert "batch_size" not in task_settings("e2vpt", "supervised_in1k")["dtd"]


def test_the_best_of_many_looks_is_above_the_last_one():
    "16 methods on 19 tasks, and their printed means."
    rows, gain = load_published("vit_peft_vision"), public_gain()
    assert rows.groupby("method").task.apply(list).map(lambda tasks: tasks == VTAB).all() and len(rows) == 16 * 19
    assert (rows.best >= rows["last"]).all() and rows.drop(columns=["method", "task"]).stack().between(0, 100).all()
    assert gain.loc[["vpt_deep", "ssf", "adaptformer", "convpass"], ["last", "best"]].round(2).values.tolist() == [
        [71.34, 72.85], [72.98, 73.46], [73.72, 74.23], [74.23, 74.95]]
    assert (gain.gain.idxmin(), gain.gain.idxmax()) == ("linear", "full") and round(gain.gain.median(), 1) == 0.6
