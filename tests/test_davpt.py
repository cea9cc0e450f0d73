"""DA-VPT: the tuner against its slow form, the invariants of DA-VPT spec 6 that concern classification, and the same
guidance on SHIP.

Tested elsewhere: 1, 2, 14 and the loss alone of 20 in test_metric_losses.py; the clustering of 11 and the means of 12 in
test_class_map.py; 15 and 17 in test_recipes.py and test_training.py; 18 and the segmentation counts of 8 in test_published_davpt.py. 19
belongs to segmentation."""
import random
import re
from functools import cache, wraps

import pytest
import timm
import torch
import torch.nn.functional as F
from test_engine import ARCHITECTURES
from test_ship import sharp_vit

from hierprompt.backbones.pretrained import load_backbone
from hierprompt.engine.accounting import count_macs, count_parameters
from hierprompt.engine.block_loop import Context
from hierprompt.engine.registry import list_methods
from hierprompt.engine.saved import load_tuned
from hierprompt.engine.tuned import tune
from hierprompt.methods.davpt.class_map import ClassMeans, few_per_class
from hierprompt.methods.davpt.guidance import one_of
from hierprompt.methods.davpt.metric_losses import METRICS, metric_settings
from hierprompt.methods.davpt.reference import reference_attention, reference_layer_losses, reference_losses

SMALL = dict(num_guided=3, num_tokens=4, fill_to=0, patch_weight=0.7, cls_weight=0.3)     # for 17 tokens, 8 images, 5 classes
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 4])
EXACT = 1e-9    # float64, relative to the largest value
ALL_LAYERS = [*range(6)]


@cache
def tiny():
    "A backbone in float32 that all tests share: tuners leave it as it is."
    return sharp_vit()


@pytest.fixture(scope="module")
def vit6(): return sharp_vit().double()


@pytest.fixture(scope="module")
def floats(): return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()


def davpt(vit, floats, classes=5, std=0.5, method="da_vpt", **config):
    "A prepared DA-VPT with weights that matter and a map that mixes classes."
    model = tune(vit, method, classes, **({**SMALL, **config} if method == "da_vpt" else config))
    if floats.dtype == torch.float64: model.double()
    model.prepare(floats, LABELS % classes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in sorted(model.tuner.trainable(model.host).items()):
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            p.copy_(std * noise) if "prompts" in name else p.add_(0.2 * noise)
    plan = plan_of(model)
    if plan is not None and not plan.fixed: plan.assign(torch.tensor([2, 0, 1, 0, 2])[:classes] % plan.num_prompts)
    return model


def plan_of(model): return model.tuner.guidance.map if model.tuner.guidance is not None else None


def prompts_of(model):
    return [p for n, p in sorted(model.tuner.named_parameters(), key=lambda x: int(x[0].split(".")[1])) if n.startswith("prompts")]


def close(a, b, tolerance=EXACT): return (a - b).abs().max() <= tolerance * max(1, b.abs().max())


def grads(value, params): return torch.autograd.grad(value, params, retain_graph=True, materialize_grads=True)


def own_grads(model, floats, labels=LABELS):
    "Gradients of the metric losses by name."
    params = model.tuner.trainable(model.host)
    return dict(zip(params, grads(model.train().losses(floats, labels)[1], list(params.values()))))


def compare(model, floats, labels=LABELS, tolerance=EXACT):
    "Logits, both losses, and all their gradients."
    config, trained = model.config, model.tuner.trainable(model.host)
    prompt_of = plan_of(model).prompt_of if plan_of(model) is not None else torch.zeros(model.num_classes, dtype=torch.int64)
    logits, patch, cls = reference_losses(model.host.vit, config, trained, model.head, labels, prompt_of, floats)
    assert close(model.train()(floats), logits, tolerance)
    slow, fast = (F.cross_entropy(logits, labels), config.patch_weight * patch + config.cls_weight * cls), model.losses(floats, labels)
    params = {**trained, "head.weight": model.head.weight, "head.bias": model.head.bias}
    for ours, theirs in zip(fast, slow):
        assert close(ours, theirs, tolerance)
        if not ours.requires_grad:
            assert not theirs.requires_grad or theirs == 0      # both weights are zero
            continue
        a, b = (grads(value, list(params.values())) for value in (ours, theirs))
        largest = max(g.abs().max().item() for g in b if g.numel())
        for name, ga, gb in zip(params, a, b): assert not ga.numel() or (ga - gb).abs().max() <= tolerance * max(1e-3, largest), name
    model.eval()
    with torch.no_grad(): assert close(model(floats), logits, tolerance) and close(model(floats.flip(0)), logits.flip(0), tolerance)
    return logits


# The tuner against the slow form

PATCH = ["attn_out", "input_mean", "query_mean", "key_mean", "attn_out_patch_mean", "topk_cls_attn", "topk_cross_attn"]
SIDES = ["raw", "query", "key"]
TOPK = dict(patch_feature="topk_cross_attn", topk=3)
BIASES = ["q", "k", "v", "proj", "fc1", "fc2", "norm1.w", "norm1.b", "norm2.w", "norm2.b", "norm.w", "norm.b", "cls", "patch_embed.b"]
CONFIGS = {
    "paper": {},
    "released": dict(preset="released"),
    "legacy": dict(preset="released_legacy"),
    **{f"{feature} with {side}": dict(patch_feature=feature, prompt_feature=side) for feature in PATCH for side in SIDES},
    **{f"class token {cls} with {side}": dict(cls_feature=cls, prompt_feature_cls=side) for cls in SIDES for side in SIDES},
    **{f"{metric}": dict(metric=metric) for metric in ["pnca", "pnca_rel", "triplet"]},
    "symmetric triplets": dict(metric="triplet", triplet_symmetric=True, triplet_margin=0.4),
    "mean over all": dict(pos_reduction="all"),
    "r = 5": dict(sim_scale=5.0),
    "r = 0": dict(sim_scale=0.0),
    "alpha, delta": dict(alpha=8.0, delta=0.3),
    "detached": dict(detach_features=True),
    "patch loss only": dict(cls_weight=0.0),
    "class token loss only": dict(patch_weight=0.0),
    "no losses": dict(patch_weight=0.0, cls_weight=0.0),
    **{f"guided {layers}": dict(guided_layers=layers) for layers in ([0], [2], [5], [1, 4], [3, 4, 5], ALL_LAYERS)},
    "one prompt": dict(num_guided=1),
    "a prompt a class": dict(num_guided=5),
    "more prompts than classes": dict(num_guided=9),
    "extra prompts": dict(fill_to=9),
    "extra prompts, one a class": dict(num_guided=9, fill_to=12),
    "no guidance": dict(num_guided=0),
    "guided prompts only": dict(num_tokens=0),
    "guided prompts only, from layer 3": dict(num_tokens=0, guided_layers=[3, 4, 5]),
    "no prompts": dict(num_tokens=0, num_guided=0),
    "l2 norm": dict(vpt_norm="l2"),
    "layer norm": dict(vpt_norm="layer"),
    "layer norm, raw": dict(vpt_norm="layer", prompt_feature="raw"),
    **{
        f"{feature}, masked": dict(patch_feature=feature, prompt_mask=True)
        for feature in ("attn_out", "attn_out_patch_mean", "topk_cross_attn")
    },
    "masked, extra": dict(prompt_mask=True, fill_to=9, guided_layers=[2, 5]),
    **{
        f"{connection}{', masked' * mask}": dict(connection=connection, num_tokens=3, prompt_mask=mask)
        for connection in ("fixed", "gate")
        for mask in (False, True)
    },
    **{f"{connection}, other counts": dict(connection=connection, guided_layers=[2, 5]) for connection in ("fixed", "gate")},
    **{
        f"{connection}, all guided, {name}": dict(connection=connection, guided_layers=ALL_LAYERS, **changes)
        for connection in ("fixed", "gate")
        for name, changes in (
            ("released", dict(preset="released", num_guided=3)),
            ("l2", dict(vpt_norm="l2")),
            ("key", dict(prompt_feature="key", patch_feature="key_mean")),
        )
    },
    **{f"pool {pool}{', masked' * mask}": dict(pool=pool, prompt_mask=mask) for pool in ("all", "img") for mask in (False, True)},
    "pool all, connected": dict(pool="all", connection="fixed", num_tokens=3),
    "pool all, extra": dict(pool="all", fill_to=9),
    "pool all, nothing last": dict(pool="all", num_tokens=0, guided_layers=[2]),
    **{f"bias {name}": dict(bias_set=[name]) for name in BIASES},
    **{f"biases {name}": dict(bias_set=name) for name in ("kv", "qkv", "rel_vit", "rel_mae", "all")},
    "all biases, all sides": dict(
        bias_set=BIASES, patch_feature="key_mean", prompt_feature="query", cls_feature="key", guided_layers=ALL_LAYERS
    ),
    **{
        f"top 3, {name}": {**TOPK, **changes}
        for name, changes in {
            "mean of heads": dict(topk_heads="mean"),
            "composed": dict(topk_heads="composed"),
            "of keys": dict(topk_from="key"),
            "maximum": dict(topk_pool="max"),
            "weighted": dict(topk_scale="tokens", topk_pool="max"),
            "weighted heads": dict(topk_heads="composed", topk_scale="heads"),
            "class token's": dict(patch_feature="topk_cls_attn", topk_heads="composed", topk_from="key"),
            "all": dict(topk=16),
        }.items()
    },
}
CHOICES = dict(
    patch_feature=PATCH,
    prompt_feature=SIDES,
    cls_feature=SIDES,
    prompt_feature_cls=SIDES,
    metric=["proxy_anchor"] * 3 + ["pnca", "pnca_rel", "triplet"],
    pos_reduction=["positives", "all"],
    sim_scale=[1.0, 5.0],
    triplet_symmetric=[False, True],
    detach_features=[False, False, True],
    topk=[1, 3],
    topk_heads=["max", "mean", "composed"],
    topk_from=["input", "key"],
    topk_pool=["mean", "max"],
    topk_scale=["none", "tokens"],
    vpt_norm=["none", "l2", "layer"],
    prompt_mask=[False, True],
    pool=["host", "all", "img"],
    connection=["none", "fixed", "gate"],
    num_guided=[2, 3, 5, 9],
    num_tokens=[0, 3, 3, 4],
    fill_to=[0, 7],
    guided_layers=[None, [0], [2], [1, 4], [3, 4, 5], ALL_LAYERS],
    bias_set=["none", "kv", "qkv", "rel_vit", "rel_mae", "all"],
)


def drawn(seed, **fixed):
    "Settings at random."
    dice = random.Random(seed)
    return {**{name: dice.choice(values) for name, values in CHOICES.items()}, **fixed}


@pytest.mark.parametrize("name", CONFIGS)
def test_tuner_equals_slow_form(name, vit6, floats): compare(davpt(vit6, floats, **CONFIGS[name]), floats)


@pytest.mark.parametrize("seed", range(24))
def test_tuner_equals_slow_form_with_any_settings(seed, vit6, floats): compare(davpt(vit6, floats, **drawn(seed)), floats)


@pytest.mark.parametrize("norm", ["l2", "layer"])
def test_tuner_equals_slow_form_with_short_prompts(norm, vit6, floats):
    "Where the epsilons of prompt norms would be seen: prompts start as small numbers."
    compare(davpt(vit6, floats, std=1e-4, vpt_norm=norm), floats, tolerance=1e-7)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "architecture", ["LayerScale", "registers", "pre-norm and qk-norm", "average pooling", "no qkv bias", "dynamic image size"]
)
def test_tuner_equals_slow_form_on_other_backbones(architecture, seed, floats):
    vit = sharp_vit(depth=4, **ARCHITECTURES[architecture]).double()
    feature = [dict(patch_feature="attn_out"), dict(patch_feature="topk_cross_attn", topk_from="key"), dict(patch_feature="key_mean"),
        dict(patch_feature="attn_out_patch_mean")][seed]
    changes = drawn(
        seed,
        **feature,
        guided_layers=[[3], [1, 2], [2, 3], [0]][seed],
        bias_set=["none", ["proj"], ["norm2.b", "cls"], ["fc1", "norm1.w"]][seed]
    )
    if architecture == "average pooling": changes["pool"] = "host"
    compare(davpt(vit, floats, **changes), floats)


@pytest.mark.parametrize("name", ["paper", "released", "gate, masked", "pool all", "key_mean with query"])
def test_tuner_equals_slow_form_in_single_precision(name, floats):
    "1e-5, as the specification asks; a batch of one class, and one image."
    model = davpt(tiny(), floats.float(), **CONFIGS[name])
    compare(model, floats.float(), tolerance=1e-5)
    compare(model, floats.float()[:3], torch.tensor([3, 3, 3]), 1e-5)
    compare(model, floats.float()[:1], torch.tensor([2]), 1e-5)


# The invariants of the specification, by their numbers

def plain_pair(seed=5, **changes):
    "VPT-Deep, and DA-VPT without losses in its place: same seed, same counts."
    settings = dict(num_guided=4, num_tokens=4, fill_to=0, patch_weight=0.0, cls_weight=0.0, init="vpt", **changes)
    return tune(tiny(), "vpt_deep", 5, seed=seed, num_tokens=4), tune(tiny(), "da_vpt", 5, seed=seed, **settings)


@pytest.mark.parametrize("changes", [{}, dict(guided_layers=[1, 3]), dict(guided_layers=ALL_LAYERS),
    dict(metric="triplet", patch_feature="topk_cls_attn")], ids=str)
def test_invariant_03_zero_weights_are_vpt_deep(changes, floats):
    """Bitwise: initial prompts and head, logits in both modes, gradients, the weights after two optimiser steps; and nothing has to be
    prepared."""
    deep, ours = plain_pair(**changes)
    images = floats.float()
    assert torch.equal(deep.head.weight, ours.head.weight) and torch.equal(deep.tuner.prompts, torch.stack(prompts_of(ours)))
    for mode in (False, True):
        with torch.no_grad(): assert torch.equal(deep.train(mode)(images), ours.train(mode)(images))
    weights = [lambda m=m: [torch.stack([*m.tuner.prompts]), m.head.weight, m.head.bias] for m in (deep, ours)]
    optimizers = [torch.optim.AdamW(m.param_groups(1e-2, 0.1)) for m in (deep, ours)]
    for _ in range(2):
        for model, optimizer in zip((deep, ours), optimizers):
            optimizer.zero_grad()
            model.loss(images, LABELS).backward()
        assert (
            all(torch.equal(p.grad, deep.tuner.prompts.grad[i]) for i, p in enumerate(prompts_of(ours)))
            and ours.losses(images, LABELS)[1] == 0
        )
        for optimizer in optimizers: optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(weights[0](), weights[1]()))


@pytest.mark.parametrize("name", ["paper", "released", "gate", "pool all", "biases rel_vit"])
def test_invariant_03_evaluation_knows_neither_labels_nor_map(name, vit6, floats):
    model = davpt(vit6, floats, **CONFIGS[name]).eval()
    plan = plan_of(model)
    with torch.no_grad():
        before = model(floats)
        plan.assign((plan.prompt_of + 1) % plan.num_prompts)
        assert torch.equal(model(floats), before)
        for labels in (LABELS, 4 - LABELS, None):
            ctx = Context(labels=labels)
            assert torch.equal(model.head(model.engine(floats, ctx)), before) and model.tuner.aux_loss(ctx) == 0
        assert model.losses(floats, LABELS)[1] == 0


def test_invariant_04_no_prompts_is_timm(vit6, floats):
    model = davpt(vit6, floats, num_tokens=0, num_guided=0)
    with torch.no_grad():
        for mode in (True, False): assert close(model.train(mode).features(floats), vit6.forward_features(floats)[:, 0])
    assert count_parameters(model)["without_head"] == 0


@pytest.mark.parametrize("bias_set", ["kv", "qkv", "all", ["q"], ["k"], ["v"]], ids=str)
def test_invariant_05_separated_biases_leave_the_forward_pass(bias_set, floats):
    "They start as the rows of the fused one."
    with torch.no_grad():
        plain, ours = (tune(tiny(), "da_vpt", 5, seed=2, **{**SMALL, "bias_set": b})(floats.float()) for b in ("none", bias_set))
    assert close(ours, plain, 1e-6)


def test_invariant_05_key_bias_has_no_gradient_but_through_keys(vit6, floats):
    "The softmax does not see it (DA-VPT spec 1.9); a loss that reads keys does."
    for metric_reads, changes in (
        (False, {}),
        (True, dict(patch_feature="key_mean")),
        (True, dict(prompt_feature="key")),
        (True, dict(cls_feature="key")),
        (True, dict(prompt_feature_cls="key")),
        (True, dict(**TOPK, topk_from="key")),
        (False, TOPK),
    ):
        model = davpt(vit6, floats, bias_set="qkv", guided_layers=[3], **changes).train()
        entropy, own = model.losses(floats, LABELS)
        found = {part: [p for n, p in sorted(model.tuner.named_parameters()) if n.startswith(f"{part}_bias")] for part in "qkv"}
        size = max(g.abs().max() for g in grads(entropy, found["v"]))
        assert max(g.abs().max() for g in grads(entropy, found["k"])) < 1e-12 * size
        assert min(g.abs().max() for part in "qv" for g in grads(entropy, found[part])[:5]) > 1e-4 * size
        for i, g in enumerate(grads(own, found["k"])): assert (g.abs().max() > 1e-6) == (metric_reads and i == 3), (changes, i)


def test_invariant_06_mask_changes_prompt_rows_only(vit6, floats):
    "Outputs of prompts are read through a connection, the pooling or the patch loss, and nowhere else."
    def pair(**changes): return [davpt(vit6, floats, prompt_mask=mask, **changes).train() for mask in (False, True)]

    for changes in ({}, dict(preset="released"), dict(patch_feature="attn_out_patch_mean")):
        a, b = pair(**changes)
        assert close(a(floats), b(floats))
        assert close(a.losses(floats, LABELS)[1], b.losses(floats, LABELS)[1]) == bool(changes)
    for changes in (dict(connection="fixed", num_tokens=3), dict(pool="all")):
        a, b = pair(**changes)
        assert not close(a(floats), b(floats), 1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "paper",
        "released",
        "biases kv",
        "biases all",
        "gate",
        "layer norm",
        "gate, other counts",
        "extra prompts",
        "guided prompts only",
        "no guidance",
    ],
)
def test_invariant_07_exactly_the_named_tensors_train(name, floats):
    vit = tiny()
    before = {n: t.clone() for n, t in vit.state_dict().items()}
    model = davpt(vit, floats.float(), std=0.1, **CONFIGS[name])
    trained = model.trainable()
    assert {id(p) for p in model.parameters() if p.requires_grad and p.numel()} == {id(p) for p in trained.values()}
    inside = {n: t.clone() for n, t in model.host.vit.state_dict().items()}
    optimizer = torch.optim.SGD(model.param_groups(1e-3, 0.0))
    for _ in range(3):
        optimizer.zero_grad()
        model.train().loss(floats.float(), LABELS).backward()
        optimizer.step()
    with_gradient = {n for n, p in trained.items() if p.numel() and p.grad is not None}
    assert with_gradient == {n for n, p in trained.items() if p.numel()}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(torch.equal(t, before[n]) for n, t in vit.state_dict().items())
    changed = {n for n, t in model.host.vit.state_dict().items() if not torch.equal(t, inside[n])}
    assert changed == {n.removeprefix("tuner.") for n in trained if n.startswith("tuner.") and n.removeprefix("tuner.") in inside}


@cache
def meta_base():
    with torch.device("meta"): return timm.create_model("vit_base_patch16_224", num_classes=0).eval()


def base(**config):
    "Tensors without data: only shapes count."
    return tune(meta_base(), "da_vpt", config.pop("classes", 200), **config)


COUNTS = {
    "20 prompts x 12": (dict(num_guided=20, num_tokens=20), 184_320, 0),
    "one prompt in every layer": (dict(num_guided=1, num_tokens=1), 9_216, 0),
    "M = 10, N = 20": (dict(num_guided=10, num_tokens=20), 768 * (10 + 11 * 20), 0),
    "guided from layer 9, N = 0": (dict(num_guided=40, num_tokens=0, guided_layers=[8, 9, 10, 11]), 768 * 4 * 40, 0),
    "4 classes": (dict(classes=4, num_guided=20, num_tokens=20), 768 * (4 + 6 + 11 * 20), 0),
    "4 classes, released": (dict(classes=4, num_guided=20, num_tokens=20, fill_to=0), 768 * (4 + 11 * 20), 0),
    **{
        f"bias set {name}": (dict(num_guided=20, num_tokens=20, bias_set=name), 184_320, count)
        for name, count in {"kv": 18_432, "qkv": 27_648, "all": 102_912, "rel_vit": 66_048, "rel_mae": 37_632}.items()
    },
    "rel_mae with the class token": (
        dict(num_guided=20, num_tokens=20, bias_set=["v", "proj", "fc2", "norm2.b", "patch_embed.b", "cls"]),
        184_320,
        38_400,
    ),
    "gates": (dict(num_guided=20, num_tokens=20, connection="gate"), 184_320, 11),
    "trained prompt norm": (dict(num_guided=20, num_tokens=20, vpt_norm="layer"), 184_320, 1_536),
    **{
        f"bias {name}": (dict(num_guided=20, num_tokens=20, bias_set=[name]), 184_320, count)
        for name, count in {
            **{n: 9_216 for n in ("q", "k", "v", "proj", "fc2", "norm1.b", "norm2.b", "norm1.w", "norm2.w")},
            "fc1": 36_864,
            "cls": 768,
            "patch_embed.b": 768,
            "norm.b": 768,
            "norm.w": 768,
        }.items()
    },
}


@pytest.mark.parametrize("name", COUNTS)
def test_invariant_08_parameter_counts(name):
    config, prompts, other = COUNTS[name]
    found = count_parameters(base(**config))
    assert found["prompts"] + found["other"] == found["without_head"] == prompts + other
    assert found["head"] == config.get("classes", 200) * 769


def test_invariant_08_table_3_with_the_mean_head():
    "VPT baseline 0.36 M: 20 prompts x 12 and the mean of five heads (DA-VPT spec 2)."
    found = [count_parameters(base(classes=c, num_guided=20, num_tokens=20))["with_head"] for c in (200, 555, 102, 120, 196)]
    assert sum(found) / 5 == pytest.approx(184_320 + 180_407.4)


@pytest.mark.parametrize("changes", [{}, dict(fill_to=9), dict(num_tokens=0), dict(guided_layers=[1, 4]), dict(num_guided=9, fill_to=12),
    dict(num_guided=0)], ids=str)
def test_invariant_09_lengths(changes, vit6, floats):
    "1 + n_l + T: what enters each block."
    model, seen = davpt(vit6, floats, **changes).train(), []
    enter = model.tuner.enter

    def recording(i, z, prompts, ctx):
        segments = enter(i, z, prompts, ctx)
        seen.append(z.shape[1] + sum(s.tokens.shape[1] for s in segments))
        return segments

    model.tuner.enter = recording
    model(floats)
    settings = {**SMALL, **changes}
    guided = (settings.get("guided_layers") or [5]) if settings["num_guided"] else []
    count = min(settings["num_guided"], 5) + max(0, settings["fill_to"] - 5)
    assert seen == [17 + (count if i in guided else settings["num_tokens"]) for i in range(6)]


def recorded(monkeypatch, model, floats, labels=LABELS):
    "(features, prompts, prompt labels) of every metric loss of one pass, guided layer by guided layer: patches, then class token."
    seen, metrics = [], dict(METRICS)

    @wraps(metrics[model.config.metric])
    def spy(features, prompts, labels, *args, **settings):
        seen.append((features.detach().clone(), prompts.detach().clone(), labels.clone()))
        return metrics[model.config.metric](features, prompts, labels, *args, **settings)

    with monkeypatch.context() as patched:
        patched.setitem(METRICS, model.config.metric, spy)
        value = model.train().losses(floats, labels)[1]
    return seen, value


@pytest.mark.parametrize("changes", [{}, dict(prompt_mask=True), dict(fill_to=9), dict(bias_set="qkv")], ids=str)
def test_invariant_09_the_gathered_row(changes, vit6, floats, monkeypatch):
    "The attention output at 1 + k_b by the softmax of one query alone, in the block by itself."
    model = davpt(vit6, floats, guided_layers=[0], **changes)
    (x, p, k), _ = recorded(monkeypatch, model, floats)[0]
    block, tuner, z = model.host.blocks[0], model.tuner, model.host.embed(floats)
    own = prompts_of(model)[0]
    q, _, _ = block.heads(tuner.host_linear(0, block, "qkv", block.norm1(own[None])))
    _, keys, values = block.heads(tuner.host_linear(0, block, "qkv", block.norm1(torch.cat([z, own.expand(8, -1, -1)], 1))))
    keys, values = (t[:, :, 1:17] if changes.get("prompt_mask") else t for t in (keys, values))
    for b in range(8):
        a = torch.einsum("hd,hnd->hn", q[0, :, k[b]], keys[b]) / 32 ** 0.5
        assert close(x[b], torch.einsum("hn,hnd->hd", a.softmax(-1), values[b]).flatten())
    assert x.shape == (8, 96) and close(p, q[0].transpose(0, 1).flatten(1)[:3])


def test_invariant_10_a_label_concerns_its_own_row(vit6, floats, monkeypatch):
    model = davpt(vit6, floats)
    other = LABELS.clone()
    other[3] = 4
    a, b = (recorded(monkeypatch, model, floats, labels)[0] for labels in (LABELS, other))
    assert [row for row in range(8) if not torch.equal(a[0][0][row], b[0][0][row])] == [3]
    assert torch.equal(a[1][0], b[1][0]) and (a[0][2] != b[0][2]).nonzero().flatten().tolist() == [3]


def test_invariant_11_map_of_the_tuner(floats):
    "More prompts than classes: the identity; the extra prompts are in no loss."
    model = davpt(tiny(), floats.float(), num_guided=9, fill_to=12, detach_features=True)
    plan = plan_of(model)
    assert plan.prompt_of.tolist() == [*range(5)] and prompts_of(model)[5].shape == (12, 96)
    found = own_grads(model, floats.float())["prompts.5"]
    assert found[:5].norm(dim=1).min() > 0 and not found[5:].any()


@pytest.mark.parametrize("seed", range(3))
def test_invariant_11_prepared_maps(seed):
    "Every prompt owns a class, the same seed gives the same map, and classes that look alike share a prompt."
    generator = torch.Generator().manual_seed(seed)
    looks = torch.randn(3, 3, 32, 32, generator=generator)
    labels = torch.arange(9).repeat(4)
    images = looks[labels % 3] + 0.05 * torch.randn(36, 3, 32, 32, generator=generator)
    models = [tune(tiny(), "da_vpt", 9, seed=seed, **SMALL) for _ in "ab"]
    for model in models: model.prepare(images, labels)
    found = plan_of(models[0]).prompt_of
    assert torch.equal(found, plan_of(models[1]).prompt_of) and found.unique().numel() == 3
    assert all(len(found[i::3].unique()) == 1 for i in range(3))


@pytest.mark.parametrize("name", ["paper", "released", "pool all"])
def test_invariant_12_means_collected_in_training(name, vit6, floats):
    "Of the features that the pass computed anyway, in batches of any size; an epoch begins with none."
    model = davpt(vit6, floats, **CONFIGS[name]).train()
    means = model.tuner.guidance.means
    means.reset()
    for rows in ([0, 1, 2], [3], [5, 6, 7]): model.losses(floats[rows], LABELS[rows])
    with torch.no_grad(): features = model(floats), model.features(floats)
    rows = torch.tensor([0, 1, 2, 3, 5, 6, 7])
    for c in range(5): assert close(means.means[c], features[1][rows][LABELS[rows] == c].mean(0), 1e-9)
    assert means.counts.tolist() == [2, 2, 1, 1, 1]
    with torch.no_grad(): model.eval().losses(floats, LABELS)
    assert means.counts.sum() == 7
    model.after_epoch(50)
    assert means.counts.sum() == 0


@pytest.mark.parametrize(
    "changes", [{}, dict(preset="released", num_guided=3), dict(patch_feature="key_mean"), dict(metric="pnca")], ids=str
)
def test_invariant_13_what_the_metric_losses_reach(changes, vit6, floats):
    "Prompts and biases up to the guided layer."
    model = davpt(vit6, floats, guided_layers=[3], **{**changes, "bias_set": ["v", "norm1.w"]})
    found = {n for n, g in own_grads(model, floats).items() if g.abs().max() > 1e-9}
    assert {f"prompts.{i}" for i in range(4)} <= found and not found & {f"prompts.{i}" for i in (4, 5)}
    assert {f"v_bias.{i}" for i in range(3)} <= found and not found & {f"v_bias.{i}" for i in (4, 5)}
    assert {f"blocks.{i}.norm1.weight" for i in range(3)} <= found and not found & {f"blocks.{i}.norm1.weight" for i in (4, 5)}
    assert ("v_bias.3" in found) == (model.config.patch_feature == "attn_out")
    assert not any(g.abs().max() for g in grads(model.losses(floats, LABELS)[1], list(model.head.parameters())))


@pytest.mark.parametrize("layers", [[3], [1, 4], ALL_LAYERS])
def test_invariant_13_detached(layers, vit6, floats):
    "Features are constants: only the guided layers' own prompts are left, raw; with the projection, its parameters too."
    model = davpt(vit6, floats, guided_layers=layers, detach_features=True, prompt_feature="raw", bias_set="all")
    assert {n for n, g in own_grads(model, floats).items() if g.any()} == {f"prompts.{i}" for i in layers}
    model = davpt(vit6, floats, guided_layers=layers, detach_features=True, prompt_feature="query", bias_set="all")
    assert {n for n, g in own_grads(model, floats).items() if g.any()} == {f"{n.format(i)}" for i in layers
                                                                           for n in ("prompts.{}", "q_bias.{}", "blocks.{}.norm1.bias")}


@pytest.mark.parametrize("name", ["paper", "biases all", "biases rel_vit", "gate", "layer norm"])
def test_invariant_16_parameter_groups(name, floats):
    model = davpt(tiny(), floats.float(), **CONFIGS[name])
    groups = model.param_groups(1e-3, 0.01, head_weight_decay=3.0)
    grouped = [(id(p), g) for g in groups for p in g["params"]]
    assert len(grouped) == len(model.trainable()) and {i for i, _ in grouped} == {id(p) for p in model.trainable().values()}
    decay = {i: g["weight_decay"] for i, g in grouped}
    for n, p in model.trainable().items():
        wanted = 3.0 if n == "head.weight" else 0.01 if p.ndim > 1 and "prompts" in n else 0.0 if p.ndim <= 1 else None
        assert wanted is None or decay[id(p)] == wanted, n                # the class token, (1, 1, D), may do either
        assert {g["lr"] for g in groups} == {1e-3}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "changes", [{}, dict(preset="released", num_guided=3), dict(metric="pnca_rel"), dict(patch_feature="topk_cross_attn")], ids=str
)
def test_invariant_20_losses_are_not_rounded(changes, dtype, floats, monkeypatch):
    "What autocast computes is the loss in float32 of the features that it computed, even at r = 60."
    model = davpt(tiny(), floats.float(), **{**changes, "sim_scale": 60.0})
    with torch.autocast("cpu", dtype): seen, inside = recorded(monkeypatch, model, floats.float())
    settings = {n: getattr(model.config, n) for n in metric_settings(model.config.metric)}
    patch, cls = (METRICS[model.config.metric](x.double(), p.double(), k, **settings) for x, p, k in seen)
    assert inside.dtype == torch.float32 and inside.item() == pytest.approx((0.7 * patch + 0.3 * cls).item(), rel=1e-3)
    params = list(model.tuner.trainable(model.host).values())
    with torch.autocast("cpu", dtype): value = model.losses(floats.float(), LABELS)[1]
    assert all(g.isfinite().all() for g in grads(value, params))


def test_invariant_21_the_released_feature_is_the_mean_of_input_patches(vit6, floats, monkeypatch):
    model = davpt(vit6, floats, preset="released", num_guided=3)
    entered, enter = {}, model.tuner.enter

    def recording(i, z, prompts, ctx):
        entered[i] = z.detach()
        return enter(i, z, prompts, ctx)

    model.tuner.enter = recording
    (patch, cls), _ = recorded(monkeypatch, model, floats)
    assert close(patch[0], entered[5][:, 1:].mean(1)) and close(patch[1], prompts_of(model)[5])
    block = model.host.blocks[5]
    assert close(cls[0], model.tuner.host_linear(5, block, "qkv", block.norm1(entered[5][:, :1]), "q")[:, 0]) and close(cls[1], patch[1])


# Presets, cost, state

def test_presets():
    "Section 1.13."
    config = {preset: tune(tiny(), "da_vpt", 5, preset=preset).config for preset in ("paper", "released", "released_legacy")}
    sides = lambda c: (c.patch_feature, c.prompt_feature, c.cls_feature, c.prompt_feature_cls)
    assert sides(config["paper"]) == ("attn_out", "query", "raw", "raw") and sides(config["released"]) == (
        "input_mean",
        "raw",
        "query",
        "raw",
    )
    assert sides(config["released_legacy"]) == ("key_mean", "query", "query", "key")
    for name, paper, released in (
        ("alpha", 32.0, 32.0),
        ("delta", 0.1, 0.1),
        ("sim_scale", 1.0, 5.0),
        ("pos_reduction", "positives", "all"),
        ("init_pass", "full_epoch", "10_per_class"),
        ("map_update_from", 0, 10),
        ("map_norm", "layer", "layer"),
        ("map_start", "spread", "rows"),
        ("map_empty", "reseed", "keep"),
        ("map_unseen", "keep", "random"),
        ("map_degenerate", "keep", "reset"),
        ("fill_to", 10, 0),
        ("bias_set", "none", "rel_vit"),
        ("init_scale", 1.0, 0.125),
        ("prompt_mask", False, False),
        ("vpt_norm", "none", "none"),
        ("patch_weight", 0.01, 0.01),
        ("cls_weight", 0.01, 0.01),
        ("metric", "proxy_anchor", "proxy_anchor"),
        ("num_guided", 20, 10),
        ("num_tokens", 20, 20),
    ):
        for preset, wanted in (("paper", paper), ("released", released), ("released_legacy", released)):
            assert getattr(config[preset], name) == wanted, (name, preset)
    assert {"da_vpt", "da_vpt_ship"} <= set(list_methods())


@pytest.mark.parametrize("changes", [{}, dict(bias_set="kv"), dict(bias_set="all"), dict(preset="released", num_guided=10, num_tokens=10),
    dict(prompt_mask=True), dict(vpt_norm="l2"),
                                     dict(patch_feature="topk_cross_attn"), dict(guided_layers=[1, 3, 5])], ids=str)
def test_inference_costs_what_vpt_deep_costs(changes):
    ours = tune(tiny(), "da_vpt", 50, **{**dict(num_guided=10, num_tokens=10), **changes})
    assert count_macs(ours, 32) == count_macs(tune(tiny(), "vpt_deep", 50, num_tokens=10), 32)


@pytest.mark.parametrize(
    "name",
    ["paper", "released", "gate", "layer norm", "biases all", "more prompts than classes", "extra prompts", "no guidance", "guided [1, 4]"],
)
def test_save_and_load(name, floats, tmp_path):
    "Weights, map and settings; training goes on without another look at the images."
    images = floats.float()
    model = davpt(tiny(), images, **CONFIGS[name])
    model.eval().save_pretrained(tmp_path)
    loaded = load_tuned(tmp_path, tiny())
    with torch.no_grad():
        assert loaded.config == model.config and torch.equal(loaded(images), model(images))
        if model.config.num_guided: assert torch.equal(plan_of(loaded).prompt_of, plan_of(model).prompt_of)
        assert torch.equal(torch.stack(loaded.train().losses(images, LABELS)), torch.stack(model.train().losses(images, LABELS)))
    for m in (model, loaded): m.after_epoch(20)
    if model.config.num_guided: assert torch.equal(plan_of(loaded).prompt_of, plan_of(model).prompt_of)


def test_save_and_load_with_prompts_from_patches(floats, tmp_path):
    model = davpt(tiny(), floats.float(), init="mean")
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad(): assert torch.equal(load_tuned(tmp_path, tiny())(floats.float()), model(floats.float()))


def test_map_is_renewed_when_the_settings_say():
    "By epoch, and with the runs counted."
    images, labels = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 5
    for start, expected in ((0, [2, 3, 4, 5]), (2, [1, 1, 2, 3]), (None, [1, 1, 1, 1])):
        model = tune(tiny(), "da_vpt", 5, **{**SMALL, "map_update_from": start})
        model.prepare(images, labels)
        runs = []
        for epoch in range(4):
            model.train().losses(images, labels)
            model.after_epoch(epoch)
            runs.append(len(model.diagnostics(images)["map_seconds"]))
        assert runs == expected
        found = model.diagnostics(images)
        assert len(found["map_changed"]) == runs[-1] and all(s >= 0 for s in found["map_seconds"])
        assert found["prompts_used"] == plan_of(model).prompt_of.unique().numel()


def test_a_map_that_cannot_change_is_not_renewed(floats):
    for changes in (dict(num_guided=5), dict(num_guided=9), dict(map_mode="balanced")):
        model = davpt(tiny(), floats.float(), **changes)
        before = plan_of(model).prompt_of.clone()
        model.train().losses(floats.float(), LABELS)
        model.after_epoch(3)
        if changes != dict(num_guided=5): assert torch.equal(plan_of(model).prompt_of, before)
        else: assert plan_of(model).prompt_of.unique().numel() == 5       # as many as classes: one each, whichever


def test_equal_seeds_equal_runs(floats):
    def run(seed):
        model = tune(tiny(), "da_vpt", 5, seed=seed, **{**SMALL, "preset": "released", "num_guided": 3, "map_update_from": 1})
        model.prepare(floats.float(), LABELS)
        optimizer, values = torch.optim.SGD(model.param_groups(0.01, 0.0)), []
        for epoch in range(4):
            optimizer.zero_grad()
            values.append(model.train().loss(floats.float(), LABELS))
            values[-1].backward()
            optimizer.step()
            model.after_epoch(epoch)
        return [v.item() for v in values], plan_of(model).prompt_of.tolist()

    state = torch.random.get_rng_state()
    first, again, other = run(0), run(0), run(1)
    assert first == again and first[0] != other[0]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_another_precision_keeps_the_map_working(floats):
    model = davpt(tiny(), floats.float()).float().train()
    model.losses(floats.float(), LABELS)
    model.after_epoch(0)
    assert len(model.diagnostics(floats.float())["map_seconds"]) == 2


def test_prompt_dropout_spares_the_loss(floats):
    "Tokens that enter are dropped, the prompts of the loss are not (DA-VPT spec 1.1)."
    settings = dict(guided_layers=[0], patch_feature="input_mean", bias_set="none")
    plain, dropped = (davpt(tiny(), floats.float(), dropout=rate, **settings).train() for rate in (0.0, 0.5))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        a, b = plain.losses(floats.float(), LABELS), dropped.losses(floats.float(), LABELS)
    assert torch.equal(a[1], b[1]) and not close(a[0], b[0], 1e-3)
    with torch.no_grad(): assert torch.equal(plain.eval()(floats.float()), dropped.eval()(floats.float()))


def test_stochastic_depth_trains(floats):
    for name in ("paper", "gate, masked", "pool all"):
        model = davpt(tiny(), floats.float(), std=0.1, **CONFIGS[name]).train()
        model.drop_path = 0.3
        model.loss(floats.float(), LABELS).backward()
        assert all(p.grad.isfinite().all() for p in model.trainable().values())


# The same guidance on SHIP's prompts

SHIP = dict(num_tokens=4, num_shared=2, num_attributes=3, num_prototypes=5, num_matching=3, starts=[0, 2, 4], method="da_vpt_ship")


@pytest.mark.parametrize("changes", [{}, dict(preset="released"), dict(decoupled=False)], ids=str)
def test_guided_ship_is_ship(changes, floats):
    "Guidance changes no feature; without weights not even a gradient; the seed gives the prompts of SHIP."
    settings = {n: v for n, v in {**SHIP, **changes}.items() if n != "method"}
    images, alone = floats.float(), tune(tiny(), "ship", 5, seed=2, **settings)
    alone.prepare(images, LABELS)
    for weights in (dict(patch_weight=0.0, cls_weight=0.0), {}):
        ours = tune(tiny(), "da_vpt_ship", 5, seed=2, **settings, num_guided=3, **weights)
        ours.prepare(images, LABELS)
        with torch.no_grad():
            for mode in (True, False): assert torch.equal(ours.train(mode)(images), alone.train(mode)(images))
        if not weights: continue
        params = [dict(m.train().tuner.named_parameters()) for m in (ours, alone)]
        a, b = (grads(m.loss(images, LABELS), list(p.values())) for m, p in zip((ours, alone), params))
        assert params[0].keys() == params[1].keys() and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(decoupled=False),
        dict(preset="released", guided_layers=[1, 5]),
        dict(sip_mode="reinsert", metric="pnca"),
        dict(patch_feature="topk_cross_attn", topk=3),
        dict(patch_feature="key_mean", cls_feature="key"),
        dict(patch_feature="attn_out_patch_mean"),
    ],
    ids=str,
)
def test_guided_ship_compares_what_da_vpt_compares(changes, vit6, floats):
    "The slow form's losses of what enters the guided blocks: instance tokens and all prompts, the mean of the semantic ones as proxies."
    guiding = {n: SMALL[n] for n in ("num_guided", "patch_weight", "cls_weight")}
    model, entered = davpt(vit6, floats, **{**guiding, **SHIP, "pml_weight": 0.0, **changes}), {}
    enter = model.tuner.enter

    def recording(i, z, prompts, ctx):
        segments = enter(i, z, prompts, ctx)
        entered[i] = z, sorted(((s.name != "sip", s.tokens.expand(len(z), -1, -1)) for s in segments), key=lambda pair: pair[0])
        return segments

    model.tuner.enter = recording
    own, w, losses = model.train().losses(floats, LABELS)[1], dict(vit6.named_parameters()), []
    for i in model.config.guided_layers or [5]:
        z, prompts = entered[i]
        x = torch.cat([z[:, :1], *(tokens for _, tokens in prompts), z[:, 1:]], 1)
        s = reference_attention(w, i, x, 3, torch.zeros(x.shape[1], x.shape[1]))
        patch, cls = reference_layer_losses(w, i, s, x, prompts[0][1].mean(0)[:3], 16, plan_of(model)(LABELS), model.config)
        losses.append(0.7 * patch + 0.3 * cls)
    assert close(own, sum(losses) / len(losses))
    params = list(model.tuner.parameters())
    for ga, gb in zip(grads(own, params), grads(sum(losses) / len(losses), params)): assert close(ga, gb) and ga.shape


# Initial prompts (DA-VPT spec 1.1, 1.10)

@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_released_bound(scale):
    """sqrt(6 / ((layers of a group + prompts) D)): for width 768 it is 0.01587 with 11 x 20 prompts and 0.02665 with 1 x 10; an eighth
    of it released."""
    prompts = prompts_of(tune(sharp_vit(depth=12), "da_vpt", 200, num_guided=10, num_tokens=20, init_scale=scale))
    for group, n, printed in ((prompts[:11], 20, 0.01587), (prompts[11:], 10, 0.02665)):
        bound, largest = (6 / ((len(group) + n) * 96)) ** 0.5, torch.cat(group).abs().max().item()
        assert 0.98 * scale * bound < largest <= scale * bound and bound * (96 / 768) ** 0.5 == pytest.approx(printed, rel=1e-3)


@pytest.mark.parametrize("kind", ["mean", "max"])
def test_prompts_from_patches(kind):
    """Without noise all of a layer's are the mean, or the maximum, of what enters the layer of the pretrained model; the noise has a
    fifth of their deviation."""
    images, labels = torch.randn(50, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 5
    vit, exact, noisy = tiny(), *(
        tune(tiny(), "da_vpt", 5, **{**SMALL, "num_tokens": 40, "init": kind, "init_noise": noise}) for noise in (0.0, 0.2)
    )
    for model in (exact, noisy): model.prepare(images, labels)
    with torch.no_grad(): z = vit._pos_embed(vit.patch_embed(images))
    for i, block in enumerate(vit.blocks):
        tokens = z[:, 1:].flatten(0, 1)
        wanted = tokens.mean(0) if kind == "mean" else tokens.amax(0)
        assert close(prompts_of(exact)[i], wanted.expand_as(prompts_of(exact)[i]), 1e-5)
        if i < 5: assert 0.15 < ((prompts_of(noisy)[i] - wanted).std() / tokens.std(0).mean()).item() < 0.25
        with torch.no_grad(): z = block(z)


@pytest.mark.parametrize("kind", ["mean", "kmeans"])
def test_prompts_from_patches_follow_the_seed(kind):
    "That of the model, whatever the global generator is at; prompts of a layer differ."
    images, labels, found = torch.randn(80, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(80) % 5, []
    for seed, state in ((1, 0), (1, 1), (2, 1)):
        model = tune(tiny(), "da_vpt", 5, seed=seed, **{**SMALL, "init": kind})
        with torch.random.fork_rng():
            torch.manual_seed(state)
            model.prepare(images, labels)
        found.append(torch.cat(prompts_of(model)))
    assert torch.cdist(found[0], found[0]).fill_diagonal_(1).min() > 1e-3
    assert torch.equal(found[0], found[1]) and not close(found[1], found[2], 1e-3)


# Bad input

@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(guided_layers=[6]), r"guided_layers = \[6\].*6 blocks"),
        (dict(guided_layers=[-1]), r"guided_layers = \[-1\]"),
        (dict(guided_layers=[2, 2]), r"guided_layers = \[2, 2\]"),
        (dict(guided_layers=[]), r"guided_layers = \[\]"),
        (dict(num_guided=-1), "num_guided = -1"),
        (dict(num_tokens=-1), "num_tokens = -1"),
        (dict(fill_to=-1), "fill_to = -1"),
        (dict(topk=0, patch_feature="topk_cls_attn"), "topk = 0"),
        (dict(topk=17, patch_feature="topk_cls_attn"), "topk = 17.*16"),
        (dict(topk_scale="heads", patch_feature="topk_cls_attn"), "scale = 'heads'.*heads='composed'"),
        (dict(patch_feature="attn"), "patch_feature"),
        (dict(metric="arcface"), "metric"),
        (dict(bias_set="kq"), "unknown bias set 'kq'.*kv"),
        (dict(bias_set=["k", "norm3.b"]), "norm3.b"),
        (dict(connection="linear"), "connection"),
        (dict(connection_ratio=1.5), "connection_ratio = 1.5"),
        (dict(dropout=1.0), "dropout = 1.0"),
        (dict(patch_weight=-1.0), "patch_weight = -1.0"),
        (dict(cls_weight=float("nan")), "cls_weight = nan"),
        (dict(init_noise=-0.2), "init_noise = -0.2"),
        (dict(map_update_from=-1), "map_update_from = -1"),
        (dict(metric="pnca", num_guided=1), "num_guided = 1, 5 classes.*another metric"),
        (dict(map_mode="kmeans_balanced", map_empty="keep"), "reseed"),
    ],
    ids=str,
)
def test_bad_settings(changes, message, floats):
    with pytest.raises((ValueError, KeyError), match=message):
        model = tune(tiny(), "da_vpt", 5, **{**SMALL, **changes})
        model.prepare(floats.float(), LABELS)
        model.train().loss(floats.float(), LABELS)


@pytest.mark.parametrize("key", ["query_vpt_emb", "patch_type", "guided_depth", "num_prompts"])
def test_unknown_and_legacy_keys(key):
    with pytest.raises((TypeError, ValueError), match=f"{key}.*Known.*patch_feature"): tune(tiny(), "da_vpt", 5, **{key: 1})


def test_unknown_presets():
    with pytest.raises(KeyError, match="released_legacy"): tune(tiny(), "da_vpt", 5, preset="rel")


def test_labels_outside_the_map(vit6, floats):
    model = tune(vit6, "da_vpt", 5, **SMALL).double()
    with pytest.raises(ValueError, match="label 7 is outside the map of 5 classes"):
        model.prepare(floats, torch.where(LABELS == 3, 7, LABELS))
    with pytest.raises(ValueError, match="label -1 is outside the map of 5 classes"): model.prepare(floats, LABELS - 1)
    model.prepare(floats, LABELS)
    with pytest.raises((ValueError, IndexError, RuntimeError), match="out of bounds|outside the map"):
        model.train().loss(floats, LABELS + 1)


def test_a_class_without_samples(vit6, floats):
    "It keeps its place in the cold map, i mod M; the others are clustered. Too few classes for the prompts are an error."
    model = tune(vit6, "da_vpt", 6, **SMALL).double()
    model.prepare(floats, LABELS)
    assert plan_of(model).prompt_of[5] == 5 % 3 and plan_of(model).prompt_of[:5].unique().numel() >= 2
    assert model.train().loss(floats, LABELS).isfinite()
    with pytest.raises(ValueError, match="3 clusters need at least 3 classes with samples, there are 2"):
        tune(vit6, "da_vpt", 6, **SMALL).double().prepare(floats, LABELS % 2)


def test_a_refused_prepare_leaves_nothing_behind(vit6, floats):
    model = tune(vit6, "da_vpt", 5, **SMALL).double()
    images, labels = floats.repeat(20, 1, 1, 1), LABELS.repeat(20)
    with pytest.raises(ValueError, match="label 5 is outside"): model.prepare(images, torch.cat([labels[:-1], torch.tensor([5])]))
    seen = []
    model.tuner.guidance.map.update = lambda means, *rest: seen.append(model.tuner.guidance.means.counts.clone()) or 0
    model.prepare(images, labels)
    assert seen[0].tolist() == labels.bincount().tolist()


def test_all_classes_in_one_cluster(vit6, floats):
    "Equal images: reseeding spreads the classes over the prompts, the released rule leaves i mod M (D11)."
    same = floats[:1].repeat(8, 1, 1, 1)
    for changes in ({}, dict(map_empty="keep", map_degenerate="reset")):
        model = tune(vit6, "da_vpt", 5, **SMALL, **changes).double()
        model.prepare(same, LABELS)
        found = plan_of(model).prompt_of
        assert found.unique().numel() == 3 and (not changes or found.tolist() == [0, 1, 2, 0, 1])
        assert model.train().loss(same, LABELS).isfinite()


def test_no_guided_prompts(vit6, floats):
    "M = 0: every block has N prompts; nothing to prepare, no loss, no state."
    model = tune(vit6, "da_vpt", 5, **{**SMALL, "num_guided": 0}).double()
    entropy, own = model.train().losses(floats, LABELS)
    assert own == 0 and not any("map" in n for n, _ in model.tuner.named_buffers())
    model.after_epoch(0)
    assert [len(p) for p in prompts_of(model)] == [4] * 6


def test_training_before_prepare(vit6, floats):
    "The forward pass needs no map; a loss with guidance does."
    model = tune(vit6, "da_vpt", 5, **SMALL).double()
    assert model(floats).shape == (8, 5) and model.losses(floats, LABELS)[1] == 0
    with pytest.raises(RuntimeError, match=r"model.prepare\(images, labels\)"): model.train().loss(floats, LABELS)


OWN_MAP = torch.tensor([2, 0, 1, 0, 2])


@pytest.mark.parametrize("method", ["da_vpt", "da_vpt_ship"])
@pytest.mark.parametrize("way", ["assign", "restore", "load_state_dict"])
def test_a_map_that_is_given_prepares(vit6, floats, way, method):
    "Training asks for no `prepare`, which leaves the map as it is; a saved model keeps it."
    settings = SMALL if method == "da_vpt" else dict(starts=[0, 2], num_tokens=4, num_guided=3, num_ap_hierarchies=0, num_matching=3)
    model = tune(vit6, method, 5, **settings).double()
    plan, state = plan_of(model), {"guidance.map.prompt_of": OWN_MAP}
    if way == "load_state_dict": model.tuner.load_state_dict(state, strict=False)
    else:
        if way == "restore": model.tuner.restore(state)
        plan.assign(OWN_MAP)
    assert model.train().loss(floats, LABELS).isfinite()
    model.prepare(floats, LABELS)
    assert torch.equal(plan.prompt_of, OWN_MAP)
    again = tune(vit6, method, 5, **settings).double()
    again.tuner.load_state_dict(model.tuner.state_dict())
    assert torch.equal(again.train().loss(floats, LABELS), model.loss(floats, LABELS))


@pytest.mark.parametrize("method", ["da_vpt", "da_vpt_ship"])
@pytest.mark.parametrize("name, shape", [("guidance.map.prompt_of", (6,)), ("guidance.map.centroids", (4, 64)), ("prompts", (3, 32))])
@pytest.mark.parametrize("load", ["restore", "load_state_dict"])
def test_restore_refuses_other_shapes(vit6, name, shape, method, load):
    "Our own error, with the name and both shapes, before anything is copied."
    settings = SMALL if method == "da_vpt" else dict(starts=[0, 2], num_tokens=4, num_guided=3, num_ap_hierarchies=0, num_matching=3)
    model = tune(vit6, method, 5, **settings).double()
    own = {n: tuple(t.shape) for n, t in model.tuner.state_dict().items()}
    name = {"da_vpt": "prompts.5", "da_vpt_ship": "sip_prompts"}[method] if name == "prompts" else name
    state = {n: t.clone() for n, t in model.tuner.state_dict().items()}
    message = f"{name} has shape {shape}, has to be {own[name]}: make the model with"
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(model.tuner, load)(state | {name: torch.zeros(shape, dtype=state[name].dtype)})
    assert not plan_of(model).prepared and all(torch.equal(t, state[n]) for n, t in model.tuner.state_dict().items())


def test_a_backbone_without_class_token(floats):
    "The class token's loss is refused; the patch loss works."
    vit = sharp_vit(depth=4, class_token=False, global_pool="avg").double()
    with pytest.raises(ValueError, match="class token"): tune(vit, "da_vpt", 5, **SMALL)
    model = tune(vit, "da_vpt", 5, **{**SMALL, "cls_weight": 0.0}).double()
    model.prepare(floats, LABELS)
    assert model.train().loss(floats, LABELS).isfinite()


def test_images_that_are_not_finite(vit6, floats):
    with pytest.raises(ValueError, match="not finite"): tune(vit6, "da_vpt", 5, **SMALL).double().prepare(floats * float("nan"), LABELS)


def seen_losses(model, images, present):
    "The metric loss of a pass whose images have several classes."
    ctx = Context(labels=present, training=True)
    model._features(images, ctx)
    return model.tuner.aux_loss(ctx), ctx


@pytest.mark.parametrize("seg_label", ["random", "mode"])
def test_images_without_a_class_are_left_out_of_the_metric_loss(seg_label):
    model = tune(load_backbone("tiny_random"), "da_vpt", 6, num_guided=3, num_tokens=2, fill_to=0, seg_label=seg_label)
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    present = torch.zeros(5, 6, dtype=torch.bool)
    present[torch.arange(4), torch.tensor([0, 3, 5, 2])] = True
    model.prepare(images, present)
    model.train()
    whole, ctx = seen_losses(model, images, present)
    some, _ = seen_losses(model, images[:4], present[:4])
    single, _ = seen_losses(model, images[:4], torch.tensor([0, 3, 5, 2]))
    torch.testing.assert_close(whole, some, rtol=1e-6, atol=0)
    torch.testing.assert_close(some, single, rtol=0, atol=0)      # one class each: the same as labels
    assert ctx.reads["labelled"].tolist() == [0, 1, 2, 3]
    nothing, _ = seen_losses(model, images, torch.zeros_like(present))
    assert nothing.item() == 0 and nothing.requires_grad


def test_a_present_class_is_drawn_uniformly_and_by_the_global_seed():
    present = torch.tensor([[True, False, True, True]]).expand(3000, 4)
    torch.manual_seed(3)
    first = one_of(present)
    torch.manual_seed(3)
    assert torch.equal(first, one_of(present))
    assert first.bincount(minlength=4)[1] == 0 and (first.bincount(minlength=4)[[0, 2, 3]] > 900).all()


def test_ties_of_the_released_choice_are_broken_at_random_among_the_winners():
    model = tune(load_backbone("tiny_random"), "da_vpt", 6, num_guided=3, num_tokens=2, fill_to=0, seg_label="mode")
    guidance = model.tuner.guidance
    guidance.map.prepared = True
    guidance.map.assign(torch.tensor([0, 0, 1, 1, 2, 2]))
    present = torch.tensor([[True, True, True, True, True, False]]).expand(500, 6)      # prompts 0 and 1 twice, 2 once
    counts = guidance.most_frequent(present).bincount(minlength=3)
    assert counts[2] == 0 and (counts[:2] > 150).all()


def test_a_class_mean_counts_an_image_for_each_of_its_classes():
    means, features = ClassMeans(3, 4), torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    present = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)
    means.add(features[:2], present[:2])
    means.add(features[2:], present[2:])
    for c in (0, 1): torch.testing.assert_close(means.means[c], features[present[:, c]].mean(0), rtol=1e-12, atol=0)
    assert means.seen.tolist() == [True, True, False]
    with pytest.raises(ValueError, match="they have to be"): means.add(features, present[:, :2])
    few = few_per_class(present, 10, torch.Generator().manual_seed(0))
    assert present[few[:10], 0].all() and present[few[10:], 1].all() and len(few) == 20


@pytest.mark.parametrize("method", ["da_vpt", "da_vpt_ship", "ship"])
def test_what_a_method_counts_and_draws_survives_a_checkpoint(method):
    own, other = (tune(load_backbone("tiny_random"), method, 4, seed=seed).tuner for seed in (0, 1))
    own.after_epoch(2) if method == "ship" else own.guidance.generator.manual_seed(77)
    if method == "da_vpt_ship": own.epoch = 5
    other.recall({name: t.clone() for name, t in own.memory().items()})
    assert other.memory().keys() == own.memory().keys() and all(torch.equal(other.memory()[n], t) for n, t in own.memory().items())
    if method != "da_vpt": assert other.epoch == own.epoch > 0
