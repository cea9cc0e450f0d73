"""Segmentation's training and tests: the same bits after an interruption, what a checkpoint holds, maps from collected features,
accuracies against MMSegmentation's metric."""
import contextlib
import io
import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

warnings.filterwarnings("ignore", module="mmcv")
with contextlib.redirect_stdout(io.StringIO()):
    pytest.importorskip("mmseg.datasets")
from mmengine.hooks import Hook
from mmengine.registry import DefaultScope
from mmseg.datasets import BaseSegDataset
from mmseg.evaluation import IoUMetric

from hierprompt.core import read_json, write_json
from hierprompt.pipeline.segmentation_cells import as_cell, choose, finished, seg_metrics
from hierprompt.results.metrics import read_metrics
from hierprompt.seg.cell import SegCell, count_seg_parameters, load_cell, run_cell, seg_data
from hierprompt.seg.loop import evaluate, jackknife, learnt, multi_scale, predictions, put, read_tensors, train, train_loader
from hierprompt.seg.recipes import seg_recipe
from hierprompt.seg.segmentor import build_segmentor
from hierprompt.seg.setr import setr_pup, single_scale_pipeline, train_pipeline, tta_pipeline
from hierprompt.seg.tasks import write_task

GUIDED = dict(num_tokens=2, num_guided=3, fill_to=0, patch_weight=0.05, cls_weight=0.05)
RECIPE = seg_recipe(iterations=6, batch_size=3, crop=16, stride=11, scale=(32, 32), tta_ratios=(0.5, 1.5), prepare_crops=8, map_interval=2)
ADAMW = replace(RECIPE, optimizer="adamw", weight_decay=0.01, warmup=2, decay_until=5, clip_value=1.0, min_lr=0.0)
CLASSES, PALETTE = ["red", "green", "blue", "ground"], [[200, 0, 0], [0, 200, 0], [0, 0, 200], [90, 90, 90]]
METAINFO = dict(classes=CLASSES, palette=PALETTE)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "Nine pictures of 32 x 40 px for training, three for tests: coloured squares on noise."
    root, generator = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for split, count in (("train", 9), ("test", 3)):
        for folder in ("images", "annotations"): (root / folder / split).mkdir(parents=True)
        for i in range(count):
            picture, mask = generator.integers(60, 120, (32, 40, 3), dtype=np.uint8), np.full((32, 40), 3, np.uint8)
            for k in {i % 3, (i * i) % 3}:
                y, x = generator.integers(0, 16, 2)
                picture[y:y + 14, x:x + 14], mask[y:y + 14, x:x + 14] = PALETTE[k], k
            mask[0, :5] = 255
            Image.fromarray(picture).save(root / f"images/{split}/{i}.png")
            Image.fromarray(mask).save(root / f"annotations/{split}/{i}.png")
    return root


def dataset(tree, split, pipeline):
    with DefaultScope.overwrite_default_scope("mmseg"):
        return BaseSegDataset(
            img_suffix=".png",
            metainfo=METAINFO,
            data_root=str(tree),
            data_prefix=dict(img_path=f"images/{split}", seg_map_path=f"annotations/{split}"),
            pipeline=pipeline,
            serialize_data=False,
        )


@pytest.fixture(scope="module")
def training(tree): return dataset(tree, "train", train_pipeline(RECIPE, background=3))


def model(method="da_vpt", config=GUIDED, **settings):
    return build_segmentor(
        setr_pup(dict(vit="tiny_random", image_size=16, out_indices=(1, 3), num_classes=4, method=method, config=config, **settings), 11, 4)
    )


class Stop(Hook):
    def __init__(self, at): self.at = at

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx == self.at: raise KeyboardInterrupt


def differing(a, b):
    return [name for name, t in learnt(a).items() if not torch.equal(t, learnt(b)[name])] + sorted(learnt(a).keys() ^ learnt(b).keys())


# --------------------------------------------------------------------------------------------- interruption

SHIP = dict(
    num_ap_hierarchies=1,
    num_prototypes=4,
    max_images=6,
    num_tokens=2,
    num_shared=1,
    num_attributes=2,
    num_matching=2,
    threshold=0.999,
    pml_start_epoch=1,
)
SPT = dict(batches=2, batch_size=3, rank=2, budget=3000, tau_step=200, tau_max=None)


@pytest.mark.parametrize(
    "method, config, recipe, every, stop",
    [
        ("da_vpt", GUIDED, RECIPE, 1, 3),
        ("da_vpt", {**GUIDED, "seg_label": "mode", "map_unseen": "random", "dropout": 0.2, "bias_set": "kv"}, ADAMW, 2, 5),
        ("ship", SHIP, ADAMW, 3, 4),
        ("full", {}, RECIPE, 4, 5),
        ("linear", {}, ADAMW, 5, 5),
        ("spt_lora", SPT, ADAMW, 2, 3),
    ],
)
def test_an_interrupted_run_ends_with_the_same_bits(training, tmp_path, method, config, recipe, every, stop):
    straight, first, second = (model(method, config, drop_path=0.3) for _ in range(3))
    whole = train(straight, training, recipe, seed=1, log_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(first, training, recipe, seed=1, folder=tmp_path, log_every=2, checkpoint_every=every, hooks=[Stop(stop)])
    _, about = read_tensors(tmp_path / "checkpoint.safetensors")
    assert about["iteration"] == stop // every * every
    torch.rand(7), np.random.rand(3)                                  # another process: other global generators
    rest = train(second, training, recipe, seed=1, folder=tmp_path, log_every=2, checkpoint_every=every)
    assert differing(straight, second) == [] and rest.rows == whole.rows
    assert [row["iteration"] for row in whole.rows] == [2, 4, 6]


def test_a_finished_run_is_not_trained_again(training, tmp_path):
    first, second = model(), model()
    train(first, training, RECIPE, folder=tmp_path)
    again = train(second, training, RECIPE, folder=tmp_path, hooks=[Stop(0)])
    assert differing(first, second) == [] and len(again.rows) == 1


def test_another_seed_is_another_run(training):
    runs = [model(seed=s) for s in (0, 0, 1)]
    for m, seed in zip(runs, (0, 1, 0)): train(m, training, replace(RECIPE, iterations=1), seed=seed)
    assert differing(runs[0], runs[1]) and differing(runs[0], runs[2])


def test_global_generators_are_left_alone(training):
    states = lambda: (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
    before = states()
    train(model(), training, replace(RECIPE, iterations=1))
    assert states() == before


def test_the_number_of_workers_changes_no_crop(training):
    def crops(workers): return [item for _, batch in zip(range(3), train_loader(training, 3, 0, workers)) for item in batch["inputs"]]
    assert all(torch.equal(a, b) for a, b in zip(crops(0), crops(2), strict=True))


# --------------------------------------------------------------------------------------------- files

def test_a_checkpoint_holds_what_was_trained_and_no_pickle(training, tmp_path):
    found = model()
    train(found, training, RECIPE, folder=tmp_path, checkpoint_every=2)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    tensors, about = read_tensors(tmp_path / "checkpoint.safetensors")
    assert not any(".host." in name for name in tensors)
    assert {n.removeprefix("model.") for n in tensors if n.startswith("model.")} == learnt(found).keys()
    trained = sum(p.numel() for p in found.trainable().values())
    assert sum(t.numel() for n, t in tensors.items() if n.startswith("optimizer.")) == trained       # SGD: one momentum each
    assert about["run"]["seed"] == 0 and about["iteration"] == 6


def test_checkpoints_that_do_not_fit(training, tmp_path):
    train(model(), training, RECIPE, folder=tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(ValueError, match="was made with seed = 0, this run has 2"):
        train(model(), training, RECIPE, seed=2, folder=tmp_path)
    with pytest.raises(ValueError, match="does not fit the model: they differ in"):
        train(model("vpt_deep", dict(num_tokens=2)), training, RECIPE, folder=tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="checkpoint.safetensors is no complete file of tensors .*: delete it and start the run again"):
        train(model(), training, RECIPE, folder=tmp_path)


def test_tensors_of_another_shape_are_refused(tmp_path):
    tensors = dict(learnt(model()))
    name = next(n for n in tensors if n.startswith("decode_head"))
    with pytest.raises(ValueError, match=name): put(model(), {**tensors, name: torch.zeros(3)}, "x")


def test_frozen_tensors_stay_as_they_are(training):
    found = model(config={**GUIDED, "bias_set": "kv"})
    before = {n: p.clone() for n, p in found.backbone.host.vit.state_dict().items()}
    start = {n: t.clone() for n, t in learnt(found).items()}
    train(found, training, RECIPE)
    assert all(torch.equal(t, found.backbone.host.vit.state_dict()[n]) for n, t in before.items())
    same = [n for n, t in learnt(found).items() if torch.equal(t, start[n])]
    # a key bias has no gradient (DA-VPT spec 1.9)
    assert not [n for n in same if n in found.trainable() and "k_bias" not in n], same


# --------------------------------------------------------------------------------------------- guidance

class Watch(Hook):
    "The map, and what it could be made from, after every iteration; behind MapHook."
    priority = "LOW"

    def __init__(self): self.counts, self.maps = [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        guidance = runner.model.backbone.tuner.guidance
        self.counts.append(guidance.means.counts.clone()), self.maps.append(guidance.map.prompt_of.clone())


def test_maps_come_from_features_of_the_pass(training):
    "D33: collected in every iteration, clustered after a pass, forgotten."
    found, watch = model(), Watch()
    updated = []
    train(found, training, replace(RECIPE, iterations=7, map_interval=3), hooks=[watch])
    guidance = found.backbone.tuner.guidance
    assert [c.sum() > 0 for c in watch.counts] == [True, True, False, True, True, False, True]
    assert len(guidance.changed) == 3 and all(c[3] == 0 for c in watch.counts)                          # the background is never counted
    assert all(torch.equal(watch.maps[i], watch.maps[i + 1]) for i in (0, 2, 3, 5))                     # only after a pass
    with pytest.raises(ValueError, match="no class has samples"): (guidance.means.reset(), guidance.after_epoch(3))


def test_a_pass_is_the_data_by_default(training):
    found, watch = model(), Watch()
    train(found, training, replace(RECIPE, iterations=4, map_interval=None), hooks=[watch])             # nine pictures, three in a batch
    assert [c.sum() > 0 for c in watch.counts] == [True, True, False, True]


def test_released_settings_train(training):
    config = dict(
        num_tokens=2,
        num_guided=3,
        guided_layers=[1],
        patch_weight=0.05,
        cls_weight=0.05,
        bias_set="none",
        seg_label="mode",
        map_update_from=0,
    )
    found = build_segmentor(
        setr_pup(
            dict(vit="tiny_random", image_size=16, out_indices=(1, 3), num_classes=4, method="da_vpt", preset="released", config=config),
            11,
            4,
        )
    )
    losses = train(found, training, RECIPE)
    assert losses.rows[0]["loss_prompt"] > 0 and found.backbone.tuner.guidance.layers == [1]


def test_a_loss_that_is_no_number_stops(training):
    with pytest.raises(FloatingPointError, match="da_vpt: loss .* at learning rate .* is not finite: use a smaller lr"):
        train(model(), training, replace(RECIPE, lr=1e30, min_lr=0.0), log_every=2)


def test_data_with_other_classes_stop_before_the_training(training):
    six = build_segmentor(setr_pup(dict(vit="tiny_random", image_size=16, out_indices=(1, 3), num_classes=6), 11, 4))
    with pytest.raises(ValueError, match="the data set has 4 classes .* the heads have 6: num_classes=4"): train(six, training, RECIPE)


# --------------------------------------------------------------------------------------------- tests

class Fixed:
    "A model that predicts given masks."
    def __init__(self, masks): self.masks = iter(masks)

    def eval(self): return self

    def remembered(self): return contextlib.nullcontext()

    def parameters(self): return iter([torch.zeros(1)])

    def test_step(self, batch):
        for sample in batch["data_samples"]: sample.set_data({"pred_sem_seg": type(sample.gt_sem_seg)(data=next(self.masks)[None])})
        return batch["data_samples"]


def test_accuracies_are_mmsegmentations(tree):
    data, generator = dataset(tree, "test", single_scale_pipeline(RECIPE)), torch.Generator().manual_seed(0)
    masks = [torch.randint(0, 3, (32, 40), generator=generator) for _ in range(3)]
    metric = IoUMetric(iou_metrics=["mIoU"])
    metric.dataset_meta = data.metainfo
    for i, mask in enumerate(masks):
        metric.process({}, [dict(pred_sem_seg=dict(data=mask), gt_sem_seg=dict(data=data[i]["data_samples"].gt_sem_seg.data))])
    wanted, found = metric.compute_metrics(metric.results), evaluate(Fixed(masks), data)
    assert [round(found[k.lower()], 2) for k in ("mIoU", "mAcc", "aAcc")] == pytest.approx(
        [wanted[k] for k in ("mIoU", "mAcc", "aAcc")], abs=0.011
    )
    assert found["iou"]["ground"] == 0.0 and list(found["iou"]) == CLASSES


def test_a_class_that_does_not_occur_is_left_out(tree):
    data = dataset(tree, "test", single_scale_pipeline(RECIPE)).get_subset([0])
    truth = data[0]["data_samples"].gt_sem_seg.data[0]
    found = evaluate(Fixed([truth.where(truth != 255, 3)]), data)
    assert found["miou"] == 100.0 and None in found["iou"].values()
    assert found["miou_se"] is None   # one picture


def miou(data, masks):
    "Of MMSegmentation, from pictures and predictions, unrounded."
    areas = [IoUMetric.intersect_and_union(mask, data[i]["data_samples"].gt_sem_seg.data[0], 4, 255) for i, mask in masks]
    return np.nanmean(100 * IoUMetric.total_area_to_metrics(*(sum(part).double() for part in zip(*areas)))["IoU"])


def test_the_error_of_the_miou_is_that_without_each_picture(tree):
    data, generator = dataset(tree, "train", single_scale_pipeline(RECIPE)), torch.Generator().manual_seed(0)
    truths = [data[i]["data_samples"].gt_sem_seg.data[0] for i in range(9)]
    wrong = [torch.rand(t.shape, generator=generator) < 0.1 * i for i, t in enumerate(truths)]
    masks = [t.where((t != 255) & ~w, torch.randint(0, 4, t.shape, generator=generator)) for t, w in zip(truths, wrong)]
    left = [miou(data, [(i, m) for i, m in enumerate(masks) if i != out]) for out in range(9)]
    found = evaluate(Fixed(masks), data)
    assert found["miou"] == pytest.approx(miou(data, enumerate(masks)), rel=1e-12)
    assert found["miou_se"] == pytest.approx(np.sqrt(8 / 9 * sum((v - np.mean(left)) ** 2 for v in left)), rel=1e-12)
    assert found["miou_se"] > 1


def test_a_class_of_a_single_picture_is_missing_without_it():
    areas = torch.tensor([[[8, 0], [10, 0], [9, 0], [9, 0]], [[5, 4], [10, 4], [6, 4], [9, 4]]]).double()
    assert jackknife(areas) == pytest.approx(np.std([np.mean([50.0, 100.0]), 80.0]))   # (n - 1) / n * sum of squares, n = 2


def test_several_scales_are_averaged(tree):
    found, recipe = model(), replace(RECIPE, tta_ratios=(0.5, 1.0))
    warnings.filterwarnings("ignore", message="The shape of value will convert")
    single, several = dataset(tree, "test", single_scale_pipeline(recipe)), dataset(tree, "test", tta_pipeline(recipe))
    from mmengine.dataset import pseudo_collate
    with torch.no_grad():
        merged = multi_scale(found).test_step(pseudo_collate([several[0]]))[0]
        views = several[0]
        scores = [
            found.test_step(pseudo_collate([dict(inputs=x, data_samples=s)]))[0].seg_logits.data.softmax(0)
            for x, s in zip(views["inputs"], views["data_samples"])
        ]
    assert len(scores) == 4 and torch.equal(merged.pred_sem_seg.data.squeeze(), torch.stack(scores).mean(0).argmax(0))
    assert set(evaluate(multi_scale(found), several)) == set(evaluate(found, single)) == {"miou", "miou_se", "macc", "aacc", "iou"}


def test_a_flipped_view_is_turned_back(tree):
    "With a model that only looks at single pixels, a mirrored view says the same as the picture."
    found, recipe = model("linear", {}), replace(RECIPE, tta_ratios=(1.0,), stride=16)
    views = dataset(tree, "test", tta_pipeline(recipe))[0]
    plain, mirrored = views["data_samples"]
    assert not plain.flip and mirrored.flip and torch.equal(views["inputs"][0].flip(-1), views["inputs"][1])


def test_predictions_have_the_size_of_the_pictures(tree):
    data = dataset(tree, "test", single_scale_pipeline(replace(RECIPE, scale=(20, 20))))
    for sample in predictions(model(), data, [0, 2]):
        assert sample["image"].shape == (32, 40, 3) and sample["truth"].shape == sample["prediction"].shape == (32, 40)
    assert (predictions(model(), data, [2])[0]["image"] == np.asarray(Image.open(tree / "images/test/2.png"))).all()


# --------------------------------------------------------------------------------------------- cells

@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    return write_task("seg_objects", tmp_path_factory.mktemp("tasks") / "objects", image_size=32, train=8, val=1, test=3)


def cell(tree, **changes):
    return {
        **dict(
            task="seg_objects",
            root=str(tree),
            vit="tiny_random",
            method="da_vpt",
            config=GUIDED,
            out_indices=[1, 3],
            channels=4,
            pictures=2,
            log_every=2,
            checkpoint_every=1,
            recipe_changes=dict(iterations=4, batch_size=2, crop=16, stride=11, scale=[32, 32], tta_ratios=[0.5], prepare_crops=4),
        ),
        **changes,
    }


def untimed(result): return {k: v for k, v in result.items() if k not in ("seconds", "test_seconds", "images_per_second", "peak_memory_mb")}


def test_a_cell_from_settings_to_files(objects, tmp_path):
    result = run_cell(cell(objects), tmp_path / "a")
    write_json(tmp_path / "plain.json", result)
    assert read_json(tmp_path / "plain.json") == result
    assert sorted(p.relative_to(tmp_path / "a").as_posix() for p in (tmp_path / "a").rglob("*") if p.is_file()) == [
        "predictions/00000.png",
        "predictions/00002.png",
        "trained.safetensors",
    ]
    assert result["parameters"] == count_seg_parameters(load_cell(tmp_path / "a")) and result["parameters"]["backbone"] == (3 * 2 + 3) * 64
    data = seg_data(SegCell(**cell(objects)))
    assert (
        evaluate(load_cell(tmp_path / "a"), data["test"]) == result["test"]
        and evaluate(multi_scale(load_cell(tmp_path / "a")), data["multi_scale"]) == result["multi_scale"]
    )
    mask = Image.open(tmp_path / "a/predictions/00002.png")
    assert mask.mode == "P" and (np.asarray(mask) == predictions(load_cell(tmp_path / "a"), data["test"], [2])[0]["prediction"]).all()


def test_a_cell_goes_on(objects, tmp_path, monkeypatch):
    whole = run_cell(cell(objects), tmp_path / "a")
    import hierprompt.seg.cell as loop
    original = loop.train
    monkeypatch.setattr(loop, "train", lambda *args, **kw: original(*args, **kw, hooks=[Stop(3)]))
    with pytest.raises(KeyboardInterrupt): run_cell(cell(objects), tmp_path / "b")
    monkeypatch.setattr(loop, "train", original)
    assert read_tensors(tmp_path / "b/checkpoint.safetensors")[1]["iteration"] == 3
    with pytest.raises(ValueError, match="was made with channels = 4, this run has 6"): run_cell(cell(objects, channels=6), tmp_path / "b")
    assert untimed(run_cell(cell(objects), tmp_path / "b")) == untimed(whole)
    assert load_file(tmp_path / "a/trained.safetensors").keys() == load_file(tmp_path / "b/trained.safetensors").keys()


def test_pictures_that_are_kept_out_are_not_trained_on(objects):
    data = seg_data(SegCell(**cell(objects, hold_out=3)))
    paths = {name: {data[name].get_data_info(i)["img_path"] for i in range(len(data[name]))} for name in ("train", "held_out")}
    assert len(paths["train"]) == 5 and len(paths["held_out"]) == 3 and not paths["train"] & paths["held_out"]


def test_the_record_of_a_cell_has_its_error_and_where_the_time_went(objects, tmp_path):
    asked = cell(objects)
    settings = dict(
        profile="tiny", variant="seg_da_vpt", seeds=[0, 1], backbone={"name": "tiny_random"}, preset=None, grid={"lr": [1e-3, 1e-2]},
        recipe=asked["recipe_changes"], decoder={"channels": 4, "out_indices": [1, 3], "normalize": "imagenet"},
        **{name: asked[name] for name in ("task", "method", "config")},
    )
    cells, tried, found = {}, {}, {}
    for seed in settings["seeds"]:
        cells[seed], tried[seed] = choose(settings, as_cell(settings, objects, None, seed, pretrained=False), 8, tmp_path / "trials")
        found[seed] = finished(cells[seed], tmp_path / f"seed-{seed}")
    shares = {"train": {"background": 0.9, "object": 0.1}, "test": {"background": 0.8, "object": 0.2}}
    metrics = seg_metrics(settings, found, cells, tried, None, shares)
    assert metrics.acc_se == [numbers["test"]["miou_se"] for numbers in found.values()] and all(e > 0 for e in metrics.acc_se)
    assert list(tried[0]) == ["lr", "miou", "seconds"]
    assert metrics.spent == pytest.approx({
        "choice": sum(frame.seconds.sum() for frame in tried.values()),
        "training": metrics.seconds,
        "evaluation": sum(sum(numbers["test_seconds"].values()) for numbers in found.values()),
    }) and all(seconds > 0 for seconds in metrics.spent.values())
    metrics.write(tmp_path / "metrics.json")
    assert read_metrics(tmp_path / "metrics.json") == metrics
    fixed = seg_metrics(settings, found, cells, dict.fromkeys(settings["seeds"]), None, shares)
    assert fixed.spent["choice"] == 0.0


@pytest.mark.parametrize(
    "changes, error, text",
    [
        (dict(task="seg_cities"), KeyError, "unknown segmentation task 'seg_cities'"),
        (dict(method="davpt"), KeyError, "unknown method 'davpt'"),
        (dict(out_indices=[1, 9]), ValueError, "out_indices = .1, 9.: name blocks from 0 to 3"),
        (dict(recipe_changes=dict(crop=20, stride=11)), ValueError, "crop = 20 has no whole number of patches of 8 pixels"),
        (dict(recipe="cityscapes"), KeyError, "unknown segmentation recipe"),
        (dict(hold_out=8), ValueError, "hold_out = 8 of 8 training pictures leaves none"),
        (dict(epochs=3), TypeError, "epochs"),
        (dict(root="/nowhere"), FileNotFoundError, "nowhere"),
    ],
)
def test_cells_that_do_not_fit(objects, tmp_path, changes, error, text):
    with pytest.raises(error, match=text): run_cell(cell(objects, **changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_training_leaves_the_default_scope_as_it_was(training):
    with DefaultScope.overwrite_default_scope("mmengine"):
        train(model("linear", {}), training, replace(RECIPE, iterations=1))
        assert DefaultScope.get_current_instance().scope_name == "mmengine"
