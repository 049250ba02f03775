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

// One more value of statistic `which` (of those after the sketch); a largest value has its index beside it.
__device__ __forceinline__ void join(int which, double& stat, double& at, double other, double index) {
    if (which == 2) stat = fmin(stat, other);
    else if (which == 3) stat = fmax(stat, other);
    else if (which == 5) { if (other > stat || (other == stat && index < at)) { stat = other; at = index; } }
    else stat += other;
}

// The block's chunk [from, to) of a row -> part[PART] in shared memory (complete after the closing barrier).
//
// PAIRS pairs of elements are unrolled: all 16 where a kernel runs long, few where it runs for microseconds.
template <int PAIRS, int TOGETHER> __device__ void accumulate(const Row& row, int from, int to, double* part) {
    __shared__ double2 lanes[WARPS][32];                   // x and the hash of 32 elements, read by all lanes
    __shared__ double sums[WARPS][PART];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    double even = 0, odd = 0, sum = 0, squares = 0, future = 0;
    float low = INFINITY, high = -INFINITY;
    int bad = 0;
    Best best = {-1.f, 0x7fffffff};
    #pragma unroll 1
    for (int start = from + warp * 32; start < to; start += TOGETHER * WARPS * 32) {
        float raws[TOGETHER];                                  // under way together: a short kernel is all latency
        #pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const int e = start + i * WARPS * 32 + lane;
            raws[i] = e < to ? element(row, e) : 0.f;
        }
        #pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const int e = start + i * WARPS * 32 + lane;
            if (e - lane >= to) break;
            float x = 0.f;
            if (e < to) {
                const float raw = raws[i];
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
            #pragma unroll PAIRS
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
            if (isfinite(x)) future += x;
        }
    #pragma unroll 1
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

// All chunks of a row -> part, by the whole block: of the sketch each warp adds up every eighth chunk, lane j projection j; of
// the statistics warp i takes the i-th.
__device__ void add_up(const double* chunks, int count, double* part) {
    __shared__ double groups[WARPS][SKETCH];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    double total = 0, stat = warp == 2 ? INFINITY : warp == 3 ? -INFINITY : warp == 5 ? -1 : 0, at = 2147483647.;
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
        stats[5] = p[4]; stats[6] = p[6]; stats[7] = row.later > 0 ? p[7] / row.outer : 0.;
    }
    #pragma unroll 1
    for (int i = threadIdx.x; i < slice; i += blockDim.x)
        values[i] = i < n ? element(row, i) : __int_as_float(0x7fc00000);
}

// Chunk `chunk` of a row whose chunks share `chunks` and `counter`; the last block to arrive writes the record.
template <int PAIRS, int TOGETHER> __device__ void summarise(const Row& row, int chunk, int size, int slice, double* chunks, unsigned* counter, char* record) {
    __shared__ double part[PART];
    __shared__ bool last;
    const int n = row.inner * row.outer, count = (n + size - 1) / size;
    if (chunk >= count) return;
    accumulate<PAIRS, TOGETHER>(row, chunk * size, min(n, (chunk + 1) * size), part);
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
    summarise<16, 2>(row, blockIdx.x, size, slice, chunks + (long long)r * gridDim.x * PART, counters + r, records + (long long)r * bytes);
}

// The points of one decode step, whose values lie where `decode.cu` left them: a block for each chunk of each point.
struct Point {
    const float *base, *peaks;   // peaks: kq_soft_max is made from kq
    long long kind, width, heads, stride, offset;   // LAST: row `seen - 1` of a cache; offset: of its chunks
    double scale;
    long long index, chunk;      // of the point, and which of its chunks
};

extern "C" __global__ void __launch_bounds__(256) summarise_points(
        const Point* work, const int* seen, int size, int slice, int bytes,
        double* chunks, unsigned* counters, char* records) {
    const Point mine = work[blockIdx.x];
    const int now = *seen, kind = mine.kind == LAST ? PLAIN : (int)mine.kind, t = mine.kind == LAST ? now - 1 : 0;
    Row row = row_of(mine.base, kind, t, now, 1, (int)mine.stride, (int)mine.heads, (int)mine.width);
    row.later = 0;
    row.peaks = mine.peaks;
    row.scale = (float)mine.scale;
    summarise<2, 4>(row, (int)mine.chunk, size, slice, chunks + mine.offset * PART, counters + mine.index, records + mine.index * bytes);
}
