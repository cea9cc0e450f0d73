"Ablations and SHIP's report: published files, what may be subtracted, what is missing, pictures of nothing."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from hierprompt.methods.ship.affinity import partition
from hierprompt.methods.ship.ship import SHIPConfig
from hierprompt.papers.ship import (
    TABLE_2,
    TABLE_3,
    TABLE_4,
    attribute_table,
    effective_parameters,
    logged_parameters,
    parameter_remarks,
    partitions,
    plot_affinity,
    plot_attributes,
    plot_neighbours,
    plot_prompt_share,
    released_protocol,
    run_logged,
    ship_runs,
    table_2,
    table_3,
    table_4,
    whole_method,
)
from hierprompt.results.ablations import (
    Step,
    Study,
    ablation_numbers,
    ablation_page,
    ablation_part,
    build_ablation,
    count_hierarchies,
    plot_factors,
    write_ablation,
)
from hierprompt.results.figures import gain_by_looks, loss_curves, plot_gain, plot_losses, save_figure
from hierprompt.results.metrics import averages, collect, example_metrics
from hierprompt.results.published import load_published, published_index
from hierprompt.results.published_rows import FROZEN_VIT_B
from hierprompt.results.tables import NOT_RUN

ORIG = {"name": "vit_base_patch16_224.orig_in21k", "sha256": "0" * 64}
WINNERS, PARTITIONS = load_published("ship_winners"), load_published("ship_partitions")
BY_TASK = WINNERS.set_index("task")
NATURAL = load_published("ship_table3").attrs["groups"]["natural"]


def put(root, variant, task="cifar100", group="natural", acc=70.0, gap=1.0, profile="paper", backbone=ORIG, **changes):
    "A made-up cell of an ablation."
    cell = replace(example_metrics(variant, task, group, acc=[acc], gap=gap, **changes), profile=profile, backbone=backbone)
    cell.write(root / profile / "runs" / cell.cell / "metrics.json")


def blocked(study, tasks=None):
    return {"variants": list(dict.fromkeys(s.variant for s in study.steps)), "tasks": tasks or list(study.tasks)}


# published files

def test_the_released_runs_give_table_1():
    assert len(WINNERS) == 19 and WINNERS.task.is_unique
    assert WINNERS.group.value_counts().to_dict() == {"natural": 7, "specialized": 4, "structured": 8}
    means = averages(BY_TASK[["acc_max"]].T, dict(zip(WINNERS.task, WINNERS.group))).iloc[0]
    ship = load_published("ship_table1").set_index("method").loc["SHIP"]
    assert (
        means[["natural", "specialized", "structured", "mean_of_groups"]].round(1).tolist()
        == ship[["natural", "specialized", "structured", "average"]].tolist()
    )
    assert means.mean_of_groups == pytest.approx(76.914, abs=5e-4) and means.mean_of_tasks == pytest.approx(74.57, abs=5e-3)


@pytest.mark.parametrize("w", list(WINNERS.itertuples()), ids=list(WINNERS.task))
def test_parameter_formulas_and_whole_numbers_of_test_images(w):
    n = effective_parameters(w.M, w.P, w.classes)
    assert (n, logged_parameters(n, w.P, weight_decay=w.wd)) == (w.n_effective, w.n_log)
    right = w.acc_max * w.test_n / 100
    assert abs(right - round(right)) <= 0.0005 * w.test_n / 100 + 1e-9   # accuracies have three decimals
    starts = [int(s) for s in PARTITIONS.set_index("task").at[w.task, "starts"].split()]
    assert len(starts) == w.M and starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] <= 11
    assert PARTITIONS.set_index("task").at[w.task, "lambda"] == w[WINNERS.columns.get_loc("lambda") + 1]


def test_frozen_parameters_are_those_of_the_architecture():
    dim, mlp, patches = 768, 3072, 196
    block = 4 * dim * dim + 4 * dim + 2 * dim * mlp + dim + mlp + 4 * dim
    assert 12 * block + 3 * 16 * 16 * dim + dim + dim + (patches + 1) * dim + 2 * dim == FROZEN_VIT_B


def test_claims_of_the_text():
    two, three, four = (load_published(f"ship_table{i}").set_index("method") for i in (2, 3, 4))
    assert (two.cifar100["SHIP"] - two.cifar100["VPT-Deep"], two.sun397["SHIP"] - two.sun397["VPT-Deep"]) == pytest.approx((10.1, 11.2))
    assert two.cifar100["SIP"] - two.cifar100["VPT-Deep"] == pytest.approx(7.7) and three.natural["SIP"] - three.natural[
        "VPT-Deep"
    ] == pytest.approx(3.0)
    assert set(four[four.default].cifar100) == {two.cifar100["SHIP"]} == {round(BY_TASK.acc_max["cifar100"], 1)} == {76.6}
    assert len(four) == 16 and four.default.sum() == 4
    one = load_published("ship_table1").set_index("method")
    assert one.natural["VPT"] != three.natural["VPT-Deep"]   # quoted and reproduced (D20)


@pytest.mark.parametrize(
    "method, blocks",
    [("VPT-Deep", 12), ("Uniform I=2", 6), ("Uniform I=3", 4), ("Uniform I=4", 3), ("Sharing 0-3", 10), ("Sharing 9-12", 10)],
)
def test_starts_of_table_3(method, blocks):
    starts = [int(s) for s in load_published("ship_table3").set_index("method").at[method, "starts"].split()]
    assert len(starts) == blocks and SHIPConfig(starts=starts).starts == starts


def test_first_pair_below_the_threshold_starts_a_hierarchy():
    "Where block i is an anchor and its neighbour is less alike than lambda, the neighbour is the next anchor."
    for row in load_published("ship_fig1c").to_dict("records"):
        threshold, starts = BY_TASK.at[row["task"], "lambda"], [
            int(s) for s in PARTITIONS.set_index("task").at[row["task"], "starts"].split()
        ]
        for start in starts[:-1]:
            assert (start + 1 in starts) == (row[f"pair_{start + 1}"] < threshold)


def test_new_entries_of_the_index_have_what_others_have():
    index = published_index()
    for name in ("ship_table2", "ship_table3", "ship_table4", "ship_fig1c", "ship_partitions", "ship_winners"):
        assert set(index["ship_table1"]) <= set(index[name]), name


# studies

@pytest.mark.parametrize("study, variants", [(table_2, TABLE_2), (table_3, TABLE_3), (table_4, TABLE_4)])
def test_the_whole_method_has_the_name_of_the_profile(study, variants):
    assert [s.variant for s in study().steps] == list(variants)
    assert [s.variant for s in study("ship_winners").steps] == ["ship_winners" if v == "ship" else v for v in variants]
    assert (whole_method("paper"), whole_method("laptop")) == ("ship_winners", "ship")


def test_switches_of_table_2():
    rows = {s.variant: "".join(k for k, v in s.settings.items() if v) for s in table_2().steps}
    assert rows == {
        "vpt_reproduced": "",
        "sip": "SIP",
        "sip_da": "SIPDA",
        "sip_ssp_da": "SIPSSPDA",
        "sip_ssp_ap_da": "SIPSSPAPDA",
        "ship": "SIPSSPAPPMLDA",
        "sip_more": "SIP",
    }


# what may be subtracted

def test_difference_on_the_paper_s_task_and_backbone(tmp_path):
    put(tmp_path, "vpt_reproduced", acc=66.0, gap=1.0)
    put(tmp_path, "vpt_reproduced", "sun397", acc=46.0, gap=1.5)
    study = table_2("ship_winners")
    part = ablation_part(build_ablation(study, "paper", blocked(study), tmp_path))
    # acc_best_test: so is the printed one
    assert part.iloc[0][["cifar100, SHIP Table II", "sun397, SHIP Table II"]].tolist() == ["66.5 (+0.5)", "46.5 (+1.0)"]
    assert part["cifar100, SHIP Table II"].tolist()[1:3] == ["74.2", "75.1"] and part["sun397, SHIP Table II"].tolist()[-1] == "—"
    lines = ablation_numbers(build_ablation(study, "paper", blocked(study), tmp_path)).query("measure == 'ours - printed'")
    assert lines[["method", "cifar100", "sun397"]].values.tolist() == [["VPT-Deep", 0.5, 1.0]]


@pytest.mark.parametrize("profile, backbone, reason", [("reference", ORIG, "the profile is reference, not paper"),
    ("paper", {"name": "tiny_random", "sha256": "0" * 64},
     "VPT-Deep ran on tiny_random, SHIP Table II on vit_base_patch16_224.orig_in21k")])
def test_no_difference_elsewhere(tmp_path, profile, backbone, reason):
    put(tmp_path, "vpt_reproduced", profile=profile, backbone=backbone)
    ablation = build_ablation(table_2(), profile, blocked(table_2(), ["cifar100"]), tmp_path)
    assert ablation_part(ablation)["cifar100, SHIP Table II"].tolist()[0] == "66.5" and f"- No difference: {reason}." in ablation_page(
        ablation
    )
    assert "ours - printed" not in set(ablation_numbers(ablation).measure)


def test_a_group_is_compared_as_a_whole_only(tmp_path):
    study = table_3()
    for task in NATURAL:
        if task != "svhn": put(tmp_path, "sip", task, acc=80.0, gap=0.0)
    assert ablation_part(build_ablation(study, "paper", blocked(study), tmp_path)).iloc[-1]["Natural, SHIP Table III"] == "80.8"
    assert ablation_part(build_ablation(study, "paper", blocked(study), tmp_path)).iloc[-1]["Natural (7)"] == "6 of 7 tasks"
    put(tmp_path, "sip", "svhn", acc=80.0, gap=0.0)
    assert ablation_part(build_ablation(study, "paper", blocked(study), tmp_path)).iloc[-1]["Natural, SHIP Table III"] == "80.8 (-0.8)"


def test_embedded_tasks_are_never_subtracted(tmp_path):
    put(tmp_path, "sip", "emoji")
    ablation = build_ablation(table_3(), "paper", blocked(table_3(), ["emoji"]), tmp_path)
    assert ablation_part(ablation)["Natural, SHIP Table III"].tolist()[-1] == "80.8" and "none of them from the papers" in ablation_page(
        ablation
    )


# what is missing

@pytest.mark.parametrize(
    "study, column, printed", [(table_2, "cifar100", "66.5"), (table_3, "svhn", "77.8"), (table_4, "cifar100", "75.8")]
)
@pytest.mark.parametrize("given", [True, False])
def test_nothing_was_run(tmp_path, study, column, printed, given):
    ablation = build_ablation(study(), "laptop", blocked(study()) if given else None, tmp_path)
    part = ablation_part(ablation)
    assert set(part[column]) == set(part.Seeds) == set(part["MACs, G"]) == set(part.Hierarchies) == {NOT_RUN}
    assert printed in part[[c for c in part if "SHIP Table" in c][0]].tolist() and "nan" not in ablation_page(ablation)
    assert len(write_ablation(ablation, tmp_path / "t", "table")) == 2 and plot_factors(ablation) if study is table_4 else True


def test_a_block_that_the_profile_lacks_shows_no_leftovers(tmp_path):
    put(tmp_path, "sip", profile="laptop")
    assert set(ablation_part(build_ablation(table_2(), "laptop", None, tmp_path))["cifar100"]) == {NOT_RUN}


def test_failed_and_unknown_cells_are_named(tmp_path):
    put(tmp_path, "sip", "emoji", profile="laptop", acc=61.0)
    put(tmp_path, "my_own", "emoji", profile="laptop", acc=62.0)
    path = tmp_path / "laptop/runs/sip_da-emoji/metrics.json"
    path.parent.mkdir()
    path.write_text('{"status": "failed", "error": "loss is NaN"}')
    ablation = build_ablation(table_2(), "laptop", {"variants": ["sip", "sip_da", "my_own"], "tasks": ["emoji"]}, tmp_path)
    part = ablation_part(ablation).set_index("Row")
    assert part.emoji[["SIP", "SIP + DA", "SHIP", "my_own"]].tolist() == ["<u>61.0</u> (62.0)", NOT_RUN, NOT_RUN, "**62.0** (63.0)"]
    assert "Failed, shown as not run: sip_da-emoji." in ablation_page(ablation)
    assert ship_runs(tmp_path, "laptop") == {} and list(collect(tmp_path, "laptop").variant) == ["my_own", "sip"]


def test_outdated_cells_stop_the_table(tmp_path):
    put(tmp_path, "sip", "emoji", profile="laptop")
    with pytest.raises(ValueError, match="config_hash"):
        build_ablation(table_2(), "laptop", blocked(table_2(), ["emoji"]), tmp_path, {"sip-emoji": "1" * 16})


def test_hierarchies_are_counted(tmp_path):
    put(tmp_path, "sip", "emoji", profile="laptop", config={"starts": [0, 3]})
    put(tmp_path, "sip", "koeppen", "specialized", profile="laptop", config={"starts": [0, 2, 4, 6]})
    put(tmp_path, "linear", "emoji", profile="laptop")
    assert count_hierarchies(tmp_path, "laptop") == {"sip-emoji": 2, "sip-koeppen": 4}
    ablation = build_ablation(
        Study("T", [Step("a", "sip"), Step("b", "linear"), Step("c", "ship")], ["emoji"], "x", "last epoch"),
        "laptop",
        {"variants": ["sip", "linear"], "tasks": ["emoji", "koeppen"]},
        tmp_path,
    )
    part = ablation_part(ablation)
    assert part.Hierarchies.tolist() == ["2–4", "—", NOT_RUN] and part["Mean of tasks (2)"].tolist() == [
        "70.0 (71.0)",
        "1 of 2 tasks",
        NOT_RUN,
    ]
    assert list(ablation_numbers(ablation).method) == ["a"] * 4 + ["b"] * 4 + ["c"] * 4   # nothing is printed


def test_the_same_metrics_give_the_same_bytes(tmp_path):
    for variant in ("ship", "ship_k20", "ship_ld05"): put(tmp_path, variant, "emoji", profile="laptop")
    def write(name):
        ablation = build_ablation(table_4(), "laptop", blocked(table_4(), ["emoji"]), tmp_path)
        return [
            p.read_bytes()
            for p in [
                *write_ablation(ablation, tmp_path / name, "table_4"),
                save_figure(plot_factors(ablation), tmp_path / name / "table_4.png"),
            ]
        ]
    assert write("first") == write("second")


# parameters and diagnostics of runs

def shipped(variant="ship", task="emoji", diagnostics=None, prompts=384 * (6 * 10 + 10 + 20), **config):
    "The part of a metrics file that the report reads."
    config = {
        "starts": [0, 2, 4, 6, 8, 11],
        "num_tokens": 10,
        "num_shared": 10,
        "num_attributes": 10,
        "num_ap_hierarchies": 2,
        "num_prototypes": 200,
        "decoupled": True,
        "lambda_d": 0.1,
    } | config
    return dict(status="success", variant=variant, task=task, method="ship", config=config, diagnostics=diagnostics or {},
                parameters={"without_head": prompts, "with_head": prompts + 3080})


def test_what_the_released_code_would_log_of_our_runs():
    assert run_logged(shipped()) == 384 * (6 * 10 + 10 + 20) + 3080 + 384 * 10
    assert run_logged(shipped(starts=[0], prompts=384 * 20)) == 384 * 30 + 3080         # no AP in front of block 0
    assert run_logged(shipped(num_ap_hierarchies=0, num_shared=0, prompts=384 * 60)) == 384 * 70 + 3080
    assert run_logged(shipped(num_tokens=0, num_shared=0, num_ap_hierarchies=0, prompts=0)) == 3080
    with pytest.raises(ValueError, match="no multiple of 90 prompt tokens: repeat ship-emoji"): run_logged(shipped(prompts=1001))
    assert parameter_remarks({"a": shipped()}, ["ship_winners"]) == [] and "0.038 M" in parameter_remarks({"a": shipped()}, ["ship"])[0]


def test_attributes_and_shares_of_runs_that_measured_them():
    found = dict(attribute_weight_max=0.01, attribute_prototypes_used=196.0, attribute_cosine=0.99, joint_prompt_share=[0.2] * 12)
    runs = {
        "ship-emoji": shipped(diagnostics=found),
        "sip-emoji": shipped("sip", diagnostics={"joint_prompt_share": [0.3] * 12}, decoupled=False),
        "old-emoji": shipped("old"),
    }
    table = attribute_table(runs)
    assert table.variant.tolist() == ["ship"] and table.iloc[0][["largest · K", "in effect / K"]].tolist() == pytest.approx([2, 0.98])
    axes = plot_prompt_share(runs, {"VPT-Deep": "vpt_reproduced", "SIP": "sip", "SHIP": "ship"}, ["emoji"]).axes[0]
    assert [line.get_label() for line in axes.lines if not line.get_label().startswith("_")] == ["VPT-Deep: not run", "SIP", "SHIP"]
    assert [line.get_ydata()[0] for line in axes.lines if line.get_label().startswith("_")] == [0.1]   # lambda_d of the one that decouples


def test_released_protocol_takes_the_best_look_at_the_best_setting():
    rows = [
        ("emoji", "ship", 60.0, 61.0),
        ("emoji", "ship", 62.0, 63.0),
        ("emoji", "ship_k20", 60.0, 66.0),
        ("emoji", "full", 90.0, 99.0),
        ("flags", "ship_k20", 1.0, 2.0),
    ]
    gains = released_protocol(pd.DataFrame(rows, columns=["task", "variant", "acc", "acc_best_test"]), "ship", TABLE_4)
    assert gains.values.tolist() == [["emoji", 2, 61.0, 62.0, 66.0, 5.0, "ship_k20"]]
    assert released_protocol(collect("nowhere", "laptop"), "ship", TABLE_4).empty


def test_gain_by_looks(tmp_path):
    put(tmp_path, "ship", "emoji", gap=1.0, profile="laptop", num_test_evaluations=11)
    put(tmp_path, "sip", "emoji", gap=3.0, profile="laptop", num_test_evaluations=11)
    put(tmp_path, "linear", "emoji", gap=0.0, profile="laptop", num_test_evaluations=1)
    frame = collect(tmp_path, "laptop")
    assert gain_by_looks(frame)["mean"].to_dict() == {1: 0.0, 11: 2.0} and plot_gain(frame)


# curves

def curves(root, variant, rows):
    path = root / "laptop/runs" / f"{variant}-emoji/history.csv"
    path.parent.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(path, index=False)


def test_curves_are_cross_entropy_and_means_over_seeds(tmp_path):
    curves(
        tmp_path,
        "ship",
        [
            {"epoch": e, "loss": 2.0 - e + s, "aux_loss": 0.5, "test_loss": 1.0 + s if e else None, "seed": s}
            for s in (0, 1)
            for e in (0, 1)
        ],
    )
    got = loss_curves(tmp_path, "laptop", "ship", "emoji")
    assert got.train.tolist() == [2.0, 1.0] and np.isnan(got.test[0]) and got.test[1] == 1.5
    axes = plot_losses(tmp_path, "laptop", {"VPT-Deep": "vpt_reproduced", "SHIP": "ship"}, ["emoji"]).axes[0]
    assert [line.get_label() for line in axes.lines] == ["VPT-Deep: not run", "SHIP, train", "SHIP, test"]


def test_old_histories_are_refused(tmp_path):
    curves(tmp_path, "ship", [{"epoch": 0, "loss": 1.0, "seed": 0}])
    with pytest.raises(ValueError, match="lacks the columns aux_loss, test_loss: repeat the run of ship-emoji"):
        loss_curves(tmp_path, "laptop", "ship", "emoji")


# pictures

def test_pictures_of_nothing(tmp_path):
    frame = collect(tmp_path, "laptop")
    figures = [
        plot_gain(frame),
        plot_attributes({}),
        plot_prompt_share({}, {"SHIP": "ship"}, ["emoji"]),
        plot_losses(tmp_path, "laptop", {"SHIP": "ship"}, ["emoji"]),
        plot_factors(build_ablation(table_4(), "laptop", None, tmp_path)),
    ]
    for i, figure in enumerate(figures): assert save_figure(figure, tmp_path / f"{i}.png").stat().st_size > 500
    assert attribute_table({}).empty and gain_by_looks(frame).empty


def test_factors_show_what_was_run(tmp_path):
    for variant, acc in {"ship": 60.0, "ship_k20": 58.0, "ship_ma1": 59.0}.items():
        put(tmp_path, variant, "emoji", profile="laptop", acc=acc)
    figure = plot_factors(build_ablation(table_4(), "laptop", blocked(table_4(), ["emoji"]), tmp_path))
    K, M_a, N_m, lambda_d, *below = figure.axes
    # best looks, then acc
    assert [line.get_ydata().tolist() for line in K.lines if line.get_label() == "ours"] == [[59.0, 61.0], [58.0, 60.0]]
    assert [t.get_text() for t in K.get_xticklabels()] == ["20", "50", "100", "200"]
    assert [line.get_ydata().tolist() for line in below[3].lines if line.get_label() == "SHIP Table IV"] == [[71.1, 76.6, 72.8, 40.5]]


def test_affinities_and_partitions():
    each = torch.nn.functional.normalize(
        torch.randn(5, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(1), dim=-1
    )
    each = each @ each.mT
    assert plot_affinity({"a": each.mean(0), "b": each.mean(0)}) and plot_neighbours({"a": each}, "a backbone")
    found, S = partitions({"a": each.mean(0)}), each.mean(0)
    mine = {t: " ".join(map(str, partition(S, t))) for t in (0.9, 0.93, 0.95, 0.97, 0.98)}
    # 0.96 is in released runs only
    assert found.iloc[0].tolist() == ["a", "this run", mine[0.9], mine[0.93], mine[0.95], "", mine[0.97], mine[0.98]]
    assert len(set(mine.values())) > 2
    assert (found.source == "released").sum() == 19
