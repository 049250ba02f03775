// Attention of a decode step: the shares of each head, and their sum.

#include "step.cuh"

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
