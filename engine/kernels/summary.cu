// Slice, statistics and sketch of rows of an activation, as checkpoints/summary.py defines them.
//
// A row may be long (the logits) and there may be many (a prefill): the grid is cut into chunks of rows, each block
// accumulates one chunk in float64, and the block that finishes a row last adds up its chunks, always in the same order.

#include "summary.cuh"

#define WARPS 8                  // 256 threads a block
#define TOGETHER 2               // elements of a lane

// The block's chunk [from, to) of a row -> part[PART] in shared memory (complete after the closing barrier).
__device__ void accumulate(const Row& row, int from, int to, double* part) {
    __shared__ double2 lanes[WARPS][32];                   // x and the hash of 32 elements, read by all lanes
    __shared__ double sums[WARPS][PART];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    double even = 0, odd = 0;
    Statistics seen;
    #pragma unroll 1
    for (int start = from + warp * 32; start < to; start += TOGETHER * WARPS * 32) {
        float raws[TOGETHER];                                  // requested together
        #pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const int e = start + i * WARPS * 32 + lane;
            raws[i] = e < to ? value_at(row, e) : 0.f;
        }
        #pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const int e = start + i * WARPS * 32 + lane;
            if (e - lane >= to) break;
            const float x = e < to ? seen.take(raws[i], e) : 0.f;
            __syncwarp();
            lanes[warp][lane] = make_double2(x, __hiloint2double(0, (int)~fmix32((unsigned)e + 1u)));
            __syncwarp();
            #pragma unroll
            for (int k = 0; k < 32; k += 2) {                  // lane j adds to projection j: +x where bit j is set
                double2 a = lanes[warp][k], b = lanes[warp][k + 1];
                unsigned sa = ((unsigned)__double2loint(a.y) << (31 - lane)) & 0x80000000u;
                unsigned sb = ((unsigned)__double2loint(b.y) << (31 - lane)) & 0x80000000u;
                even += __hiloint2double(__double2hiint(a.x) ^ sa, __double2loint(a.x));
                odd += __hiloint2double(__double2hiint(b.x) ^ sb, __double2loint(b.x));
            }
        }
    }
    if (from == 0 && row.later > 0)
        #pragma unroll 1
        for (int i = threadIdx.x; i < row.outer * row.later; i += WARPS * 32) {
            float x = row.base[(long long)(i / row.later) * row.outer_stride + row.inner + i % row.later];
            if (isfinite(x)) seen.future += x;
        }
    seen.reduce();
    sums[warp][lane] = even + odd;
    if (lane == 0) seen.put(sums[warp] + SKETCH);
    __syncthreads();
    if (threadIdx.x < SKETCH) {
        double total = 0;
        #pragma unroll 1
        for (int w = 0; w < WARPS; w++) total += sums[w][threadIdx.x];
        part[threadIdx.x] = total;
    }
    if (threadIdx.x >= SKETCH && threadIdx.x < PART && threadIdx.x != SKETCH + 6) {
        const int which = threadIdx.x - SKETCH;
        double stat = sums[0][SKETCH + which], at = sums[0][SKETCH + 6];
        #pragma unroll 1
        for (int w = 1; w < WARPS; w++) join(which, stat, at, sums[w][SKETCH + which], sums[w][SKETCH + 6]);
        part[SKETCH + which] = stat;
        if (which == 5) part[SKETCH + 6] = at;
    }
    __syncthreads();
}

// All chunks of a row -> part, by the whole block: each warp adds up every eighth chunk of the sketch, lane j projection j;
// warp i takes the i-th statistic.
__device__ void add_up(const double* chunks, int count, double* part) {
    __shared__ double groups[WARPS][SKETCH];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    double total = 0, stat = nothing(warp), at = 2147483647.;
    #pragma unroll 10
    for (int c = warp; c < count; c += WARPS) total += __ldcg(chunks + (long long)c * PART + lane);
    #pragma unroll 5
    for (int c = lane; c < count; c += 32) {
        const double* statistics = chunks + (long long)c * PART + SKETCH;
        join(warp, stat, at, __ldcg(statistics + warp), __ldcg(statistics + 6));
    }
    #pragma unroll 1
    for (int step = 16; step; step >>= 1) {
        const double other = __shfl_xor_sync(~0u, stat, step), index = __shfl_xor_sync(~0u, at, step);
        join(warp, stat, at, other, index);
    }
    groups[warp][lane] = total;
    if (lane == 0 && warp != 6) part[SKETCH + warp] = stat;
    if (lane == 0 && warp == 5) part[SKETCH + 6] = at;
    __syncthreads();
    if (threadIdx.x < SKETCH) {
        double sum = 0;
        #pragma unroll 1
        for (int g = 0; g < WARPS; g++) sum += groups[g][threadIdx.x];
        part[threadIdx.x] = sum;
    }
    __syncthreads();
}

// A row's record, of part[PART].
__device__ void finish(const Row& row, const double* part, int slice, Record* record) {
    if (threadIdx.x < SKETCH) record->sketch[threadIdx.x] = (float)part[threadIdx.x];
    if (threadIdx.x == SKETCH) write_statistics(row, part + SKETCH, record);
    write_slice(row, slice, record, threadIdx.x, WARPS * 32);
}

// Chunk `chunk` of a row whose chunks share `chunks` and `counter`; the last block to arrive writes the record.
__device__ void summarise(const Row& row, int chunk, int size, int slice, double* chunks, unsigned* counter, Record* record) {
    __shared__ double part[PART];
    __shared__ bool last;
    const int n = row.inner * row.outer, count = (n + size - 1) / size;
    if (chunk >= count) return;
    accumulate(row, chunk * size, min(n, (chunk + 1) * size), part);
    if (count > 1) {
        if (threadIdx.x < PART) __stcg(chunks + (long long)chunk * PART + threadIdx.x, part[threadIdx.x]);
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) last = atomicInc(counter, count - 1) == count - 1;   // wraps to 0 for the next use
        __syncthreads();
        if (!last) return;
        __threadfence();
        add_up(chunks, count, part);
    }
    finish(row, part, slice, record);
}

// Kept rows of one value. PLAIN: [T, width]; CAUSAL: [heads, T, S]; CACHED: [S, width]. Grid (chunks, rows).
extern "C" __global__ void __launch_bounds__(256) summarise_value(
        const float* value, int kind, int T, int S, int heads, int width, const int* kept, const int* seen,
        int size, int slice, int bytes, double* chunks, unsigned* counters, char* records) {
    const int r = blockIdx.y;
    Row row = row_of(value, kind, kept[r], seen[r], T, S, heads, width);
    summarise(row, blockIdx.x, size, slice, chunks + (long long)r * gridDim.x * PART, counters + r, record_of(records, bytes, r));
}
