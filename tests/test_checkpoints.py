"Checkpoints from outside: whatever they are is said, and nothing in them is executed."
import argparse
import json
import zipfile
from pathlib import Path, PosixPath

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import hierprompt as hp
from hierprompt.backbones.pretrained import find_weights, read_checkpoint
from hierprompt.data.tasks import Split
from hierprompt.training.loop import Trainer, make_resident


@pytest.fixture
def state(vit): return {name: t.clone() for name, t in vit.state_dict().items()}


def load(file): return hp.load_backbone("tiny_random", file=file).state_dict()


def same(found, state): return found.keys() == state.keys() and all(torch.equal(t, state[name]) for name, t in found.items())


class Settings: lr = 0.1


@pytest.mark.parametrize("extra, kind", [
    (argparse.Namespace(lr=0.1), "argparse.Namespace"), (PosixPath("x"), "pathlib"), (Settings(), "Settings"),
    (np.random.RandomState, "RandomState"), (print, "print"),
])
@pytest.mark.parametrize("legacy", [False, True])
def test_objects_beside_the_tensors_are_named_and_not_read(extra, kind, legacy, state, tmp_path):
    torch.save({"model": state, "epoch": 3, "args": extra}, tmp_path/"x.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=f"x.pth cannot be read as weights .it holds a Python object, .*{kind}.*torch.save.model.state_"):
        load(tmp_path/"x.pth")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_whole_model_is_named(vit, tmp_path):
    torch.save(vit, tmp_path/"x.pth")
    with pytest.raises(ValueError, match="a Python object, timm.*VisionTransformer"): load(tmp_path/"x.pth")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path/"x.pt")
    with pytest.raises(ValueError, match="x.pt cannot be read as weights .*TorchScript"): load(tmp_path/"x.pt")


def archive(path, name):
    with zipfile.ZipFile(path, "w") as file: file.writestr(name, "x")


@pytest.mark.parametrize("write, said", [
    (lambda p: p.write_bytes(b""), "it is empty"),
    (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"), "git lfs pull"),
    (lambda p: p.write_text("\n<!DOCTYPE html>\n<html>sign in</html>"), "a web page"),
    (lambda p: archive(p, "weights/model.pth"), r"a zip archive of 1 \(weights/model.pth\): unpack it"),
    (lambda p: np.savez(p.open("wb"), x=np.zeros(3)), "suffix .npz"),
    (lambda p: p.write_bytes(b"\x1f\x8b" + bytes(50)), "cannot be read as weights"),
    (lambda p: p.write_text("hello"), "cannot be read as weights"),
    (lambda p: p.write_bytes(b"\x05\0\0\0\0\0\0\0{\"a\":"), "cannot be read as weights"),
])
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
def test_files_that_are_no_checkpoints(write, said, suffix, tmp_path):
    file = tmp_path/f"x{suffix}"
    write(file)
    with pytest.raises(ValueError, match=said) as caught: load(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"<html>", b"version https://git-lfs"])
def test_an_npz_that_is_none(content, tmp_path):
    (tmp_path/"x.npz").write_bytes(content)
    with pytest.raises(ValueError, match="x.npz cannot be read as weights"): load(tmp_path/"x.npz")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".safetensors", ""])
def test_the_content_counts_and_not_the_suffix(suffix, state, tmp_path):
    save_file(state, tmp_path/f"a{suffix}")
    torch.save(state, tmp_path/f"b{suffix}")
    torch.save(state, tmp_path/f"c{suffix}", _use_new_zipfile_serialization=False)
    for name in "abc": assert same(load(tmp_path/f"{name}{suffix}"), state)
    assert read_checkpoint(str(tmp_path/f"a{suffix}")).keys() == state.keys()


def named(prefix, state): return {f"{prefix}{name}": t for name, t in state.items()}


@pytest.mark.parametrize("content", [
    lambda s: {"model": s}, lambda s: {"state_dict": s}, lambda s: {"model_state_dict": s, "optimizer_state_dict": {}},
    lambda s: {"teacher": s},
    lambda s: {"model": {"state_dict": s}, "epoch": 3}, lambda s: {"model": "vit", "state_dict": s}, lambda s: named("module.", s),
    lambda s: {"state_dict": named("model.", s)}, lambda s: {"model": named("_orig_mod.module.", s)},
    lambda s: {"teacher": named("module.backbone.", s) | {"module.head.mlp.0.weight": torch.ones(2)}, "student": s},
    lambda s: {"encoder": named("module.", s), "opt": 3}, lambda s: {"backbone.head.weight": torch.ones(3), **named("backbone.", s)},
])
def test_where_training_codes_put_the_weights(content, state, tmp_path):
    torch.save(content(state), tmp_path/"x.pth")
    assert same(load(tmp_path/"x.pth"), state)


@pytest.mark.parametrize("content, message", [
    (lambda s: {"net": s, "epoch": 3}, "no tensors where they are looked for.*its entries are epoch, net"), (lambda s: {}, "no tensors"),
    (lambda s: {"model": {}}, "no tensors"), (lambda s: {"state_dict": {"epoch": 3}}, "no tensors"),
    (lambda s: {3: torch.ones(2)}, "no tensors"),
    (lambda s: {"model": {**s, "epoch": 3}}, r"more than tensors among its weights: 1 \(epoch\)"),
    (lambda s: {**s, "optimizer": {"lr": 1}}, r"more than tensors.*1 \(optimizer\)"),
    (lambda s: {**s, **named("module.", s)}, "several networks.*module.blocks"),
    (lambda s: named("net.", s), "missing, .* unexpected"),
])
def test_what_is_there_is_said(content, message, state, tmp_path):
    torch.save(content(state), tmp_path/"x.pth")
    with pytest.raises(ValueError, match=f"x.pth .*{message}"): load(tmp_path/"x.pth")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("save", [save_file, torch.save])
def test_values_that_are_not_finite_are_refused_by_name(value, save, state, tmp_path):
    state["blocks.2.mlp.fc1.bias"][7] = value
    save(state, tmp_path/"x.pth")
    with pytest.raises(ValueError, match=r"not finite, in 1 \(blocks.2.mlp.fc1.bias\)"): load(tmp_path/"x.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_another_precision_become_the_architecture_s(dtype, state, tmp_path):
    torch.save({name: t.to(dtype) for name, t in state.items()}, tmp_path/"x.pth")
    assert same(load(tmp_path/"x.pth"), {name: t.to(dtype).float() for name, t in state.items()})


@pytest.mark.parametrize("convert", [torch.Tensor.int, torch.Tensor.bool, lambda t: t.to(torch.complex64), torch.Tensor.char])
def test_tensors_that_are_no_floats_are_refused(convert, state, tmp_path):
    torch.save({**state, "norm.weight": convert(state["norm.weight"])}, tmp_path/"x.pth")
    with pytest.raises(ValueError, match=r"1 \(norm.weight\) that are no floats"): load(tmp_path/"x.pth")
    state["norm.bias"] = torch.full_like(state["norm.bias"], 1e300, dtype=torch.float64)
    torch.save(state, tmp_path/"x.pth")
    with pytest.raises(ValueError, match=r"not finite, in 1 \(norm.bias\)"): load(tmp_path/"x.pth")


def test_weights_of_one_entry_only(state): assert find_weights({"model": state, "teacher": {}}, Path("x")) == state


# Checkpoints of our own training

def trainer(vit, images):
    model, recipe = hp.tune(vit, "linear", num_classes=3), hp.recipe("vpt", epochs=2, warmup_epochs=0)
    return Trainer(model, make_resident(model, Split(images, torch.arange(6) % 3), recipe, True), recipe, 0)


@pytest.mark.parametrize("content, said", [
    (b"", "it is empty"), (b"version https://git-lfs", "git lfs pull"), (b"{}", "no complete checkpoint"),
    ("metadata", "no complete checkpoint"), ("json", "no complete checkpoint"), (None, "does not exist"),
])
def test_a_checkpoint_of_ours_that_is_none(content, said, vit, images, tmp_path):
    run, file = trainer(vit, images), tmp_path/"run.safetensors"
    if content == "metadata": save_file({"x": torch.ones(1)}, file)
    elif content == "json": save_file({"x": torch.ones(1)}, file, {"counters": "{", "run": "{"})
    elif content is not None: file.write_bytes(content)
    with pytest.raises(FileNotFoundError if content is None else ValueError, match=f"run.safetensors .*{said}"): run.load_checkpoint(file)


def test_a_checkpoint_of_ours_goes_on(vit, images, tmp_path):
    first, second = trainer(vit, images), trainer(vit, images)
    first.epoch(0)
    first.save_checkpoint(tmp_path/"run.safetensors")
    second.load_checkpoint(tmp_path/"run.safetensors")
    assert second.epochs_done == 1 and first.epoch(1) == second.epoch(1)
    assert json.dumps(first.state()["counters"]) == json.dumps(second.state()["counters"])
