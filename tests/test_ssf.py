"SSF: against its formula, counted, merged, on any host."
import copy
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from reference import shake
from test_methods import other_vit, steps

from hierprompt.engine.hosts import as_host
from hierprompt.engine.tuned import method_config, tune
from hierprompt.methods.vit.ssf import SITES, SSF, merge_ssf

FLOATS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def plain(**settings):
    "A small ViT with random values in everything, biases and norms too."
    torch.manual_seed(4)
    sizes = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=0)
    vit = timm.create_model("vit_tiny_patch16_224", **{**sizes, **settings}).eval()
    with torch.no_grad():
        for p in vit.parameters(): p += 0.1 * torch.randn_like(p)
    return vit


def shaken(vit, **settings):
    model = tune(vit, "ssf", 3, **settings)
    shake(model.tuner)
    return model


def by_hand(vit, tuner, images):
    "Tokens behind the final norm: every layer, then its scale and shift, written out for a plain ViT."
    after = lambda step, x: x * step.scale + step.shift
    x = after(tuner.patches, vit.patch_embed(images))
    if vit.cls_token is not None: x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], 1)
    x = x + vit.pos_embed
    for block, own in zip(vit.blocks, tuner.blocks):
        h = after(own["qkv"], F.linear(after(own["norm1"], block.norm1(x)), block.attn.qkv.weight, block.attn.qkv.bias))
        q, k, v = (t.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2) for t in h.chunk(3, -1))
        o = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + block.ls1(after(own["proj"], block.attn.proj(o)))
        h = F.gelu(after(own["fc1"], block.mlp.fc1(after(own["norm2"], block.norm2(x)))))
        x = x + block.ls2(after(own["fc2"], block.mlp.fc2(h)))
    return after(tuner.final, vit.norm(x))


@pytest.mark.parametrize("settings", [{}, dict(init_values=0.1, global_pool="avg"), dict(qkv_bias=False, depth=1, num_heads=4),
                                      dict(class_token=False, global_pool="avg", mlp_ratio=2)])
def test_it_is_its_formula(settings):
    vit = plain(**settings)
    model = shaken(vit)
    wanted = by_hand(vit, model.tuner, FLOATS)
    torch.testing.assert_close(model.tokens(FLOATS), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.features(FLOATS), vit.fc_norm(vit.pool(wanted)), atol=1e-4, rtol=1e-4)
    found, theirs = (torch.autograd.grad(f.square().mean(), list(model.tuner.parameters())) for f in (
        model.features(FLOATS), vit.fc_norm(vit.pool(by_hand(vit, model.tuner, FLOATS)))))
    for a, b in zip(found, theirs): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("size,count", [("tiny", 2 * 192 * (11 * 12 + 2)), ("base", 205_824), ("large", 2 * 1024 * (11 * 24 + 2))])
def test_counts(size, count):
    with torch.device("meta"):
        host = as_host(timm.create_model(f"vit_{size}_patch16_224", num_classes=0))
        tuner = SSF(host, method_config("ssf", None))
    assert sum(p.numel() for p in tuner.parameters()) == count
    assert all(p.ndim == 1 for p in tuner.parameters())


def test_start_and_decay(vit):
    tuner = tune(vit, "ssf", 3).tuner
    scales, shifts = (torch.cat([p.flatten() for n, p in tuner.named_parameters() if n.endswith(kind)]) for kind in ("scale", "shift"))
    assert abs(scales.mean() - 1) < 2e-3 and abs(shifts.mean()) < 2e-3
    assert 0.018 < scales.std() < 0.022 and 0.018 < shifts.std() < 0.022
    groups = tune(vit, "ssf", 3).param_groups(1e-3, 0.05)
    assert [[p.shape for p in g["params"]] for g in groups if g["weight_decay"]] == [[(3, 64)]]      # the classifier's weight alone
    frozen = tune(vit, "linear", 3).features(FLOATS)
    torch.testing.assert_close(tune(vit, "ssf", 3, std=0.0).features(FLOATS), frozen)


@pytest.mark.parametrize("settings", [{}, dict(init_values=0.1), dict(qkv_bias=False), dict(qk_norm=True), dict(pre_norm=True),
                                      dict(dynamic_img_size=True), dict(class_token=False, global_pool="avg", fc_norm=False),
                                      dict(norm_layer=partial(torch.nn.LayerNorm, eps=1e-6, elementwise_affine=False))])
def test_merges(settings, images):
    vit = plain(**settings)
    before = copy.deepcopy(vit.state_dict())
    model = shaken(vit)
    steps(model, images)
    model.eval()
    with torch.no_grad():
        merged = merge_ssf(model)
        torch.testing.assert_close(merged(FLOATS), model(FLOATS), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(merged.forward_features(FLOATS), model.tokens(FLOATS), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(t, before[n]) for n, t in vit.state_dict().items())
    assert not any("tuner" in n for n in merged.state_dict())


@pytest.mark.parametrize("settings", [dict(global_pool="avg"), dict(norm_layer=timm.layers.RmsNorm)])
def test_what_cannot_be_merged_is_refused(settings):
    model = tune(plain(**settings), "ssf", 3)
    model(FLOATS)
    with pytest.raises(ValueError, match="has no scale and shift that SSF's could be merged into"): merge_ssf(model)
    with pytest.raises(ValueError, match="tuned with 'ssf', this one has 'linear'"): merge_ssf(tune(plain(), "linear", 3))


def test_hosts_and_settings():
    class Other(torch.nn.Module):
        dim, depth, blocks, num_read, taps = 48, 0, [], 1, ()
    with pytest.raises(TypeError, match="a Other names in another way; take a timm VisionTransformer"):
        SSF(Other(), method_config("ssf", None))
    normed = plain()
    normed.patch_embed.norm = torch.nn.LayerNorm(48)
    with pytest.raises(ValueError, match="patch_embed.norm is a LayerNorm"): tune(normed, "ssf", 3)
    with pytest.raises(ValueError, match="std = -0.1 is negative"): tune(other_vit(), "ssf", 3, std=-0.1)
    with pytest.raises(ValueError, match="std = nan"): tune(other_vit(), "ssf", 3, std=float("nan"))
    assert set(tune(other_vit(), "ssf", 3).tuner.blocks[0]) == set(SITES)
    with pytest.raises(ValueError, match=r"this backbone wants \(32, 32\)"): tune(other_vit(), "ssf", 3)(FLOATS[..., :16, :16])
