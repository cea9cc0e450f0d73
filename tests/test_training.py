"""The training loop: determinism, modes, protocols, resuming, refusals."""
import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from hierprompt import training
from hierprompt.backbones import load_backbone
from hierprompt.core import from_dict, read_json, rng, to_dict
from hierprompt.data.tasks import Split
from hierprompt.recipes import Candidate, Recipe, grid, learning_rates, recipe
from hierprompt.training import History, Trainer, class_batches, evaluate, fit, make_resident, run_seeds, select, tensor_digest
from hierprompt.tuned import tune

QUICK = recipe("vpt", lr=0.2, epochs=3, warmup_epochs=0, batch_size=16)


def tints(n, seed, size=32):
    "Noise with a faint tint of one of four colours."
    labels, tint = torch.arange(n) % 4, 30 * torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    images = torch.randint(0, 226, (n, 3, size, size), generator=torch.Generator().manual_seed(seed)) + tint[labels][:, :, None, None]
    return Split(images.to(torch.uint8), labels)


TRAIN, VALID, TEST = tints(40, 0), tints(16, 1), tints(24, 2)


@pytest.fixture(scope="module")
def vit(): return load_backbone("tiny_random")


def quiet(model, *splits, **kwargs): return fit(model, *splits, progress=False, device="cpu", **kwargs)


def weights(model): return [p.detach().clone() for p in model.trainable().values()]


def same(first, second): return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- chance ---

@pytest.mark.parametrize("method, name", [("vpt_deep", "vpt"), ("adapter", "noah"), ("lora", "noah"), ("full", "vpt_full")])
def test_same_seed_is_bitwise_the_same_run(vit, method, name):
    r = recipe(name, epochs=2, warmup_epochs=0, batch_size=16)
    runs = []
    for garbage in (3, 7):
        torch.manual_seed(garbage)
        torch.rand(garbage)
        model = tune(vit, method, num_classes=4, seed=5)
        before = torch.get_rng_state()
        runs.append((quiet(model, TRAIN, VALID, recipe=r, test=TEST, seed=5).rows, weights(model)))
        assert torch.equal(torch.get_rng_state(), before), "the global generator was not put back"
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])


def orders(vit, method, seed, **config):
    "The labels of every batch, in the order the model sees them."
    model, seen = tune(vit, method, num_classes=40, **config), []
    model.losses = lambda images, labels, label_smoothing: seen.append(labels) or type(model).losses(model, images, labels, label_smoothing)
    quiet(model, Split(TRAIN.images, torch.arange(40)), recipe=recipe(QUICK, weight_decay=0.0), seed=seed)
    return torch.cat(seen)


def test_image_order_depends_on_the_seed_alone(vit):
    plain = orders(vit, "vpt_deep", 0, num_tokens=2)
    assert torch.equal(plain, orders(vit, "adapter", 0, dropout=0.5)), "dropout must not draw from the sampler"
    assert not torch.equal(plain, orders(vit, "vpt_deep", 1, num_tokens=2))
    want = torch.cat([torch.randperm(40, generator=g) for g in [rng(0, "sampler")] for _ in range(3)])
    assert torch.equal(plain, want)


def test_seed_changes_dropout(vit):
    def loss(seed):
        model = tune(vit, "adapter", num_classes=4)
        r = recipe(QUICK, batch_size=40, epochs=1, lr=1e-6)   # one batch of all images: their order changes nothing
        return quiet(model, TRAIN, recipe=r, seed=seed).rows[0]["loss"]
    assert abs(loss(0) - loss(1)) > 1e-5


# --- the loop ---

def test_backbone_is_bitwise_unchanged_and_weights_move(vit):
    before = {n: t.clone() for n, t in vit.state_dict().items()}
    model = tune(vit, "vpt_deep", num_classes=4)
    start = weights(model)
    quiet(model, TRAIN, recipe=QUICK)
    assert all(torch.equal(t, before[n]) for n, t in vit.state_dict().items())
    assert not any(torch.equal(a, b) for a, b in zip(start, weights(model)))
    assert not model.training


@pytest.mark.parametrize("images, drop_last, updates", [(1000, True, 15), (1000, False, 16), (800, True, 12), (64, True, 1), (10, False, 1)])
def test_updates_per_epoch(vit, images, drop_last, updates):
    split = Split(torch.zeros(images, 3, 32, 32, dtype=torch.uint8), torch.arange(images) % 4)
    model, r = tune(vit, "linear", num_classes=4), recipe("vpt", lr=1e-3, drop_last=drop_last, epochs=1, warmup_epochs=0)
    trainer = Trainer(model, make_resident(model, split, r, True), r, 0)
    trainer.epoch(0)
    assert trainer.updates == updates
    assert trainer.images_seen == (updates * 64 if drop_last else images)


def test_epoch_loss_is_the_mean_over_images(vit):
    "A small last batch must not count like a full one; at rate ~0 the mean is that of the initial model."
    model = tune(vit, "vpt_deep", num_classes=4)
    with torch.no_grad(): want = model.train().loss(TRAIN.images, TRAIN.labels).item()
    got = quiet(model, TRAIN, recipe=recipe(QUICK, lr=1e-12, epochs=1, batch_size=32)).rows[0]["loss"]
    assert got == pytest.approx(want, abs=1e-5)


def test_first_epoch_of_vpt_changes_nothing(vit):
    model = tune(vit, "vpt_deep", num_classes=4)
    start = weights(model)
    r = recipe("vpt", epochs=4, warmup_epochs=2)
    trainer = Trainer(model, make_resident(model, TRAIN, r, True), r, 0)
    trainer.epoch(0)
    assert trainer.lr == 0 and same(start, weights(model))
    trainer.epoch(1)
    assert trainer.lr > 0 and not same(start, weights(model))


@pytest.mark.parametrize("unit", ["epoch", "update"])
def test_rates_follow_the_recipe(vit, unit):
    r = recipe("noah", epochs=6, warmup_epochs=2, batch_size=16, drop_last=False, schedule_on=unit)
    rates = learning_rates(r, 3)
    rows = quiet(tune(vit, "linear", num_classes=4), TRAIN, recipe=r).rows
    assert [row["lr"] for row in rows] == pytest.approx([rates[3 * e + 2] for e in range(6)])


def test_hooks_are_called_in_order(vit):
    model, calls = tune(vit, "vpt_deep", num_classes=4), []
    model.prepare = lambda images, labels, draw: calls.append(("prepare", tuple(images.shape), images.dtype, torch.rand(1).item()))
    model.after_step = lambda step: calls.append(("step", step))
    model.after_epoch = lambda epoch: calls.append(("epoch", epoch))
    quiet(model, TRAIN, recipe=recipe(QUICK, epochs=2), seed=3)
    with training.seeded(3, "kmeans", torch.device("cpu")): draw = torch.rand(1).item()
    assert calls[0] == ("prepare", (40, 3, 32, 32), torch.uint8, draw)
    assert calls[1:] == [("step", 0), ("step", 1), ("step", 2), ("epoch", 0), ("step", 3), ("step", 4), ("step", 5), ("epoch", 1)]


def test_gradient_values_are_clipped(vit):
    model = tune(vit, "vpt_deep", num_classes=4)
    start, r = weights(model), recipe(QUICK, lr=1.0, lr_batch=None, weight_decay=0.0, clip_value=1e-3, batch_size=40, epochs=1)
    quiet(model, TRAIN, recipe=r)
    steps = torch.cat([(a - b).abs().flatten() for a, b in zip(start, weights(model))])
    assert steps.max().item() == pytest.approx(1e-3, rel=1e-3)


def test_label_smoothing_reaches_the_loss(vit):
    for method in ("linear", "vpt_deep"):
        model = tune(vit, method, num_classes=4)
        with torch.no_grad(): want = F.cross_entropy(model(TRAIN.images), TRAIN.labels, label_smoothing=0.3).item()
        got = quiet(model, TRAIN, recipe=recipe(QUICK, lr=1e-12, epochs=1, label_smoothing=0.3)).rows[0]["loss"]
        assert got == pytest.approx(want, abs=1e-5)


def test_drop_path_of_the_recipe_becomes_the_models(vit):
    model = tune(vit, "vpt_deep", num_classes=4)
    quiet(model, TRAIN, recipe=recipe(QUICK, epochs=1, drop_path=0.1))
    assert model.drop_path == 0.1
    quiet(model, TRAIN, recipe=recipe(QUICK, epochs=1))
    assert model.drop_path == 0.0


def test_bf16_is_used_when_asked_for(vit):
    model = tune(vit, "vpt_deep", num_classes=4)
    full, half = (quiet(tune(vit, "vpt_deep", num_classes=4), TRAIN, recipe=recipe(QUICK, precision=p)).rows[-1]["loss"] for p in ("fp32", "bf16"))
    assert full != half and full == pytest.approx(half, abs=0.05)
    assert quiet(model, TRAIN, recipe=QUICK).rows[-1]["loss"] == full   # auto is fp32 on a CPU


def test_progress_bar_is_one_line_or_nothing(vit, capsys):
    fit(tune(vit, "linear", num_classes=4), TRAIN, VALID, recipe=QUICK, device="cpu")
    shown = capsys.readouterr().err
    assert "linear" in shown and "loss=" in shown and "valid_acc=" in shown and shown.count("\n") == 1
    quiet(tune(vit, "linear", num_classes=4), TRAIN, VALID, recipe=QUICK)
    assert capsys.readouterr() == ("", "")


# --- batches by class ---

def batches_of(labels, batch_size, samples_per_class, seed=0):
    "The rows of an epoch and their labels, both (batches, slots, samples_per_class)."
    labels = torch.as_tensor(labels)
    rows = class_batches(labels, batch_size, samples_per_class, torch.Generator().manual_seed(seed))
    assert rows.shape == (len(labels) // batch_size, batch_size) and rows.dtype == torch.int64
    rows = rows.view(len(rows), -1, samples_per_class)
    return rows, labels[rows]


def shuffled(*sizes):
    "Labels 0, 3, 6, ... of so many images each, in random order; the classes between them have none."
    labels = (3 * torch.arange(len(sizes))).repeat_interleave(torch.tensor(sizes))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("labels", [torch.arange(1000) % 47, shuffled(*[20] * 16), shuffled(*range(2, 40)), torch.arange(200) % 100], ids=["47", "16", "uneven", "100"])
def test_a_batch_has_sixteen_classes_and_two_images_of_each(labels):
    rows, classes = batches_of(labels, 32, 2)
    assert torch.equal(classes[..., 0], classes[..., 1])
    assert all(len(set(batch)) == 16 for batch in classes[..., 0].tolist())
    assert all(len(set(batch)) == 32 for batch in rows.flatten(1).tolist())


@pytest.mark.parametrize("sizes, counts", [((40, 40, 40, 40), [4, 4, 4, 4]), ((30, 50, 20), [5, 5, 6]), ((90,), [16]), ((9,) * 10, [1] * 4 + [2] * 6)])
def test_classes_repeat_only_when_there_are_too_few(sizes, counts):
    "Evenly, and with other images of the class while it has some."
    rows, classes = batches_of(shuffled(*sizes), 32, 2)
    assert torch.equal(classes[..., 0], classes[..., 1])
    for batch, classes_of_batch in zip(rows.flatten(1).tolist(), classes[..., 0]):
        assert sorted(classes_of_batch.unique(return_counts=True)[1].tolist()) == counts
        assert len(set(batch)) == 32


def test_images_repeat_only_when_a_class_has_too_few():
    labels = shuffled(1, 2, 3, 7, 60)
    rows, _ = batches_of(labels, 20, 4)
    sizes = labels.bincount()
    for batch in rows:
        for own in batch:
            size = sizes[labels[own[0]]].item()
            assert sorted(own.unique(return_counts=True)[1].tolist()) == {1: [4], 2: [2, 2], 3: [1, 1, 2]}.get(size, [1] * 4)


def test_batches_by_class_depend_on_the_generator_alone():
    labels = torch.arange(1000) % 47
    first = batches_of(labels, 32, 2)[0]
    torch.manual_seed(5)
    assert torch.equal(first, batches_of(labels, 32, 2)[0]) and not torch.equal(first, batches_of(labels, 32, 2, seed=1)[0])
    generator = torch.Generator().manual_seed(0)
    epochs = [class_batches(labels, 32, 2, generator) for _ in range(2)]
    assert torch.equal(epochs[0], first.flatten(1)) and not torch.equal(*epochs)


def test_every_class_and_every_image_of_it_is_as_likely_as_any_other():
    labels = shuffled(2, 4, 6, 8, 10, 10)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([class_batches(labels, 6, 2, generator) for _ in range(1000)]).flatten().bincount(minlength=40)   # 1000 * 6 batches of 3 classes
    share = drawn * labels.bincount()[labels] / (6000 * 6)   # the share of its class if all its images were drawn as often
    assert share == pytest.approx(1 / 6, rel=0.2)            # five standard deviations of the rarest images


@pytest.mark.parametrize("batch_size, samples_per_class", [(33, 2), (42, 2), (2, 4), (0, 1), (4, 0), (4, -2)])
def test_batches_by_class_that_cannot_be(batch_size, samples_per_class):
    with pytest.raises(ValueError, match=f"40 images make no batch of {batch_size} with {samples_per_class} images per class"):
        class_batches(TRAIN.labels, batch_size, samples_per_class, torch.Generator())


@pytest.mark.parametrize("method", ["linear", "vpt_deep"])   # on features, on images
def test_a_recipe_with_samples_per_class_trains_on_batches_by_class(vit, method):
    model, r = tune(vit, method, num_classes=4), recipe("da_vpt", epochs=2, warmup_epochs=1, batch_size=6)
    data = make_resident(model, TRAIN, r, True)
    trainer, seen = Trainer(model, data, r, seed=3), []
    losses = trainer.losses
    trainer.losses = lambda x, y: seen.append((x.clone(), y.clone())) or losses(x, y)
    rates = []
    for epoch in range(2):
        trainer.epoch(epoch)
        rates.append(trainer.lr)
    generator = rng(3, "sampler")
    want = torch.cat([class_batches(TRAIN.labels, 6, 2, generator) for _ in range(2)])
    assert trainer.updates == len(want) == 12 and trainer.images_seen == 72
    assert all(torch.equal(x, data.inputs[rows]) and torch.equal(y, data.labels[rows]) for (x, y), rows in zip(seen, want, strict=True))
    assert rates == pytest.approx([learning_rates(r, 6)[u] for u in (5, 11)])


def test_training_on_batches_by_class_is_bitwise_repeatable(vit):
    r = recipe("da_vpt", epochs=2, warmup_epochs=1, batch_size=8, lr=1e-2)
    a, b, plain = (quiet(tune(vit, "vpt_deep", num_classes=4), TRAIN, recipe=x, seed=1).rows for x in (r, r, replace(r, samples_per_class=None)))
    assert a == b and a[1]["loss"] != plain[1]["loss"]


# --- losses apart ---

def test_auxiliary_and_classification_loss_are_kept_apart(vit):
    model = tune(vit, "vpt_deep", num_classes=4)
    with torch.no_grad(): want = F.cross_entropy(model(TRAIN.images), TRAIN.labels).item()
    losses = model.losses   # and a loss of its own: 0.25 times the batch's mean label
    model.losses = lambda images, labels, label_smoothing: (losses(images, labels, label_smoothing)[0], 0.25 * labels.float().mean())
    row = quiet(model, TRAIN, recipe=recipe(QUICK, lr=1e-12, epochs=1, batch_size=32)).rows[0]   # 32 + 8 images: a weighted mean
    assert row["aux_loss"] == pytest.approx(0.25 * TRAIN.labels.float().mean().item(), rel=1e-6)
    assert row["loss"] - row["aux_loss"] == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("method", ["linear", "vpt_deep"])
def test_rows_hold_the_cross_entropy_of_every_look(vit, method):
    model = tune(vit, method, num_classes=4)
    rows = quiet(model, TRAIN, VALID, recipe=recipe(QUICK, epochs=4, test_every=2, valid_every=0, eval_batch_size=7, label_smoothing=0.2), test=TEST).rows
    assert list(rows[0]) == ["epoch", "lr", "loss", "aux_loss", "valid_acc", "valid_loss", "test_acc", "test_loss"]
    assert [row["test_loss"] is None for row in rows] == [row["test_acc"] is None for row in rows] == [False, True, False, False]
    assert [row["valid_loss"] is None for row in rows] == [True, True, True, False] and {row["aux_loss"] for row in rows} == {0.0}
    for name, split in {"valid": VALID, "test": TEST}.items():   # neither smoothing nor batches change it
        assert rows[-1][f"{name}_loss"] == pytest.approx(F.cross_entropy(model(split.images), split.labels).item(), abs=1e-5)


def test_without_a_split_its_columns_are_empty(vit):
    rows = quiet(tune(vit, "linear", num_classes=4), TRAIN, recipe=QUICK).rows
    assert all(row[key] is None for row in rows for key in ("valid_acc", "valid_loss", "test_acc", "test_loss"))


# --- prepare ---

@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_prepare_sees_the_evaluation_view_of_the_training_images(vit, augment):
    wide, seen = tints(16, 3, size=36), []
    model = tune(vit, "vpt_deep", num_classes=4)
    model.prepare = lambda images, labels, draw: seen.append((images.clone(), labels))
    quiet(model, wide, VALID, recipe=recipe(QUICK, epochs=1, augment=augment), test=TEST)
    ((images, labels),) = seen
    assert torch.equal(images, wide.images[..., 2:34, 2:34]) and images.dtype == torch.uint8 and torch.equal(labels, wide.labels)


def views(vit, rows, augment="none", seed=0):
    "What `draw` gives a model that asks for some images, and the weights after an epoch."
    wide, seen = tints(40, 3, size=36), []
    model = tune(vit, "vpt_deep", num_classes=4)
    model.prepare = lambda images, labels, draw: seen.extend(draw(r) for r in rows)
    quiet(model, wide, recipe=recipe(QUICK, epochs=1, augment=augment), seed=seed)
    return wide, seen, weights(model)


def test_prepare_may_draw_images_as_training_sees_them(vit):
    rows = torch.tensor([5, 0, 5, 39])
    wide, (plain, again), _ = views(vit, [rows, rows])
    assert torch.equal(plain, wide.images[rows][..., 2:34, 2:34]) and torch.equal(plain, again)
    _, (first, second), after = views(vit, [rows, rows], "crop_flip")
    assert first.shape == (4, 3, 32, 32) and first.dtype == torch.uint8 and not torch.equal(first, second)
    windows = [w for y in range(5) for x in range(5) for w in (wide.images[5, :, y:y + 32, x:x + 32], wide.images[5, :, y:y + 32, x:x + 32].flip(-1))]
    assert all(any(torch.equal(image, window) for window in windows) for image in (*first[[0, 2]], *second[[0, 2]]))
    assert same(first, views(vit, [rows], "crop_flip")[1][0]) and not same(first, views(vit, [rows], "crop_flip", seed=1)[1][0])
    assert same(after, views(vit, [], "crop_flip")[2]), "drawing must not move the crops of the training"


TINY_SHIP = dict(num_tokens=2, num_shared=2, num_attributes=3, num_prototypes=8, num_matching=3)


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_a_method_that_must_be_prepared_first_trains(vit, augment):
    wide = tints(40, 3, size=36)
    runs = []
    for _ in range(2):
        model = tune(vit, "ship", num_classes=4, seed=1, **TINY_SHIP)
        runs.append(quiet(model, wide, VALID, recipe=recipe(QUICK, epochs=2, augment=augment, test_every=1), test=TEST, seed=1))
    assert runs[0].rows == runs[1].rows
    assert all(0 < row["aux_loss"] < row["loss"] and row["test_loss"] > 0 for row in runs[0].rows)
    assert model.config.starts[0] == 0


# --- constant features ---

def plain(model):
    "The same model, trained on images."
    model.__class__ = type("Plain", (type(model),), {"features_are_constant": False})
    return model


@pytest.mark.parametrize("changes", [{}, {"label_smoothing": 0.1}, {"drop_last": True}, {"optimizer": "adamw", "lr": 0.01}])
def test_cached_features_train_the_same_classifier(vit, changes):
    r = recipe(QUICK, epochs=6, **changes)
    fast, slow = tune(vit, "linear", num_classes=4), plain(tune(vit, "linear", num_classes=4))
    a, b = (quiet(m, TRAIN, VALID, recipe=r, test=TEST, seed=2) for m in (fast, slow))
    torch.testing.assert_close(fast.head.weight, slow.head.weight, atol=1e-5, rtol=1e-5)
    for one, other in zip(a.rows, b.rows, strict=True): assert one == pytest.approx(other, abs=1e-5)


def test_features_are_computed_once_per_image(vit):
    model, sizes = tune(vit, "linear", num_classes=4), []
    features = model.features
    model.features = lambda images: sizes.append(len(images)) or features(images)
    quiet(model, TRAIN, VALID, recipe=recipe(QUICK, eval_batch_size=32, test_every=1), test=TEST)
    assert sizes == [32, 8, 16, 24]


@pytest.mark.parametrize("changes", [{"drop_path": 0.1}, {"augment": "flip"}])
def test_random_features_are_not_cached(vit, changes):
    model = tune(vit, "linear", num_classes=4)
    r = recipe(QUICK, epochs=1, **changes)
    model.drop_path = r.drop_path
    assert not training.features_suffice(model, r)
    assert make_resident(model, TRAIN, r, True).inputs.dtype == torch.uint8
    quiet(model, TRAIN, VALID, recipe=r)


# --- image sizes and augmentation ---

def test_images_with_a_margin_are_cropped(vit):
    wide = tints(16, 3, size=36)
    centre = Split(wide.images[..., 2:34, 2:34].clone(), wide.labels)
    model = tune(vit, "vpt_deep", num_classes=4)
    assert evaluate(model, wide) == evaluate(model, centre)
    a, b = (quiet(tune(vit, "vpt_deep", num_classes=4), s, recipe=QUICK).rows for s in (wide, centre))
    assert a == b


@pytest.mark.parametrize("size", [16, 28, 64])
def test_images_of_another_size_are_refused(vit, size):
    model, wrong = tune(vit, "vpt_deep", num_classes=4), tints(16, 3, size=size)
    for call in (lambda: quiet(model, wrong, recipe=QUICK), lambda: evaluate(model, wrong), lambda: quiet(model, TRAIN, wrong, recipe=QUICK)):
        with pytest.raises(ValueError, match=f"images of {size} px .* load the task with image_size=32"): call()


@pytest.mark.parametrize("name", ["flip", "crop_flip", "random_resized_crop_flip"])
def test_augmentation_changes_training_and_repeats(vit, name):
    wide, r = tints(16, 3, size=36), recipe(QUICK, augment=name)
    a, b, c = (quiet(tune(vit, "vpt_deep", num_classes=4), wide, recipe=x, seed=s).rows for x, s in ((r, 0), (r, 0), (QUICK, 0)))
    assert a == b and a[0]["loss"] != c[0]["loss"]


# --- refusals ---

@pytest.mark.parametrize("labels, message", [([0, 4], "label 4, but the model has 4 classes"), ([-1, 0], "label -1"), ([], "is empty")])
def test_labels_are_checked_before_training(vit, labels, message):
    bad = Split(TRAIN.images[:len(labels)], torch.tensor(labels, dtype=torch.int64))
    model = tune(vit, "vpt_deep", num_classes=4)
    for name, splits in {"train": (bad,), "valid": (TRAIN, bad)}.items():
        with pytest.raises(ValueError, match=f"the {name} split .*{message}"): quiet(model, *splits, recipe=QUICK)
    with pytest.raises(ValueError, match=f"the test split .*{message}"): quiet(model, TRAIN, recipe=QUICK, test=bad)
    with pytest.raises(ValueError, match=message): evaluate(model, bad)


def test_a_split_smaller_than_a_batch_with_drop_last(vit):
    with pytest.raises(ValueError, match="40 training images make no batch of 64 with drop_last"): quiet(tune(vit, "linear", num_classes=4), TRAIN, recipe="noah")


def test_unknown_recipes_are_refused(vit):
    with pytest.raises(KeyError, match="Did you mean 'vpt'"): quiet(tune(vit, "linear", num_classes=4), TRAIN, recipe="vtp")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_the_epoch(vit, value):
    model, steps = tune(vit, "vpt_deep", num_classes=4), []
    losses = model.losses
    model.after_step = steps.append
    model.losses = lambda *a, **k: [loss * (value if len(steps) == 4 else 1) for loss in losses(*a, **k)]
    with pytest.raises(FloatingPointError, match=r"vpt_deep: loss (nan|inf) in epoch 1 at learning rate .* smaller lr"): quiet(model, TRAIN, recipe=QUICK)
    assert len(steps) == 6   # three updates an epoch


def test_weights_that_are_not_finite_stop_the_epoch(vit):
    model = tune(vit, "vpt_deep", num_classes=4)
    def spoil(step):
        if step == 8: model.head.weight.data[0, 0] = math.nan   # after the last loss of the run
    model.after_step = spoil
    with pytest.raises(FloatingPointError, match="epoch 2"): quiet(model, TRAIN, recipe=QUICK)


def test_evaluate_refuses_logits_that_are_not_finite(vit):
    model = tune(vit, "vpt_deep", num_classes=4)
    model.head.bias.data[1] = math.inf
    with pytest.raises(FloatingPointError, match="logits of 24 of 24 images"): evaluate(model, TEST)


# --- evaluation ---

def test_evaluate_counts_right_answers_and_keeps_the_mode(vit):
    model = tune(vit, "vpt_deep", num_classes=4).train()
    want = 100 * (model.eval()(TEST.images).argmax(1) == TEST.labels).float().mean().item()
    for batch_size in (1, 7, 24, 256):
        model.train()
        assert evaluate(model, TEST, batch_size) == pytest.approx(want)
        assert model.training
    model.eval()
    evaluate(model, TEST)
    assert not model.training


def test_training_goes_on_after_an_evaluation(vit):
    "Keys and values remembered in evaluation must not reach the next training step."
    rows = [quiet(tune(vit, "vpt_deep", num_classes=4), TRAIN, VALID, recipe=recipe(QUICK, valid_every=every)).rows for every in (0, 1)]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert [row["valid_acc"] is None for row in rows[0]] == [True, True, False]
    assert rows[0][-1] == rows[1][-1]


def test_noah_looks_at_the_test_set_eleven_times(vit):
    h = quiet(tune(vit, "linear", num_classes=4), TRAIN, recipe=recipe("noah", drop_path=0.0, drop_last=False), test=TEST)
    assert h.num_test_evaluations == 11 and len(h.rows) == 100
    assert [row["epoch"] for row in h.rows if row["test_acc"] is not None] == [*range(0, 100, 10), 99]
    assert h.acc_best_test >= h.acc == h.rows[-1]["test_acc"] and h.valid_acc is None


# --- history ---

def history(accs=(50.0, None, 80.0, 75.0), auxiliary=0.0):
    rows = [dict(epoch=e, lr=0.1, loss=1.0 / (e + 1), aux_loss=auxiliary, valid_acc=None, valid_loss=None, test_acc=a, test_loss=a and 1 - a / 100)
            for e, a in enumerate(accs)]
    return History(rows, "vpt_deep", QUICK, 0, "cpu", 2.0, 3.0, 20.0, 100.0)


def test_history_tells_the_protocols_apart():
    h = history()
    assert (h.acc, h.acc_best_test, h.num_test_evaluations, h.valid_acc) == (75.0, 80.0, 3, None)
    never = history([None, None])
    assert (never.acc, never.acc_best_test, never.num_test_evaluations) == (None, None, 0)


def test_history_survives_json(vit):
    h = quiet(tune(vit, "linear", num_classes=4), TRAIN, VALID, recipe=QUICK, test=TEST)
    assert from_dict(History, json.loads(json.dumps(to_dict(h), allow_nan=False))) == h
    assert 0 < h.seconds <= h.total_seconds and h.images_per_second == pytest.approx(120 / h.seconds) and h.peak_memory_mb > 10


def test_history_writes_and_draws(tmp_path):
    h = history()
    h.to_csv(tmp_path/"curves"/"history.csv")
    assert [p.name for p in (tmp_path/"curves").iterdir()] == ["history.csv"]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/"curves"/"history.csv"), h.frame, check_dtype=False)
    loss, accuracy = h.plot()
    assert list(loss.lines[0].get_ydata()) == [1, 1/2, 1/3, 1/4]
    assert list(loss.lines[1].get_xdata()) == [0, 2, 3] and list(loss.lines[1].get_ydata()) == pytest.approx([0.5, 0.2, 0.25])
    assert list(accuracy.lines[0].get_xdata()) == [0, 2, 3]
    assert [len(h.plot()[0].lines) for h in (history([None, None]), history(auxiliary=0.1))] == [1, 3]   # cross-entropy apart where they differ
    assert "vpt_deep, seed 0, cpu" in h._repr_html_() and len(history([None] * 50)._repr_html_()) < 4000


# --- selection and final runs ---

class Factory:
    "Makes models and remembers for which seeds; fails at the call number `stop`."
    def __init__(self, vit, method="linear", stop=None, **config): self.vit, self.method, self.config, self.stop, self.seeds = vit, method, config, stop, []

    def __call__(self, seed, **config):
        if len(self.seeds) == self.stop: raise KeyboardInterrupt
        self.seeds.append(seed)
        return tune(self.vit, self.method, num_classes=4, seed=seed, **{**self.config, **config})


@pytest.fixture
def trained(monkeypatch):
    "How often the loop really ran."
    runs, fit_ = [], training._fit
    monkeypatch.setattr(training, "_fit", lambda *a: runs.append(a) or fit_(*a))
    return runs


def chosen(vit, candidates, method="linear", **kwargs):
    return select(Factory(vit, method), TRAIN, VALID, candidates, progress=False, device="cpu", **kwargs)


def test_select_takes_the_best_last_epoch(vit):
    recipes = grid(QUICK, lr=[1e-9, 1.0])
    best, trials = chosen(vit, recipes)
    assert best == recipes[1] and list(trials.chosen) == [False, True] and list(trials.columns) == ["lr", "valid_acc", "status", "chosen"]
    model = tune(vit, "linear", num_classes=4)
    assert trials.valid_acc[1] == quiet(model, TRAIN, VALID, recipe=recipes[1].recipe).valid_acc == evaluate(model, VALID)


def test_select_chooses_settings_of_the_method(vit, tmp_path, trained):
    candidates = grid(QUICK, lr=[0.1, 1e-9], **{"config.num_tokens": [3, 1]})
    best, trials = chosen(vit, candidates, "vpt_deep", cache=tmp_path)
    assert list(trials.columns) == ["lr", "config.num_tokens", "valid_acc", "status", "chosen"]
    assert list(trials["config.num_tokens"]) == [3, 1, 3, 1] and list(trials.lr) == [1e-9, 1e-9, 0.1, 0.1]
    model = tune(vit, "vpt_deep", num_classes=4, **best.config)
    assert len(trained) == len(list(tmp_path.iterdir())) == 4   # one remembered trial per setting
    chosen(vit, candidates, "vpt_deep", cache=tmp_path)
    assert len(trained) == 4
    assert trials.valid_acc[candidates.index(best)] == quiet(model, TRAIN, VALID, recipe=best.recipe).valid_acc == trials.valid_acc.max()


def test_settings_of_a_method_that_is_not_prepared_yet_are_told_apart(vit, tmp_path, trained):
    "SHIP has no prompts before `prepare`: the weights of its trials are equal, their settings are not."
    candidates = [Candidate(recipe(QUICK, epochs=1), {**TINY_SHIP, "threshold": t, "lambda_d": d}) for t in (0.9, 0.99) for d in (0.1, 0.2)]
    best, trials = chosen(vit, candidates, "ship", cache=tmp_path)
    assert len(trained) == len(list(tmp_path.iterdir())) == 4 and list(trials.columns)[:2] == ["config.threshold", "config.lambda_d"]


def test_an_unknown_setting_of_the_method_is_an_error(vit):
    with pytest.raises(TypeError, match="unknown key 'num_token'.*Did you mean 'num_tokens'"): chosen(vit, grid(QUICK, **{"config.num_token": [1, 2]}), "vpt_deep")


def test_ties_go_to_the_smaller_rate(vit):
    tied = [Candidate(recipe(QUICK, lr=lr, weight_decay=d)) for lr in (1e-9, 1e-12, 1e-10) for d in (0.1, 0.0)]
    best, trials = chosen(vit, tied)
    assert trials.valid_acc.nunique() == 1 and (best.recipe.lr, best.recipe.weight_decay) == (1e-12, 0.1)
    tied = [Candidate(recipe(QUICK, lr=lr), {"dropout": d}) for lr in (1e-10, 1e-12) for d in (0.2, 0.1)]   # the first of the smallest rate
    best, trials = chosen(vit, tied, "vpt_deep")
    assert trials.valid_acc.nunique() == 1 and best == tied[2]


def test_diverged_trials_are_shown_and_never_chosen(vit):
    bad, good = Candidate(recipe(QUICK, lr=1e38)), Candidate(recipe(QUICK, lr=0.1))
    best, trials = chosen(vit, [bad, good])
    assert best == good and list(trials.status) == ["diverged", "success"] and math.isnan(trials.valid_acc[0])
    with pytest.raises(FloatingPointError, match="all 1 candidates diverged.*smaller lr than 1e"): chosen(vit, [bad])
    with pytest.raises(ValueError, match="no candidates"): chosen(vit, [])


def test_an_interrupted_selection_loses_no_finished_trial(vit, tmp_path, trained):
    recipes = grid(QUICK, lr=[0.01, 0.1, 1.0, 1e38])
    with pytest.raises(KeyboardInterrupt): select(Factory(vit, stop=2), TRAIN, VALID, recipes, cache=tmp_path, progress=False, device="cpu")
    assert len(list(tmp_path.iterdir())) == len(trained) == 2
    best, trials = chosen(vit, recipes, cache=tmp_path)
    assert len(trained) == 4
    want, table = chosen(vit, recipes)
    assert best == want
    pd.testing.assert_frame_equal(trials, table)
    trained.clear()
    chosen(vit, recipes, cache=tmp_path)
    assert not trained   # the diverged one is remembered too


def test_final_runs_resume_and_equal_uninterrupted_ones(vit, tmp_path, trained):
    def final(factory, **kwargs): return run_seeds(factory, TRAIN, TEST, QUICK, [4, 5, 6], progress=False, device="cpu", **kwargs)
    with pytest.raises(KeyboardInterrupt): final(Factory(vit, "vpt_deep", stop=1), cache=tmp_path)
    resumed, whole = final(Factory(vit, "vpt_deep"), cache=tmp_path), final(Factory(vit, "vpt_deep"))
    assert len(trained) == 1 + 2 + 3
    assert [h.rows for h in resumed] == [h.rows for h in whole] and [h.seed for h in resumed] == [4, 5, 6]
    assert len({h.rows[-1]["loss"] for h in whole}) == 3 and all(h.num_test_evaluations == 1 for h in whole)
    kept = next(tmp_path.iterdir())
    assert read_json(kept).keys() == {"status", "history"} and kept.stat().st_size < 4000   # a history, no weights


def test_a_final_run_that_diverges_is_an_error(vit):
    with pytest.raises(FloatingPointError, match="smaller lr"):
        run_seeds(Factory(vit), TRAIN, TEST, recipe(QUICK, lr=1e38), [0], progress=False, device="cpu")


def test_remembered_runs_know_what_they_depend_on(vit, tmp_path, trained):
    def run(factory=Factory(vit), train=TRAIN, r=QUICK, seed=0): run_seeds(factory, train, TEST, r, [seed], cache=tmp_path, progress=False, device="cpu")
    run()
    flipped = Split(TRAIN.images.flip(-1), TRAIN.labels)
    relabelled = Split(TRAIN.images, TRAIN.labels.flip(0))
    other = load_backbone("tiny_random")
    other.blocks[0].attn.qkv.weight.data[0, 0] += 1e-3
    for change in (dict(seed=1), dict(train=flipped), dict(train=relabelled), dict(r=replace(QUICK, lr=0.3)), dict(factory=Factory(other)),
                   dict(factory=Factory(vit, "vpt_deep")), dict(factory=Factory(vit, "vpt_deep", dropout=0.1))):
        before = len(trained)
        run(**change)
        assert len(trained) == before + 1, change
        run(**change)
        assert len(trained) == before + 1, change


def test_a_damaged_remembered_run_is_named(vit, tmp_path):
    chosen(vit, [Candidate(QUICK)], cache=tmp_path)
    path = next(tmp_path.iterdir())
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=path.name): chosen(vit, [Candidate(QUICK)], cache=tmp_path)


def test_selection_computes_constant_features_once(vit, monkeypatch):
    calls, features = [], training._features
    monkeypatch.setattr(training, "_features", lambda *a: calls.append(a) or features(*a))
    chosen(vit, grid(QUICK, lr=[0.01, 0.1, 1.0]))
    assert len(calls) == 2   # train and valid


def test_tensor_digest_sees_values_shapes_and_types():
    x = torch.arange(6.0)
    variants = [[x], [x.view(2, 3)], [x.double()], [x + 1e-7], [x[:3], x[3:]], [x.bfloat16()], [torch.tensor(1.0)], []]
    digests = [tensor_digest(v) for v in variants]
    assert len(set(digests)) == len(digests) and tensor_digest([x.view(2, 3).T.contiguous().T]) == digests[1]


# --- CUDA ---

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_cuda
@pytest.mark.parametrize("name", ["vpt", "noah"])
def test_no_host_sync_inside_an_epoch(vit, name):
    model, r = tune(load_backbone("tiny_random"), "vpt_deep", num_classes=4).to("cuda"), recipe(name, batch_size=16, clip_value=1.0)
    model.drop_path = r.drop_path
    trainer = Trainer(model, make_resident(model, TRAIN, r, True), r, 0)
    trainer.epoch(0)
    model.train()
    rows = torch.arange(16, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try: [trainer._update(1, rows) for _ in range(3)]
    finally: torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_cuda_trains_in_bf16_and_repeats_the_order(vit):
    rows = {d: fit(tune(load_backbone("tiny_random"), "vpt_deep", num_classes=4), TRAIN, VALID, QUICK, TEST, device=d, progress=False) for d in ("cpu", "cuda")}
    assert rows["cuda"].device.startswith("cuda") and rows["cuda"].peak_memory_mb > 0
    assert [r["loss"] for r in rows["cuda"].rows] == pytest.approx([r["loss"] for r in rows["cpu"].rows], abs=0.05)
