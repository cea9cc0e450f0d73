("Adapt's report: rows, printed numbers, differences only where they mean something, what is "
 "not run, masks and lengths rebuilt from histories.")
from dataclasses import replace

import numpy as np
import pytest
import torch

from hierprompt.clip.model import load_clip
from hierprompt.clip.prompted import tune_clip
from hierprompt.papers.adapt import (
    ABLATIONS,
    PAPER_CLIP,
    PRINTED_CLAIMS,
    UNPRUNED,
    VARIANTS,
    ablations,
    claims,
    cost_part,
    datasets,
    find_runs,
    findings,
    gap,
    label_of,
    printed_accuracies,
    split_part,
    survivors,
    table_1,
    table_2,
    table_3,
    table_4,
    why_not,
)
from hierprompt.papers.adapt_figures import (
    BRANCHES,
    FIGURE_1,
    layer_counts,
    lengths,
    masks_at,
    moments,
    plot_averages,
    plot_lengths,
    plot_masks,
    pruned_runs,
    updates_per_epoch,
)
from hierprompt.results.figures import save_figure
from hierprompt.results.metrics import example_metrics
from hierprompt.results.published import load_published
from hierprompt.results.tables import NOT_RUN

PAGES = {"table_1": table_1, "table_2": table_2, "table_3": table_3, "table_4": table_4, "ablations": ablations}
TASKS = ["clip_cards", "clip_flags"]
COOP = [f"coop_{name}" for name in datasets()]


def put(root, variant, task="clip_cards", acc=60.0, profile="laptop", backbone="embedded_clip", seeds=(1, 2, 3), count=1000, **changes):
    "A made-up cell; its best look is one point above its last."
    counts = {"prompts": count, "other": 0, "head": 0, "with_head": count, "without_head": count}
    cell = replace(
        example_metrics(variant, task, "few_shot", acc=[acc] * len(seeds), gap=1.0, parameters=counts, seeds=list(seeds), **changes),
        profile=profile,
        backbone={"name": backbone, "sha256": "0" * 64},
    )
    cell.write(root / profile / "runs" / cell.cell / "metrics.json")


def block(*variants, tasks=TASKS): return {"variants": list(variants), "tasks": list(tasks)}


def rows(n): return {m: VARIANTS[m] for m in load_published(f"adapt_table{n}").method}


def pruned(target=5, seed=0, layers=3, positions=4, window=10, warmup=20, at_once=4):
    "What a run of Adapt tells that removes tokens at random."
    random = np.random.default_rng(seed)
    tokens = [(b, int(l), int(p)) for b in BRANCHES for l in range(layers) for p in range(positions)]
    gone = [tokens[i] for i in random.permutation(len(tokens))[:len(tokens) - target]]
    left = {b: np.ones((layers, positions), int) for b in BRANCHES}
    found = {"removed": [], "history": [{"update": 0} | {b: left[b].sum(1).tolist() for b in BRANCHES}]}
    for i in range(0, len(gone), at_once):
        update = warmup + window * (i // at_once + 1)
        for b, l, p in gone[i:i + at_once]:
            left[b][l, p] = 0
            found["removed"].append([update, b, l, p])
        found["history"].append({"update": update} | {b: left[b].sum(1).tolist() for b in BRANCHES})
    masks = {b: ["".join(map(str, row)) for row in left[b]] for b in BRANCHES}
    return found | {
        "masks": masks,
        "schedule": {"window": window, "events": len(found["history"]) - 1, "target": target, "warmup_updates": warmup},
    }


# rows and printed numbers

def test_every_printed_row_has_its_variant():
    assert {m for n in (1, 2, 3) for m in load_published(f"adapt_table{n}").method} == set(VARIANTS)
    assert [label_of(v) for v in ("clip_vpt", "adapt_t128", UNPRUNED, "adapt_fair", "mine")] == [
        "VPT",
        "Adapt (T128)",
        "Adapt, never pruned",
        ABLATIONS["adapt_fair"],
        "mine",
    ]
    assert set(FIGURE_1) < set(VARIANTS)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_printed_part_is_the_file(tmp_path, n):
    page, file = PAGES[f"table_{n}"]("laptop", None, tmp_path), load_published(f"adapt_table{n}")
    part, cost = page.parts["Published"], page.parts["Cost"]
    for c in (*datasets(), "average"): assert part[c].tolist() == [f"{x:.2f}" for x in file[c]]
    assert cost["printed GFLOPs"].tolist() == ["—" if g != g else f"{g:.2f}" for g in file.gflops]
    assert [r.split(" (E")[0] for r in part.Row] == file.method.tolist()
    printed = page.lines[page.lines.measure == "printed"]
    assert printed[COOP].values.tolist() == file[list(datasets())].values.tolist()


@pytest.mark.parametrize("name", PAGES)
def test_nothing_was_run(tmp_path, name):
    page = PAGES[name]("laptop", None, tmp_path)
    assert set(page.parts["Ours"].iloc[:, 1:].values.ravel()) == {NOT_RUN}
    text = page._repr_markdown_()
    assert "nan" not in text and "ours - printed" not in set(page.lines.measure)


def test_findings_stand_where_the_numbers_do(tmp_path):
    first, second, third = (page("laptop", None, tmp_path) for page in (table_1, table_2, table_3))
    assert (
        first.parts["Published"].Row.iloc[[0, -1]].tolist() == ["ZS CLIP (E1)", "Adapt (adaptive T) (E8)"]
        and second.parts["Published"].Row[0] == "Adapt (T512) (E2)"
    )
    for page in (first, second, third): assert any("E5" in c for c in page.parts["Cost"].columns)
    for page, numbers in ((first, "1456 78"), (second, "2356"), (third, "56")):
        said = [r[:2] for r in page.remarks if r[:1] == "E"]
        assert said == [f"E{n}" for n in numbers if n != " "]
        assert len(page.remarks) == len(set(page.remarks)) and any("cannot be rebuilt" in r for r in page.remarks)
    text = findings()
    assert (
        "58.20" in text["E1"]
        and "379 image tokens" in text["E2"]
        and "87.03 against 84.93" in text["E8"]
        and "92.47 against 91.07" in text["E8"]
        and "2.860 %" in text["E5"]
    )


# ours

def test_averages_are_over_the_blocks_tasks(tmp_path):
    put(tmp_path, "clip_vpt", "clip_cards", 60), put(tmp_path, "clip_vpt", "clip_flags", 50), put(tmp_path, "maple", "clip_cards", 70)
    part = table_1("laptop", block("clip_vpt", "maple"), tmp_path).parts["Ours"].set_index("Row")
    assert part["Average (2)"][["VPT", "MaPLe", "LAMM"]].tolist() == ["55.00 ± 0.00 (56.00)", "1 of 2 tasks", NOT_RUN]
    assert part.loc["MaPLe", ["Seeds", "clip_cards", "clip_flags"]].tolist() == [3, "**70.00** ± 0.00 (71.00)", NOT_RUN]


def test_embedded_runs_are_labelled_and_never_subtracted(tmp_path):
    put(tmp_path, "clip_vpt")
    page = table_1("laptop", block("clip_vpt"), tmp_path)
    assert (
        "Model: embedded_clip. This is not OpenAI's CLIP" in page.about
        and "no number of ours compares" in page.about
        and "Seeds: 1, 2, 3." in page.about
    )
    assert "No difference: the profile is laptop, not one of the paper." in page.remarks and "ours - printed" not in set(page.lines.measure)


def test_differences_on_the_papers_data_and_network(tmp_path):
    for task in COOP:
        put(tmp_path, "clip_vpt", task, 80, "paper_adapt", PAPER_CLIP), put(tmp_path, "zsclip", task, 65, "paper_adapt", PAPER_CLIP)
    page = table_1("paper_adapt", block("clip_vpt", "zsclip", tasks=COOP), tmp_path)
    part = page.parts["Published"].set_index("Row")
    assert part.loc["VPT", ["dtd", "average"]].tolist() == ["67.30 (+12.70)", "76.46 (+3.54)"]
    assert part.loc["ZS CLIP (E1)", "average"] == "58.86"
    assert f"No difference: ZS CLIP ran on {PAPER_CLIP}, the printed row is of RN50." in page.remarks
    assert "not OpenAI's" not in page.about and "none of the paper's" not in page.about
    gaps = page.lines[page.lines.measure == "ours - printed"]
    assert gaps.method.tolist() == ["VPT"] and gaps.average.tolist() == [3.54]


def test_an_average_needs_all_data_sets(tmp_path):
    put(tmp_path, "clip_vpt", "coop_dtd", 80, "paper_adapt", PAPER_CLIP)
    runs = find_runs("t", rows(1), "paper_adapt", block("clip_vpt", tasks=["coop_dtd"]), tmp_path)
    vpt = load_published("adapt_table1").iloc[2]
    assert (
        why_not(runs, vpt) == "" and gap(runs, vpt, "dtd") == pytest.approx(12.7) and gap(runs, vpt, "average") != gap(runs, vpt, "average")
    )


def test_only_cells_of_the_profile_count(tmp_path):
    put(tmp_path, "clip_vpt"), put(tmp_path, "maple"), put(tmp_path, "plot", "coop_dtd")
    runs = find_runs("t", rows(1), "laptop", block("clip_vpt"), tmp_path, {"clip_vpt-clip_cards": "0" * 16})
    assert set(runs.table.frame.variant) == {"clip_vpt"} and set(runs.diagnostics) == {"clip_vpt-clip_cards"}
    with pytest.raises(ValueError, match="config_hash"):
        find_runs("t", rows(1), "laptop", block("clip_vpt"), tmp_path, {"clip_vpt-clip_cards": "1" * 16})


def test_failed_runs_are_named(tmp_path):
    folder = tmp_path / "laptop/runs/plot-clip_cards"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text('{"status": "failed", "error": "no"}')
    page = table_1("laptop", block("plot"), tmp_path)
    assert "Failed, shown as not run: plot-clip_cards." in page.remarks


def test_costs(tmp_path):
    for task, texts in zip(TASKS, (2e9, 4e9)):
        put(tmp_path, "clip_vpt", task, count=1536, macs=1_200_000_000, diagnostics={"text_macs": int(texts)})
    put(tmp_path, "plot")
    part = cost_part(find_runs("t", rows(1), "laptop", block("clip_vpt", "plot"), tmp_path), "adapt_table1").set_index("Row")
    assert part.loc["VPT"].tolist() == ["1,536", "1.200", "3.000", "73,728 (0.059%)", "12 · 8 · 768 = 73,728", "12.48", "11.739", "0.739"]
    assert part.loc["PLOT", "text MACs of all classes, G"] == "—" and part.loc["MaPLe", "Parameters"] == NOT_RUN
    assert (
        part.loc["Adapt (T128)", "exact, paper's sizes"] == "768 · 65.2 + 512 · 62.8"
        and part.loc["Adapt (T128)", "true MACs added, paper's sizes, G"] == "0.135"
    )


def test_splits_beside_those_of_the_paper(tmp_path):
    put(tmp_path, "adapt_t32", diagnostics=pruned(8))
    part = split_part(find_runs("t", rows(2), "laptop", block("adapt_t32"), tmp_path)).set_index("Row")
    left = survivors(pruned(8))
    assert sum(left.values()) == 8 and part.loc["Adapt (T32)"].tolist() == [
        f"{left['image']:.1f}",
        f"{left['text']:.1f}",
        f"{left['image'] / 8:.2f}",
        "9.4",
        "22.6",
        "0.29",
    ]
    assert part.loc["Adapt (T512) (E2)"].tolist() == [NOT_RUN] * 3 + ["379.0", "133.0", "0.74"]
    third = split_part(find_runs("t", rows(3), "laptop", None, tmp_path)).set_index("Row")
    assert third.iloc[:, -1].tolist() == ["0.51", "0.56", "0.53"]


def test_claims_follow_from_the_printed_tables_and_are_asked_of_ours(tmp_path):
    accuracies = {
        "zsclip": 40,
        "cocoop": 41,
        "clip_vpt": 42,
        "plot": 43,
        "maple": 44,
        "prograd": 45,
        "kgcoop": 46,
        "lamm": 50,
        "adapt_t128": 52,
        "adapt_t64": 50.7,
    }
    for variant, acc in accuracies.items():
        for task in TASKS: put(tmp_path, variant, task, acc, count=128 if variant == "adapt_t128" else 64)
    part = claims(find_runs("t", rows(1), "laptop", block(*accuracies), tmp_path)).set_index("claim")
    assert (
        list(part.index) == list(PRINTED_CLAIMS)
        and (part["the text"].astype(float) - part["from the printed tables"].astype(float)).abs().max() < 0.006
    )
    assert part.ours[
        ["average, T128 minus best baseline", "parameters, T128 to T64, % fewer", "average, T128 to T64, relative drop in %"]
    ].tolist() == ["2.00", "50.00", "2.50"]
    assert set(
        part.ours[["eurosat, T128 minus best baseline", "average, adaptive minus T128", "average, T128 to T32, relative drop in %"]]
    ) == {NOT_RUN}


def test_one_missing_baseline_leaves_the_best_unknown(tmp_path):
    for variant in ("zsclip", "lamm", "adapt_t128"): put(tmp_path, variant), put(tmp_path, variant, "clip_flags")
    assert claims(find_runs("t", rows(1), "laptop", block("zsclip", "lamm", "adapt_t128"), tmp_path)).ours[0] == NOT_RUN


def test_printed_accuracies_have_every_row_once():
    acc, parameters = printed_accuracies()
    assert len(acc) == 15 and acc.index.is_unique and parameters["adapt_t16"] == 8986


def test_table_4_says_what_pruning_costs(tmp_path):
    for task in TASKS: put(tmp_path, UNPRUNED, task, 61, count=300), put(tmp_path, "adapt_t128", task, 60, count=99)
    put(tmp_path, "adapt_t32", count=30)
    page = table_4("laptop", block(UNPRUNED, "adapt_t128", "adapt_t32"), tmp_path)
    assert "1 − 82,227 / 245,760 = 66.5 %" in page.remarks[0]
    assert page.remarks[1:3] == ["Adapt (T128) against never pruned, ours: 67.0 % fewer parameters, average -1.00 points.",
                                 "Adapt (T32) against never pruned, ours: 90.0 % fewer parameters, average not run on all tasks."]
    gains = page.parts["Gain over never pruned, points"].set_index("Row")
    assert gains.average.tolist() == ["+0.00", "-1.00", NOT_RUN] and "measure" in page.lines


def test_other_readings_are_compared_with_the_default(tmp_path):
    for variant, acc in {"adapt_t32": 60, "adapt_zero": 58.5}.items(): put(tmp_path, variant, acc=acc)
    gains = (
        ablations("laptop", block("adapt_t32", "adapt_zero", tasks=["clip_cards"]), tmp_path)
        .parts["Gain over Adapt (T32), points"]
        .set_index("Row")
    )
    assert gains.clip_cards.to_dict() == dict(zip(ABLATIONS.values(), ["+0.00", "-1.50", NOT_RUN, NOT_RUN]))


def test_the_adaptive_rows_targets_are_told(tmp_path):
    for task, targets in zip(TASKS, ([8, 4, 8], [16, 16, 32])):
        put(tmp_path, "adapt_adaptive", task, diagnostics=pruned(8) | {"chosen": [{"target": n} for n in targets]})
    page = table_1("laptop", block("adapt_adaptive"), tmp_path)
    assert any(
        r.startswith("Targets of the adaptive row, ours, one per seed: clip_cards 8, 4, 8; clip_flags 16, 16, 32.") for r in page.remarks
    )


# figures

@pytest.mark.parametrize("seed", range(3))
def test_masks_follow_the_history(seed):
    story = pruned(seed=seed)
    for line in story["history"]:
        for after in (0, 9):   # until the next event nothing changes
            masks = masks_at(story, line["update"] + after)
            assert {b: masks[b].sum(1).tolist() for b in BRANCHES} == {b: line[b] for b in BRANCHES}


def test_masks_of_a_real_run():
    clip, names = load_clip("tiny_clip"), ["red cat", "blue dog", "tree"]
    model = tune_clip(clip, "adapt", names, target=5, num_tokens=2, period=2, warmup_epochs=1)
    images, labels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    optimizer = torch.optim.SGD(model.param_groups(0.1, 0.0), lr=0.1)
    model.begin(4, 3)
    for step in range(12):
        optimizer.zero_grad()
        model.loss(images, labels).backward()
        model.before_step(step)
        optimizer.step()
        model.after_step(step, optimizer)
    told = model.diagnostics(images)
    assert sum(survivors(told).values()) == 5 and updates_per_epoch({"diagnostics": told, "config": {"warmup_epochs": 1}}) == 3
    for line in told["history"]:
        assert {b: m.sum(1).tolist() for b, m in masks_at(told, line["update"]).items()} == {b: line[b] for b in BRANCHES}


def test_a_history_that_does_not_end_at_the_masks_is_refused():
    story = pruned()
    for wrong in (
        story["removed"][1:],
        story["removed"]
        + [[500, *next([b, l, p] for b in BRANCHES for l, row in enumerate(story["masks"][b]) for p, x in enumerate(row) if x == "1")]],
    ):
        with pytest.raises(ValueError, match="tokens listed under `removed` are not those missing from `masks`"):
            masks_at(story | {"removed": wrong}, 0)


def test_moments_run_from_the_start_to_the_last_event():
    story = pruned()
    events = [h["update"] for h in story["history"]][1:]
    assert moments(story, 5)[0] == 0 and moments(story, 5)[-1] == events[-1] and set(moments(story, 5)[1:]) <= set(events)
    assert moments(story, 100) == [0, *events] and moments(story | {"removed": []}, 5) == [0]


def test_epochs_come_from_the_warm_up():
    raw = {"diagnostics": pruned(warmup=20), "config": {"warmup_epochs": 5}}
    assert updates_per_epoch(raw) == 4 and lengths(raw).x.tolist()[:2] == [0, 30 / 4]
    assert updates_per_epoch(raw | {"config": {"warmup_epochs": 0}}) is None and lengths(raw | {"config": {}}).x.tolist()[1] == 30


def test_pictures_show_what_was_run(tmp_path):
    put(tmp_path, "adapt_t64", diagnostics=pruned(8), config={"warmup_epochs": 5}, recipe={"epochs": 20}), put(
        tmp_path, "adapt_t64", "clip_flags", diagnostics=pruned(8, 1), config={"warmup_epochs": 5}, recipe={"epochs": 20}
    ), put(tmp_path, "zsclip")
    cells = ["adapt_t64-clip_flags", "adapt_t64-clip_cards", "zsclip-clip_cards", "adapt_t64-emoji"]
    runs = pruned_runs(tmp_path, "laptop", cells)
    assert list(runs) == cells[:2]
    grid = plot_masks(runs, 4).axes
    assert len(grid) == 16 and np.array_equal(grid[3].images[0].get_array(), masks_at(runs[cells[0]]["diagnostics"], 1e9)["image"])
    assert grid[0].get_title() == "start: 24" and grid[3].get_title().endswith(": 8") and grid[8].get_ylabel() == "clip_cards\nimage"
    first = plot_lengths(runs).axes[0]
    total = [line for line in first.lines if line.get_label() == "total"][0]
    assert total.get_ydata()[0] == 24 and total.get_ydata()[-1] == 8 and total.get_xdata()[-1] == 20   # the last epoch
    assert layer_counts(runs).groupby("run").total.sum().tolist() == [8, 8]


def test_pictures_of_nothing():
    for figure in (plot_masks({}), plot_lengths({})): assert [t.get_text() for t in figure.axes[0].texts] == [NOT_RUN]
    assert list(layer_counts({})) == ["run", "branch", "total"]


def test_bars(tmp_path):
    for variant, acc in {"clip_vpt": 55, "adapt_t32": 58}.items():
        for task in TASKS: put(tmp_path, variant, task, acc)
    left, right = plot_averages(find_runs("t", rows(1), "laptop", block("clip_vpt", "adapt_t32"), tmp_path)).axes
    assert [bar.get_width() for bar in left.patches] == load_published("adapt_table1").set_index("method").average[list(FIGURE_1)].tolist()
    assert [bar.get_width() for bar in right.patches] == [55, 58] and [t.get_text() for t in right.texts].count(NOT_RUN) == 7


def test_the_same_metrics_give_the_same_bytes(tmp_path):
    for task in TASKS: put(tmp_path, "adapt_t32", task, diagnostics=pruned(8))
    def write(name):
        page, runs = table_2("laptop", block("adapt_t32"), tmp_path), pruned_runs(tmp_path, "laptop", [f"adapt_t32-{t}" for t in TASKS])
        return [
            p.read_bytes() for p in [*page.write(tmp_path / name, "table_2"), save_figure(plot_masks(runs, 2), tmp_path / name / "fig.png")]
        ]
    assert write("first") == write("second")
