"""The training loop: determinism, modes, protocols, features of augmented images, checkpoints, refusals."""
import json
import math
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from hierprompt.backbones.pretrained import load_backbone
from hierprompt.clip.model import load_clip
from hierprompt.clip.prompted import tune_clip
from hierprompt.core import from_dict, rng, to_dict
from hierprompt.data.tasks import Split
from hierprompt.engine.tuned import tune
from hierprompt.training import loop as training
from hierprompt.training.loop import History, Resident, Trainer, class_batches, evaluate, fit, make_resident
from hierprompt.training.recipes import learning_rates, recipe

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


@pytest.mark.parametrize(
    "images, drop_last, updates",
    [(1000, True, 15), (1000, False, 16), (800, True, 12), (64, True, 1), (10, False, 1), (10, True, 1), (65, True, 1)],
)
def test_updates_per_epoch(vit, images, drop_last, updates):
    split = Split(torch.zeros(images, 3, 32, 32, dtype=torch.uint8), torch.arange(images) % 4)
    model, r = tune(vit, "linear", num_classes=4), recipe("vpt", lr=1e-3, drop_last=drop_last, epochs=1, warmup_epochs=0)
    trainer = Trainer(model, make_resident(model, split, r, True), r, 0)
    trainer.epoch(0)
    assert trainer.updates == updates
    assert trainer.images_seen == (min(updates * 64, images) if drop_last else images)   # an only batch is never dropped (Adapt spec 2.0)


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
    model.begin = lambda epochs, updates: calls.append(("begin", epochs, updates))
    model.before_step = lambda step: calls.append(("gradients", step))
    model.after_step = lambda step, optimizer: calls.append(("step", step))
    model.after_epoch = lambda epoch: calls.append(("epoch", epoch))
    quiet(model, TRAIN, recipe=recipe(QUICK, epochs=2), seed=3)
    with training.seeded(3, "kmeans", torch.device("cpu")): draw = torch.rand(1).item()
    assert calls[0] == ("prepare", (40, 3, 32, 32), torch.uint8, draw)
    steps = [[call for s in range(first, first + 3) for call in (("gradients", s), ("step", s))] for first in (0, 3)]
    assert calls[1:] == [("begin", 2, 3), *steps[0], ("epoch", 0), *steps[1], ("epoch", 1)]


def test_hooks_see_gradients_with_the_weights_that_made_them_and_then_the_optimizer(vit):
    model, before, after = tune(vit, "vpt_deep", num_classes=4), [], []
    def memory(optimizer): return [optimizer.state[p]["momentum_buffer"].clone() for p in model.trainable().values()]
    model.before_step = lambda step: before.append((weights(model), [p.grad.clone() for p in model.trainable().values()]))
    model.after_step = lambda step, optimizer: after.append((weights(model), memory(optimizer)))
    quiet(
        model,
        TRAIN,
        recipe=recipe(QUICK, lr=0.5, lr_batch=None, weight_decay=0.0, clip_value=1e-3, batch_size=40, epochs=2, precision="fp32"),
    )
    (start, first), (middle, second) = before
    assert max(g.abs().max().item() for g in first) == pytest.approx(1e-3) and same(middle, after[0][0]) and same(first, after[0][1])
    for w, g, m, end, m_end in zip(middle, second, after[0][1], *after[1], strict=True):
        torch.testing.assert_close(m_end, 0.9 * m + g)
        torch.testing.assert_close(end, w - 0.25 * m_end)   # the second of two epochs of the cosine


class Numbers(torch.nn.Module):
    "Every number comes closer to a goal of its own; every other update one of them leaves, really or only behind a mask."
    method, config, features_are_constant, device = "numbers", QUICK, False, torch.device("cpu")

    def __init__(self, compact):
        super().__init__()
        self.compact, self.numbers, self.head = compact, torch.nn.Parameter(torch.linspace(-1, 1, 8)), torch.nn.Linear(1, 1)
        self.register_buffer("left", torch.ones(8, dtype=torch.bool))

    def param_groups(self, lr, weight_decay, head_lr, head_weight_decay, vectors):
        return [{"params": [self.numbers], "lr": lr, "weight_decay": weight_decay}]

    def losses(self, images, labels, label_smoothing):
        goal = torch.arange(8) * images.float().mean()
        errors = (self.numbers - goal[self.left]) ** 2 if self.compact else ((self.numbers - goal) ** 2)[self.left]
        return errors.sum(), errors.new_zeros(())

    tuner = property(lambda self: self)
    def trainable(self): return {"numbers": self.numbers}
    def restore(self, tensors): pass
    def memory(self): return {}
    def recall(self, memory): pass
    def survivors(self): return self.numbers.detach().clone() if self.compact else self.numbers.detach()[self.left]
    def begin(self, epochs, updates_per_epoch): pass
    def before_step(self, step): pass
    def after_epoch(self, epoch): pass

    def after_step(self, step, optimizer):
        if step % 2 == 0 or self.left.sum() == 2: return
        was, lost = self.left.clone(), int(self.left.nonzero()[3 * step % int(self.left.sum())])
        self.left[lost] = False
        if self.compact:
            rows, memory = self.left[was], optimizer.state[self.numbers]
            self.numbers.data, memory["momentum_buffer"] = self.numbers.data[rows], memory["momentum_buffer"][rows]


def numbers(compact, **changes):
    data = Resident(torch.rand(6, 3, 1, 1, generator=torch.Generator().manual_seed(0)), torch.zeros(6, dtype=torch.int64), 1)
    return Trainer(Numbers(compact), data, recipe("vpt", lr=0.02, lr_batch=None, batch_size=2, epochs=4, warmup_epochs=0, **changes), 0)


def test_parameters_may_shrink_while_they_train():
    "Adapt spec 1.9 and 6 (19): with momentum that follows, survivors move as if the others were only masked."
    masked, compact = numbers(False), numbers(True)
    for epoch in range(4):
        assert masked.epoch(epoch) == compact.epoch(epoch)
        assert torch.equal(masked.model.survivors(), compact.model.survivors())
    assert masked.model.numbers.shape == (8,) and compact.model.numbers.shape == (2,)
    compact.model.numbers.data[1] = math.nan
    with pytest.raises(FloatingPointError, match="numbers: loss nan in epoch 3"): compact.epoch(3)


def test_a_model_that_trains_nothing_is_only_looked_at(vit):
    "Zero-shot CLIP: one epoch without a step."
    model = tune(vit, "linear", num_classes=4)
    model.param_groups = lambda **kwargs: []
    before = {name: t.clone() for name, t in model.state_dict().items()}
    h = quiet(model, TRAIN, VALID, recipe="zero_shot", test=TEST)
    assert len(h.rows) == 1 and h.acc == evaluate(model, TEST) and h.valid_acc == evaluate(model, VALID)
    assert h.rows[0]["loss"] == pytest.approx(F.cross_entropy(model(TRAIN.images), TRAIN.labels).item(), abs=1e-5)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


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
    full, half = (
        quiet(tune(vit, "vpt_deep", num_classes=4), TRAIN, recipe=recipe(QUICK, precision=p)).rows[-1]["loss"] for p in ("fp32", "bf16")
    )
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


@pytest.mark.parametrize(
    "labels",
    [torch.arange(1000) % 47, shuffled(*[20] * 16), shuffled(*range(2, 40)), torch.arange(200) % 100],
    ids=["47", "16", "uneven", "100"],
)
def test_a_batch_has_sixteen_classes_and_two_images_of_each(labels):
    rows, classes = batches_of(labels, 32, 2)
    assert torch.equal(classes[..., 0], classes[..., 1])
    assert all(len(set(batch)) == 16 for batch in classes[..., 0].tolist())
    assert all(len(set(batch)) == 32 for batch in rows.flatten(1).tolist())


@pytest.mark.parametrize(
    "sizes, counts", [((40, 40, 40, 40), [4, 4, 4, 4]), ((30, 50, 20), [5, 5, 6]), ((90,), [16]), ((9,) * 10, [1] * 4 + [2] * 6)]
)
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
    # 1000 * 6 batches of 3 classes
    drawn = torch.stack([class_batches(labels, 6, 2, generator) for _ in range(1000)]).flatten().bincount(minlength=40)
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
    a, b, plain = (
        quiet(tune(vit, "vpt_deep", num_classes=4), TRAIN, recipe=x, seed=1).rows for x in (r, r, replace(r, samples_per_class=None))
    )
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
    rows = quiet(
        model, TRAIN, VALID, recipe=recipe(QUICK, epochs=4, test_every=2, valid_every=0, eval_batch_size=7, label_smoothing=0.2), test=TEST
    ).rows
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
    windows = [
        w
        for y in range(5)
        for x in range(5)
        for w in (wide.images[5, :, y : y + 32, x : x + 32], wide.images[5, :, y : y + 32, x : x + 32].flip(-1))
    ]
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


# --- features of augmented images ---

WIDE = tints(40, 3, size=36)


@pytest.mark.parametrize("augment", ["flip", "crop_flip", "random_resized_crop_flip"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_size": 12, "eval_batch_size": 30, "drop_last": True, "label_smoothing": 0.1},
        {"batch_size": 8, "eval_batch_size": 20, "samples_per_class": 2, "drop_last": True},
        {"batch_size": 1, "epochs": 1},
    ],
)
def test_features_of_augmented_images_train_the_same_classifier(vit, augment, changes):
    split = TRAIN if augment == "flip" else WIDE
    r = recipe(QUICK, augment=augment, **changes)
    fast, slow = tune(vit, "linear", num_classes=4), plain(tune(vit, "linear", num_classes=4))
    a, b = (quiet(m, split, VALID, recipe=r, test=TEST, seed=2) for m in (fast, slow))
    torch.testing.assert_close(fast.head.weight, slow.head.weight, atol=1e-5, rtol=1e-5)
    for one, other in zip(a.rows, b.rows, strict=True): assert one == pytest.approx(other, abs=1e-5)


def shown(vit, on_features, **changes):
    "The images of two epochs, in the order in which the backbone sees them, and how many at a time."
    model, seen = tune(vit, "linear", num_classes=4), []
    r = recipe(QUICK, augment="random_resized_crop_flip", batch_size=8, **changes)
    if not on_features: plain(model)
    trainer = Trainer(model, make_resident(model, WIDE, r, True), r, 0)
    normalise = model.normalise
    model.normalise = lambda images: seen.append(images) or normalise(images)
    for epoch in range(2): trainer.epoch(epoch)
    return torch.cat(seen), [len(images) for images in seen]


def test_crops_do_not_depend_on_how_many_images_the_backbone_sees_at_once(vit):
    images, sizes = shown(vit, False)
    assert sizes == [8] * 10 and not torch.equal(images[:40], images[40:])
    for eval_batch_size, want in {256: [40] * 2, 30: [24, 16] * 2, 8: [8] * 10, 5: [5, 3] * 10}.items():
        ahead, sizes = shown(vit, True, eval_batch_size=eval_batch_size)
        assert sizes == want and torch.equal(ahead, images)


def test_crops_are_cut_in_full_precision(vit):
    "Coordinates in bfloat16 would be off by a pixel."
    assert torch.equal(shown(vit, False, precision="bf16")[0], shown(vit, False, precision="fp32")[0])


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_features_may_have_any_shape(vit, augment):
    "One vector per token, as local features of CLIP; the loss gets them whole, with the smoothing, and evaluation scores them."
    model, seen = tune(vit, "linear", num_classes=4), []
    model.features = lambda images: model.tokens(images)[:, :5]
    model.head.forward = lambda x: x.flatten(1).mean(1, keepdim=True) * model.head.weight[:, 0] + model.head.bias
    def losses(features, labels, label_smoothing):
        seen.append((tuple(features.shape), features.dtype, features.requires_grad, features.is_inference(), label_smoothing))
        return F.cross_entropy(model.head(features), labels), features.new_full((), 0.25)
    model.losses_from_features = losses
    row = quiet(model, TRAIN, VALID, recipe=recipe(QUICK, augment=augment, label_smoothing=0.3, epochs=1), seed=1).rows[0]
    assert seen == [((n, 5, 64), torch.float32, False, False, 0.3) for n in (16, 16, 8)]
    assert row["aux_loss"] == 0.25 and row["valid_loss"] > 0 and not model.training


# --- checkpoints ---

def trainer_of(vit, method, config=None, **changes):
    if method == "numbers": return numbers(True)
    model, r = tune(vit, method, num_classes=4, seed=1, **(config or {})), recipe(QUICK, batch_size=8, **changes)
    with training.seeded(2, "kmeans", torch.device("cpu")): model.prepare(WIDE.images[..., 2:34, 2:34], WIDE.labels)
    return Trainer(model, make_resident(model, WIDE, r, True), r, 2)


RUNS = {
    "ship": ("ship", TINY_SHIP),
    "ship_late": ("ship", {**TINY_SHIP, "pml_start_epoch": 1}),
    "da_vpt": ("da_vpt", {}, dict(samples_per_class=2, drop_last=True)),
    "vpt": ("vpt_deep", {"num_tokens": 2, "dropout": 0.1}),
    "shrinking": ("numbers",),
    "classes": ("vpt_shallow", {}, dict(samples_per_class=2, drop_last=True)),
    "adamw": ("adapter", {"dropout": 0.1}, dict(optimizer="adamw", lr=0.01, augment="crop_flip")),
    "none": ("linear",),
    "features": ("linear", {}, dict(augment="random_resized_crop_flip", eval_batch_size=20)),
    "timm": ("vpt_deep", {}, dict(augment="flip_rand_augment", mixup=0.8, cutmix=1.0, erasing=0.5, ema=0.9, label_smoothing=0.1)),
    "mixed_features": ("linear", {}, dict(mixup=0.8, cutmix=1.0, erasing=0.5, ema=0.9, momentum=0.0, eval_batch_size=20)),
}


def finish(trainer):
    rows = [trainer.epoch(e) for e in range(trainer.epochs_done, trainer.recipe.epochs)]
    averages = [] if trainer.average is None else [t.clone() for t in trainer.average.kept.values()]
    return rows, [p.detach().clone() for p in trainer._weights()] + averages


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_goes_on_bitwise(vit, tmp_path, name):
    "Adapt spec 6, invariant 20: stopped between epochs, or in the middle or at the end of the second one."
    method, config, changes = (*RUNS[name], {}, {})[:3]
    def make(): return trainer_of(vit, method, config, **changes)
    torch.manual_seed(0)
    whole = make()
    rows, end = finish(whole)
    for after in (0, 2, 3) if name == "shrinking" else (0, 3, 5):   # of 3 and 5 updates an epoch
        torch.manual_seed(0)
        stopped = make()
        first = stopped.epoch(0)
        for _, update in zip(range(after), stopped.steps(1)): pass
        assert stopped.done == after and stopped.epochs_done == 1
        stopped.save_checkpoint(tmp_path/"run.safetensors")
        torch.manual_seed(99)
        going_on = make()
        going_on.load_checkpoint(tmp_path/"run.safetensors")
        rest, weights_then = finish(going_on)
        assert [first, *rest] == rows and same(weights_then, end), after
        assert (going_on.updates, going_on.images_seen) == (whole.updates, whole.images_seen)


def test_a_state_is_a_copy(vit):
    torch.manual_seed(0)
    trainer = trainer_of(vit, "vpt_deep", {"dropout": 0.1})
    trainer.epoch(0)
    steps = trainer.steps(1)
    next(steps)
    state = trainer.state()
    ends = [finish(trainer)]
    for _ in range(2):
        trainer.restore(state)
        ends.append(finish(trainer))
    assert ends[0][0] == ends[1][0] == ends[2][0] and same(ends[0][1], ends[1][1]) and same(ends[1][1], ends[2][1])


# --- models on CLIP ---

NAMES = ["cat", "red square", "green tree", "river"]
ON_CLIP = {"coop": dict(n_ctx=4), "adapt": dict(target=60, period=3, per_event=8, warmup_epochs=0, adapt_period=False)}


@pytest.fixture(scope="module")
def clip(): return load_clip("tiny_clip")


def on_clip(clip, method, augment, **changes):
    model = tune_clip(clip, method, NAMES, seed=1, **ON_CLIP[method])
    r = recipe("adapt", epochs=3, batch_size=8, augment=augment, **changes)
    return Trainer(model, make_resident(model, TRAIN, r, True), r, 2)


@pytest.mark.parametrize("method, augment", [("coop", "random_resized_crop_flip"), ("coop", "none"), ("adapt", "random_resized_crop_flip")])
def test_an_interrupted_run_on_clip_goes_on_bitwise(clip, tmp_path, method, augment):
    "Adapt spec 6, invariant 20: also in the middle of a window of scores, and when prompts have gone since."
    whole = on_clip(clip, method, augment)
    rows, end = finish(whole)
    for after in (0, 2, 5):
        stopped = on_clip(clip, method, augment)
        stopped.epoch(0)
        for _, update in zip(range(after), stopped.steps(1)): pass
        stopped.save_checkpoint(tmp_path/"run.safetensors")
        going_on = on_clip(clip, method, augment)
        going_on.load_checkpoint(tmp_path/"run.safetensors")
        rest, then = finish(going_on)
        assert rest == rows[1:] and same(then, end), after
        assert going_on.model.diagnostics(TEST.images) == whole.model.diagnostics(TEST.images)
    if method == "adapt": assert whole.model.tuner.pruning.count == 60 and 60 < stopped.model.tuner.pruning.count < 96


@pytest.mark.parametrize("changes", [{}, {"label_smoothing": 0.1, "eval_batch_size": 20}])
def test_texts_train_on_features_of_crops_as_on_the_crops(clip, changes):
    ahead, plainly = on_clip(clip, "coop", "random_resized_crop_flip", **changes), on_clip(
        clip, "coop", "random_resized_crop_flip", **changes
    )
    plainly.on_features, plainly.losses = False, partial(plainly.model.losses, label_smoothing=plainly.recipe.label_smoothing)
    assert ahead.on_features and ahead.model.features_are_constant
    for epoch in range(3): assert ahead.epoch(epoch) == pytest.approx(plainly.epoch(epoch), abs=1e-5)
    torch.testing.assert_close(ahead._weights(), plainly._weights(), atol=1e-6, rtol=1e-4)


def test_zero_shot_clip_is_fitted_in_one_look(clip, caplog):
    model = tune_clip(clip, "zero_shot", NAMES)
    h = quiet(model, TRAIN, recipe="zero_shot", test=TEST)
    assert len(h.rows) == 1 and h.acc == evaluate(model, TEST) and not caplog.records


# --- checkpoints that are refused ---

@pytest.mark.parametrize("kwargs, message", [
    (dict(method="adapter"), "method = vpt_deep, this run adapter"),
    (dict(method="vpt_deep", config={"num_tokens": 3}), "has config = .*'num_tokens': 10"),
    (dict(method="vpt_deep", lr=0.3), "has recipe = .*'lr': 0.2.* this run .*'lr': 0.3")])
def test_a_checkpoint_of_another_run_is_refused(vit, kwargs, message):
    state = trainer_of(vit, "vpt_deep").state()
    with pytest.raises(ValueError, match=message): trainer_of(vit, **kwargs).restore(state)


def test_checkpoints_that_do_not_fit_or_are_damaged(vit, tmp_path):
    trainer, path = trainer_of(vit, "vpt_deep"), tmp_path/"run.safetensors"
    state = trainer.state()
    state["tensors"]["model.other"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"does not fit the model: they differ in \['model.other'\]"): trainer.restore(state)
    trainer.save_checkpoint(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="run.safetensors is no complete checkpoint"): trainer.load_checkpoint(path)
    with pytest.raises(FileNotFoundError): trainer.load_checkpoint(tmp_path/"absent.safetensors")


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
    for call in (
        lambda: quiet(model, wrong, recipe=QUICK),
        lambda: evaluate(model, wrong),
        lambda: quiet(model, TRAIN, wrong, recipe=QUICK),
    ):
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


def test_a_split_smaller_than_a_batch_of_classes(vit):
    with pytest.raises(ValueError, match="40 images make no batch of 64 with 2 images per class"):
        quiet(tune(vit, "linear", num_classes=4), TRAIN, recipe=recipe("da_vpt", batch_size=64))


def test_unknown_recipes_are_refused(vit):
    with pytest.raises(KeyError, match="Did you mean 'vpt'"): quiet(tune(vit, "linear", num_classes=4), TRAIN, recipe="vtp")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_the_epoch(vit, value):
    model, steps = tune(vit, "vpt_deep", num_classes=4), []
    losses = model.losses
    model.after_step = lambda step, optimizer: steps.append(step)
    model.losses = lambda *a, **k: [loss * (value if len(steps) == 4 else 1) for loss in losses(*a, **k)]
    with pytest.raises(FloatingPointError, match=r"vpt_deep: loss (nan|inf) in epoch 1 at learning rate .* smaller lr"):
        quiet(model, TRAIN, recipe=QUICK)
    assert len(steps) == 6   # three updates an epoch


def test_weights_that_are_not_finite_stop_the_epoch(vit):
    model = tune(vit, "vpt_deep", num_classes=4)
    def spoil(step, optimizer):
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
    rows = [
        dict(
            epoch=e,
            lr=0.1,
            loss=1.0 / (e + 1),
            aux_loss=auxiliary,
            valid_acc=None,
            valid_loss=None,
            test_acc=a,
            test_loss=a and 1 - a / 100,
        )
        for e, a in enumerate(accs)
    ]
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
    # cross-entropy apart where they differ
    assert [len(h.plot()[0].lines) for h in (history([None, None]), history(auxiliary=0.1))] == [1, 3]
    assert "vpt_deep, seed 0, cpu" in h._repr_html_() and len(history([None] * 50)._repr_html_()) < 4000


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
    try: [trainer._update(1, *trainer._inputs(rows)) for _ in range(3)]
    finally: torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_cuda_trains_in_bf16_and_repeats_the_order(vit):
    rows = {
        d: fit(tune(load_backbone("tiny_random"), "vpt_deep", num_classes=4), TRAIN, VALID, QUICK, TEST, device=d, progress=False)
        for d in ("cpu", "cuda")
    }
    assert rows["cuda"].device.startswith("cuda") and rows["cuda"].peak_memory_mb > 0
    assert [r["loss"] for r in rows["cuda"].rows] == pytest.approx([r["loss"] for r in rows["cpu"].rows], abs=0.05)


@needs_cuda
def test_cuda_goes_on_from_a_checkpoint(vit, tmp_path):
    def make():
        return Trainer(
            model := tune(load_backbone("tiny_random"), "vpt_deep", num_classes=4, dropout=0.1).to("cuda"),
            make_resident(model, TRAIN, QUICK, True),
            QUICK,
            0,
        )
    torch.manual_seed(0)
    rows, end = finish(make())
    torch.manual_seed(0)
    stopped = make()
    next(stopped.steps(0))
    stopped.save_checkpoint(tmp_path/"run.safetensors")
    torch.manual_seed(99)
    going_on = make()
    going_on.load_checkpoint(tmp_path/"run.safetensors")
    rest, then = finish(going_on)
    assert rest == rows and same(then, end)
