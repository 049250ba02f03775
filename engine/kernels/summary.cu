// Slice, statistics and sketch of rows of an activation, as checkpoints/summary.py defines them.
//
// A row may be long (the logits) and there may be many (a prefill): the grid is cut into chunks of rows, each block
// accumulates one chunk in float64, and the block that finishes a row last adds up its chunks, always in the same order.

#ifndef INFINITY                 // NVRTC has no math.h
#define INFINITY __int_as_float(0x7f800000)
#endif

#define SKETCH 32
#define WARPS 8                  // 256 threads a block
#define PART (SKETCH + 8)        // doubles of a chunk: sketch, sum, squares, min, max, non-finite, |max|, its index, future mass

// One kept row of a point: element e lies at base + (e / inner) * outer_stride + e % inner, e < inner * outer.
struct Row {
    const float* base;
    long long outer_stride;
    int inner, outer;
    int later;                   // softmax: columns after this position, whose weight is `future_mass`
    float scale;                 // with `peaks`: the element is exp(x * scale - peak) * share
    const float* peaks;          // [outer][2] peak and share, or null where elements are taken as they are
};

__device__ __forceinline__ unsigned fmix32(unsigned h) {
    h ^= h >> 16; h *= 0x85EBCA6Bu; h ^= h >> 13; h *= 0xC2B2AE35u; return h ^ (h >> 16);
}

__device__ __forceinline__ float element(const Row& row, int e) {
    if (row.outer == 1 && !row.peaks) return row.base[e];
    int o = e / row.inner;
    float x = row.base[(long long)o * row.outer_stride + (e - o * row.inner)];
    return row.peaks ? expf(x * row.scale - row.peaks[2 * o]) * row.peaks[2 * o + 1] : x;
}

struct Best { float size; int at; };
__device__ __forceinline__ Best better(Best a, Best b) {   // the larger; of equal ones the first
    return (b.size > a.size || (b.size == a.size && b.at < a.at)) ? b : a;
}

// The block's chunk [from, to) of a row -> part[PART] in shared memory (complete after the closing barrier).
__device__ void accumulate(const Row& row, int from, int to, double* part) {
    __shared__ double2 lanes[WARPS][32];                   // x and the hash of 32 elements, read by all lanes
    __shared__ double sums[WARPS][PART];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    double even = 0, odd = 0, sum = 0, squares = 0, future = 0;
    float low = INFINITY, high = -INFINITY;
    int bad = 0;
    Best best = {-1.f, 0x7fffffff};
    for (int start = from + warp * 32; start < to; start += WARPS * 32) {
        int e = start + lane;
        float x = 0.f;
        if (e < to) {
            float raw = element(row, e);
            bool finite = isfinite(raw);
            x = finite ? raw : 0.f;
            if (finite) { low = fminf(low, x); high = fmaxf(high, x); } else bad++;
            best = better(best, Best{fabsf(x), e});
        }
        double wide = x;
        sum += wide;
        squares += wide * wide;
        __syncwarp();
        lanes[warp][lane] = make_double2(wide, __hiloint2double(0, (int)~fmix32((unsigned)e + 1u)));
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
    if (from == 0 && row.later > 0)
        for (int i = threadIdx.x; i < row.outer * row.later; i += WARPS * 32) {
            float x = row.base[(long long)(i / row.later) * row.outer_stride + row.inner + i % row.later];
            if (isfinite(x)) future += x;
        }
    for (int step = 16; step; step >>= 1) {
        sum += __shfl_xor_sync(~0u, sum, step);
        squares += __shfl_xor_sync(~0u, squares, step);
        future += __shfl_xor_sync(~0u, future, step);
        bad += __shfl_xor_sync(~0u, bad, step);
        low = fminf(low, __shfl_xor_sync(~0u, low, step));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, step));
        best = better(best, Best{__shfl_xor_sync(~0u, best.size, step), __shfl_xor_sync(~0u, best.at, step)});
    }
    sums[warp][lane] = even + odd;
    if (lane == 0) {
        double* s = sums[warp] + SKETCH;
        s[0] = sum; s[1] = squares; s[2] = low; s[3] = high; s[4] = bad; s[5] = best.size; s[6] = best.at; s[7] = future;
    }
    __syncthreads();
    if (threadIdx.x < SKETCH) {
        double total = 0;
        for (int w = 0; w < WARPS; w++) total += sums[w][threadIdx.x];
        part[threadIdx.x] = total;
    }
    if (threadIdx.x == SKETCH) {
        double* p = part + SKETCH;
        for (int i = 0; i < 8; i++) p[i] = sums[0][SKETCH + i];
        for (int w = 1; w < WARPS; w++) {
            const double* s = sums[w] + SKETCH;
            p[0] += s[0]; p[1] += s[1]; p[4] += s[4]; p[7] += s[7];
            p[2] = fmin(p[2], s[2]); p[3] = fmax(p[3], s[3]);
            if (s[5] > p[5] || (s[5] == p[5] && s[6] < p[6])) { p[5] = s[5]; p[6] = s[6]; }
        }
    }
    __syncthreads();
}

// All chunks of a row -> part, by the whole block: 8 warps share the chunks, then their results are put together. Lane j
// adds projection j; of the statistics lane i < 8 takes the i-th (with the index of |max| beside it, for lane 5).
__device__ void add_up(const double* chunks, int count, double* part) {
    __shared__ double groups[WARPS][PART];
    const int group = threadIdx.x >> 5, lane = threadIdx.x & 31, which = lane & 7;
    double total = 0, stat = which == 2 ? INFINITY : which == 3 ? -INFINITY : which == 5 ? -1 : 0, at = 2147483647.;
    #pragma unroll 4
    for (int c = group; c < count; c += WARPS) {
        const double* chunk = chunks + (long long)c * PART;
        const double projection = __ldcg(chunk + lane), mine = __ldcg(chunk + SKETCH + which), index = __ldcg(chunk + SKETCH + 6);
        total += projection;
        if (which == 2) stat = fmin(stat, mine);
        else if (which == 3) stat = fmax(stat, mine);
        else if (which == 5) { if (mine > stat || (mine == stat && index < at)) { stat = mine; at = index; } }
        else stat += mine;
    }
    groups[group][lane] = total;
    if (lane < 8 && lane != 6) groups[group][SKETCH + lane] = stat;
    if (lane == 5) groups[group][SKETCH + 6] = at;
    __syncthreads();
    if (threadIdx.x < SKETCH) {
        double sum = 0;
        for (int g = 0; g < WARPS; g++) sum += groups[g][threadIdx.x];
        part[threadIdx.x] = sum;
    }
    if (threadIdx.x == SKETCH) {
        double* p = part + SKETCH;
        for (int i = 0; i < 8; i++) p[i] = groups[0][SKETCH + i];
        for (int g = 1; g < WARPS; g++) {
            const double* s = groups[g] + SKETCH;
            p[0] += s[0]; p[1] += s[1]; p[4] += s[4]; p[7] += s[7];
            p[2] = fmin(p[2], s[2]); p[3] = fmax(p[3], s[3]);
            if (s[5] > p[5] || (s[5] == p[5] && s[6] < p[6])) { p[5] = s[5]; p[6] = s[6]; }
        }
    }
    __syncthreads();
}

// One record: float64 stats[8] (n, sum, l2, min, max, nonfinite, absmax_at, future_mass), float32 sketch[32], values[slice].
__device__ void finish(const Row& row, const double* part, int slice, char* record) {
    const int n = row.inner * row.outer;
    double* stats = (double*)record;
    float* sketch = (float*)(stats + 8);
    float* values = sketch + SKETCH;
    if (threadIdx.x < SKETCH) sketch[threadIdx.x] = (float)part[threadIdx.x];
    if (threadIdx.x == SKETCH) {
        const double* p = part + SKETCH;
        bool none = p[4] == (double)n;
        stats[0] = n; stats[1] = p[0]; stats[2] = sqrt(p[1]); stats[3] = none ? 0. : p[2]; stats[4] = none ? 0. : p[3];
        stats[5] = p[4]; stats[6] = p[6]; stats[7] = p[7] / row.outer;
    }
    for (int i = threadIdx.x; i < slice; i += blockDim.x)
        values[i] = i < n ? element(row, i) : __int_as_float(0x7fc00000);
}

// Chunk `chunk` of a row whose chunks share `chunks` and `counter`; the last block to arrive writes the record.
__device__ void summarise(const Row& row, int chunk, int size, int slice, double* chunks, unsigned* counter, char* record) {
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

enum { PLAIN, CAUSAL, CACHED, LAST };

__device__ Row row_of(const float* base, int kind, int t, int seen, int T, int S, int heads, int width) {
    Row row = {base, 0, width, 1, 0, 0.f, nullptr};
    if (kind == PLAIN) row.base += (long long)t * width;
    else if (kind == CACHED) row.inner = seen * width;
    else {
        row.base += (long long)t * S;
        row.outer_stride = (long long)T * S;
        row.inner = seen;
        row.outer = heads;
        row.later = S - seen;
    }
    return row;
}

// Kept rows of one value. PLAIN: [T, width]; CAUSAL: [heads, T, S]; CACHED: [S, width]. Grid (chunks, rows).
extern "C" __global__ void __launch_bounds__(256) summarise_value(
        const float* value, int kind, int T, int S, int heads, int width, const int* kept, const int* seen,
        int size, int slice, int bytes, double* chunks, unsigned* counters, char* records) {
    const int r = blockIdx.y;
    Row row = row_of(value, kind, kept[r], seen[r], T, S, heads, width);
    summarise(row, blockIdx.x, size, slice, chunks + (long long)r * gridDim.x * PART, counters + r, records + (long long)r * bytes);
}

// The points of one decode step, whose values lie where `decode.cu` left them: one block for each (point, chunk) of `work`.
struct Point {
    const float *base, *peaks;   // peaks: kq_soft_max is made from kq
    long long kind, width, heads, stride, offset;   // LAST: row `seen - 1` of a cache; offset: of its chunks
    double scale;
};

extern "C" __global__ void __launch_bounds__(256) summarise_points(
        const Point* points, const int2* work, const int* seen, int size, int slice, int bytes,
        double* chunks, unsigned* counters, char* records) {
    const int2 mine = work[blockIdx.x];
    const Point p = points[mine.x];
    const int kind = p.kind == LAST ? PLAIN : (int)p.kind;
    Row row = row_of(p.base, kind, p.kind == LAST ? *seen - 1 : 0, *seen, 1, (int)p.stride, (int)p.heads, (int)p.width);
    row.later = 0;
    row.peaks = p.peaks;
    row.scale = (float)p.scale;
    summarise(row, mine.y, size, slice, chunks + p.offset * PART, counters + mine.x, records + (long long)mine.x * bytes);
}
