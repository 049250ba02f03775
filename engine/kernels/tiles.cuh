// Products of F16 rows in shared memory with halves of activations, by the tensor cores.
//
// A warp takes 64 columns of all its block's rows at a time, so that it reads its activations once; the sums of the warps are added up
// afterwards, in their order. A matrix instruction takes 16 rows and 16 columns; of its eight vectors two are used, the high and the low halves.
// Which columns a lane's bytes belong to is the same for weights and activations, so that each lane loads 16 neighbouring bytes of either.

#include "near.cuh"

__device__ __forceinline__ uint4 near_words(unsigned address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}

// 64 columns of a row, 32 and 32. Rows begin at the same bank: lanes of odd rows read the second 32 first.
struct Columns { uint4 first, second; };
__device__ __forceinline__ Columns columns_of(unsigned row, int group) {
    const int lane = threadIdx.x & 31, odd = lane >> 2 & 1;
    const unsigned at = row + group * 128 + (lane & 3) * 16;
    const uint4 a = near_words(at + odd * 64), b = near_words(at + 64 - odd * 64);
    return odd ? Columns{b, a} : Columns{a, b};
}

// 64 activations, and the units of their two blocks; lanes of vectors that are not used hold zeros.
struct Vectors { uint4 first, second; float units[2]; };
__device__ __forceinline__ Vectors vectors_of(const Halves& x, int group) {
    const int lane = threadIdx.x & 31, vector = lane >> 2;
    Vectors v = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0), {x.unit[2 * group], x.unit[2 * group + 1]}};
    if (vector < 2) {
        const unsigned at = near_address(vector ? x.low : x.high) + group * 128 + (lane & 3) * 16;
        v.first = near_words(at);
        v.second = near_words(at + 64);
    }
    return v;
}

// 16 rows of which this lane has parts of two, times 16 columns, twice: what comes of the high and of the low half of both rows.
__device__ __forceinline__ void multiply_tile(float (&c)[4], const uint4& top, const uint4& bottom, const uint4& x) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(top.x), "r"(bottom.x), "r"(top.y), "r"(bottom.y), "r"(x.x), "r"(x.y));
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(top.z), "r"(bottom.z), "r"(top.w), "r"(bottom.w), "r"(x.z), "r"(x.w));
}

// Adds the products of 64 columns to this lane's sums of a row of the top eight and of one of the bottom eight; lanes 0, 4, 8 … have them.
__device__ __forceinline__ void add_tile(float (&sums)[2], const Columns& top, const Columns& bottom, const Vectors& x) {
    float first[4] = {0.f, 0.f, 0.f, 0.f}, second[4] = {0.f, 0.f, 0.f, 0.f};
    multiply_tile(first, top.first, bottom.first, x.first);
    multiply_tile(second, top.second, bottom.second, x.second);
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        sums[i] = fmaf(x.units[0], fmaf(first[2 * i + 1], LOW_SHARE, first[2 * i]), sums[i]);
        sums[i] = fmaf(x.units[1], fmaf(second[2 * i + 1], LOW_SHARE, second[2 * i]), sums[i]);
    }
}

// The rows [first, last) of gate and up times D activations: s.part[warp][row of gate, or 8 + row of up, by eights].
__device__ __forceinline__ void gate_up_tiles(Shared& s, int first, int last) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const unsigned gate = near_address(s.near_gate.low), up = near_address(s.near_up.low);
    float sums[GATE_TILES][2];
    #pragma unroll
    for (int t = 0; t < GATE_TILES; t++) sums[t][0] = sums[t][1] = 0.f;
    #pragma unroll 1
    for (int group = warp; group < D / 64; group += WARPS) {
        const Vectors x = vectors_of(s.halves, group);
        #pragma unroll
        for (int t = 0; t < GATE_TILES; t++) {
            const unsigned row = max(first, min(first + 8 * t + (lane >> 2), last - 1)) * (D * 2);
            add_tile(sums[t], columns_of(gate + row, group), columns_of(up + row, group), x);
        }
    }
    if (warp < GATE_SLOTS && lane % 4 == 0)
        #pragma unroll
        for (int t = 0; t < GATE_TILES; t++) {
            s.part[(warp * GATE_TILES + t) * 16 + lane / 4] = sums[t][0];
            s.part[(warp * GATE_TILES + t) * 16 + 8 + lane / 4] = sums[t][1];
        }
}
// The sum of all warps, behind a barrier: of a row of gate, or with `up` of up.
__device__ __forceinline__ float gate_up_sum(const Shared& s, int row, bool up) {
    const int at = row / 8 * 16 + up * 8 + row % 8;
    float sum = 0.f;
    #pragma unroll
    for (int w = 0; w < GATE_SLOTS; w++) sum += s.part[w * GATE_TILES * 16 + at];
    return sum;
}

// At most eight rows [first, last) of down times FF activations: s.part[warp][row].
__device__ __forceinline__ void down_tile(Shared& s, int first, int last) {
    constexpr int GROUPS = FF / 64, ROUNDS = (GROUPS + WARPS - 1) / WARPS;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const unsigned row = near_address(s.near_down.low) + max(first, min(first + (lane >> 2), last - 1)) * (FF * 2);
    const Columns none = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
    float sums[2] = {0.f, 0.f};
    #pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        const int group = warp + i * WARPS;
        if (group < GROUPS) add_tile(sums, columns_of(row, group), none, vectors_of(s.halves, group));
    }
    if (lane % 4 == 0) s.part[warp * 8 + lane / 4] = sums[0];
}
__device__ __forceinline__ float down_sum(const Shared& s, int row) {
    float sum = 0.f;
    #pragma unroll
    for (int w = 0; w < WARPS; w++) sum += s.part[w * 8 + row];
    return sum;
}
