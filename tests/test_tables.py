"The results tables: what may be compared, what is missing, and files that do not change without a reason."
from dataclasses import replace

import pandas as pd
import pytest

from hierprompt.results.figures import FIGURES, write_figures
from hierprompt.results.metrics import averages, example_metrics
from hierprompt.results.published import load_published
from hierprompt.results.published_rows import BASELINES, MEANS, OTHERS, published_groups, published_means, published_tasks, rows_of
from hierprompt.results.tables import (
    build_table,
    column_texts,
    difference,
    markdown,
    means_part,
    notes,
    numbers,
    published_part,
    task_groups,
    tasks_part,
    why_not,
    write_tables,
)

ORIG = {"name": "vit_base_patch16_224.orig_in21k", "sha256": "0" * 64}
PAPER = published_groups()
EMBEDDED = ["emoji", "koeppen", "dsprites_like_x", "cards"]


def put(root, metrics):
    metrics.write(root / metrics.profile / "runs" / metrics.cell / "metrics.json")


def run_paper(root, variant, shift=0.0, gap=1.0, backbone=ORIG, profile="paper", without=()):
    "Made-up cells of a variant on all 24 tasks: VPT-Deep's printed accuracies, shifted."
    row = load_published("davpt_appendix_vtab_per_task").query("method == 'VPT-Deep'").iloc[0]
    fgvc = load_published("davpt_table3_fgvc").query("method == 'VPT-Deep'").iloc[0]
    for task, group in PAPER.items():
        if task in without: continue
        acc = (row[task] if group != "fine_grained" else fgvc[task]) + shift
        put(root, replace(example_metrics(variant, task, group, acc=[acc, acc], gap=gap), profile=profile, backbone=backbone))


def printed(table, label, source):
    return table.published.query("method == @label and source == @source").iloc[0]


# published rows

def test_every_published_row_is_shown_once():
    shown = published_means([*BASELINES, *OTHERS])
    ship = shown.query("source == 'SHIP Table I'")
    assert sorted(ship.params) == sorted(load_published("ship_table1").params)
    assert len(shown.query("source == 'DA-VPT Table 1'")) == 6 and not shown.duplicated(["method", "source"]).any()
    mae = published_means([*BASELINES, *OTHERS], "mae_in1k")
    assert mae.method.tolist() == ["Full", "VPT-Shallow", "VPT-Deep", "E2VPT", "GateVPT", "DA-VPT", "DA-VPT+"]
    assert set(mae.backbone) == {"vit_base_patch16_224.mae"}


def test_all_published_names_exist():
    tables = {
        "SHIP Table I": load_published("ship_table1"),
        "DA-VPT Table 1": load_published("davpt_table1"),
        "DA-VPT Table 3": load_published("davpt_table3_fgvc"),
        "DA-VPT Tables 3 and 9": load_published("davpt_appendix_vtab_per_task"),
        "SHIP, released runs": pd.DataFrame({"method": ["SHIP"]}),
    }
    for row in [*BASELINES, *OTHERS]:
        for source, name in row.published.items(): assert name in set(tables[source].method), (row.label, source)


def test_every_row_of_da_vpts_table_3_is_one_of_ours():
    shown, third = published_means([*BASELINES, *OTHERS]), load_published("davpt_table3_fgvc").set_index("method")
    own = shown[shown.source == "DA-VPT Table 3"].set_index("method")
    assert own.fine_grained.to_dict() == {
        row.label: third["mean"][row.published["DA-VPT Table 3"]] for row in OTHERS if "DA-VPT Table 3" in row.published}
    assert own.drop(columns="fine_grained")[["natural", "mean_of_groups"]].isna().all().all()
    assert set(third.index) <= {name for row in [*BASELINES, *OTHERS] for source, name in row.published.items() if "DA-VPT" in source}


def test_the_two_adapters_are_two_rows():
    shown = published_means([*BASELINES, *OTHERS]).set_index(["method", "source"])
    assert shown.mean_of_groups["Adapter", "SHIP Table I"] == 73.9
    assert shown.mean_of_groups["Adapter, zero-initialised", "DA-VPT Tables 3 and 9"] == pytest.approx(59.95, abs=0.01)


def test_single_tasks_as_published():
    frame = published_tasks(BASELINES, ["kitti", "cub200"])
    assert frame[frame.method == "VPT-Deep"][["kitti", "cub200"]].max().tolist() == [72.8, 88.5]
    assert "Adapter" not in set(frame.method) and len(published_tasks(BASELINES, EMBEDDED)) == 0


def test_the_released_runs_of_ship_are_a_row_of_their_own():
    means = published_means(OTHERS).query("source == 'SHIP, released runs'").iloc[0]
    assert means[["natural", "specialized", "structured", "mean_of_groups"]].tolist() == pytest.approx(
        [82.584, 86.630, 61.527, 76.914], abs=6e-4
    )
    assert (means.params, means.protocol, means.variant) == (pytest.approx(0.583, abs=5e-4), "best test epoch", "ship_winners")
    tasks = published_tasks(OTHERS, ["cifar100", "kitti"]).query("source == 'SHIP, released runs'").iloc[0]
    assert tasks[["cifar100", "kitti"]].tolist() == [76.63, 81.153]


def test_rows_of_one_paper():
    rows = rows_of()
    assert [row.published for row in rows] == [{"SHIP Table I": m} for m in load_published("ship_table1").method]
    assert [row.variant for row in rows] == [
        "full",
        "linear",
        "adapter",
        "lora",
        "noah",
        "sct",
        "vpt_deep",
        "dam_vp",
        "e2vpt",
        "sa2vp",
        "ship",
    ]
    with pytest.raises(KeyError, match="method of nowhere"): rows_of("nowhere")


def test_table_1_of_ship(tmp_path):
    run_paper(tmp_path, "vpt_deep", without=["cub200", "nabirds", "oxford_flowers", "stanford_dogs", "stanford_cars"])
    vtab = [t for t, g in PAPER.items() if g != "fine_grained"]
    table = build_table(
        "paper",
        ["vpt_deep", "ship_winners"],
        vtab,
        tmp_path,
        "SHIP Table I",
        rows_of(),
        [r for r in OTHERS if r.variant == "ship_winners"],
        remarks=["a remark"],
    )
    part = means_part(table).set_index("Method")
    assert part.index.tolist()[-2:] == ["SHIP", "SHIP, settings of the released runs"] and len(part) == 12
    assert part["published, M"].tolist()[:4] == ["85.80", "0.04", "0.16", "0.29"] and part.at["SHIP", "Mean of groups (3)"] == "not run"
    shown = published_part(table).set_index(["Method", "Source"])
    assert shown.at[("SHIP", "SHIP Table I"), "Mean of groups"] == "76.90" and shown.at[
        ("VPT-Deep", "SHIP Table I"), "Ours − published"
    ].startswith("Mean of groups")
    assert notes(table)[-1] == "a remark" and "SHIP, released runs" in set(tasks_part(table).Source)


# what may be subtracted

def test_difference_of_a_comparable_row(tmp_path):
    run_paper(tmp_path, "vpt_deep", shift=-1.0)
    table = build_table("paper", ["vpt_deep"], list(PAPER), tmp_path)
    row = printed(table, "VPT-Deep", "DA-VPT Table 1")
    assert [why_not(table, row, c) for c in MEANS] == [""] * 5
    assert [difference(table, row, c) for c in MEANS] == pytest.approx([-1.0] * 5, abs=0.03)  # acc: VPT reports the last epoch
    part = published_part(table).query("Method == 'VPT-Deep' and Source == 'DA-VPT Table 1'")
    assert part["Ours − published"].item() == "Mean of groups -0.99; Fine-grained -1.01"
    tasks = tasks_part(table).query("Method == 'VPT-Deep' and Source == 'DA-VPT Table 9'").iloc[0]
    assert (tasks.kitti, tasks.svhn, tasks.cub200) == ("72.8 (-1.0)", "78.1 (-1.0)", "")
    page = numbers(table).query("variant == 'vpt_deep' and measure == 'ours - printed'").set_index("source")
    assert page.mean_of_groups["DA-VPT Table 1"] == pytest.approx(-0.99, abs=0.01) and page.cub200["DA-VPT Table 3"] == pytest.approx(-1.0)


def test_rows_of_the_best_test_epoch_are_compared_with_acc_best_test(tmp_path):
    run_paper(tmp_path, "lora", shift=-3, gap=2.0)
    run_paper(tmp_path, "vpt_deep", shift=-3, gap=2.0)
    table = build_table("paper", ["lora", "vpt_deep"], list(PAPER), tmp_path)
    assert difference(table, printed(table, "LoRA", "SHIP Table I"), "mean_of_groups") == pytest.approx(71.97 - 3 + 2 - 74.9, abs=0.01)
    assert difference(table, printed(table, "VPT-Deep", "SHIP Table I"), "mean_of_groups") == pytest.approx(71.97 - 3 - 72.0, abs=0.01)


@pytest.mark.parametrize("options, reason", [
    (dict(profile="reference"), "the profile is reference, not paper"), (dict(without=["kitti"]), "VPT-Deep was not run on all tasks"),
    (dict(backbone={"name": "tiny_random", "sha256": "0" * 64}), "VPT-Deep ran on tiny_random, DA-VPT Table 1 on "
                                                             "vit_base_patch16_224.orig_in21k")])
def test_why_a_row_is_not_comparable(tmp_path, options, reason):
    run_paper(tmp_path, "vpt_deep", **options)
    table = build_table(options.get("profile", "paper"), ["vpt_deep"], list(PAPER), tmp_path)
    row = printed(table, "VPT-Deep", "DA-VPT Table 1")
    assert why_not(table, row, "mean_of_groups") == reason and pd.isna(difference(table, row, "mean_of_groups"))
    assert f"No difference: {reason}." in notes(table)
    assert "ours - printed" not in set(numbers(table).query("source == 'DA-VPT Table 1'").measure) or "without" in options


def test_a_missing_task_forbids_only_what_it_enters(tmp_path):
    run_paper(tmp_path, "vpt_deep", without=["kitti"])
    table = build_table("paper", ["vpt_deep"], list(PAPER), tmp_path)
    row = printed(table, "VPT-Deep", "DA-VPT Table 1")
    assert [why_not(table, row, c) == "" for c in MEANS] == [True, True, False, False, True]
    assert means_part(table).set_index("Method").loc["VPT-Deep", ["Structured (8)", "Mean of groups (3)"]].tolist() == [
        "7 of 8 tasks",
        "18 of 19 tasks",
    ]


def test_fewer_tasks_are_another_benchmark(tmp_path):
    run_paper(tmp_path, "vpt_deep")
    tasks = [t for t in PAPER if t != "kitti"]
    table = build_table("paper", ["vpt_deep"], tasks, tmp_path)
    row = printed(table, "VPT-Deep", "SHIP Table I")
    assert why_not(table, row, "structured") == "Structured has other tasks than the papers" and why_not(table, row, "natural") == ""


def test_embedded_results_are_never_subtracted(tmp_path):
    for task, (_, group) in task_groups(EMBEDDED).items():
        put(tmp_path, replace(example_metrics("vpt_deep", task, group, acc=[50.0]), profile="paper", backbone=ORIG))
    table = build_table("paper", ["vpt_deep"], EMBEDDED, tmp_path)
    assert "ours - printed" not in set(numbers(table).measure)
    assert "none of them from the papers" in markdown(table) and "(embedded)" in markdown(table)


# what is missing

def test_rows_that_were_not_run_stay(tmp_path):
    put(tmp_path, example_metrics("linear", "cards"))
    table = build_table("example", ["linear"], EMBEDDED, tmp_path)
    part = means_part(table).set_index("Method")
    assert part.index.tolist() == ["Full", "Linear", "Bias", "VPT-Shallow", "VPT-Deep", "Adapter", "LoRA"]
    assert part.at["Full", "published, M"] == "85.80 / 85.98" and set(part.drop(columns="published, M").loc["Full"]) == {"not run"}
    assert part.at["Linear", "Fine-grained (1)"] == "70.50 ± 0.71 (71.00)"
    published = published_part(table).query("Source == @table.source").set_index("Method")
    assert published.loc[["NOAH", "SCT", "SHIP", "DA-VPT+"], "Mean of groups"].tolist() == ["not run"] * 4
    page = numbers(table).query("measure == 'acc'").set_index("method")
    assert page.loc["SHIP", EMBEDDED].tolist() == ["not run"] * 4 and page.at["Linear", "emoji"] == "not run"


def test_profile_without_any_result(tmp_path):
    table = build_table("reference", ["linear"], EMBEDDED, tmp_path)
    assert "Backbone: not run" in markdown(table) and "74.50" in markdown(table)
    assert len(write_tables(table, tmp_path / "t")) == 2 and len(write_figures(table, tmp_path / "f")) == len(FIGURES)


def test_failed_runs_are_named(tmp_path):
    put(tmp_path, example_metrics("linear", "cards"))
    path = tmp_path / "example/runs/bias-cards/metrics.json"
    path.parent.mkdir()
    path.write_text('{"status": "failed", "error": "NaN loss"}')
    table = build_table("example", ["linear", "bias"], EMBEDDED, tmp_path)
    assert "Failed, shown as not run: bias-cards." in notes(table)
    assert means_part(table).set_index("Method").at["Bias", "Fine-grained (1)"] == "not run"


def test_metrics_outside_the_table_are_left_out(tmp_path):
    put(tmp_path, example_metrics("linear", "cards"))
    put(tmp_path, example_metrics("linear", "flags"))
    put(tmp_path, example_metrics("my_method", "cards"))
    table = build_table("example", ["linear"], ["cards"], tmp_path)
    assert len(table.frame) == 2
    assert build_table("example", ["linear"], ["cards"], tmp_path, config_hashes={}).frame.empty  # nobody vouches for this cell
    assert [row.label for row in build_table("example", ["my_method"], ["cards"], tmp_path).rows][-1] == "my_method"


def test_other_published_methods_become_rows_when_they_are_run(tmp_path):
    put(tmp_path, example_metrics("ship", "cards"))
    table = build_table("example", ["linear", "ship"], EMBEDDED, tmp_path)
    assert [row.label for row in table.rows][-1] == "SHIP" and "SHIP" not in [row.label for row in table.others]


def test_wrong_wishes(tmp_path):
    with pytest.raises(ValueError, match="tasks is empty"): build_table("example", ["linear"], [], tmp_path)
    with pytest.raises(KeyError, match="unknown task 'card'"): build_table("example", ["linear"], ["card"], tmp_path)
    put(tmp_path, example_metrics("linear", "cards", group="natural"))
    with pytest.raises(ValueError, match="metrics of cards say group 'natural', not 'fine_grained'"):
        build_table("example", ["linear"], ["cards"], tmp_path)


def test_outdated_metrics_stop_the_table(tmp_path):
    put(tmp_path, example_metrics("linear", "cards"))
    with pytest.raises(ValueError, match="config_hash"):
        build_table("example", ["linear"], ["cards"], tmp_path, config_hashes={"linear-cards": "1" * 16})


# entries and files

@pytest.mark.parametrize("accs, expected", [
    ([50.0, 60.0, 55.0], ["50.0 (50.5)", "**60.0** (60.5)", "<u>55.0</u> (55.5)"]),
    ([60.0, 60.0, 55.0], ["**60.0** (60.5)", "**60.0** (60.5)", "<u>55.0</u> (55.5)"]),
    ([60.0, 60.01, 55.0], ["**60.0** (60.5)", "**60.0** (60.5)", "<u>55.0</u> (55.5)"]),  # equal as shown
    ([60.0, None, None], ["60.0 (60.5)", "not run", "not run"])])
def test_best_and_second(tmp_path, accs, expected):
    for variant, acc in zip(("full", "linear", "bias"), accs):
        if acc is not None: put(tmp_path, example_metrics(variant, "cards", acc=[acc]))
    assert column_texts(build_table("example", ["full", "linear", "bias"], ["cards"], tmp_path), "cards", 1)[:3] == expected


def test_numbers_are_the_means_over_seeds(tmp_path):
    run_paper(tmp_path, "vpt_deep")
    page = numbers(build_table("paper", ["vpt_deep"], list(PAPER), tmp_path)).query("variant == 'vpt_deep' and measure == 'acc'").iloc[0]
    row = load_published("davpt_appendix_vtab_per_task").query("method == 'VPT-Deep'")
    expected = averages(row, {t: g for t, g in PAPER.items() if g != "fine_grained"}).iloc[0]
    assert [page[c] for c in expected.index] == pytest.approx(expected.tolist(), abs=1e-4)
    assert (page.seeds, page.with_head, page.macs) == (2, 3850.0, 380_000_000.0)


def test_parameters_are_averaged_over_the_tasks(tmp_path):
    for task, prompts in (("cards", 1000), ("flags", 3000)):
        counts = {"prompts": prompts, "other": 0, "head": 100_000, "without_head": prompts, "with_head": prompts + 100_000}
        put(tmp_path, example_metrics("vpt_deep", task, parameters=counts))
    part = means_part(build_table("example", ["vpt_deep"], ["cards", "flags"], tmp_path)).set_index("Method").loc["VPT-Deep"]
    assert (part["Parameters, M"], part["with head, M"], part["MACs, G"]) == ("0.002", "0.102", "0.380")


def test_the_same_metrics_give_the_same_bytes(tmp_path):
    run_paper(tmp_path, "vpt_deep")
    def write(name):
        table = build_table("paper", ["vpt_deep"], list(PAPER), tmp_path)
        return [p.read_bytes() for p in write_tables(table, tmp_path / name) + write_figures(table, tmp_path / name)]
    assert write("first") == write("second")


def test_pages_and_pictures_have_the_names_of_the_pipeline(tmp_path):
    table = build_table("example", ["linear"], ["cards"], tmp_path)
    written = write_tables(table, tmp_path / "tables/baselines", "baselines") + write_figures(table, tmp_path / "figures/baselines")
    assert [str(p.relative_to(tmp_path)) for p in written] == ["tables/baselines/baselines.md", "tables/baselines/baselines.csv",
        "figures/baselines/parameters.png", "figures/baselines/tasks.png", "figures/baselines/optimism.png"]


def test_times_do_not_enter_the_tables(tmp_path):
    put(tmp_path, example_metrics("linear", "cards"))
    first = [p.read_bytes() for p in write_tables(build_table("example", ["linear"], ["cards"], tmp_path), tmp_path / "t")]
    put(tmp_path, replace(example_metrics("linear", "cards"), seconds=99.0, images_per_second=3.0, peak_memory_mb=7.0, versions={}))
    assert first == [p.read_bytes() for p in write_tables(build_table("example", ["linear"], ["cards"], tmp_path), tmp_path / "t")]


def test_an_interrupted_rebuild_leaves_the_old_table(tmp_path, monkeypatch):
    put(tmp_path, example_metrics("linear", "cards"))
    old = [p.read_bytes() for p in write_tables(build_table("example", ["linear"], ["cards"], tmp_path), tmp_path / "t")]
    put(tmp_path, example_metrics("linear", "cards", acc=[80.0, 81.0]))
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda self, path, **_: (path.write_text("half"), (_ for _ in ()).throw(KeyboardInterrupt)))
    with pytest.raises(KeyboardInterrupt): write_tables(build_table("example", ["linear"], ["cards"], tmp_path), tmp_path / "t")
    assert (tmp_path / "t/baselines.csv").read_bytes() == old[1]
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["baselines.csv", "baselines.md"]


def test_every_table_row_has_all_columns(tmp_path):
    run_paper(tmp_path, "vpt_deep", without=["kitti"])
    lines = [line for line in markdown(build_table("paper", ["vpt_deep"], list(PAPER), tmp_path)).splitlines() if line.startswith("|")]
    assert len(lines) > 40 and {line.count("|") for line in lines} == {len(PAPER) + 3, 12, 13}
    assert "nan" not in "".join(lines).lower().replace("nabirds", "")
