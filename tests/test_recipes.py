"""Recipes: strictness, exact schedules, optimizer groups, grids."""
import math
from dataclasses import fields, replace

import pytest
import torch

from hierprompt.backbones.pretrained import load_backbone
from hierprompt.core import digest, from_dict, to_dict
from hierprompt.engine.tuned import tune
from hierprompt.training.recipes import (
    GRIDS,
    RECIPES,
    VPT_SEEDS,
    Candidate,
    Recipe,
    build_optimizer,
    grid,
    learning_rates,
    recipe,
    schedule,
    set_rate,
)


def cosine(t, total): return 0.5 * (1 + math.cos(math.pi * t / total))


@pytest.mark.parametrize("name", RECIPES)
def test_presets_survive_a_round_trip(name):
    assert from_dict(Recipe, to_dict(RECIPES[name])) == RECIPES[name] == recipe(name)


def test_published_presets():
    noah, vpt, full = recipe("noah"), recipe("vpt"), recipe("vpt_full")
    assert (noah.optimizer, noah.lr, noah.weight_decay, noah.batch_size, noah.epochs) == ("adamw", 1e-3, 1e-4, 64, 100)
    assert (noah.drop_last, noah.drop_path, noah.label_smoothing, noah.augment, noah.test_every) == (True, 0.1, 0.0, "none", 10)
    assert noah.scaled(noah.lr) == 1e-3
    assert (vpt.optimizer, vpt.drop_last, vpt.drop_path, vpt.warmup_epochs) == ("sgd", False, 0.0, 10)
    assert vpt.scaled(2.0) == 0.5 and vpt.scaled(None) is None
    assert (full.optimizer, full.warmup_epochs, full.batch_size) == ("adamw", 5, 64)
    assert recipe("vpt_full_released").batch_size == 384 and recipe("vpt_linear").batch_size == 1024
    assert VPT_SEEDS == (42, 44, 82, 100, 800)


def test_da_vpt_presets():
    "DA-VPT spec 3.1-3.3, and D19, D20, D22 of its 1.14."
    released, paper = recipe("da_vpt"), recipe("da_vpt_paper")
    assert (released.optimizer, released.scaled(released.lr), released.batch_size, released.epochs, released.warmup_epochs) == (
        "adamw",
        1e-3,
        32,
        100,
        10,
    )
    assert (released.samples_per_class, released.drop_last, released.clip_value, released.drop_path, released.schedule_on) == (
        2,
        True,
        10.0,
        0.0,
        "update",
    )
    assert (released.weight_decay, released.head_weight_decay, released.decay, released.min_lr) == (0.01, 3.0, "matrices", 1e-9)
    changed = {f.name for f in fields(Recipe) if getattr(released, f.name) != getattr(paper, f.name)}
    assert changed == {"min_lr", "samples_per_class", "head_weight_decay"}
    assert (paper.min_lr, paper.samples_per_class, paper.head_weight_decay) == (1e-8, None, None)


PROMPTS_FOR_CLIP = {  # Adapt spec 2.0, its table, and 1.8: batch, rate, epochs
    "coop": (32, 2e-3, 200),
    "coop_imagenet": (32, 2e-3, 50),
    "cocoop": (1, 2e-3, 10),
    "vpt_clip": (4, 2.5e-3, 5),
    "plot": (128, 2e-3, 200),
    "plot_small_batch": (32, 2e-3, 200),
    "maple": (4, 3.5e-3, 5),
    "prograd": (32, 2e-3, 200),
    "kgcoop": (128, 2e-3, 100),
    "lamm": (32, 2e-3, 50),
    "adapt": (4, 2.5e-3, 100),
    "clip_common": (4, 2.5e-3, 100),
}


@pytest.mark.parametrize("name", PROMPTS_FOR_CLIP)
def test_presets_of_prompts_for_clip(name):
    "What their authors share, and what differs."
    r = recipe(name)
    assert (r.batch_size, r.scaled(r.lr), r.epochs) == PROMPTS_FOR_CLIP[name]
    assert (r.optimizer, r.weight_decay, r.drop_last, r.augment, r.drop_path, r.label_smoothing) == (
        "sgd",
        5e-4,
        True,
        "random_resized_crop_flip",
        0.0,
        0.0,
    )
    assert (r.warmup, r.warmup_epochs, r.warmup_lr, r.min_lr, r.warmup_prefix, r.schedule_on) == ("constant", 1, 1e-5, 0.0, True, "epoch")


@pytest.mark.parametrize("changes, error, message", [
    ({"optimizer": "lion"}, ValueError, "optimizer"),
    ({"augment": "flop"}, ValueError, "augment"),
    ({"lr": 0.0}, ValueError, "Recipe.lr"),
    ({"lr": -1.0}, ValueError, "must be positive"),
    ({"lr": float("nan")}, ValueError, "Recipe.lr = nan is not a finite number"),
    ({"lr": True}, TypeError, "not of type float"),
    ({"weight_decay": -1e-4}, ValueError, "must not be negative"),
    ({"batch_size": 0}, ValueError, "Recipe.batch_size"),
    ({"batch_size": 6.4}, TypeError, "not of type int"),
    ({"epochs": 0}, ValueError, "Recipe.epochs"),
    ({"epochs": 10}, ValueError, "warmup_epochs=1"),
    ({"drop_path": 1.0}, ValueError, r"\[0, 1\)"),
    ({"label_smoothing": -0.1}, ValueError, r"\[0, 1\)"),
    ({"clip_value": 0.0}, ValueError, "clip_value"),
    ({"samples_per_class": 0, "drop_last": True}, ValueError, "samples_per_class = 0 must be positive"),
    ({"samples_per_class": 2.0, "drop_last": True}, TypeError, "not of type"),
    ({"samples_per_class": 3, "drop_last": True}, ValueError, "batch_size = 64 is no multiple of samples_per_class = 3: use batch_size=66"),
    ({"samples_per_class": 128, "drop_last": True}, ValueError, "use batch_size=128"),
    ({"samples_per_class": 2}, ValueError, "samples_per_class = 2 with drop_last = False: .* use drop_last=True"),
    ({"test_every": -1}, ValueError, "test_every"),
    ({"decay": "released_adamw"}, ValueError, "adamw"),
    ({"nesterov": True}, TypeError, "unknown key 'nesterov'"),
    ({"weight_decy": 0.1}, TypeError, "Did you mean 'weight_decay'"),
])
def test_bad_settings_are_refused(changes, error, message):
    with pytest.raises(error, match=message): recipe("vpt", **changes)


@pytest.mark.parametrize(
    "name", [f.name for f in fields(Recipe) if f.name in ("optimizer", "warmup", "schedule_on", "augment", "precision")]
)
def test_choices_are_checked_on_direct_construction(name):
    with pytest.raises(KeyError, match=f"unknown Recipe.{name} 'other'"): replace(Recipe(), **{name: "other"})


def test_recipes_cannot_be_changed_in_place():
    with pytest.raises(AttributeError): RECIPES["vpt"].lr = 2.0


@pytest.mark.parametrize("epochs, warmup", [(100, 10), (100, 5), (30, 0), (1, 0), (11, 10)])
def test_vpt_schedule(epochs, warmup):
    "VPT's multiplier: linear from 0, then half a cosine over what remains."
    rates = learning_rates(recipe("vpt", lr=4.0, epochs=epochs, warmup_epochs=warmup))
    want = [e / warmup if e < warmup else cosine(e - warmup, epochs - warmup) for e in range(epochs)]
    assert rates == pytest.approx(want, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("lag, first", [(0, 0), (1, -1)])
def test_noah_schedule(lag, first):
    "timm's cosine, which runs under the warm-up; with a lag the epoch before it."
    def rate(t): return 1e-6 + t * (1e-3 - 1e-6) / 10 if t < 10 else 1e-5 + (1e-3 - 1e-5) * cosine(t, 100)
    rates = learning_rates(recipe("noah", schedule_lag=lag))
    assert rates == pytest.approx([rate(max(0, e + first)) for e in range(100)], rel=1e-12)


@pytest.mark.parametrize("name, lowest", [("da_vpt", 1e-9), ("da_vpt_paper", 1e-8)])
@pytest.mark.parametrize("updates", [1, 25, 30])
def test_schedule_per_update(name, lowest, updates):
    "DA-VPT: first step at 1e-8, 0.9755 of the rate after the warm-up, min_lr one step after the last (DA-VPT spec 3.2)."
    r, warmup, total = recipe(name), 10 * updates, 100 * updates
    rates = learning_rates(r, updates)
    assert len(rates) == total and rates[0] == pytest.approx(1e-8, rel=1e-12) and rates[warmup] == pytest.approx(0.9755e-3, rel=1e-4)
    want = [1e-8 + t * (1e-3 - 1e-8) / warmup if t < warmup else lowest + (1e-3 - lowest) * cosine(t, total) for t in range(total)]
    assert rates == pytest.approx(want, rel=1e-12, abs=1e-18)
    optimizer = torch.optim.SGD([torch.zeros(())], lr=1e-3)
    set_rate(schedule(optimizer, r, updates), r, 100, total)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(lowest, rel=1e-12)


@pytest.mark.parametrize("name", PROMPTS_FOR_CLIP)
def test_dassls_schedule(name):
    "Adapt spec 2.0 and 6 (33): 1e-5 in epoch 1, then a cosine that begins at the full rate in epoch 2 and is as long as the whole run."
    r = recipe(name)
    rates = learning_rates(r)
    assert rates == pytest.approx([1e-5] + [r.lr * cosine(e - 2, r.epochs) for e in range(2, r.epochs + 1)], rel=1e-12)
    assert rates[1] == r.lr and rates[1:] == sorted(rates[1:], reverse=True) and rates[-1] > 0
    optimizer = torch.optim.SGD([torch.zeros(())], lr=r.lr)
    theirs, chained = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, r.epochs), []
    for _ in range(r.epochs - 1):
        chained.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates[1:] == pytest.approx(chained, rel=1e-9)


@pytest.mark.parametrize("unit, steps", [("epoch", 1), ("update", 7)])
def test_a_constant_warmup_of_several_epochs(unit, steps):
    "Per update the same curve, finer; with the cosine running under the warm-up it has no counter of its own."
    r = recipe("adapt", epochs=10, warmup_epochs=3, schedule_on=unit)
    rates, under = learning_rates(r, steps), learning_rates(replace(r, warmup_prefix=False), steps)
    assert rates[:3 * steps] == under[:3 * steps] == [1e-5] * 3 * steps
    assert rates[3 * steps:] == pytest.approx([r.lr * cosine(t, 10 * steps) for t in range(7 * steps)], rel=1e-12)
    assert under[3 * steps:] == pytest.approx([r.lr * cosine(t, 10 * steps) for t in range(3 * steps, 10 * steps)], rel=1e-12)


def test_dassls_warmup_may_be_absent():
    assert learning_rates(recipe("maple", warmup_epochs=0)) == pytest.approx([3.5e-3 * cosine(t, 5) for t in range(5)])


def test_schedule_per_epoch_is_constant_within_an_epoch():
    r = recipe("vpt", epochs=4, warmup_epochs=1)
    rates = learning_rates(r, 5)
    assert rates == [rate for rate in learning_rates(r) for _ in range(5)]


def test_each_group_follows_its_own_rate():
    groups = [{"params": [torch.zeros(1)], "lr": 1.0}, {"params": [torch.zeros(1)], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    r = recipe("vpt")
    scheduler = schedule(optimizer, r)
    set_rate(scheduler, r, 5, 80)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.5, 0.05])


class Model(torch.nn.Module):
    "One prompt, one norm, one head."
    def __init__(self):
        super().__init__()
        self.prompts, self.norm1, self.head = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2)

    def param_groups(self, lr, weight_decay, head_lr=None, head_weight_decay=None, vectors=False):
        self.asked = dict(lr=lr, weight_decay=weight_decay, head_lr=head_lr, head_weight_decay=head_weight_decay)
        return [{"params": list(self.parameters()), "lr": lr, "weight_decay": weight_decay}]


def test_rates_are_scaled_once():
    model = Model()
    build_optimizer(model, recipe("vpt", lr=8.0, head_lr=4.0, batch_size=32, weight_decay=0.01, head_weight_decay=3.0))
    assert model.asked == dict(lr=1.0, weight_decay=0.01, head_lr=0.5, head_weight_decay=3.0)


def test_optimizers_have_the_published_constants():
    sgd, adamw = build_optimizer(Model(), recipe("vpt")), build_optimizer(Model(), recipe("noah"))
    assert type(sgd) is torch.optim.SGD and type(adamw) is torch.optim.AdamW
    assert sgd.defaults["momentum"] == 0.9 and not sgd.defaults["nesterov"] and sgd.defaults["dampening"] == 0
    assert adamw.defaults["betas"] == (0.9, 0.999) and adamw.defaults["eps"] == 1e-8


@pytest.mark.parametrize("method", ["vpt_deep", "bias"])
def test_prompts_for_clip_decay_whatever_their_shape(method):
    "5e-4 on everything (Adapt spec 2.0); a bias of a classifier, which none of those models has, is the exception."
    model = tune(load_backbone("tiny_random"), method, num_classes=4)
    groups = build_optimizer(model, recipe("adapt")).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert all(decay[id(p)] == (0.0 if name == "head.bias" else 5e-4) for name, p in model.trainable().items())


def test_a_model_that_trains_nothing_has_an_optimizer():
    model = Model()
    model.param_groups = lambda **kwargs: []
    optimizer = build_optimizer(model, recipe("zero_shot"))
    assert [group["params"] for group in optimizer.param_groups] == [[]]
    optimizer.step()


@pytest.mark.parametrize("asked, used", [(1e-2, 0.01), (1e-4, 0.01), (0.0, 0.0)])
def test_released_adamw_decay(asked, used):
    "VPT's released branch: 0.01 for every name without bias (norm weights too), whatever is asked for, unless that is 0."
    model = Model()
    decayed, free = build_optimizer(model, recipe("vpt_full_released", weight_decay=asked)).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (used, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(model.prompts), id(model.norm1.weight), id(model.head.weight)}
    assert {id(p) for p in free["params"]} == {id(model.norm1.bias), id(model.head.bias)}


@pytest.mark.parametrize("method", ["vpt_deep", "bias", "full"])
def test_da_vpt_groups(method):
    "Vectors do not decay, the head's weight does strongly, all else moderately; every trained tensor is in one group (DA-VPT spec 3.1)."
    model = tune(load_backbone("tiny_random"), method, num_classes=4)
    groups = build_optimizer(model, recipe("da_vpt")).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay) == len(model.trainable()) and {group["lr"] for group in groups} == {
        1e-3
    }
    for name, p in model.trainable().items():
        assert decay[id(p)] == (0.0 if p.ndim <= 1 else 3.0 if name == "head.weight" else 0.01), name


GRID_SIZES = {
    "vpt": 40,
    "vpt_fgvc": 36,
    "vpt_linear": 40,
    "vpt_linear_mae": 52,
    "vpt_full": 16,
    "ship": 9,
    "da_vpt": 28,
    "da_vpt_prompts": 28,
    "adapt_target": 7,
}


@pytest.mark.parametrize("name, size", GRID_SIZES.items())
def test_grids(name, size):
    trials = grid("vpt", **GRIDS[name])
    assert len(trials) == len({digest(t.settings) for t in trials}) == size
    rates = [t.recipe.lr for t in trials]
    assert rates == sorted(rates)


def test_da_vpt_searches_every_first_layer_of_its_table():
    "Printed as 12, 10, 8, 6, 4, 2, 0, counted from 1 of 12 blocks; 0 is all of them."
    layers = GRIDS["da_vpt_prompts"]["config.guided_layers"]
    assert [(blocks[0], len(blocks)) for blocks in layers] == [(11, 1), (9, 3), (7, 5), (5, 7), (3, 9), (1, 11), (0, 12)]
    assert all(blocks == list(range(blocks[0], 12)) for blocks in layers)


def test_a_grid_over_the_method_s_own_settings():
    trials = grid("noah", lr=[0.2, 0.1], **{"config.num_tokens": [10, 5], "config.end_layer": [None, 3]})
    assert [(t.recipe.lr, *t.config.values()) for t in trials[:4]] == [(0.1, 10, None), (0.1, 10, 3), (0.1, 5, None), (0.1, 5, 3)]
    assert trials[0].config == {"num_tokens": 10, "end_layer": None} and len(trials) == 8
    assert all(t.recipe == recipe("noah", lr=t.recipe.lr) for t in trials)
    assert trials[2].settings == {**vars(recipe("noah", lr=0.1)), "config.num_tokens": 5, "config.end_layer": None}
    assert grid("noah") == [Candidate(recipe("noah"))]


def test_grid_refuses_what_is_no_list():
    for bad in (0.1, "0.1", [], {"a": 1}):
        with pytest.raises(TypeError, match="list of values for lr"): grid("vpt", lr=bad)
        with pytest.raises(TypeError, match="list of values for config.num_tokens"): grid("vpt", **{"config.num_tokens": bad})
    with pytest.raises(TypeError, match="Did you mean 'lr'"): grid("vpt", lrs=[0.1])
