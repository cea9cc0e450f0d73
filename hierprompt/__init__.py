"""Prompt tuning of pretrained vision transformers: SHIP, DA-VPT and Adapt, rebuilt table by table.

The public names are loaded when they are first used, so that command-line tools need not wait for PyTorch.
"""
import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "registry": ("list_methods",),
    "tuned": ("TunedModel", "load_tuned", "tune"),
    "prompted": ("PromptedCLIP", "tune_clip"),
    "clip": ("load_clip",),
    "backbones": ("load_backbone",),
    "accounting": ("count_macs", "count_parameters"),
    "recipes": ("RECIPES", "Recipe", "recipe"),
    "training": ("evaluate", "fit"),
    "data.tasks": ("Split", "Task", "list_tasks", "load_task"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = ["__version__", *_HOME]


def __getattr__(name):
    if name not in _HOME: raise AttributeError(f"module 'hierprompt' has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(importlib.import_module(f"hierprompt.{_HOME[name]}"), name)


def __dir__():
    return sorted(__all__)
