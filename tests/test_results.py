"Metrics files, averages, and the papers' numbers: everything that can be recomputed is."
import json
import math
import statistics
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from hierprompt.data.benchmarks import benchmark_tasks
from hierprompt.results.metrics import (
    COLUMNS,
    averages,
    check_metrics,
    collect,
    example_metrics,
    failed_cells,
    group_means,
    lacking,
    machine,
    mean_of_groups,
    over_seeds,
    processor,
    read_metrics,
    standard_error,
    task_mean,
    versions,
)
from hierprompt.results.published import PUBLISHED, load_published, published_index

INDEX = published_index()
PER_TASK = load_published("davpt_appendix_vtab_per_task")
GROUPS = {task: group for group, tasks in PER_TASK.attrs["groups"].items() for task in tasks}
FGVC = ["cub200", "nabirds", "oxford_flowers", "stanford_dogs", "stanford_cars"]
BACKBONE = 85_798_656  # parameters of ViT-B/16 without head (baselines spec 0)


def put(folder, metrics):
    metrics.write(folder / metrics.profile / "runs" / metrics.cell / "metrics.json")


def row(frame, method, pretraining="supervised_in21k"):
    return frame[(frame.method == method) & (frame.pretraining == pretraining)].iloc[0]


# published numbers

def expand(column):
    "The columns that an entry of the index stands for: `TASK ... TASK` all tasks, `pair_1 ... pair_9` numbered ones."
    first, *last = column.split(" ... ")
    if not last: return [column]
    return list(GROUPS) if first in GROUPS else [f"pair_{i}" for i in range(1, int(last[0].removeprefix("pair_")) + 1)]


@pytest.mark.parametrize("name", INDEX)
def test_index_describes_every_file(name):
    entry, frame = INDEX[name], pd.read_csv(PUBLISHED / INDEX[name]["file"])
    assert set(frame.columns) == {name for c in entry["columns"] for name in expand(c)}
    assert {"paper", "table", "page", "benchmark", "parameters", "accuracy", "conflicts"} <= set(entry)
    assert entry["file"] in (PUBLISHED / "README.md").read_text()
    key = [c for c in ("pretraining", "method", "task", "setting") if c in frame]
    assert not frame.duplicated(key).any()


def test_every_file_is_in_the_index():
    assert {p.name for p in PUBLISHED.glob("*.csv")} == {entry["file"] for entry in INDEX.values()}


@pytest.mark.parametrize(
    "name, shape",
    [
        ("ship_table1", 11),
        ("davpt_table1", 20),
        ("davpt_table2_segmentation", 8),
        ("davpt_table3_fgvc", 15),
        ("davpt_appendix_vtab_per_task", 10),
        ("ship_winners", 19),
        ("ship_partitions", 19),
        ("ship_table2", 7),
        ("ship_table3", 9),
        ("ship_table4", 16),
        ("ship_fig1c", 6),
    ],
)
def test_number_of_rows(name, shape): assert len(load_published(name)) == shape


def test_published_tasks_are_those_that_load_task_knows():
    vtab, fgvc = benchmark_tasks("vtab"), benchmark_tasks("fgvc")
    assert {name: task.group for name, task in vtab.items()} == GROUPS
    assert list(fgvc) == FGVC == load_published("davpt_table3_fgvc").attrs["groups"]["fine_grained"]
    assert list(load_published("ship_winners").task) == list(load_published("ship_partitions").task) == list(GROUPS)
    assert set(load_published("ship_fig1c").task) <= set(GROUPS)


def test_unknown_table_and_damaged_file(tmp_path):
    with pytest.raises(KeyError, match="Did you mean 'davpt_table1'"): load_published("davpt_table_1")
    with pytest.raises(FileNotFoundError, match="index.json"): load_published("ship_table1", tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"t": {"file": "t.csv", "columns": {"method": "", "acc": ""}}}))
    (tmp_path / "t.csv").write_text("method\nFull\n")
    with pytest.raises(ValueError, match="t.csv lacks the columns acc: restore it"): load_published("t", tmp_path)


def printed_and_recomputed():
    "All printed means with the mean of what they average and the largest error that rounding explains."
    groups = ["natural", "specialized", "structured"]
    for _, r in load_published("ship_table1").iterrows(): yield "ship_table1", None, r.method, "average", r.average, r[groups].mean(), 0.1
    for _, r in load_published("davpt_table1").iterrows():
        yield "davpt_table1", r.pretraining, r.method, "vtab", r.vtab, r[groups].mean(), 0.01
    for _, r in load_published("davpt_table3_fgvc").iterrows():
        yield "davpt_table3_fgvc", None, r.method, "mean", r["mean"], r[FGVC].mean(), 0.055


def test_exactly_the_listed_means_are_misprinted():
    found = {
        (table, pre, method, column): (printed, value)
        for table, pre, method, column, printed, value, bound in printed_and_recomputed()
        if abs(printed - value) > bound + 1e-9
    }
    listed = {(table, c.get("pretraining"), c["row"], c["column"]): (c["printed"], c["recomputed"])
              for table, entry in INDEX.items() for c in entry["conflicts"] if c["column"] in ("average", "vtab", "mean")}
    # right as the mean of groups; the other number is that of tasks
    assert listed.pop(("ship_table1", None, "SHIP", "average")) == (76.9, 74.57)
    assert found.keys() == listed.keys()
    for key in found: assert found[key] == pytest.approx(listed[key], abs=0.005)
    assert listed["davpt_table3_fgvc", None, "VPT-baseline-own", "mean"] == (90.14, 89.98)


def test_printed_values_of_conflicts_are_in_the_tables():
    for name, entry in INDEX.items():
        frame = load_published(name)
        for c in entry["conflicts"]:
            if c["note"].startswith("the text's"): continue   # the table is right, a sentence about it is not
            match = frame[frame.method == c["row"]] if "method" in frame else frame.iloc[:0]
            if "pretraining" in c: match = match[match.pretraining == c["pretraining"]]
            if c["column"] in frame and len(match): assert match[c["column"]].item() == c["printed"], (name, c)


@pytest.mark.parametrize("method, by_groups, by_tasks", [("VPT-Deep", 71.96, 69.42), ("DA-VPT+", 76.14, 73.65)])
def test_average_is_the_mean_of_groups(method, by_groups, by_tasks):
    one = PER_TASK[(PER_TASK.method == method) & (PER_TASK.pretraining == "supervised_in21k")]
    assert mean_of_groups(one, GROUPS).item() == pytest.approx(by_groups, abs=0.011)
    assert task_mean(one, GROUPS).item() == pytest.approx(by_tasks, abs=0.011)


@pytest.mark.parametrize(
    "method, expected",
    {
        "Full": (75.89, 82.88, 47.64),
        "Linear": (68.93, 77.15, 26.85),
        "Adapter": (70.50, 76.97, 32.39),
        "Bias": (73.30, 78.25, 44.10),
        "VPT-Deep": (78.49, 82.42, 55.00),
        "DA-VPT+": (81.99, 86.48, 59.95),
    }.items(),
)
def test_group_means_of_the_per_task_rows(method, expected):
    one = PER_TASK[(PER_TASK.method == method) & (PER_TASK.pretraining == "supervised_in21k")]
    assert group_means(one, GROUPS).iloc[0].tolist() == pytest.approx(expected, abs=0.0051)


def test_per_task_rows_agree_with_table_1_but_for_one_task():
    means, table = group_means(PER_TASK, GROUPS), load_published("davpt_table1")
    wrong = {}
    for i, r in PER_TASK.iterrows():
        if r.method not in ("Full", "VPT-Deep", "DA-VPT+"): continue
        for group in means: wrong[r.pretraining, r.method, group] = row(table, r.method, r.pretraining)[group] - means.at[i, group]
    assert [key for key, gap in wrong.items() if abs(gap) > 0.055] == [("supervised_in21k", "Full", "specialized")]
    assert 4 * wrong["supervised_in21k", "Full", "specialized"] == pytest.approx(95.7 - 93.7, abs=0.1)  # EuroSAT


def test_ship_release_is_ships_row():
    released = load_published("ship_winners").set_index("task")
    means = averages(released[["acc_max"]].T, GROUPS).iloc[0]
    assert means[["natural", "specialized", "structured"]].tolist() == pytest.approx([82.58, 86.63, 61.53], abs=0.0051)
    ship = load_published("ship_table1").set_index("method").loc["SHIP"]
    assert means[["natural", "specialized", "structured", "mean_of_groups"]].round(1).tolist() == [82.6, 86.6, 61.5, 76.9]
    assert ship[["natural", "specialized", "structured", "average"]].tolist() == [82.6, 86.6, 61.5, 76.9]
    assert means.mean_of_tasks == pytest.approx(74.6, abs=0.05)
    assert released.n_log.mod(85_798_656).mean() == pytest.approx(583_000, abs=500) and released.n_log.mod(85_798_656).median() == 414_730


def test_fgvc_column_of_table_1_is_the_mean_of_table_3():
    first, third = load_published("davpt_table1"), load_published("davpt_table3_fgvc").set_index("method")
    for method in ("Full", "VPT-Shallow", "VPT-Deep", "E2VPT", "DA-VPT", "DA-VPT+"):
        assert row(first, method).fgvc == third["mean"][method]


def test_parameter_columns_follow_the_decoded_conventions():
    heads = {name: statistics.fmean(769 * t.num_classes for t in benchmark_tasks(name).values()) for name in ("vtab", "fgvc")}
    assert {k: round(v / 1e6, 4) for k, v in heads.items()} == {"vtab": 0.0380, "fgvc": 0.1804}
    ship, fgvc = load_published("ship_table1").set_index("method").params, load_published("davpt_table3_fgvc").set_index("method").params
    without = {"Full": BACKBONE, "Bias": 102_912, "Adapter": 230_544, "SSF": 205_824, "VPT-baseline-own": 20 * 768 * 12, "Linear": 0}
    for method, count in without.items(): assert round((count + heads["fgvc"]) / 1e6, 2) == fgvc[method], method
    assert round(heads["vtab"] / 1e6, 2) == ship["Linear"]
    assert [round(n / 1e6, 2) for n in (156_768, 294_912, 111_744)] == ship[["Adapter", "LoRA", "SCT"]].tolist()


def test_own_rows_start_from_other_weights_than_copied_ones():
    table = load_published("davpt_table1").query("pretraining == 'supervised_in21k'")
    assert set(table[table.own].backbone) == {"vit_base_patch16_224.augreg_in21k"}
    assert set(table[~table.own].backbone) == {"vit_base_patch16_224.orig_in21k"}


# metrics files

GOOD = example_metrics(acc=[70.0, 72.0, 71.0])


def test_write_and_read(tmp_path):
    GOOD.write(tmp_path / "a/metrics.json")
    assert read_metrics(tmp_path / "a/metrics.json") == GOOD
    raw = json.loads((tmp_path / "a/metrics.json").read_text())
    assert (raw["status"], raw["acc_mean"], raw["acc_std"], raw["acc_best_test_mean"]) == ("success", 71.0, 1.0, 71.5)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["metrics.json"]  # no temporary file is left


def test_diagnostics_are_kept_and_old_files_have_none(tmp_path):
    told = replace(GOOD, diagnostics={"joint_prompt_share": [0.1, 0.25], "attribute_cosine": 0.99})
    told.write(tmp_path / "new.json")
    assert read_metrics(tmp_path / "new.json") == told
    old = {k: v for k, v in GOOD.record().items() if k != "diagnostics"}
    assert check_metrics(old, "old.json").diagnostics == {}
    with pytest.raises(ValueError, match="diagnostics"): check_metrics(GOOD.record() | {"diagnostics": [0.1]}, "m.json")
    with pytest.raises(ValueError): replace(GOOD, diagnostics={"share": math.nan}).write(tmp_path / "nan.json")
    assert not (tmp_path / "nan.json").exists()


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    GOOD.write(tmp_path / "metrics.json")
    monkeypatch.setattr("hierprompt.core.os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): replace(GOOD, macs=1).write(tmp_path / "metrics.json")
    assert read_metrics(tmp_path / "metrics.json") == GOOD and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(acc=[math.nan]), "acc = .nan. is not in percent"),
        (dict(acc=[100.5]), "not in percent"),
        (dict(acc=[-1.0]), "not in percent"),
        (dict(acc=[1.0, 2.0], seeds=[0]), "does not fit to seeds"),
        (dict(acc=[1.0, 2.0], seeds=[3, 3]), "every run needs its own"),
        (dict(acc=[], seeds=[]), "every run needs its own"),
        (dict(gap=-0.1), "is below acc"),
        (dict(num_test_evaluations=0), "gives no accuracy"),
        (dict(parameters={"head": 1}), "must have the keys"),
        (dict(seconds=math.inf), "seconds = inf is not a finite"),
        (dict(macs=-1), "macs = -1 is not a finite"),
        (dict(backbone={"name": "x"}), "lacks name or sha256"),
        (dict(config_hash="abc"), "not a digest"),
        (dict(acc_se=[1.0]), r"acc_se = .1.0. does not fit to seeds"),
        (dict(acc_se=[1.0, -0.1]), "is not in points"),
        (dict(acc_se=[1.0, math.nan]), "is not in points"),
        (dict(acc_se=[1.0, math.inf]), "is not in points"),
        (dict(spent={"waiting": 1.0}), "must hold finite seconds of choice, training, evaluation"),
        (dict(spent={"training": -1.0}), "must hold finite seconds"),
        (dict(spent={"choice": math.nan}), "must hold finite seconds"),
        (dict(parameters=GOOD.parameters | {"prompts": 5}), "do not add up"),
    ],
)
def test_impossible_metrics(changes, message):
    with pytest.raises(ValueError, match=message): example_metrics(**changes)


@pytest.mark.parametrize("spoil, message", [
    (lambda raw: raw.pop("macs"), "lacks macs"), (lambda raw: raw.update(extra=1), "unknown key 'extra'"),
    (lambda raw: raw.update(status="failed"), "status = 'failed'"), (lambda raw: raw.pop("status"), "status = None"),
    (lambda raw: raw.update(status="running"), "status = 'running'"), (lambda raw: raw.update(acc_mean=99.0), "acc_mean = 99.0, but"),
    (lambda raw: raw.pop("acc_std"), "acc_std = None, but"), (lambda raw: raw.update(acc="71"), "acc = '71' is not a list"),
    (lambda raw: raw["acc"].__setitem__(0, math.nan), "NaN is no number"), (lambda raw: raw.update(seeds=[0.5, 1, 2]), "not of type int")])
def test_spoiled_files(tmp_path, spoil, message):
    raw = GOOD.record()
    spoil(raw)
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message) as error: read_metrics(path)
    assert str(path) in str(error.value) and "repeat its run stage" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '{"status": "success"'])
def test_corrupt_files(tmp_path, text):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match="metrics.json"): read_metrics(tmp_path / "metrics.json")


def test_hash_of_other_settings(tmp_path):
    GOOD.write(tmp_path / "metrics.json")
    assert read_metrics(tmp_path / "metrics.json", "0" * 16) == GOOD
    with pytest.raises(ValueError, match="settings now have " + "1" * 16): read_metrics(tmp_path / "metrics.json", "1" * 16)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="metrics.json"): read_metrics(tmp_path / "metrics.json")


def test_versions_name_what_numbers_depend_on():
    assert set(versions()) == {"python", "torch", "timm", "hierprompt"}


def test_the_processor_is_described():
    here = machine()
    assert all(isinstance(value, str) and value for value in here.values()) and {"capability", "threads"} <= set(here)
    assert here == machine() and processor().items() <= here.items()


def test_the_processor_of_linux(tmp_path):
    block = "processor\t: {}\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 85\nmodel name\t: Xeon: 2.8 GHz\nstepping\t: 7\n"
    info, caches = tmp_path / "cpuinfo", tmp_path / "cache"
    for i, size in enumerate(("32K", "1024K")):
        (caches / f"index{i}").mkdir(parents=True)
        (caches / f"index{i}/size").write_text(size + "\n")
    def told(flags, blocks=2):
        info.write_text("\n".join(block.format(i) + f"flags\t\t: {flags}\n" for i in range(blocks)))
        return processor(info, caches)
    found = told("fpu avx2 avx512f")
    assert {name: value for name, value in found.items() if name != "flags"} == {
        "vendor": "GenuineIntel", "family": "6", "model": "85", "name": "Xeon: 2.8 GHz", "stepping": "7", "caches": "32K 1024K"
    }
    assert len(found["flags"]) == 16 and told("avx512f avx2 fpu") == found == told("fpu avx2 avx512f", 1) != told("fpu avx2")


def test_the_processor_elsewhere(tmp_path):
    assert list(processor(tmp_path / "nothing")) == ["name"] and processor(tmp_path / "nothing")["name"]
    (tmp_path / "arm").write_text("processor\t: 0\nBogoMIPS\t: 50\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n")
    arm = processor(tmp_path / "arm", tmp_path / "no caches")
    assert (arm["vendor"], arm["model"], arm["caches"], len(arm["flags"])) == ("0x41", "0xd0c", "", 16)


def test_metrics_need_no_torch_to_be_read():
    code = "import sys, hierprompt.results.metrics, hierprompt.results.compare; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


@pytest.mark.parametrize("right, n", [(0, 1), (0, 400), (13, 32), (200, 400), (400, 400)])
def test_standard_error_is_agresti_and_coull_s(right, n):
    answers = np.array([1, 1, 0, 0] + [1] * right + [0] * (n - right))   # two right and two wrong ones added
    assert standard_error(100 * right / n, n) == pytest.approx(100 * answers.std() / np.sqrt(len(answers)))


@pytest.mark.parametrize("acc, n", [(50.0, 0), (-1.0, 10), (100.5, 10), (math.nan, 10)])
def test_no_standard_error(acc, n):
    with pytest.raises(ValueError, match="is no accuracy"): standard_error(acc, n)


def test_what_an_older_file_lacks():
    raw = GOOD.record()
    assert lacking(raw) == [] and lacking({k: v for k, v in raw.items() if k not in ("diagnostics", "spent")}) == []
    for gone in ("acc_se", "versions", "machine"):
        older = {name: value for name, value in raw.items() if name != gone}
        assert lacking(older) == [gone]
        with pytest.raises(ValueError, match=f"old.json: metrics lacks {gone}; delete the file"): check_metrics(older, "old.json")


def test_metrics_from_another_version_of_the_program_are_read():
    assert check_metrics(GOOD.record() | {"versions": {"torch": "1.0"}}, "here").versions == {"torch": "1.0"}


# collecting

def test_collect_is_tidy_and_complete(tmp_path):
    for variant in ("bias", "linear"):
        for task in ("cards", "flags"): put(tmp_path, example_metrics(variant, task, acc=[60.0, 61.0, 62.0]))
    frame = collect(tmp_path, "example")
    assert list(frame) == COLUMNS and len(frame) == 12 and not frame.duplicated(["variant", "task", "seed"]).any()
    assert frame.acc.tolist() == [60.0, 61.0, 62.0] * 4


def test_collect_without_any_run(tmp_path):
    frame = collect(tmp_path, "reference")
    assert list(frame) == COLUMNS and frame.empty
    mean, std = over_seeds(frame, GROUPS)
    assert mean.empty and std.empty and "mean_of_groups" in mean


def test_collect_skips_failed_runs_and_stops_at_everything_else(tmp_path):
    put(tmp_path, GOOD)
    path = tmp_path / "example/runs/bias-cards/metrics.json"
    path.parent.mkdir()
    path.write_text('{"status": "failed"}')
    assert set(collect(tmp_path, "example").variant) == {"linear"} and failed_cells(tmp_path, "example") == ["bias-cards"]
    path.write_text('{"status": "run')
    with pytest.raises(ValueError, match="bias-cards"): collect(tmp_path, "example")
    path.write_text(json.dumps(GOOD.record()))
    with pytest.raises(ValueError, match="cell 'linear-cards'; repeat the run stage of bias-cards"): collect(tmp_path, "example")


def test_collect_refuses_another_profiles_file(tmp_path):
    replace(GOOD, profile="laptop").write(tmp_path / "paper/runs/linear-cards/metrics.json")
    with pytest.raises(ValueError, match="holds profile 'laptop'"): collect(tmp_path, "paper")


def test_collect_refuses_outdated_settings(tmp_path):
    put(tmp_path, GOOD)
    assert len(collect(tmp_path, "example", {"linear-cards": "0" * 16, "bias-cards": "1" * 16})) == 3
    with pytest.raises(ValueError, match="config_hash"): collect(tmp_path, "example", {"linear-cards": "1" * 16})


# averages and seeds

def test_a_missing_task_leaves_the_average_missing():
    acc = pd.DataFrame({"a": [1.0], "b": [np.nan], "c": [5.0]})
    groups = {"a": "natural", "b": "natural", "c": "structured"}
    assert averages(acc, groups).isna().iloc[0].to_dict() == dict(natural=True, structured=False, mean_of_groups=True, mean_of_tasks=True)
    assert averages(acc.drop(columns="b"), groups).isna().iloc[0].tolist() == [True, False, True, True]


def test_fine_grained_tasks_are_averaged_apart():
    acc = pd.DataFrame({"a": [10.0], "b": [30.0], "cub200": [90.0]})
    result = averages(acc, {"a": "natural", "b": "structured", "cub200": "fine_grained"}).iloc[0]
    assert result.tolist() == [10.0, 30.0, 90.0, 20.0, 20.0]


def test_over_seeds_against_numpy(tmp_path):
    generator, tasks = np.random.default_rng(0), dict(
        zip("abcdefg", ["natural"] * 2 + ["specialized"] + ["structured"] * 3 + ["fine_grained"])
    )
    acc = generator.uniform(20, 90, (len(tasks), 5))
    for values, (task, group) in zip(acc, tasks.items()): put(tmp_path, example_metrics("bias", task, group, acc=values.tolist()))
    mean, std = over_seeds(collect(tmp_path, "example"), tasks)
    per_seed = np.mean([acc[:2].mean(0), acc[2], acc[3:6].mean(0)], axis=0)
    assert mean.at["bias", "mean_of_groups"] == pytest.approx(per_seed.mean())
    assert std.at["bias", "mean_of_groups"] == pytest.approx(per_seed.std(ddof=1))
    assert std.at["bias", "mean_of_tasks"] == pytest.approx(acc[:6].mean(0).std(ddof=1))
    assert std.at["bias", "g"] == pytest.approx(acc[6].std(ddof=1))
    best, _ = over_seeds(collect(tmp_path, "example"), tasks, "acc_best_test")
    assert (best - mean).loc["bias"].tolist() == pytest.approx([0.5] * 13)


def test_one_seed_has_no_deviation(tmp_path):
    put(tmp_path, example_metrics(acc=[50.0]))
    mean, std = over_seeds(collect(tmp_path, "example"), {"cards": "fine_grained"})
    assert mean.at["linear", "cards"] == 50 and std.isna().all(axis=None)


def test_mixed_seeds_are_refused(tmp_path):
    put(tmp_path, example_metrics("linear", "cards", acc=[50.0, 51.0]))
    put(tmp_path, example_metrics("linear", "flags", acc=[50.0]))
    with pytest.raises(ValueError, match="other seeds than in the rest"):
        over_seeds(collect(tmp_path, "example"), dict.fromkeys(["cards", "flags"], "fine_grained"))
