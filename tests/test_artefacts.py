"Artefacts of attention maps: against loops, at edges, in models."
import pytest
import torch

import hierprompt as hp
from hierprompt.results.artefacts import compare_artefacts, find_artefacts, measure_artefacts


def by_loops(weights, times):
    "Of one map: pieces of bright patches that touch, found by walking; those of one or two patches."
    left = {tuple(place) for place in (weights > times * weights.mean()).nonzero().tolist()}
    found = torch.zeros(weights.shape, dtype=torch.bool)
    while left:
        piece, edge = set(), [left.pop()]
        while edge:
            y, x = edge.pop()
            piece.add((y, x))
            near = {(y + j, x + i) for j in (-1, 0, 1) for i in (-1, 0, 1)} & left
            left -= near
            edge += near
        if len(piece) <= 2:
            for y, x in piece: found[y, x] = True
    return found


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (1, 9), (14, 14)])
@pytest.mark.parametrize("times", [1.2, 3.0])
def test_against_loops(grid, times):
    maps = torch.rand(2, 3, *grid, generator=torch.Generator().manual_seed(0)) ** 3
    found = find_artefacts(maps, times)
    for b in range(2):
        for m in range(3): assert torch.equal(found[b, m], by_loops(maps[b, m], times))


def test_neither_scale_nor_half_precision_matter():
    maps = torch.zeros(1, 1, 4, 4)
    maps[..., 0, 3] = 1
    for seen in (maps, 1e-3 * maps, maps.to(torch.bfloat16)): assert find_artefacts(seen).sum() == 1
    assert not find_artefacts(torch.zeros(1, 1, 4, 4)).any()


def test_spread_of_the_corners_and_of_one_patch():
    maps = torch.zeros(1, 3, 5, 5)
    maps[0, 0, ::4, ::4] = 1
    maps[0, 1, 4, 0] = 1
    found = measure_artefacts(maps)
    assert found.inside is None
    spread = torch.tensor([[2 ** 0.5, 0, torch.nan]])   # squared distances: 8 of the corners, 2 * (25 - 1) / 12 = 4 of all
    torch.testing.assert_close(found.spread, spread, equal_nan=True)
    torch.testing.assert_close(found.frequency, torch.tensor([[4 / 25, 1 / 25, 0]]))


def test_masks_that_cut_patches_count_in_part():
    maps, mask = torch.zeros(1, 1, 4, 4), torch.zeros(1, 8, 8, dtype=torch.bool)
    maps[..., 0, 0] = 1
    mask[0, 0, :2] = True   # the upper half of that patch
    assert measure_artefacts(maps, mask).inside.item() == 0.5


@pytest.mark.parametrize("call, said", [
    (lambda maps: find_artefacts(maps, times=1), "times = 1"),
    (lambda maps: find_artefacts(maps, times=float("nan")), "times = nan"),
    (lambda maps: measure_artefacts(maps, torch.ones(3, 8, 8)), "for 2 images"),
    (lambda maps: measure_artefacts(maps, torch.ones(2, 1, 8, 8)), "(B, H, W)"),
])
def test_wrong_values_are_named(call, said):
    with pytest.raises(ValueError) as error: call(torch.rand(2, 1, 4, 4))
    assert said in str(error.value)


def test_of_models():
    vit = hp.load_backbone("tiny_random")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = hp.tune(vit, "vpt_deep", 5, num_tokens=3)
    table = compare_artefacts({"VPT-Deep": model}, images, torch.ones(2, 32, 32, dtype=torch.bool), times=1.01)
    assert list(table.index) == [("VPT-Deep", 2), ("VPT-Deep", 4)]
    assert (table["object"] == 100).all() and set(table["inside"].dropna()) <= {100.0}
    assert "inside" not in compare_artefacts({"VPT-Deep": model}, images)
    with pytest.raises(ValueError, match="no prompts in block 2"): compare_artefacts({"linear": hp.tune(vit, "linear", 5)}, images)
