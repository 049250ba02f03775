// The logits and the largest of a block's.
//
// Where the rows of all slots fit into shared memory, which holds no weights of layers any more, each warp has them brought there by bulk copies, two
// rows a slot, and asks for the next ones as soon as a slot's have been multiplied: 6 µs a step less than by registers, of which many are not
// filled again while a warp sums up (docs/benchmarks-log.md). If logits are recorded, the warp that does it gets them by way of shared memory.

#include "projections.cuh"
#include "records.cuh"

// The largest of each warp's (of equal ones the smallest id) -> the block's, told to the others. Its row of the embedding, which the next step may
// begin with, is asked for.
__device__ __forceinline__ void tell_best(Shared& s, const Model& m, float best, int best_at, unsigned step) {
    const int warp = this_thread() >> 5, lane = this_thread() & 31;
    if (lane == 0) { s.part[warp] = best; s.part[WARPS + warp] = __int_as_float(best_at); }
    block_sync();
    if (this_thread() == 0) {
        for (int w = 1; w < WARPS; w++) {
            int at = __float_as_int(s.part[WARPS + w]);
            if (s.part[w] > best || (s.part[w] == best && at < best_at)) { best = s.part[w]; best_at = at; }
        }
        tell(m.best + 2 * blockIdx.x, best, step);
        tell(m.best + 2 * blockIdx.x + 1, __int_as_float(best_at), step);
        if (best_at < VOCAB) prefetch_rows(m.embedding, best_at, 1, D);
    }
}

// By shared memory: behind the records' logits, each warp's slots.
template <int T> struct LogitRows {
    static constexpr int E = Format<T, true>::E, PIECES = D / E;
    static constexpr unsigned BYTES = 2 * 16 * PIECES;           // a slot's: two rows that lie one behind the other
    static constexpr unsigned BEGIN = (4 * LOGIT_ROUNDS * LOGITS_ROUND + 127) / 128 * 128;
    using Both = Rows<D, 32, 2, 1ull << T, true>;
    static constexpr bool FIT = STAGED && D % E == 0 && VOCAB % 4 == 0 && Both::HOLDS && BEGIN + WARPS * LOGIT_SLOTS * BYTES <= GATE_BYTES + DOWN_BYTES;

    static __device__ __forceinline__ int row_of(int pair) { return logits_start(pair / 2) + (int)(this_thread() >> 5) * 4 + pair % 2 * 2; }
    static __device__ __forceinline__ int number_of(int slot) { return (this_thread() >> 5) * LOGIT_SLOTS + slot; }
    static __device__ __forceinline__ char* place_of(Shared& s, int slot) { return s.weights + BEGIN + number_of(slot) * BYTES; }
    // By one lane of the warp. The rows are read once a step: they are to leave the L2 cache first.
    static __device__ __forceinline__ void ask(Shared& s, const Model& m, int pair, int slot) {
        const int row = row_of(pair);
        if (row >= VOCAB) return;
        unsigned long long* there = s.rows_there + number_of(slot);
        expect(there, BYTES);
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                     :: "r"(near_address(place_of(s, slot))), "l"((const char*)m.output.low + (long long)row * (BYTES / 2)), "n"(BYTES),
                        "r"(near_address(there)), "l"(0x12F0000000000000ull) : "memory");   // the policy `evict_first`, as createpolicy makes it
    }
    static __device__ __forceinline__ void ask_for_first(Shared& s, const Model& m, int from, int to) {
        if (this_thread() % 32 == 0)
            for (int slot = from; slot < to; slot++) ask(s, m, slot, slot);
    }
    static __device__ __forceinline__ void run(Shared& s, const Model& m, float scale, bool recorded, unsigned step) {
        const int warp = this_thread() >> 5, lane = this_thread() & 31;
        float best = -INFINITY;
        int best_at = 0x7fffffff, slot = 0, phase = 0;
        Both rows;
        rows.hold(s.x, lane);
        #pragma unroll 1
        for (int pair = 0; row_of(pair) < VOCAB; pair++) {
            await(s.rows_there + number_of(slot), phase);
            Matrix here;
            here.low = (const uint4*)place_of(s, slot);
            const Matrix* both[2] = {&here, &here};
            const int two[2] = {0, 1};
            float sum[2];
            rows.dot_held(both, two, lane, sum);
            __syncwarp();                                          // all lanes have read the slot
            if (lane == 0) ask(s, m, pair + LOGIT_SLOTS, slot);
            if (++slot == LOGIT_SLOTS) { slot = 0; phase ^= 1; }
            const float total = sums_over_lanes<2>(sum, lane);     // half of the lanes have one row's, half the other's
            const int row = row_of(pair) + lane / 16;
            const float y = total * scale + (m.output.bias ? m.output.bias[row] : 0.f);
            if (lane % 16 == 0) {
                m.logits[row] = y;
                if (recorded) near_logits(s)[pair / 2 * LOGITS_ROUND + warp * 4 + row % 4] = y;
            }
            if (y > best || (y == best && row < best_at)) { best = y; best_at = row; }
            if (recorded && pair % 2) {
                __syncwarp();
                if (lane == 0) leave(s.round_made + pair / 2);
            }
        }
        const float other = __shfl_xor_sync(~0u, best, 16);
        const int id = __shfl_xor_sync(~0u, best_at, 16);
        if (other > best || (other == best && id < best_at)) { best = other; best_at = id; }
        tell_best(s, m, best, best_at, step);
    }
};
template <unsigned long long TYPE_MASK> constexpr bool logits_near() {
    if constexpr (one_type(TYPE_MASK) && (TYPE_MASK & FLOAT_TYPES) != 0) return LogitRows<last_type(TYPE_MASK)>::FIT;
    else return false;
}
constexpr bool LOGITS_NEAR = logits_near<LOGIT_TYPES>();
using NearLogits = LogitRows<last_type(LOGIT_TYPES)>;
__device__ __forceinline__ void prepare_rows(Shared& s) {
    if (threadIdx.x >= WARPS * LOGIT_SLOTS) return;
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" :: "r"(near_address(s.rows_there + threadIdx.x)));
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// By registers: the next rows are loaded while the last ones are summed up.
__device__ void logits(Shared& s, const Model& m, float scale, bool recorded, unsigned step) {
    constexpr int R = LOGITS_ROUND / WARPS;
    const int warp = this_thread() >> 5, lane = this_thread() & 31;
    float best = -INFINITY;
    int best_at = 0x7fffffff;
    static_assert(R == 4, "rows at once");
    const Matrix* four[R] = {&m.output, &m.output, &m.output, &m.output};
    Rows<D, 32, R, LOGIT_TYPES> ahead;
    const auto find = [&](int (&rows)[R], int round) {
        #pragma unroll
        for (int i = 0; i < R; i++) rows[i] = min(logits_start(round) + warp * R + i, VOCAB - 1);
    };
    {
        int rows[R];
        find(rows, 0);
        ahead.load(four, rows, lane);
    }
    #pragma unroll 1
    for (int round = 0; logits_start(round) + warp * R < VOCAB; round++) {
        int rows[R];
        float sum[R];
        find(rows, round);
        ahead.dot(four, rows, lane, s.x, sum);
        if (logits_start(round + 1) + warp * R < VOCAB) {      // on its way beside what follows
            int next[R];
            find(next, round + 1);
            ahead.load(four, next, lane);
        }
        #pragma unroll
        for (int far = 16; far; far >>= 1)
            #pragma unroll
            for (int i = 0; i < R; i++) sum[i] += __shfl_xor_sync(~0u, sum[i], far);
        for (int i = 0; i < R; i++) {
            float y = sum[i] * scale + (m.output.bias ? m.output.bias[rows[i]] : 0.f);
            if (lane == 0) {
                m.logits[rows[i]] = y;
                if (recorded) near_logits(s)[round * LOGITS_ROUND + warp * R + i] = y;
            }
            if (y > best || (y == best && rows[i] < best_at)) { best = y; best_at = rows[i]; }
        }
        if (recorded && lane == 0) leave(s.round_made + round);
    }
    tell_best(s, m, best, best_at, step);
}
