// Weights prefetched into shared memory by bulk copies, a layer ahead.

#include "formats.cuh"

// A plane's bytes for a block of 32 elements, times 8 (K-quants share two or four bytes among 8 blocks).
enum { LOW_PLANE, HIGH_PLANE, SCALES_PLANE, SUPER_PLANE };
__device__ __forceinline__ int eighths(int type, int plane) {
    switch (plane) {
        case LOW_PLANE: return 8 * (type == F32 ? 128 : type == F16 || type == BF16 ? 64 : type == Q8_0 ? 32 : 16);
        case HIGH_PLANE: return 8 * (type == Q5_0 ? 4 : type == Q6_K ? 8 : 0);
        case SCALES_PLANE: return 8 * (type == F32 || type == F16 || type == BF16 ? 0 : 2);
        default: return type == Q4_K ? 4 : type == Q6_K ? 2 : 0;
    }
}

// Bulk copies of a block's rows into shared memory signal their end by a barrier in shared memory.
__device__ __forceinline__ void await(const unsigned long long* full, unsigned phase) {
    asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again;\n}"
                 :: "r"(near_address(full)), "r"(phase) : "memory");
}
// Rows [first, first + rows) of a plane: where they begin in memory, and where they go behind the planes before; whole lines of 128 bytes, since
// copies to other places take longer (4 % of a step).
struct Place { unsigned long long from; unsigned offset, size, skip; };
__device__ __forceinline__ Place place_of(const Matrix& m, int plane, int first, int rows, int cols, unsigned offset) {
    const int row = eighths(type_of(m), plane) * (cols / 32) / 8;
    if (!row) return Place{0, offset, 0, 0};
    const void* start = plane == LOW_PLANE ? (const void*)m.low : plane == HIGH_PLANE ? m.high : plane == SCALES_PLANE ? m.scales : m.super;
    const unsigned long long from = (unsigned long long)start + (unsigned long long)first * row;
    const unsigned skip = from & 127;
    return Place{from - skip, offset, (skip + (unsigned)rows * row + 127) & ~127u, skip};
}
__device__ __forceinline__ unsigned places_end(const Matrix& m, int first, int rows, int cols, unsigned offset) {
    for (int k = 0; k < 4; k++) offset += place_of(m, k, first, rows, cols, offset).size;
    return offset;
}
// The matrix as if all of it were there: only those rows may be read.
__device__ Matrix near_matrix(const Matrix& m, char* base, int first, int rows, int cols, unsigned& offset) {
    Matrix here = m;
    const void* out[4];
    #pragma unroll
    for (int k = 0; k < 4; k++) {
        const Place p = place_of(m, k, first, rows, cols, offset);
        out[k] = p.size ? base + p.offset + p.skip - (long long)first * (eighths(type_of(m), k) * (cols / 32) / 8) : nullptr;
        offset += p.size;
    }
    here.low = (const uint4*)out[0]; here.high = out[1]; here.scales = out[2]; here.super = out[3];
    return here;
}
__device__ __forceinline__ void leave(unsigned long long* used) {   // by one thread, behind a barrier of the block
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(near_address(used)) : "memory");
}
__device__ __forceinline__ void expect(unsigned long long* full, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(near_address(full)), "r"(bytes) : "memory");
}

// Rows on their way to the L2 cache: one instruction a plane, by one thread.
__device__ __forceinline__ void prefetch(const void* plane, long long from, unsigned bytes) {
    const unsigned long long start = ((unsigned long long)plane + from) & ~15ull;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(start), "r"((bytes + 15) & ~15u));
}
__device__ __forceinline__ void prefetch_rows(const Matrix& m, int first, int count, int cols) {
    const void* const planes[4] = {m.low, m.high, m.scales, m.super};
    #pragma unroll
    for (int k = 0; k < 4; k++) {
        const int row = eighths(type_of(m), k) * (cols / 32) / 8;
        if (row) prefetch(planes[k], (long long)first * row, count * row);
    }
}

// The warp that prefetches weights: a layer's gate and up as soon as the last ones have been used, then its down.
//
// Small pieces with pauses: a burst would fill the memory's queues, and the few kilobytes that the other warps read from the L2
// cache, on the critical path, would wait behind it (measured: the whole burst's time is lost then).
#ifndef PIECE
#define PIECE 4096
#endif
#ifndef PACE
#define PACE 360                 // cycles from one piece to the next; to ask for one takes some 220, whatever its size (docs/benchmarks-log.md)
#endif
#ifndef LATER
#define LATER 800                // cycles until a layer's first piece: then the blocks hand over the feed-forward's activations
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
        unsigned offset = 0;
        if (i) { await(&s.used[0], (i - 1) & 1); producer.next = clock64() + LATER; }
        s.near_gate = near_matrix(gate, s.weights, gate_first, gate_rows, D, offset);   // read by those who have awaited the copies
        s.near_up = near_matrix(up, s.weights, gate_first, gate_rows, D, offset);
        producer.bring(&s.full[0], s.weights, two, 2, gate_first, gate_rows, D);
        if (i) await(&s.used[1], (i - 1) & 1);
        offset = 0;
        s.near_down = near_matrix(down, s.weights + GATE_BYTES, down_first, down_rows, FF, offset);
        producer.bring(&s.full[1], s.weights + GATE_BYTES, one, 1, down_first, down_rows, FF);
    }
}
