// One decode step of a Llama-shaped model as one kernel: a block on every multiprocessor, five phases a layer with a
// barrier of the whole grid between them, then the logits and the greedy choice.
//
// Each block owns the same rows of a matrix in every step. While it works on one phase, the rows it will need in the next
// ones are already on their way to the L2 cache: the barriers' latency and the memory's then overlap. Every intermediate
// value of the step has a place of its own in memory, so that what is captured is read when the step is over.
//
// Given at compile time: LAYERS D HEADS KV_HEADS HEAD FF VOCAB ROPE NEOX POSITIONS (places of the cache) BLOCKS SPLITS.

#include "weights.cuh"

#define THREADS 512
#define WARPS (THREADS / 32)
#define QW (HEADS * HEAD)
#define KW (KV_HEADS * HEAD)
#define GROUP (HEADS / KV_HEADS)
#define SPLIT_ROWS 64            // positions a block attends to before a head is split over several blocks

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

__device__ __forceinline__ void prefetch_row(const Matrix& m, long long row, int cols) {
    unsigned width = m.type == F32 ? cols * 4 : (m.type == F16 || m.type == BF16) ? cols * 2 : m.type == Q8_0 ? cols : cols / 2;
    const char* p = (const char*)m.low + row * width;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(p), "r"(width & ~15u));
    if (m.scales) asm volatile("prefetch.global.L2 [%0];" :: "l"((const char*)m.scales + row * (cols / 16)));
}

// The grid's barrier, in two halves. `count` goes on from step to step; differences are taken modulo 2^32.
__device__ __forceinline__ void arrive(unsigned* arrived) {
    __syncthreads();
    if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(arrived) : "memory");
}
__device__ __forceinline__ void wait(unsigned* arrived, unsigned until) {
    if (threadIdx.x == 0) {
        unsigned seen;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
        while ((int)(seen - until) < 0);
    }
    __syncthreads();
}

// Warps that share a row: with them every phase of a 0.5 B model keeps most warps busy (measured, see BENCHMARKS.md).
#ifndef QKV_WARPS
#define QKV_WARPS 2
#endif
#ifndef OUT_WARPS
#define OUT_WARPS 2
#endif
#ifndef GATE_WARPS
#define GATE_WARPS 2
#endif
#ifndef DOWN_WARPS
#define DOWN_WARPS 2
#endif

#define PAIRS ((QW + 2 * KW) / 2)     // rows of Q, K and V, two by two
#define SHARE(COUNT) ((COUNT) / BLOCKS + 1)   // things of a block at most
constexpr int most(int a, int b) { return a > b ? a : b; }
constexpr int PARTS = most(most(SHARE(PAIRS) * 2 * QKV_WARPS, SHARE(FF) * 2 * GATE_WARPS),
                           most(SHARE(D) * most(OUT_WARPS, DOWN_WARPS), 2 * WARPS));

struct Shared {
    float x[((FF > D ? FF : D) > QW ? (FF > D ? FF : D) : QW) * 9 / 8 + 32];
    float part[PARTS];           // sums of rows by the warps that share them
    double norm[WARPS];
    float scores[SPLIT_ROWS * 64];
    float mixed[WARPS][HEAD];
};

// x = values · weight / sqrt(mean(values²) + eps), padded, in shared memory; squares are summed in float64 as in ggml.
__device__ void rms_norm(Shared& s, const float* values, const float* weight, float eps, float* out) {
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
    __syncthreads();
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
    __syncthreads();
}

// This block's share of `count` things, as [first, last).
__device__ __forceinline__ int first_of(int count) { return (long long)count * blockIdx.x / BLOCKS; }
__device__ __forceinline__ int last_of(int count) { return (long long)count * (blockIdx.x + 1) / BLOCKS; }

// The two rows of pair `p` of a projection into heads: a rotated pair, or two rows beyond the rotary dimensions.
__device__ __forceinline__ int2 rows_of_pair(int p) {
    int head = p / (HEAD / 2), i = p % (HEAD / 2), base = head * HEAD;
    if (NEOX && i < ROPE / 2) return make_int2(base + i, base + i + ROPE / 2);
    return make_int2(base + 2 * i, base + 2 * i + 1);
}

template <int GROUPS, int R>
__device__ __forceinline__ void leave_sums(Shared& s, float (&sum)[R], int unit, int group_lane) {
    #pragma unroll
    for (int step = 16; step; step >>= 1)
        #pragma unroll
        for (int r = 0; r < R; r++) sum[r] += __shfl_xor_sync(~0u, sum[r], step);
    if ((threadIdx.x & 31) == 0)
        #pragma unroll
        for (int r = 0; r < R; r++) s.part[(unit * R + r) * GROUPS + group_lane / 32] = sum[r];
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

__device__ void prefetch_qkv(const Layer& l) {
    for (int p = first_of(PAIRS) + threadIdx.x; p < last_of(PAIRS); p += THREADS) {
        int2 rows;
        const Matrix& m = qkv_matrix(l, p, rows);
        prefetch_row(m, rows.x, D);
        prefetch_row(m, rows.y, D);
    }
}
__device__ void prefetch_rows(const Matrix& m, int rows, int cols) {
    for (int r = first_of(rows) + threadIdx.x; r < last_of(rows); r += THREADS) prefetch_row(m, r, cols);
}

// Q, K and V of the normalised input; Q and K rotated; K and V into the cache.
__device__ void project(Shared& s, const Model& m, const Layer& l, int position) {
    constexpr int LANES = QKV_WARPS * 32, UNITS = THREADS / LANES;
    const int first = first_of(PAIRS), last = last_of(PAIRS), lane = threadIdx.x % LANES;
    for (int p = first + threadIdx.x / LANES; p < last; p += UNITS) {
        int2 rows;
        const Matrix& w = qkv_matrix(l, p, rows);
        const Matrix* both[2] = {&w, &w};
        const int two[2] = {rows.x, rows.y};
        float sum[2];
        dot_rows<D, LANES, 2>(both, two, lane, s.x, sum);
        leave_sums<QKV_WARPS, 2>(s, sum, p - first, lane);
    }
    __syncthreads();
    for (int u = threadIdx.x; u < last - first; u += THREADS) {
        const int p = first + u;
        int2 r;
        const Matrix& w = qkv_matrix(l, p, r);
        float a = sum_of<QKV_WARPS>(s, 2 * u), b = sum_of<QKV_WARPS>(s, 2 * u + 1);
        if (w.bias) { a += w.bias[r.x]; b += w.bias[r.y]; }
        if (p >= (QW + KW) / 2) {
            l.v_out[r.x] = a; l.v_out[r.y] = b;
            float* v = l.v_cache + (long long)position * KW;
            v[r.x] = a; v[r.y] = b;
            continue;
        }
        const bool query = p < QW / 2;
        const int i = (query ? p : p - QW / 2) % (HEAD / 2);
        float* before = query ? l.q_out : l.k_out;
        float* after = query ? l.q_rope : l.k_cache + (long long)position * KW;
        before[r.x] = a; before[r.y] = b;
        if (i < ROPE / 2) {
            float c = m.cosine[(long long)position * (ROPE / 2) + i], n = m.sine[(long long)position * (ROPE / 2) + i];
            after[r.x] = a * c - b * n;
            after[r.y] = a * n + b * c;
        } else { after[r.x] = a; after[r.y] = b; }
    }
}

// One head over one share of the positions: raw scores, exp(score · scale − peak) and the values weighted by it.
__device__ void attend(Shared& s, const Model& m, const Layer& l, int head, int split, int splits, int seen, float scale) {
    const int from = (long long)seen * split / splits, to = (long long)seen * (split + 1) / splits, count = to - from;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const long long offset = (head / GROUP) * HEAD;
    float* scores = count <= SPLIT_ROWS * 64 ? s.scores : nullptr;
    float q[(HEAD + 31) / 32];
    #pragma unroll
    for (int i = 0; i < (HEAD + 31) / 32; i++) { int e = lane + 32 * i; q[i] = e < HEAD ? __ldcg(l.q_rope + head * HEAD + e) : 0.f; }
    #pragma unroll 4
    for (int p = warp; p < count; p += WARPS) {
        const float* k = l.k_cache + (from + p) * (long long)KW + offset;
        float dot = 0.f;
        #pragma unroll
        for (int i = 0; i < (HEAD + 31) / 32; i++) { int e = lane + 32 * i; if (e < HEAD) dot = fmaf(q[i], __ldcg(k + e), dot); }
        #pragma unroll
        for (int step = 16; step; step >>= 1) dot += __shfl_xor_sync(~0u, dot, step);
        if (lane == 0) { scores[p] = dot; l.kq[(long long)head * POSITIONS + from + p] = dot; }
    }
    __syncthreads();
    float peak = -INFINITY;
    for (int p = lane; p < count; p += 32) peak = fmaxf(peak, scores[p] * scale);
    for (int step = 16; step; step >>= 1) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, step));
    float acc[(HEAD + 31) / 32] = {}, total = 0.f;
    #pragma unroll 4
    for (int p = warp; p < count; p += WARPS) {
        const float* v = l.v_cache + (from + p) * (long long)KW + offset;
        float w = expf(scores[p] * scale - peak);
        total += w;
        #pragma unroll
        for (int i = 0; i < (HEAD + 31) / 32; i++) { int e = lane + 32 * i; if (e < HEAD) acc[i] = fmaf(w, __ldcg(v + e), acc[i]); }
    }
    #pragma unroll
    for (int i = 0; i < (HEAD + 31) / 32; i++) { int e = lane + 32 * i; if (e < HEAD) s.mixed[warp][e] = acc[i]; }
    if (lane == 0) s.part[warp] = total;
    __syncthreads();
    const long long slot = (long long)head * SPLITS + split;
    for (int e = threadIdx.x; e < HEAD; e += THREADS) {
        float sum = 0.f;
        for (int w = 0; w < WARPS; w++) sum += s.mixed[w][e];
        m.mixed[slot * HEAD + e] = sum;
    }
    if (threadIdx.x == 0) {
        float sum = 0.f;
        for (int w = 0; w < WARPS; w++) sum += s.part[w];
        m.sums[slot * 2] = peak;
        m.sums[slot * 2 + 1] = sum;
    }
    __syncthreads();
}

// The shares of each head put together -> x; block 0 keeps them as kqv_out, and each head's peak and 1 / sum.
__device__ void merge(Shared& s, const Model& m, const Layer& l, int splits) {
    for (int e = threadIdx.x; e < QW; e += THREADS) {
        const int head = e / HEAD;
        const float* sums = m.sums + head * SPLITS * 2;
        float peak = -INFINITY, total = 0.f, value = 0.f;
        for (int i = 0; i < splits; i++) peak = fmaxf(peak, __ldcg(sums + 2 * i));
        for (int i = 0; i < splits; i++) {
            float w = expf(__ldcg(sums + 2 * i) - peak);
            total += w * __ldcg(sums + 2 * i + 1);
            value += w * __ldcg(m.mixed + (long long)(head * SPLITS + i) * HEAD + e % HEAD);
        }
        value /= total;
        s.x[padded(e)] = value;
        if (blockIdx.x == 0) {
            l.kqv_out[e] = value;
            if (e % HEAD == 0) { l.peaks[2 * head] = peak; l.peaks[2 * head + 1] = 1.f / total; }
        }
    }
    __syncthreads();
}

// Rows of a projection onto the residual stream: product -> made, product + residual -> sum.
template <int COLS, int SHARE>
__device__ void project_back(Shared& s, const Matrix& w, const float* residual, float* made, float* summed) {
    constexpr int LANES = SHARE * 32, UNITS = THREADS / LANES;
    const int first = first_of(D), last = last_of(D), lane = threadIdx.x % LANES;
    for (int r = first + threadIdx.x / LANES; r < last; r += UNITS) {
        const Matrix* one[1] = {&w};
        const int row[1] = {r};
        float sum[1];
        dot_rows<COLS, LANES, 1>(one, row, lane, s.x, sum);
        leave_sums<SHARE, 1>(s, sum, r - first, lane);
    }
    __syncthreads();
    for (int r = first + threadIdx.x; r < last; r += THREADS) {
        float y = sum_of<SHARE>(s, r - first) + (w.bias ? w.bias[r] : 0.f);
        made[r] = y;
        summed[r] = y + __ldcg(residual + r);
    }
}

__device__ void gate_up(Shared& s, const Layer& l) {
    constexpr int LANES = GATE_WARPS * 32, UNITS = THREADS / LANES;
    const int first = first_of(FF), last = last_of(FF), lane = threadIdx.x % LANES;
    const bool alike = l.gate.type == l.up.type;
    for (int r = first + threadIdx.x / LANES; r < last; r += UNITS) {
        float sum[2];
        if (alike) {
            const Matrix* both[2] = {&l.gate, &l.up};
            const int rows[2] = {r, r};
            dot_rows<D, LANES, 2>(both, rows, lane, s.x, sum);
        } else {
            const Matrix *gate[1] = {&l.gate}, *up[1] = {&l.up};
            const int row[1] = {r};
            float g[1], u[1];
            dot_rows<D, LANES, 1>(gate, row, lane, s.x, g);
            dot_rows<D, LANES, 1>(up, row, lane, s.x, u);
            sum[0] = g[0]; sum[1] = u[0];
        }
        leave_sums<GATE_WARPS, 2>(s, sum, r - first, lane);
    }
    __syncthreads();
    for (int r = first + threadIdx.x; r < last; r += THREADS) {
        float g = sum_of<GATE_WARPS>(s, 2 * (r - first)), u = sum_of<GATE_WARPS>(s, 2 * (r - first) + 1);
        if (l.gate.bias) g += l.gate.bias[r];
        if (l.up.bias) u += l.up.bias[r];
        l.gate_out[r] = g;
        l.up_out[r] = u;
        l.swiglu[r] = g / (1.f + expf(-g)) * u;
    }
}

// Logits of this block's rows and the largest of them.
__device__ void logits(Shared& s, const Model& m) {
    constexpr int R = 4;
    const int first = first_of(VOCAB), last = last_of(VOCAB), warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    float best = -INFINITY;
    int best_at = 0x7fffffff;
    for (int r = first + warp * R; r < last; r += WARPS * R) {
        const Matrix* four[R] = {&m.output, &m.output, &m.output, &m.output};
        int rows[R];
        float sum[R];
        for (int i = 0; i < R; i++) rows[i] = min(r + i, last - 1);
        dot_rows<D, 32, R>(four, rows, lane, s.x, sum);
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
    __syncthreads();
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
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        s.part[0] = __int_as_float(atomicAdd(m.arrived, 1u) + 1u == until);
        __threadfence();
    }
    __syncthreads();
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

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode(const Model* model, float eps, float scale) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& s = *(Shared*)memory;
    const Model& m = *model;
    const State now = *m.state;
    const int seen = now.position + 1, splits = min(SPLITS, (seen + SPLIT_ROWS - 1) / SPLIT_ROWS);
    unsigned barrier = now.step * (LAYERS * 5u + 1u) * BLOCKS;
#define SYNC(AHEAD) { arrive(m.arrived); AHEAD; wait(m.arrived, barrier += BLOCKS); }

    for (int i = threadIdx.x; i < D; i += THREADS) {
        float x = element(m.embedding, now.token, D, i);
        __stcg(m.embd + i, x);               // every block writes the same: no barrier is needed before it reads them
    }
    __syncthreads();
    for (int i = 0; i < LAYERS; i++) {
        const Layer& l = m.layers[i];
        if (i == 0) {
            prefetch_rows(l.o, D, QW);
            prefetch_rows(l.gate, FF, D);
            prefetch_rows(l.up, FF, D);
        }
        rms_norm(s, i ? m.layers[i - 1].l_out : m.embd, l.attn_norm, eps, l.attn_norm_out);
        project(s, m, l, now.position);
        SYNC(prefetch_rows(l.gate, FF, D); prefetch_rows(l.up, FF, D))
        for (int u = blockIdx.x; u < HEADS * splits; u += BLOCKS) attend(s, m, l, u / splits, u % splits, splits, seen, scale);
        SYNC(prefetch_rows(l.o, D, QW))
        merge(s, m, l, splits);
        project_back<QW, OUT_WARPS>(s, l.o, i ? m.layers[i - 1].l_out : m.embd, l.attn_out, l.ffn_inp);
        SYNC(prefetch_rows(l.down, D, FF))
        rms_norm(s, l.ffn_inp, l.ffn_norm, eps, l.ffn_norm_out);
        gate_up(s, l);
        SYNC(if (i + 1 < LAYERS) { prefetch_qkv(m.layers[i + 1]); prefetch_rows(m.layers[i + 1].o, D, QW); })
        for (int e = threadIdx.x; e < FF; e += THREADS) s.x[padded(e)] = __ldcg(l.swiglu + e);
        __syncthreads();
        project_back<FF, DOWN_WARPS>(s, l.down, l.ffn_inp, l.ffn_out, l.l_out);
        SYNC()
    }
    rms_norm(s, m.layers[LAYERS - 1].l_out, m.norm, eps, m.output_norm);
    logits(s, m);
    choose(s, m, barrier + BLOCKS, now);
}

extern "C" __global__ void set_state(State* state, const int* token, int position) {
    *state = State{*token, position, position, state->step};
}
extern "C" __global__ void shared_bytes(int* out) { *out = sizeof(Shared); }
