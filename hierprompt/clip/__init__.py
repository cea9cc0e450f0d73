"""CLIP: both towers of an open_clip model on the engine, and methods on them. Needs the extra `clip`."""
from ..core import face, need

need("open_clip", "clip")

__getattr__, __dir__, __all__ = face(__name__, {
    "model": ("CLIP", "load_clip"),
    "prompted": ("CLIPTuner", "PromptedCLIP", "tune_clip"),
})
