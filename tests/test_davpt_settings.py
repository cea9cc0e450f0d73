"The released settings of DA-VPT as changes of our presets: every value comes from the table, every result is a configuration."
import csv
from collections import Counter
from dataclasses import asdict
from functools import cache

import pytest

from hierprompt.data.benchmarks import list_tasks
from hierprompt.engine.tuned import method_config
from hierprompt.papers.davpt_settings import AS_RELEASED, PRETRAININGS, SETTINGS, released_settings as read_released
from hierprompt.results.published import PUBLISHED, published_index
from hierprompt.training.recipes import recipe

ENTRY = published_index()["davpt_settings"]
with open(PUBLISHED/"davpt_settings.csv", newline="") as file: ROWS = list(csv.DictReader(file))
PRESETS = {False: "released", True: "released_legacy"}


released_settings = cache(read_released)   # nothing here changes what it returns


def value(row, column):
    "A cell, or the default of the released parser."
    return row[column] or ENTRY["defaults"][column]


def keys(row): return dict((*word.split("="), "1")[:2] for word in row["legacy"].split())


def row_of(config): return next(row for row in ROWS if row["config"] == config)


def entry(config, legacy=False):
    row = row_of(config)
    return released_settings(row["pretraining"], legacy)[row["task"]]


@pytest.mark.parametrize("legacy", PRESETS)
def test_every_number_of_every_file_arrives(legacy):
    columns = {"N": "num_tokens", "r": "sim_scale", "dyn": "map_update_from"} | (
        {} if legacy else {"M": "num_guided", "w_patch": "patch_weight", "w_cls": "cls_weight"}
    )
    rates = {"lr": "lr", "wd": "weight_decay", "wd_head": "head_weight_decay", "dp": "drop_path"}
    for row in ROWS:
        found = released_settings(row["pretraining"], legacy)[row["task"]]
        assert found["source"] == row["config"]
        assert {c: found["config"][field] for c, field in columns.items()} == {c: float(value(row, c)) for c in columns}, row["config"]
        assert {c: found["recipe"][field] for c, field in rates.items()} == {c: float(value(row, c)) for c in rates}, row["config"]
        config = found["config"]
        assert (config["vpt_norm"], config["prompt_mask"], config["init_scale"]) == (
            value(row, "pnorm"),
            value(row, "mask") == "1",
            0.125 if row["div8"] == "1" else 1.0,
        )
        if not legacy: assert config["guided_layers"] == list(range(int(value(row, "start")), 12)), row["config"]


@pytest.mark.parametrize("name", SETTINGS)
def test_all_tasks_have_settings_that_method_and_recipe_accept(name):
    found = SETTINGS[name]()
    assert list(found) == [*list_tasks("vtab"), *list_tasks("fgvc")]
    for task, settings in found.items():
        config = asdict(method_config("da_vpt", PRESETS["legacy" in name], **settings["config"]))
        assert {key: config[key] for key in settings["config"]} == settings["config"], task
        assert recipe("da_vpt", **settings["recipe"]).samples_per_class in (2, 4)


def test_biases_are_those_of_the_file():
    always = {"v", "proj", "fc2", "norm2.b", "patch_embed.b"}   # D8, D41
    for row in ROWS:
        added = {"k": {"k"}, "n1": {"norm1.w", "norm1.b"}, "cls": {"cls"}}
        wanted = always.union(*(names for column, names in added.items() if (row[column] or "0") == "1"))
        found = entry(row["config"])["config"]["bias_set"]
        assert len(found) == len(set(found)) and set(found) == wanted, row["config"]


def test_only_mae_is_read_out_by_the_mean():
    "D26"
    for pretraining in PRETRAININGS.values():
        pools = {settings["config"].get("pool") for settings in released_settings(pretraining).values()}
        assert pools == ({"all"} if pretraining == "mae_in1k" else {None})


def test_released_features_are_left_to_the_preset():
    for settings in released_settings("mae_in1k").values(): assert not AS_RELEASED.keys() & settings["config"].keys()
    # D1, D2, D3
    assert AS_RELEASED == dict(patch_feature="input_mean", prompt_feature="raw", cls_feature="query", prompt_feature_cls="raw")


def test_batches_that_the_release_reads_from_legacy_keys():
    for legacy in PRESETS:
        changed = {row["config"]: entry(row["config"], legacy)["recipe"] for row in ROWS}
        assert {
            c: (r["batch_size"], r["samples_per_class"]) for c, r in changed.items() if "batch_size" in r or "samples_per_class" in r
        } == {"fgvc/vitb_dogs": (64, 4)}


def test_without_legacy_keys_five_files_train_without_losses_and_with_them_all_have_both():
    "D24; smallNORB's elevation is a left-over with one loss, in both."
    def lacking(legacy):
        weights = {row["config"]: entry(row["config"], legacy)["config"] for row in ROWS}
        return Counter((c["patch_weight"] > 0) + (c["cls_weight"] > 0) for c in weights.values())
    assert lacking(False) == {0: 5, 1: 1, 2: 55} and lacking(True) == {1: 1, 2: 60}


@pytest.mark.parametrize("config, blocks, guided, weight", [
    ("fgvc/vitb_dogs", [11], 5, 0.01), ("fgvc/vitb_flowers", [11], 20, 0.05), ("vtab/vitb_cifar100", [3, 4, 5, 6, 7], 20, 1.0),
    ("vtab/vitb_eurosat", [9, 10, 11], 10, 0.5), ("vtab/moco_cifar100", list(range(2, 12)), 5, 0.01), ("fgvc/mae_dogs", [11], 10, 0.01)])
def test_legacy_depths_and_counts(config, blocks, guided, weight):
    found = entry(config, True)["config"]
    assert (found["guided_layers"], found["num_guided"], found["patch_weight"]) == (blocks, guided, weight)


@pytest.mark.parametrize(
    "config, patch, prompt, cls_prompt",
    [
        ("fgvc/mae_birds", "input_mean", "raw", "raw"),
        ("fgvc/vitb_bird", "input_mean", "raw", "raw"),
        ("vtab/mae_dtd", "key_mean", "query", "key"),
        ("vtab/vitb_dtd", "input_mean", "query", "raw"),
        ("fgvc/moco_birds", "topk_cls_attn", "raw", "raw"),
        ("fgvc/moco_cub200", "input_mean", "query", "raw"),
        ("vtab/vitb_cifar100", "key_mean", "query", "key"),
    ],
)
def test_legacy_features(config, patch, prompt, cls_prompt):
    found = entry(config, True)["config"]
    assert (found["patch_feature"], found["prompt_feature"], found["cls_feature"], found["prompt_feature_cls"]) == (
        patch,
        prompt,
        "query",
        cls_prompt,
    )


def test_composed_patches_come_from_where_the_file_says():
    composed = {row["config"]: entry(row["config"], True)["config"] for row in ROWS if "headcomp" in keys(row)}
    assert {name: c.get("topk_from") for name, c in composed.items()} == {
        "fgvc/mae_dogs": "input",
        "fgvc/moco_birds": "key",
        "fgvc/moco_dogs": "key",
        "fgvc/vitb_dogs": "input",
        "fgvc/vitb_flowers": "input",
        "fgvc/moco_cub200": None,
    }  # whose positives are means over all patches
    assert {(c["topk"], c["topk_heads"]) for c in composed.values() if "topk" in c} == {(1, "composed")}


def test_tasks_without_a_file_have_the_most_frequent_values_of_their_family():
    "D30"
    for pretraining, absent in ENTRY["without_configuration"].items():
        family = [row for row in ROWS if row["pretraining"] == pretraining and row["config"].startswith("vtab")]
        for task in absent:
            found = released_settings(pretraining)[task]
            assert found["source"] == f"most frequent values of {pretraining}, vtab"
            for column, number in (
                ("lr", found["recipe"]["lr"]),
                ("wd", found["recipe"]["weight_decay"]),
                ("N", found["config"]["num_tokens"]),
                ("w_cls", found["config"]["cls_weight"]),
            ):
                counts = Counter(float(value(row, column)) for row in family)
                assert counts[number] == max(counts.values()) and number == min(
                    v for v, n in counts.items() if n == max(counts.values())
                ), (task, column)
