"DA-VPT's printed tables and released settings: what can be recomputed from them is, and every listed conflict is one."
import csv
import math
import statistics

import pytest

from hierprompt.data.benchmarks import benchmark_tasks, list_tasks
from hierprompt.results.metrics import group_means, mean_of_groups
from hierprompt.results.published import PUBLISHED, load_published, published_index

INDEX = {name: entry for name, entry in published_index().items() if name.startswith("davpt")}
PRETRAININGS = ["supervised_in21k", "mae_in1k", "mocov3_in1k"]
TABLE_1, FGVC, ABLATION, SIZES = (load_published(f"davpt_{name}") for name in ("table1", "table3_fgvc", "table4", "table6"))
VARIANTS, SEGMENTATION, PER_TASK = (load_published(f"davpt_{name}") for name in ("table7", "table2_segmentation", "appendix_vtab_per_task"))
GROUPS = {task: group for group, tasks in PER_TASK.attrs["groups"].items() for task in tasks}
TASKS = benchmark_tasks("vtab") | benchmark_tasks("fgvc")
SETTINGS = load_published("davpt_settings")
READ = SETTINGS.fillna(SETTINGS.attrs["defaults"]).fillna({"legacy": ""})  # what the released parser works with
D, L, BACKBONE = 768, 12, 85_798_656  # ViT-B/16: width, depth, parameters without head (DA-VPT spec 2)


def legacy(row):
    "The legacy keys of a configuration; a key without value is True."
    return {key: value or True for key, _, value in (word.partition("=") for word in row.legacy.split())}


def prompts(row):
    "Section 2: D (|G| M + (L - |G|) N) with the guided blocks G = start..11, M lowered to the number of classes (section 1.8)."
    guided, classes = L - int(row.start), TASKS[row.task].num_classes
    return D * (guided * min(int(row.M), classes) + (L - guided) * int(row.N))


def released(row):
    """Section 2: value, projection, fc2 and second normalisation biases, patch embedding; key, first normalisation, class token where
    they train."""
    return D * (4 * L + 1 + L * int(row.k) + 2 * L * int(row.n1) + int(row.cls))


def head(row): return TASKS[row.task].num_classes * (D + 1)


def rows_of(pretraining, benchmark):
    return [r for r in READ.itertuples() if r.pretraining == pretraining and r.config.startswith(benchmark)]


def mean(count, rows): return statistics.fmean(count(r) for r in rows) / 1e6


# tables 1 to 3 and 9

@pytest.mark.parametrize("name, rows", {"table1": 20, "table2_segmentation": 8, "table3_fgvc": 15, "table4": 8, "table5": 12, "table6": 26,
    "table7": 6, "appendix_vtab_per_task": 10, "settings": 61}.items())
def test_rows(name, rows): assert len(load_published(f"davpt_{name}")) == rows


def test_group_means_of_table_9_are_table_1s():
    "Invariant 18 of the specification: within 0.02, but for the misprinted EuroSAT."
    means, wrong = group_means(PER_TASK, GROUPS), []
    for i, r in PER_TASK.iterrows():
        match = TABLE_1[(TABLE_1.method == r.method) & (TABLE_1.pretraining == r.pretraining)]
        if match.empty: continue   # Linear, Adapter, Bias: not in Table 1
        wrong += [(r.pretraining, r.method, g) for g in means if abs(match[g].item() - means.at[i, g]) > 0.02 + 1e-9]
    assert wrong == [("supervised_in21k", "Full", "specialized")]


def test_vtab_column_is_the_mean_of_groups_not_of_tasks():
    of_groups, of_tasks = mean_of_groups(PER_TASK, GROUPS), PER_TASK[list(GROUPS)].mean(axis=1)
    for i, r in PER_TASK[PER_TASK.method == "DA-VPT+"].iterrows():
        printed = TABLE_1[(TABLE_1.method == r.method) & (TABLE_1.pretraining == r.pretraining)].vtab.item()
        assert abs(printed - of_groups[i]) < 0.02 and abs(printed - of_tasks[i]) > 2


def test_gains_of_the_text_over_table_1():
    "Section 5.2 of the paper: FGVC and VTAB-1k."
    table = TABLE_1[TABLE_1.pretraining == "supervised_in21k"].set_index("method")[["fgvc", "vtab"]]
    assert (table.loc["DA-VPT+"] - table.loc["VPT-Deep"]).round(2).tolist() == [2.83, 4.18]
    assert (table.loc["DA-VPT+"] - table.loc["E2VPT"]).round(2).tolist() == [2.72, 2.20]
    best = FGVC[~FGVC.own].set_index("method")
    own = FGVC.set_index("method").loc["DA-VPT+"]
    assert (round(own.cub200 - best.cub200.max(), 1), round(own.stanford_cars - best.stanford_cars.max(), 1)) == (0.6, 1.8)


def test_table_3_baseline_is_twenty_prompts_with_head():
    heads = statistics.fmean(t.num_classes * (D + 1) for t in benchmark_tasks("fgvc").values())
    assert heads == pytest.approx(180_407.4) and round((20 * L * D + heads) / 1e6, 2) == FGVC.set_index("method").params["VPT-baseline-own"]


def test_segmentation_parameters():
    "Section 2: decode heads, prompts, key and value biases of ViT-L/16."
    width, depth, heads = 1024, 24, 4_171_414 + 3 * 2_990_742
    printed = SEGMENTATION.set_index("method").params
    ours = {
        "Linear": heads,
        "Bias": heads + 2 * width * depth,
        "VPT (baseline)": heads + 20 * width * depth,
        "DA-VPT": heads + 20 * width * depth,
        "DA-VPT+": heads + 22 * width * depth,
        "Full-Tuning": 317_291_096,
    }
    assert heads == 13_143_640 and {m: round(n / 1e6, 1) for m, n in ours.items()} == printed[list(ours)].to_dict()
    assert round(100 * printed["DA-VPT+"] / printed["Full-Tuning"], 1) == 4.3   # as the text says
    assert round((heads + 11 * width * depth + width) / 1e6, 1) == 13.4         # all biases: not the printed row


# tables 4 to 7

def test_ablation_has_all_eight_combinations():
    ticks = ABLATION[["patch", "cls", "bias"]]
    assert len(ticks.drop_duplicates()) == 8
    for r in ABLATION.itertuples():
        assert r.method == (" + ".join(name for name in ticks if getattr(r, name)) or "base")


def test_shares_are_percent_of_the_backbone():
    for name in ("natural", "cub200"):
        for params, share in set(zip(ABLATION[f"{name}_params"], ABLATION[f"{name}_share"])):
            low, high = (100 * (params + step) * 1e6 / BACKBONE for step in (-0.005, 0.005))
            assert low <= share + 0.005 and share - 0.005 <= high, (params, share)


def bounds(row, name):
    "What the printed amount and share of a row leave for its parameters, in millions."
    params, share, unit = row[f"{name}_params"], row[f"{name}_share"], BACKBONE / 1e8
    return max(params - 0.005, (share - 0.005) * unit), min(params + 0.005, (share + 0.005) * unit)


def test_bias_of_table_4_costs_three_vectors_per_block():
    rows, low, high = ABLATION.set_index("method"), 0.0, math.inf
    for name in ("natural", "cub200"):
        (a, b), (c, d) = bounds(rows.loc["base"], name), bounds(rows.loc["bias"], name)
        low, high = max(low, c - b), min(high, d - a)
    assert (round(low, 4), round(high, 3)) == (0.0224, 0.030)
    assert low < 3 * D * L / 1e6 < high and 2 * D * L / 1e6 < low   # q, k, v fit; k and v, as the text says, do not


def test_prompts_of_table_4():
    rows = ABLATION.set_index("method")
    for name, n in (("natural", 15), ("cub200", 22)):
        low, high = bounds(rows.loc["base"], name)
        assert low <= n * D * L / 1e6 <= high, name


@pytest.mark.parametrize("frame, first, names", [(ABLATION, "base", ["natural", "cub200"]),
    (VARIANTS, "VPT (baseline)", ["cub200", "stanford_cars", "nabirds", "natural"])])
def test_printed_gains(frame, first, names):
    frame = frame.set_index("method")
    for name in names:
        gains = (frame[name] - frame[name][first]).round(2).drop(first)
        assert gains.tolist() == frame[f"{name}_gain"].drop(first).tolist() and math.isnan(frame[f"{name}_gain"][first])


def test_costs_of_table_4():
    rows = ABLATION.set_index("method")
    assert (rows.ms_per_image / rows.ms_per_image["base"]).loc[["patch + cls", "patch + cls + bias"]].round(3).tolist() == [1.092, 1.106]
    assert rows.groupby("bias").memory_gb.unique().map(list).to_dict() == {False: [2.41], True: [2.76]}


def test_variants_share_rows_with_tables_1_and_3():
    variants, third = VARIANTS.set_index("method"), FGVC.set_index("method")
    for ours, theirs in (("VPT (baseline)", "VPT-baseline-own"), ("DA-VPT", "DA-VPT")):
        for task in ("cub200", "stanford_cars", "nabirds"): assert variants[task][ours] == third[task][theirs]
    first = TABLE_1[TABLE_1.pretraining == "supervised_in21k"].set_index("method").natural
    assert variants.natural.tolist()[:2] == [first["VPT-Deep"], first["DA-VPT"]]


def test_data_sets_of_table_6_are_ours_but_for_the_listed_ones():
    known = SIZES[SIZES.group != "segmentation"].set_index("task")
    assert sorted(known.index) == sorted(list_tasks("vtab") + list_tasks("fgvc"))
    wrong = {}
    for name, r in known.iterrows():
        task = TASKS[name]
        ours = dict(zip(("train", "val", "test"), task.sizes)) | {"classes": task.num_classes}
        assert r.group == task.group
        wrong |= {(name, key): (r[key], value) for key, value in ours.items() if not math.isnan(r[key]) and r[key] != value}
    assert wrong == {(c["row"], c["column"]): (c["printed"], c["recomputed"]) for c in INDEX["davpt_table6"]["conflicts"]}
    assert known.classes.isna().sum() == 1 and math.isnan(known.classes["clevr_count"])
    assert set(known[known.group != "fine_grained"].train_val) == {1000}


def test_grid_of_table_5():
    grid = load_published("davpt_table5").set_index("setting")["values"].str.split()
    assert [float(v) for v in grid["lr"]] == [1e-3, 5e-4, 1e-4, 5e-5] and grid["guided_prompts"] == ["5", "10", "20", "40"]
    common = SETTINGS.attrs["common"]
    assert [[float(v) for v in grid[k]] for k in ("batch_size", "warmup_epochs", "epochs", "proxy_anchor_first")] == \
        [[common[k]] for k in ("batch_size", "warmup_epochs", "epochs", "alpha")]
    assert set(SETTINGS.lr) - {float(v) for v in grid["lr"]} == {5e-3, 1e-2, 2e-4}   # D25
    assert {15, 60} == set(SETTINGS.M.dropna()) - {float(v) for v in grid["guided_prompts"]}
    assert {0, 1e-4, 5e-4, 5, 10} == set(SETTINGS.wd.dropna()) - {float(v) for v in grid["weight_decay"]}


# conflicts

def conflicting_values():
    "(table, pretraining, row, column, printed) -> what contradicts it, from other data."
    first = {(r.pretraining, r.method): r for r in TABLE_1.itertuples()}
    third, fourth, seventh = FGVC.set_index("method"), ABLATION.set_index("method"), VARIANTS.set_index("method")
    sup = PER_TASK[PER_TASK.pretraining == "supervised_in21k"].set_index("method")
    both, whole, plus = fourth.loc["patch + cls"], fourth.loc["patch + cls + bias"], third.loc["DA-VPT+"]
    vpt, da = seventh.loc["VPT (baseline)"], seventh.loc["DA-VPT"]
    four, seven = "davpt_table4", "davpt_table7"
    for key in (
        ("mae_in1k", "VPT-Deep", 41.73),
        ("mae_in1k", "GateVPT", 53.09),
        ("mocov3_in1k", "VPT-Deep", 65.90),
        ("mocov3_in1k", "DA-VPT+", 73.53),
    ):
        r = first[key[:2]]
        yield ("davpt_table1", *key[:2], "vtab", key[2]), (r.natural + r.specialized + r.structured) / 3
    tasks = FGVC.attrs["groups"]["fine_grained"]
    yield ("davpt_table3_fgvc", None, "VPT-baseline-own", "mean", 90.14), third.loc["VPT-baseline-own", tasks].mean()
    yield (four, None, "base", "natural", 79.45), vpt.natural
    yield (four, None, "patch + cls", "natural", 80.53), first["supervised_in21k", "DA-VPT"].natural
    yield (four, None, "patch + cls", "cub200", 89.86), third.cub200["DA-VPT"]
    yield (four, None, "patch + cls + bias", "cub200", 90.89), plus.cub200
    yield (four, None, "bias", "cub200_params", 0.23), round(bounds(fourth.loc["base"], "cub200")[1] + 2 * D * L / 1e6, 2)
    yield (four, None, "patch + cls + bias", "natural_gain", 2.05), whole.natural - fourth.natural["base"]
    yield (four, None, "patch + cls + bias", "natural_gain", 0.97), whole.natural - both.natural
    yield (four, None, "patch + cls + bias", "ms_per_image", 5), 100 * (whole.ms_per_image / fourth.ms_per_image["base"] - 1)
    yield ("davpt_table5", None, "proxy_anchor_second", "values", 10.0), SETTINGS.attrs["common"]["delta"]
    yield ("davpt_table6", None, "nabirds", "classes", 55), TASKS["nabirds"].num_classes
    yield ("davpt_table6", None, "resisc45", "test", 1880), TASKS["resisc45"].sizes[2]
    yield ("davpt_table6", None, "smallnorb_ele", "classes", 18), TASKS["smallnorb_ele"].num_classes
    yield (seven, None, "VPT (baseline)", "natural", 78.48), fourth.natural["base"]
    yield (seven, None, "DA-VPT", "natural", 80.25), both.natural
    yield (seven, None, "DA-VPT", "cub200", 90.2), both.cub200
    special = PER_TASK.attrs["groups"]["specialized"]
    needed = 4 * first["supervised_in21k", "Full"].specialized - sup.loc["Full", special].drop("eurosat").sum()
    yield ("davpt_appendix_vtab_per_task", "supervised_in21k", "Full", "eurosat", 93.7), needed
    # VPT's group mean (baselines spec 1.8)
    yield ("davpt_appendix_vtab_per_task", "supervised_in21k", "Adapter", "structured", 32.4), 33.4
    fgvc = rows_of("supervised_in21k", "fgvc")
    yield ("davpt_settings", None, "FGVC mean, supervised_in21k", "parameters", plus.params), sum(
        mean(f, fgvc) for f in (prompts, released, head)
    )


def test_every_listed_conflict_is_one_and_none_is_missing():
    listed = {
        (name, c.get("pretraining"), c["row"], c["column"], c["printed"]): c["recomputed"]
        for name, e in INDEX.items()
        for c in e["conflicts"]
    }
    found = dict(conflicting_values())
    assert found.keys() == listed.keys()
    for key, value in found.items():
        assert value == pytest.approx(listed[key], abs={"eurosat": 0.1, "ms_per_image": 0.05}.get(key[3], 0.0051)), key
        assert abs(key[4] - value) > (0.009 if key[3] in ("cub200_params", "vtab") else 0.05), key


def test_structured_mean_of_adapter_in_table_9():
    adapter = PER_TASK[PER_TASK.method == "Adapter"]
    assert group_means(adapter, GROUPS).structured.item() == pytest.approx(32.4, abs=0.051)


def test_printed_values_that_a_sentence_contradicts_are_another_rows():
    "2.05 and 0.97, which the text gives to all three components, are those of the row above."
    rows = ABLATION.set_index("method")
    assert rows.natural_gain["cls + bias"] == 2.05
    assert rows.natural["cls + bias"] - rows.natural["patch + cls"] == pytest.approx(0.97)
    assert rows.cub200["patch + cls + bias"] - rows.cub200["patch + cls"] == pytest.approx(1.03)   # here the text is right


# settings

def test_sixty_one_settings_of_known_tasks():
    assert not SETTINGS.config.duplicated().any() and not SETTINGS.duplicated(["pretraining", "task"]).any()
    counts = SETTINGS.groupby([SETTINGS.config.str.split("/").str[0], "pretraining"]).size().to_dict()
    assert counts == {("fgvc", p): 5 for p in PRETRAININGS} | {("vtab", p): n for p, n in zip(PRETRAININGS, (16, 15, 15))}
    for r in SETTINGS.itertuples(): assert r.task in list_tasks(r.config.split("/")[0])
    prefix = SETTINGS.config.str.extract(r"/(\w+?)_")[0]
    assert prefix.map({"vitb": "supervised_in21k", "mae": "mae_in1k", "moco": "mocov3_in1k"}).tolist() == SETTINGS.pretraining.tolist()


def test_tasks_without_configuration():
    "D30"
    for pretraining, absent in SETTINGS.attrs["without_configuration"].items():
        there = set(SETTINGS[SETTINGS.pretraining == pretraining].task)
        assert [t for t in (*list_tasks("vtab"), *list_tasks("fgvc")) if t not in there] == absent


def test_no_cell_is_without_meaning():
    defaults, numbers = SETTINGS.attrs["defaults"], [c for c in SETTINGS if c not in ("config", "pretraining", "task", "legacy", "pnorm")]
    assert set(SETTINGS.columns[SETTINGS.isna().any()]) - {"legacy"} <= set(defaults)
    assert READ.notna().all(axis=None) and all(READ[c].dtype.kind in "if" for c in numbers)
    assert {key for r in READ.itertuples() for key in legacy(r)} == set(SETTINGS.attrs["legacy"])
    with open(PUBLISHED / "davpt_settings.csv", newline="") as file:
        assert {len(row) for row in csv.reader(file)} == {len(SETTINGS.columns)}


def test_counts_that_the_specification_states():
    assert READ.pnorm.value_counts().to_dict() == {"none": 57, "l2": 4} and SETTINGS.pnorm.isna().sum() == 3   # D15
    assert READ.div8.sum() == 57 and READ["mask"].sum() == 6 and set(READ[READ["mask"] == 1].config.str[:4]) == {"fgvc"}   # D14, D7
    assert READ.dyn.value_counts().to_dict() == {10: 39, 1: 22} and set(READ.ev) == {60, 80, 90}   # D10, section 3.4
    assert READ.dp.value_counts().to_dict() == {0.1: 39, 0.0: 21, 0.2: 1}   # D40
    assert sorted(READ[READ.es > 0].config) == ["fgvc/moco_cub200", "fgvc/vitb_cub200", "fgvc/vitb_dogs"]   # D23
    assert (READ.r.min(), READ.r.max()) == (0, 60) and (READ.wd_head.min(), READ.wd_head.max()) == (0, 20)   # D6, D22


def test_settings_whose_losses_the_released_parser_switches_off():
    "D24: the weights are in keys that it no longer reads."
    off = READ[(READ.w_patch == 0) & (READ.w_cls == 0)]
    assert off.config.tolist() == [
        f"{b}/vitb_{t}" for b, t in (("fgvc", "dogs"), ("fgvc", "flowers"), ("vtab", "caltech101"), ("vtab", "dtd"), ("vtab", "pet"))
    ]
    assert {c for c in READ.config if "w_both" in legacy(READ[READ.config == c].iloc[0])} == set(off.config)
    assert READ[READ.r == 0].config.tolist() == ["fgvc/mae_dogs"]   # similarities scaled to 0
    half = READ[(READ.w_patch == 0) != (READ.w_cls == 0)]
    assert half.config.tolist() == ["vtab/vitb_smallnorb_ele"]


def test_legacy_depths_beyond_the_last_block():
    depths = {r.config: int(r.start) + int(legacy(r)["gdepth"]) for r in READ.itertuples() if "gdepth" in legacy(r)}
    assert [c for c, end in depths.items() if end > L] == ["vtab/moco_cifar100", "vtab/vitb_eurosat"]
    assert all(int(r.start) + 1 <= L for r in READ.itertuples())


@pytest.mark.parametrize(
    "pretraining, benchmark, expected",
    [
        ("supervised_in21k", "fgvc", (0.279, 0.066)),
        ("supervised_in21k", "vtab", (0.145, 0.061)),
        ("mae_in1k", "vtab", (0.049, 0.042)),
        ("mocov3_in1k", "vtab", (0.042, 0.064)),
    ],
)
def test_mean_parameters_of_the_settings(pretraining, benchmark, expected):
    rows = rows_of(pretraining, benchmark)
    assert (round(mean(prompts, rows), 3), round(mean(released, rows), 3)) == expected


def test_parameters_of_the_supervised_fgvc_settings():
    rows = rows_of("supervised_in21k", "fgvc")
    assert {released(r) for r in rows} == {66_048} and round(mean(head, rows), 3) == 0.180
    cars = next(r for r in rows if r.task == "stanford_cars")
    assert round((prompts(cars) + released(cars) + head(cars)) / 1e6, 2) == 0.94
    assert sum(round(mean(f, rows), 3) for f in (prompts, released, head)) == pytest.approx(0.525)


def test_released_sets_of_mae():
    "Section 2: 37,632 without the class token, 38,400 with it."
    counts = [released(r) for r in READ.itertuples() if r.pretraining == "mae_in1k"]
    assert sorted(set(counts)) == [37_632, 38_400, 38_400 + 2 * D * L] and counts.count(38_400 + 2 * D * L) == 3
