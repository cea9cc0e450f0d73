"SNF: against its formula, counted, the identity at the start."
import pytest
import timm
import torch
from reference import shake
from test_methods import other_vit
from test_ssf import FLOATS, plain

from hierprompt.engine.hosts import as_host
from hierprompt.engine.tuned import method_config, tune
from hierprompt.methods.vit.snf import SNF, Flow, SNFConfig


def shaken(vit, **settings):
    model = tune(vit, "snf", 3, **settings)
    shake(model.tuner)
    return model


def flowed(flow, x):
    "f(x), step by step, in the words of the equation."
    z = flow.mu + flow.log_sigma.exp() * x
    for step in flow.planar: z = z + step.u[0] * torch.tanh((z * step.w[0]).sum(-1, keepdim=True) + step.b)
    return z


def by_hand(vit, tuner, images):
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    for i, block in enumerate(vit.blocks):
        first, second = ([lambda x: x] * 2 if i >= len(tuner.flows) else
                         [lambda x, i=i, site=site: flowed(tuner.flows[i][site], x) for site in ("attn", "mlp")])
        x = first(x) + block.ls1(block.attn(block.norm1(x)))
        x = second(x) + block.ls2(block.mlp(block.norm2(x)))
    return vit.fc_norm(vit.pool(vit.norm(x)))


@pytest.mark.parametrize("settings", [dict(num_steps=0), dict(num_steps=1), dict(num_steps=5, num_blocks=2)])
@pytest.mark.parametrize("sizes", [{}, dict(init_values=0.1, global_pool="avg", class_token=False)])
def test_it_is_its_formula(settings, sizes):
    vit = plain(**sizes)
    model = shaken(vit, **settings)
    found, wanted = model.features(FLOATS), by_hand(vit, model.tuner, FLOATS)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    found, wanted = (torch.autograd.grad(f.square().mean(), list(model.tuner.parameters())) for f in (found, wanted))
    for a, b in zip(found, wanted): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("preset,size,count", [("paper", "base", 73_752), ("affine", "base", 36_864), ("released", "base", 627_072),
                                               ("released", "large", 835_968), ("paper", "large", 2 * 24 * 4 * 1024 + 48)])
def test_counts(preset, size, count):
    with torch.device("meta"):
        host = as_host(timm.create_model(f"vit_{size}_patch16_224", num_classes=0))
        assert sum(p.numel() for p in SNF(host, method_config("snf", preset)).parameters()) == count


@pytest.mark.parametrize("vit", [plain(), other_vit()])
def test_start(vit):
    frozen = tune(vit, "linear", 3)
    assert torch.equal(tune(vit, "snf", 3, preset="affine").tokens(FLOATS), frozen.tokens(FLOATS))
    for p in (p for n, p in tune(vit, "snf", 3, num_steps=4).tuner.named_parameters() if ".planar." in n):
        assert 0 < p.abs().max() <= 0.01
    assert torch.equal(tune(vit, "snf", 3, num_steps=4, bound=0.0).tokens(FLOATS), frozen.tokens(FLOATS))


def test_one_step_is_invertible_while_small():
    torch.manual_seed(0)
    flow, x = Flow(6, SNFConfig(num_steps=1, bound=0.3)), torch.randn(6)
    jacobian = torch.autograd.functional.jacobian(lambda x: x + flow(x), x)
    step = flow.planar[0]
    slope = 1 - torch.tanh(step.w @ x + step.b) ** 2
    torch.testing.assert_close(torch.linalg.det(jacobian).squeeze(), (1 + slope * (step.w @ step.u.T)).squeeze())


def test_drop_path_spares_the_flow(images):
    "With every branch dropped the tokens are what the flows make of the embedding."
    vit = plain(depth=2)
    model = shaken(vit, num_steps=1).train()
    model.drop_path = 1 - 1e-9
    with torch.no_grad():
        x = vit._pos_embed(vit.patch_embed(FLOATS))
        first = model.tuner.flows[0]
        x = flowed(first["attn"], x) + vit.blocks[0].attn(vit.blocks[0].norm1(x))      # the rate of the first block is 0
        x = flowed(first["mlp"], x) + vit.blocks[0].mlp(vit.blocks[0].norm2(x))
        x = flowed(model.tuner.flows[1]["mlp"], flowed(model.tuner.flows[1]["attn"], x))
        torch.testing.assert_close(model.features(FLOATS), vit.norm(x)[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings,message", [(dict(num_steps=-1), "num_steps = -1 is negative"), (dict(num_blocks=0), "num_blocks = 0"),
                                              (dict(bound=-1.0), "bound = -1.0 is negative")])
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message): tune(other_vit(), "snf", 3, **settings)
