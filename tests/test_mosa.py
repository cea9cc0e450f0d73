"MoSA: against its formula, counted, masked, merged, its two passes."
import copy

import pytest
import timm
import torch
from reference import resumed, shake
from test_methods import LABELS, other_vit, steps
from torch import nn

from hierprompt.data.tasks import Split
from hierprompt.engine.accounting import count_parameters
from hierprompt.engine.hosts import as_host
from hierprompt.engine.saved import load_tuned
from hierprompt.engine.tuned import method_config, tune
from hierprompt.methods.vit.mosa import Experts, MoSA, merge_mosa, symmetric_kl
from hierprompt.training.recipes import recipe

FLOATS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
CLASSES = torch.arange(4) % 3


def shaken(vit, **settings):
    model = tune(vit, "mosa", 3, **{**dict(bottleneck=4, dropout=0.0), **settings})
    shake(model.tuner)
    return model


def one_pass(vit, model, picks=None):
    "Logits and the tokens behind every block, written out; `picks`: an expert for each block, None: the mean."
    x, hidden = vit.norm_pre(vit._pos_embed(vit.patch_embed(FLOATS))), []
    for i, (block, side) in enumerate(zip(vit.blocks, model.tuner.side)):
        x = x + block.ls1(block.attn(block.norm1(x)))
        h = nn.functional.layer_norm(x, x.shape[-1:], side.norm.weight, side.norm.bias, 1e-6)
        for name in ("down", "up"):
            layer = getattr(side, name)
            if isinstance(layer, Experts):
                maps = layer.maps if picks is None else [layer.maps[picks[i]]]
                h = sum(h @ m.weight.T + m.bias for m in maps) / len(maps)
            else: h = h @ layer.weight.T + layer.bias
            if name == "down": h = nn.functional.gelu(h)
        x = x + block.ls2(block.mlp(block.norm2(x))) + 0.1 * h
        hidden.append(x)
    return model.head(vit.fc_norm(vit.pool(vit.norm(x)))), hidden


def masked(model, grads):
    "Plain gradients times the masks, as the release does it after `backward`."
    owners = {f"{name}.maps.{e}.weight": m.owner == e for name, m in model.tuner.named_modules() if isinstance(m, Experts)
              for e in range(len(m.maps))}
    return [g * owners[n] if n in owners else g for (n, _), g in zip(model.tuner.named_parameters(), grads)]


KINDS = {"down shared": dict(preset="fgvc", experts=3), "up shared": dict(preset="cars"),
         "some blocks": dict(preset="cars", deep_blocks=2, kl_weight=0.5), "one expert": dict(preset="vtab", experts=1)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", ["tiny", "other"])
def test_it_is_its_formula(kind, make, vit):
    vit = vit if make == "tiny" else other_vit()
    model = shaken(vit, **KINDS[kind])
    config, depth = model.config, len(vit.blocks)
    with torch.no_grad(): torch.testing.assert_close(model(FLOATS), one_pass(vit, model)[0], atol=1e-5, rtol=1e-4)
    torch.manual_seed(7)
    parts = model.train().losses(FLOATS, CLASSES)
    torch.manual_seed(7)
    first, second = ([int(torch.randint(config.experts, ())) for _ in range(depth)] for _ in range(2))
    (p, a), (q, b) = one_pass(vit, model, first), one_pass(vit, model, second)
    kl = lambda target, learns: (target.softmax(1).detach() * (target.log_softmax(1).detach() - learns.log_softmax(1))).sum(1).mean()
    own = config.kl_weight * 0.5 * (kl(q, p) + kl(p, q))
    own = own + config.deep_weight * sum((u - v).square().mean() for u, v in list(zip(a, b))[:config.deep_blocks]) / depth
    torch.testing.assert_close(torch.stack(parts), torch.stack([nn.functional.cross_entropy(p, CLASSES), own]), atol=1e-5, rtol=1e-4)
    weights = list(model.tuner.parameters())
    found = torch.autograd.grad(sum(parts), weights, materialize_grads=True)
    wanted = torch.autograd.grad(nn.functional.cross_entropy(p, CLASSES) + own, weights, materialize_grads=True)
    for f, w in zip(found, masked(model, wanted)): torch.testing.assert_close(f, w, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("settings,count", [
    (dict(preset="fgvc"), 3_005_184), (dict(preset="cars"), 1_798_656), (dict(preset="fgvc", experts=1), 1_208_064),
    (dict(preset="cars", experts=1), 1_208_064), (dict(preset="vtab", experts=1), 322_752),
])
def test_counts(settings, count):
    with torch.device("meta"):
        host = as_host(timm.create_model("vit_base_patch16_224", num_classes=0))
        assert sum(p.numel() for p in MoSA(host, method_config("mosa", **settings)).parameters()) == count


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_owners_share_all_entries(count):
    experts = Experts(nn.Linear(10, 6), count, torch.Generator().manual_seed(0))
    sizes = experts.owner.flatten().bincount(minlength=count)
    assert len(sizes) == count and sizes.max() - sizes.min() <= 1 and sizes.sum() == 60
    assert all(torch.equal(m.weight, experts.maps[0].weight) for m in experts.maps)
    other = Experts(nn.Linear(10, 6), count, torch.Generator().manual_seed(1))
    assert count == 1 or not torch.equal(experts.owner, other.owner)


@pytest.mark.parametrize("preset", MoSA.presets)
def test_start(preset, vit, images):
    frozen, model = tune(vit, "linear", 3), tune(vit, "mosa", 3, preset=preset)
    assert torch.equal(model.tokens(images), frozen.tokens(images)) and torch.equal(model.train().tokens(images), frozen.tokens(images))
    assert abs(model.losses(images, LABELS)[1]) < 1e-9
    before = copy.deepcopy(model.tuner.state_dict())
    steps(model, images, n=6)
    moved = [n for n, t in model.tuner.state_dict().items() if not torch.equal(t, before[n])]
    for part in ("down", "up"): assert sum(f".{part}." in n and n.endswith("weight") for n in moved) >= 4, moved    # no dead adapter


def test_an_entry_moves_in_its_own_expert_alone(vit, images):
    model = tune(vit, "mosa", 3, bottleneck=4, experts=3).train()
    before = copy.deepcopy(model.tuner.state_dict())
    optimizer = torch.optim.Adam(model.param_groups(0.01, 0.0))
    for _ in range(12):
        optimizer.zero_grad()
        model.loss(images, LABELS).backward()
        optimizer.step()
    touched = 0
    for name, module in model.tuner.named_modules():
        if not isinstance(module, Experts): continue
        for e, copied in enumerate(module.maps):
            moved = copied.weight.detach() != before[f"{name}.maps.{e}.weight"]
            assert not moved[module.owner != e].any()
            touched += moved.any()
    assert touched >= 9                                                     # 24 draws in each of 4 blocks: of 12 experts nearly all


@pytest.mark.parametrize("settings", [{}, dict(preset="cars"), dict(experts=1)])
def test_merge(settings, vit, images, tmp_path):
    model = shaken(vit, **settings)
    model.class_names = ["a", "b", "c"]
    state = copy.deepcopy(model.state_dict())
    merged = merge_mosa(model)
    with torch.no_grad(): torch.testing.assert_close(merged(images), model(images), atol=1e-6, rtol=1e-5)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items()) and merged.class_names == model.class_names
    dim, r, depth = 64, 4, 4
    assert count_parameters(merged)["without_head"] == depth * (2 * dim * r + r + 3 * dim)
    merged.save_pretrained(tmp_path)
    assert torch.equal(load_tuned(tmp_path, vit)(images), merged(images))
    with pytest.raises(ValueError, match="tuned with 'mosa'"): merge_mosa(tune(vit, "bias", 3))


def test_losses_in_evaluation_and_of_one_pass(vit, images):
    model = shaken(vit)
    for other in (model, shaken(vit, kl_weight=0.0).train()):
        classification, own = other.losses(images, LABELS)
        assert own == 0 and classification.requires_grad
    model.train()
    soft = nn.functional.one_hot(LABELS, 3) * 0.9 + 0.1 / 3
    parts = []
    for labels in (soft, LABELS):
        torch.manual_seed(0)
        parts.append(model.losses(images, labels, 0.0 if labels is soft else 0.1))
    torch.testing.assert_close(*(torch.stack(p) for p in parts))


def test_targets_get_no_gradient():
    p, q = (torch.randn(5, 3, requires_grad=True) for _ in range(2))
    found, = torch.autograd.grad(symmetric_kl(p, q), p)
    wanted = 0.5 * (p.softmax(1) - q.softmax(1)) / 5
    torch.testing.assert_close(found, wanted.detach())


def test_a_run_that_was_stopped_goes_on(vit, images, tmp_path):
    how = recipe("mosa_vtab", epochs=2, warmup_epochs=0, batch_size=3)
    models = [tune(vit, "mosa", 3, bottleneck=4) for _ in range(2)]
    whole, cut = resumed(models, Split(images, LABELS), how, tmp_path/"run.safetensors")
    assert all(torch.equal(t, cut[n]) for n, t in whole.items())


def test_a_host_with_one_pass(vit):
    host = as_host(vit)
    host.taps = (3,)
    with pytest.raises(ValueError, match="compare two passes, and a model on a TimmViT makes one"): MoSA(host, method_config("mosa", None))
    MoSA(host, method_config("mosa", None, kl_weight=0.0))


BAD = [(dict(bottleneck=0), "bottleneck = 0"), (dict(experts=0), "experts = 0"), (dict(deep_blocks=0), "deep_blocks = 0"),
       (dict(dropout=1.0), "dropout = 1.0"), (dict(kl_weight=-0.1), "kl_weight = -0.1"), (dict(deep_weight=-1.0), "deep_weight = -1.0"),
       (dict(shared="both"), "is not one of")]


@pytest.mark.parametrize("settings,message", BAD)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message): tune(other_vit(), "mosa", 3, **settings)
