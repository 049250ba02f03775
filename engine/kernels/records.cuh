// Records of a step, made by two warps beside those that compute, while these make the logits: one takes all other points, and the one that
// prefetches weights, which is idle once the last layer's have arrived, the logits made so far. No phase of the step waits.

#include "near.cuh"
#include "summary.cuh"

// A chunk of a point. PLAIN [width], CAUSAL [heads, stride], CACHED [seen, width], LAST: row `seen - 1` of a cache.
struct Point {
    const float *base, *peaks;   // peaks: kq_soft_max is made from kq
    long long kind, width, heads, stride, offset;   // offset: of the point's first chunk
    double scale;
    long long index, chunk;      // of the point's record, and which of its chunks
};
// What is recorded of a step: a line of `work` for each chunk that a point may have. The logits have no lines: each block
// stores the sums of its own logits behind their record, as parts of PART doubles, which the reader of the records adds up.
struct Wanted {
    const Point* work;
    int count, size, slice, bytes;   // lines, elements of a chunk, values of a slice, bytes of a record
    int logits;                      // index of their record, the last; or -1
    double* chunks;                  // [count][PART]
    unsigned* counters;              // [records] chunks that are done
    char* records;
};

// All values but the logits are final: each block says so once, after its last barrier before the logits; nothing waits for it.
__device__ __forceinline__ void settle() { asm volatile("bar.arrive 2, %0;" :: "n"(ALL_THREADS) : "memory"); }
__device__ __forceinline__ void await_block_settled() { asm volatile("bar.sync 2, %0;" :: "n"(ALL_THREADS) : "memory"); }   // by both warps
__device__ __forceinline__ void tell_settled(const Model& m) {   // by one of them
    if (threadIdx.x % 32 == 0) { __threadfence(); atomicAdd(m.settled, 1u); }
}
__device__ __forceinline__ void await_settled(const Model& m, unsigned until) {
    unsigned there;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(m.settled) : "memory");
        if (there != until) __nanosleep(200);
    } while (there != until);
}

// What a warp gathers of a row's elements: lane j adds up projection j.
struct Gathered {
    Statistics statistics;
    double even = 0, odd = 0;

    // 32 neighbouring elements, of which those below `to` count: this lane's is number e.
    __device__ __forceinline__ void take(float raw, int e, int to) {
        const float x = e < to ? statistics.take(raw, e) : 0.f;
        const unsigned flips = ~fmix32((unsigned)e + 1u);
        #pragma unroll 4
        for (int k = 0; k < 32; k += 2) {
            even += signed_by(__shfl_sync(~0u, flips, k), __shfl_sync(~0u, x, k));
            odd += signed_by(__shfl_sync(~0u, flips, k + 1), __shfl_sync(~0u, x, k + 1));
        }
    }
    // The sums -> out[PART].
    __device__ __forceinline__ void put(double* out) {
        statistics.reduce();
        out[threadIdx.x & 31] = even + odd;
        if (threadIdx.x % 32 == 0) statistics.put(out + SKETCH);
    }
};

// One chunk by one warp. The warp that finishes a row's last chunk adds up all chunks, in their order.
__device__ __noinline__ void record_chunk(const Wanted& wanted, int line, int seen) {
    const Point point = wanted.work[line];
    const int lane = threadIdx.x & 31, t = point.kind == LAST ? seen - 1 : 0;
    const int kind = point.kind == LAST ? PLAIN : (int)point.kind;
    Row row = row_of(point.base, kind, t, seen, 1, (int)point.stride, (int)point.heads, (int)point.width);
    row.later = 0;
    row.peaks = point.peaks;
    row.scale = (float)point.scale;
    const int n = row.inner * row.outer, count = (n + wanted.size - 1) / wanted.size;
    if (point.chunk >= count) return;
    const int from = (int)point.chunk * wanted.size, to = min(n, from + wanted.size);
    Gathered gathered;
    float raw = from + lane < to ? value_at(row, from + lane) : 0.f;
    #pragma unroll 1
    for (int e = from + lane; e - lane < to; e += 32) {
        const float next = e + 32 < to ? value_at(row, e + 32) : 0.f;   // requested ahead
        gathered.take(raw, e, to);
        raw = next;
    }
    double* chunks = wanted.chunks + point.offset * PART;
    gathered.put(chunks + point.chunk * PART);
    __threadfence();
    __syncwarp();
    const unsigned before = lane ? 0 : atomicInc(wanted.counters + point.index, count - 1);   // wraps to 0 for the next step
    if (__shfl_sync(~0u, before, 0) != count - 1) return;
    __threadfence();
    double projection = 0, parts[8];
    #pragma unroll 8
    for (int c = 0; c < count; c++) projection += __ldcg(chunks + c * PART + lane);
    const int which = lane & 7;                                // four lanes do the same
    double stat = nothing(which), at = 2147483647.;
    #pragma unroll 2
    for (int c = 0; c < count; c++) {
        const double* statistics = chunks + c * PART + SKETCH;
        join(which, stat, at, __ldcg(statistics + which), __ldcg(statistics + 6));
    }
    #pragma unroll
    for (int i = 0; i < 8; i++) parts[i] = i == 6 ? __shfl_sync(~0u, at, 5) : __shfl_sync(~0u, stat, i);
    Record* record = record_of(wanted.records, wanted.bytes, (int)point.index);
    record->sketch[lane] = (float)projection;
    if (lane == 0) write_statistics(row, parts, record);
    write_slice(row, wanted.slice, record, lane, 32);
}

// A block's warps take its lines as they become free.
__device__ __noinline__ void make_records(Shared& s, const Model& m, const Wanted& wanted, int seen, unsigned until) {
    await_settled(m, until);
    while (true) {
        const int taken = threadIdx.x % 32 ? 0 : atomicAdd(&s.lines_taken, 1);
        const int line = blockIdx.x + __shfl_sync(~0u, taken, 0) * BLOCKS;
        if (line >= wanted.count) return;
        record_chunk(wanted, line, seen);
    }
}

// This block's logits, in shared memory: behind the last layer, its weights are no longer needed there.
__device__ __forceinline__ float* near_logits(Shared& s) { return LOGITS_FIT ? (float*)s.weights : s.made; }
// A round's barrier waits for as many warps as have rows in it.
__device__ __forceinline__ void prepare_rounds(Shared& s) {
    const int round = threadIdx.x, left = VOCAB - logits_start(round), rows = LOGITS_ROUND / WARPS;
    if (round >= LOGIT_ROUNDS || left <= 0) return;
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(near_address(s.round_made + round)), "r"(min(WARPS, (left + rows - 1) / rows)));
}
// They are taken while the other warps make them: the block's part of the sums, and the elements in the slice.
__device__ __noinline__ void record_logits(Shared& s, const Wanted& wanted) {
    const int lane = threadIdx.x & 31;
    constexpr int EACH = LOGITS_ROUND / 32;
    float* values = record_of(wanted.records, wanted.bytes, wanted.logits)->values;
    Gathered gathered;
    #pragma unroll 1
    for (int round = 0, start; (start = logits_start(round)) < VOCAB; round++) {
        await(s.round_made + round, 0);
        #pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int e = start + 32 * i + lane;
            const float raw = e < VOCAB ? near_logits(s)[round * LOGITS_ROUND + 32 * i + lane] : 0.f;
            if (e < VOCAB && e < wanted.slice) values[e] = raw;
            gathered.take(raw, e, VOCAB);
        }
    }
    gathered.put((double*)record_of(wanted.records, wanted.bytes, wanted.logits + 1) + blockIdx.x * PART);
}
