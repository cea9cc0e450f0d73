"Saved models: both files or none, on the network they were trained on and no other."
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import hierprompt as hp
from hierprompt.clip.model import CLIP
from hierprompt.core import atomic_path, digest, foreign_content, to_dict
from hierprompt.data.preprocess import PREPROCESS
from hierprompt.engine import saved
from hierprompt.engine.identity import network_identity

OURS = (KeyError, TypeError, ValueError, FileNotFoundError)


def network(**changes):
    options = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model("vit_tiny_patch16_224", **{**options, **changes}).eval()


@pytest.fixture
def mine(vit, tmp_path):
    "A saved model's folder."
    hp.tune(vit, "vpt_deep", num_classes=3, num_tokens=2).save_pretrained(tmp_path/"mine")
    return tmp_path/"mine"


def config(folder): return json.loads((folder/"config.json").read_text())


def write(folder, values, **changes):
    "A `config.json` whose digest is right."
    content = {**{k: v for k, v in values.items() if k != "digest"}, **changes}
    (folder/"config.json").write_text(json.dumps({**content, "digest": digest(content)}))


# The network

SAME_WEIGHTS = {   # changes that leave every tensor as it was -> what the message names
    "activation": (dict(act_layer="quick_gelu"), {}, r"blocks.\*.mlp.act was GELU, is QuickGELU"),
    "kind of GELU": (dict(act_layer="gelu_tanh"), {}, "mlp.act"),
    "heads": (dict(num_heads=2), {}, "blocks.*attn.*num_heads was 4, is 2"),
    "pooling": (dict(global_pool="avg", fc_norm=False), {}, "global_pool was token, is avg"),
    "largest instead of mean": (dict(global_pool="max", fc_norm=False), dict(global_pool="avg", fc_norm=False), "global_pool was avg"),
    "mean over class token too": (dict(pool_include_prefix=True), {}, "pool_include_prefix"),
    "eps": (dict(norm_layer=torch.nn.LayerNorm), {}, r"norm1.eps was 1e-06, is 1e-05"),
    "dynamic image size": (dict(dynamic_img_size=True), {}, "image size"),
    "mean": (dict(pretrained_cfg_overlay=dict(mean=(0.1, 0.2, 0.3))), {}, r"mean was .*, is \[0.1, 0.2, 0.3\]"),
    "std": (dict(pretrained_cfg_overlay=dict(std=(0.1, 0.2, 0.3))), {}, r"std was"),
    "one block": ("one block", {}, r"blocks.\*.mlp.act was GELU, is \['GELU', 'ReLU', 'GELU'\]"),
    "stride": ("stride", {}, "patch_embed.proj.stride"),
}
OTHER_WEIGHTS = {
    "norm of queries and keys": (dict(qk_norm=True), {}, "q_norm was absent, is LayerNorm"),
    "layer scale": (dict(init_values=0.1), {}, "ls1 was absent, is LayerScale"),
    "norm before the blocks": (dict(pre_norm=True), {}, "norm_pre was absent, is LayerNorm"),
    "norm behind the pooling": (dict(global_pool="avg", fc_norm=True), dict(global_pool="avg", fc_norm=False), "fc_norm was absent"),
    "registers": (dict(reg_tokens=2), {}, "num_reg_tokens was 0, is 2"),
    "class token": (dict(class_token=False, global_pool="avg", fc_norm=False), dict(global_pool="avg", fc_norm=False), "has_class_token"),
    "positions of the class token": (dict(no_embed_class=True), {}, "no_embed_class was False, is True"),
    "patches": (dict(patch_size=16), {}, r"patch_size was \[8, 8\], is \[16, 16\]"),
    "depth": (dict(depth=2), {}, "depth was 3, is 2"),
    "width": (dict(embed_dim=48), {}, "embed_dim was 32, is 48"),
    "a single weight": ("weight", {}, r"the weights had the hash \w+..., has \w+"),
    "a single position": ("position", {}, "the position table had the hash"),
    "precision": ("double", {}, "dtype was float32, is float64"),
}


def changed(change, base):
    if isinstance(change, dict): return network(**{**base, **change})
    vit = network(**base)
    with torch.no_grad():
        if change == "weight": vit.blocks[1].mlp.fc2.bias[3] += 1e-6
        if change == "position": vit.pos_embed[0, 2, 1] += 1e-6
    if change == "one block": vit.blocks[1].mlp.act = torch.nn.ReLU()
    if change == "stride": vit.patch_embed.proj.stride = (4, 4)
    return vit.double() if change == "double" else vit


@pytest.mark.parametrize("change, base, message", [*SAME_WEIGHTS.values(), *OTHER_WEIGHTS.values()], ids=[*SAME_WEIGHTS, *OTHER_WEIGHTS])
def test_another_network_is_refused_and_the_difference_named(change, base, message, tmp_path):
    hp.tune(network(**base), "vpt_deep", num_classes=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message): hp.load_tuned(tmp_path, changed(change, base))


def test_what_acts_in_no_frozen_network_is_no_difference(tmp_path, images):
    model = hp.tune(network(), "vpt_deep", num_classes=3)
    model.save_pretrained(tmp_path)
    for changes in (dict(drop_path_rate=0.2), dict(drop_rate=0.1, attn_drop_rate=0.1, proj_drop_rate=0.1, pos_drop_rate=0.1),
                    dict(patch_drop_rate=0.3), dict(num_classes=9)):
        again = network(**changes)
        again.load_state_dict(network().state_dict(), strict=False)
        assert torch.equal(hp.load_tuned(tmp_path, again)(images), model(images))
    again = network()
    again.set_grad_checkpointing(True)
    for block in again.blocks: block.attn.fused_attn = not block.attn.fused_attn
    assert torch.equal(hp.load_tuned(tmp_path, again.train())(images), model(images))


def test_a_setting_that_another_version_of_a_library_adds_is_no_difference():
    old, new = network(), network()
    new.blocks[0].attn.new_in_next_version = new.blocks[1].attn.new_in_next_version = 1
    identity = [network_identity(vit, (32, 32), {}) for vit in (old, new)]
    assert not identity[0].differences(identity[1]) and not identity[1].differences(identity[0])


@pytest.mark.parametrize("method", ["vpt_deep", "full", "bias", "linear"])
def test_another_image_size_is_called_that(method, vit, tmp_path):
    hp.tune(vit, method, num_classes=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="size 32 x 32, this one is for the image size 64 x 64 and has the same weights otherwise: .*=32"):
        hp.load_tuned(tmp_path, hp.load_backbone("tiny_random", image_size=64))
    with pytest.raises(ValueError, match="image size 32 x 32, this one is for the image size 48 x 48"):
        hp.load_tuned(tmp_path, hp.load_backbone("tiny_random", image_size=48, pretrained=False))


def test_full_tuning_asks_for_the_architecture_and_bias_for_what_it_left(tmp_path):
    for method in ("full", "bias"): hp.tune(network(), method, num_classes=3).save_pretrained(tmp_path/method)
    other = changed("weight", {})                                  # a bias
    for method in ("full", "bias"): hp.load_tuned(tmp_path/method, other)
    with torch.no_grad(): other.blocks[0].norm1.weight[0] += 1
    hp.load_tuned(tmp_path/"full", other)
    with pytest.raises(ValueError, match="weights had the hash"): hp.load_tuned(tmp_path/"bias", other)
    with pytest.raises(ValueError, match="QuickGELU"): hp.load_tuned(tmp_path/"full", network(act_layer="quick_gelu"))


def test_mean_of_the_backbone_does_not_matter_where_another_one_is_used(tmp_path):
    hp.tune(network(), "linear", num_classes=3, normalize="inception").save_pretrained(tmp_path)
    hp.load_tuned(tmp_path, network(pretrained_cfg_overlay=dict(mean=(0.1, 0.2, 0.3))))


def maple(names): return hp.tune_clip(hp.load_clip("tiny_clip"), "maple", names, depth=2)


def clip_with(change):
    clip = hp.load_clip("tiny_clip")
    towers = [block.mlp for tower in (clip.model.visual, clip.model) for block in tower.transformer.resblocks]
    if change == "activation":
        for mlp in towers: mlp.gelu = torch.nn.GELU()
    if change == "text activation": towers[-1].gelu = torch.nn.GELU()
    with torch.no_grad():
        if change == "scale": clip.model.logit_scale += 0.1
        if change == "weight": clip.model.ln_final.bias[0] += 1e-6
    if change == "bias": clip.model.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    if change == "mean": clip.model.visual.preprocess_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    if change == "heads": clip.model.visual.transformer.resblocks[0].attn.num_heads = 2
    if change == "context": clip.tokenizer.context_length = 12
    if change == "vocabulary": clip.tokenizer.tokens = clip.tokenizer.tokens[:-1]
    return CLIP(clip.model, clip.tokenizer)


@pytest.mark.parametrize("change, message", {
    "activation": r"visual.*mlp.gelu was QuickGELU, is GELU", "text activation": r"gelu was QuickGELU, is \[.*'GELU'\]",
    "scale": "logit_scale was .*, is", "bias": "logit_bias was None, is -10.0", "weight": "the weights had the hash", "mean": "mean was",
    "heads": "num_heads was 4, is", "context": "tokenizer.context_length was 16, is 12", "vocabulary": "tokenizer.vocabulary",
}.items())
def test_another_clip_is_refused_and_the_difference_named(change, message, tmp_path):
    maple(["cat", "dog"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message): hp.load_tuned(tmp_path, clip_with(change))
    assert hp.load_tuned(tmp_path, clip_with(None)).class_names == ["cat", "dog"]


def test_a_clip_where_a_vit_is_wanted_and_the_other_way_round(mine, vit, tmp_path):
    maple(["cat", "dog"]).save_pretrained(tmp_path/"clip")
    with pytest.raises(TypeError, match="wants a CLIP, not a VisionTransformer"): hp.load_tuned(tmp_path/"clip", vit)
    with pytest.raises(TypeError, match="CLIP"): hp.load_tuned(mine, hp.load_clip("tiny_clip"))


# The tensors

def spoiled(tensors, kind):
    first, bias = tensors["head.weight"], tensors["head.bias"]
    return {
        "one row": {**tensors, "head.weight": first[:1].clone()}, "one bias": {**tensors, "head.bias": bias[:1].clone()},
        "more rows": {**tensors, "head.weight": torch.cat([first, first])}, "no dimension": {**tensors, "head.bias": bias[0].clone()},
        "half": {name: t.half() for name, t in tensors.items()}, "integers": {**tensors, "head.bias": bias.long()},
        "missing": {name: t for name, t in tensors.items() if name != "head.bias"}, "too many": {**tensors, "more": bias.clone()},
        "renamed": {name.replace("head", "heads"): t for name, t in tensors.items()}, "none": {},
        "another model": {name: t + 1e-3 for name, t in tensors.items()}, "one bit": {**tensors, "head.bias": bias.nextafter(bias + 1)},
        "exchanged": {**tensors, "head.weight": first.flip(0).contiguous()}, "NaN": {**tensors, "head.bias": bias * torch.nan},
    }[kind]


@pytest.mark.parametrize("kind", ["one row", "one bias", "more rows", "no dimension", "half", "integers", "missing", "too many", "renamed",
                                  "none", "another model", "one bit", "exchanged", "NaN"])
def test_other_tensors_are_refused(kind, mine, vit):
    save_file(spoiled(load_file(mine/"tuned.safetensors"), kind), mine/"tuned.safetensors")
    with pytest.raises(ValueError, match="tuned.safetensors does not hold the .* that config.json was saved with"): hp.load_tuned(mine, vit)


@pytest.mark.parametrize("content, message", [
    (b"", "it is empty"), (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"), (b"<!DOCTYPE html><p>", "a web page"),
    (None, "there is no such file"), (b"\0" * 100, "missing or damaged"), (b'\x10\0\0\0\0\0\0\0{"a": {"dtype":1}', "missing or damaged"),
])
def test_a_file_of_tensors_that_is_none(content, message, mine, vit):
    (mine/"tuned.safetensors").unlink()
    if content is not None: (mine/"tuned.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message): hp.load_tuned(mine, vit)


def test_tensors_of_one_method_under_the_name_of_another(vit, tmp_path):
    hp.tune(vit, "vpt_shallow", num_classes=3).save_pretrained(tmp_path)
    write(tmp_path, config(tmp_path), method="vpt_deep")
    with pytest.raises(ValueError, match="does not fit its method: tuner.prompts is"): hp.load_tuned(tmp_path, vit)


# config.json

@pytest.mark.parametrize("change, message", [
    (dict(format=3), "reads up to 2: update hierprompt"), (dict(format="2"), "no format"), (dict(format=None), "no format"),
    (dict(format=True), "no format"), (dict(format=0), "no format"), (dict(method="vpt_dep"), "Did you mean 'vpt_deep'.*register_methods"),
    (dict(method=3), "method = 3"), (dict(config=[]), "config"), (dict(config={"num_tokens": 3}), "does not fit its method"),
    (dict(config={"tokens": 3}), "unknown key 'tokens'"), (dict(arguments={}), "the network cannot be compared .*normalize"),
    (dict(backbone={}), "lacks image_size"), (dict(backbone=None), "backbone"), (dict(extra=1), "unknown key 'extra'"),
    (dict(tensors={}), "does not hold the tensors"), (dict(tensors_sha256="0" * 64), "does not hold the values"),
])
def test_a_config_that_says_something_else(change, message, mine, vit):
    write(mine, config(mine), **change)
    with pytest.raises(OURS, match=message) as caught: hp.load_tuned(mine, vit)
    assert "mine" in str(caught.value)


def test_every_key_is_needed_and_every_change_noticed(mine, vit):
    content = config(mine)
    for key in content:
        (mine/"config.json").write_text(json.dumps({k: v for k, v in content.items() if k != key}))
        with pytest.raises(ValueError, match="mine.*save the model again"): hp.load_tuned(mine, vit)
    (mine/"config.json").write_text(json.dumps({**content, "class_names": ["a", "b", "c"]}))
    with pytest.raises(ValueError, match="not as it was written.*model.remember"): hp.load_tuned(mine, vit)
    (mine/"config.json").write_text(json.dumps(content))                       # laid out otherwise: the same
    hp.load_tuned(mine, vit)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"format": NaN}',
                                     b'{"format": 1}', b'{"format": 2}', b"1" * 5000,
                                     b'{"format": 1, "method": "vpt_deep", "config": {}, "backbone": {}}'])
def test_a_config_that_is_none(content, mine, vit):
    (mine/"config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json"): hp.load_tuned(mine, vit)


def test_damaged_bytes_end_in_an_error_of_ours(mine, vit):
    whole, generator = (mine/"config.json").read_bytes(), random.Random(0)
    content, refused = json.loads(whole), 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(generator.randint(1, 3)):
            place = generator.randrange(len(damaged))
            match generator.randrange(4):
                case 0: damaged[place] = generator.randrange(256)
                case 1: del damaged[place:place + generator.randint(1, 40)]
                case 2: damaged[place:place] = generator.choice([b"0", b'"', b"{}", b"null", b"1e999", b"-1", b",", b"\\ud800"])
                case _: del damaged[place:]
            if not damaged: break
        (mine/"config.json").write_bytes(damaged)
        try: hp.load_tuned(mine, vit)
        except OURS as error:
            refused += 1
            assert "mine" in str(error)
        else: assert json.loads(damaged) == content
    assert refused > 130


def test_no_folder(mine, vit, tmp_path):
    for folder, kind in {tmp_path/"nothing": FileNotFoundError, tmp_path: FileNotFoundError, mine/"config.json": ValueError, "": ValueError,
                         None: TypeError, 3: TypeError}.items():
        with pytest.raises(kind): hp.load_tuned(folder, vit)
    assert hp.load_tuned(str(mine), vit).method == "vpt_deep"


# Format 1

def as_format_1(model, folder):
    "What earlier versions wrote."
    content = config(folder)
    known = {"format": 1, "method": content["method"], "config": content["config"], **content["arguments"]}
    (folder/"config.json").write_text(json.dumps({**known, "backbone": {"sha256": model.backbone_sha256()}}))


@pytest.mark.parametrize("method", ["vpt_deep", "full", "bias", "lora"])
def test_format_1_opens_with_a_warning(method, vit, images, tmp_path):
    model = hp.tune(vit, method, num_classes=3, seed=4)
    model.save_pretrained(tmp_path)
    as_format_1(model, tmp_path)
    with pytest.warns(UserWarning, match="compared by its weights alone") as caught: again = hp.load_tuned(tmp_path, vit)
    assert torch.equal(again(images), model(images)) and caught[0].filename == __file__
    if method != "full":
        other = hp.load_backbone("tiny_random", pretrained=False)
        with pytest.raises(ValueError, match="load the backbone it was trained on"): hp.load_tuned(tmp_path, other)
    tensors = load_file(tmp_path/"tuned.safetensors")
    save_file({**tensors, "head.bias": tensors["head.bias"][:1].clone()}, tmp_path/"tuned.safetensors")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"head.bias is float32 \(1,\), has to be float32 \(3,\)"):
        hp.load_tuned(tmp_path, vit)


def test_format_1_of_a_clip(tmp_path, images):
    model = maple(["cat", "dog"])
    model.save_pretrained(tmp_path)
    as_format_1(model, tmp_path)
    with pytest.warns(UserWarning, match="format 1"): again = hp.load_tuned(tmp_path, hp.load_clip("tiny_clip"))
    assert torch.equal(again(images), model(images)) and again.class_names == ["cat", "dog"]


# Writing

class Crash(BaseException): pass


@pytest.mark.parametrize("step", range(8))
def test_a_crash_leaves_the_old_model_or_the_new_one(step, vit, images, tmp_path, monkeypatch):
    old, new = (hp.tune(vit, "vpt_deep", num_classes=3, seed=seed) for seed in (0, 1))
    old.save_pretrained(tmp_path)
    (tmp_path/"notes.txt").write_text("mine")
    calls = iter(range(100))
    def crashing(call):
        def run(*args, **options):
            if next(calls) == step: raise Crash
            return call(*args, **options)
        return run
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crashing(os.replace))
        patch.setattr(saved, "save_file", crashing(saved.save_file))
        patch.setattr(Path, "write_text", crashing(Path.write_text))
        patch.setattr(Path, "unlink", crashing(Path.unlink))
        try: new.save_pretrained(tmp_path)
        except Crash: pass
    found = hp.load_tuned(tmp_path, vit)(images)
    assert torch.equal(found, old(images)) or torch.equal(found, new(images))
    new.save_pretrained(tmp_path)                                   # and the next saving mends all
    assert torch.equal(hp.load_tuned(tmp_path, vit)(images), new(images)) and (tmp_path/"notes.txt").read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} == {"config.json", "notes.txt", "tuned.safetensors"}


def test_a_model_that_cannot_be_saved_leaves_what_was_there(vit, images, tmp_path):
    old, broken = (hp.tune(vit, "vpt_deep", num_classes=3, seed=seed) for seed in (0, 1))
    old.save_pretrained(tmp_path)
    for names in (["a", "b"], "abc", [1, 2, 3]):
        with pytest.raises((TypeError, ValueError), match="class_names"): broken.save_pretrained(tmp_path, class_names=names)
    half = hp.tune(network(), "linear", num_classes=3).half()
    with pytest.raises(TypeError, match="moved to torch.float16"): half.save_pretrained(tmp_path)
    assert torch.equal(hp.load_tuned(tmp_path, vit)(images), old(images))


def test_where_nothing_can_be_written(vit, tmp_path, monkeypatch):
    model, file = hp.tune(vit, "linear", num_classes=3), tmp_path/"file"
    file.write_text("x")
    with pytest.raises(ValueError, match="is a file: a saved model is a folder"): model.save_pretrained(file)
    with pytest.raises(OSError, match="cannot be saved to .*file/inside"): model.save_pretrained(file/"inside")
    with pytest.raises(TypeError, match="None is no path"): model.save_pretrained(None)
    with monkeypatch.context() as patch:
        def refuse(*_, **__): raise PermissionError(13, "Permission denied")
        patch.setattr(Path, "touch", refuse)
        with pytest.raises(OSError, match="cannot be saved to .*new: .*Permission denied"): model.save_pretrained(tmp_path/"new")
    assert file.read_text() == "x"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_are_readable_as_the_umask_says(umask, vit, tmp_path):
    before = os.umask(umask)
    try:
        hp.tune(vit, "linear", num_classes=3).save_pretrained(tmp_path/"m")
        with atomic_path(tmp_path/"m"/"plain.txt") as path: path.write_text("x")
        with atomic_path(tmp_path/"m"/"tensors") as path: save_file({"x": torch.zeros(1)}, path)
    finally: os.umask(before)
    assert {p.name: p.stat().st_mode & 0o777 for p in (tmp_path/"m").iterdir()} == dict.fromkeys(
        ["tuned.safetensors", "config.json", "plain.txt", "tensors"], 0o666 & ~umask)


def test_a_body_that_writes_nothing_replaces_nothing(tmp_path):
    (tmp_path/"x").write_text("old")
    with pytest.raises(FileNotFoundError):
        with atomic_path(tmp_path/"x"): pass
    assert (tmp_path/"x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content, said", [(b"", "empty"), (b" \n", "empty"), (b"\xef\xbb\xbf<html>", "web page"), (b"<?xml", "web page"),
                                           (b"version https://git-lfs", "git lfs pull"), (b"PK\3\4", None), (b"{}", None)])
def test_foreign_content(content, said, tmp_path):
    (tmp_path/"x").write_bytes(content)
    found = foreign_content(tmp_path/"x")
    assert found is None if said is None else said in found


# What new pictures need

def toy(preprocess=PREPROCESS["paper"]):
    "A task of four classes, stored at 32 px."
    split = hp.Split(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4))
    return hp.Task("toy", "folder", ["oak", "elm", "ash", "fir"], split, split, split, {"preprocess": to_dict(preprocess)})


def test_names_and_preprocessing_travel(vit, tmp_path):
    task = toy()
    model = hp.tune(vit, "linear", num_classes=task.num_classes)
    model.save_pretrained(tmp_path/"plain")
    assert [config(tmp_path/"plain")[key] for key in ("class_names", "preprocess", "stored_size")] == [None] * 3
    model.save_pretrained(tmp_path/"task", task)
    again = hp.load_tuned(tmp_path/"task", vit)
    assert (again.class_names, again.preprocess, again.stored_size) == (task.class_names, task.source["preprocess"], 32)
    drawn = hp.Task("toy", "structured", ["a", "b", "c", "d"], task.train, task.val, task.test, {"preprocess": "Preprocess(...)"})
    model = hp.tune(vit, "linear", num_classes=4)
    model.remember(drawn)                                           # draws its images, has no files
    assert (model.class_names, model.preprocess, model.stored_size) == (["a", "b", "c", "d"], None, None)
    again.save_pretrained(tmp_path/"again")                         # and further
    assert config(tmp_path/"again") == config(tmp_path/"task")
    names = np.array([f"n{i}" for i in range(task.num_classes)])
    again.save_pretrained(tmp_path/"again", class_names=names, preprocess=PREPROCESS["vpt_fgvc"])
    third = hp.load_tuned(tmp_path/"again", vit)
    assert third.class_names == names.tolist() and third.preprocess["short_side"] == 256 and third.stored_size is None


def test_what_cannot_be_remembered(vit):
    model, clip = hp.tune(vit, "linear", num_classes=2), maple(["cat", "dog"])
    task = toy()
    with pytest.raises(ValueError, match="class_names has 4 names"): model.remember(task)
    with pytest.raises(TypeError, match="not both"): model.remember(task, class_names=["a", "b"])
    for wrong in ("paper", hp.recipe("vpt"), {"resize": "squash"}, type(PREPROCESS["paper"])):
        with pytest.raises(TypeError, match=r"get_preprocess\(name\)"): model.remember(preprocess=wrong)
    for wrong in ("toy", ["a", "b"], model):
        with pytest.raises(TypeError, match="no Task as load_task returns it"): model.remember(wrong)
    with pytest.raises(ValueError, match="the names that it was tuned with"): clip.remember(class_names=["dog", "cat"])
    assert (model.class_names, model.preprocess, clip.class_names) == (None, None, ["cat", "dog"])
    model.class_names = ["a"]
    with pytest.raises(ValueError, match="class_names has 1 names"): model.save_pretrained("nowhere")
    assert not Path("nowhere").exists()
