"SPT: sensitivity, how the budget is spent, and that nothing else changes."
import copy
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_methods import other_vit
from timm.layers import DropPath
from torch import nn

from hierprompt.backbones.pretrained import load_backbone
from hierprompt.core import rng_seed
from hierprompt.data.tasks import Split
from hierprompt.engine.accounting import count_parameters
from hierprompt.engine.block_loop import Context
from hierprompt.engine.hosts import as_host
from hierprompt.engine.saved import load_tuned
from hierprompt.engine.tuned import tune
from hierprompt.methods.vit.spt import (
    Behind,
    LowRank,
    SPTAdapter,
    SPTAdapterConfig,
    SPTConfig,
    SPTLoRA,
    allocate,
    candidates,
    merge_spt,
    promotion,
    ranked,
    sensitivity,
)
from hierprompt.training.loop import Trainer, make_resident
from hierprompt.training.recipes import recipe

METHODS = {"spt_lora": LowRank, "spt_adapter": Behind}
LABELS = torch.arange(6) % 3
MIXED = dict(preset="exact", budget=12_000, alpha=20.0)   # on the tiny backbone: modules, whole vectors and sparse entries of both kinds


def ready(vit, images, method="spt_lora", **settings):
    model = tune(vit, method, 3, **{**MIXED, **settings})
    model.prepare(images, LABELS)
    return model


def shake(model, scale=0.05):
    "Random values in everything that trains but the classifier."
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.tuner.trainable(model.host).values(): p += scale * torch.randn(p.shape, generator=generator)
    return model


def steps(model, images, n=3, lr=0.05):
    optimizer = torch.optim.SGD(model.trainable().values(), lr=lr)
    model.train()
    for _ in range(n):
        optimizer.zero_grad()
        model.loss(images, LABELS).backward()
        optimizer.step()
    return model.eval()


def plain(model):
    "The same network as a timm model alone."
    vit = copy.deepcopy(model.host.vit)
    vit.head = copy.deepcopy(model.head)
    return vit.requires_grad_(True).eval()


def values_of(vit):
    "Candidates' values by name, cut by hand."
    width, found = vit.embed_dim, {}
    for name, p in vit.named_parameters():
        if name.startswith("blocks."):
            _, i, *path, kind = name.split(".")
            if path[-1] == "qkv": found |= {f"{i}_{part}_{kind}": p[j * width:(j + 1) * width] for j, part in enumerate("qkv")}
            elif path[-1].startswith(("proj", "fc", "norm")): found[f"{i}_{path[-1]}_{kind}"] = p
        elif name.startswith("norm."): found[f"{len(vit.blocks)}_{name.replace('.', '_')}"] = p
    return found


# --- stage 1 ---

@pytest.mark.parametrize("backbone", ["tiny", "other"])
def test_sensitivity_is_the_sum_of_squared_gradients(vit, images, backbone):
    model = tune(vit if backbone == "tiny" else other_vit(), "linear", 3)
    slow, wanted = plain(model), {}
    for rows in (slice(0, 4), slice(4, 6)):
        slow.zero_grad()
        F.cross_entropy(slow(model.normalise(images[rows])), LABELS[rows]).backward()
        for p in slow.parameters(): p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in slow.named_parameters(): wanted[name] = wanted.get(name, 0) + p.grad ** 2
    for name, p in slow.named_parameters(): p.data = wanted[name]
    wanted = values_of(slow)
    found = sensitivity(model, candidates(model.host), zip(images.split(4), LABELS.split(4)), drop_path=0.0)
    assert found.keys() == wanted.keys()
    for name, scores in found.items(): torch.testing.assert_close(scores, wanted[name], rtol=1e-3, atol=1e-9, msg=name)


def test_stage_1_runs_as_in_training(vit, images):
    "timm's own stochastic depth with the same random numbers makes the same sensitivities (baselines spec 1.19)."
    model = tune(vit, "linear", 3)
    slow, wanted, random = plain(model).train(), {}, torch.get_rng_state()
    for block, rate in zip(slow.blocks, torch.linspace(0, 0.5, len(slow.blocks)).tolist()):
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
    with torch.random.fork_rng():
        torch.manual_seed(rng_seed(5, "dropout"))
        for rows in (slice(0, 4), slice(4, 6)):
            slow.zero_grad()
            F.cross_entropy(slow(model.normalise(images[rows])), LABELS[rows]).backward()
            for name, p in slow.named_parameters(): wanted[name] = wanted.get(name, 0) + p.grad ** 2
    for name, p in slow.named_parameters(): p.data = wanted[name]
    batches = lambda: zip(images.split(4), LABELS.split(4))
    found, calm = (sensitivity(model, candidates(model.host), batches(), rate, 5) for rate in (0.5, 0.0))
    for name, scores in values_of(slow).items(): torch.testing.assert_close(found[name], scores, rtol=1e-3, atol=1e-9, msg=name)
    assert not torch.allclose(found["3_fc1_weight"], calm["3_fc1_weight"]) and model.drop_path == 0
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("method", METHODS)
def test_stage_1_draws_by_the_models_seed(vit, images, method):
    model, seen = tune(vit, method, 3, **MIXED, seed=4), []
    whole, model.loss = model.loss, lambda x, y: (seen.append((model.engine.training, model.drop_path)), whole(x, y))[1]
    model.prepare(images, LABELS)
    torch.manual_seed(1)
    again = ready(vit, images, method, seed=4)
    assert seen == [(True, 0.1)] and model.drop_path == 0 and model.config.sensitivity_drop_path == 0.1
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("shuffle", [False, True])
def test_so_many_batches_of_so_many_images_are_looked_at(vit, shuffle):
    seen = []
    images, labels = torch.randn(20, 3, 32, 32), torch.arange(20)
    model = tune(vit, "spt_lora", 20, preset="exact", batches=3, batch_size=5, shuffle=shuffle)
    whole, model.loss = model.loss, lambda x, y: (seen.append(y), whole(x, y))[1]
    model.prepare(images, labels)
    seen = torch.stack(seen)
    assert seen.shape == (3, 5) and len(seen.unique()) == 15
    assert torch.equal(seen.flatten(), labels[:15]) != shuffle


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_prepare_leaves_everything_as_it_was(vit, images, training, fails):
    model = tune(vit, "spt_lora", 3, **MIXED).train(training)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    flags, modes = {n: p.requires_grad for n, p in model.named_parameters()}, [m.training for m in model.modules()]
    random = torch.get_rng_state()
    if fails:
        # classes that there are not
        with pytest.raises(IndexError): model.tuner.prepare(model, torch.zeros(6, 3, 32, 32), LABELS + 9, None)
    else: model.tuner.prepare(model, images, LABELS, None)
    assert model.tuner.prepared != fails
    now = dict(model.named_parameters())
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in state.items() if not n.endswith("tau"))
    assert all(now[n].requires_grad == flag and now[n].grad is None for n, flag in flags.items())
    if fails: assert [m.training for m in model.modules()] == modes
    assert torch.equal(random, torch.get_rng_state()) and all(p.grad is None for p in vit.parameters())


def test_prepare_works_once_and_needs_no_gradient_mode(vit, images):
    model = tune(vit, "spt_lora", 3, **MIXED)
    with torch.no_grad(): model.prepare(images, LABELS)
    before = {n: id(p) for n, p in model.trainable().items()}
    model.prepare(images.flip(0), LABELS)
    model.tuner.restore(model.tuner.state_dict())       # an optimizer may hold the tensors already
    assert before == {n: id(p) for n, p in model.trainable().items()}


# --- stage 2 ---

SHAPES = {
    "0_q_weight": (16, 16),
    "0_q_bias": (16,),
    "0_fc1_weight": (40, 16),
    "0_fc1_bias": (40,),
    "0_norm1_weight": (15,),
    "1_q_weight": (16, 16),
}


def random_scores(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(shape, generator=generator) ** 3 * (1 + j % 3) for j, (name, shape) in enumerate(SHAPES.items())}
    scores["1_q_weight"][:4] = 0
    return scores


def spent_slowly(scores, config, cost, fixed):
    "What trains for every tau, one parameter after the other."
    flat = sorted(((s, name) for name, t in scores.items() for s in t.flatten().tolist()), reverse=True)
    sensitive, totals = dict.fromkeys(scores, 0), {}
    for tau, (_, owner) in enumerate(flat, 1):
        sensitive[owner] += 1
        totals[tau] = fixed
        for name, shape in SHAPES.items():
            s, price = sensitive[name], cost(shape, config.rank) if len(shape) > 1 else shape[0]
            whole = s >= (price / config.alpha if len(shape) > 1 else shape[0] / config.beta)
            totals[tau] += price if whole else s
    return totals


@pytest.mark.parametrize("cost", [LowRank.cost, Behind.cost])
@pytest.mark.parametrize("match,step,last", [("below", 1, None), ("below", 7, 300), ("nearest", 1, None), ("nearest", 20, 400)])
def test_tau_is_the_best_of_the_sweep(cost, match, step, last):
    for seed, budget in enumerate((60, 110, 190, 260, 350, 500, 5000)):
        config, scores = SPTConfig(budget=budget, rank=2, alpha=4.0, tau_step=step, tau_max=last, match=match), random_scores(seed)
        positive = sum(int((s > 0).sum()) for s in scores.values())
        every = spent_slowly(scores, config, cost, 16)
        totals = {tau: every[tau] for tau in range(step, min(last or 4 * budget, positive) + 1, step)}
        assert list(totals.values()) == sorted(totals.values())
        found = allocate(scores, config, cost, 16)
        assert found.total == totals[found.tau]
        if match == "below":
            assert found.total <= budget and found.tau == max(tau for tau, total in totals.items() if total <= budget)
        else: assert abs(found.total - budget) == min(abs(total - budget) for total in totals.values())


def test_an_allocation_holds_the_highest_scores():
    scores = random_scores(3)
    config = SPTConfig(budget=200, rank=2, alpha=4.0, tau_step=1, tau_max=None, match="below")
    found = allocate(scores, config, LowRank.cost)
    owner, position = ranked(scores, 10_000)
    order = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values
    names = list(scores)
    assert torch.equal(torch.stack([scores[names[o]].flatten()[p] for o, p in zip(owner, position)]), order[order > 0])
    least = order[found.tau - 1]
    for name, s in scores.items():
        sensitive = (s.flatten() >= least).nonzero()[:, 0]
        if name in found.sparse: assert torch.equal(found.sparse[name], sensitive)
        else: assert (len(sensitive) == 0) == (name not in found.modules + found.whole)
    assert found.modules and found.whole and found.sparse and not set(found.sparse) & {*found.modules, *found.whole}


def test_thresholds():
    "baselines spec 1.19: at least cost / 10 for a matrix, at least 20 % for a vector."
    config = SPTConfig()
    assert promotion((768, 768), config, LowRank.cost) == (1229, 12_288)        # 1228.8
    assert promotion((3072, 768), config, LowRank.cost) == (3072, 30_720)       # exactly a tenth is enough
    assert promotion((3072, 768), config, Behind.cost) == (5224, 52_232)
    assert promotion((768,), config, LowRank.cost) == (154, 768)                # 153.6
    assert promotion((1280,), config, LowRank.cost) == (256, 1280)              # exactly 20 % is enough too


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [500, 3_000, 12_000, 30_000, 10**6])
def test_a_budget_is_never_exceeded(vit, images, method, budget):
    model = ready(vit, images, method, budget=budget)
    trained = count_parameters(model)["without_head"]
    assert trained == 64 + sum(model.tuner.spent().values()) <= budget
    assert (
        trained >= budget - max(METHODS[method].cost(s, 8) for s in model.tuner.shapes.values() if len(s) > 1)
        or int(model.tuner.tau) == budget * 4
        or budget == 10**6
    )


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_counts_have_a_closed_form(vit, images, method, class_token):
    "Everything sensitive, on the tiny backbone (L = 4, D = 64, hidden 4 D) with r = 8."
    count = count_parameters(ready(vit, images, method, budget=10**6, alpha=10**6, beta=10**6, class_token=class_token))["without_head"]
    d, r = 64, 8
    matrices = {"spt_lora": 4 * r * 2 * d + 2 * r * 5 * d, "spt_adapter": 5 * (2 * d * r + r + d) + 2 * 4 * d * r + r + 4 * d}[method]
    assert count == 4 * (matrices + 13 * d) + 2 * d + d * class_token


@pytest.mark.parametrize("method,module,most", [("spt_lora", LowRank, 1_449_216), ("spt_adapter", Behind, 1_532_736)])
def test_the_most_that_vit_base_can_train(method, module, most):
    with torch.device("meta"):
        host = as_host(timm.create_model("vit_base_patch16_224", num_classes=0))
        tuner = {"spt_lora": SPTLoRA, "spt_adapter": SPTAdapter}[method](host, SPTAdapterConfig())
        tuner.grow([n for n, s in tuner.shapes.items() if len(s) > 1], {n: (s[0], None) for n, s in tuner.shapes.items() if len(s) == 1})
    assert sum(p.numel() for p in tuner.trainable(host).values()) == most
    assert {n: m for n, m in tuner.spent().items() if n.endswith("weight") and "norm" not in n} == {
        n: module.cost(s, 8) for n, s in tuner.shapes.items() if len(s) > 1}


def test_released_adapters_take_loras_masks(vit, images):
    of_lora, own, released = (ready(vit, images, m, masks=k) if m == "spt_adapter" else ready(vit, images, m)
                              for m, k in (("spt_lora", ""), ("spt_adapter", "own"), ("spt_adapter", "lora")))
    where = lambda model: (
        set(model.tuner.sides),
        {n: d.index if d.index is None else d.index.tolist() for n, d in model.tuner.deltas.items()},
    )
    assert where(released) == where(of_lora) != where(own)


# --- the network ---

@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", ["tiny", "other"])
@pytest.mark.parametrize("training", [True, False])
def test_it_starts_as_the_backbone_exactly(vit, images, method, backbone, training):
    vit = vit if backbone == "tiny" else other_vit()
    model, linear = ready(vit, images, method).train(training), tune(vit, "linear", 3)
    assert model.tuner.sides and any(d.index is not None for d in model.tuner.deltas.values())
    assert torch.equal(model(images), linear(images)) and torch.equal(model.tokens(images), linear.tokens(images))


@pytest.mark.parametrize("method", METHODS)
def test_both_ways_through_the_last_block_agree(vit, images, method):
    "Class tokens alone, with queries of their own, or all tokens; the final norm has its deltas in both."
    model = shake(ready(vit, images, method, budget=40_000))
    assert any(n.startswith("4_norm") for n in model.tuner.deltas) and any(n.startswith("3_q") for n in model.tuner.sides)
    torch.testing.assert_close(model.tokens(images)[:, 0], model.features(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backbone", ["tiny", "other"])
def test_merged_network_is_the_tuned_one(vit, images, backbone):
    vit = vit if backbone == "tiny" else other_vit()
    kept = copy.deepcopy(vit.state_dict())
    model = shake(ready(vit, images))
    merged = merge_spt(model)
    assert type(merged) is type(vit)
    torch.testing.assert_close(merged(model.normalise(images)), model(images), atol=1e-4, rtol=1e-4)
    before, after = values_of(vit), values_of(merged)
    for name in before:     # what is not sensitive stays bitwise
        if name in model.tuner.deltas and (index := model.tuner.deltas[name].index) is not None:
            same = torch.ones(before[name].numel(), dtype=torch.bool).index_fill(0, index, False)
            assert torch.equal(before[name].flatten()[same], after[name].flatten()[same])
            assert not torch.isclose(before[name].flatten()[index], after[name].flatten()[index]).all()
        elif name not in model.tuner.sides and name not in model.tuner.deltas: assert torch.equal(before[name], after[name])
    assert all(torch.equal(t, kept[n]) for n, t in vit.state_dict().items())
    with pytest.raises(ValueError, match="cannot be merged"): merge_spt(ready(vit, images, "spt_adapter"))


def test_adapters_stand_behind_their_matrices(vit, images):
    "Against hooks on the plain network; at `proj` the adapter sees the input."
    model = shake(ready(vit, images, "spt_adapter", budget=60_000, beta=1.0))
    tuner, slow = model.tuner, plain(model)
    sides = lambda i, parts: [tuner.sides[n] if (n := f"{i}_{p}_weight") in tuner.sides else None for p in parts]

    def hook(i, parts):
        def change(layer, inputs, y):
            def one(side, y):
                if side is None: return y
                x = inputs[0] if side.part == "proj" else y
                return y + F.gelu(x @ side.down.T + side.down_bias) @ side.up.T + side.up_bias
            return torch.cat([one(side, piece) for side, piece in zip(sides(i, parts), y.chunk(len(parts), -1))], -1)
        return change
    for name, value in values_of(slow).items():
        with torch.no_grad():
            if name in tuner.deltas: value.copy_(tuner.deltas[name](value))
    for i, block in enumerate(slow.blocks):
        for parts, layer in (("qkv", block.attn.qkv), (["proj"], block.attn.proj), (["fc1"], block.mlp.fc1), (["fc2"], block.mlp.fc2)):
            layer.register_forward_hook(hook(i, parts))
    assert {n.split("_")[1] for n in tuner.sides} == {"q", "k", "v", "proj", "fc1", "fc2"}
    torch.testing.assert_close(model(images), slow(model.normalise(images)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("part, shape", [("q", (64, 64)), ("proj", (64, 64)), ("fc1", (256, 64)), ("fc2", (64, 256))])
def test_how_modules_start(part, shape):
    "The adapter's down map, bias included, as PyTorch starts a linear map; no dropout at `proj`, in neither module."
    torch.manual_seed(2)
    sides = [module(shape, part, SPTAdapterConfig(rank=400)) for module in (LowRank, Behind)]
    for side in sides:
        bound = side.down.shape[1] ** -0.5
        assert not side.up.any() and 0.98 * bound < side.down.abs().max() <= bound
        assert side.dropout.p == (0 if part == "proj" else 0.1)
    bias = sides[1].down_bias
    assert 0.98 * bound < bias.abs().max() <= bound and not sides[1].up_bias.any() and abs(bias.std() - bound / 3 ** 0.5) < 0.1 * bound


@pytest.mark.parametrize("dropout", ["dropout", "module_drop_path"])
def test_dropout_is_for_training(vit, images, dropout):
    rates = {"dropout": 0.0, "module_drop_path": 0.0} | {dropout: 0.5}
    model = shake(ready(vit, images, **rates))
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))
    model = shake(ready(vit, images, dropout=0.0, module_drop_path=0.0)).train()
    assert torch.equal(model(images), model(images))


# --- training ---

@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_the_allocation_trains(vit, images, method):
    kept, model = copy.deepcopy(vit.state_dict()), ready(vit, images, method)
    frozen = {n: p.clone() for n, p in model.host.vit.named_parameters() if n != "cls_token"}
    before = {n: p.detach().clone() for n, p in model.trainable().items()}
    steps(model, images)
    assert all(
        torch.equal(p, frozen[n]) and p.grad is None and not p.requires_grad
        for n, p in model.host.vit.named_parameters()
        if n != "cls_token"
    )
    assert all(torch.equal(t, kept[n]) for n, t in vit.state_dict().items())
    inert = {n for n in before if "_k_bias" in n}                                           # softmax does not see a key's bias
    assert {n for n, p in model.trainable().items() if torch.equal(p, before[n])} <= inert
    assert "tuner.cls_token" in before and "tuner.cls_token" not in ready(vit, images, method, class_token=False).trainable()


def test_sparse_deltas_are_a_masked_update_of_the_dense_weights(vit, images):
    "Three steps of SGD of every weight, under a mask, make the same network."
    model = ready(vit, images, budget=2_000, alpha=1.0, beta=1.0)
    tuner, dense = model.tuner, plain(model)
    assert not tuner.sides and {len(s) for n, s in tuner.shapes.items() if n in tuner.deltas} == {1, 2}
    own = {"cls_token", "head.weight", "head.bias"}
    holder = copy.deepcopy(dense)
    for name, p in holder.named_parameters(): p.data = torch.full(p.shape, float(name in own))
    for name, mask in values_of(holder).items():
        if name in tuner.deltas: mask.data.view(-1)[tuner.deltas[name].index] = 1
    masks = {n: p.data.bool() for n, p in holder.named_parameters()}
    for _ in range(3):
        dense.zero_grad()
        F.cross_entropy(dense(model.normalise(images)), LABELS).backward()
        with torch.no_grad():
            for name, p in dense.named_parameters(): p -= 0.05 * p.grad * masks[name]
    steps(model, images)
    merged = dict(merge_spt(model).named_parameters())
    start = dict(plain(tune(vit, "linear", 3)).named_parameters())
    for name, p in dense.named_parameters():
        torch.testing.assert_close(merged[name], p, atol=1e-6, rtol=1e-5, msg=name)
        if name.startswith(("blocks", "norm")): assert torch.equal(p[~masks[name]], start[name][~masks[name]])


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load(vit, images, method, tmp_path):
    model = steps(ready(vit, images, method), images)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path/"tuned.safetensors")
    positions = sum(t.numel() for n, t in tensors.items() if n.endswith("index"))
    assert sum(t.numel() for t in tensors.values()) == count_parameters(model)["with_head"] + positions + 1 and positions > 0
    loaded = load_tuned(tmp_path, vit)
    assert torch.equal(loaded(images), model(images)) and loaded.diagnostics(images) == model.diagnostics(images)
    assert {n: p.requires_grad for n, p in loaded.trainable().items()} == {n: True for n in model.trainable()}
    loaded.prepare(images.flip(0), LABELS)                                                  # has its allocation
    assert torch.equal(loaded(images), model(images))
    with pytest.raises(ValueError, match="load the backbone it was trained on"): load_tuned(tmp_path, other_vit())


def _first(tensors, start, end): return next(n for n in tensors if n.startswith(start) and n.endswith(end))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {"sides.9_q_weight.down": torch.zeros(8, 64)}, "9_q_weight, which this backbone does not have"),
        (lambda t: {_first(t, "sides", "down"): torch.zeros(7, 64)}, r"sides\.\d_\w+_weight\.down is \(7, 64\), has to be \(8, \d+\)"),
        (lambda t: {_first(t, "sides", "up"): torch.zeros(64)}, r"sides\.\d_\w+_weight\.up is \(64,\), has to be \(\d+, 8\)"),
        (lambda t: {_first(t, "deltas", "index"): torch.arange(3)}, r"deltas\.\w+\.values is \(\d+,\), has to be \(3,\)"),
        (lambda t: {n: t[n] + 10**6 for n in [_first(t, "deltas", "index")]}, r"deltas\.\w+\.index has positions outside of \w+'s \d+"),
        (lambda t: {"deltas.0_q_weight.values": torch.zeros(5)}, r"deltas\.0_q_weight\.values is \(5,\), has to be \(4096,\)"),
        (lambda t: {"deltas.0_norm1_bias.index": torch.arange(2)}, r"deltas\.0_norm1_bias\.values is (missing|\(\d+,\)), has to be \(2,\)"),
        (lambda t: {"tau": torch.zeros(2)}, r"tau is \(2,\), has to be \(\)"),
    ],
)
def test_restore_names_what_does_not_fit(vit, images, method, change, message):
    tensors, model = dict(ready(vit, images, method).tuner.state_dict()), tune(vit, method, 3, **MIXED)
    changed = change(tensors)
    for name in changed:      # a delta of its own in place of whatever there is
        if name in ("deltas.0_q_weight.values", "deltas.0_norm1_bias.index"):
            tensors = {n: t for n, t in tensors.items() if name.split(".")[1] not in n}
    with pytest.raises(ValueError, match=message): model.tuner.restore(tensors | changed)
    assert not model.tuner.prepared and not model.tuner.sides and not model.tuner.deltas


def test_an_interrupted_run_goes_on_bitwise(vit, tmp_path):
    split = Split(
        torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3
    )

    def make():
        torch.manual_seed(0)
        model, r = tune(vit, "spt_lora", 3, **MIXED), recipe("vpt", epochs=2, warmup_epochs=0, batch_size=4, lr=0.05)
        model.prepare(split.images, split.labels)
        return Trainer(model, make_resident(model, split, r, True), r, 2)
    whole, stopped, going_on = make(), make(), make()
    torch.manual_seed(1)
    for epoch in (0, 1): whole.epoch(epoch)
    torch.manual_seed(1)
    stopped.epoch(0)
    stopped.save_checkpoint(tmp_path/"run.safetensors")
    torch.manual_seed(9)
    going_on.load_checkpoint(tmp_path/"run.safetensors")
    going_on.epoch(1)
    assert all(torch.equal(p, q) for p, q in zip(whole.model.trainable().values(), going_on.model.trainable().values()))


# --- segmentation ---

class Masks(nn.Module):
    "A small segmentor: a classifier with batch norm on the patches, masks (N, 32, 32) with 255 to be ignored."
    def __init__(self, model, num_classes=3):
        super().__init__()
        self.engine, self.head = model.engine, nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, num_classes))
        self.normalise = model.normalise

    host, tuner = property(lambda self: self.engine.host), property(lambda self: self.engine.tuner)
    device = torch.device("cpu")

    def loss(self, images, masks):
        z, _ = self.engine.tokens(self.normalise(images), Context(training=self.training, all_tokens=True))
        logits = self.head(z[:, 1:].flatten(0, 1)).view(len(z), 4, 4, -1).permute(0, 3, 1, 2)
        return F.cross_entropy(F.interpolate(logits, size=masks.shape[1:]), masks, ignore_index=255)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("module", [True, False])
def test_segmentation(vit, images, method, module):
    torch.manual_seed(0)
    model = Masks(tune(vit, method, 3, **MIXED)).train()
    masks = torch.randint(0, 3, (6, 32, 32))
    masks[:, :8] = 255
    state = {n: t.clone() for n, t in model.state_dict().items()}
    given = (
        model
        if module
        else SimpleNamespace(host=model.host, device=model.device, normalise=model.normalise, engine=model.engine, loss=model.eval().loss)
    )
    assert model.tuner.needs_targets
    model.tuner.prepare(given, images, masks, None)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in state.items() if not n.endswith("tau"))
    assert model.tuner.prepared and model.tuner.sides and model.training == module
    start = model.eval().loss(images, masks)
    assert torch.equal(start, Masks.loss(model, images, masks))
    optimizer = torch.optim.SGD([*model.tuner.trainable(model.host).values(), *model.head.parameters()], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model.loss(images, masks).backward()
        optimizer.step()
    assert model.loss(images, masks) < start
    assert not [n for n, p in model.host.vit.named_parameters() if p.grad is not None and n != "cls_token"]


# --- bad input ---

@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(budget=0), "budget = 0 must be at least 1"),
        (dict(rank=0), "rank = 0"),
        (dict(alpha=0.5), "alpha = 0.5"),
        (dict(beta=0.0), "beta = 0.0"),
        (dict(batches=0), "batches = 0"),
        (dict(batch_size=0), "batch_size = 0"),
        (dict(tau_step=0), "tau_step = 0"),
        (dict(tau_max=10), "less than tau_step"),
        (dict(dropout=1.0), "dropout = 1.0"),
        (dict(module_drop_path=-0.1), "module_drop_path = -0.1"),
        (dict(sensitivity_drop_path=1.0), "sensitivity_drop_path = 1.0"),
        (dict(match="above"), "match"),
    ],
)
def test_settings_that_cannot_be(vit, settings, message):
    with pytest.raises((ValueError, TypeError), match=message): tune(vit, "spt_lora", 3, **settings)


def test_masks_are_a_setting_of_adapters_alone(vit):
    with pytest.raises(TypeError, match="masks"): tune(vit, "spt_lora", 3, masks="lora")


@pytest.mark.parametrize(
    "settings,labels,message",
    [
        (dict(budget=64), LABELS, "class token alone has 64"),
        (dict(tau_step=10**7, tau_max=10**7), LABELS, "smaller tau_step"),
        (dict(), LABELS[:4], "6 images and 4 labels"),
    ],
)
def test_what_cannot_be_prepared_stays_unprepared(vit, images, settings, labels, message):
    model = tune(vit, "spt_lora", 3, **{**MIXED, **settings})
    with pytest.raises(ValueError, match=message): model.prepare(images, labels)
    with pytest.raises(RuntimeError, match="has to look at training images"): model(images)
    with pytest.raises(ValueError, match="0 images"): model.prepare(images[:0], labels[:0])


def test_scores_must_be_finite(vit, images):
    model = tune(vit, "spt_lora", 3, **MIXED)
    with torch.no_grad(): model.head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="sensitivities are not finite"): model.prepare(images, LABELS)
    assert not model.tuner.prepared


def test_two_models_on_one_backbone_do_not_meet(vit, images):
    one, two, plain_ = ready(vit, images), ready(vit, images, seed=4, budget=5_000), tune(vit, "linear", 3)
    before = two(images), plain_(images)
    steps(shake(one), images)
    assert torch.equal(two(images), before[0]) and torch.equal(plain_(images), before[1])


def test_other_towers_are_refused():
    host = as_host(load_backbone("tiny_random"))
    blind = SimpleNamespace(depth=4, dim=64, weights={}, blocks=host.blocks)
    with pytest.raises(TypeError, match="take a timm VisionTransformer"): SPTLoRA(blind, SPTConfig())
