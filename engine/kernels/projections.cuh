// The phases that multiply: projections, feed-forward.

#include "near.cuh"
#include "norm.cuh"
#include "rows.cuh"

// The two rows of pair `p` of a projection into heads: a rotated pair, or two rows beyond the rotary dimensions.
__device__ __forceinline__ int2 rows_of_pair(int p) {
    int head = p / (HEAD / 2), i = p % (HEAD / 2), base = head * HEAD;
    if (NEOX && i < ROPE / 2) return make_int2(base + i, base + i + ROPE / 2);
    return make_int2(base + 2 * i, base + 2 * i + 1);
}

template <int GROUPS, int R>
__device__ __forceinline__ void leave_sums(Shared& s, float (&sum)[R], int unit, int group_lane) {
    const int lane = this_thread() & 31;
    static_assert(R <= 2, "one or two rows");
    if constexpr (R == 2) {       // each half of the warp continues with one of the two sums
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
// The sums over a warp's lanes of N values, N a power of two: lane j ends with that of value j / (2 * FAR / N).
template <int N, int FAR = 16> __device__ __forceinline__ float sums_over_lanes(const float (&values)[N], int lane) {
    if constexpr (N == 1) {
        float sum = values[0];
        #pragma unroll
        for (int far = FAR; far; far >>= 1) sum += __shfl_xor_sync(~0u, sum, far);
        return sum;
    } else {
        float half[N / 2];
        const bool upper = lane & FAR;
        #pragma unroll
        for (int i = 0; i < N / 2; i++)
            half[i] = (upper ? values[i + N / 2] : values[i]) + __shfl_xor_sync(~0u, upper ? values[i] : values[i + N / 2], FAR);
        return sums_over_lanes<N / 2, FAR / 2>(half, lane);
    }
}
// Those of ROUNDS pairs of rows, number `unit` and each `step` later, below `end`: four pairs take nine shuffles together, one by one twenty.
template <int GROUPS, int ROUNDS, int FROM = 0>
__device__ __forceinline__ void leave_all_sums(Shared& s, const float (&sums)[ROUNDS][2], int unit, int step, int end, int group_lane) {
    if constexpr (FROM < ROUNDS) {
        constexpr int N = ROUNDS - FROM >= 4 ? 4 : ROUNDS - FROM >= 2 ? 2 : 1, LANES = 16 / N;
        const int lane = this_thread() & 31, value = lane / LANES, at = unit + (FROM + value / 2) * step;
        float values[2 * N];
        #pragma unroll
        for (int i = 0; i < 2 * N; i++) values[i] = sums[FROM + i / 2][i % 2];
        const float sum = sums_over_lanes<2 * N>(values, lane);
        if (lane % LANES == 0 && at < end) s.part[(at * 2 + value % 2) * GROUPS + group_lane / 32] = sum;
        leave_all_sums<GROUPS, ROUNDS, FROM + N>(s, sums, unit, step, end, group_lane);
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

// One warp; each lane takes the rows of one pair.
__device__ __forceinline__ void prefetch_qkv(const Layer& l) {
    #pragma unroll 1
    for (int p = first_of(PAIRS) + (this_thread() & 31); p < last_of(PAIRS); p += 32) {
        int2 rows;
        const Matrix& m = qkv_matrix(l, p, rows);
        prefetch_rows(m, rows.x, 1, D);
        prefetch_rows(m, rows.y, 1, D);
        if (m.bias) { prefetch(m.bias, 4 * rows.x, 4); prefetch(m.bias, 4 * rows.y, 4); }
    }
}
__device__ __forceinline__ void prefetch_mine(const Matrix& m, int rows, int cols) {
    if (this_thread() % 32 == 0) prefetch_rows(m, first_of(rows), last_of(rows) - first_of(rows), cols);
}

// Q, K and V of the normalised input; Q and K rotated; K and V into the cache.
struct Projection {
    static const int LANES = QKV_WARPS * 32, UNITS = THREADS / LANES;
    Rows<D, LANES, 2, QKV_TYPES> rows;
    int first, last, lane, mine;

    // What is the same in every layer: the angles of this block's pairs.
    static __device__ __forceinline__ void prepare(Shared& s, const Model& m, int position) {
        const int u = this_thread(), p = first_of(PAIRS) + u, i = (p < QW / 2 ? p : p - QW / 2) % (HEAD / 2);
        if (p >= last_of(PAIRS)) return;
        const bool turned = p < (QW + KW) / 2 && i < ROPE / 2;
        const long long at = (long long)position * (ROPE / 2) + i;
        s.angle[u] = turned ? make_float2(__ldg(m.cosine + at), __ldg(m.sine + at)) : make_float2(1.f, 0.f);
    }
    __device__ __forceinline__ void load(const Layer& l) {
        first = first_of(PAIRS); last = last_of(PAIRS); lane = this_thread() % LANES; mine = first + this_thread() / LANES;
        if (mine < last) fetch(l, mine);
    }
    __device__ __forceinline__ void fetch(const Layer& l, int p) {
        int2 r;
        const Matrix& w = qkv_matrix(l, p, r);
        const Matrix* both[2] = {&w, &w};
        const int two[2] = {r.x, r.y};
        rows.load(both, two, lane);
    }
    __device__ __forceinline__ void run(Shared& s, const Layer& l, int position, unsigned step) {
        // Of the pair whose sums this thread will finish: its rows, biases and angle, and where the results go.
        static_assert(SHARE(PAIRS) <= THREADS, "a thread finishes one pair");
        const int u = finisher(), pair = first + u;
        const bool finishes = pair < last, query = pair < QW / 2, value = pair >= (QW + KW) / 2;
        int2 at = make_int2(0, 0);
        float2 bias = make_float2(0.f, 0.f), angle = bias;
        float *before = nullptr, *after = nullptr;
        Word* words = nullptr;
        if (finishes) {
            const Matrix& w = qkv_matrix(l, pair, at);
            if (w.bias) bias = make_float2(__ldg(w.bias + at.x), __ldg(w.bias + at.y));
            angle = s.angle[u];
            before = query ? l.q_out : value ? l.v_out : l.k_out;
            after = query ? l.q_rope : (value ? l.v_cache : l.k_cache) + (long long)position * KW;
            words = l.words + (query ? Q_WORDS : value ? V_WORDS : K_WORDS);
        }
        constexpr bool ONE_ROUND = SHARE(PAIRS) <= UNITS;      // known to the compiler, which then keeps nothing for a next one
        #pragma unroll 1
        for (int p = mine; p < last; p += ONE_ROUND ? PAIRS : UNITS) {
            int2 r;
            const Matrix& w = qkv_matrix(l, p, r);
            const Matrix* both[2] = {&w, &w};
            const int two[2] = {r.x, r.y};
            float sum[2];
            rows.dot(both, two, lane, s.x, sum);
            if (!ONE_ROUND && p + UNITS < last) fetch(l, p + UNITS);
            leave_sums<QKV_WARPS, 2>(s, sum, p - first, lane);
        }
        sync_scale();
        if (!finishes) return;
        const float scale = s.scale;
        const float a = sum_of<QKV_WARPS>(s, 2 * u) * scale + bias.x, b = sum_of<QKV_WARPS>(s, 2 * u + 1) * scale + bias.y;
        const bool turned = !value && (query ? pair : pair - QW / 2) % (HEAD / 2) < ROPE / 2;
        const float c = turned ? a * angle.x - b * angle.y : a, d = turned ? a * angle.y + b * angle.x : b;
        tell(words + at.x, c, step);
        tell(words + at.y, d, step);
        before[at.x] = a; before[at.y] = b;
        after[at.x] = c; after[at.y] = d;
    }
};

// Feed-forward activations -> x: all words are requested before the first is stored.
__device__ __forceinline__ void take(Shared& s, const unsigned* words, unsigned step) {
    constexpr int EACH = (FF / 4 + THREADS - 1) / THREADS, TOGETHER = EACH < TAKEN ? EACH : TAKEN;
    static_assert(FF % 4 == 0, "words four by four");
    #pragma unroll 1
    for (int n = 0; n < EACH; n += TOGETHER) {
        uint4 four[TOGETHER];
        bool all;
        do {
            all = true;
            #pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                const int e = this_thread() + (n + i) * THREADS;
                four[i] = e < FF / 4 ? look_at_four(words + 4 * e) : make_uint4(step, step, step, step);
            }
            #pragma unroll
            for (int i = 0; i < TOGETHER; i++) all &= told_four(four[i], step);
            if (!all) __nanosleep(PAUSE);
        } while (!all);
        #pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const int e = this_thread() + (n + i) * THREADS;
            const float4 v = values_of(four[i]);
            if (e < FF / 4) s.x.put<4, FF % 128 == 0>(4 * e, {v.x, v.y, v.z, v.w});
        }
    }
    block_sync();
}

// A row's product `y` -> made and the residual stream.
__device__ __forceinline__ void finish_row(Shared& s, int row, float y, float* made, float* summed, Word* words, unsigned step) {
    const float sum = y + s.rest[row - first_of(D)];
    tell(words + row, sum, step);
    s.rest[row - first_of(D)] = sum;
    made[row] = y;
    summed[row] = sum;
}

// Rows of a projection onto the residual stream: product -> made, product + residual -> sum.
template <int COLS, int SHARED_BY, int R, unsigned long long TYPE_MASK, bool NEAR> struct ProjectionBack {
    static const int LANES = SHARED_BY * 32, AT_ONCE = R * (THREADS / LANES);
    Rows<COLS, LANES, R, TYPE_MASK, NEAR> rows;
    int first, last, lane, mine;

    // R neighbouring rows; if there are fewer, the last one repeated.
    __device__ __forceinline__ void find(const Matrix& w, int r, const Matrix* (&each)[R], int (&row)[R]) const {
        #pragma unroll
        for (int i = 0; i < R; i++) { each[i] = &w; row[i] = min(r + i, last - 1); }
    }
    __device__ __forceinline__ void fetch(const Matrix& w, int r) {
        const Matrix* each[R];
        int row[R];
        find(w, r, each, row);
        rows.load(each, row, lane);
    }
    __device__ __forceinline__ void load(const Matrix& w) {
        first = first_of(D); last = last_of(D); lane = this_thread() % LANES; mine = first + this_thread() / LANES * R;
        if (mine < last) fetch(w, mine);
    }
    __device__ __forceinline__ void run(Shared& s, const Matrix& w, float* made, float* summed, Word* words, unsigned step) {
        const int finished = first + finisher();               // the row whose sum this thread will finish
        const float bias = finished < last && w.bias ? __ldg(w.bias + finished) : 0.f;
        #pragma unroll 1
        for (int r = mine; r < last; r += AT_ONCE) {
            const Matrix* each[R];
            int row[R];
            float sum[R];
            find(w, r, each, row);
            rows.dot(each, row, lane, s.x, sum);
            if (r + AT_ONCE < last) fetch(w, r + AT_ONCE);
            leave_sums<SHARED_BY, R>(s, sum, (r - first) / R, lane);
        }
        block_sync();
        static_assert(SHARE(D) <= THREADS, "a thread finishes one row");
        if (finished >= last) return;
        finish_row(s, finished, sum_of<SHARED_BY>(s, finished - first) + bias, made, summed, words, step);
    }
};

struct GateUp {
    static const int LANES = GATE_WARPS * 32, UNITS = THREADS / LANES;
    Rows<D, LANES, 2, GATE_TYPES, STAGED> rows;
    int first, last, lane, mine;

    __device__ __forceinline__ void fetch(const Layer& l, int r) {
        const Matrix* both[2] = {&l.gate, &l.up};
        const int two[2] = {r, r};
        rows.load(both, two, lane);
    }
    __device__ __forceinline__ void load(const Layer& l) {
        first = first_of(FF); last = last_of(FF); lane = this_thread() % LANES; mine = first + this_thread() / LANES;
        if (mine < last) fetch(l, mine);
    }
    __device__ __forceinline__ void run(Shared& s, const Layer& l, unsigned step) {
        const Matrix &g = STAGED ? s.near_gate : l.gate, &u = STAGED ? s.near_up : l.up;
        const Matrix* both[2] = {&g, &u};
        const bool alike = one_type(GATE_TYPES) || type_of(l.gate) == type_of(l.up);
        if constexpr (decltype(rows)::HOLDS) {
            constexpr int ROUNDS = (SHARE(FF) + UNITS - 1) / UNITS;   // all but the last are whole in every block
            if (first < last) {                                       // a block without a row has none of its bytes
                float sums[ROUNDS][2];
                rows.hold(s.x, lane);
                #pragma unroll
                for (int i = 0; i < ROUNDS; i++) {
                    const int r = mine + i * UNITS, row = i + 1 < ROUNDS ? r : min(r, last - 1), two[2] = {row, row};
                    rows.dot_held(both, two, lane, sums[i]);
                }
                leave_all_sums<GATE_WARPS, ROUNDS>(s, sums, mine - first, UNITS, last - first, lane);
            }
        } else
            #pragma unroll 1
            for (int r = mine; r < last; r += UNITS) {
                float sum[2];
                if (alike) {
                    const int two[2] = {r, r};
                    rows.dot(both, two, lane, s.x, sum);
                    if (r + UNITS < last) fetch(l, r + UNITS);
                } else if constexpr (!one_type(GATE_TYPES)) {
                    const Matrix *gate[1] = {&g}, *up[1] = {&u};
                    const int row[1] = {r};
                    float one[1];
                    Rows<D, LANES, 1, GATE_TYPES, STAGED> single;
                    single.dot(gate, row, lane, s.x, one);
                    sum[0] = one[0];
                    single.dot(up, row, lane, s.x, one);
                    sum[1] = one[0];
                }
                leave_sums<GATE_WARPS, 2>(s, sum, r - first, lane);
            }
        sync_scale();
        const float scale = s.scale;
        #pragma unroll 1                                       // once, if no block has more rows than threads
        for (int r = first + this_thread(); r < last; r += SHARE(FF) <= THREADS ? FF : THREADS) {
            float a = sum_of<GATE_WARPS>(s, 2 * (r - first)) * scale, b = sum_of<GATE_WARPS>(s, 2 * (r - first) + 1) * scale;
            if (l.gate.bias) a += l.gate.bias[r];
            if (l.up.bias) b += l.up.bias[r];
            const float y = short_of(a / (1.f + expf(-a)) * b);
            tell_short((unsigned*)(l.words + SWIGLU_WORDS) + r, y, step);
            l.gate_out[r] = a;
            l.up_out[r] = b;
            l.swiglu[r] = y;
        }
    }
};
