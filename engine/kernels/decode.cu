// One decode step of a Llama-shaped model as one kernel: a block on every multiprocessor, five phases a layer with a
// barrier of the whole grid between them, then the logits and the greedy choice.
//
// Each block owns the same rows of a matrix in every step. While it works on one phase, the rows it will need in the next
// ones are already on their way to the L2 cache: the barriers' latency and the memory's then overlap. Every intermediate
// value of the step has a place of its own in memory, so that what is captured is read when the step is over.
//
// Given at compile time: LAYERS D HEADS KV_HEADS HEAD FF VOCAB ROPE NEOX POSITIONS (places of the cache) BLOCKS SPLITS.

#include "weights.cuh"

#define THREADS 512              // that compute; one more warp brings weights near
#define WARPS (THREADS / 32)
#define QW (HEADS * HEAD)
#define KW (KV_HEADS * HEAD)
#define GROUP (HEADS / KV_HEADS)
#define LOGITS_AHEAD 128         // rows of the output matrix that a block asks for during the last layer's end
#define SPLIT_ROWS 64            // positions a block attends to before a head is split over several blocks

// A barrier of the computing warps only.
__device__ __forceinline__ void block_sync() { asm volatile("bar.sync 1, %0;" :: "n"(THREADS) : "memory"); }

struct Layer {
    Matrix q, k, v, o, gate, up, down;
    const float *attn_norm, *ffn_norm;
    // what the step makes, each with a place of its own
    float *attn_norm_out, *q_out, *k_out, *v_out, *q_rope, *k_cache, *v_cache, *kq, *peaks, *kqv_out, *attn_out, *ffn_inp;
    float *ffn_norm_out, *gate_out, *up_out, *swiglu, *ffn_out, *l_out;
};
struct State { int token, position, seen; unsigned step; };
struct Model {
    const Layer* layers;
    Matrix embedding, output;
    const float *norm, *cosine, *sine;       // angles [POSITIONS, ROPE / 2]
    float *embd, *output_norm, *logits;
    float *mixed, *sums;                     // attention's parts: [HEADS][SPLITS][HEAD], [HEADS][SPLITS][2]
    float2* best;                            // [BLOCKS] largest logit and its id (as int bits)
    State* state;
    int* tokens;                             // [POSITIONS] chosen token of each position
    unsigned* arrived;                       // the grid's barrier
};

// Rows on their way to the L2 cache: one instruction a plane, by one thread.
__device__ __forceinline__ void prefetch(const void* plane, long long from, unsigned bytes) {
    const unsigned long long start = ((unsigned long long)plane + from) & ~15ull;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(start), "r"((bytes + 15) & ~15u));
}
__device__ __forceinline__ void prefetch_rows(const Matrix& m, int first, int count, int cols) {
    const int low = eighths(type_of(m), LOW_PLANE) * (cols / 32) / 8, scales = eighths(type_of(m), SCALES_PLANE) * (cols / 32) / 8;
    prefetch(m.low, (long long)first * low, count * low);
    if (scales) prefetch(m.scales, (long long)first * scales, count * scales);
}

// The grid's barrier, in two halves. `count` goes on from step to step; differences are taken modulo 2^32.
__device__ __forceinline__ void arrive(unsigned* arrived) {
    block_sync();
    if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(arrived) : "memory");
}
__device__ __forceinline__ void wait(unsigned* arrived, unsigned until) {
    if (threadIdx.x == 0) {
        unsigned seen;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
        while ((int)(seen - until) < 0);
    }
    block_sync();
}

// Shared memory for this block's rows of a layer's gate and up, and of its down; 0 where they do not fit.
#ifndef GATE_BYTES
#define GATE_BYTES 0
#define DOWN_BYTES 0
#endif
#define NEAR (GATE_BYTES > 0)

// Warps that share a row. Measured with F16 on a 0.5 B model (BENCHMARKS.md): half or twice of any of them is slower.
#ifndef QKV_WARPS
#define QKV_WARPS 4
#endif
#ifndef OUT_WARPS
#define OUT_WARPS 4
#endif
#ifndef GATE_WARPS
#define GATE_WARPS 2
#endif
#ifndef DOWN_WARPS
#define DOWN_WARPS 4
#endif

#define PAIRS ((QW + 2 * KW) / 2)     // rows of Q, K and V, two by two
#define SHARE(COUNT) ((COUNT) / BLOCKS + 1)   // things of a block at most
constexpr int most(int a, int b) { return a > b ? a : b; }
constexpr int PARTS = most(most(SHARE(PAIRS) * 2 * QKV_WARPS, SHARE(FF) * 2 * GATE_WARPS),
                           most(SHARE(D) * most(OUT_WARPS, DOWN_WARPS), 2 * WARPS));

struct Shared {
    Layer layer[2];              // pointers of this layer and the next: read from memory once, ahead of time
    __align__(16) float x[most(most(most(FF, D), QW) * 9 / 8 + 32, SPLIT_ROWS * 64)];   // activations, or scores of one head
    float part[PARTS];           // sums of rows by the warps that share them
    double norm[WARPS];
    float mixed[WARPS][HEAD];
    unsigned long long full[2], used[2];   // barriers of the weights brought near: gate and up, down
    Matrix near_gate, near_up, near_down;
    __align__(16) char weights[GATE_BYTES + DOWN_BYTES];
};

// x = values · weight / sqrt(mean(values²) + eps), padded, in shared memory; squares are summed in float64 as in ggml.
__device__ __noinline__ void rms_norm(Shared& s, const float* values, const float* weight, float eps, float* out) {
    constexpr int EACH = (D + THREADS - 1) / THREADS;
    float v[EACH], w[EACH];
    double squares = 0;
    #pragma unroll
    for (int i = 0; i < EACH; i++) {
        int e = threadIdx.x + i * THREADS;
        v[i] = e < D ? __ldcg(values + e) : 0.f;
        w[i] = e < D ? __ldg(weight + e) : 0.f;
        squares += (double)v[i] * v[i];
    }
    for (int step = 16; step; step >>= 1) squares += __shfl_xor_sync(~0u, squares, step);
    if ((threadIdx.x & 31) == 0) s.norm[threadIdx.x >> 5] = squares;
    block_sync();
    squares = s.norm[threadIdx.x & (WARPS - 1)];
    for (int step = WARPS / 2; step; step >>= 1) squares += __shfl_xor_sync(~0u, squares, step);
    const float scale = 1.f / sqrtf((float)(squares / D) + eps);
    #pragma unroll
    for (int i = 0; i < EACH; i++) {
        int e = threadIdx.x + i * THREADS;
        if (e < D) {
            float y = v[i] * scale * w[i];
            s.x[padded(e)] = y;
            if (out && blockIdx.x == 0) out[e] = y;
        }
    }
    block_sync();
}

// This block's share of `count` things, as [first, last).
__device__ __forceinline__ int first_of(int count) { return (unsigned)count * blockIdx.x / BLOCKS; }
__device__ __forceinline__ int last_of(int count) { return (unsigned)count * (blockIdx.x + 1) / BLOCKS; }

// The two rows of pair `p` of a projection into heads: a rotated pair, or two rows beyond the rotary dimensions.
__device__ __forceinline__ int2 rows_of_pair(int p) {
    int head = p / (HEAD / 2), i = p % (HEAD / 2), base = head * HEAD;
    if (NEOX && i < ROPE / 2) return make_int2(base + i, base + i + ROPE / 2);
    return make_int2(base + 2 * i, base + 2 * i + 1);
}

template <int GROUPS, int R>
__device__ __forceinline__ void leave_sums(Shared& s, float (&sum)[R], int unit, int group_lane) {
    const int lane = threadIdx.x & 31;
    static_assert(R <= 2, "one or two rows");
    if constexpr (R == 2) {       // each half of the warp goes on with one of the two sums
        const float mine = lane & 16 ? sum[1] : sum[0], other = lane & 16 ? sum[0] : sum[1];
        float half = mine + __shfl_xor_sync(~0u, other, 16);
        #pragma unroll
        for (int step = 8; step; step >>= 1) half += __shfl_xor_sync(~0u, half, step);
        if ((lane & 15) == 0) s.part[(unit * 2 + lane / 16) * GROUPS + group_lane / 32] = half;
    } else {
        #pragma unroll
        for (int step = 16; step; step >>= 1) sum[0] += __shfl_xor_sync(~0u, sum[0], step);
        if (lane == 0) s.part[unit * GROUPS + group_lane / 32] = sum[0];
    }
}
template <int GROUPS>
__device__ __forceinline__ float sum_of(const Shared& s, int index) {
    float sum = 0.f;
    #pragma unroll
    for (int g = 0; g < GROUPS; g++) sum += s.part[index * GROUPS + g];
    return sum;
}

__device__ __forceinline__ const Matrix& qkv_matrix(const Layer& l, int p, int2& rows) {
    if (p < QW / 2) { rows = rows_of_pair(p); return l.q; }
    if (p < (QW + KW) / 2) { rows = rows_of_pair(p - QW / 2); return l.k; }
    rows = make_int2(2 * p - QW - KW, 2 * p - QW - KW + 1);
    return l.v;
}

// By the lanes of one warp: a pair's rows each.
__device__ __forceinline__ void prefetch_qkv(const Layer& l) {
    #pragma unroll 1
    for (int p = first_of(PAIRS) + (threadIdx.x & 31); p < last_of(PAIRS); p += 32) {
        int2 rows;
        const Matrix& m = qkv_matrix(l, p, rows);
        prefetch_rows(m, rows.x, 1, D);
        prefetch_rows(m, rows.y, 1, D);
    }
}
__device__ __forceinline__ void prefetch_mine(const Matrix& m, int rows, int cols) {
    if (threadIdx.x % 32 == 0) prefetch_rows(m, first_of(rows), last_of(rows) - first_of(rows), cols);
}

// The warp that brings weights near: a layer's gate and up as soon as the last ones have been used, then its down.
//
// Small pieces with pauses: a burst would fill the memory's queues, and what the other warps read from the L2 cache, a few
// kilobytes on the critical path, would wait behind it (measured: the whole burst's time is lost then).
#ifndef PIECE
#define PIECE 4096
#define PACE 480                 // cycles from one piece to the next: 16 GB/s a multiprocessor, half of what memory gives
#endif
struct Producer {
    long long next;

    __device__ void plane(unsigned long long* full, char* to, const Place& p) {
        for (unsigned done = 0; done < p.size; done += PIECE) {
            if (PACE) { while (clock64() < next) __nanosleep(40); next = max(next + PACE, clock64()); }
            const unsigned length = min(p.size - done, (unsigned)PIECE);
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                         :: "r"(near_address(to + p.offset + done)), "l"(p.from + done), "r"(length), "r"(near_address(full)) : "memory");
        }
    }
    __device__ void bring(unsigned long long* full, char* to, const Matrix* const* matrices, int count, int first, int rows, int cols) {
        unsigned bytes = 0;
        for (int i = 0; i < count; i++) bytes = places_end(*matrices[i], first, rows, cols, bytes);
        expect(full, bytes);
        unsigned offset = 0;
        for (int i = 0; i < count; i++)
            for (int k = 0; k < 4; k++) {
                const Place p = place_of(*matrices[i], k, first, rows, cols, offset);
                if (p.size) plane(full, to, p);
                offset += p.size;
            }
    }
};

__device__ __noinline__ void produce(Shared& s, const Model& m) {
    const int gate_first = first_of(FF), gate_rows = last_of(FF) - gate_first, down_first = first_of(D), down_rows = last_of(D) - down_first;
    Producer producer = {clock64()};
    for (int i = 0; i < LAYERS; i++) {
        const Layer& l = m.layers[i];
        const Matrix gate = l.gate, up = l.up, down = l.down;
        const Matrix* two[2] = {&gate, &up};
        const Matrix* one[1] = {&down};
        if (i) await(&s.used[0], (i - 1) & 1);
        producer.bring(&s.full[0], s.weights, two, 2, gate_first, gate_rows, D);
        if (i) await(&s.used[1], (i - 1) & 1);
        producer.bring(&s.full[1], s.weights + GATE_BYTES, one, 1, down_first, down_rows, FF);
    }
}

#ifdef PROFILE
__device__ long long marks[BLOCKS][1024];
#define MARK(N) if (threadIdx.x == 0) { marks[blockIdx.x][N] = clock64(); }
#define INSIDE(N) MARK(600 + N)
#else
#define MARK(N)
#define INSIDE(N)
#endif

// Q, K and V of the normalised input; Q and K rotated; K and V into the cache.
struct Projection {
    static const int LANES = QKV_WARPS * 32, UNITS = THREADS / LANES;
    Rows<D, LANES, 2> rows;
    int first, last, lane, mine;
    float2 bias, angle;          // of the pair whose sums this thread will finish

    __device__ __forceinline__ void load(const Model& m, const Layer& l, int position) {
        first = first_of(PAIRS); last = last_of(PAIRS); lane = threadIdx.x % LANES; mine = first + threadIdx.x / LANES;
        if (mine < last) fetch(l, mine);
        const int p = first + threadIdx.x;
        bias = angle = make_float2(0.f, 0.f);
        if (p < last) {
            int2 r;
            const Matrix& w = qkv_matrix(l, p, r);
            if (w.bias) bias = make_float2(__ldg(w.bias + r.x), __ldg(w.bias + r.y));
            const int i = (p < QW / 2 ? p : p - QW / 2) % (HEAD / 2);
            if (p < (QW + KW) / 2 && i < ROPE / 2) {
                const long long at = (long long)position * (ROPE / 2) + i;
                angle = make_float2(__ldg(m.cosine + at), __ldg(m.sine + at));
            }
        }
    }
    __device__ __forceinline__ void fetch(const Layer& l, int p) {
        int2 r;
        const Matrix& w = qkv_matrix(l, p, r);
        const Matrix* both[2] = {&w, &w};
        const int two[2] = {r.x, r.y};
        rows.load(both, two, lane);
    }
    __device__ __forceinline__ void run(Shared& s, const Layer& l, int position) {
        #pragma unroll 1
        for (int p = mine; p < last; p += UNITS) {
            int2 r;
            const Matrix& w = qkv_matrix(l, p, r);
            const Matrix* both[2] = {&w, &w};
            const int two[2] = {r.x, r.y};
            float sum[2];
            rows.dot(both, two, lane, s.x, sum);
            if (p + UNITS < last) fetch(l, p + UNITS);
            leave_sums<QKV_WARPS, 2>(s, sum, p - first, lane);
        }
        block_sync();
        static_assert(SHARE(PAIRS) <= THREADS, "a thread finishes one pair");
        const int u = threadIdx.x, p = first + u;
        if (p >= last) return;
        int2 r;
        qkv_matrix(l, p, r);
        const float a = sum_of<QKV_WARPS>(s, 2 * u) + bias.x, b = sum_of<QKV_WARPS>(s, 2 * u + 1) + bias.y;
        if (p >= (QW + KW) / 2) {
            l.v_out[r.x] = a; l.v_out[r.y] = b;
            float* v = l.v_cache + (long long)position * KW;
            v[r.x] = a; v[r.y] = b;
            return;
        }
        const bool query = p < QW / 2, turned = (query ? p : p - QW / 2) % (HEAD / 2) < ROPE / 2;
        float* before = query ? l.q_out : l.k_out;
        float* after = query ? l.q_rope : l.k_cache + (long long)position * KW;
        before[r.x] = a; before[r.y] = b;
        after[r.x] = turned ? a * angle.x - b * angle.y : a;
        after[r.y] = turned ? a * angle.y + b * angle.x : b;
    }
};

// One head over one share of the positions: raw scores, exp(score · scale − peak) and the values weighted by it.
__device__ void attend(Shared& s, const Model& m, const Layer& l, int head, int split, int splits, int seen, float scale) {
    constexpr int EACH = (HEAD + 31) / 32, HELD = SPLIT_ROWS / WARPS;   // positions of a warp whose K and V are fetched at once
    const int from = seen * split / splits, to = seen * (split + 1) / splits, count = to - from;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const float *keys = l.k_cache + (long long)from * KW + head / GROUP * HEAD, *values = l.v_cache + (keys - l.k_cache);
    float q[EACH], k[HELD][EACH], v[HELD][EACH];
    #pragma unroll
    for (int i = 0; i < EACH; i++) { int e = lane + 32 * i; q[i] = e < HEAD ? __ldcg(l.q_rope + head * HEAD + e) : 0.f; }
    #pragma unroll
    for (int h = 0; h < HELD; h++)
        #pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int e = lane + 32 * i, p = warp + h * WARPS;
            const bool there = e < HEAD && p < count;
            k[h][i] = there ? __ldcg(keys + p * KW + e) : 0.f;
            v[h][i] = there ? __ldcg(values + p * KW + e) : 0.f;
        }
    auto score = [&](int p, float dot) {
        if (lane == 0) { s.x[p] = dot; l.kq[head * POSITIONS + from + p] = dot; }
    };
    float dots[HELD];
    #pragma unroll
    for (int h = 0; h < HELD; h++) {
        dots[h] = 0.f;
        #pragma unroll
        for (int i = 0; i < EACH; i++) dots[h] = fmaf(q[i], k[h][i], dots[h]);
    }
    #pragma unroll
    for (int step = 16; step; step >>= 1)
        #pragma unroll
        for (int h = 0; h < HELD; h++) dots[h] += __shfl_xor_sync(~0u, dots[h], step);
    #pragma unroll
    for (int h = 0; h < HELD; h++) if (warp + h * WARPS < count) score(warp + h * WARPS, dots[h]);
    #pragma unroll 1
    for (int p = warp + SPLIT_ROWS; p < count; p += WARPS) {
        float dot = 0.f;
        #pragma unroll
        for (int i = 0; i < EACH; i++) { int e = lane + 32 * i; if (e < HEAD) dot = fmaf(q[i], __ldcg(keys + p * KW + e), dot); }
        for (int step = 16; step; step >>= 1) dot += __shfl_xor_sync(~0u, dot, step);
        score(p, dot);
    }
    block_sync();
    float peak = -INFINITY;
    #pragma unroll 1
    for (int p = lane; p < count; p += 32) peak = fmaxf(peak, s.x[p] * scale);
    for (int step = 16; step; step >>= 1) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, step));
    float acc[EACH] = {}, total = 0.f;
    #pragma unroll
    for (int h = 0; h < HELD; h++)
        if (warp + h * WARPS < count) {
            const float w = expf(s.x[warp + h * WARPS] * scale - peak);
            total += w;
            #pragma unroll
            for (int i = 0; i < EACH; i++) acc[i] = fmaf(w, v[h][i], acc[i]);
        }
    #pragma unroll 1
    for (int p = warp + SPLIT_ROWS; p < count; p += WARPS) {
        const float w = expf(s.x[p] * scale - peak);
        total += w;
        #pragma unroll
        for (int i = 0; i < EACH; i++) { int e = lane + 32 * i; if (e < HEAD) acc[i] = fmaf(w, __ldcg(values + p * KW + e), acc[i]); }
    }
    #pragma unroll
    for (int i = 0; i < EACH; i++) { int e = lane + 32 * i; if (e < HEAD) s.mixed[warp][e] = acc[i]; }
    if (lane == 0) s.part[warp] = total;
    block_sync();
    const long long slot = (long long)head * SPLITS + split;
    for (int e = threadIdx.x; e < HEAD; e += THREADS) {
        float sum = 0.f;
        #pragma unroll
        for (int w = 0; w < WARPS; w++) sum += s.mixed[w][e];
        m.mixed[slot * HEAD + e] = sum;
    }
    if (threadIdx.x == THREADS - 1) {
        float sum = 0.f;
        #pragma unroll
        for (int w = 0; w < WARPS; w++) sum += s.part[w];
        m.sums[slot * 2] = peak;
        m.sums[slot * 2 + 1] = sum;
    }
    block_sync();
}

// The shares of each head put together -> x; block 0 keeps them as kqv_out, and each head's peak and 1 / sum.
__device__ void merge(Shared& s, const Model& m, const Layer& l, int splits) {
    constexpr int EACH = (QW + THREADS - 1) / THREADS, TOGETHER = SPLITS < 4 ? SPLITS : 4;
    #pragma unroll
    for (int n = 0; n < EACH; n++) {
        const int e = threadIdx.x + n * THREADS;
        if (e >= QW) break;
        const int head = e / HEAD;
        const float2* sums = (const float2*)m.sums + head * SPLITS;
        const float* mixed = m.mixed + (long long)head * SPLITS * HEAD + e % HEAD;
        float peak = -INFINITY, total = 0.f, value = 0.f;
        for (int from = 0; from < splits; from += TOGETHER) {   // the running sums are rescaled where the peak grows
            float2 part[TOGETHER];
            float x[TOGETHER];
            #pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                part[i] = from + i < splits ? __ldcg(sums + from + i) : make_float2(-INFINITY, 0.f);
                x[i] = from + i < splits ? __ldcg(mixed + (from + i) * HEAD) : 0.f;
            }
            float now = peak;
            #pragma unroll
            for (int i = 0; i < TOGETHER; i++) now = fmaxf(now, part[i].x);
            const float before = expf(peak - now);
            total *= before;
            value *= before;
            peak = now;
            #pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                const float w = expf(part[i].x - peak);
                total += w * part[i].y;
                value += w * x[i];
            }
        }
        value /= total;
        s.x[padded(e)] = value;
        if (blockIdx.x == 0) {
            l.kqv_out[e] = value;
            if (e % HEAD == 0) { l.peaks[2 * head] = peak; l.peaks[2 * head + 1] = 1.f / total; }
        }
    }
    block_sync();
}

// Feed-forward activations -> x: all loads under way before the first is stored.
__device__ __forceinline__ void take(Shared& s, const float* values) {
    constexpr int EACH = (FF / 4 + THREADS - 1) / THREADS, TOGETHER = EACH < 4 ? EACH : 4;
    #pragma unroll 1
    for (int n = 0; n < EACH; n += TOGETHER) {
        float4 v[TOGETHER];
        #pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const int e = threadIdx.x + (n + i) * THREADS;
            if (e < FF / 4) v[i] = __ldcg((const float4*)values + e);
        }
        #pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const int e = threadIdx.x + (n + i) * THREADS;
            if (e < FF / 4) *(float4*)(s.x + padded(4 * e)) = v[i];
        }
    }
    block_sync();
}

// Rows of a projection onto the residual stream: product -> made, product + residual -> sum.
template <int COLS, int SHARED_BY, bool CLOSE> struct ProjectionBack {
    static const int LANES = SHARED_BY * 32, UNITS = THREADS / LANES;
    Rows<COLS, LANES, 1, CLOSE> rows;
    int first, last, lane, mine;
    float bias, rest;            // of the row whose sum this thread will finish

    __device__ __forceinline__ void fetch(const Matrix& w, int r) {
        const Matrix* one[1] = {&w};
        const int row[1] = {r};
        rows.load(one, row, lane);
    }
    // `residual` must be known already: it is two barriers old.
    __device__ __forceinline__ void load(const Matrix& w, const float* residual) {
        first = first_of(D); last = last_of(D); lane = threadIdx.x % LANES; mine = first + threadIdx.x / LANES;
        if (mine < last) fetch(w, mine);
        const int r = first + threadIdx.x;
        bias = r < last && w.bias ? __ldg(w.bias + r) : 0.f;
        rest = r < last ? __ldcg(residual + r) : 0.f;
    }
    __device__ __forceinline__ void run(Shared& s, const Matrix& w, float* made, float* summed) {
        #pragma unroll 1
        for (int r = mine; r < last; r += UNITS) {
            const Matrix* one[1] = {&w};
            const int row[1] = {r};
            float sum[1];
            rows.dot(one, row, lane, s.x, sum);
            if (r + UNITS < last) fetch(w, r + UNITS);
            leave_sums<SHARED_BY, 1>(s, sum, r - first, lane);
        }
        INSIDE(6)
        block_sync();
        static_assert(SHARE(D) <= THREADS, "a thread finishes one row");
        const int r = first + threadIdx.x;
        if (r >= last) return;
        const float y = sum_of<SHARED_BY>(s, threadIdx.x) + bias;
        made[r] = y;
        summed[r] = y + rest;
    }
};

struct GateUp {
    static const int LANES = GATE_WARPS * 32, UNITS = THREADS / LANES;
    Rows<D, LANES, 2, NEAR> rows;
    int first, last, lane, mine;

    __device__ __forceinline__ void fetch(const Layer& l, int r) {
        const Matrix* both[2] = {&l.gate, &l.up};
        const int two[2] = {r, r};
        rows.load(both, two, lane);
    }
    __device__ __forceinline__ void load(const Layer& l) {
        first = first_of(FF); last = last_of(FF); lane = threadIdx.x % LANES; mine = first + threadIdx.x / LANES;
        if (mine < last) fetch(l, mine);
    }
    __device__ __forceinline__ void run(Shared& s, const Layer& l) {
        const Matrix &g = NEAR ? s.near_gate : l.gate, &u = NEAR ? s.near_up : l.up;
        const Matrix* both[2] = {&g, &u};
        const bool alike = ONE_TYPE || type_of(l.gate) == type_of(l.up);
        rows.hold(s.x, lane);
        #pragma unroll 1
        for (int r = mine; r < last; r += UNITS) {
            float sum[2];
            if constexpr (decltype(rows)::HOLDS) {
                const int two[2] = {r, r};
                rows.dot_held(both, two, lane, sum);
            } else if (alike) {
                const int two[2] = {r, r};
                rows.dot(both, two, lane, s.x, sum);
                if (r + UNITS < last) fetch(l, r + UNITS);
            } else if constexpr (!ONE_TYPE) {
                const Matrix *gate[1] = {&g}, *up[1] = {&u};
                const int row[1] = {r};
                float one[1];
                Rows<D, LANES, 1, NEAR> single;
                single.dot(gate, row, lane, s.x, one);
                sum[0] = one[0];
                single.dot(up, row, lane, s.x, one);
                sum[1] = one[0];
            }
            leave_sums<GATE_WARPS, 2>(s, sum, r - first, lane);
        }
        INSIDE(2)
        block_sync();
        INSIDE(3)
        for (int r = first + threadIdx.x; r < last; r += THREADS) {
            float a = sum_of<GATE_WARPS>(s, 2 * (r - first)), b = sum_of<GATE_WARPS>(s, 2 * (r - first) + 1);
            if (l.gate.bias) a += l.gate.bias[r];
            if (l.up.bias) b += l.up.bias[r];
            l.gate_out[r] = a;
            l.up_out[r] = b;
            l.swiglu[r] = a / (1.f + expf(-a)) * b;
        }
    }
};

// Logits of this block's rows and the largest of them.
__device__ void logits(Shared& s, const Model& m) {
    constexpr int R = 4;
    const int first = first_of(VOCAB), last = last_of(VOCAB), warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    float best = -INFINITY;
    int best_at = 0x7fffffff;
    const Matrix* four[R] = {&m.output, &m.output, &m.output, &m.output};
    Rows<D, 32, R> ahead;
    for (int r = first + warp * R; r < last; r += WARPS * R) {
        int rows[R];
        float sum[R];
        #pragma unroll
        for (int i = 0; i < R; i++) rows[i] = min(r + i, last - 1);
        ahead.load(four, rows, lane);
        ahead.dot(four, rows, lane, s.x, sum);
        #pragma unroll
        for (int step = 16; step; step >>= 1)
            #pragma unroll
            for (int i = 0; i < R; i++) sum[i] += __shfl_xor_sync(~0u, sum[i], step);
        for (int i = 0; i < R; i++) {
            float y = sum[i] + (m.output.bias ? m.output.bias[rows[i]] : 0.f);
            if (lane == 0) m.logits[rows[i]] = y;
            if (y > best || (y == best && rows[i] < best_at)) { best = y; best_at = rows[i]; }
        }
    }
    if (lane == 0) { s.part[warp] = best; s.part[WARPS + warp] = __int_as_float(best_at); }
    block_sync();
    if (threadIdx.x == 0) {
        for (int w = 1; w < WARPS; w++) {
            int at = __float_as_int(s.part[WARPS + w]);
            if (s.part[w] > best || (s.part[w] == best && at < best_at)) { best = s.part[w]; best_at = at; }
        }
        __stcg(m.best + blockIdx.x, make_float2(best, __int_as_float(best_at)));
    }
}

// The last block to finish takes the largest logit of all (of equal ones the smallest id) and moves the state on.
__device__ void choose(Shared& s, const Model& m, unsigned until, State now) {
    block_sync();
    if (threadIdx.x == 0) {
        __threadfence();
        s.part[0] = __int_as_float(atomicAdd(m.arrived, 1u) + 1u == until);
        __threadfence();
    }
    block_sync();
    if (!__float_as_int(s.part[0])) return;
    if (threadIdx.x < 32) {
        float best = -INFINITY;
        int at = 0x7fffffff;
        for (int b = threadIdx.x; b < BLOCKS; b += 32) {
            float2 other = __ldcg(m.best + b);
            int id = __float_as_int(other.y);
            if (other.x > best || (other.x == best && id < at)) { best = other.x; at = id; }
        }
        for (int step = 16; step; step >>= 1) {
            float other = __shfl_xor_sync(~0u, best, step);
            int id = __shfl_xor_sync(~0u, at, step);
            if (other > best || (other == best && id < at)) { best = other; at = id; }
        }
        if (threadIdx.x == 0) {
            if (at < 0 || at >= VOCAB) at = 0;               // every logit NaN
            m.tokens[now.position + 1] = at;
            *m.state = State{at, now.position + 1, now.position + 1, now.step + 1};
        }
    }
}

// A layer's pointers, in two steps: asked for, and, when they have come, put into shared memory.
__device__ __forceinline__ long long fetch_layer(const Model& m, int i) {
    return i < LAYERS && threadIdx.x < sizeof(Layer) / 8 ? __ldg((const long long*)(m.layers + i) + threadIdx.x) : 0;
}
__device__ __forceinline__ void keep_layer(Shared& s, int i, long long word) {
    if (i < LAYERS && threadIdx.x < sizeof(Layer) / 8) ((long long*)(s.layer + (i & 1)))[threadIdx.x] = word;
}

// Where the producer puts this layer's matrices.
__device__ __noinline__ void find_near(Shared& s, const Layer& l) {
    const int first = first_of(FF), rows = last_of(FF) - first;
    unsigned offset = 0;
    s.near_gate = near_matrix(l.gate, s.weights, first, rows, D, offset);
    s.near_up = near_matrix(l.up, s.weights, first, rows, D, offset);
    offset = 0;
    s.near_down = near_matrix(l.down, s.weights + GATE_BYTES, first_of(D), last_of(D) - first_of(D), FF, offset);
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) decode(const Model* model, float eps, float scale) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& s = *(Shared*)memory;
    const Model& m = *model;     // a copy in shared memory was slower: 0.588 instead of 0.556 ms a step
    const State now = *m.state;
    const int seen = now.position + 1, splits = min(SPLITS, (seen + SPLIT_ROWS - 1) / SPLIT_ROWS);
    unsigned* const arrived = m.arrived;
    unsigned barrier = now.step * (LAYERS * 5u + 1u) * BLOCKS;
#define ARRIVE { MARK(mark++); arrive(arrived); }
#define WAIT { MARK(mark++); wait(arrived, barrier += BLOCKS); MARK(mark++); }
    [[maybe_unused]] int mark = 0;

    if (NEAR) {
        if (threadIdx.x == 0) {
            for (int i = 0; i < 2; i++) {
                asm volatile("mbarrier.init.shared.b64 [%0], 1;" :: "r"(near_address(&s.full[i])));
                asm volatile("mbarrier.init.shared.b64 [%0], 1;" :: "r"(near_address(&s.used[i])));
            }
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        }
    }
    __syncthreads();
    if (threadIdx.x >= THREADS) {
        if (NEAR && threadIdx.x == THREADS) produce(s, m);
        return;
    }
    keep_layer(s, 0, fetch_layer(m, 0));
    for (int i = threadIdx.x; i < D; i += THREADS)           // every block writes the same: no barrier is needed before it reads them
        __stcg(m.embd + i, element(m.embedding, now.token, D, i));
    block_sync();
    const float* x = m.embd;
    Projection qkv;
    qkv.load(m, s.layer[0], now.position);
    if (threadIdx.x == 0) prefetch_mine(s.layer[0].o, D, QW);
    MARK(mark++)
    for (int i = 0; i < LAYERS; i++) {
        const Layer& l = s.layer[i & 1];
        rms_norm(s, x, l.attn_norm, eps, l.attn_norm_out);
        qkv.run(s, l, now.position);
        ARRIVE
        if (threadIdx.x == 32) {
            if (!NEAR) { prefetch_mine(l.gate, FF, D); prefetch_mine(l.up, FF, D); }
        }
        WAIT
        #pragma unroll 1
        for (int u = blockIdx.x; u < HEADS * splits; u += BLOCKS) attend(s, m, l, u / splits, u % splits, splits, seen, scale);
        ARRIVE
        ProjectionBack<QW, OUT_WARPS, false> out;
        out.load(l.o, x);
        const long long word = fetch_layer(m, i + 1);
        if (NEAR && threadIdx.x == 64) find_near(s, l);
        WAIT
        keep_layer(s, i + 1, word);
        merge(s, m, l, splits);
        out.run(s, l.o, l.attn_out, l.ffn_inp);
        ARRIVE
        GateUp gate_up;
        gate_up.load(l);
        if (threadIdx.x == 32) {
            if (!NEAR) prefetch_mine(l.down, D, FF);
        }
        WAIT
        rms_norm(s, l.ffn_inp, l.ffn_norm, eps, l.ffn_norm_out);
        INSIDE(0)
        if (NEAR) await(&s.full[0], i & 1);
        INSIDE(1)
        gate_up.run(s, l);
        ARRIVE
        ProjectionBack<FF, DOWN_WARPS, NEAR> down;
        down.load(l.down, l.ffn_inp);
        const Layer& next = s.layer[(i + 1) & 1];
        if (i + 1 < LAYERS) {
            if (NEAR && threadIdx.x == 32) leave(&s.used[0]);
            if (threadIdx.x / 32 == 2) prefetch_qkv(next);
            if (threadIdx.x == 96) prefetch_mine(next.o, D, QW);
        } else if (threadIdx.x == 32) prefetch_rows(m.output, first_of(VOCAB), min(LOGITS_AHEAD, last_of(VOCAB) - first_of(VOCAB)), D);
        WAIT
        take(s, l.swiglu);
        INSIDE(4)
        if (NEAR) await(&s.full[1], i & 1);
        INSIDE(5)
        down.run(s, NEAR ? s.near_down : l.down, l.ffn_out, l.l_out);
        ARRIVE
        if (NEAR && i + 1 < LAYERS && threadIdx.x == 32) leave(&s.used[1]);
        x = l.l_out;
        if (i + 1 < LAYERS) qkv.load(m, next, now.position);
        WAIT
    }
    rms_norm(s, x, m.norm, eps, m.output_norm);
    logits(s, m);
    MARK(mark++)
    choose(s, m, barrier + BLOCKS, now);
}

extern "C" __global__ void set_state(State* state, const int* token, int position) {
    *state = State{*token, position, position, state->step};
}
extern "C" __global__ void shared_bytes(int* out) { *out = sizeof(Shared); }
