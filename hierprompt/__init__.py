"""Prompt tuning of pretrained vision transformers: SHIP, DA-VPT and Adapt, rebuilt table by table.

The public names are loaded when they are first used, so that command-line tools need not wait for PyTorch.
"""
from .core import face
from .methods import names   # the list of methods: names alone, their classes are imported when they are used

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = face(__name__, {
    "engine.registry": ("list_methods",),
    "engine.saved": ("load_tuned",),
    "engine.tuned": ("TunedModel", "tune"),
    "engine.accounting": ("count_macs", "count_parameters"),
    "backbones.pretrained": ("load_backbone",),
    "clip.model": ("load_clip",),
    "clip.prompted": ("PromptedCLIP", "tune_clip"),
    "methods.official": ("load_official",),
    "data.benchmarks": ("list_tasks", "load_task"),
    "data.tasks": ("Split", "Task"),
    "training.loop": ("evaluate", "fit"),
    "training.predict": ("Prediction", "predict"),
    "training.recipes": ("RECIPES", "Recipe", "recipe"),
})
