"Checkpoints in the layouts of the official code, made by hand, against the methods written out at full length."
import argparse
import warnings

import clip_slow as slow
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

import hierprompt as hp
from hierprompt.clip.class_prompts import fill
from hierprompt.methods.ship.reference import reference_forward

NAMES, PAIRS = ["cat", "red dog", "lake"], ("weight", "bias")


@pytest.fixture(scope="module")
def clip(): return hp.load_clip("tiny_clip")


@pytest.fixture
def vit():
    torch.manual_seed(1)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, num_classes=0)


def some(*shape, seed=0, std=0.1): return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(): return some(3, 3, 32, 32, seed=5, std=1.0)


def dassl(folder, tensors, **more):
    torch.save({"state_dict": tensors, "epoch": 50, "optimizer": None, "val_result": np.float64(71.5), **more}, folder/"model.pth.tar-50")
    return folder/"model.pth.tar-50"


def buffers(width, prefix=""): return {f"{prefix}token_prefix": some(9, 1, width), f"{prefix}token_suffix": some(9, 60, width)}


def learner(clip, method, n=4):
    "What CoOp and its relatives save."
    d, e = clip.text.dim, clip.embed_dim
    more = {}
    if method == "kgcoop": more = {"bias_vectors": some(1, 512), "meta_net.linear1.weight": some(8, 8), "meta_net.linear1.bias": some(8)}
    if method == "cocoop":
        more = {"meta_net.linear1.weight": some(e // 16, e, seed=1), "meta_net.linear1.bias": some(e // 16, seed=2),
                "meta_net.linear2.weight": some(d, e // 16, seed=3), "meta_net.linear2.bias": some(d, seed=4)}
    return {"ctx": some(n, d), **buffers(d), **more}


def logits_of(clip, image, text): return clip.model.logit_scale.exp() * image @ text.T


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("method", ["coop", "kgcoop", "prograd", "cocoop"])
@torch.no_grad()
def test_learnt_words(clip, method, half, tmp_path):
    "Words behind the start token; CoCoOp's are shifted for each image. The buffers of other classes are not read."
    tensors = learner(clip, method)
    if half: tensors = {name: t.half() for name, t in tensors.items()}
    model = hp.load_official(method, dassl(tmp_path, tensors), clip, NAMES)
    words, ids = tensors["ctx"].float(), clip.tokenizer(fill("a photo of a {}.", NAMES))
    images = slow.image_features(clip.model.visual, pixels())
    if method != "cocoop": expected = logits_of(clip, images, slow.text_features(clip.model, ids, [words]))
    else:
        w = {name: t.float() for name, t in tensors.items()}
        hidden = F.linear(images, w["meta_net.linear1.weight"], w["meta_net.linear1.bias"]).relu()
        shifts = F.linear(hidden, w["meta_net.linear2.weight"], w["meta_net.linear2.bias"])
        rows = [logits_of(clip, x[None], slow.text_features(clip.model, ids, [words + s])) for x, s in zip(images, shifts)]
        expected = torch.cat(rows)
    torch.testing.assert_close(model(pixels()), expected, rtol=1e-4, atol=1e-4)


def test_words_of_each_class(clip, tmp_path):
    ctx = some(3, 5, clip.text.dim)
    model = hp.load_official("coop", dassl(tmp_path, {"ctx": ctx}), clip, NAMES)
    assert torch.equal(model.tuner.text.ctx, ctx) and model.config.class_specific
    with pytest.raises(ValueError, match="tuner.text.ctx is"): hp.load_official("coop", tmp_path/"model.pth.tar-50", clip, NAMES[:2])


def towers(clip):
    "CLIP's own tensors as the official models hold them."
    own = clip.model.state_dict()
    return {f"image_encoder.{n.removeprefix('visual.')}" if n.startswith("visual.") else n if n == "logit_scale" else f"text_encoder.{n}": t
            for n, t in own.items() if n != "token_embedding.weight"}


@torch.no_grad()
def test_maple(clip, tmp_path):
    d, D = clip.text.dim, clip.image.dim
    words = [some(2, d, seed=i) for i in range(2)]
    maps = [(some(D, d, seed=7 + i), some(D, seed=9 + i)) for i in range(2)]
    tensors = {"prompt_learner.ctx": words[0], "prompt_learner.compound_prompts_text.0": words[1], **buffers(d, "prompt_learner."),
               **{f"prompt_learner.proj.{k}": t for k, t in zip(PAIRS, maps[0])},
               **{f"prompt_learner.compound_prompt_projections.0.{k}": t for k, t in zip(PAIRS, maps[1])}, **towers(clip)}
    model = hp.load_official("maple", dassl(tmp_path, tensors), clip, NAMES)
    image = slow.image_features(clip.model.visual, pixels(), [F.linear(w, *m) for w, m in zip(words, maps)])
    text = slow.text_features(clip.model, clip.tokenizer(fill("a photo of a {}.", NAMES)), words)
    torch.testing.assert_close(model(pixels()), logits_of(clip, image, text), rtol=1e-4, atol=1e-4)
    tensors["image_encoder.ln_post.weight"] = tensors["image_encoder.ln_post.weight"] + 1
    with pytest.raises(ValueError, match="image_encoder.ln_post.weight has other values"):
        hp.load_official("maple", dassl(tmp_path, tensors), clip, NAMES)


@torch.no_grad()
def test_vpt_on_clip(clip, tmp_path):
    tokens = [some(3, clip.image.dim, seed=i) for i in range(2)]
    tensors = {"image_encoder.VPT": tokens[0], "image_encoder.transformer.resblocks.1.VPT_shallow": tokens[1], **towers(clip)}
    model = hp.load_official("vpt_clip", dassl(tmp_path, tensors), clip, NAMES)
    text = slow.text_features(clip.model, clip.tokenizer(fill("a photo of a {}.", NAMES)))
    expected = logits_of(clip, slow.image_features(clip.model.visual, pixels(), tokens), text)
    torch.testing.assert_close(model(pixels()), expected, rtol=1e-4, atol=1e-4)


def plain(vit, x, head, own, deep):
    "Logits of VPT, one joined sequence."
    z, p = vit.pos_drop(vit._pos_embed(vit.patch_embed(x))), 0
    for i, block in enumerate(vit.blocks):
        if deep or i == 0: z, p = torch.cat([z[:, :1], own[i].expand(len(x), -1, -1), z[:, 1 + p:]], 1), own.shape[1]
        z = block(z)
    return F.linear(vit.norm(z)[:, 0], *head)


GOOGLE = {"attention_norm": "norm1", "ffn_norm": "norm2", "ffn.fc1": "mlp.fc1", "ffn.fc2": "mlp.fc2", "attn.out": "attn.proj"}


def google(vit):
    "A ViT's tensors as VPT's model holds them."
    own = vit.state_dict()
    found = {"embeddings.cls_token": own["cls_token"], "embeddings.position_embeddings": own["pos_embed"]}
    for k in PAIRS:
        found |= {f"embeddings.patch_embeddings.{k}": own[f"patch_embed.proj.{k}"], f"encoder.encoder_norm.{k}": own[f"norm.{k}"]}
        for i in range(len(vit.blocks)):
            found |= {f"encoder.layer.{i}.{a}.{k}": own[f"blocks.{i}.{b}.{k}"] for a, b in GOOGLE.items()}
            parts = own[f"blocks.{i}.attn.qkv.{k}"].chunk(3)
            found |= {f"encoder.layer.{i}.attn.{a}.{k}": part for a, part in zip(("query", "key", "value"), parts)}
    return {f"enc.transformer.{name}": t for name, t in found.items()}


@pytest.mark.parametrize("method", ["vpt_shallow", "vpt_deep"])
@torch.no_grad()
def test_vpt(vit, method, tmp_path):
    "The whole model with its classifier, and the prompts alone, as arrays."
    deep = method == "vpt_deep"
    own, head = some(4 if deep else 1, 3, 24), (some(5, 24, seed=1), some(5, seed=2))
    tensors = {"enc.transformer.prompt_embeddings": own[:1], **{f"head.last_layer.{k}": t for k, t in zip(PAIRS, head)}, **google(vit)}
    if deep: tensors["enc.transformer.deep_prompt_embeddings"] = own[1:]
    torch.save({"model": tensors, "iteration": 9}, tmp_path/"last_model.pth")
    model = hp.load_official(method, tmp_path/"last_model.pth", vit, normalize="imagenet")
    torch.testing.assert_close(model(pixels()), plain(vit, pixels(), head, own, deep), rtol=1e-4, atol=1e-5)
    short = {"shallow_prompt": own[:1].numpy()} | ({"deep_prompt": own[1:].numpy()} if deep else {})
    torch.save(short, tmp_path/"prompt_ep100.pth")
    with pytest.warns(UserWarning, match="classifier"):
        model = hp.load_official(method, tmp_path/"prompt_ep100.pth", vit, 5, normalize="imagenet")
    assert torch.equal(model.tuner.prompts, own)


def split(vit):
    "A ViT's tensors with queries, keys and values apart."
    found = {}
    for name, t in vit.state_dict().items():
        found |= {name.replace("qkv", p): c.clone() for p, c in zip("qkv", t.chunk(3))} if ".qkv." in name else {name: t.clone()}
    return found


def ship_file(folder, vit, **more):
    tensors = {**{f"compound_prompts_visual.{j}": some(1, 3, 24, seed=j) for j in range(3)}, "semantic_share_prompt": some(10, 24, seed=5),
               "attribute_prompt": some(2, 10, 24, seed=6), "visual_prompt_token_pos_embed": some(1, 3, 24), **split(vit),
               "head.weight": some(5, 24, seed=7), "head.bias": some(5, seed=8)}
    torch.save({"model": tensors, "optimizer": {"state": {}}, "epoch": 99, **more}, folder/"checkpoint.pth")
    np.save(folder/"prototype_20_clusters.npy", some(20, 24, seed=9).numpy())
    return tensors, [folder/"checkpoint.pth", folder/"prototype_20_clusters.npy"]


@torch.no_grad()
def test_ship(vit, tmp_path):
    tensors, files = ship_file(tmp_path, vit)
    model = hp.load_official("ship", files, vit, starts=[0, 1, 3], normalize="imagenet")
    assert torch.equal(model.tuner.sip_prompts[2], tensors["compound_prompts_visual.2"][0])
    features, _ = reference_forward(model.host, model.tuner, pixels())
    torch.testing.assert_close(model(pixels()), F.linear(features, tensors["head.weight"], tensors["head.bias"]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="visual_prompt_indices"): hp.load_official("ship", files, vit, normalize="imagenet")
    with pytest.raises(ValueError, match="prototype_200_clusters.npy"): hp.load_official("ship", files[0], vit, starts=[0, 1, 3])
    np.save(files[1], some(20, 23).numpy())
    with pytest.raises(ValueError, match="prototypes has shape"):
        hp.load_official("ship", files, vit, starts=[0, 1, 3], normalize="imagenet")


def test_ship_prototypes_by_hand(vit):
    "Of a wrong shape they are named, whoever put them there."
    model = hp.tune(vit, "ship", 5, starts=[0, 1, 3], num_prototypes=20, normalize="imagenet")
    model.tuner.prototypes = some(20, 23)
    with pytest.raises(ValueError, match=r"prototypes has shape \(20, 23\), has to be \(20, 24\)"): model(pixels())


def davpt_file(folder, vit, **more):
    "Blocks 2 and 3 guided; biases that were trained; the fused copies are stale."
    tensors = split(vit) | {"proxy_prompt_tokens": some(2, 4, 24), "other_prompt_tokens": some(2, 3, 24, seed=1),
                            "vpt_norm.weight": 1 + some(24, seed=2), "vpt_norm.bias": some(24, seed=3),
                            "head.weight": some(5, 24, seed=4), "head.bias": some(5, seed=5)}
    trained = ("k.bias", "v.bias", "proj.bias", "fc2.bias", "norm2.bias", "norm1.weight", "norm1.bias", "cls_token")
    for i, name in enumerate(tensors):
        if name.endswith(trained): tensors[name] = tensors[name] + some(*tensors[name].shape, seed=10 + i)
    tensors |= {name: t + 1 for name, t in vit.state_dict().items() if ".qkv." in name}
    torch.save({"state_dict": tensors, **more}, folder/"tensors.pt")
    return tensors, folder/"tensors.pt"


@torch.no_grad()
def test_da_vpt(vit, tmp_path):
    mapping = torch.tensor([3, 1, 0, 2, 1])
    tensors, file = davpt_file(tmp_path, vit, mapping=mapping)
    model = hp.load_official("da_vpt", file, vit, normalize="imagenet")
    assert torch.equal(model.tuner.guidance.map.prompt_of, mapping) and model.config.guided_layers == [2, 3]
    plain_vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, num_classes=0)
    fused = {n: torch.cat([tensors[n.replace("qkv", p)] for p in "qkv"]) if ".qkv." in n else tensors[n] for n in vit.state_dict()}
    plain_vit.load_state_dict(fused)
    own = [F.layer_norm(p, (24,), tensors["vpt_norm.weight"], tensors["vpt_norm.bias"], 1e-6)
           for p in (*tensors["other_prompt_tokens"], *tensors["proxy_prompt_tokens"])]
    z, n = plain_vit._pos_embed(plain_vit.patch_embed(pixels())), 0
    for block, p in zip(plain_vit.blocks, own):
        z, n = torch.cat([z[:, :1], p.expand(3, -1, -1), z[:, 1 + n:]], 1), len(p)
        z = block(z)
    expected = F.linear(plain_vit.norm(z)[:, 0], tensors["head.weight"], tensors["head.bias"])
    torch.testing.assert_close(model(pixels()), expected, rtol=1e-4, atol=1e-5)
    assert model.train().loss(pixels(), torch.tensor([0, 4, 2])).isfinite()


def test_da_vpt_without_its_map(vit, tmp_path):
    _, file = davpt_file(tmp_path, vit)
    with pytest.raises(ValueError, match="vpt_criterion.mapping"): hp.load_official("da_vpt", file, vit, normalize="imagenet")
    hp.load_official("da_vpt", file, vit, normalize="imagenet", patch_weight=0, cls_weight=0)
    with pytest.raises(ValueError, match="name it in bias_set"):
        hp.load_official("da_vpt", file, vit, normalize="imagenet", patch_weight=0, cls_weight=0, bias_set="kv")


def test_da_vpt_map_that_is_assigned(vit):
    "The loss asks for nothing more."
    model = hp.tune(vit, "da_vpt", 5, num_guided=4, normalize="imagenet")
    model.tuner.guidance.map.assign(torch.tensor([3, 1, 0, 2, 1]))
    assert model.train().loss(pixels(), torch.tensor([0, 4, 2])).isfinite()


def test_objects_are_not_read(clip, vit, tmp_path):
    "SHIP's arguments, a scheduler, a whole model: refused with the two lines."
    _, files = ship_file(tmp_path, vit, args=argparse.Namespace(lr=1))
    with pytest.raises(ValueError, match=r'torch.save\(\{"model": content\["model"\]\}'):
        hp.load_official("ship", files, vit, starts=[0, 1, 3])
    torch.save(torch.nn.Linear(2, 2), tmp_path/"model.ptm")
    with pytest.raises(ValueError, match="content.vpt_criterion.mapping"): hp.load_official("da_vpt", tmp_path/"model.ptm", vit)
    file = dassl(tmp_path, {"ctx": some(4, clip.text.dim)}, scheduler={"successor": argparse.Namespace()})
    with pytest.raises(ValueError, match="weights_only=False"): hp.load_official("coop", file, clip, NAMES)


@pytest.mark.parametrize("change, message", [
    (dict(ctx=None), "ctx is missing"), (dict(words=some(2, 2)), "unknown names: words"),
    (dict(ctx=some(4, 47)), r"tuner.text.ctx is \(4, 47\)"),
    (dict(ctx=some(48)), "has to be"),
])
def test_what_does_not_fit_is_named(clip, tmp_path, change, message):
    tensors = {name: t for name, t in (learner(clip, "coop") | change).items() if t is not None}
    save_file(tensors, tmp_path/"words.safetensors")
    with pytest.raises(ValueError, match=message): hp.load_official("coop", tmp_path/"words.safetensors", clip, NAMES)


def test_what_is_not_there_is_named(clip, vit, tmp_path):
    file = dassl(tmp_path, learner(clip, "coop"))
    with pytest.raises(KeyError, match="unknown method with a map"): hp.load_official("lamm", file, clip, NAMES)
    with pytest.raises(FileNotFoundError, match="nothing.pth"): hp.load_official("coop", tmp_path/"nothing.pth", clip, NAMES)
    with pytest.raises(TypeError, match="names of the classes"): hp.load_official("coop", file, clip)
    with pytest.raises(ValueError, match="in two of the files"): hp.load_official("coop", [file, file], clip, NAMES)
    (tmp_path/"text.pth").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="is no checkpoint"): hp.load_official("coop", tmp_path/"text.pth", clip, NAMES)
    with pytest.raises(ValueError, match="no tensors"): hp.load_official("coop", dassl(tmp_path, {}), clip, NAMES)


def test_a_vit_without_timms_factory(vit, tmp_path):
    "It does not say how images are normalised: asked for by name, and then everything works."
    with pytest.raises(ValueError, match="give normalize="): hp.tune(vit, "vpt_deep", 5)
    model = hp.tune(vit, "vpt_deep", 5, normalize="imagenet")
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(hp.load_tuned(tmp_path, vit)(pixels()), model(pixels()))
    assert hp.count_parameters(model)
