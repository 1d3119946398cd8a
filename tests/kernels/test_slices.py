"""How slices share out the work, by the kernel's own functions compiled for the CPU; sizes of their blocks."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from minibble.quantize.tensors import Levels
from minibble.runtime.kernels.linear4 import cuda, skinny, slices
from minibble.runtime.kernels.tiles import TileLayout

DEVICE = torch.device("cuda", 0)
H100 = 132, 232448  # multiprocessors, bytes of shared memory
A100 = 108, 166912
SMALL = 128, 101376  # a card of compute capability 8.9

SHIMS = """
#include <algorithm>
#include <cstdio>
#include <vector>
#define __device__
using std::max;
using std::min;
struct Codes {};
struct Tables {};
typedef unsigned long long u64;
struct Dim { int x; } gridDim;
#define TOKENS 8
#define WARPS 12
#define SLOT_NBYTES 0
#define STEPS_PER_SCALE 4
"""

HARNESS = """
// Every tile of every split is some block's once; parts come from blocks before the one that adds them, and in the
// order in which it adds them, as far as a circle can: a block whose tiles are those of at most two others.
int main() {
    for (int grid : {1, 5, 108, 132})
    for (int tiles : {1, 2, 5, 31, 192, 288, 320, 1024})
    for (int splits : {1, 2, 3, 4}) {
        if (splits > grid) continue;
        Args a = {};
        a.tiles = tiles, a.splits = splits;
        int most = (tiles + grid / splits - 1) / (grid / splits);
        a.blocks = (tiles + most - 1) / most;
        gridDim.x = grid;
        std::vector<std::vector<int>> block_of(splits, std::vector<int>(tiles, -1)), step_of = block_of;
        for (int b = 0; b < grid; ++b) {
            Share share(a, b);
            if (share.split < 0 || share.split >= splits) return printf("split");
            if (share.count < 0 || share.count > most) return printf("count");
            if (share.begin && share.split < splits - 1) return printf("another circle");
            if (share.begin < 0 || share.begin > max(0, share.count - 1)) return printf("begin");
            for (int i = 0; i < share.count; ++i) {
                int tile = share.tile + share.local(i);
                if (tile >= tiles || block_of[share.split][tile] >= 0) return printf("a tile twice");
                block_of[share.split][tile] = b, step_of[share.split][tile] = i;
                if (share.split < splits - 1) continue;
                for (int s = 0; s < splits - 1; ++s)
                    if (block_of[s][tile] < 0 || block_of[s][tile] >= b) return printf("waits for a later block");
            }
            if (share.split < splits - 1 || splits == 1) continue;
            int begun = 0;
            for (int i = 0; i < share.count; ++i) begun += step_of[0][share.tile + i] == 0;
            if (begun > 1) continue;
            for (int i = 1; i < share.count; ++i)
                if (step_of[0][share.tile + share.local(i)] < step_of[0][share.tile + share.local(i - 1)])
                    return printf("another order");
        }
        for (auto& split : block_of)
            for (int b : split)
                if (b < 0) return printf("a tile is left");
    }
    printf("ok");
}
"""


def test_every_tile_is_taken_once_and_in_order(tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    shape = Path(slices.__file__).with_name("slices_shape.cuh").read_text()
    (tmp_path / "shape.cpp").write_text(SHIMS + shape + HARNESS)
    subprocess.run([compiler, "-std=c++17", "-O1", "-o", tmp_path / "shape", tmp_path / "shape.cpp"], check=True)
    assert subprocess.run([tmp_path / "shape"], capture_output=True, text=True).stdout == "ok"


def on(card: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "multiprocessors", lambda device: card[0])
    monkeypatch.setattr(slices, "shared_limit", lambda device: card[1])
    slices.shape_for.cache_clear()


def layout_of(rows: int, K: int, levels: Levels, block: int) -> TileLayout:
    layout = TileLayout.make((rows,), K, levels, block, True)
    assert layout is not None
    return layout


@pytest.mark.parametrize("card", [H100, A100, SMALL], ids=["h100", "a100", "small"])
@pytest.mark.parametrize(("rows", "K"), [(9216, 6144), (6144, 8192), (32768, 6144), (10240, 6144), (64, 1536)])
@pytest.mark.parametrize(("levels", "block"), [("nf4", 64), ("int4", 128), ("int4", 32)])
@pytest.mark.parametrize("M", [1, 8, 16])
def test_shapes_fit(
    card: tuple[int, int], rows: int, K: int, levels: Levels, block: int, M: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(card, monkeypatch)
    layout = layout_of(rows, K, levels, block)
    shape = slices.shape_for(layout, M, DEVICE)
    if shape is None:
        assert card is not H100, "what the model has is multiplied by slices"
        return
    assert shape.splits * shape.warps * slices.COLUMNS == K and shape.nbytes <= card[1]
    last = card[0] - shape.blocks * (shape.splits - 1)
    assert last >= shape.blocks and shape.blocks * shape.block_tiles >= layout.tiles
    assert (shape.splits - 1) * layout.tiles * M * 32 <= slices.MAX_PARTIAL_SUMS


@pytest.mark.parametrize(
    ("rows", "K", "M"),
    [
        (9216, 6144 + 64, 1),
        (9216, 1280, 1),
        (9216, 128 * 17, 1),
        (9216, 6144, 17),
        (9216, 6144, 0),
        (1 << 20, 6144, 16),
    ],
)
def test_what_slices_do_not_divide(rows: int, K: int, M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns that are no slices, too few or a prime number of them, too many or no tokens, too many sums."""
    on(H100, monkeypatch)
    assert slices.shape_for(layout_of(rows, K, "nf4", 64), M, DEVICE) is None


def test_work_of_the_real_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """288 tiles on 132 processors: 9 for each of 96 blocks, 8 for each of 36, which add the parts of all."""
    on(H100, monkeypatch)
    shape = slices.shape_for(layout_of(9216, 6144, "int4", 128), 16, DEVICE)
    assert shape is not None
    assert (shape.splits, shape.warps, shape.blocks, shape.block_tiles) == (4, 12, 32, 9)


@pytest.mark.parametrize(
    ("rows", "K", "by_jobs"),
    [(9216, 6144, set()), (32768, 6144, {1, 2}), (6144, 8192, set()), (9216, 640, {1, 2, 3, 9})],
)
def test_what_is_multiplied_by_jobs(
    rows: int, K: int, by_jobs: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Few tokens of matrices that need not be cut, and widths that are no slices."""
    on(H100, monkeypatch)
    monkeypatch.setattr(skinny, "multiprocessors", lambda device: H100[0])
    monkeypatch.setattr(skinny, "shared_limit", lambda device: H100[1])
    skinny.splits_for.cache_clear()
    matrix = cuda.TiledLinear(torch.empty(0, dtype=torch.uint8), layout_of(rows, K, "int4", 128))
    assert {M for M in (1, 2, 3, 9) if matrix._slices(M, DEVICE) is None} == by_jobs
    skinny.splits_for.cache_clear()
