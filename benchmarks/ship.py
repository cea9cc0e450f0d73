"""What SHIP costs: ratios to the frozen forward pass, medians over interleaved rounds of one process.

    python benchmarks/ship.py [--rounds 7] [--threads 2] [--batch 8] [--tokens 50] [--device cpu]

ViT-B/16 at 224 pixels with hierarchies from blocks 0, 2, 4, 6, 8, 11 (the released Cifar100 run), preset `released`.
On a CUDA device everything runs in bf16, and images per second and peak memory are reported too.
"""
import timm
import torch
import torch.nn.functional as F
from engine import arguments, evaluate, measure, peak_memory, remembering, report
from timm.layers import drop_path

from hierprompt.engine.tuned import tune
from hierprompt.methods.ship.reference import reference_forward

STARTS = [0, 2, 4, 6, 8, 11]
BARS = {"training step, engine": 2.40, "training step with drop-path 0.1, engine": 2.75, "inference, engine": 1.05}


def build(vit, args):
    "The tuned model; random prototypes cost what those of k-means cost."
    model = tune(vit, "ship", 100, preset="released", num_tokens=args.tokens, starts=STARTS)
    model.tuner.restore({"prototypes": torch.empty(model.config.num_prototypes, vit.embed_dim)})
    model.tuner.prototypes.normal_(generator=torch.Generator(model.device).manual_seed(0))
    return model


def masks(model, images):
    "Stochastic depth for the straightforward form."
    ones, last = images.new_ones(len(images), 1, 1), model.host.depth - 1
    return [[drop_path(ones, model.drop_path * i / last, True) for _ in "am"] for i in range(last + 1)] if model.drop_path else None


def cases(args):
    "Name -> function to time; each takes no argument."
    torch.manual_seed(0)
    vit = timm.create_model("vit_base_patch16_224", num_classes=0).eval().requires_grad_(False).to(args.device)
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)
    labels = torch.arange(args.batch, device=args.device) % 100
    model, fixed = build(vit, args), build(vit, args)      # `fixed` never trains

    def straightforward():
        features, matching = reference_forward(model.host, model.tuner, images, masks(model, images))
        return F.cross_entropy(model.head(features), labels) + model.config.pml_weight * matching

    def train(loss, rate):
        def run():
            model.train().drop_path = rate
            torch.autograd.grad(loss(), list(model.trainable().values()))
            model.eval().drop_path = 0.0
        return run

    engine = lambda: model.loss(images, labels)
    return {
        "timm forward": evaluate(lambda: vit(images)),
        "inference, engine": evaluate(remembering(fixed, images)),
        "inference, straightforward": evaluate(lambda: fixed.head(reference_forward(fixed.host, fixed.tuner, images)[0])),
        "training step, engine": train(engine, 0.0),
        "training step, straightforward": train(straightforward, 0.0),
        "training step with drop-path 0.1, engine": train(engine, 0.1),
        "training step with drop-path 0.1, straightforward": train(straightforward, 0.1),
    }


def main():
    args = arguments(__doc__)
    with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
        functions = cases(args)
        times = measure(functions, args.rounds, args.device)
        peaks = peak_memory(functions) if args.device == "cuda" else {}
    report(args, times, "timm forward", BARS, peaks)


if __name__ == "__main__":
    main()
