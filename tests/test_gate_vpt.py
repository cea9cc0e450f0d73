"GateVPT: against its formula and against the release's order of clamping, counted, with gates open and closed."
import copy
import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from reference import shake
from test_methods import LABELS
from test_ssf import FLOATS, plain

import hierprompt as hp
from hierprompt.engine.hosts import as_host
from hierprompt.engine.tuned import method_config, tune
from hierprompt.methods.vit.gate_vpt import GateVPT, clamped
from hierprompt.results.published import load_published

HOSTS = [{}, dict(init_values=0.1, global_pool="avg"), dict(qkv_bias=False, num_heads=4, depth=2),
         dict(class_token=False, global_pool="avg")]


def shaken(vit, **settings):
    model = tune(vit, "gate_vpt", 3, num_tokens=4, dropout=0.0, gate_init=0.5, **settings)
    shake(model.tuner)
    return model


def by_hand(vit, prompts, gates, temperatures, pool, images):
    "Features of a plain ViT: prompts behind the others, a gate behind each block but the last, a temperature in each."
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    n, kept = x.shape[1], prompts.expand(len(x), -1, -1)
    for i, block in enumerate(vit.blocks):
        x = torch.cat([x[:, :n], kept], 1)
        q, k, v = (t.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2) for t in block.attn.qkv(block.norm1(x)).chunk(3, -1))
        o = ((q @ k.mT / (q.shape[-1] ** 0.5 * temperatures[i])).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + block.ls1(block.attn.proj(o))
        x = x + block.ls2(block.mlp(block.norm2(x)))
        if i < len(gates): kept = gates[i].sigmoid() * x[:, n:] + (1 - gates[i].sigmoid()) * kept
    if pool == "mean": return vit.fc_norm(vit.norm(x[:, vit.num_prefix_tokens:].mean(1)))
    return vit.fc_norm(vit.pool(vit.norm(x[:, :n])))


@pytest.mark.parametrize("pool", ["host", "mean"])
@pytest.mark.parametrize("settings", HOSTS)
def test_it_is_its_formula(settings, pool):
    vit = plain(**settings)
    model = shaken(vit, pool=pool)
    tuner = model.tuner
    found = model.features(FLOATS)
    wanted = by_hand(vit, tuner.prompts, tuner.gates, tuner.temperatures, pool, FLOATS)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    found, wanted = (torch.autograd.grad(f.square().mean(), list(tuner.parameters())) for f in (found, wanted))
    for a, b in zip(found, wanted): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_training_equals_the_release_where_temperatures_leave_their_bounds():
    "The release writes the clamped values before each forward pass; its gradient is that of the values it computes with."
    vit = plain()
    model = shaken(vit)
    names = ["prompts", "gates", "temperatures"]
    theirs = {name: getattr(model.tuner, name).detach().clone().requires_grad_() for name in names}
    head, labels, crossed = copy.deepcopy(model.head), LABELS[:4], set()
    ours, other = (torch.optim.SGD(params, lr=8.0, momentum=0.9) for params in (
        [*(getattr(model.tuner, name) for name in names), *model.head.parameters()], [*theirs.values(), *head.parameters()]))
    model.train()
    for step in range(6):
        with torch.no_grad(): theirs["temperatures"].clamp_(0.01, 10)
        losses = model.loss(FLOATS, labels), F.cross_entropy(head(by_hand(vit, *theirs.values(), "host", FLOATS)), labels)
        for optimizer, loss in zip((ours, other), losses):
            optimizer.zero_grad()
            loss.backward()
        torch.testing.assert_close(losses[0], losses[1], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(model.tuner.temperatures.grad, theirs["temperatures"].grad, atol=1e-3, rtol=1e-2)
        for p in theirs.values(): p.grad.clamp_(-1, 1)
        for name in names: getattr(model.tuner, name).grad.copy_(theirs[name].grad)      # rounding does not add up
        for p, q in zip(model.head.parameters(), head.parameters()): p.grad.copy_(q.grad)
        ours.step()
        other.step()
        model.after_step(step, ours)
        crossed |= set((theirs["temperatures"].detach() < 0.01).tolist())
        torch.testing.assert_close(model.tuner.temperatures, theirs["temperatures"].clamp(0.01, 10))
    assert True in crossed


def test_the_clamp_has_the_values_of_one_and_the_gradient_of_none():
    x = torch.tensor([-3.0, 0.01, 0.5, 10.0, 1e6], requires_grad=True)
    (clamped(x) * torch.arange(5)).sum().backward()
    assert torch.equal(clamped(x), x.clamp(0.01, 10)) and x.grad.tolist() == [0, 1, 2, 3, 4]
    model = shaken(plain())
    with torch.no_grad():
        model.tuner.temperatures.fill_(50.0)
        beyond = model.features(FLOATS)
        assert torch.equal(beyond, model.eval().features(FLOATS))
        model.tuner.temperatures.fill_(10.0)
        assert torch.equal(model.features(FLOATS), beyond)


@pytest.mark.parametrize("size,tokens,count", [("base", 100, 76_823), ("base", 1, 768 + 23), ("large", 100, 102_400 + 47),
                                               ("tiny", 50, 50 * 192 + 23)])
def test_counts(size, tokens, count):
    with torch.device("meta"):
        host = as_host(timm.create_model(f"vit_{size}_patch16_224", num_classes=0))
        assert sum(p.numel() for p in GateVPT(host, method_config("gate_vpt", None, num_tokens=tokens)).parameters()) == count


def test_the_printed_number_is_none_of_theirs():
    "DA-VPT's 0.17 million: no number of prompts of VPT's grid gives it, under any of the tables' ways of counting (baselines spec 0)."
    table = load_published("davpt_table1")
    printed = table[table.method == "GateVPT"]
    assert printed.params.tolist() == [0.17, 0.17] and set(printed.params_convention) == {"not reproduced"}
    vtab, fgvc = 0.0380, 0.1804                                             # mean classifiers
    for p, head in itertools.product((1, 5, 10, 50, 100, 200), (0, vtab, fgvc, (19 * vtab + 5 * fgvc) / 24)):
        assert round((768 * p + 23) / 1e6 + head, 2) != 0.17
    assert round((768 * 100 + 23) / 1e6 + vtab, 3) == 0.115


def test_open_and_closed_gates(vit, images):
    "Open ones are VPT-Shallow; with closed ones each block sees the prompts as they were learnt, which is VPT-Deep with equal prompts."
    gated, shallow, deep = (tune(vit, method, 3, num_tokens=4) for method in ("gate_vpt", "vpt_shallow", "vpt_deep"))
    with torch.no_grad():
        deep.tuner.prompts.copy_(gated.tuner.prompts.expand_as(deep.tuner.prompts))
        for value, same in ((100.0, shallow), (-100.0, deep)):
            gated.tuner.gates.fill_(value)
            torch.testing.assert_close(gated.features(images), same.features(images), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("preset,gate", [("released", -5.0), ("default", -10.0), ("released_mae", -5.0)])
def test_start(preset, gate, vit):
    tuner = tune(vit, "gate_vpt", 3, preset).tuner
    assert tuner.gates.tolist() == [gate] * (tuner.depth - 1) and tuner.temperatures.tolist() == [1.0] * tuner.depth
    assert tuner.prompts.shape[1] == 100 and tuner.reads_tokens == (preset == "released_mae")


def test_a_network_of_one_block_has_no_gate_and_trains(images):
    vit = plain(depth=1)
    model = tune(vit, "gate_vpt", 3, num_tokens=2)
    assert model.tuner.gates.numel() == 0
    hp.fit(model, hp.Split(images, LABELS), recipe=hp.recipe("gate_vpt", epochs=1, warmup_epochs=0), progress=False)
    assert (model.tuner.temperatures != 1).all()
