"""The contract that every method passes."""
import copy
import json

import pytest
import timm
import torch
from safetensors.torch import load_file

from hierprompt.engine.accounting import count_macs, count_parameters
from hierprompt.engine.registry import list_methods, tuner_class
from hierprompt.engine.saved import load_tuned
from hierprompt.engine.tuned import TunedModel, tune

METHODS = list_methods("vit")
CASES = [(m, p) for m in METHODS for p in tuner_class(m).presets]
LABELS = torch.arange(6) % 3
AT_IDENTITY = {"linear", "full", "bias", "spt_lora", "spt_adapter", "mosa"}   # by default; see test_loras_start too
WITH_BUFFERS = {"ship", "da_vpt", "da_vpt_ship", "spt_lora", "spt_adapter", "adaptformer", "sct", "mosa"}
HEAD_ALONE = {"linear", "mp"}   # train nothing but the classifier
NO_BUFFERS = {("adaptformer", "mosa")}   # presets that have none all the same
# settings that six images of 5 or 17 tokens allow, for methods whose defaults want more
_SHIP = dict(num_tokens=4, num_shared=2, num_attributes=3, num_prototypes=5, num_matching=4, threshold=1.0)
TEST_SETTINGS = {
    "ship": _SHIP,
    "da_vpt_ship": _SHIP | dict(num_guided=3),
    "sct": dict(num_channels=6),
}


def other_vit():
    torch.manual_seed(3)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=16, depth=2, embed_dim=48, num_heads=2, num_classes=0,
                             init_values=0.1, global_pool="avg").eval()


def ready(model, images, labels=LABELS):
    "The model, after it has seen the training images that it asks for."
    model.prepare(images, labels)
    return model


def tuned(vit, method, images, **settings):
    "`tune` for three classes, ready for use."
    return ready(tune(vit, method, 3, **TEST_SETTINGS.get(method, {}), **settings), images)


def steps(model, images, n=3, lr=0.05):
    optimizer = torch.optim.SGD(model.param_groups(lr, 1e-4), momentum=0.9)
    model.train()
    losses = []
    for _ in range(n):
        optimizer.zero_grad()
        loss = model.loss(images, LABELS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method,preset", CASES)
@pytest.mark.parametrize("backbone", ["tiny", "other"])
def test_only_declared_tensors_train(method, preset, backbone, vit, images):
    vit = vit if backbone == "tiny" else other_vit()
    frozen = {n: p.detach().clone() for n, p in vit.state_dict().items()}
    model = tuned(vit, method, images, preset=preset)
    declared = {id(p) for p in model.trainable().values()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    steps(model, images)
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (id(p) in declared) == p.requires_grad, name
        if id(p) not in declared: assert torch.equal(p, before[name]), name
    assert all(torch.equal(p, frozen[n]) for n, p in vit.state_dict().items())          # bitwise what was passed in
    assert all(p.grad is None for p in vit.parameters())
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert any("head" in n for n in moved) and (method in HEAD_ALONE or any("head" not in n for n in moved))


@pytest.mark.parametrize("method", METHODS)
def test_loss_falls(method, vit, images):
    losses = steps(tuned(vit, method, images), images, n=20, lr=0.005)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method,preset", CASES)
def test_save_and_load(method, preset, vit, images, tmp_path):
    model = tuned(vit, method, images, preset=preset, seed=5)
    steps(model, images)
    model.eval()
    logits = model(images)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "tuned.safetensors")
    trained = dict(model.tuner.named_parameters())
    learnt = sum(t.numel() for n, t in model.tuner.state_dict().items() if n not in trained)           # prototypes, maps and the like
    assert sum(t.numel() for t in tensors.values()) == count_parameters(model)["with_head"] + learnt   # nothing of a frozen backbone
    assert (learnt > 0) == (method in WITH_BUFFERS and (method, preset) not in NO_BUFFERS)
    assert {p.name for p in tmp_path.iterdir()} == {"tuned.safetensors", "config.json"}
    assert json.loads((tmp_path / "config.json").read_text())["method"] == method
    assert torch.equal(load_tuned(tmp_path, vit)(images), logits)


def test_load_refuses_what_does_not_fit(vit, images, tmp_path):
    model = tune(vit, "vpt_deep", 3)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load the backbone it was trained on"): load_tuned(tmp_path, other_vit())
    file = tmp_path / "tuned.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="missing or damaged"): load_tuned(tmp_path, vit)
    (tmp_path / "config.json").write_text('{"method": "vpt')
    with pytest.raises(ValueError, match="config.json is not valid JSON"): load_tuned(tmp_path, vit)
    with pytest.raises(FileNotFoundError): load_tuned(tmp_path / "nothing", vit)


@pytest.mark.parametrize("method", METHODS)
def test_identity_at_initialisation(method, vit, images):
    same = torch.equal(tuned(vit, method, images).features(images), tune(vit, "linear", 3).features(images))
    assert same == (method in AT_IDENTITY)


def test_vpt_adapter_starts_at_identity_and_only_its_last_bias_moves(vit, images):
    model = tune(vit, "adapter", 3, preset="vpt")
    assert torch.equal(model.features(images), tune(vit, "linear", 3).features(images))
    steps(model, images, n=5)
    moved = {n.split(".", 3)[-1] for n, p in model.tuner.named_parameters() if p.abs().max() > 0}
    assert moved == {"up.bias"}


@pytest.mark.parametrize("method,preset", CASES)
def test_batch_order_and_size_do_not_matter(method, preset, vit, images):
    model = tuned(vit, method, images, preset=preset)
    with torch.no_grad():
        together, flipped = model(images), model(images.flip(0)).flip(0)
        alone = torch.cat([model(image[None]) for image in images])
    assert (together - flipped).abs().max() < 1e-5 and (together - alone).abs().max() < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_model(method, vit, images):
    a, b, c = (tuned(vit, method, images, seed=s).trainable() for s in (0, 0, 1))
    assert all(torch.equal(a[n], b[n]) for n in a)
    heads = [n for n in a if n.startswith("head.") and a[n].ndim > 1]
    assert heads and not any(torch.equal(a[n], c[n]) for n in heads)


def test_tune_leaves_the_global_generator_alone(vit, images):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    for method in METHODS:
        state = torch.random.get_rng_state()
        tuned(vit, method, images)
        assert torch.equal(state, torch.random.get_rng_state()), method
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("preset", tuner_class("lora").presets)
def test_loras_start(preset, vit, images):
    "The frozen network, but for what NOAH's runs have: A and B from N(0, 0.02^2), std of BA 0.0011 at r = 8 (baselines spec 1.8)."
    model = tune(vit, "lora", 3, preset=preset)
    same = torch.equal(model.features(images), tune(vit, "linear", 3).features(images))
    assert same == (preset != "noah") == (not model.tuner.b.any())
    if same: return
    for tensor in (model.tuner.a, model.tuner.b): assert abs(tensor.std() - 0.02) < 0.001 and tensor.abs().max() > 0.06   # not cut at 2 std
    assert abs(model.tuner.weight_delta(1).std() - 0.02 ** 2 * 8 ** 0.5) < 1e-4


def test_adapters_start(vit):
    "NOAH's runs, NOAH's module, Houlsby, VPT: standard deviations of weights, biases (baselines spec 1.6)."
    found = {}
    for preset in tuner_class("adapter").presets:
        model = tune(vit, "adapter", 3, preset=preset, bottleneck=32)
        weights, biases = (torch.cat([p.flatten() for n, p in model.tuner.named_parameters() if n.endswith(kind)])
                           for kind in ("weight", "bias"))
        found[preset] = weights.std().item(), biases.abs().max().item(), weights.abs().max().item()
    assert found["noah"][0] == pytest.approx(0.02, rel=0.03) and found["noah"][1] == 0 and found["noah"][2] > 0.06
    bound = (6 / (64 + 32)) ** 0.5
    assert found["module"][0] == pytest.approx(bound / 3 ** 0.5, rel=0.03) and 0 < found["module"][1] < 1e-5 and found["module"][2] <= bound
    assert found["houlsby"][1] == 0 and 0.019 < found["houlsby"][2] <= 0.02 and found["vpt"] == (0, 0, 0)


def test_lora_equals_loralib(vit):
    "NOAH's LoRA is that of LoRA's authors on the fused map with alpha = r (baselines spec 1.8)."
    loralib = pytest.importorskip("loralib")
    model, theirs = tune(vit, "lora", 3, rank=4), copy.deepcopy(vit)
    with torch.no_grad():
        model.tuner.b.normal_(std=0.2)
        for i, block in enumerate(theirs.blocks):
            layer = loralib.Linear(64, 192, r=4, lora_alpha=4, lora_dropout=0.1)
            layer.load_state_dict(
                {
                    "weight": block.attn.qkv.weight,
                    "bias": block.attn.qkv.bias,
                    "lora_A": model.tuner.a[i, 0],
                    "lora_B": model.tuner.b[i].flatten(0, 1),
                }
            )
            block.attn.qkv = layer
        floats = torch.randn(4, 3, 32, 32)
        assert (theirs.eval()(floats) - model.features(floats)).abs().max() < 1e-5


@pytest.mark.parametrize("preset", tuner_class("lora").presets)
def test_lora_merges(preset, vit):
    from hierprompt.methods.vit.lora import merge_lora
    model, floats = tune(vit, "lora", 3, preset=preset, rank=4, scale=0.5), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        model.tuner.b.normal_(std=0.2)
        assert (merge_lora(model)(floats) - model(floats)).abs().max() < 1e-5
    with pytest.raises(ValueError, match="tuned with 'lora'"): merge_lora(tune(vit, "bias", 3))


def test_adapter_equals_its_formula(vit):
    "NOAH: x + y + A(y) with y the MLP branch; Houlsby the same on both branches."
    floats = torch.randn(4, 3, 32, 32)
    for preset in ("noah", "module", "houlsby"):
        model = tune(vit, "adapter", 3, preset=preset, bottleneck=4)
        sites = model.tuner.branches
        with torch.no_grad():
            z = model.host.embed(floats)
            for i, block in enumerate(vit.blocks):
                y = block.attn(block.norm1(z))
                z = z + y + (sites["attn"][i](y) if "attn" in sites else 0)
                y = block.mlp(block.norm2(z))
                z = z + y + sites["mlp"][i](y)
            assert (vit.norm(z)[:, 0] - model.features(floats)).abs().max() < 1e-5


def test_key_bias_has_no_gradient(vit, images):
    model = tune(vit, "bias", 3).train()
    model.loss(images, LABELS).backward()
    for block in model.host.vit.blocks:
        q, k, v = block.attn.qkv.bias.grad.view(3, -1).norm(dim=1)
        assert k < 1e-6 * max(q, v)


def test_weight_decay_spares_vectors(vit):
    groups = tune(vit, "adapter", 3).param_groups(0.1, 0.01, head_lr=0.5, head_weight_decay=0.2)
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
        assert group["lr"] == (0.5 if group["name"].startswith("head") else 0.1)
    assert {g["weight_decay"] for g in groups} == {0.0, 0.01, 0.2}
    everything = tune(vit, "adapter", 3).param_groups(0.1, 0.01, vectors=True)          # VPT's SGD
    assert [len(g["params"]) for g in everything if g["weight_decay"] == 0] == [1]


def test_prompt_dropout_draws_per_image(vit, images):
    model = tune(vit, "vpt_deep", 3, preset="released").train()
    with torch.random.fork_rng(): assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


@pytest.mark.parametrize("method", METHODS)
def test_macs_are_counted_on_shapes(method, vit, images):
    model = tuned(vit, method, images)
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    assert count_macs(model, 32) > 0
    assert model.device.type == "cpu" and all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


BAD = [
    (dict(method="vtp_deep"), KeyError, "unknown method 'vtp_deep'"),
    (dict(method="vpt_deep", num_token=3), TypeError, "Did you mean 'num_tokens'"),
    (dict(method="vpt_deep", num_tokens="ten"), TypeError, "num_tokens = 'ten' is not of type int"),
    (dict(method="vpt_deep", preset="relesed"), KeyError, "Did you mean 'released'"),
    (dict(method="vpt_deep", dropout=1.5), ValueError, "dropout = 1.5"),
    (dict(method="adapter", bottleneck=0), ValueError, "bottleneck = 0"),
    (dict(method="adapter", init="normal"), ValueError, "is not one of"),
    (dict(method="lora", targets="x"), ValueError, "no selection from 'qkv'"),
    (dict(method="linear", num_tokens=3), TypeError, "unknown key 'num_tokens'"),
    (dict(method="linear", num_classes=0), ValueError, "num_classes = 0"),
    (dict(method="linear", normalize="in1k"), KeyError, "unknown normalisation 'in1k'"),
    (dict(method="linear", head_init="xavier"), KeyError, "unknown classifier initialisation"),
]


@pytest.mark.parametrize("arguments,error,message", BAD)
def test_bad_settings(arguments, error, message, vit):
    with pytest.raises(error, match=message): tune(vit, **{"num_classes": 3, **arguments})


def test_bad_images(vit, images):
    model = tune(vit, "vpt_deep", 3)
    with pytest.raises(ValueError, match=r"images are \(16, 16\) pixels, this backbone wants \(32, 32\)"): model(images[..., :16, :16])
    with pytest.raises(ValueError, match=r"are not \(B, 3, H, W\)"): model(images[0])
    assert isinstance(model, TunedModel)
