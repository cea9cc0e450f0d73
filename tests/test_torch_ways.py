"""A tuned model used the way PyTorch models are used: nothing is stale, hooks and checkpoints work, it is copied, replicated, exported."""
import copy
import io
import pickle
import warnings

import onnx
import pytest
import timm
import torch
from onnx.reference import ReferenceEvaluator
from timm.layers import DropPath
from torch import nn

import hierprompt as hp

VIT, CLIP, ALL = hp.list_methods("vit"), hp.list_methods("clip"), hp.list_methods()
NAMES = ["cat", "dog", "house"]
_SPT = dict(preset="exact", budget=20_000, batch_size=4)
_SHIP = dict(num_tokens=2, num_shared=2, num_attributes=3, num_prototypes=5, num_matching=3)
SETTINGS = {   # that fit the tiny networks
    "spt_lora": _SPT, "spt_adapter": _SPT, "ship": _SHIP, "da_vpt_ship": _SHIP | dict(num_guided=2),
    "da_vpt": dict(num_tokens=4, num_guided=3),
    "sct": dict(num_channels=8), "gate_vpt": dict(num_tokens=4), "mp": dict(width=64),
    "coop": dict(n_ctx=4), "plot": dict(num_tokens=4, num_sets=2, max_iterations=5), "maple": dict(depth=2), "prograd": dict(n_ctx=4),
    "adapt": dict(num_tokens=4, target=12, warmup_epochs=1, per_event=2),
}
LABELS = torch.arange(6) % 3


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def fresh(method, vit=None, seed=0, **more):
    if method in CLIP: return hp.tune_clip(hp.load_clip("tiny_clip"), method, NAMES, seed=seed, **SETTINGS.get(method, {}))
    return hp.tune(vit or hp.load_backbone("tiny_random"), method, num_classes=3, seed=seed, **SETTINGS.get(method, {}), **more)


def made(method, images, prepare=True, vit=None):
    "A model of any method; the backbone is its own."
    model = fresh(method, vit)
    if prepare: model.prepare(images, LABELS)
    with torch.no_grad():   # what starts at zero would hide what depends on it
        for name, p in sorted(model.trainable().items()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


def frozen_network(model): return model.clip.model if hasattr(model, "clip") else model.host.vit
def blocks_of(model): return frozen_network(model).visual.transformer.resblocks if hasattr(model, "clip") else model.host.vit.blocks


@torch.no_grad()
def logits(model, images): return model(images)


def gradients(model, images, seed=0):
    "Loss and gradients of one training step."
    model.train()
    torch.manual_seed(seed)
    loss = model.loss(images, LABELS)
    weights = list(model.trainable().values())
    return loss.detach(), torch.autograd.grad(loss, weights, materialize_grads=True) if weights else ()


# what is remembered

@pytest.mark.parametrize("method", ALL)
def test_no_change_of_a_weight_is_missed(method, images):
    model = made(method, images)
    for change in ("tuner", "host", "state"):
        before = logits(model, images)
        if change == "tuner":
            for p in model.trainable().values(): p.data.mul_(1.5)
        if change == "host":
            for p in frozen_network(model).parameters(): p.data = p.data * 1.1
        if change == "state":
            network = frozen_network(model)
            network.load_state_dict({n: t * 0.9 if t.is_floating_point() else t for n, t in network.state_dict().items()})
        after = logits(model, images)
        assert change == "tuner" and method in ("linear", "zero_shot") or not torch.equal(before, after)
        assert torch.equal(after, logits(model.train().eval(), images)) and torch.equal(after, logits(copy.deepcopy(model), images))


@pytest.mark.parametrize("method", ALL)
def test_remembered_gives_the_same_bits(method, images):
    model = made(method, images)
    wanted = logits(model, images)
    with model.remembered():
        assert torch.equal(logits(model, images), wanted) and torch.equal(logits(model, images), wanted)
        with torch.inference_mode(): assert torch.equal(model(images), wanted)
        loss, grads = gradients(model, images)          # what inference mode left is of use in training
    assert all(keeper.kept is None for keeper in model.keepers())
    again, fresh = gradients(model, images)
    assert torch.equal(loss, again) and all(map(torch.equal, grads, fresh))


@pytest.mark.parametrize("method", ["vpt_deep", "ship", "coop", "vpt_clip", "adapt"])
def test_training_inside_of_remembered(method, images):
    model = made(method, images)
    with model.remembered():
        logits(model, images)
        model.train()
        with torch.no_grad():
            for p in model.trainable().values(): p.mul_(1.5)
        model.eval()
        with model.remembered(): inner = logits(model, images)     # once more is no other promise
        assert torch.equal(inner, logits(model, images)) and model.keepers()[0].kept is not None
    assert torch.equal(inner, logits(model, images))
    with pytest.raises(KeyboardInterrupt), model.remembered(): raise KeyboardInterrupt
    assert all(keeper.kept is None for keeper in model.keepers())


@pytest.mark.parametrize("method", ["vpt_deep", "vpt_clip"])
def test_copies_have_promised_nothing(method, images):
    model = made(method, images)
    with model.remembered():
        logits(model, images)
        deep, shallow, loaded = copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))
        for copied in (deep, loaded): assert all(keeper.kept is None for keeper in copied.keepers())
    for p in frozen_network(model).parameters(): p.data.mul_(1.1)
    assert torch.equal(logits(shallow, images), logits(model, images))


def test_an_average_of_weights(images):
    "PyTorch's own class for moving averages, swapped in and out of the model."
    model = made("vpt_deep", images)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    first = logits(model, images)
    with torch.no_grad():
        for p in model.trainable().values(): p.add_(1.0)
    average.update_parameters(model), average.update_parameters(model)
    swapped = {name: p.data for name, p in model.trainable().items()}
    for name, p in model.trainable().items(): p.data = average.module.trainable()[name].data
    assert torch.equal(logits(model, images), logits(average, images)) and not torch.equal(logits(model, images), first)
    for name, p in model.trainable().items(): p.data = swapped[name]
    assert torch.equal(logits(model, images), logits(copy.deepcopy(model), images))


def test_functional_call(images):
    model = made("vpt_deep", images)
    weights = {name: p * 1.5 for name, p in model.named_parameters()}
    found = torch.func.functional_call(model, weights, (images,))
    with torch.no_grad():
        for p in model.parameters(): p.mul_(1.5)
    assert torch.equal(found.detach(), logits(model, images))


def test_evaluation_and_training_remember(images):
    model, split = made("vpt_clip", images), hp.Split(images, LABELS)
    encoded, run = [], type(model.text_engine).run
    class Counted(type(model.text_engine)):
        def run(self, blocks, *args):
            if self.host is model.clip.text: encoded.append(len(blocks))
            return run(self, blocks, *args)
    for engine in model._engines: engine.__class__ = Counted
    hp.evaluate(model, split, batch_size=2)
    assert sum(encoded) == model.clip.text.depth               # once for three batches
    encoded.clear()
    hp.fit(model, split, recipe=hp.recipe("vpt", epochs=3, warmup_epochs=0, batch_size=2), progress=False)
    assert sum(encoded) == model.clip.text.depth               # once for nine updates
    encoded.clear()
    for part in images.split(2): logits(model, part)
    assert sum(encoded) == 3 * model.clip.text.depth           # and every time where nothing was promised


@pytest.mark.parametrize("method", ["kgcoop", "prograd", "lamm"])
def test_a_teacher_is_of_the_weights_that_are_there(method, images):
    model, other = made(method, images), hp.load_clip("tiny_clip")
    for p in other.model.parameters(): p.data.mul_(1.1)
    model.clip.model.load_state_dict(other.model.state_dict())
    assert torch.equal(model.tuner.teacher(model), other.encode_text(model.tuner.sentences))


def test_precision_and_device_inside_of_remembered(images):
    model = made("vpt_clip", images)
    with model.remembered(), torch.no_grad():
        single = model(images)
        with torch.autocast("cpu", torch.bfloat16): half = model(images)
        assert torch.equal(model(images), single) and not torch.equal(half, single)


# hooks

@pytest.mark.parametrize("method", ALL)
def test_hooks_change_nothing_by_watching(method, images):
    model = made(method, images)
    for m in model.modules():       # more tokens would draw other masks
        if isinstance(m, nn.Dropout): m.p = 0.0
        if isinstance(m, DropPath): m.drop_prob = 0.0
        if isinstance(m, nn.BatchNorm1d): m.momentum = 0.0      # its statistics move with every training step
    wanted, (loss, grads) = logits(model, images), gradients(model, images)
    model.eval()
    blocks, seen = blocks_of(model), []
    parts = ("", ".mlp") if method in CLIP else ("", ".mlp", ".attn", ".norm1")
    for i in range(len(blocks)):
        for name in (f"{i}{part}" for part in parts):
            blocks.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: seen.append((name, out.shape)))
    torch.testing.assert_close(logits(model, images), wanted, atol=2e-5, rtol=1e-4)
    assert {name for name, _ in seen} == {f"{i}{part}" for i in range(len(blocks)) for part in parts}
    tokens = {shape[1] for name, shape in seen if "." not in name}
    assert min(tokens) >= 17, tokens                          # class token and 16 patches, in the last block too
    watched, changed = gradients(model, images)
    torch.testing.assert_close(watched, loss, atol=1e-4, rtol=1e-4)
    for a, b in zip(changed, grads): torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-3)


def test_hooks_see_and_change_what_timm_s_see_and_change(images):
    vit = hp.load_backbone("tiny_random")
    model, seen = hp.tune(vit, "linear", num_classes=3), []
    x = model.normalise(images)
    def hook(m, args, out): seen.append((args[0].detach(), out.detach())); return 0.5 * out
    for name in ("blocks.1", "blocks.2.attn", "blocks.3.mlp", "blocks.3"): vit.get_submodule(name).register_forward_hook(hook)
    vit.blocks[0].register_forward_pre_hook(lambda m, args: (args[0] * 1.1,))
    vit.blocks[1].mlp.register_forward_pre_hook(lambda m, args, kwargs: ((args[0] + 0.1,), kwargs), with_kwargs=True)
    with torch.no_grad(): ours, number, theirs = model.features(x), len(seen), vit(x)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    for a, b in zip(seen[:number], seen[number:], strict=True):
        for s, t in zip(a, b): torch.testing.assert_close(s, t, atol=1e-5, rtol=1e-4)


def test_every_other_hook_of_a_backbone_is_called(images):
    model, called = made("linear", images), set()
    vit, refused = model.host.vit, ("", "blocks", "head", "head_drop")
    names = [n for n, m in vit.named_modules() if n not in refused and not n.endswith("attn_drop") and "norm_pre" not in n]
    for name in names: vit.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    model(images)
    assert called == set(names)


def test_hooks_that_cannot_be_called_are_refused(images):
    for place in (lambda vit: vit, lambda vit: vit.blocks):
        model = made("linear", images)
        handle = place(model.host.vit).register_forward_hook(lambda *_: None)
        with pytest.raises(TypeError, match="hooks on .* are not called"): model(images)
        handle.remove()
        model(images)
    handle = model.host.vit.blocks[1].attn.attn_drop.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="attention dropout of block 1 are not called"): model(images)
    handle.remove()
    model.host.vit.blocks[1].attn.register_full_backward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="backward pass on a Attention"): model(images)
    model = made("vpt_clip", images)
    model.clip.model.visual.transformer.resblocks[0].attn.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="block 0"): model(images)


# the network is what it is now

def test_exchanged_layers_are_run(images):
    class Doubled(nn.Module):
        def __init__(self, layer): super().__init__(); self.layer = layer
        def forward(self, x): return 2 * self.layer(x)
    vit = hp.load_backbone("tiny_random")
    model = hp.tune(vit, "linear", num_classes=3)
    x = model.normalise(images)
    vit.blocks[0].mlp.fc1 = nn.Linear(64, 256)
    vit.blocks[3].attn.qkv = Doubled(vit.blocks[3].attn.qkv)     # queries, keys and values are asked for apart in the last block
    vit.blocks[2] = copy.deepcopy(vit.blocks[1])
    vit.blocks[1].norm2 = nn.Identity()
    nn.utils.parametrizations.weight_norm(vit.blocks[2].attn.qkv)
    with torch.no_grad(): torch.testing.assert_close(model.features(x), vit(x), atol=1e-5, rtol=1e-4)
    vit.blocks[1] = nn.Identity()
    with pytest.raises(TypeError, match="block 1 is a Identity"): model(images)


@pytest.mark.parametrize("method", ALL)
def test_checkpointing_keeps_less_and_changes_nothing(method, images):
    if method in ("linear", "mp"): return    # nothing before the classifier keeps anything
    kept = {}
    def count(key):
        def pack(t): kept[key] = kept.get(key, 0) + t.numel(); return t
        return torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    model = made(method, images)
    with count("whole"): loss, grads = gradients(model, images)
    model.train()
    if method in CLIP: model.clip.model.set_grad_checkpointing(True)
    else: model.host.vit.set_grad_checkpointing(True)
    with count("again"): same, again = gradients(model, images)
    assert torch.equal(loss, same)
    for a, b in zip(grads, again): assert torch.equal(a, b)
    if method in VIT and method not in ("full", "bias"): assert kept["again"] < 0.7 * kept["whole"], kept


@pytest.mark.parametrize("rate", ["attn_drop_rate", "drop_path_rate", "drop_rate"])
def test_dropout_that_the_engine_does_not_run(rate, images):
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    vit = timm.create_model("vit_tiny_patch16_224", **sizes, num_classes=0, **{rate: 0.1})
    with pytest.raises(ValueError, match=rate): hp.tune(vit, "full", num_classes=3)
    hp.tune(vit, "vpt_deep", num_classes=3)(images)     # a frozen backbone has no dropout


# copies

def replica(model, change):
    "What torch.nn.parallel.replicate does, on one device; the weights of the copy are changed."
    modules, names = list(model.modules()), {id(m): n for n, m in model.named_modules()}
    place, copies = {id(m): i for i, m in enumerate(modules)}, [m._replicate_for_data_parallel() for m in modules]
    for m, c in zip(modules, copies):
        for name, child in m._modules.items():
            if child is None: c._modules[name] = None
            else: setattr(c, name, copies[place[id(child)]])
        for name, p in m._parameters.items():
            if p is None: c._parameters[name] = None
            else: setattr(c, name, change(p.detach().clone()).requires_grad_(p.requires_grad))
        for name, b in m._buffers.items():
            if b is None: c._buffers[name] = None
            else: setattr(c, name, b.clone())
    return copies[0]


@pytest.mark.parametrize("method", ALL)
def test_replicas_run_their_own_weights(method, images):
    model = made(method, images)
    change = lambda p: 1.2 * p if p.ndim > 1 else p
    wanted = copy.deepcopy(model)
    with torch.no_grad():
        for p in wanted.parameters(): p.copy_(change(p))
    found = replica(model, change)
    torch.testing.assert_close(logits(found, images), logits(wanted, images), atol=1e-5, rtol=1e-5)
    if model.trainable(): assert found(images).requires_grad       # a replica has no parameters to ask whether anything trains


@pytest.mark.parametrize("method", ALL)
def test_copies_and_states(method, images):
    model = made(method, images)
    wanted = logits(model, images)
    assert torch.equal(logits(copy.deepcopy(model), images), wanted)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), images), wanted)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = fresh(method, seed=5, **(dict(starts=model.config.starts) if "ship" in method else {}))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(logits(other, images), wanted)


@pytest.mark.parametrize("method", ["vpt_deep", "da_vpt", "coop"])
def test_distributed(method, images, tmp_path):
    model = made(method, images).train()
    loss, grads = gradients(model, images)
    class Loss(nn.Module):
        def __init__(self): super().__init__(); self.model = model
        def forward(self, *args): return self.model.loss(*args)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(Loss(), find_unused_parameters=True)
        torch.manual_seed(0)
        found = wrapped(images, LABELS)
        found.backward()
    finally: torch.distributed.destroy_process_group()
    assert torch.equal(found.detach(), loss)
    for p, grad in zip(model.trainable().values(), grads):
        torch.testing.assert_close(torch.zeros_like(p) if p.grad is None else p.grad, grad)


# export

def _exported(model, images, **shapes): return torch.export.export(model, (images,), **shapes).module()


@pytest.mark.parametrize("method", ["vpt_deep", "ship", "spt_adapter", "cocoop", "maple"])   # seconds each; the next test has them all
def test_export_with_any_number_of_images(method, images):
    model, batch = made(method, images), torch.export.Dim("batch", min=2, max=64)
    wanted = logits(model, images[:5])
    with torch.no_grad(): program = _exported(model, images[:4], dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program(images[:5]), wanted, atol=1e-5, rtol=1e-4)


def test_trace(images):
    model = made("vpt_deep", images)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (images[:4],))
        torch.testing.assert_close(traced(images[:5]), model(images[:5]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ALL)
def test_onnx_with_any_number_of_images(method, images):
    "By the exporter that traces."
    model, file = made(method, images), io.BytesIO()
    names = dict(input_names=["images"], output_names=["logits"], dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images[:4],), file, dynamo=False, opset_version=18, **names)
    found, = ReferenceEvaluator(onnx.load_from_string(file.getvalue())).run(None, {"images": images[:5].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), logits(model, images[:5]), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("method", ["vpt_deep", "coop"])
def test_built_and_run_in_inference_mode(method, images):
    with torch.inference_mode(): model = made(method, images)
    wanted = logits(model, images)
    hp.fit(model, hp.Split(images, LABELS), recipe=hp.recipe("vpt", epochs=1, warmup_epochs=0), progress=False)
    assert not torch.equal(logits(model, images), wanted)


# devices

@pytest.mark.parametrize("method", ALL)
def test_a_step_never_waits_for_the_device(method, images):
    "On the device without numbers a tensor from elsewhere, or a look at a value, fails at once."
    model = made(method, images)
    on = lambda t: t.to("meta")
    model.begin(6, 2)
    model.to("meta")
    assert model.device.type == "meta"
    optimizer = torch.optim.SGD(model.trainable().values(), lr=0.1) if model.trainable() else None
    for step in range(2):
        model.train()
        loss = model.loss(on(images), on(LABELS))
        assert loss.device.type == "meta"
        if optimizer is None: continue
        optimizer.zero_grad()
        loss.backward()
        model.before_step(step)
        optimizer.step()
        model.after_step(step, optimizer)
    model.eval()
    with torch.no_grad(), model.remembered():
        for _ in range(2): assert model(on(images)).shape == (6, 3)


@pytest.mark.parametrize("method", ALL)
def test_a_step_in_bfloat16(method, images):
    model = made(method, images)
    with torch.autocast("cpu", torch.bfloat16): loss, grads = gradients(model, images)
    assert loss.isfinite() and all(g.isfinite().all() for g in grads) and all(g.dtype == torch.float32 for g in grads)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model.eval()
        half = model(images).float()
    torch.testing.assert_close(half, logits(model, images), atol=1.0, rtol=0.3)
