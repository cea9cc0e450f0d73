("DA-VPT's report: rows of every profile, printed numbers from the files, what is not run, "
 "pictures; and attention maps against a softmax by hand.")
import copy
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from test_ship import sharp_vit

from hierprompt.engine.tuned import tune
from hierprompt.papers.davpt import (
    PRETRAININGS,
    RELEASED,
    bias_costs,
    conflict_remarks,
    devices,
    parameter_remarks,
    pretraining_of,
    prompts_per_block,
    rows_1,
    rows_9,
    study_3,
    study_4,
    study_7,
    study_page,
    table_1,
    table_3,
    table_4,
    table_7,
    table_9,
)
from hierprompt.papers.davpt_figures import (
    FLAT,
    SERIES,
    composition_remarks,
    figure_study,
    key_bias_remarks,
    map_runs,
    plot_mapping,
    plot_study,
)
from hierprompt.pipeline.profiles import load_profile
from hierprompt.pipeline.resolve import resolve
from hierprompt.results.ablations import build_ablation
from hierprompt.results.attention import attention_maps, plot_attention
from hierprompt.results.figures import save_figure
from hierprompt.results.metrics import example_metrics
from hierprompt.results.published import load_published
from hierprompt.results.tables import NOT_RUN, task_groups

ROOT = Path(__file__).parents[1]
PROFILES = sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml"))
ORIG, AUGREG, MAE = (f"vit_base_patch16_224.{tag}" for tag in ("orig_in21k", "augreg_in21k", "mae"))
PAGES = {"table_3": table_3, "table_4": table_4, "table_7": table_7}
STUDIES = {"table_3": study_3, "table_4": study_4, "table_7": study_7} | {name: lambda name=name: figure_study(name) for name in SERIES}


def put(root, variant, task="cards", acc=60.0, profile="laptop", backbone="embedded_vit_small_patch14", **changes):
    "A made-up cell; its best look is one point above its last."
    group = task_groups([task])[task][1]
    cell = replace(
        example_metrics(variant, task, group, acc=[acc], gap=1.0, **changes),
        profile=profile,
        backbone={"name": backbone, "sha256": "0" * 64},
    )
    cell.write(root / profile / "runs" / cell.cell / "metrics.json")


def block_of(study, *tasks): return {"variants": list(dict.fromkeys(s.variant for s in study.steps)), "tasks": list(tasks)}


def figure(root, name, *tasks): return build_ablation(figure_study(name), "laptop", block_of(figure_study(name), *tasks), root)


@cache
def resolved(profile): return resolve(load_profile(profile, ROOT / "profiles"))


# rows

@pytest.mark.parametrize("profile", PROFILES)
def test_every_row_that_a_profile_asks_for_has_its_place(profile):
    blocks = resolved(profile)["tables"].get("davpt", {"blocks": {}})["blocks"]
    places = {name: {s.variant for s in study().steps} for name, study in STUDIES.items()}
    places["table_1"] = {row.variant for p in PRETRAININGS for row in (*rows_1(p), *RELEASED)}
    for name, block in blocks.items(): assert set(block["variants"]) <= places[name], name


def test_the_reference_profile_has_every_row_of_ours():
    blocks = resolved("reference")["tables"]["davpt"]["blocks"]
    for name in (*SERIES, "table_4", "table_7"):
        assert {s.variant for s in STUDIES[name]().steps} == set(blocks[name]["variants"]) | set(FLAT.get(name, {}).values()), name


@pytest.mark.parametrize("profile", ["smoke", "laptop", "paper_davpt_mae"])   # few blocks, most blocks, another pretraining
def test_nothing_was_run(tmp_path, profile):
    params = resolved(profile)
    blocks, backbone = params["tables"].get("davpt", {"blocks": {}})["blocks"], params["backbone"]["name"]
    first = blocks.get("table_1", {"variants": ["dvpt", "da_vpt"], "tasks": ["cards"]})
    pages = [table_1(profile, backbone, first["variants"], first["tasks"], tmp_path), table_9(profile, backbone, tmp_path)]
    pages += [page(profile, blocks.get(name), tmp_path) for name, page in PAGES.items()]
    figures = {name: build_ablation(figure_study(name), profile, blocks.get(name), tmp_path) for name in SERIES}
    for page in [*pages, *map(study_page, figures.values())]:
        text = page._repr_markdown_()
        assert NOT_RUN in text and "nan" not in text
        assert {"not run"} == set(page.lines[page.lines.measure == "acc"].seeds)
    for name, data in figures.items():
        if profile == "laptop": assert save_figure(plot_study(data, name), tmp_path / f"{name}.png").stat().st_size > 500


# printed numbers

@pytest.mark.parametrize(
    "study, name, columns, printed",
    [(study_3, "davpt_table3_fgvc", {"fine_grained": "mean"}, 15), (study_4, "davpt_table4", {}, 8), (study_7, "davpt_table7", {}, 6)],
)
def test_studies_hold_the_files_numbers(study, name, columns, printed):
    study, rows = study(), load_published(name)
    steps = [s for s in study.steps if s.printed]
    assert len(steps) == printed == len(rows)
    for column in study.columns: assert [s.printed[column] for s in steps] == rows[columns.get(column, column)].tolist()
    assert (study.backbone, study.protocol) == (AUGREG, "best test epoch")


def test_pages_print_two_digits_where_the_paper_does(tmp_path):
    part = table_4("laptop", None, tmp_path).parts[""]
    rows = load_published("davpt_table4")
    assert part["Natural, DA-VPT Table 4"].tolist() == [f"{x:.2f}" for x in rows.natural]
    assert (
        part["printed, ms per image"].tolist() == [f"{x:.2f}" for x in rows.ms_per_image]
        and part["printed, GB"].astype(float).tolist() == rows.memory_gb.tolist()
    )
    ticks = part[["L(x, p)", "L(p, cls)", "bias"]].eq("✓")
    assert ticks.values.tolist() == rows[["patch", "cls", "bias"]].values.tolist()
    third = table_3("laptop", None, tmp_path).parts[""]
    assert third["cub200, DA-VPT Table 3"].tolist() == [f"{x:.1f}" for x in load_published("davpt_table3_fgvc").cub200]


def test_printed_gains_are_the_papers(tmp_path):
    for page, name, title in ((table_4, "davpt_table4", "base"), (table_7, "davpt_table7", "VPT (baseline)")):
        part, rows = page("laptop", None, tmp_path).parts[f"Gain over {title}, points"], load_published(name)
        for column in ("cub200", "natural"):
            shown = part["Natural, printed" if column == "natural" else f"{column}, printed"].tolist()
            assert shown[1:len(rows)] == [f"{x:+.2f}" for x in rows[f"{column}_gain"][1:]]


@pytest.fixture(scope="module")
def printed_lines(tmp_path_factory):
    lines = table_1("laptop", MAE, [], ["cards"], tmp_path_factory.mktemp("nothing")).lines
    return lines[(lines.measure == "printed") & (lines.source == "DA-VPT Table 1")].set_index("pretraining")


@pytest.mark.parametrize("pretraining", PRETRAININGS)
def test_tables_1_and_9_have_the_printed_rows(pretraining, printed_lines):
    for rows, name in ((rows_1, "davpt_table1"), (rows_9, "davpt_appendix_vtab_per_task")):
        printed = load_published(name).query("pretraining == @pretraining").method.tolist()
        assert [next(iter(row.published.values())) for row in rows(pretraining) if row.variant != "dvpt"] == printed
    assert (
        printed_lines.mean_of_groups[pretraining].tolist()
        == load_published("davpt_table1").query("pretraining == @pretraining").vtab.tolist()
    )


@pytest.mark.parametrize("name", ["davpt_table1", "davpt_table3_fgvc", "davpt_table4", "davpt_table7", "davpt_appendix_vtab_per_task"])
def test_every_conflict_is_below_its_page(name):
    said = " ".join(conflict_remarks(name))
    for c in load_published(name).attrs["conflicts"]:
        assert c["note"] in said and f"printed {c['printed']:g}, against {c['recomputed']:g}" in said


# parameters

def test_what_the_printed_counts_allow():
    costs = bias_costs().set_index("table")
    assert (round(costs["least, M"].max(), 4), round(costs["most, M"].min(), 3)) == (0.0224, 0.030)
    assert (
        costs["key, value (18,432)"].eq("fits").tolist() == [False, True, False, True, True, False]
        and costs["query, key, value (27,648)"].eq("fits").all()
    )
    assert [round(p, 1) for p in prompts_per_block(0.30, 180_407.4)] == [12.4, 13.5]   # the baseline's 0.36 M has 20
    assert len(parameter_remarks("1")) == 4 and len(parameter_remarks("3")) == 3 and len(parameter_remarks("4")) == 2


# ours

def test_ours_stand_in_the_block_of_their_backbone(tmp_path):
    for task in load_published("davpt_appendix_vtab_per_task").attrs["groups"]["specialized"]:
        put(tmp_path, "da_vpt", task, 80.0, "paper", MAE)
    tasks = load_published("davpt_appendix_vtab_per_task").attrs["groups"]["specialized"]
    page = table_1("paper", MAE, ["da_vpt"], tasks, tmp_path)
    assert list(page.parts)[2].endswith("MAE, ImageNet-1k") and "Ours run on vit_base_patch16_224.mae" in page.remarks[0]
    lines = page.lines[(page.lines.variant == "da_vpt") & (page.lines.measure == "acc")].set_index("pretraining").specialized
    assert lines.to_dict() == {"mae_in1k": 80.0, "supervised_in21k": NOT_RUN, "mocov3_in1k": NOT_RUN}
    gap = page.lines[page.lines.measure == "ours - printed"]
    assert gap.specialized.tolist() == [round(81.0 - 79.14, 4)]   # DA-VPT's row is of the best test epoch
    parameters = page.parts["Means"].set_index("Method")[["Parameters, M", "with head, M"]]
    assert parameters.loc["DA-VPT"].tolist() == ["0.000", "0.004"] and set(parameters.loc["VPT-Deep"]) == {NOT_RUN}


def test_a_backbone_of_no_pretraining_is_said_to_be_one(tmp_path):
    put(tmp_path, "dvpt", "cards")
    page = table_1("laptop", "embedded_vit_small_patch14", ["dvpt"], ["cards"], tmp_path)
    assert pretraining_of("embedded_vit_small_patch14") is None and "none of the paper's three pretrainings" in page.remarks[0]
    assert "60.00 (61.00)" in page.parts["Beside the published numbers: supervised, ImageNet-21k"]["Fine-grained"].tolist()
    assert "ours - printed" not in set(page.lines.measure)


def test_released_settings_are_rows_where_they_are_run(tmp_path):
    labels = table_1("laptop", AUGREG, ["da_vpt", "da_vpt_released"], ["cards"], tmp_path).parts["Means"]["Method"].tolist()
    assert labels == [*(row.label for row in rows_1()), RELEASED[0].label]


def test_table_9_subtracts_task_by_task(tmp_path):
    put(tmp_path, "da_vpt_plus", "svhn", 90.0, "paper", AUGREG)
    page = table_9("paper", AUGREG, tmp_path)
    part = page.parts["supervised, ImageNet-21k"].set_index(["Method", "Source"])
    assert part.loc[("DA-VPT+", "DA-VPT Table 9"), ["svhn", "dtd"]].tolist() == ["91.5 (-0.5)", "74.3"]
    assert part.loc[("DA-VPT+", "this run, paper (vtab)"), ["svhn", "dtd"]].tolist() == ["90.0 (91.0)", NOT_RUN]


def test_rows_of_table_3_are_compared_by_their_own_backbone_and_protocol(tmp_path):
    for variant, backbone in (("vpt_deep", ORIG), ("bias", AUGREG), ("da_vpt", AUGREG)):
        put(tmp_path, variant, "cub200", 90.0, "paper", backbone)
    page = table_3("paper", {"variants": ["vpt_deep", "bias", "da_vpt"], "tasks": ["cub200"]}, tmp_path)
    part = page.parts[""].set_index("Row")["cub200, DA-VPT Table 3"]
    # last epoch, other weights, best test epoch
    assert part[["VPT-Deep", "Bias", "DA-VPT", "DA-VPT+"]].tolist() == ["88.5 (+1.5)", "88.4", "90.2 (+0.8)", "90.8"]
    assert f"- No difference: Bias ran on {AUGREG}, DA-VPT Table 3 on {ORIG}." in page._repr_markdown_()


def test_time_and_memory_are_measured_and_labelled(tmp_path):
    put(tmp_path, "dvpt", images_per_second=50.0, peak_memory_mb=1024.0)
    put(tmp_path, "da_vpt", images_per_second=40.0, peak_memory_mb=None)
    part = table_4("laptop", {"variants": ["dvpt", "da_vpt"], "tasks": ["cards"]}, tmp_path).parts[""]
    times, memory = part.columns[-2:]
    assert (
        part[times].tolist() == ["20.00", NOT_RUN, NOT_RUN, "25.00"] + [NOT_RUN] * 4 and part[memory].tolist() == ["1.00"] + [NOT_RUN] * 7
    )
    assert "(cpu)" in times
    assert devices(tmp_path, "laptop", ["dvpt-cards"]) == "cpu" and devices(tmp_path, "laptop", ["da_vpt-flags"]) == NOT_RUN


def test_gains_of_ours_and_a_row_that_the_paper_lacks(tmp_path):
    for variant, acc in {"dvpt": 60.0, "da_vpt": 61.5, "da_pnca_rel": 59.0}.items(): put(tmp_path, variant, acc=acc)
    part = table_7("laptop", block_of(study_7(), "cards"), tmp_path).parts["Gain over VPT (baseline), points"].set_index("Row")
    assert part["cards, ours"].tolist() == ["+0.00", "+1.50"] + [NOT_RUN] * 4 + ["-1.00"] and part["cub200, printed"].iloc[-1] == "—"
    third = table_3("laptop", block_of(study_3(), "cards"), tmp_path).parts["Gain over VPT-Deep, DA-VPT's trainer, points"].set_index("Row")
    assert third.loc["DA-VPT", ["cards, ours", "cub200, printed"]].tolist() == ["+1.50", "+1.60"]


# figures

def test_figure_4a_draws_what_was_run(tmp_path):
    for variant, acc in {"da_only_1": 60.0, "da_only_8": 62.0, "da_vpt": 63.0, "da_from_4": 61.0, "dvpt": 58.0}.items():
        put(tmp_path, variant, acc=acc)
    axes = plot_study(figure(tmp_path, "fig_4a", "cards"), "fig_4a").axes[0]
    colours, lines = {"C0": "one", "C3": "from"}, {}
    for line in axes.lines:
        if line.get_color() in colours and line.get_linestyle() == "-":
            lines[colours[line.get_color()]] = (list(line.get_xdata()), list(line.get_ydata()))
    assert lines == {"one": ([1, 8, 12], [60, 62, 63]), "from": ([4, 12], [61, 63])}
    assert [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [58]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "2\nnot run", "4", "6\nnot run", "8", "10\nnot run", "12"]


def test_a_series_without_runs_says_so(tmp_path):
    put(tmp_path, "dvpt_mean", "cards")
    axes = plot_study(figure(tmp_path, "fig_4d", "cards", "flags"), "fig_4d").axes
    assert [t.get_text() for t in axes[0].get_legend().get_texts()] == ["DA-VPT: not run", "VPT"] and [
        t.get_text() for t in axes[1].texts
    ] == [NOT_RUN]


@pytest.mark.parametrize(
    "acc, words", [(60.0, "+0.00 points, as softmax demands"), (60.5, "+0.50 points; softmax allows rounding alone"), (None, NOT_RUN)]
)
def test_the_control_of_figure_4b_says_what_was_measured(tmp_path, acc, words):
    put(tmp_path, "da_vpt", acc=60.0)
    if acc: put(tmp_path, "da_b_k", acc=acc)
    assert words in key_bias_remarks(figure(tmp_path, "fig_4b", "cards"))[0]


def test_composition_is_put_into_words(tmp_path):
    for variant, acc in {"ship": 60.0, "ship_da": 61.0}.items(): put(tmp_path, variant, "emoji", acc)
    assert composition_remarks(figure(tmp_path, "ship", "emoji")) == [
        "emoji: what guidance adds to SHIP: +1.00 points; what hierarchies add to DA-VPT: not run."
    ]


def test_mapping_times_of_the_runs_that_have_them(tmp_path):
    put(tmp_path, "da_vpt", diagnostics={"map_seconds": [0.5, 0.002], "map_changed": [3, 0], "prompts_used": 10})
    put(tmp_path, "da_vpt", "flags", diagnostics={})
    put(tmp_path, "da_cls", diagnostics={"map_seconds": [0.1], "map_changed": [0], "prompts_used": 10})
    runs = map_runs(tmp_path, "laptop", ["da_vpt-cards", "da_vpt-flags", "da_vpt-emoji"])
    left, right = plot_mapping(runs).axes
    assert list(runs) == ["da_vpt-cards"] and list(left.lines[0].get_ydata()) == [500, 2] and list(right.lines[0].get_ydata()) == [3, 0]
    assert [t.get_text() for t in plot_mapping({}).axes[0].texts] == [NOT_RUN]


def test_the_same_metrics_give_the_same_bytes(tmp_path):
    for variant in ("dvpt", "da_vpt", "da_b_k"): put(tmp_path, variant)
    def write(name):
        data = figure(tmp_path, "fig_4b", "cards")
        files = [*study_page(data).write(tmp_path / name, "fig_4b"), *table_3("laptop", None, tmp_path).write(tmp_path / name, "table_3")]
        return [p.read_bytes() for p in [*files, save_figure(plot_study(data, "fig_4b"), tmp_path / name / "fig.png")]]
    assert write("first") == write("second")


# attention

IMAGES = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def by_hand(vit, x, prompts, shallow=False):
    "Softmax over all keys of [class token, patches, prompts] in every block of a timm network, mean over heads; (B, n, n) each."
    found, n = [], x.shape[1]
    for i, block in enumerate(vit.blocks):
        if i == 0 or not shallow: x = torch.cat([x[:, :n], prompts[i].expand(len(x), -1, -1)], 1)
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        found.append(weights.mean(1))
        x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return found


def equal(maps, weights, first=1, patches=16):
    for found, w in zip(maps, weights, strict=True):
        torch.testing.assert_close(found.prompts, w[:, first + patches:, first:first + patches].unflatten(2, (4, 4)), atol=1e-6, rtol=0)
        torch.testing.assert_close(found.cls, w[:, 0, first:first + patches].unflatten(1, (4, 4)), atol=1e-6, rtol=0)
        shares = found.prompts.sum((2, 3))
        assert (shares <= 1 + 1e-6).all()
        whole = shares + w[:, first + patches:, :first].sum(2) + w[:, first + patches:, first + patches:].sum(2)
        torch.testing.assert_close(whole, torch.ones_like(whole), atol=1e-5, rtol=0)   # with all keys


@pytest.mark.parametrize("method, settings", [("vpt_deep", {"num_tokens": 3}), ("vpt_shallow", {"num_tokens": 3}), ("linear", {}),
                                              ("da_vpt", {"num_tokens": 3, "num_guided": 5, "bias_set": "qkv"})])
@torch.no_grad()
def test_maps_are_a_softmax_by_hand(method, settings):
    vit = sharp_vit(depth=3)
    model, twin = tune(vit, method, 7, normalize="imagenet", **settings), copy.deepcopy(vit)
    if method == "da_vpt":
        for part in "qkv":
            for bias in getattr(model.tuner, f"{part}_bias"): bias.add_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(1)))
        for i, block in enumerate(twin.blocks):
            block.attn.qkv.bias.copy_(torch.cat([getattr(model.tuner, f"{part}_bias")[i] for part in "qkv"]))
    x = model.host.embed(model.normalise(IMAGES))
    prompts = {"linear": [x[:1, :0]] * 3}.get(method) or [p.view(1, -1, x.shape[2]) for p in (list(model.tuner.prompts) * 3)[:3]]
    maps = attention_maps(model.train(), IMAGES)
    equal(maps, by_hand(twin, x, prompts, method == "vpt_shallow"))
    assert model.training and (method != "da_vpt" or maps[-1].prompts.shape[1] > maps[0].prompts.shape[1])


def test_masked_prompts_look_at_patches_alone():
    model = tune(sharp_vit(depth=2), "da_vpt", 7, normalize="imagenet", num_tokens=3, num_guided=3, prompt_mask=True)
    for found in attention_maps(model, IMAGES):
        torch.testing.assert_close(found.prompts.sum((2, 3)), torch.ones(3, found.prompts.shape[1]))
        assert (found.cls.sum((1, 2)) < 0.999).all()


def test_a_backbone_without_class_token_is_refused():
    model = tune(sharp_vit(depth=2, class_token=False, global_pool="avg"), "vpt_deep", 7, normalize="imagenet", num_tokens=2)
    with pytest.raises(ValueError, match="no class token"): attention_maps(model, IMAGES)


def test_the_positive_prompt_has_a_frame_in_the_guided_block_alone(tmp_path):
    vit = sharp_vit(depth=3)
    models = {
        "VPT-Deep": tune(vit, "vpt_deep", 7, normalize="imagenet", num_tokens=3),
        "DA-VPT": tune(vit, "da_vpt", 7, normalize="imagenet", num_tokens=3, num_guided=4, fill_to=0),
    }
    a, b = plot_attention(IMAGES, models, {"DA-VPT": torch.tensor([2, 0, 1])}, names=["x", "y", "z"])
    framed = [i for i, axes in enumerate(a.axes) if axes.spines["left"].get_linewidth() == 2]
    assert len(a.axes) == 4 * 6 and framed == [3 * 6 + 2 + 2] and len(b.axes) == 3 * 4
    assert [re.sub("\n.*", "", axes.get_ylabel()) for axes in b.axes[::3]] == ["image", "VPT-Deep", "DA-VPT", "DA-VPT"]
    for i, picture in enumerate((a, b)): assert save_figure(picture, tmp_path / f"{i}.png").stat().st_size > 500
