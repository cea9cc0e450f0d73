"""Shared small backbones; the tests of this folder can import each other's helpers."""
import gc
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))


# the longest files: a process that begins one of them last would be waited for (Makefile: --no-loadscope-reorder keeps the order). While
# one process makes the project that both files of pipelines work on, the other one has something else to do.
FIRST = ("test_pipeline_kills.py", "test_torch_ways.py", "test_pipeline.py", "test_kernels.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def pytest_collection_finish():
    "What is imported now stays; frozen, it is not searched for garbage again and again, which takes half a second each time."
    gc.collect()
    gc.freeze()


@pytest.fixture
def vit():
    from hierprompt.backbones.pretrained import load_backbone
    return load_backbone("tiny_random")


@pytest.fixture
def images():
    import torch
    return torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
