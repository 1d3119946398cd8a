"""How the kernel for few tokens shares out its work, by its own functions compiled for the CPU; sizes of its blocks."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from minibble.runtime.kernels.linear4 import skinny
from minibble.runtime.kernels.tiles import TileLayout

H100 = {"processors": 132, "shared": 232448}
SMALL = {"processors": 46, "shared": 101376}  # a card of compute capability 8.9

SHIMS = """
#include <algorithm>
#include <cstdio>
#include <map>
#include <set>
#include <vector>
#define __device__
#define __restrict__
#define __CUDA_ARCH__ 800
using std::max;
using std::min;
static float __fdividef(float a, float b) { return a / b; }
struct float2 { float x, y; }; struct float4 { float x, y, z, w; }; struct int2 { int x, y; };
struct uint4 { unsigned x, y, z, w; };
struct Dim { int x; } gridDim, blockIdx, threadIdx;
#define __threadfence()
#define __syncthreads()
"""

HARNESS = """
// Every chunk of every unit is taken once, in the order of memory; the sums that warps leave have places of their own.
// If DIVIDED, of every second job only half of the chunks: those of the first tiles, or the first of each tile.
int main() {
    std::vector<int> counts(64, 3);
    std::vector<const char*> matrices(64);
    Shared sh;
    sh.job_count = counts.data();
    sh.job_matrix = matrices.data();
    for (int j = 0; j < 64; ++j) matrices[j] = (const char*)(long long)((j + 1) * (1ll << 40));
    for (int grid : {1, 5, 132})
    for (int tiles : {1, 3, 192, 288})
    for (int chunks : {1, 24, 36})
    for (int splits : {1, 2, 3})
    for (int segment : {4, 32})
    for (int jobs : {1, 2, 7})
    for (int epilogue : {GATE_UP, DOWN}) {
        if (splits > chunks) continue;
        Args a = {};
        a.epilogue = epilogue, a.tiles = tiles, a.chunks = chunks, a.splits = splits;
        std::set<long long> wanted;
        for (int j = 0; j < jobs; ++j) {
            bool half = DIVIDED && j % 2 == 0;
            int used = half && epilogue == GATE_UP ? tiles / 2 : tiles;
            int width = half && epilogue == DOWN ? (chunks + 1) / 2 : chunks;
            counts[j] = DIVIDED ? 3 | (epilogue == GATE_UP ? 16 * used : 256 * width) << COUNT_BITS : 3;
            for (int tile = 0; tile < used; ++tile)
                for (int c = 0; c < width; ++c)
                    wanted.insert((long long)matrices[j] + ((long long)tile * chunks + c) * CHUNK_NBYTES);
        }
        a.segment_tiles = segment, a.sum_rows = (segment + WARPS) * 3;
        gridDim.x = grid;
        std::map<long long, int> taken;
        int units = jobs * splits * tiles, last = 0;
        for (int b = 0; b < grid; ++b) {
            int start = share(b, units), stop = share(b + 1, units);
            if (start != last || stop < start || stop - start > units / grid + 1) return printf("shares");
            last = stop;
            for (int warp = 0; warp < WARPS; ++warp) {
                Stream ahead = {start, stop};
                bool more = stream_segment(a, sh, ahead, warp);
                for (int unit = start; unit < stop;) {
                    Segment seg = segment_at(a, sh, unit, stop);
                    if (seg.count < 1 || seg.count > segment) return printf("segment");
                    Stream now = {unit, unit + seg.count};
                    std::set<int> slots;
                    if (stream_segment(a, sh, now, warp))
                        while (now.q < now.q_end) {
                            if (!more || ahead.from != now.from) return printf("the ring holds another chunk");
                            ++taken[(long long)now.from];
                            if (now.c < 0 || now.c >= now.width || now.tile < 0 || now.tile >= seg.used(a))
                                return printf("place");
                            slots.insert(now.tile + warp);
                            if (now.tile + warp >= seg.count + WARPS) return printf("slot");
                            stream_step(ahead);
                            if (ahead.q == ahead.q_end) more = stream_segment(a, sh, ahead, warp);
                            stream_step(now);
                        }
                    unit += seg.count;
                }
                if (more) return printf("chunks are left");
            }
            for (int unit = start; unit < stop;) {  // slots of neighbouring warps are apart
                Segment seg = segment_at(a, sh, unit, stop);
                int width = split_start(a, seg, seg.split + 1) - split_start(a, seg, seg.split);
                int total = seg.used(a) * width;
                std::set<int> slots;
                for (int w = 0; w < WARPS; ++w)
                    for (int q = w * total / WARPS; q < (w + 1) * total / WARPS;) {
                        int tile = q / width;
                        if (!slots.insert(tile + w).second) return printf("two warps in one slot");
                        q = min((tile + 1) * width, (w + 1) * total / WARPS);
                    }
                unit += seg.count;
            }
        }
        if (last != units || taken.size() != wanted.size()) return printf("chunks: %zu", taken.size());
        for (auto& one : taken)
            if (one.second != 1 || !wanted.count(one.first)) return printf("taken %d times", one.second);
    }
    printf("ok");
}
"""


def section(name: str, start: str, end: str | None) -> str:
    """From the line that begins with `start` to before that which begins with `end`, or to the end."""
    text = (Path(skinny.__file__).parent / name).read_text()
    first = text.index(start)
    return text[first : None if end is None else text.index(end, first)]


@pytest.mark.parametrize("divided", [0, 1])
@pytest.mark.parametrize("warps", skinny.WARPS)
def test_every_chunk_is_taken_once(tmp_path: Path, warps: int, divided: int) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    parts = [
        SHIMS,
        f"#define WARPS {warps}\n#define TABLE_STRIDE 128\n",
        f"#define SCALE_KIND 0\n#define SCALE_COLUMNS 64\n#define DIVIDED {divided}\n",
        "typedef unsigned int u32;\ntypedef unsigned long long u64;",
        section("few_codes.cuh", "#define THREADS", "__device__ inline void fill_tables"),
        section("few_codes.cuh", "// n / d of numbers", "// Asks for the second-level"),
        section("skinny_shape.cuh", "#define TOKENS", None),
        section("skinny_work.cuh", "struct Shared", "// The matrix of the lane's expert"),
        section("skinny.cu", "// Where a block's share", "extern __shared__"),
        HARNESS,
    ]
    (tmp_path / "work.cpp").write_text("\n".join(parts))
    subprocess.run([compiler, "-std=c++17", "-O1", "-o", tmp_path / "work", tmp_path / "work.cpp"], check=True)
    assert subprocess.run([tmp_path / "work"], capture_output=True, text=True).stdout == "ok"


@pytest.fixture(params=[H100, SMALL], ids=["h100", "small"])
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    found: dict[str, int] = request.param
    monkeypatch.setattr(skinny, "multiprocessors", lambda device: found["processors"])
    monkeypatch.setattr(skinny, "shared_limit", lambda device: found["shared"])
    for kept in (skinny.splits_for, skinny.most_tokens):
        kept.cache_clear()
    return found


@pytest.mark.parametrize(
    ("rows", "K", "levels", "block"),
    [
        ((24576, 8192), 6144, "nf4", 64),
        ((6144,), 8192, "nf4", 64),
        ((6144,), 9216, "int4", 128),
        ((64,), 256, "int4", 32),
    ],
)
@pytest.mark.parametrize("M", [1, 3, 8])
def test_work_fits_into_shared_memory(
    rows: tuple[int, ...], K: int, levels: str, block: int, M: int, card: dict[str, int]
) -> None:
    layout = TileLayout.make(rows, K, levels, block, True)  # type: ignore[arg-type]
    assert layout is not None
    device = torch.device("cuda", 0)
    most = skinny.most_tokens(layout, device, False)
    assert most >= (64 if card is H100 else 1)
    M = min(M, most)
    splits = skinny.splits_for(layout, M, device)
    shape = skinny._shape(layout, min(8, M), splits, skinny._lists_nbytes(M, 1, 0), card["shared"])
    assert 2 <= shape.slots <= 6 and shape.nbytes <= card["shared"]
    assert shape.segment_tiles >= 8 and (card is SMALL or shape.warps == skinny.WARPS[0])


def test_experts_fit_into_shared_memory(card: dict[str, int]) -> None:
    gate_up = TileLayout.make((9216, 9216), 6144, "nf4", 64, True, True)
    down = TileLayout.make((6144,), 9216, "nf4", 64, True)
    assert gate_up is not None and down is not None
    device, chosen = torch.device("cuda", 0), (2, 32)
    most = skinny.most_tokens(gate_up, device, True, *chosen), skinny.most_tokens(down, device, False, *chosen)
    assert most == (64, 64) if card is H100 else min(most) >= 1


def test_remainders_are_cut_up(card: dict[str, int]) -> None:
    """288 tiles on 132 processors would leave a quarter of the time idle; 1024 leave 3 %."""
    if card is not H100:
        pytest.skip("written for 132 processors")
    device = torch.device("cuda", 0)
    odd, even = (TileLayout.make((n,), 6144, "nf4", 64, True) for n in (9216, 32768))
    assert odd is not None and even is not None
    assert skinny.splits_for(odd, 1, device) > 1 and skinny.splits_for(even, 1, device) == 1


def test_shares_end_where_splits_do(card: dict[str, int]) -> None:
    """Three splits of 288 tiles divide well among 132 processors, but some blocks would have parts of two of them."""
    if card is not H100:
        pytest.skip("written for 132 processors")
    assert skinny._cut_by_groups(3, 288, 132) and not skinny._cut_by_groups(4, 288, 132)
    assert not skinny._cut_by_groups(1, 288, 132)
    layout = TileLayout.make((9216,), 6144, "int4", 128, True)
    assert layout is not None and [skinny.splits_for(layout, M, torch.device("cuda", 0)) for M in (1, 8)] == [4] * 2
