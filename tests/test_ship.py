"SHIP: the invariants of its spec, the engine's form against the slow one, counts, partition, bad input."
import math
import re
from dataclasses import replace

import pytest
import reference
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_engine import ARCHITECTURES, make_vit
from torch.utils.flop_counter import FlopCounterMode

from hierprompt.data.tasks import Split
from hierprompt.engine.accounting import count_macs, count_parameters
from hierprompt.engine.block_loop import Context
from hierprompt.engine.hosts import as_host
from hierprompt.engine.saved import load_tuned
from hierprompt.engine.tuned import tune
from hierprompt.methods.ship.affinity import affinity, layer_features, pairwise_cosine, partition
from hierprompt.methods.ship.reference import reference_forward
from hierprompt.methods.ship.ship import (
    cls_scores,
    matching_loss,
    prompt_share,
    prototypes,
    select,
)
from hierprompt.papers.ship import logged_parameters
from hierprompt.results.published import load_published
from hierprompt.training.loop import Trainer, fit, make_resident
from hierprompt.training.recipes import RECIPES, learning_rates

SMALL = dict(num_tokens=5, num_shared=2, num_attributes=4, num_prototypes=7, num_matching=3, starts=[0, 2, 4])   # for 17 tokens, 8 images
NOTHING = dict(num_tokens=0, num_shared=0, num_ap_hierarchies=0, pml_weight=0.0)
SIP_ONLY = dict(num_shared=0, num_ap_hierarchies=0, pml_weight=0.0, decoupled=False)
LABELS = torch.arange(8) % 3
EXACT = 1e-5    # float32, relative to the largest value: room for another order of summation only
UPDATES = ["skip_attn", "proj_ln", "freeze", "p2ip"]


def sharp_vit(depth=6, **changes):
    "A random ViT whose attention is far from uniform and whose blocks change the tokens by their own size."
    vit = make_vit(depth=depth, **changes)
    generator = torch.Generator().manual_seed(7)
    for name, p in vit.named_parameters():
        if "norm" in name and name.endswith("weight"): p += 1
        if p.ndim > 1: p.normal_(std=(1.5 if "qkv" in name else 1.0) * p[0].numel() ** -0.5, generator=generator)
    return vit


@pytest.fixture(scope="module")
def vit6(): return sharp_vit()


@pytest.fixture(scope="module")
def floats(): return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def ship(vit, floats, prompt_std=0.5, **config):
    "A prepared SHIP with prompts and prototypes that matter."
    model = tune(vit, "ship", 3, **{**SMALL, **config})
    if not model.tuner.prepared: model.prepare(floats, LABELS)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in sorted(model.tuner.named_parameters()): p.normal_(std=prompt_std, generator=generator)
        for p in model.tuner.buffers(): p.normal_(generator=generator) if p.is_floating_point() else None
    return model


def forward(model, floats):
    "Features and the weighted matching loss of one pass in the model's mode."
    ctx = Context(labels=LABELS[:len(floats)], training=model.training)
    features = model.engine(floats, ctx)
    return features, torch.as_tensor(model.tuner.aux_loss(ctx), dtype=features.dtype)


def watch(model, floats):
    "What enters every block in training mode: instance tokens (B, n, D), and the prompts of all segments side by side (B, T, D)."
    seen, enter = [], model.tuner.enter

    def recording(i, z, prompts, ctx):
        segments = enter(i, z, prompts, ctx)
        seen.append((z.detach(), torch.cat([z[:, :0], *(s.tokens.expand(len(z), -1, -1) for s in segments)], 1).detach()))
        return segments

    model.train().tuner.enter = recording
    model.features(floats)
    del model.tuner.enter
    return seen


def close(a, b, tolerance=EXACT): return (a - b).abs().max() <= tolerance * max(1, b.abs().max())


# The engine's form against the slow one

CONFIGS = {
    "paper": {},
    "released": dict(preset="released"),
    **{f"{update}": dict(prompt_update=update) for update in UPDATES},
    **{f"{update}, no p2ip in the last block": dict(prompt_update=update, p2ip_last=False) for update in UPDATES},
    **{f"{update}, reinserted": dict(prompt_update=update, sip_mode="reinsert") for update in UPDATES},
    "joint": dict(decoupled=False),
    "joint, reinserted": dict(decoupled=False, sip_mode="reinsert"),
    "joint, released": dict(decoupled=False, preset="released"),
    "joint, no p2ip in the last block": dict(decoupled=False, p2ip_last=False),
    "joint, SIP only": SIP_ONLY,
    "joint, SIP and PML": dict(SIP_ONLY, pml_weight=0.5),
    "joint, no SIP": dict(decoupled=False, num_tokens=0),
    "joint, no prompts": dict(NOTHING, decoupled=False),
    "no prompts": NOTHING,
    "no prompts but PML": dict(NOTHING, pml_weight=0.5),
    "no SIP": dict(num_tokens=0),
    "no SIP, released": dict(num_tokens=0, preset="released"),
    "no SIP, p2ip": dict(num_tokens=0, prompt_update="p2ip"),
    "no SSP": dict(num_shared=0),
    "no AP": dict(num_ap_hierarchies=0),
    "no PML": dict(pml_weight=0.0),
    "AP only": dict(num_tokens=0, num_shared=0),
    "SSP only": dict(num_tokens=0, num_ap_hierarchies=0),
    "DA and SIP only": dict(num_shared=0, num_ap_hierarchies=0, pml_weight=0.0),
    "DA, SIP, SSP": dict(num_ap_hierarchies=0, pml_weight=0.0),
    "DA, SIP, SSP, AP": dict(pml_weight=0.0),
    "no PML, released": dict(pml_weight=0.0, preset="released"),
    "no PML, p2ip": dict(pml_weight=0.0, prompt_update="p2ip"),
    "one prompt": dict(num_tokens=1),
    "one of everything": dict(num_tokens=1, num_shared=1, num_attributes=1, num_matching=1),
    "one AP": dict(num_ap_hierarchies=1),
    "more AP than hierarchies": dict(num_ap_hierarchies=9),
    "one hierarchy": dict(starts=[0]),
    "one hierarchy, released": dict(starts=[0], preset="released"),
    "two hierarchies": dict(starts=[0, 5]),
    "a hierarchy in every block": dict(starts=[*range(6)]),
    "every block, released": dict(starts=[*range(6)], preset="released", num_ap_hierarchies=6),
    "AP from block 1": dict(starts=[0, 1], num_ap_hierarchies=1),
    "AP carried far": dict(starts=[0, 1, 2], num_ap_hierarchies=2, preset="released"),
    "logits": dict(select_score="logit"),
    "logits, joint": dict(select_score="logit", decoupled=False),
    "no class token": dict(select_include_cls=False),
    "no class token, logits": dict(select_include_cls=False, select_score="logit"),
    "cosine sum": dict(ap_norm="sum"),
    "cold": dict(ap_temperature=0.07),
    "lambda_a 0": dict(lambda_a=0.0),
    "lambda_a 1": dict(lambda_a=1.0),
    "lambda_d 0": dict(lambda_d=0.0),
    "lambda_d 0.5": dict(lambda_d=0.5),
    "lambda_d 1": dict(lambda_d=1.0),
    "all tokens match": dict(num_matching=17),
    "all tokens are attributes": dict(num_attributes=17),
    "all but one match": dict(num_matching=16),
    "all patches match": dict(num_matching=16, select_include_cls=False),
    "PML 2": dict(pml_weight=2.0),
}


def compare(model, floats, masks=None):
    "Features, matching loss and the gradients of all prompts, relative to the largest value."
    fast, loss = forward(model, floats)
    slow, matching = reference_forward(model.host, model.tuner, floats, masks)
    assert close(fast, slow)
    assert close(loss, model.config.pml_weight * matching)
    weights = torch.randn(slow.shape, generator=torch.Generator().manual_seed(2)).to(slow)
    params = list(model.tuner.trainable(model.host).values())
    for ours, theirs in (((fast * weights).sum(), (slow * weights).sum()), (loss, model.config.pml_weight * matching)):
        assert ours.requires_grad == (theirs.requires_grad and model.config.pml_weight > 0 or ours is not loss and bool(params))
        if not ours.requires_grad: continue
        a, b = (torch.autograd.grad(out, params, retain_graph=True, materialize_grads=True) for out in (ours, theirs))
        for ga, gb in zip(a, b): assert (ga - gb).abs().max() <= EXACT * max(1e-3, gb.abs().max())
    return slow


@pytest.mark.parametrize("name", CONFIGS)
def test_engine_equals_slow_form(name, vit6, floats):
    "In training with gradients, in evaluation, from remembered keys, and with one image."
    model = ship(vit6, floats, **CONFIGS[name])
    slow = compare(model.train(), floats)
    model.eval()
    with torch.no_grad(): first, second, alone = model.features(floats), model.features(floats), model.features(floats[:1])
    assert torch.equal(first, second) and close(first, slow) and close(alone, slow[:1])
    assert close(model.features(floats), slow)                      # evaluation with gradients enabled
    assert close(model.tokens(floats)[:, 0], slow)


@pytest.mark.parametrize(
    "architecture", ["LayerScale", "pre-norm and qk-norm", "registers", "average pooling", "no qkv bias", "dynamic image size"]
)
@pytest.mark.parametrize("name", ["released", "p2ip", "joint", "paper"])
def test_engine_equals_slow_form_on_other_backbones(architecture, name, floats):
    model = ship(sharp_vit(depth=4, **ARCHITECTURES[architecture]), floats, starts=[0, 1, 3], **CONFIGS[name])
    slow = compare(model.train(), floats)
    with torch.no_grad(): assert close(model.eval().features(floats), slow) and close(model.features(floats), slow)


@pytest.mark.parametrize("name", ["released", "paper", "joint", "p2ip", "freeze", "no SIP", "no PML"])
def test_engine_equals_slow_form_on_twelve_blocks(name, floats):
    "The starts of the released Cifar100 run."
    model = ship(sharp_vit(depth=12), floats, starts=[0, 2, 4, 6, 8, 11], **CONFIGS[name])
    slow = compare(model.train(), floats)
    with torch.no_grad(): assert close(model.eval().features(floats), slow) and close(model.features(floats), slow)


@pytest.mark.parametrize(
    "name",
    [
        "released",
        "paper",
        "joint",
        "p2ip",
        "freeze",
        "no SIP",
        "AP carried far",
        "no PML",
        "skip_attn, reinserted",
        "proj_ln, no p2ip in the last block",
    ],
)
def test_engine_equals_slow_form_under_drop_path(name, vit6, floats, monkeypatch):
    "The same masks for instance tokens and prompts: what the engine draws is handed to the slow form."
    model, drawn = ship(vit6, floats, **CONFIGS[name]).train(), []
    model.drop_path = 0.4

    def draw(ones, rate, training):
        drawn.append((rate, timm.layers.drop_path(ones, rate, training)))
        return drawn[-1][1]

    monkeypatch.setattr("hierprompt.engine.block_loop.drop_path", draw)
    torch.manual_seed(0)
    forward(model, floats)
    rates = [rate for rate, _ in drawn]
    assert rates == pytest.approx([0.4 * i / 5 for i in range(1, 6) for _ in "ab"])         # nothing is drawn for block 0
    masks = [(1.0, 1.0)] + [(drawn[i][1], drawn[i + 1][1]) for i in range(0, 10, 2)]
    assert len({tuple(mask.flatten().tolist()) for pair in masks[1:] for mask in pair}) > 3
    again = iter([mask for _, mask in drawn])
    monkeypatch.setattr("hierprompt.engine.block_loop.drop_path", lambda ones, rate, training: next(again))
    compare(model, floats, masks)


# The invariants of SHIP spec 6, by their numbers

@pytest.mark.parametrize("update", UPDATES)
def test_invariant_01_lambda_d_0_is_the_frozen_backbone(update, vit6, floats):
    for starts in ([0], [0, 3, 5], [*range(6)]):
        model = ship(vit6, floats, lambda_d=0.0, prompt_update=update, starts=starts)
        frozen = vit6.forward_features(floats)
        for mode in (True, False):
            assert close(model.train(mode).tokens(floats), frozen) and close(model.features(floats), frozen[:, 0])


def mixing(model, floats):
    "Random queries, keys and values of 17 instance tokens and one prompt."
    tuner, generator = model.tuner, torch.Generator().manual_seed(4)
    q, k, v = torch.randn(3, 2, 3, 17, 32, generator=generator)
    pk, pv = torch.randn(2, 1, 3, 4, 32, generator=generator)
    return tuner, q, k, v, pk, pv, Context(num_instance=17)


def test_invariant_02_lambda_d_1_reads_the_one_prompt(vit6, floats):
    tuner, q, k, v, pk, pv, ctx = mixing(ship(vit6, floats, lambda_d=1.0), floats)
    assert close(tuner.mix(1, q, k, v, [(pk[:, :, :1], pv[:, :, :1])], ctx), pv[:, :, :1].expand_as(q))


@pytest.mark.parametrize("decoupled", [True, False])
def test_invariant_03_without_prompts_it_is_the_frozen_backbone(decoupled, vit6, floats):
    model = ship(vit6, floats, **dict(NOTHING, decoupled=decoupled))
    assert close(model.features(floats), vit6.forward_features(floats)[:, 0])
    assert dict(model.tuner.named_parameters()).keys() <= {n for n, p in model.tuner.named_parameters() if p.numel() == 0}


def test_invariant_04_every_block_and_joint_softmax_is_vpt_deep(vit6, floats):
    "Appended and after the class token give equal features; threshold 1 needs no matrix."
    model = ship(vit6, floats, **dict(SIP_ONLY, starts=None, threshold=1.0))
    assert model.config.starts == [*range(6)]
    deep = tune(vit6, "vpt_deep", 3, num_tokens=5)
    with torch.no_grad(): deep.tuner.prompts.copy_(model.tuner.sip_prompts)
    assert close(model.features(floats), reference.vpt_deep(model.host, floats, model.tuner.sip_prompts))
    assert close(model.features(floats), deep.features(floats))


def test_invariant_05_low_threshold_is_vpt_shallow(vit6, floats):
    lowest = affinity(as_host(vit6), [floats])[0][0].min().item()
    assert 0 < lowest < 1
    model = ship(vit6, floats, **dict(SIP_ONLY, starts=None, threshold=lowest))
    assert model.config.starts == [0]
    assert close(model.features(floats), reference.vpt_shallow(model.host, floats, model.tuner.sip_prompts))


@pytest.mark.parametrize("changes", [{}, dict(preset="released"), dict(decoupled=False), dict(prompt_update="p2ip")], ids=str)
def test_invariant_06_order_of_prompts_is_free(changes, vit6, floats):
    "SIP, finished attribute prompts and SSP, shuffled as they enter a block."
    model = ship(vit6, floats, **changes).train()
    features, loss = forward(model, floats)
    enter, shuffled = model.tuner.enter, []

    def shuffling(i, z, prompts, ctx):
        segments = enter(i, z, prompts, ctx)
        shuffled.extend(s.tokens.shape[1] for s in segments)
        return [replace(s, tokens=s.tokens.roll(1, 1)) for s in segments]

    model.tuner.enter = shuffling
    again, again_loss = forward(model, floats)
    assert close(again, features) and close(again_loss, loss) and {5, 4, 2} <= set(shuffled)


@pytest.mark.parametrize("update", UPDATES + ["joint"])
def test_invariant_07_sip_and_ssp_do_not_see_the_image(update, vit6, floats):
    "Up to what enters the last block; the attribute prompts do see it."
    changes = dict(decoupled=False) if update == "joint" else dict(prompt_update=update)
    for num_ap in (0, 2):
        model = ship(vit6, floats, num_ap_hierarchies=num_ap, **changes)
        for i, (_, prompts) in enumerate(watch(model, floats)):
            carried = i not in model.config.starts
            has_ap = num_ap and i >= 2
            spread = (prompts - prompts[:1]).abs().amax((0, 2)) > 1e-6            # which prompts differ between images
            if update in ("p2ip", "joint"): assert spread.sum() == (5 if carried else 0) + (4 if has_ap else 0)
            else: assert spread.sum() == (4 if has_ap else 0)


def test_invariant_08_sip_is_carried_and_ssp_is_fresh(vit6, floats):
    model = ship(vit6, floats, num_ap_hierarchies=0)
    entered, tuner = [prompts[0] for _, prompts in watch(model, floats)], model.tuner
    found = lambda rows, prompts: (torch.cdist(rows, prompts).amin(1) < 1e-8).all()
    for i, prompts in enumerate(entered):
        m, block = i // 2, vit6.blocks[i - 1]
        sip = tuner.sip_prompts[m] if i % 2 == 0 else tuner.sip_prompts[m] + block.mlp(block.norm2(tuner.sip_prompts[m]))
        assert found(tuner.ssp_prompts, prompts) and found(sip, prompts) and prompts.shape[0] == 7
    reinserted = [prompts[0] for _, prompts in watch(ship(vit6, floats, num_ap_hierarchies=0, sip_mode="reinsert"), floats)]
    assert all(found(tuner.sip_prompts[i // 2], prompts) for i, prompts in enumerate(reinserted))


@pytest.mark.parametrize("decoupled", [True, False])
def test_invariant_09_a_set_acts_from_its_first_block_on(decoupled, vit6, floats):
    model = ship(vit6, floats, decoupled=decoupled)
    before = [z for z, _ in watch(model, floats)]
    with torch.no_grad(): model.tuner.sip_prompts[1] += 1
    same = [torch.equal(z, old) for (z, _), old in zip(watch(model, floats), before)]
    assert same == [True] * 3 + [False] * 3                                          # block 2 is the first that reads it


@pytest.mark.parametrize("update", ["skip_attn", "proj_ln", "freeze"])
def test_invariant_10_the_last_p2ip_is_for_the_matching_loss_only(update, vit6, floats):
    (a, loss_a), (b, loss_b) = (forward(ship(vit6, floats, prompt_update=update, p2ip_last=p2ip).train(), floats) for p2ip in (True, False))
    assert close(a, b) and (loss_a - loss_b).abs() > 1e-4


def test_invariant_11_matching_loss():
    generator = torch.Generator().manual_seed(0)
    prompts, tokens = torch.randn(4, 6, 16, generator=generator), torch.randn(4, 3, 16, generator=generator)
    loss, scale = matching_loss(prompts, tokens), torch.rand(4, 6, 1, generator=generator) * 5 + 0.1
    assert 0 <= loss <= 2
    assert loss.item() == pytest.approx(
        sum(min(1 - F.cosine_similarity(p, t, 0).item() for t in z) for q, z in zip(prompts, tokens) for p in q) / 24
    )
    assert close(matching_loss(prompts * scale, tokens), loss) and close(matching_loss(prompts, tokens * scale[:, :3]), loss)
    assert close(matching_loss(prompts.flip(1), tokens.flip(1)), loss)
    assert matching_loss(tokens[:, [0, 2, 2]] * scale[:, :3], tokens).abs() < EXACT
    one_way = tokens[:, :1] * scale[:, :3]
    assert matching_loss(-one_way[:, :2] * 3, one_way).item() == pytest.approx(2)
    for b in range(4): assert 0 <= matching_loss(prompts[b:b + 1], tokens[b:b + 1]) <= 2


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_invariant_12_matching_loss_pulls_tokens_too(preset, vit6, floats):
    "The first set is dropped at block 2: only through the instance tokens can it move the loss."
    model = ship(vit6, floats, preset=preset).train()
    _, loss = forward(model, floats)
    grads = dict(
        zip(("sip", "ssp", "ap"), torch.autograd.grad(loss, [model.tuner.sip_prompts, model.tuner.ssp_prompts, model.tuner.ap_prompts]))
    )
    assert all(grads["sip"][m].abs().max() > 1e-9 for m in range(3)) and grads["ssp"].abs().max() > 1e-6
    assert all(grads["ap"][j].abs().max() > 1e-9 for j in range(2))


def entering_ap(model, floats, i=4):
    "The attribute prompts that enter block `i`: the four that depend on the image, or the ones in their place."
    reduced = watch(model, floats)[i][1]
    others = torch.cat([model.tuner.sip_prompts[-1], model.tuner.ssp_prompts]).detach()
    return torch.stack([image[torch.cdist(image, others).amin(1) > 1e-8] for image in reduced])


def test_invariant_13_attribute_prompts(vit6, floats):
    model = ship(vit6, floats, lambda_a=0.0)
    assert close(entering_ap(model, floats), model.tuner.ap_prompts[1].detach().expand(8, -1, -1))
    model = ship(vit6, floats, lambda_a=1.0)
    ap, prototypes = entering_ap(model, floats), model.tuner.prototypes
    assert ap.shape == (8, 4, 96) and (ap >= prototypes.amin(0) - EXACT).all() and (ap <= prototypes.amax(0) + EXACT).all()
    weights = torch.linalg.lstsq(prototypes.T.expand(8, -1, -1), ap.transpose(1, 2)).solution      # 7 of 96 dimensions: unique
    assert close(weights.sum(1), torch.ones(8, 4)) and (weights > 0).all()
    with torch.no_grad(): prototypes.copy_(prototypes[:1].expand_as(prototypes).clone())
    assert close(entering_ap(model, floats), prototypes[0].expand(8, 4, -1))
    assert not prototypes.requires_grad and "prototypes" not in dict(model.tuner.named_parameters())


def test_invariant_14_selection():
    generator = torch.Generator().manual_seed(6)
    q, k, prompts = (torch.randn(4, 3, n, 32, generator=generator) for n in (1, 17, 5))
    logits = (q @ k.mT)[:, :, 0] / 32 ** 0.5
    joint = (q @ torch.cat([k, prompts], 2).mT)[:, :, 0] / 32 ** 0.5
    assert close(cls_scores(q, k, score="logit"), logits.mean(1)) and close(cls_scores(q, k, [prompts], "logit"), logits.mean(1))
    assert close(cls_scores(q, k, score="prob"), logits.softmax(-1).mean(1))
    assert close(cls_scores(q, k, [prompts[:, :, :2], prompts[:, :, 2:]], "prob"), joint.softmax(-1)[..., :17].mean(1))
    scores = cls_scores(q, k, score="logit")
    rows = select(scores, 10, "num_matching")
    assert all(len(set(row)) == 10 for row in rows.tolist()) and rows.max() < 17 and rows.min() >= 0
    assert (scores.gather(1, rows).diff(dim=1) <= 0).all() and (scores.gather(1, rows)[:, -1:] >= scores.sort().values[:, 6:7]).all()
    shifted = cls_scores(q, k + 7 * q * torch.tensor([0.0, 1.0, 0.0])[:, None, None], score="logit")       # a constant in the second head
    assert not close(shifted, scores) and torch.equal(select(shifted, 10, "num_matching"), rows)
    scores[:, 0] = 100
    assert (select(scores, 3, "num_matching")[:, 0] == 0).all() and (select(scores, 16, "num_matching", include_cls=False) > 0).all()


@pytest.mark.parametrize("score", ["logit", "prob"])
def test_invariant_14_in_the_engine_a_constant_in_one_head_changes_no_selection(score, floats):
    "A key bias adds the same number to all of a query's logits in its head."
    vit = sharp_vit()
    model = ship(vit, floats, select_score=score).train()
    features, loss = forward(model, floats)
    with torch.no_grad():
        for block in vit.blocks: block.attn.qkv.bias[96 + 32:96 + 64] += torch.linspace(-3, 3, 32)
    again, again_loss = forward(model, floats)
    assert close(again, features) and close(again_loss, loss)


def test_invariant_15_exactly_the_declared_tensors_get_gradients(vit6, floats):
    for wd in (0.0, 1e-4):
        model = ship(vit6, floats).train()
        optimizer = torch.optim.AdamW(model.param_groups(1e-3, wd))
        model.loss(floats, LABELS).backward()
        grads = {name for name, p in model.named_parameters() if p.grad is not None}
        assert grads == {"head.weight", "head.bias", *(f"engine.tuner.{kind}_prompts" for kind in ("sip", "ssp", "ap"))}
        assert all(g.abs().max() > 0 for g in (model.tuner.sip_prompts.grad[m] for m in range(3)))
        assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters() if p.grad is not None}
        assert all(p.grad is None for p in vit6.parameters())
        assert all((g["weight_decay"] == wd) if p.ndim > 1 else g["weight_decay"] == 0 for g in optimizer.param_groups for p in g["params"])


# SHIP spec 2 and 4
WINNERS = load_published("ship_winners").set_index("task").join(load_published("ship_partitions").set_index("task").starts)


def official_starts(name): return [*map(int, WINNERS.starts[name].split())]


@pytest.fixture(scope="module")
def wide():
    "ViT-B's width and depth; hardly any MLP and four patches, which no count of prompts depends on."
    return timm.create_model("vit_base_patch16_224", img_size=32, mlp_ratio=0.01, num_classes=0).eval()


@pytest.mark.parametrize("name", WINNERS.index)
def test_invariant_16_counts_of_all_winning_runs(name, wide):
    row = WINNERS.loc[name]
    model = tune(
        wide,
        "ship",
        int(row.classes),
        num_tokens=int(row.P),
        starts=official_starts(name),
        num_prototypes=2,
        num_attributes=10,
        num_matching=5,
    )
    model.prepare(torch.rand(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))
    assert count_parameters(model)["with_head"] == row.n_effective
    assert logged_parameters(row.n_effective, row.P, weight_decay=row.wd) == row.n_log


def test_invariant_17_affinity(vit6, floats):
    host = as_host(vit6)
    (S, last), features = affinity(host, [floats]), layer_features(host, floats, "cls")
    assert S.shape == (6, 6) and S.dtype == torch.float64 and features.shape == (6, 8, 96) and torch.equal(last, features[-1])
    assert close(S, S.T, 1e-12) and close(S.diagonal(), torch.ones(6, dtype=torch.float64), 1e-12) and S.abs().max() <= 1 + 1e-12
    z = host.embed(floats)
    for i, block in enumerate(vit6.blocks):
        z = block(z)
        for pool, want in (("cls", z[:, 0]), ("mean_patch", z[:, 1:].mean(1)), ("mean_all", z.mean(1))):
            assert close(layer_features(host, floats, pool)[i], want)                 # raw block outputs
    per_image, scale = pairwise_cosine(features), torch.rand(6, 8, 1, dtype=torch.float64) * 9 + 0.1
    assert per_image.shape == (8, 6, 6) and close(pairwise_cosine(features * scale), per_image, 1e-6)
    assert per_image[3, 1, 4].item() == pytest.approx(F.cosine_similarity(features[1, 3], features[4, 3], 0).item(), abs=1e-6)
    assert close(per_image.mean(0), S)
    for size in (1, 3, 7): assert close(affinity(host, floats.split(size))[0], S, 1e-6)


# super-diagonals of six of the released matrices (SHIP spec 5, Fig. 1c)
SUPERDIAGONALS = {row[0]: row[1:] for row in load_published("ship_fig1c").itertuples(index=False, name=None)}   # SHIP spec 5, figure 1c
PREVIOUS_RULE_TOO = {"dtd", "patch_camelyon", "resisc45", "dsprites_loc", "smallnorb_azi", "diabetic_retinopathy"}


def constructed(name):
    """A matrix with the printed super-diagonal (elsewhere invented), falling along its rows, in which each anchor's row has the official
    groups."""
    threshold, starts = WINNERS["lambda"][name], official_starts(name)
    near = lambda j: threshold - 0.004 if j in starts and (j - 1 in starts or name in PREVIOUS_RULE_TOO) else threshold + 0.004
    S = torch.eye(12, dtype=torch.float64)
    for j, value in enumerate(SUPERDIAGONALS.get(name) or [near(j) for j in range(1, 12)], 1): S[j - 1, j] = value
    for width in range(2, 12):
        for i in range(12 - width):
            j, falls = i + width, min(S[i, i + width - 1], S[i + 1, i + width]) - 0.003
            group_end = min([s for s in starts if s > i] + [12])
            if i not in starts: S[i, j] = falls
            elif j < group_end: S[i, j] = max(falls, threshold + 0.0002)
            else: S[i, j] = min(falls, threshold - 0.0002)
    return S.triu(1) + S.triu(1).T + torch.eye(12, dtype=torch.float64)


def previous_layer_rule(S, threshold): return [0] + [j for j in range(1, len(S)) if S[j - 1, j] < threshold]


@pytest.mark.parametrize("name", WINNERS.index)
def test_invariant_18_partition_of_19_rows(name):
    S, threshold = constructed(name), WINNERS["lambda"][name]
    assert partition(S, threshold) == official_starts(name)
    assert (previous_layer_rule(S, threshold) == official_starts(name)) == (name in PREVIOUS_RULE_TOO)
    assert partition(S.float(), threshold) == official_starts(name)
    assert partition(S, 1.0) == [*range(12)] and partition(S, min(S[0].min().item(), 0.5)) == [0]
    assert partition(S, threshold, end_layer=10) == [s for s in official_starts(name) if s < 10]


def test_invariant_18_partition_rules():
    assert len(WINNERS) == 19 and len(WINNERS) - len(PREVIOUS_RULE_TOO) == 13
    at = torch.linspace(0, 1, 12, dtype=torch.float64) ** 2                              # layers on a line: then the count is monotone
    S = torch.exp(-(at[:, None] - at).abs())
    counts = [partition(S, threshold) for threshold in torch.linspace(0.3, 0.998, 200).tolist()]
    assert all(p[0] == 0 and p == sorted(set(p)) for p in counts)
    assert all(len(a) <= len(b) for a, b in zip(counts, counts[1:])) and len(counts[0]) == 1 and len(counts[-1]) > 9
    tie = torch.tensor([[1, .9, .8, .7], [.9, 1, .9, .8], [.8, .9, 1, .9], [.7, .8, .9, 1]], dtype=torch.float64)
    assert partition(tie, 0.9) == [0, 2] and partition(tie, 0.8) == [0, 3] and partition(tie, 0.7) == [0]        # equality stays
    assert partition(tie, math.nextafter(0.8, 1)) == [0, 2] and partition(tie, math.nextafter(0.9, 1)) == [0, 1, 2, 3]
    assert partition(torch.ones(5, 5), 1.0) == [*range(5)]                                # threshold 1 does not look at the matrix
    dip = torch.tensor([[1, .5, .99, .99], [.5, 1, .95, .95], [.99, .95, 1, .2], [.99, .95, .2, 1]], dtype=torch.float64)
    assert partition(dip, 0.9) == [0, 1]                                                  # only the anchor's row counts


@pytest.mark.parametrize("tokens", [5, 50])
def test_invariant_19_initialisation(tokens, wide):
    model = tune(wide, "ship", 1000, num_tokens=tokens, starts=[0, 3, 6, 9], num_prototypes=2, num_matching=5)
    model.prepare(torch.rand(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))
    bounds = dict(sip_prompts=math.sqrt(6 / ((tokens + 1) * 768)), ssp_prompts=math.sqrt(6 / 768), ap_prompts=math.sqrt(6 / 7680))
    assert bounds["sip_prompts"] == pytest.approx({5: 0.03608, 50: 0.01238}[tokens], abs=1e-5)
    for name, p in model.tuner.named_parameters():
        assert bounds[name] * 0.98 < p.abs().max() <= bounds[name] and abs(p.mean()) < 0.05 * bounds[name]
        assert p.std().item() == pytest.approx(bounds[name] / math.sqrt(3), rel=0.03)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.02) and not model.head.bias.any()
    vpt = tune(wide, "ship", 3, num_tokens=tokens, starts=[0, 3], num_ap_hierarchies=0, sip_init="vpt").tuner.sip_prompts
    assert 0.98 * 0.0625 < vpt.abs().max() <= 0.0625


def test_invariant_20_schedule():
    rates = learning_rates(RECIPES["noah_released"])
    want = {0: 1e-6, 1: 1e-6, 2: 1.009e-4, 3: 2.008e-4, 10: 9.001e-4, 11: 9.758e-4, 50: 5.205e-4, 75: 1.661e-4, 98: 1.220e-5, 99: 1.098e-5}
    assert {epoch: rates[epoch] for epoch in want} == pytest.approx(want, rel=5e-4) and len(rates) == 100


def test_invariant_20_fifteen_steps_per_epoch(vit):
    images = torch.randint(0, 256, (1000, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = tune(vit, "ship", 3, **{**SMALL, "starts": [0, 2]})
    model.prepare(images[:8], LABELS)
    recipe = RECIPES["noah_released"]
    trainer = Trainer(model, make_resident(model, Split(images, torch.arange(1000) % 3), recipe, True), recipe, 0)
    assert [len(batch) for batch in trainer._batches(torch.arange(1000))] == [64] * 15


def test_invariant_21_training_mode(vit6, floats):
    model = ship(vit6, floats, preset="released").train()
    assert torch.equal(forward(model, floats)[0], forward(model, floats)[0])
    assert torch.equal(forward(model, floats)[1], forward(model, floats)[1])
    model.drop_path = 0.5                                               # rates by block: test_engine_equals_slow_form_under_drop_path
    torch.manual_seed(0)
    assert not torch.equal(forward(model, floats)[0], forward(model, floats)[0])
    first = [z for z, _ in watch(model, floats)]
    again = [z for z, _ in watch(model, floats)]
    # block 0 drops nothing
    assert [torch.equal(a, b) for a, b in zip(first, again)][:2] == [True, True] and not torch.equal(first[-1], again[-1])


@pytest.mark.parametrize("starts", [[0], [0, 4], [0, 1]])
def test_invariant_22_fewer_hierarchies_than_attribute_prompts(starts, vit6, floats):
    model = ship(vit6, floats, starts=starts, num_ap_hierarchies=2, preset="released")
    assert sum(name == "ap_prompts" for name, _ in model.tuner.named_parameters()) == (len(starts) > 1)
    lengths = [prompts.shape[1] for _, prompts in watch(model, floats)]
    assert lengths == [7 + 4 * (len(starts) > 1 and i >= starts[-1]) for i in range(6)]
    compare(model.train(), floats)


def test_invariant_22_other_image_sizes():
    vit = sharp_vit(depth=3, img_size=48)
    floats = torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    compare(ship(vit, floats, starts=[0, 2], preset="released").train(), floats)


def test_invariant_23_joint_softmax_is_decoupled_attention_with_its_own_weight(vit6, floats):
    tuner, q, k, v, pk, pv, ctx = mixing(ship(vit6, floats, lambda_d=0.0), floats)
    joint = mixing(ship(vit6, floats, decoupled=False), floats)[0].mix(1, q, k, v, [(pk, pv)], ctx)
    i2i = tuner.mix(1, q, k, v, [(pk, pv)], ctx)
    i2p = mixing(ship(vit6, floats, lambda_d=1.0), floats)[0].mix(1, q, k, v, [(pk, pv)], ctx)
    keys = torch.cat([k, pk.expand(2, -1, -1, -1)], 2)
    rho = (q @ keys.transpose(-2, -1) / 32 ** 0.5).softmax(-1)[..., 17:].sum(-1, keepdim=True)
    assert rho.min() > 0 and rho.max() < 1 and close(joint, (1 - rho) * i2i + rho * i2p)
    for parts in ([4], [1, 3]): assert close(prompt_share(q, k, list(zip(pk.split(parts, 2), pv.split(parts, 2)))), rho[..., 0])


@pytest.mark.parametrize(
    "changes", [{}, dict(preset="released", starts=None, threshold=0.9), dict(NOTHING, num_tokens=3), dict(starts=[0])], ids=str
)
def test_invariant_24_save_and_load(changes, floats, tmp_path):
    images = (floats * 60 + 128).clamp(0, 255).to(torch.uint8)
    model = tune(sharp_vit(), "ship", 3, **{**SMALL, **changes})
    if not model.tuner.prepared: model.prepare(images, LABELS)
    optimizer = torch.optim.SGD(model.param_groups(0.05, 0.0))
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(images, LABELS).backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "tuned.safetensors"))
    assert names <= {"head.weight", "head.bias", "tuner.sip_prompts", "tuner.ssp_prompts", "tuner.ap_prompts", "tuner.prototypes"}
    with torch.no_grad():
        loaded = load_tuned(tmp_path, sharp_vit())
        assert loaded.tuner.prepared and loaded.config == model.config and torch.equal(loaded(images), model(images))
    if "tuner.prototypes" in names: assert torch.equal(loaded.tuner.prototypes, model.tuner.prototypes)
    assert ("tuner.prototypes" in names) == (model.config.num_ap_hierarchies > 0 and len(model.config.starts) > 1)


@pytest.mark.parametrize("way", ["restore", "load_state_dict", "assign"])
@pytest.mark.parametrize("shape", [(6, 96), (7, 64), (7,), (1, 7, 96)])
def test_prototypes_of_another_shape(way, shape, vit6, floats):
    "However they come: by name, with both shapes."
    model, other = tune(vit6, "ship", 3, **SMALL), torch.randn(shape)
    with pytest.raises(ValueError, match=rf"prototypes has shape {re.escape(str(shape))}, has to be \(7, 96\): make the model with"):
        if way == "restore": model.tuner.restore({"prototypes": other})
        elif way == "load_state_dict": model.tuner.load_state_dict({"prototypes": other}, strict=False)
        else:
            model.tuner.prototypes = other
            model(floats.float())
    assert way == "assign" or not model.tuner.prepared


def test_prototypes_alone_prepare_a_model(vit6, floats):
    "Of the right shape; other tensors of a saved model are compared too."
    given, model = ship(vit6, floats), tune(vit6, "ship", 3, **SMALL)
    model.tuner.load_state_dict({"prototypes": given.tuner.prototypes}, strict=False)
    assert model.tuner.prepared and torch.equal(model.tuner.prototypes, given.tuner.prototypes)
    with pytest.raises(ValueError, match=r"ssp_prompts has shape \(9, 96\), has to be"):
        model.tuner.restore({"ssp_prompts": torch.zeros(9, 96)})


# Cost, state and settings beyond the invariants

def restored(vit, **config):
    "A SHIP with random prototypes, as a loaded file gives them."
    model = tune(vit, "ship", 3, **config)
    model.tuner.restore({"prototypes": torch.zeros(model.config.num_prototypes, vit.embed_dim)})
    return model


def test_macs_of_cached_inference():
    "SHIP spec 7: 16.71 G for the Cifar100 run, below the frozen ViT's 17.56 G; the released arithmetic needs 22.79 G."
    with torch.device("meta"): vit = timm.create_model("vit_base_patch16_224", num_classes=0).eval()
    model = restored(vit, preset="released", starts=[0, 2, 4, 6, 8, 11])
    with torch.no_grad(), FlopCounterMode(display=False) as counter: vit(torch.empty(1, 3, 224, 224, device="meta"))
    frozen = counter.get_total_flops() / 2
    assert frozen == pytest.approx(17.56e9, rel=0.001)
    assert count_macs(model, 224) == pytest.approx(16.71e9, rel=0.01) and count_macs(model, 224) < frozen
    assert count_macs(restored(vit, preset="released", starts=[0, 2, 4, 6, 8, 10, 11]), 224) == pytest.approx(16.57e9, rel=0.01)
    pet = restored(vit, preset="released", num_tokens=5, starts=official_starts("oxford_iiit_pet"))
    assert count_macs(pet, 224) == pytest.approx(16.42e9, rel=0.01)


@pytest.mark.parametrize("update", UPDATES)
def test_states_are_never_stale(update, vit6, floats):
    model = ship(vit6, floats, prompt_update=update)
    with torch.no_grad(): before = model.features(floats)
    for name in ("sip_prompts", "ssp_prompts", "ap_prompts", "prototypes"):
        with torch.no_grad():
            getattr(model.tuner, name).mul_(-2)
            after = model.features(floats)
            assert not close(after, before, 1e-7) and close(after, reference_forward(model.host, model.tuner, floats)[0]), name
        before = after


@pytest.mark.parametrize("p2ip_last", [True, False])
def test_remembered_states_and_the_matching_loss_in_evaluation(p2ip_last, vit6, floats):
    "A pass that reads the last prompts follows one that does not."
    model = ship(vit6, floats, preset="released", p2ip_last=p2ip_last)
    with torch.no_grad(), model.remembered():
        want = 0.5 * reference_forward(model.host, model.tuner, floats)[1]
        for labels in (None, LABELS, None, LABELS):
            ctx = Context(labels=labels)
            model.engine(floats, ctx)
            assert close(torch.as_tensor(model.tuner.aux_loss(ctx)), want if labels is not None else torch.tensor(0.0))


def test_losses_are_shown_apart(vit6, floats):
    model = ship(vit6, floats).train()
    classification, auxiliary = model.losses(floats, LABELS)
    features, matching = reference_forward(model.host, model.tuner, floats)
    assert close(classification, F.cross_entropy(model.head(features), LABELS)) and close(auxiliary, 0.5 * matching)
    assert close(model.loss(floats, LABELS), classification + auxiliary)


def test_matching_loss_starts_with_its_epoch(vit6, floats):
    model = ship(vit6, floats, pml_start_epoch=2).train()
    seen = []
    for epoch in range(4):
        seen.append(model.losses(floats, LABELS)[1].item() > 0)
        model.after_epoch(epoch)
    assert seen == [False, False, True, True]


def test_prompt_dropout_draws_per_image_in_training_only(vit6, floats):
    model, plain = ship(vit6, floats, prompt_dropout=0.5), ship(vit6, floats)
    with torch.no_grad(): assert torch.equal(model.features(floats), plain.features(floats))
    same = floats[:1].repeat(8, 1, 1, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = model.train().features(same)
    assert (features - features[:1]).abs().amax(1)[1:].min() > 1e-4


def test_prototypes_are_cluster_means():
    generator = torch.Generator().manual_seed(0)
    centres, noise = torch.randn(4, 16, generator=generator) * 20, torch.randn(40, 16, generator=generator)
    found = prototypes(centres.repeat(10, 1) + noise, 4)
    means = torch.stack([centres[i] + noise[i::4].mean(0) for i in range(4)])
    assert found.shape == (4, 16) and (torch.cdist(found, means).amin(0) < 1e-4).all()
    assert torch.equal(found, prototypes(centres.repeat(10, 1) + noise, 4))


def test_prepare_sees_bytes_and_floats_alike(vit6):
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    models = [tune(vit6, "ship", 3, **{**SMALL, "starts": None, "threshold": 0.9}) for _ in "ab"]
    models[0].prepare(images, LABELS)
    models[1].prepare(models[1].normalise(images), LABELS)
    assert models[0].config == models[1].config and models[0].config.starts == partition(
        affinity(as_host(vit6), [models[1].normalise(images)])[0], 0.9
    )
    assert close(models[0].tuner.prototypes, models[1].tuner.prototypes)
    assert all(torch.equal(a, b) for a, b in zip(models[0].tuner.parameters(), models[1].tuner.parameters()))


def test_fit_prepares(vit):
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = Split(images, torch.arange(40) % 3)
    changes = dict(epochs=2, warmup_epochs=0, batch_size=16, valid_every=0)
    for config in (dict(SMALL, starts=None, threshold=0.9), dict(NOTHING, starts=None, threshold=0.9)):
        histories = [fit(tune(vit, "ship", 3, **config), data, recipe=replace(RECIPES["noah"], **changes), progress=False) for _ in "ab"]
        assert [row["loss"] for row in histories[0].rows] == [row["loss"] for row in histories[1].rows]


@pytest.mark.parametrize(
    "changes", [{}, dict(decoupled=False), dict(num_tokens=0, num_shared=0), NOTHING], ids=["all", "joint", "AP only", "nothing"]
)
def test_diagnostics(changes, vit6, floats):
    model = ship(vit6, floats, **changes)
    found = model.diagnostics(floats)
    if changes == NOTHING: assert found == {"joint_prompt_share": [0.0] * 6}
    else:
        with_prompts = [prompts.shape[1] > 0 for _, prompts in watch(model, floats)]
        assert [share > 0 for share in found["joint_prompt_share"]] == with_prompts                    # one number for every block
        assert max(found["joint_prompt_share"]) < 1
        assert (
            1 / 7 < found["attribute_weight_max"] < 1
            and 1 < found["attribute_prototypes_used"] <= 7
            and -1 <= found["attribute_cosine"] <= 1 + 1e-6
        )
    assert model.eval().diagnostics(floats) == found and not model.training


def test_first_block_share_is_measured(vit6, floats):
    model = ship(vit6, floats, decoupled=False)
    block, z = model.host.blocks[0], model.host.embed(floats)
    x = torch.cat([z, torch.cat([model.tuner.sip_prompts[0], model.tuner.ssp_prompts]).expand(8, -1, -1)], 1)
    q, k, _ = block.heads(block.linear("qkv", block.norm1(x)))
    mass = (q[:, :, :17] @ k.mT / 32 ** 0.5).softmax(-1)[..., 17:].sum(-1).mean().item()
    assert model.diagnostics(floats)["joint_prompt_share"][0] == pytest.approx(mass, rel=1e-4)


# Bad input

BAD = [
    (dict(threshold=0.0), r"threshold = 0.0 is not in \(0, 1\]"),
    (dict(threshold=1.01), "threshold = 1.01"),
    (dict(threshold=float("nan")), "threshold = nan"),
    (dict(starts=[]), r"starts = \[\].*begin with 0"),
    (dict(starts=[1, 2]), r"starts = \[1, 2\].*begin with 0"),
    (dict(starts=[0, 3, 2]), r"starts = \[0, 3, 2\].*ascend"),
    (dict(starts=[0, 2, 2]), r"starts = \[0, 2, 2\].*ascend"),
    (dict(starts=[0, 6]), r"starts = \[0, 6\].*6 blocks.*5"),
    (dict(num_tokens=-1), "num_tokens = -1"),
    (dict(num_shared=-1), "num_shared = -1"),
    (dict(num_ap_hierarchies=-1), "num_ap_hierarchies = -1"),
    (dict(num_attributes=0), "num_attributes = 0"),
    (dict(num_prototypes=0), "num_prototypes = 0"),
    (dict(num_matching=0), "num_matching = 0"),
    (dict(max_images=0), "max_images = 0"),
    (dict(pml_weight=-0.5), "pml_weight = -0.5"),
    (dict(pml_start_epoch=-1), "pml_start_epoch = -1"),
    (dict(lambda_a=1.5), "lambda_a = 1.5"),
    (dict(lambda_d=-0.1), "lambda_d = -0.1"),
    (dict(ap_temperature=0.0), "ap_temperature = 0.0"),
    (dict(prompt_dropout=1.5), "prompt_dropout = 1.5"),
    (dict(prompt_update="none"), "prompt_update = 'none' is not one of"),
]


@pytest.mark.parametrize("changes,message", BAD, ids=lambda x: str(x)[:40])
def test_bad_settings(changes, message, vit6):
    with pytest.raises(ValueError, match=message): tune(vit6, "ship", 3, **changes)


@pytest.mark.parametrize(
    "use", ["forward", "features", "tokens", "loss", "losses", "trainable", "diagnostics", "count_parameters", "count_macs"]
)
def test_use_before_prepare(use, vit6, floats):
    model = tune(vit6, "ship", 3, **SMALL)
    functions = dict(
        count_parameters=lambda: count_parameters(model),
        count_macs=lambda: count_macs(model, 32),
        trainable=lambda: model.trainable(),
        loss=lambda: model.loss(floats, LABELS),
        losses=lambda: model.losses(floats, LABELS),
    )
    assert not model.tuner.prepared
    with pytest.raises(RuntimeError, match=r"call model.prepare\(images, labels\)"):
        functions.get(use, lambda: getattr(model, use)(floats))()
    assert tune(vit6, "ship", 3, **{**SMALL, "num_ap_hierarchies": 0}).tuner.prepared              # then there is nothing to look for


def test_bad_images_in_prepare(vit6, floats):
    with pytest.raises(ValueError, match="num_prototypes = 9 clusters.*there are 8.*num_prototypes <= 8"):
        ship(vit6, floats, num_prototypes=9)
    with pytest.raises(ValueError, match=r"images are \(16, 16\) pixels, this backbone wants \(32, 32\)"): ship(vit6, floats[..., :16, :16])
    model = ship(vit6, floats)
    with pytest.raises(ValueError, match=r"images are \(16, 16\) pixels, this backbone wants \(32, 32\)"): model(floats[..., :16, :16])


def test_equal_training_images_make_no_clusters(vit6, floats):
    "Fewer different images than clusters: an error or usable prototypes, never a network of NaN."
    model = tune(vit6, "ship", 3, **SMALL)
    with pytest.raises(ValueError, match="num_prototypes = 7"): model.prepare(floats[:3].repeat(3, 1, 1, 1), torch.arange(9) % 3)


@pytest.mark.parametrize("images", [torch.zeros(0, 3, 32, 32), torch.full((8, 3, 32, 32), float("nan"))], ids=["none", "NaN"])
def test_no_hierarchies_from_nothing(images, vit6):
    model = tune(vit6, "ship", 3, **{**SMALL, "starts": None, "num_ap_hierarchies": 0})
    with pytest.raises(ValueError): model.prepare(images, LABELS[:len(images)])


@pytest.mark.parametrize("changes,message", [
    (dict(num_matching=18), "num_matching = 18.*17 tokens.*num_matching <= 17"),
    (dict(num_matching=17, select_include_cls=False), "num_matching = 17.*16 tokens.*num_matching <= 16"),
    (dict(num_attributes=18), "num_attributes = 18.*17 tokens.*num_attributes <= 17")])
def test_more_tokens_asked_than_there_are(changes, message, vit6, floats):
    with pytest.raises(ValueError, match=message): ship(vit6, floats, **changes).loss(floats, LABELS)


def test_backbone_without_class_token(floats):
    vit = sharp_vit(depth=4, class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match="no class token.*num_ap_hierarchies=0, pml_weight=0"): tune(vit, "ship", 3)
    with pytest.raises(ValueError, match="feature_pool='mean_patch'"): tune(vit, "ship", 3, num_ap_hierarchies=0, pml_weight=0.0)
    for changes in (dict(starts=[0, 2]), dict(starts=None, feature_pool="mean_patch", threshold=0.9)):
        model = ship(vit, floats, num_ap_hierarchies=0, pml_weight=0.0, **changes)
        assert close(model.features(floats), reference_forward(model.host, model.tuner, floats)[0])
