"SCT: its channels by loops over classes, its formula at each place, counted, merged, on any host."
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from reference import shake
from test_methods import LABELS, other_vit, steps
from test_ssf import FLOATS, plain

from hierprompt.engine.hosts import as_host
from hierprompt.engine.saved import load_tuned
from hierprompt.engine.tuned import method_config, tune
from hierprompt.methods.vit.sct import SCT, SCTConfig, class_norms, largest, merge_sct
from hierprompt.results.published import load_published

HOSTS = [{}, dict(init_values=0.1, global_pool="avg"), dict(qkv_bias=False, depth=1, num_heads=4),
         dict(class_token=False, global_pool="avg")]
PLACES = ["attn", "mlp", "qkv"]


def ready(vit, images, place="attn", **settings):
    "With random maps and biases."
    model = tune(vit, "sct", 3, place=place, num_channels=7, **settings)
    model.prepare(images, LABELS)
    shake(model.tuner)
    return model


def changed(x, y, channels, layer, scale):
    "`y` whose salient channels are increased, given those in `x`, channel by channel."
    y = y.clone()
    for row, j in enumerate(channels.tolist()):
        y[..., j] = y[..., j] + scale * (sum(w * x[..., k] for w, k in zip(layer.weight[row], channels.tolist())) + layer.bias[row])
    return y


def by_hand(vit, tuner, images, see=None):
    "Features of a plain ViT with SCT written out; `see(block, values)` is shown what channels are chosen by, prefix tokens left out."
    place, scale = tuner.config.place, tuner.config.scale
    x, prefix = vit.norm_pre(vit._pos_embed(vit.patch_embed(images))), vit.num_prefix_tokens
    for i, block in enumerate(vit.blocks):
        change = (lambda x, y, t: y) if see else (lambda x, y, t: changed(x, y, tuner.channels[i, t], [*tuner.maps.values()][t][i], scale))
        q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, -1)
        if see and place == "qkv": see(i, torch.stack([q, v], 1)[:, :, prefix:])
        if place == "qkv": q, v = change(q, q, 0), change(v, v, 1)
        q, k, v = (t.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        o = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + block.ls1(block.attn.proj(o))
        if see and place == "attn": see(i, x[:, None, prefix:])
        if place == "attn": x = change(x, x, 0)
        y = block.mlp(block.norm2(x))
        x = x + block.ls2(change(y, y, 0) if place == "mlp" else y)
        if see and place == "mlp": see(i, x[:, None, prefix:])
    return vit.fc_norm(vit.pool(vit.norm(x)))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("settings", HOSTS)
def test_it_is_its_formula(settings, place, images):
    vit = plain(**settings)
    model = ready(vit, images, place, scale=0.5)
    found, wanted = model.features(FLOATS), by_hand(vit, model.tuner, FLOATS)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    found, wanted = (torch.autograd.grad(f.square().mean(), list(model.tuner.parameters())) for f in (found, wanted))
    for a, b in zip(found, wanted): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("settings", [HOSTS[0], HOSTS[3]])
def test_channels_are_the_largest_of_each_class_on_average(settings, place, images):
    "Class by class, a class of one image among them."
    vit, labels = plain(**settings), torch.tensor([0, 4, 0, 4, 4, 2])
    model, seen = tune(vit, "sct", 5, place=place, num_channels=7, batch_size=4), {}
    with torch.no_grad(): by_hand(vit, model.tuner, model.normalise(images), see=lambda i, x: seen.update({i: x.double()}))
    model.prepare(images, labels)
    for i, x in seen.items():
        norms = torch.stack([x[labels == c].square().sum((0, 2)).sqrt() for c in (0, 2, 4)]).mean(0)
        torch.testing.assert_close(class_norms(model, images, labels, model.config)[i], norms, atol=1e-4, rtol=1e-4)
        for t, row in enumerate(norms):
            assert model.tuner.channels[i, t].tolist() == sorted(sorted(range(len(row)), key=lambda j: -row[j])[:7])


def test_equal_scores_and_batches_of_any_size(images):
    assert largest(torch.tensor([1.0, 3, 3, 3, 0]), 2).tolist() == [1, 2]
    model = tune(plain(), "sct", 3, num_channels=7)
    whole, single = (class_norms(model, images, LABELS, SCTConfig(batch_size=n)) for n in (6, 1))
    torch.testing.assert_close(whole, single)
    assert torch.equal(largest(whole, 7), largest(single, 7))


def test_an_image_counts_for_each_class_that_is_in_it(images):
    "As segmentation has them; a class that no image shows counts for nothing."
    model = tune(plain(), "sct", 4, num_channels=7)
    both = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0]]).bool()
    twice = torch.cat([images, images[:1]]), torch.tensor([0, 0, 2, 2, 0, 2, 2])
    torch.testing.assert_close(class_norms(model, images, both, model.config), class_norms(model, *twice, model.config))


def test_channels_are_found_once_and_refused_where_they_do_not_fit(images):
    model = ready(plain(), images)
    before = model.tuner.channels.clone()
    model.prepare(images.flip(1), LABELS.flip(0))
    assert torch.equal(model.tuner.channels, before)
    state = model.state_dict()
    for channels in (before[:, :, :5], before[:1], before.repeat(1, 2, 1)):
        with pytest.raises(ValueError, match=r"saved tensor 'channels' has shape .*, this model wants \(3, 1, 7\)"):
            tune(plain(), "sct", 3, num_channels=7).load_state_dict({**state, "engine.tuner.channels": channels})
    model = tune(plain(), "sct", 3, num_channels=7)
    with pytest.raises(ValueError, match="not on 6 images and 5 labels"): class_norms(model, images, LABELS[:5], model.config)
    with pytest.raises(ValueError, match="not on 0 images"): class_norms(model, images[:0], LABELS[:0], model.config)
    with pytest.raises(ValueError, match="not finite"): class_norms(model, torch.full((6, 3, 32, 32), torch.inf), LABELS, model.config)
    with pytest.raises(ValueError, match="the backbone has only 48: give a smaller number, an eighth \\(6\\)"): tune(plain(), "sct", 3)


@pytest.mark.parametrize("preset,size,count", [("released", "base", 111_744), ("paper", "base", 111_744), ("mlp", "base", 111_744),
                                               ("qkv", "base", 223_488), ("released", "large", 24 * 96 * 97)])
def test_counts(preset, size, count):
    with torch.device("meta"):
        host = as_host(timm.create_model(f"vit_{size}_patch16_224", num_classes=0))
        assert sum(p.numel() for p in SCT(host, method_config("sct", preset)).parameters()) == count


def test_the_printed_number_is_theirs_without_classifier():
    printed = load_published("ship_table1").set_index("method").loc["SCT"]
    assert printed.params == round(12 * (96 ** 2 + 96) / 1e6, 2) and printed.params_convention == "without head"


def test_start(vit):
    tuner = tune(vit, "sct", 3, num_channels=48).tuner
    weights = torch.cat([layer.weight.flatten() for layer in tuner.layers])
    assert 0.019 < weights.std() < 0.021 and not any(layer.bias.any() for layer in tuner.layers)


@pytest.mark.parametrize("place", PLACES)
def test_it_is_the_frozen_network_where_its_maps_are_zero_and_nowhere_else(place, images):
    "So not at the start, whose weights are random (baselines spec 1.10)."
    vit = plain()
    frozen, model = tune(vit, "linear", 3).features(FLOATS), tune(vit, "sct", 3, place=place, num_channels=7)
    model.prepare(images, LABELS)
    assert not torch.equal(model.features(FLOATS), frozen)
    with torch.no_grad():
        for layer in model.tuner.layers: layer.weight.zero_()
    assert torch.equal(model.features(FLOATS), frozen)


@pytest.mark.parametrize("place", PLACES)
def test_channels_are_saved_and_come_back(place, images, tmp_path):
    "Into a model that has seen no images, and into one that found others."
    vit = plain()
    model = ready(vit, images, place).eval()
    model.save_pretrained(tmp_path)
    unseen, other = (tune(vit, "sct", 3, place=place, num_channels=7) for _ in range(2))
    other.prepare(images.flip(0) ** 3, LABELS)
    for again in (load_tuned(tmp_path, vit), unseen, other):
        again.load_state_dict(model.state_dict())
        assert torch.equal(again.tuner.channels, model.tuner.channels) and torch.equal(again.eval()(images), model(images))


@pytest.mark.parametrize("place", ["mlp", "qkv"])
@pytest.mark.parametrize("settings", [{}, dict(init_values=0.1), dict(qkv_bias=False), dict(class_token=False, global_pool="avg")])
def test_merges(settings, place, images):
    vit = plain(**settings)
    before = copy.deepcopy(vit.state_dict())
    model = ready(vit, images, place, scale=0.4)
    steps(model, images)
    model.eval()
    with torch.no_grad(): torch.testing.assert_close(merge_sct(model)(FLOATS), model(FLOATS), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(t, before[n]) for n, t in vit.state_dict().items())


def test_what_cannot_be_merged_is_refused(images):
    with pytest.raises(ValueError, match="'sct' at place 'attn'"): merge_sct(ready(plain(), images))
    with pytest.raises(ValueError, match="this one has 'linear'"): merge_sct(tune(plain(), "linear", 3))
    other = ready(other_vit(), images)
    F.cross_entropy(other(images), LABELS).backward()
    assert all(layer.weight.grad.any() for layer in other.tuner.layers)
