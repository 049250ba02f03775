// Slice, statistics and sketch of rows of an activation, as checkpoints/summary.py defines them: what all kernels share.

#ifndef INFINITY                 // NVRTC has no math.h
#define INFINITY __int_as_float(0x7f800000)
#endif

#define SKETCH 32
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

__device__ __forceinline__ float value_at(const Row& row, int e) {   // bypassing the L1 cache: other multiprocessors make values
    if (row.outer == 1 && !row.peaks) return __ldcg(row.base + e);
    int o = e / row.inner;
    float x = __ldcg(row.base + (long long)o * row.outer_stride + (e - o * row.inner));
    return row.peaks ? expf(x * row.scale - __ldcg(row.peaks + 2 * o)) * __ldcg(row.peaks + 2 * o + 1) : x;
}

// x as a double, its sign turned where bit j of `flips` is set, j the lane: what projection j adds.
__device__ __forceinline__ double signed_by(unsigned flips, float x) {
    return (double)__uint_as_float(__float_as_uint(x) ^ (flips << (31 - (threadIdx.x & 31)) & 0x80000000u));
}

struct Best { float size; int at; };
__device__ __forceinline__ Best better(Best a, Best b) {   // the larger; of equal ones the first
    return (b.size > a.size || (b.size == a.size && b.at < a.at)) ? b : a;
}

// Statistics of the elements that a lane, or after `reduce` a warp, has seen.
struct Statistics {
    double sum = 0, squares = 0, future = 0;
    float low = INFINITY, high = -INFINITY;
    int bad = 0;
    Best best = {-1.f, 0x7fffffff};

    // One more element; what the sketch takes of it.
    __device__ __forceinline__ float take(float raw, int e) {
        const bool finite = isfinite(raw);
        const float x = finite ? raw : 0.f;
        if (finite) { low = fminf(low, x); high = fmaxf(high, x); } else bad++;
        best = better(best, Best{fabsf(x), e});
        sum += (double)x;
        squares += (double)x * x;
        return x;
    }
    __device__ __forceinline__ void reduce() {
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
    }
    __device__ __forceinline__ void put(double* s) const {
        s[0] = sum; s[1] = squares; s[2] = low; s[3] = high; s[4] = bad; s[5] = best.size; s[6] = best.at; s[7] = future;
    }
};
__device__ __forceinline__ double nothing(int which) { return which == 2 ? INFINITY : which == 3 ? -INFINITY : which == 5 ? -1 : 0; }

// One more value of statistic `which` (of those after the sketch); a largest value has its index beside it.
__device__ __forceinline__ void join(int which, double& stat, double& at, double other, double index) {
    if (which != 2 && which != 3 && which != 5) { stat += other; return; }
    const bool takes_over = which == 2 ? other < stat : other > stat || (which == 5 && other == stat && index < at);
    stat = takes_over ? other : stat;
    at = takes_over ? index : at;
}

// One record: float64 stats[8] (n, sum, l2, min, max, nonfinite, absmax_at, future_mass), float32 sketch[32], values[slice].
struct Record {
    double stats[8];
    float sketch[SKETCH], values[1];
};
// Its statistics, of p[8] as `Statistics::put` leaves them.
__device__ __forceinline__ void write_statistics(const Row& row, const double* p, Record* record) {
    const int n = row.inner * row.outer;
    const bool none = p[4] == (double)n;
    double* stats = record->stats;
    stats[0] = n; stats[1] = p[0]; stats[2] = sqrt(p[1]); stats[3] = none ? 0. : p[2]; stats[4] = none ? 0. : p[3];
    stats[5] = p[4]; stats[6] = p[6]; stats[7] = row.later > 0 ? p[7] / row.outer : 0.;
}
// Its slice, by `threads` threads of which this is one.
__device__ __noinline__ void write_slice(const Row& row, int slice, Record* record, int thread, int threads) {
    const int n = row.inner * row.outer;
    #pragma unroll 1
    for (int i = thread; i < slice; i += threads) record->values[i] = i < n ? value_at(row, i) : __int_as_float(0x7fc00000);
}
__device__ __forceinline__ Record* record_of(char* records, int bytes, int index) { return (Record*)(records + (long long)index * bytes); }

enum { PLAIN, CAUSAL, CACHED, LAST };

__device__ __forceinline__ Row row_of(const float* base, int kind, int t, int seen, int T, int S, int heads, int width) {
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
