"""What DA-VPT costs beside VPT-Deep with the same prompts: ratios, medians over interleaved rounds of one process.

    python benchmarks/davpt.py [--rounds 7] [--threads 2] [--batch 8] [--tokens 20] [--device cpu]

ViT-B/16 at 224 pixels, 100 classes, the last block guided by as many prompts as the others have. A step is forward, backward, AdamW. The
paper's ratios are
1.09 and 1.11 (Table 4: 1.54 and 1.56 to 1.41 ms an image). On a CUDA device everything runs in bf16, and images per second and peak
memory are reported too.
"""
import timm
import torch
from engine import arguments, evaluate, measure, peak_memory, remembering, report, step

from hierprompt.engine.tuned import tune

BASE = "VPT-Deep training step"
BARS = {"DA-VPT training step": 1.06, "DA-VPT+ training step": 1.10}


def models(vit, tokens):
    "Name -> tuned model; VPT-Deep is the first."
    sizes = dict(num_tokens=tokens, num_guided=tokens)
    kinds = {
        "DA-VPT": {},
        "DA-VPT+": dict(bias_set="kv"),
        "DA-VPT+, released": dict(preset="released"),
        "DA-VPT, all blocks guided": dict(guided_layers=list(range(12))),
    }
    return {"VPT-Deep": tune(vit, "vpt_deep", 100, num_tokens=tokens)} | {
        name: tune(vit, "da_vpt", 100, **sizes, **changes) for name, changes in kinds.items()
    }


def cases(args):
    "Name -> function to time; each takes no argument."
    torch.manual_seed(0)
    vit = timm.create_model("vit_base_patch16_224", num_classes=0).eval().requires_grad_(False).to(args.device)
    images, labels = torch.randn(args.batch, 3, 224, 224, device=args.device), torch.arange(args.batch, device=args.device) % 100
    trained, fixed = models(vit, args.tokens), models(vit, args.tokens)      # `fixed` never trains
    # any map costs the same: the first one, class i to prompt i mod M
    for name in list(trained)[1:]:
        guided = trained[name].tuner.guidance.map
        guided.assign(guided.prompt_of.clone())

    steps = {
        f"{name} training step": step(model, images, labels, torch.optim.AdamW(model.param_groups(1e-4, 0.01)))
        for name, model in trained.items()
    }
    return steps | {f"{name} inference": evaluate(remembering(fixed[name], images)) for name in ("VPT-Deep", "DA-VPT", "DA-VPT+")}


def main():
    args = arguments(__doc__, tokens=20)
    with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
        functions = cases(args)
        times = measure(functions, args.rounds, args.device)
        peaks = peak_memory(functions) if args.device == "cuda" else {}
    report(args, times, BASE, BARS, peaks)


if __name__ == "__main__":
    main()
