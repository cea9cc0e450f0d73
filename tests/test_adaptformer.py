"AdaptFormer: against its formula, counted, its batch norm in training, evaluation and on disk."
import copy

import pytest
import timm
import torch
from reference import resumed, shake
from safetensors.torch import load_file
from test_methods import LABELS, other_vit, steps
from test_ssf import FLOATS, plain

from hierprompt.data.tasks import Split
from hierprompt.engine.hosts import as_host
from hierprompt.engine.saved import load_tuned
from hierprompt.engine.tuned import method_config, tune
from hierprompt.methods.vit.adaptformer import AdaptFormer
from hierprompt.training.recipes import recipe


def shaken(vit, **settings):
    model = tune(vit, "adaptformer", 3, **{**dict(bottleneck=4, dropout=0.0), **settings})
    shake(model.tuner)
    return model


def by_hand(vit, tuner, images):
    "Features before the batch norm."
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    for block, side in zip(vit.blocks, tuner.side):
        x = x + block.ls1(block.attn(block.norm1(x)))
        seen = side.norm(x)
        hidden = torch.relu(seen @ side.down.weight.T + side.down.bias)
        x = x + block.ls2(block.mlp(block.norm2(x))) + 0.1 * (hidden @ side.up.weight.T + side.up.bias)
    return vit.fc_norm(vit.pool(vit.norm(x)))


@pytest.mark.parametrize("preset", AdaptFormer.presets)
@pytest.mark.parametrize("sizes", [{}, dict(init_values=0.1, global_pool="avg", class_token=False)])
def test_it_is_its_formula(preset, sizes):
    vit = plain(**sizes)
    model = shaken(vit, preset=preset).train()
    features = by_hand(vit, model.tuner, FLOATS)
    if preset == "official": features = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-6).sqrt()
    found = model.features(FLOATS)
    torch.testing.assert_close(found, features, atol=1e-4, rtol=1e-4)
    found, wanted = (torch.autograd.grad((f - 1).abs().mean(), list(model.tuner.parameters())) for f in (found, features))
    for a, b in zip(found, wanted): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("settings,count", [(dict(preset="official"), 1_189_632), (dict(preset="mosa"), 1_208_064),
                                            (dict(preset="mosa", bottleneck=16), 322_752)])
def test_counts(settings, count):
    with torch.device("meta"):
        host = as_host(timm.create_model("vit_base_patch16_224", num_classes=0))
        assert sum(p.numel() for p in AdaptFormer(host, method_config("adaptformer", **settings)).parameters()) == count


@pytest.mark.parametrize("vit", [plain(), other_vit()])
def test_start(vit, images):
    frozen = tune(vit, "linear", 3)
    for preset in AdaptFormer.presets:
        model = tune(vit, "adaptformer", 3, preset=preset)
        assert torch.equal(model.tokens(FLOATS), frozen.tokens(FLOATS))
        assert torch.equal(model.features(FLOATS), frozen.features(FLOATS)) == (preset == "mosa")
    before = {n: p.detach().clone() for n, p in model.tuner.named_parameters()}
    steps(model, images)
    still = [n for n, p in model.tuner.named_parameters() if torch.equal(p, before[n])]
    assert not any(part in n for n in still for part in ("down.weight", "up.weight")), still   # no dead adapter


def test_drop_path_spares_the_bottleneck():
    "With both branches of the last block dropped, the bottleneck is what it adds."
    vit = plain(depth=2)
    model = shaken(vit, preset="mosa").train()
    model.drop_path = 1 - 1e-9
    with torch.no_grad():
        first, last = model.tuner.side
        x = vit.blocks[0].attn(vit.blocks[0].norm1(z := vit._pos_embed(vit.patch_embed(FLOATS)))) + z
        x = x + vit.blocks[0].mlp(vit.blocks[0].norm2(x)) + first(x)
        torch.testing.assert_close(model.features(FLOATS), vit.norm(x + last(x))[:, 0], atol=1e-4, rtol=1e-4)


def test_running_statistics(vit, images, tmp_path):
    model = tune(vit, "adaptformer", 3, bottleneck=4)
    seen = tune(vit, "linear", 3).features(images)
    model.train()(images)                                   # nothing but the batch norm has changed
    norm = model.eval().tuner.batch_norm
    torch.testing.assert_close(norm.running_mean, 0.1 * seen.mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * seen.var(0))
    steps(model, images)
    wanted = model.eval()(images)
    torch.testing.assert_close(model(images[:1]), wanted[:1], atol=1e-5, rtol=1e-5)      # of the others in the batch nothing is seen
    model.save_pretrained(tmp_path)
    saved = {n: t for n, t in load_file(tmp_path / "tuned.safetensors").items() if "batch_norm" in n}
    assert {n.rsplit(".", 1)[1] for n in saved} == {"running_mean", "running_var", "num_batches_tracked"}
    assert torch.equal(load_tuned(tmp_path, vit)(images), wanted)
    fresh = tune(vit, "adaptformer", 3, bottleneck=4)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(fresh(images), wanted)


def test_a_checkpoint_keeps_the_statistics(vit, images, tmp_path):
    how = recipe("noah", epochs=2, warmup_epochs=0, batch_size=3)
    models = [tune(vit, "adaptformer", 3, bottleneck=4) for _ in range(2)]
    whole, cut = resumed(models, Split(images, LABELS), how, tmp_path/"run.safetensors")
    assert whole["batch_norm.num_batches_tracked"] == 4 and all(torch.equal(t, cut[n]) for n, t in whole.items())


def test_one_image(vit, images):
    model = tune(vit, "adaptformer", 3).train()
    with pytest.raises(ValueError, match="a batch of one image has no variance"): model.loss(images[:1], LABELS[:1])
    tune(vit, "adaptformer", 3, preset="mosa").train().loss(images[:1], LABELS[:1]).backward()
    model.eval()(images[:1])


def test_a_host_that_pools_nothing(vit):
    host = as_host(vit)
    host.taps = (3,)
    with pytest.raises(ValueError, match="batch_norm = True normalises pooled features, and a TimmViT"):
        AdaptFormer(host, method_config("adaptformer", None))
    AdaptFormer(host, method_config("adaptformer", "mosa"))


@pytest.mark.parametrize("settings,message", [(dict(bottleneck=0), "bottleneck = 0"), (dict(dropout=1.0), "dropout = 1.0")])
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message): tune(other_vit(), "adaptformer", 3, **settings)
