"CLIP written out at full length with open_clip's own blocks: nothing shared, cut, cached or left out. The engine has to agree."
import torch
import torch.nn.functional as F


def tower_of(model):
    "What holds open_clip's text tower."
    return getattr(model, "text", model)


def image_tokens(visual, images):
    "Class token and patches with positions, before the first norm."
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    return torch.cat([visual.class_embedding.expand(len(images), 1, -1), patches], 1) + visual.positional_embedding


def image_states(visual, images, own=()):
    "All tokens of the last block; `own[i]` (p, D) are appended before block i and replace those of the block before."
    x, n = image_tokens(visual, images), visual.positional_embedding.shape[0]
    if own: x = torch.cat([x, own[0].expand(len(x), -1, -1)], 1)
    x = visual.ln_pre(x)
    for i, block in enumerate(visual.transformer.resblocks):
        if 0 < i < len(own): x = torch.cat([x[:, :n], own[i].expand(len(x), -1, -1)], 1)
        x = block(x)
    return x


def image_features(visual, images, own=()):
    return F.normalize(visual.ln_post(image_states(visual, images, own)[:, 0]) @ visual.proj, dim=-1)


def text_features(model, ids, own=()):
    "Class vectors of full-length ids; `own[i]` (n, d) takes the places 1..n before block i."
    return F.normalize(encoded(model, ids, own), dim=-1)


def encoded(model, ids, own=()):
    "The same as they leave the encoder, not of length 1."
    tower = tower_of(model)
    def put(x, words): return torch.cat([x[:, :1], words.expand(len(x), -1, -1), x[:, 1 + len(words):]], 1)
    x = tower.token_embedding(ids)
    if own: x = put(x, own[0])
    x = x + tower.positional_embedding
    for i, block in enumerate(tower.transformer.resblocks):
        if 0 < i < len(own): x = put(x, own[i])
        x = block(x, attn_mask=tower.attn_mask)
    return tower.ln_final(x)[torch.arange(len(ids)), ids.argmax(1)] @ tower.text_projection
