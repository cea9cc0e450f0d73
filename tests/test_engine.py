"""The engine against timm's own forward and against the straightforward form of each prompt method."""
import pytest
import reference
import timm
import torch

from hierprompt.engine.block_loop import Context, Engine, Segment, Tuner
from hierprompt.engine.hosts import as_host
from hierprompt.engine.tuned import tune

SMALL = dict(depth=4, embed_dim=96, num_heads=3, img_size=32, patch_size=8, num_classes=7)
ARCHITECTURES = {
    "class token": {},
    "average pooling": dict(global_pool="avg"),
    "average pooling without class token": dict(global_pool="avg", class_token=False),
    "LayerScale": dict(init_values=0.3),
    "registers": dict(reg_tokens=4, no_embed_class=True),
    "pre-norm and qk-norm": dict(pre_norm=True, qk_norm=True),
    "attention pooling": dict(global_pool="map"),
    "dynamic image size": dict(dynamic_img_size=True),
    "no qkv bias": dict(qkv_bias=False),
}


def make_vit(**changes):
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **{**SMALL, **changes}).eval()
    for p in vit.parameters(): torch.nn.init.normal_(p, std=0.05) if p.ndim < 2 else None    # biases and norms that matter
    return vit.requires_grad_(False)


@pytest.fixture
def floats():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_tuner_equals_timm(name, floats):
    vit = make_vit(**ARCHITECTURES[name])
    host = as_host(vit)
    with torch.no_grad():
        ours = vit.head(Engine(host, Tuner(host)).eval()(floats, Context()))
        assert (ours - vit(floats)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_base_patch32_224", "vit_small_patch14_dinov2"])
def test_no_tuner_equals_timm_full_size(name):
    torch.manual_seed(0)
    vit = timm.create_model(name, num_classes=11, **(dict(img_size=112) if "dinov2" in name else {})).eval()
    torch.nn.init.normal_(vit.head.weight, std=0.02)
    images, host = torch.randn(2, 3, *vit.patch_embed.img_size), as_host(vit)
    with torch.no_grad():
        assert (vit.head(Engine(host, Tuner(host)).eval()(images, Context())) - vit(images)).abs().max() < 1e-5


def test_all_tokens_equal_timm(floats):
    vit = make_vit()
    with torch.no_grad():
        assert (tune(vit, "linear", 3).tokens(floats) - vit.forward_features(floats)).abs().max() < 1e-5


FORMS = {"vpt_deep": reference.vpt_deep, "vpt_shallow": reference.vpt_shallow}


@pytest.mark.parametrize("architecture", ["class token", "average pooling", "LayerScale", "pre-norm and qk-norm"])
@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_prompts_equal_straightforward(method, architecture, num_tokens, floats):
    "Outputs and gradients to 1e-5, in training, in evaluation, and again from remembered keys."
    vit = make_vit(**ARCHITECTURES[architecture])
    model = tune(vit, method, 7, num_tokens=num_tokens).train()
    prompts = model.tuner.prompts
    slow, fast = FORMS[method](model.host, floats, prompts), model.features(floats)
    assert (slow - fast).abs().max() < 1e-5
    weights = torch.randn(fast.shape, generator=torch.Generator().manual_seed(2))
    g_slow, g_fast = (torch.autograd.grad((out * weights).sum(), prompts)[0] for out in (slow, fast))
    assert (g_slow - g_fast).abs().max() < 1e-5 * max(1, g_slow.abs().max())
    model.eval()
    with torch.no_grad():
        first, second = model.features(floats), model.features(floats)
    assert torch.equal(first, second) and (first - slow).abs().max() < 1e-5


def test_untrained_norm_pooling(floats):
    model = tune(make_vit(), "vpt_deep", 7, num_tokens=3, pool="untrained_norm")
    assert (model.features(floats) - reference.vpt_deep_untrained_norm(model.host, floats, model.tuner.prompts)).abs().max() < 1e-5


def test_order_of_prompts_is_free(floats):
    model = tune(make_vit(), "vpt_deep", 7, num_tokens=6)
    with torch.no_grad():
        before = model(floats)
        model.tuner.prompts.copy_(model.tuner.prompts.flip(1))
        assert (model(floats) - before).abs().max() < 1e-5


def test_keys_are_never_stale(floats):
    model = tune(make_vit(), "vpt_deep", 7, num_tokens=4)
    with torch.no_grad(): before = model(floats)
    state = {n: torch.randn_like(t) for n, t in model.tuner.state_dict().items()}
    model.tuner.load_state_dict(state)                     # still in evaluation mode
    with torch.no_grad(): after = model(floats)
    fresh = tune(make_vit(), "vpt_deep", 7, num_tokens=4)
    fresh.tuner.load_state_dict(state)
    with torch.no_grad(): assert torch.equal(after, fresh(floats)) and not torch.equal(after, before)
    with model.remembered():
        with torch.no_grad(): model(floats)
        assert (model(floats) - after).abs().max() < 1e-6      # with gradients enabled nothing remembered is used
        model(floats).sum().backward()
    assert model.tuner.prompts.grad.abs().sum() > 0


def test_given_prompts_have_no_queries(floats):
    "VPT-Deep projects each block's prompts once, with batch size 1, and to keys and values only."
    calls = []

    class Watch(Tuner):
        def enter(self, i, z, prompts, ctx): return [Segment(torch.zeros(1, 3, self.dim))]

        def linear(self, i, site, x, y, part):
            calls.append((i, site, part, tuple(y.shape)))
            return y

    host = as_host(make_vit())
    Engine(host, Watch(host)).train()(floats, Context())
    prompts = [c for c in calls if c[3][1] == 3]
    assert prompts == [(i, "qkv", "kv", (1, 3, 192)) for i in range(4)]
    assert [c for c in calls if c[0] == 3 and c[1] in ("proj", "fc1", "fc2")] == [
        (3, "proj", "qkv", (5, 1, 96)), (3, "fc1", "qkv", (5, 1, 384)), (3, "fc2", "qkv", (5, 1, 96))]


def test_drop_path_is_active_in_training_only(floats):
    model = tune(make_vit(), "vpt_deep", 7, drop_path=0.5)
    assert torch.equal(model(floats), model(floats))
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(floats), model(floats))
    model.drop_path = 0.0
    assert torch.equal(model(floats), model(floats))
    with pytest.raises(ValueError, match=r"drop_path = 1.0 is not in \[0, 1\)"): model.drop_path = 1.0


def test_autocast_keys_are_not_mixed_up(floats):
    model = tune(make_vit(), "vpt_deep", 7, num_tokens=4)
    with torch.no_grad():
        exact = model(floats)
        with torch.autocast("cpu", torch.bfloat16): low = model(floats)
        assert torch.equal(model(floats), exact) and not torch.equal(low.float(), exact)
        assert (low.float() - exact).abs().max() < 0.1
