"NOAH: against its parts and a plain recomputation, counted, the supernet's draws, the search."
import json

import pytest
import timm
import torch
from reference import shake
from test_methods import other_vit
from torch.nn import functional as F

import hierprompt as hp
from hierprompt.core import rng
from hierprompt.engine.hosts import as_host
from hierprompt.engine.tuned import method_config, tune
from hierprompt.methods.vit.noah import NOAH, Subnet, depths_of, random_subnet, read_subnet, released_subnets
from hierprompt.methods.vit.noah_search import NOAHSearch, mutated, search_noah

FLOATS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4) % 3
RELEASED = released_subnets()


@pytest.fixture(scope="module")
def vit(): return hp.load_backbone("tiny_random")


def shaken(vit, **settings):
    model = tune(vit, "noah", 3, **settings)
    shake(model.tuner, 0.1)
    return model


def by_hand(model, subnet, images):
    "Features with one long sequence, prompts at its end, block by block."
    host, rows = model.host.vit, model.tuner.rows
    x = host.norm_pre(host._pos_embed(host.patch_embed(images)))
    n, before = x.shape[1], 0
    for i, block in enumerate(host.blocks):
        v, rank, width = (sizes[i] for sizes in subnet)
        if v:
            own = rows["prompts"].of("tokens", i, v).expand(len(x), -1, -1)
            x = torch.cat([x[:, :x.shape[1] - before], own], 1)
        before = v
        h = block.norm1(x)
        qkv = block.attn.qkv(h)
        if rank: qkv = qkv + h @ rows["lora"].of("a", i, rank).T @ rows["lora"].of("b", i, rank)
        q, k, val = (t.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        att = ((q @ k.mT) * block.attn.scale).softmax(-1) @ val
        x = x + block.ls1(block.attn.proj(att.transpose(1, 2).flatten(2)))
        y = block.ls2(block.mlp(block.norm2(x)))
        if width:
            h = F.linear(y, rows["adapters"].of("down", i, width), rows["adapters"].of("down_bias", i, width))
            y = y + h * torch.sigmoid(1.702 * h) @ rows["adapters"].of("up", i, width) + rows["last"].of("bias", i, y.shape[-1])
        x = x + y
    return host.fc_norm(host.pool(host.norm(x[:, :n])))


def parts_of(depth):
    "Subnets with gaps at every place."
    generator = torch.Generator().manual_seed(1)
    sizes = lambda: tuple(torch.randint(0, 4, (depth,), generator=generator).tolist())
    gaps = (3, 0, 3, 2)[:depth], (0, 2, 0, 1)[-depth:]
    return [*(Subnet(*[gap] * 3) for gap in gaps), *(Subnet(sizes(), sizes(), sizes()) for _ in range(6))]


@pytest.mark.parametrize("which", ["tiny", "other"])
def test_it_is_its_formula(which, vit):
    vit = vit if which == "tiny" else other_vit()
    depth = len(vit.blocks)
    supernet = shaken(vit, preset="supernet")
    for subnet in parts_of(depth):
        supernet.tuner.use(subnet)
        with torch.no_grad():
            torch.testing.assert_close(supernet.features(FLOATS), by_hand(supernet, subnet, FLOATS), atol=2e-5, rtol=1e-4)
        alone = shaken(vit, **{kind: list(sizes) for kind, sizes in subnet._asdict().items()})
        assert sum(p.numel() for p in alone.tuner.parameters()) == subnet.num_parameters(vit.embed_dim)
        found, wanted = alone.features(FLOATS), by_hand(alone, subnet, FLOATS)
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
        found, wanted = (torch.autograd.grad(f.square().mean(), list(alone.tuner.parameters())) for f in (found, wanted))
        for a, b in zip(found, wanted): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_one_kind_alone_is_the_method_of_its_name(vit):
    "VPT-Deep, LoRA and Adapter with NOAH's settings and the same weights."
    def same(noah, other):
        with torch.no_grad(): torch.testing.assert_close(noah.features(FLOATS), other.features(FLOATS), atol=1e-5, rtol=1e-5)
    rows = lambda model: model.tuner.rows
    noah, vpt = shaken(vit, prompts=4, lora=0, adapters=0), tune(vit, "vpt_deep", 3, num_tokens=4)
    lora_noah, lora = shaken(vit, prompts=0, lora=4, adapters=0), tune(vit, "lora", 3, rank=4)
    ad_noah, adapter = shaken(vit, prompts=0, lora=0, adapters=4), tune(vit, "adapter", 3, bottleneck=4)
    with torch.no_grad():
        vpt.tuner.prompts.copy_(rows(noah)["prompts"].tokens.view_as(vpt.tuner.prompts))
        lora.tuner.a.copy_(rows(lora_noah)["lora"].a.view_as(lora.tuner.a))
        for i in range(len(vit.blocks)):
            lora.tuner.b[i] = rows(lora_noah)["lora"].of("b", i, 4).T.reshape(3, vit.embed_dim, 4)
            mine, theirs = rows(ad_noah), adapter.tuner.branches["mlp"][i]
            theirs.down.weight.copy_(mine["adapters"].of("down", i, 4)), theirs.down.bias.copy_(mine["adapters"].of("down_bias", i, 4))
            theirs.up.weight.copy_(mine["adapters"].of("up", i, 4).T), theirs.up.bias.copy_(mine["last"].of("bias", i, vit.embed_dim))
    same(noah, vpt), same(lora_noah, lora), same(ad_noah, adapter)


def test_start(vit):
    "Normal of 0.02 and zero biases, prompts as part of a supernet's 100."
    rows = tune(vit, "noah", 3, prompts=20, lora=20, adapters=20).tuner.rows
    for p in (rows["lora"].a, rows["lora"].b, rows["adapters"].down, rows["adapters"].up): assert abs(p.std() - 0.02) < 1e-3
    assert not rows["adapters"].down_bias.any() and not rows["last"].bias.any()
    bound = (6 / (101 * vit.embed_dim)) ** 0.5
    assert 0.99 * bound < rows["prompts"].tokens.abs().max() <= bound


@pytest.mark.parametrize("task", RELEASED)
def test_released_subnets(task):
    with torch.device("meta"):
        host = as_host(timm.create_model("vit_base_patch16_224", num_classes=0))
        tuner = NOAH(host, method_config("noah", None, subnet=task))
    assert sum(p.numel() for p in tuner.parameters()) == RELEASED[task].num_parameters(768)
    assert all(size in (1, 5, 10) for sizes in RELEASED[task] for size in sizes)


def test_all_released_subnets():
    counts = [subnet.num_parameters(768) for subnet in RELEASED.values()]
    assert (len(counts), min(counts), max(counts), round(sum(counts) / 19)) == (19, 287_278, 431_686, 360_134)


def test_saved_settings_come_back(vit, tmp_path):
    file = tmp_path / "subnet.json"
    file.write_text(json.dumps(dict(prompts=[1, 0, 2, 0], lora=[1] * 4, adapters=[0] * 4)))
    model = shaken(vit, subnet=str(file))
    model.save_pretrained(tmp_path / "model")
    file.unlink()    # the model knows its sizes
    assert torch.equal(hp.load_tuned(tmp_path / "model", vit)(FLOATS), model(FLOATS))


@pytest.mark.parametrize("depth,depths", [(12, [3, 6, 9, 12]), (4, [1, 2, 3, 4]), (2, [1, 2]), (1, [1]), (24, [6, 12, 18, 24])])
def test_depths(depth, depths): assert depths_of(depth) == depths


def test_draws_go_on(vit):
    "Equal seeds draw equal subnets, and a checkpoint's memory goes on with the same ones."
    a, b, c = (tune(vit, "noah", 3, preset="supernet", seed=seed).tuner for seed in (0, 0, 1))
    first = [a.draw() for _ in range(5)]
    assert first == [b.draw() for _ in range(5)] != [c.draw() for _ in range(5)]
    c.recall(a.memory())
    assert [a.draw() for _ in range(5)] == [c.draw() for _ in range(5)]
    assert all(set(sizes) <= {0, 1, 5, 10} and sizes[0] for subnet in first for sizes in subnet)
    assert tune(vit, "noah", 3).tuner.memory() == {}


def test_training_draws_and_evaluation_does_not(vit):
    model = tune(vit, "noah", 3, preset="supernet").train()
    seen = set()
    for _ in range(6):
        model.zero_grad()
        model.loss(FLOATS, LABELS).backward()
        seen.add(model.tuner.running)
    assert len(seen) == 6
    state = model.tuner.draws.clone()
    model.eval()(FLOATS)
    assert torch.equal(state, model.tuner.draws) and model.tuner.running == model.tuner.largest
    with torch.no_grad(), model.remembered():    # nothing of another subnet is remembered
        for subnet in parts_of(len(vit.blocks)):
            model.tuner.use(subnet)
            torch.testing.assert_close(model.features(FLOATS), by_hand(model, subnet, FLOATS), atol=2e-5, rtol=1e-4)


def test_mutation_changes_depths_alone():
    parent, generator = random_subnet([1, 5, 10], 12, rng(0, "sampler")), rng(1, "sampler")
    for _ in range(50):
        child = mutated(parent, [1, 5, 10], NOAHSearch(mutate=1.0, new_depth=1.0), generator)
        for old, new in zip(parent, child):
            both = [(a, b) for a, b in zip(old, new) if a and b]
            assert all(a == b for a, b in both) and len(new) == 12 and len([*filter(None, new)]) in (3, 6, 9, 12)
    assert mutated(parent, [1], NOAHSearch(mutate=0.0), generator) == parent


TINY = dict(limit=9000, population=6, generations=4, parents=3, mutations=2, crossovers=2)


def judge(calls):
    "A score that knows which subnet is good: much LoRA in few parameters."
    def score(model):
        calls.append(model.tuner.subnet)
        return 2 * sum(model.tuner.subnet.lora) - sum(model.tuner.subnet.prompts)
    return score


def test_search(vit, tmp_path):
    model, calls, again = tune(vit, "noah", 3, preset="supernet"), [], []
    found = search_noah(model, judge(calls), NOAHSearch(**TINY), tmp_path)
    assert len(calls) == len(set(calls)) == 24 and all(subnet.num_parameters(64) <= 9000 for subnet in calls)
    assert found.accuracy == max(a for g in found.history for _, a in g) and found.parameters == found.subnet.num_parameters(64)
    assert model.tuner.subnet == found.subnet == read_subnet(str(tmp_path / "subnet.json"))
    assert search_noah(model, judge(again), NOAHSearch(**TINY)) == found and again == calls    # without a folder, all again
    (tmp_path / "generation_02.json").unlink(), (tmp_path / "generation_03.json").unlink()
    rest = []
    assert search_noah(model, judge(rest), NOAHSearch(**TINY), tmp_path) == found and rest == calls[12:]
    longer = search_noah(model, judge(more := []), NOAHSearch(**TINY | dict(generations=5)), tmp_path)
    assert longer.history[:4] == found.history and len(more) == 6
    other = search_noah(model, judge([]), NOAHSearch(**TINY, seed=1))
    assert other.history != found.history


def test_a_folder_of_another_search_is_refused(vit, tmp_path):
    model = tune(vit, "noah", 3, preset="supernet")
    search_noah(model, judge([]), NOAHSearch(**TINY | dict(generations=1)), tmp_path)
    with pytest.raises(ValueError, match="another search"): search_noah(model, judge([]), NOAHSearch(**TINY | dict(limit=8000)), tmp_path)
    with torch.no_grad(): model.head.bias += 1
    with pytest.raises(ValueError, match="another supernet"): search_noah(model, judge([]), NOAHSearch(**TINY), tmp_path)


def test_a_space_that_is_exhausted_ends(vit):
    model = tune(vit, "noah", 3, space=[1])
    found = search_noah(model, judge([]), NOAHSearch(population=50, generations=9))
    assert sum(map(len, found.history)) <= 4 ** 3 and len(found.history) < 9


BAD = [
    (dict(prompts=[1, 2]), "has 2 sizes, this backbone 4 blocks"), (dict(lora=-1), "negative"),
    (dict(prompts=0, lora=0, adapters=0), "linear"), (dict(dropout=1.0), "dropout"),
    (dict(space=[]), "sizes from 1 on"), (dict(space=[5, 1]), "ascending"), (dict(space=[0, 1]), "from 1 on"),
    (dict(subnet="svhn"), "has 12 sizes"), (dict(subnet="svhn", lora=2), "leave them out"), (dict(space=[1], lora=2), "single subnet"),
    (dict(super_tokens=0), "super_tokens"),
]


@pytest.mark.parametrize("settings,message", BAD)
def test_bad_settings(settings, message, vit):
    with pytest.raises(ValueError, match=message): tune(vit, "noah", 3, **settings)


def test_bad_files(vit, tmp_path):
    with pytest.raises(KeyError, match="Did you mean 'cifar100'"): tune(vit, "noah", 3, subnet="cifar10")
    with pytest.raises(FileNotFoundError): tune(vit, "noah", 3, subnet=str(tmp_path / "subnet.json"))
    (tmp_path / "subnet.json").write_text('{"prompts": [1]}')
    with pytest.raises(ValueError, match="holds no subnet"): tune(vit, "noah", 3, subnet=str(tmp_path / "subnet.json"))
    with pytest.raises(FileNotFoundError, match="version control"): released_subnets(tmp_path / "none.csv")


@pytest.mark.parametrize("settings", [dict(limit=0), dict(population=0), dict(mutations=30), dict(mutate=1.5), dict(parents=0)])
def test_bad_search(settings):
    with pytest.raises(ValueError, match="= "): NOAHSearch(**settings)
