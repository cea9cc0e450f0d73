"""Frozen networks: which weights they start from."""
from ..core import face

__getattr__, __dir__, __all__ = face(__name__, {
    "pretrained": ("backbone_info", "fill_random", "load_backbone", "prepare_backbone"),
    "embedded_vit": ("EMBEDDED_NAME", "build_embedded"),
})
