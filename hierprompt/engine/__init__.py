"""The engine: a frozen transformer, the places where a method may act in it, and the model that the two make.

`from hierprompt.engine import Tuner, Segment` is what a method of one's own begins with.
"""
from ..core import face

__getattr__, __dir__, __all__ = face(__name__, {
    "hosts": ("BlockView", "TimmViT", "as_host", "weights_sha256"),
    "block_loop": ("Context", "Engine", "Method", "Segment", "Tuner"),
    "registry": ("list_methods", "register_methods", "tuner_class"),
    "tuned": ("Trainable", "TunedModel", "tune"),
    "saved": ("load_tuned",),
    "accounting": ("count_macs", "count_parameters"),
})
