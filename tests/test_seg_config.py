"""A prompted backbone in a configuration of one's own: the README's two files, on small pictures and with MMEngine's runner as it is."""
import contextlib
import io
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

warnings.filterwarnings("ignore", module="mmcv")
with contextlib.redirect_stdout(io.StringIO()):
    mmseg = pytest.importorskip("mmseg")
    import mmseg.datasets
    import mmseg.models
from mmengine.config import Config
from mmengine.registry import DefaultScope

README = Path(__file__).parents[1] / "README.md"
STOCK = Path(mmseg.__file__).parent / ".mim/configs/_base_"
CLASSES = dict(classes=["ground", "square"], palette=[[0, 0, 0], [200, 0, 0]])


def blocks():
    "The configuration and the script of the README's section."
    section = README.read_text(encoding="utf-8").split("## A backbone for MMSegmentation")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "The configuration beside the stock files it builds on, and eight pictures of 40 px with masks."
    for name in ("datasets/ade20k.py", "schedules/schedule_80k.py", "default_runtime.py"): shutil.copy(STOCK / name, tmp_path)
    (tmp_path / "my_segmentation.py").write_text(blocks()[0], encoding="utf-8")
    generator = np.random.default_rng(0)
    for part in ("images", "masks"): (tmp_path / part).mkdir()
    for i in range(8):
        picture, mask = generator.integers(60, 120, (40, 40, 3), dtype=np.uint8), np.zeros((40, 40), np.uint8)
        y, x = generator.integers(0, 24, 2)
        picture[y:y + 16, x:x + 16, 0], mask[y:y + 16, x:x + 16] = 220, 1
        Image.fromarray(picture).save(tmp_path / f"images/{i}.png")
        Image.fromarray(mask).save(tmp_path / f"masks/{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small(config, folder):
    "The README's configuration for these pictures: only sizes, numbers and paths change."
    data = dict(
        type="BaseSegDataset",
        data_root=str(folder),
        data_prefix=dict(img_path="images", seg_map_path="masks"),
        img_suffix=".png",
        metainfo=CLASSES,
    )
    for part in ("train", "val", "test"):
        loader = config[f"{part}_dataloader"]
        loader.update(
            num_workers=0, persistent_workers=False, dataset=dict(data, pipeline=[dict(step) for step in loader.dataset.pipeline])
        )
        for step in loader.dataset.pipeline:
            step.pop("reduce_zero_label", None)
            if "scale" in step: step["scale"] = (40, 40)
            if "crop_size" in step: step["crop_size"] = (32, 32)
    config.train_dataloader.batch_size = 2
    config.merge_from_dict(
        {
            "train_cfg.max_iters": 3,
            "train_cfg.val_interval": 3,
            "default_hooks.logger.interval": 1,
            "log_level": "ERROR",
            "model.data_preprocessor.size": (32, 32),
            "model.backbone": dict(vit="tiny_random", image_size=32, num_classes=2),
            "model.decode_head": dict(in_channels=64, in_index=2, channels=8, num_classes=2),
            "model.test_cfg": dict(crop_size=(32, 32), stride=(16, 16)),
        }
    )
    for hook in config.custom_hooks: hook.interval = 2
    return config


def test_the_example_of_the_readme_trains(folder, monkeypatch):
    fromfile, names = Config.fromfile, {}
    monkeypatch.setattr(Config, "fromfile", lambda path: small(fromfile(path), folder))
    with DefaultScope.overwrite_default_scope("mmseg"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(blocks()[1], "README.md", "exec"), names)
    runner = names["runner"]
    backbone = runner.model.backbone
    assert runner.iter == 3 and list(folder.glob("work/*/vis_data/scalars.json"))
    assert backbone.tuner.guidance.map.prepared
    fresh = type(backbone)(**{k: v for k, v in names["config"].model.backbone.items() if k != "type"})
    moved = [name for name, p in backbone.trainable().items() if not torch.equal(p, fresh.trainable()[name])]
    assert set(moved) == set(fresh.trainable())
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(backbone.host.vit.named_parameters(), fresh.host.vit.named_parameters()))


def test_without_the_packing_that_names_classes_the_error_says_so(folder, monkeypatch):
    fromfile = Config.fromfile
    monkeypatch.setattr(Config, "fromfile", lambda path: small(fromfile(path), folder))
    script = "\n".join(line for line in blocks()[1].splitlines() if "PackPresent" not in line)
    with DefaultScope.overwrite_default_scope("mmseg"), warnings.catch_warnings(), pytest.raises(
        ValueError, match="end the training pipeline with PackPresent"
    ):
        warnings.simplefilter("ignore")
        exec(compile(script, "README.md", "exec"), {})
