"Mixed and erased images, RandAugment, averaged weights: against timm, by hand, and through the loop."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import auto_augment, mixup
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV2
from torchvision.transforms.v2 import functional as TF

from hierprompt.core import rng
from hierprompt.data.preprocess import OPERATIONS, STRENGTH, augment, rand_augment, random_erase
from hierprompt.data.tasks import Split
from hierprompt.engine.tuned import tune
from hierprompt.training.averages import Average
from hierprompt.training.batches import mix, window
from hierprompt.training.loop import Trainer, evaluate, fit, make_resident
from hierprompt.training.recipes import Recipe, recipe, set_rate

QUICK = recipe("vpt", lr=0.2, epochs=2, warmup_epochs=0, batch_size=16)


def generator(seed=0): return torch.Generator().manual_seed(seed)


def pictures(n, size=32, seed=0): return torch.randint(0, 256, (n, 3, size, size), generator=generator(seed), dtype=torch.uint8)


TRAIN, TEST = Split(pictures(40, 36), torch.arange(40) % 4), Split(pictures(24, seed=2), torch.arange(24) % 4)


def quiet(model, **kwargs): return fit(model, TRAIN, test=TEST, progress=False, device="cpu", **kwargs)


# --- mixing ---

@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("n", [1, 5, 6])
def test_labels_are_probabilities_and_tell_what_the_images_are(alphas, n):
    images = torch.where(torch.arange(n) % 2 == 0, 0, 255).to(torch.uint8)[:, None, None, None].expand(n, 3, 40, 40)
    for seed in range(20):
        mixed, y = mix(images, torch.arange(n) % 2, 3, *alphas, generator(seed))
        assert mixed.dtype == torch.uint8 and mixed.shape == images.shape and y.shape == (n, 3) and y.dtype == torch.float32
        torch.testing.assert_close(y.sum(1), torch.ones(n))
        torch.testing.assert_close(mixed.float().mean((1, 2, 3)) / 255, y[:, 1], atol=0.003, rtol=0)
        assert y[:, 2].abs().max() == 0


@pytest.mark.parametrize("cut", [False, True])
def test_a_mixed_batch_is_timms_for_the_same_draws(cut, monkeypatch):
    images, labels = pictures(6), torch.tensor([0, 3, 1, 1, 2, 4])
    theirs = mixup.Mixup(0.0 if cut else 0.8, 1.0 if cut else 0.0, label_smoothing=0.1, num_classes=5)
    for seed in range(10):
        ours, y = mix(images, labels, 5, 0.0 if cut else 0.8, 1.0 if cut else 0.0, generator(seed))
        share = y[0, 0].item()   # the first and the last image differ in class
        monkeypatch.setattr(theirs, "_params_per_batch", lambda: (share, cut))
        if cut:
            chance = np.random.default_rng(int(torch.randint(2 ** 63 - 1, (), generator=generator(seed))))
            top, bottom, left, right = window(32, chance.beta(1.0, 1.0), chance)
            assert share == pytest.approx(1 - (bottom - top) * (right - left) / 32 ** 2)
            monkeypatch.setattr(mixup, "rand_bbox", lambda *a, **k: (top, bottom, left, right))
        x, target = theirs(images.float(), labels)
        assert (ours.float() - x).abs().max() <= 0.501
        logits = torch.randn(6, 5, generator=generator(9))
        want = -(target * F.log_softmax(logits, 1)).sum(1).mean()   # timm's SoftTargetCrossEntropy
        torch.testing.assert_close(F.cross_entropy(logits, y, label_smoothing=0.1), want)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99, 1.0])
def test_windows_are_timms_for_the_same_centre(kept, monkeypatch):
    for seed in range(20):
        ours = window(32, kept, np.random.default_rng(seed))
        centres = iter(np.random.default_rng(seed).integers(0, 32, 2))
        with monkeypatch.context() as patch:
            patch.setattr(np.random, "randint", lambda *a, **k: next(centres))
            assert ours == tuple(int(edge) for edge in mixup.rand_bbox((3, 32, 32), kept))


def test_weights_are_drawn_from_beta_and_both_kinds_occur():
    images = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 16, 16)
    batches = [mix(images, torch.arange(2), 2, 0.8, 1.0, generator(seed)) for seed in range(600)]
    cuts = torch.tensor([x[0].unique().tolist() in ([0], [255], [0, 255]) for x, _ in batches])
    assert 0.45 < cuts.float().mean() < 0.57   # of mixup, a few are all of one image
    shares = torch.stack([y[0, 0] for _, y in batches])[~cuts].double()
    assert shares.mean().item() == pytest.approx(0.5, abs=0.06)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.02)   # of Beta(a, a)


def test_mixing_repeats_and_disturbs_nobody():
    np.random.seed(1)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two, other = (mix(pictures(4), torch.arange(4), 4, 0.8, 1.0, generator(seed)) for seed in (1, 1, 2))
    assert all(map(torch.equal, one, two)) and not torch.equal(one[1], other[1])
    assert torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1] == numpy_before).all()


# --- erasing ---

def test_erased_windows_are_as_timms():
    torch.manual_seed(0)
    blank = torch.full((1500, 3, 32, 32), 9.0)
    areas = []
    for erased in (random_erase(blank, 0.25, generator()), RandomErasing(0.25, mode="pixel", device="cpu")(blank.clone())):
        gone = (erased != 9).all(1)
        assert torch.equal(gone, (erased != 9).any(1))   # of all three colours
        touched = gone[gone.flatten(1).any(1)]
        assert 0.21 < len(touched) / 1500 < 0.29
        assert torch.equal(touched.any(2).sum(1) * touched.any(1).sum(1), touched.sum((1, 2)))   # rectangles
        areas.append(touched.float().mean((1, 2)))
        noise = erased[erased != 9]
        assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    ours, theirs = (area.quantile(torch.tensor([0.1, 0.5, 0.9])) for area in areas)
    torch.testing.assert_close(ours, theirs, atol=0.03, rtol=0)
    assert 0.015 < areas[0].min() and areas[0].max() < 0.36


def test_erasing_nothing_and_everything():
    images = torch.randn(8, 3, 32, 32, generator=generator())
    assert torch.equal(random_erase(images, 0.0, generator()), images)
    assert (random_erase(images, 1.0, generator()) != images).flatten(1).any(1).all()
    assert torch.equal(random_erase(images, 0.5, generator(3)), random_erase(images, 0.5, generator(3)))


# --- RandAugment ---

@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("sign", [1, -1])
def test_operations_are_timms(name, sign, monkeypatch):
    "The same strength and the same direction; geometry only up to the interpolation, on a smooth picture."
    coarse = torch.randint(40, 215, (1, 3, 5, 5), generator=generator(4)).float()
    smooth = F.interpolate(coarse, (48, 48), mode="bicubic").clamp(0, 255).to(torch.uint8)[0]
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda v: sign * v)
    theirs = auto_augment.AugmentOp(name, prob=1.0, magnitude=10 * STRENGTH, hparams={
        "img_mean": (128, 128, 128), "interpolation": Image.Resampling.BILINEAR})
    want = TF.pil_to_tensor(theirs(TF.to_pil_image(smooth))).float()
    if name in ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"):   # torchvision counts angles and slopes the other way
        found = [(OPERATIONS[name](smooth, STRENGTH, side).float() - want).abs() for side in (1, -1)]
        assert min(gap.flatten().quantile(0.9).item() for gap in found) <= 3 < max(gap.flatten().quantile(0.9).item() for gap in found)
    else: assert (OPERATIONS[name](smooth, STRENGTH, sign).float() - want).abs().max() <= (2 if name.startswith("Contrast") else 1)


def test_half_of_the_operations_are_done_and_each_image_has_its_own():
    same = pictures(1).expand(200, 3, 32, 32)
    changed = rand_augment(same, generator())
    assert changed.shape == same.shape and changed.dtype == torch.uint8
    untouched = (changed == same).flatten(1).all(1).float().mean().item()
    assert 0.2 < untouched < 0.36   # a quarter, and where equalizing noise changes nothing
    assert len({image.numpy().tobytes() for image in changed}) > 100


def test_the_flip_comes_first_and_the_crop_is_the_centre():
    images = pictures(6, 36)
    one = augment(images, "flip_rand_augment", 32, generator(1))
    there = generator(1)
    assert torch.equal(one, rand_augment(augment(images, "flip", 32, there), there))


# --- averages ---

@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9998])
def test_averages_are_timms_and_those_by_hand(vit, decay):
    model = tune(vit, "linear", num_classes=4)
    ours, theirs = Average(model, decay), ModelEmaV2(model.head, decay)
    by_hand = model.head.weight.detach().clone()
    for step in range(5):
        with torch.no_grad(): model.head.weight += torch.randn(model.head.weight.shape, generator=generator(step))
        by_hand = decay * by_hand + (1 - decay) * model.head.weight.detach()
        ours.update()
        theirs.update(model.head)
    torch.testing.assert_close(ours.kept["head.weight"], by_hand)
    torch.testing.assert_close(ours.kept["head.weight"], theirs.module.weight)
    before = model.head.weight.detach().clone()
    with ours.shown(): torch.testing.assert_close(model.head.weight, theirs.module.weight)
    assert torch.equal(model.head.weight, before)


def test_the_average_is_evaluated_and_kept(vit):
    r = recipe(QUICK, ema=0.8, test_every=1, weight_decay=0.0)
    model = tune(vit, "vpt_deep", num_classes=4)
    trainer = Trainer(model, make_resident(model, TRAIN, r, True), r, 0)
    for epoch in range(2): trainer.epoch(epoch)
    kept, raw = trainer.average.kept, {n: p.detach().clone() for n, p in model.trainable().items()}
    fitted, plain = tune(vit, "vpt_deep", num_classes=4), tune(vit, "vpt_deep", num_classes=4)
    history, without = quiet(fitted, recipe=r), quiet(plain, recipe=recipe(r, ema=None))
    assert history.acc == evaluate(fitted, TEST) and history.rows[-1]["test_loss"] != without.rows[-1]["test_loss"]
    assert [row["loss"] for row in history.rows] == [row["loss"] for row in without.rows]   # training itself is the same
    for name, p in fitted.trainable().items(): assert torch.equal(p, kept[name]) and not torch.equal(p, raw[name]), name
    for name, p in plain.trainable().items(): assert torch.equal(p, raw[name]), name


def test_the_average_of_constant_features_is_evaluated(vit):
    model = tune(vit, "linear", num_classes=4)
    assert quiet(model, recipe=recipe(QUICK, ema=0.9)).acc == evaluate(model, TEST)


def test_weights_of_another_shape_have_no_average(vit):
    model = tune(vit, "linear", num_classes=4)
    average = Average(model, 0.9)
    model.head.bias.data = model.head.bias.data[:2]
    with pytest.raises(ValueError, match="linear trains tensors of other shapes than before.*ema=None"): average.update()


# --- the loop ---

@pytest.mark.parametrize("augmentation", ["none", "random_resized_crop_flip"])
def test_with_all_off_the_loop_is_the_plain_one(vit, augmentation):
    "Bitwise: the same draws, nothing between them."
    r = recipe(QUICK, augment=augmentation)
    history, model = quiet(tune(vit, "vpt_deep", num_classes=4), recipe=r, seed=3), tune(vit, "vpt_deep", num_classes=4).train()
    sampler, augmenter = rng(3, "sampler"), rng(3, "augment")
    optimizer = torch.optim.SGD(model.param_groups(0.2 * 16 / 256, 1e-4, vectors=True), lr=0.2 * 16 / 256, momentum=0.9)
    for epoch, row in enumerate(history.rows):
        for group in optimizer.param_groups: group["lr"] = 0.2 * 16 / 256 * 0.5 * (1 + math.cos(math.pi * epoch / 2))
        total = torch.zeros(())
        for rows in torch.randperm(40, generator=sampler).split(16):
            images = TRAIN.images[rows]
            images = images[..., 2:34, 2:34] if augmentation == "none" else augment(images, augmentation, 32, augmenter)
            loss = model.loss(images, TRAIN.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total = total + loss.detach() * len(rows)
        assert row["loss"] == (total / 40).item()


def test_momentum_reaches_the_optimizer_and_nothing_else(vit):
    default, same, none = (quiet(tune(vit, "linear", num_classes=4), recipe=recipe(QUICK, **changes)).rows
                           for changes in ({}, {"momentum": 0.9}, {"momentum": 0}))
    assert default == same and default[0]["loss"] != none[0]["loss"]


@pytest.mark.parametrize("changes", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.25}, {"erasing": 0.9}])
@pytest.mark.parametrize("method", ["vpt_deep", "linear"])
def test_random_images_change_training_and_repeat(vit, method, changes):
    r = recipe(QUICK, label_smoothing=0.1, **changes)
    a, b, c = (quiet(tune(vit, method, num_classes=4), recipe=x).rows for x in (r, r, recipe(r, mixup=0, cutmix=0, erasing=0)))
    assert a == b and a[0]["loss"] != c[0]["loss"]


def test_features_of_mixed_images_train_the_same_classifier(vit):
    r = recipe(QUICK, mixup=0.8, cutmix=1.0, erasing=0.25, batch_size=8)
    fast, slow = tune(vit, "linear", num_classes=4), tune(vit, "linear", num_classes=4)
    slow.__class__ = type("Plain", (type(slow),), {"features_are_constant": False})
    for model in (fast, slow): quiet(model, recipe=r)
    torch.testing.assert_close(fast.head.weight, slow.head.weight, atol=1e-5, rtol=1e-5)


def test_what_is_done_to_images_and_in_which_order(vit):
    r = recipe(QUICK, augment="flip", mixup=0.8, erasing=0.5)
    model = tune(vit, "vpt_deep", num_classes=4)
    trainer = Trainer(model, make_resident(model, TRAIN, r, True), r, 5)
    images, labels = trainer._inputs(torch.arange(6))
    there = rng(5, "augment")
    want, shares = mix(augment(TRAIN.images[:6], "flip", 32, there), TRAIN.labels[:6], 4, 0.8, 0.0, there)
    assert torch.equal(images, random_erase(model.normalise(want), 0.5, there)) and torch.equal(labels, shares)


@pytest.mark.parametrize("method", ["da_vpt", "ship"])
@pytest.mark.parametrize("changes", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_methods_with_losses_on_class_ids_are_refused(vit, method, changes):
    model = tune(vit, method, num_classes=4)
    with pytest.raises(ValueError, match=f"{method} has losses of its own on class ids.*use mixup=0 and cutmix=0"):
        quiet(model, recipe=recipe(QUICK, **changes))


@pytest.mark.parametrize("changes, message", [
    ({"mixup": -0.1}, "Recipe.mixup = -0.1 must not be negative"),
    ({"cutmix": -1.0}, "Recipe.cutmix"),
    ({"erasing": 1.5}, r"Recipe.erasing = 1.5 must lie in \[0, 1\]"),
    ({"erasing": -0.1}, "Recipe.erasing"),
    ({"ema": 1.0}, r"Recipe.ema = 1.0 must lie in \[0, 1\)"),
    ({"ema": -0.5}, "Recipe.ema"),
    ({"momentum": 1.0}, r"Recipe.momentum = 1.0 must lie in \[0, 1\)"),
    ({"momentum": 0.5, "optimizer": "adamw"}, "momentum = 0.5 belongs to optimizer='sgd'"),
    ({"mixup": 0.8, "samples_per_class": 2, "drop_last": True}, "mixed images have no class"),
    ({"cutmix": 1.0, "samples_per_class": 2, "drop_last": True}, "mixed images have no class"),
])
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message): recipe("vpt", **changes)


@pytest.mark.parametrize("changes", [{"mixup": True}, {"ema": "0.9"}, {"erasing": None}, {"momentum": None}])
def test_settings_of_another_type_are_refused(changes):
    with pytest.raises(TypeError, match=f"Recipe.{[*changes][0]}"): recipe("vpt", **changes)


BASELINES = {  # baselines spec 1.7, 1.9-1.18: optimizer, rate in use, decay, batch, epochs, warm-up
    "adaptformer": ("sgd", 0.4, 0.0, 1024, 100, 20),
    "ssf": ("adamw", 5e-3, 5e-5, 64, 100, 10),
    "ssf_fgvc": ("adamw", 1e-2, 0.05, 64, 100, 10),
    "mp": ("adamw", 1e-4, 0.05, 64, 100, 10),
    "sct": ("adamw", 0.01, 0.01, 64, 100, 10),
    "mosa": ("adamw", 5e-3, 0.01, 128, 100, 10),
    "mosa_vtab": ("adamw", 5e-3, 0.01, 128, 100, 10),
    "dam_vp": ("sgd", 1.0, 1e-4, 128, 50, 10),
    "e2vpt": ("sgd", 0.25, 1e-4, 64, 100, 10),
    "sa2vp": ("adamw", 1e-3, 1e-4, 64, 100, 10),
    "gate_vpt": ("sgd", 0.1, 0.0, 64, 100, 10),
    "noah_supernet": ("adamw", 5e-4, 1e-4, 64, 500, 10),
}


@pytest.mark.parametrize("name", BASELINES)
def test_presets_of_baselines(name):
    r = recipe(name)
    assert (r.optimizer, r.scaled(r.lr), r.weight_decay, r.batch_size, r.epochs, r.warmup_epochs) == BASELINES[name]
    mixed = name in ("ssf_fgvc", "mp")
    assert (r.mixup, r.cutmix, r.erasing) == ((0.8, 1.0, 0.25) if mixed else (0, 0, 0)) and (r.ema is not None) == (name == "ssf_fgvc")
    assert r.label_smoothing == (0.1 if mixed or name == "sct" else 0) and r.momentum == (0 if name == "dam_vp" else 0.9)
    assert r.schedule_lag == (name in ("sct", "noah_supernet")) and (r.decay == "released_adamw") == name.startswith("mosa")
    assert r.schedule_on == ("update" if name in ("adaptformer", "dam_vp", "sa2vp") else "epoch")


def test_ssf_decays_matrices_alone(vit):
    "baselines spec 1.11: scales and shifts are vectors, so only the head's weight decays."
    groups = tune(vit, "bias", num_classes=4).param_groups(1e-3, 0.05, vectors=Recipe.decay == recipe("ssf").decay)
    assert {p.ndim > 1 for group in groups if group["weight_decay"] for p in group["params"]} == {True}


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_cuda
def test_no_host_sync_with_all_of_them(vit):
    model, r = tune(vit, "vpt_deep", num_classes=4).to("cuda"), recipe(QUICK, mixup=0.8, cutmix=1.0, erasing=0.25, ema=0.9)
    trainer = Trainer(model, make_resident(model, TRAIN, r, True), r, 0)
    trainer.epoch(0)
    model.train()
    rows = torch.arange(16, device="cuda")
    set_rate(trainer.scheduler, r, 1, 3)
    torch.cuda.set_sync_debug_mode("error")
    try: [trainer._update(1, *trainer._inputs(rows)) for _ in range(3)]
    finally: torch.cuda.set_sync_debug_mode("default")
