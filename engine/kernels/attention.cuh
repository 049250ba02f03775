// Attention of a decode step: the shares of each head, and their sum.

#include "step.cuh"

__device__ __forceinline__ float dot2(float2 a, float2 b, float sum) { return fmaf(a.y, b.y, fmaf(a.x, b.x, sum)); }

// weight · a + sum · before
__device__ __forceinline__ float2 scaled_add(float weight, float2 a, float2 sum, float before) {
    return make_float2(fmaf(weight, a.x, sum.x * before), fmaf(weight, a.y, sum.y * before));
}

// One head over one share of the positions: raw scores, exp(score · scale − peak) and the values weighted by it. All warps but
// one have earlier positions, whose keys and values are fetched before this step's query is there; the last has this step's, all of it words.
//
// A row is eight lanes', four neighbouring elements of each 32 (or two of each 16), so that a warp has four positions at a time: a score takes
// three shuffles. What lies ahead is not fetched in the loop: it would spill registers, which costs more (docs/benchmarks-log.md).
struct Attention {
    static constexpr int KEEPING = WARPS - 1, ROWS = 4 * KEEPING;           // warps with earlier positions, and how many they have at a time
    static constexpr int EACH = (HEAD + 15) / 16;                           // pairs of elements
    static constexpr bool FOURS = HEAD % 32 == 0;
    static_assert(HEAD % 2 == 0, "elements two by two");
    static __device__ __forceinline__ int element_of(int i) {
        const int lane = this_thread() & 7;
        return FOURS ? 4 * lane + 32 * (i / 2) + 2 * (i % 2) : 2 * lane + 16 * i;
    }

    // Of `row` (keys or values of a position), or zeros.
    static __device__ __forceinline__ void fetch(const float* row, bool there, float2 (&to)[EACH]) {
        if constexpr (FOURS)
            #pragma unroll
            for (int i = 0; i < EACH; i += 2) {
                const float4 four = there ? __ldcg((const float4*)(row + element_of(i))) : make_float4(0.f, 0.f, 0.f, 0.f);
                to[i] = make_float2(four.x, four.y); to[i + 1] = make_float2(four.z, four.w);
            }
        else
            #pragma unroll
            for (int i = 0; i < EACH; i++)
                to[i] = there && element_of(i) < HEAD ? __ldcg((const float2*)(row + element_of(i))) : make_float2(0.f, 0.f);
    }
    static __device__ __forceinline__ float score(const float2 (&q)[EACH], const float2 (&k)[EACH]) {
        float dot = 0.f;
        #pragma unroll
        for (int i = 0; i < EACH; i++) dot = dot2(q[i], k[i], dot);
        #pragma unroll
        for (int far = 4; far; far >>= 1) dot += __shfl_xor_sync(~0u, dot, far);
        return dot;
    }
    static __device__ __forceinline__ float highest_of_rows(float a) {
        a = fmaxf(a, __shfl_xor_sync(~0u, a, 8));
        return fmaxf(a, __shfl_xor_sync(~0u, a, 16));
    }
    // The earlier positions from..from + count.
    static __device__ __forceinline__ void earlier(Shared& s, const Layer& l, int head, int from, int count, float scale, unsigned step) {
        const int warp = this_thread() >> 5, row = this_thread() >> 3;
        const float *keys = l.k_cache + (long long)from * KW + head / GROUP * HEAD, *values = l.v_cache + (keys - l.k_cache);
        float2 k[EACH], v[EACH], q[EACH], acc[EACH];
        fetch(keys + row * KW, row < count, k);
        fetch(values + row * KW, row < count, v);
        hear_pairs<EACH, 0>([&](int i) { return element_of(i) < HEAD ? l.words + Q_WORDS + head * HEAD + element_of(i) : nullptr; }, step, q);
        const float first = score(q, k);
        if (row < count && this_thread() % 8 == 0) l.kq[head * POSITIONS + from + row] = first;
        float peak = highest_of_rows(row < count ? first * scale : -INFINITY), total = row < count ? expf(first * scale - peak) : 0.f;
        #pragma unroll
        for (int i = 0; i < EACH; i++) acc[i] = make_float2(total * v[i].x, total * v[i].y);
        #pragma unroll 1
        for (int p = row + ROWS; p - row < count; p += ROWS) {   // the sums so far are rescaled where the peak grows
            fetch(keys + p * KW, p < count, k);
            fetch(values + p * KW, p < count, v);
            const float dot = score(q, k);
            if (p < count && this_thread() % 8 == 0) l.kq[head * POSITIONS + from + p] = dot;
            const float higher = fmaxf(peak, highest_of_rows(p < count ? dot * scale : -INFINITY));
            const float before = higher > -INFINITY ? expf(peak - higher) : 0.f, w = p < count ? expf(dot * scale - higher) : 0.f;
            total = total * before + w;
            #pragma unroll
            for (int i = 0; i < EACH; i++) acc[i] = scaled_add(w, v[i], acc[i], before);
            peak = higher;
        }
        #pragma unroll
        for (int far = 16; far >= 8; far >>= 1) total += __shfl_xor_sync(~0u, total, far);
        if (this_thread() % 32 == 0) { s.peak[warp] = peak; s.total[warp] = total; }
        leave_rows(acc, s.mixed[warp]);
    }
    // The sums over a warp's four rows -> to[HEAD]. Where each lane has four pairs, it continues with two, then one of them.
    static __device__ __forceinline__ void leave_rows(float2 (&acc)[EACH], float* to) {
        if constexpr (EACH == 4) {
            const bool upper = this_thread() & 16, odd = this_thread() & 8;
            float2 two[2];
            #pragma unroll
            for (int i = 0; i < 2; i++) two[i] = one_of_two(acc[i], acc[i + 2], upper, 16);
            *(float2*)(to + element_of(2 * upper + odd)) = one_of_two(two[0], two[1], odd, 8);
        } else
            #pragma unroll
            for (int i = 0; i < EACH; i++) {
                #pragma unroll
                for (int far = 16; far >= 8; far >>= 1) {
                    acc[i].x += __shfl_xor_sync(~0u, acc[i].x, far);
                    acc[i].y += __shfl_xor_sync(~0u, acc[i].y, far);
                }
                if (this_thread() % 32 < 8 && element_of(i) < HEAD) *(float2*)(to + element_of(i)) = acc[i];
            }
    }
    // The sum of this lane's and another's, of the first pair in one of the two lanes and of the second in the other.
    static __device__ __forceinline__ float2 one_of_two(float2 first, float2 second, bool takes_second, int far) {
        const float2 mine = takes_second ? second : first, other = takes_second ? first : second;
        return make_float2(mine.x + __shfl_xor_sync(~0u, other.x, far), mine.y + __shfl_xor_sync(~0u, other.y, far));
    }
    // This step's position, if it is among the share's: one warp, two neighbouring elements a lane. `place`: of its score.
    static __device__ __forceinline__ void newest(Shared& s, const Layer& l, int head, bool here, float* place, float scale, unsigned step) {
        constexpr int WIDE = (HEAD + 63) / 64;
        const int lane = this_thread() & 31, base = head / GROUP * HEAD;
        float2 heard[3 * WIDE];
        hear_pairs<3 * WIDE, 0>([&](int i) -> const Word* {
            const int e = 2 * lane + 64 * (i % WIDE);
            return here && e < HEAD ? l.words + (i < WIDE ? Q_WORDS + head * HEAD : (i < 2 * WIDE ? K_WORDS : V_WORDS) + base) + e : nullptr;
        }, step, heard);
        float dot = 0.f;
        #pragma unroll
        for (int i = 0; i < WIDE; i++) dot = dot2(heard[i], heard[WIDE + i], dot);
        #pragma unroll
        for (int far = 16; far; far >>= 1) dot += __shfl_xor_sync(~0u, dot, far);
        #pragma unroll
        for (int i = 0; i < WIDE; i++) if (2 * lane + 64 * i < HEAD) *(float2*)&s.mixed[KEEPING][2 * lane + 64 * i] = heard[2 * WIDE + i];
        if (lane) return;
        s.peak[KEEPING] = here ? dot * scale : -INFINITY;
        s.total[KEEPING] = here ? 1.f : 0.f;
        if (here) *place = dot;
    }
};
__device__ void attend(Shared& s, const Layer& l, int head, int split, int splits, int seen, float scale, unsigned step) {
    const int from = seen * split / splits, to = seen * (split + 1) / splits;
    const int warp = this_thread() >> 5, lane = this_thread() & 31;
    if (warp < Attention::KEEPING) Attention::earlier(s, l, head, from, min(to, seen - 1) - from, scale, step);
    else Attention::newest(s, l, head, to == seen, l.kq + head * POSITIONS + seen - 1, scale, step);
    block_sync();
    // Each warp combines the results of all warps: lane w has the share of warp w.
    static_assert(HEAD <= THREADS && WARPS == 16, "a thread takes one element, half a warp the warps");
    const long long slot = (long long)head * SPLITS + split;
    if (warp * 32 >= HEAD && warp != WARPS - 1) return;        // it has no element, and is not the one that tells peak and sum
    const float its_peak = s.peak[lane % WARPS];
    float top = its_peak, sum = 0.f;
    #pragma unroll
    for (int far = 8; far; far >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, far));
    const float share = expf(its_peak - top);
    float total = share * s.total[lane % WARPS];
    #pragma unroll
    for (int far = 8; far; far >>= 1) total += __shfl_xor_sync(~0u, total, far);
    #pragma unroll
    for (int w = 0; w < WARPS; w++) {
        const float its_share = __shfl_sync(~0u, share, w);
        if (this_thread() < HEAD) sum = fmaf(its_share, s.mixed[w][this_thread()], sum);
    }
    if (splits == 1) {                                         // nobody else has a share: the others need not divide
        const float whole = 1.f / total;
        sum *= whole;
        if (this_thread() == THREADS - 1) *(float2*)(l.peaks + 2 * head) = make_float2(top, whole);
    } else if (this_thread() == THREADS - 1) {
        tell(l.words + SUMS_WORDS + slot * 2, top, step);
        tell(l.words + SUMS_WORDS + slot * 2 + 1, total, step);
    }
    if (this_thread() < HEAD) tell(l.words + MIXED_WORDS + slot * HEAD + this_thread(), sum, step);
}

// The shares of each head combined -> x; one block stores them as kqv_out, with the peak and 1 / sum of each head that is split. A thread takes
// two neighbouring elements.
__device__ void merge(Shared& s, const Layer& l, int splits, unsigned step) {
    constexpr int TOGETHER = SPLITS < 3 ? SPLITS : 3;
    #pragma unroll 1
    for (int e = 2 * this_thread(); e < QW; e += 2 * THREADS) {
        const int head = e / HEAD;
        float peak = -INFINITY, total = 0.f;
        float2 value = make_float2(0.f, 0.f);
        if (splits == 1) {
            float2 heard[1];
            hear_pairs([&](int) { return l.words + MIXED_WORDS + head * SPLITS * HEAD + e % HEAD; }, step, heard);
            value = heard[0];
        } else {
            #pragma unroll 1
            for (int from = 0; from < splits; from += TOGETHER) {   // the running sums are rescaled where the peak grows
                const Word *sums = l.words + SUMS_WORDS + (head * SPLITS + from) * 2,
                           *mixed = l.words + MIXED_WORDS + (head * SPLITS + from) * HEAD + e % HEAD;
                float2 heard[2 * TOGETHER];                         // peak and sum, and two values, of each share
                hear_pairs([&](int i) -> const Word* {
                    const int share = i / 2;
                    return from + share >= splits ? nullptr : i % 2 ? mixed + share * HEAD : sums + share * 2;
                }, step, heard);
                float now = peak;
                #pragma unroll
                for (int i = 0; i < TOGETHER; i++) {
                    if (from + i >= splits) heard[2 * i].x = -INFINITY;
                    now = fmaxf(now, heard[2 * i].x);
                }
                const float before = expf(peak - now);
                total *= before; value.x *= before; value.y *= before;
                peak = now;
                #pragma unroll
                for (int i = 0; i < TOGETHER; i++) {
                    const float w = expf(heard[2 * i].x - now);
                    total = fmaf(w, heard[2 * i].y, total);
                    value.x = fmaf(w, heard[2 * i + 1].x, value.x);
                    value.y = fmaf(w, heard[2 * i + 1].y, value.y);
                }
            }
            const float share = 1.f / total;
            value.x *= share; value.y *= share;
            if (this_block() == KEEPER && e % HEAD == 0) *(float2*)(l.peaks + 2 * head) = make_float2(peak, share);
        }
        s.x.put<2, QW % 64 == 0>(e, {value.x, value.y});
        if (this_block() == KEEPER) *(float2*)(l.kqv_out + e) = value;
    }
    block_sync();
}
