"""The straightforward forms that the engine's exact savings are tested against: one sequence, everything computed for everybody."""
import torch
import torch.nn.functional as F

from hierprompt.training.loop import Trainer, make_resident


def block_forward(block, x):
    "A pre-norm block on the joined sequence (B, n, D), as timm computes it."
    q, k, v = block.heads(block.linear("qkv", block.norm1(x)))
    q, k = block.q_norm(q), block.k_norm(k)
    x = x + block.ls1(block.linear("proj", block.merge_heads(F.scaled_dot_product_attention(q, k, v))))
    return x + block.ls2(block.linear("fc2", block.between(block.linear("fc1", block.norm2(x)))))


def vpt_deep(host, images, prompts):
    "VPT-Deep on [class token | prompts | patches], prompts (L, p, D) overwritten before each block; pooled features."
    z = host.embed(images)
    x = torch.cat([z[:, :1], prompts[:1].expand(len(z), -1, -1), z[:, 1:]], 1)
    p = prompts.shape[1]
    for i, block in enumerate(host.blocks):
        x = torch.cat([x[:, :1], prompts[i:i + 1].expand(len(z), -1, -1), x[:, 1 + p:]], 1)
        x = block_forward(block, x)
    return host.pool(host.norm(torch.cat([x[:, :1], x[:, 1 + p:]], 1)))


def vpt_shallow(host, images, prompts):
    "VPT-Shallow on [class token | prompts | patches], prompts (1, p, D) carried on; pooled features."
    z, p = host.embed(images), prompts.shape[1]
    x = torch.cat([z[:, :1], prompts.expand(len(z), -1, -1), z[:, 1:]], 1)
    for block in host.blocks: x = block_forward(block, x)
    return host.pool(host.norm(torch.cat([x[:, :1], x[:, 1 + p:]], 1)))


def vpt_deep_untrained_norm(host, images, prompts):
    "VPT's pooling for MAE: mean over patches and prompts of the last block, layer norm without trained scale and shift."
    z, p = host.embed(images), prompts.shape[1]
    x = z
    for i, block in enumerate(host.blocks):
        x = block_forward(block, torch.cat([x[:, :1], prompts[i:i + 1].expand(len(z), -1, -1), x[:, -(z.shape[1] - 1):]], 1))
    assert x.shape[1] == z.shape[1] + p
    return F.layer_norm(x[:, 1:].mean(1), (host.dim,), eps=1e-6)


def shake(module, by=0.3):
    "The module with noise in all its parameters, different in each: what one of them does is not what its neighbour does."
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in module.parameters(): p += by * torch.randn(p.shape, generator=generator)
    return module


def resumed(models, split, recipe, path):
    "States of two equal models' tuners: one trained two epochs, one that goes on from the first one's checkpoint after an epoch."
    through, later = (Trainer(model, make_resident(model, split, recipe, True), recipe, 0) for model in models)
    through.epoch(0)
    through.save_checkpoint(path)
    through.epoch(1)
    torch.manual_seed(3)         # where the generator stands is in the checkpoint
    later.load_checkpoint(path)
    later.epoch(1)
    return through.model.tuner.state_dict(), later.model.tuner.state_dict()
