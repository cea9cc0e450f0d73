"MP: against its formula, counted, on any host, frozen."
import pytest
import timm
import torch
import torch.nn.functional as F
from reference import shake
from test_methods import LABELS, other_vit, steps

import hierprompt as hp
from hierprompt.data.tasks import Split
from hierprompt.engine.accounting import count_parameters
from hierprompt.engine.hosts import as_host
from hierprompt.engine.saved import load_tuned
from hierprompt.engine.tuned import method_config, tune
from hierprompt.methods.vit.mp import MP, cross_covariance

FLOATS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SIZES = dict(img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3, num_classes=0)
HOSTS = {"class token": {}, "registers": dict(reg_tokens=2), "average": dict(global_pool="avg", class_token=False),
         "average, norm behind": dict(global_pool="avg"), "average, norm before": dict(global_pool="avg", fc_norm=False)}


def host_of(kind):
    torch.manual_seed(3)
    return timm.create_model("vit_tiny_patch16_224", **SIZES, **HOSTS[kind]).eval()


def shaken(vit, **settings):
    model = tune(vit, "mp", 3, **{**dict(width=32), **settings})
    shake(model.head)
    return model


def by_hand(head, feature, patches, groups):
    "Logits of one image, entry by entry."
    x = patches @ head.project.weight.T + head.project.bias
    size = x.shape[1] // groups
    parts = [F.layer_norm(x[:, g * size:(g + 1) * size], (size,), head.norm.weight, head.norm.bias, 1e-5) for g in range(groups)]
    parts = [part - part.sum() / part.numel() for part in parts]
    maps = []
    for a, b in zip(parts, parts[1:]):
        c = sum(torch.outer(a[n], b[n]) for n in range(len(a))) / len(a)
        maps.append(torch.stack([column / column.square().sum().sqrt() for column in c.T], 1))
    y = torch.stack(maps)[None]
    for j in (0, 2):
        y = F.conv2d(y, head.shrink[j].weight, stride=2)
        if j == 0: y = F.gelu(y)
    return (head.first(feature) + head.second(y.flatten())) / 2


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("settings", [{}, dict(width=21, groups=3), dict(width=40, groups=2)])
def test_it_is_its_formula(kind, settings):
    vit = host_of(kind)
    model = shaken(vit, **settings)
    z = vit.forward_features(FLOATS)
    feature, patches = vit.fc_norm(vit.pool(z)), z[:, vit.num_prefix_tokens:]
    wanted = torch.stack([by_hand(model.head, feature[b], patches[b], model.config.groups) for b in range(4)])
    found = model.train()(FLOATS)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    for f, w in zip(*(torch.autograd.grad((out - 1).square().mean(), list(model.head.parameters())) for out in (found, wanted))):
        torch.testing.assert_close(f, w, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("classes", [100, 200, 1000])
def test_counts(classes):
    with torch.device("meta"): vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    counts = count_parameters(tune(vit, "mp", classes, normalize="inception"))
    assert counts["head"] == 394_146 + 3_653 * classes and counts["without_head"] == 0


def test_start(vit):
    head = tune(vit, "mp", 3, seed=1).head
    assert abs(head.project.weight.std() - 0.02) < 0.001 and not head.project.bias.any() and head.norm.eps == 1e-5
    bound = (1 / 27) ** 0.5                                                  # PyTorch's own start of a convolution
    for conv in head.shrink[::2]: assert 0.6 * bound < conv.weight.abs().max() <= bound
    assert head.second.in_features == 2883 and not head.first.bias.any()
    again, other = (tune(vit, "mp", 3, seed=s).head.state_dict() for s in (1, 2))
    assert all(torch.equal(t, again[n]) for n, t in head.state_dict().items())
    assert not any(torch.equal(t, other[n]) for n, t in head.state_dict().items() if n.endswith("weight") and n != "norm.weight")
    vpt = tune(vit, "mp", 3, head_init="vpt").head
    assert all(abs(layer.bias + 4.595).max() < 1e-3 for layer in (vpt.first, vpt.second)) and not vpt.project.bias.any()


def test_columns_have_length_one():
    x, y = torch.randn(2, 3, 9, 5).unbind()
    c = cross_covariance(x, y)
    assert c.shape == (3, 5, 5) and torch.allclose(c.norm(dim=1), torch.ones(3, 5))
    channelwise = F.normalize((x - x.mean(1, keepdim=True)).mT @ (y - y.mean(1, keepdim=True)), dim=1)
    assert (c - channelwise).abs().max() > 0.05                              # one mean an image, not one a channel
    assert torch.equal(cross_covariance(x * 0 + 1, y), torch.zeros(3, 5, 5))   # no direction: zeros, not nan


def test_training_changes_the_classifier_alone(vit, images):
    model = shaken(vit)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    steps(model, images)
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {f"head.{n}" for n, _ in model.head.named_parameters()} == set(model.trainable())
    assert not model.features_are_constant
    seen, bare = model.eval().features(images), tune(vit, "linear", 3).tokens(images)
    assert torch.equal(seen, bare)


def test_fit_and_reload(vit, images, tmp_path):
    model = tune(vit, "mp", 3, width=32)
    history = hp.fit(model, Split(images, LABELS), recipe=hp.recipe("mp", epochs=2, warmup_epochs=0, batch_size=6, mixup=0.0, cutmix=0.0),
                     progress=False)
    assert len(history.rows) >= 1
    model.save_pretrained(tmp_path)
    with torch.no_grad(): assert torch.equal(load_tuned(tmp_path, vit)(images), model(images))


def test_hosts_that_pool_nothing(vit):
    host = as_host(vit)
    host.taps = (3,)
    with pytest.raises(ValueError, match="a TimmViT gives the tokens of several blocks"): MP(host, method_config("mp", None))


@pytest.mark.parametrize("settings,message", [(dict(groups=1), "groups = 1"), (dict(width=510), "cannot be split"),
                                              (dict(width=24), "leaves 6 channels"), (dict(width=0), "leaves 0 channels")])
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message): tune(other_vit(), "mp", 3, **settings)
