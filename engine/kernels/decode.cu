// One decode step of a Llama-shaped model as one kernel: a block on every multiprocessor, five phases a layer, then
// the logits and the greedy choice. Blocks pass values to each other as words (messages.cuh), so that no grid-wide barrier is needed.
//
// Each block owns the same rows of a matrix in every step. While it works on one phase, the rows that it needs in the next
// ones are already on their way to the L2 cache: the latencies of words and of memory then overlap. Every intermediate
// value of the step has a place of its own in memory, so that records can be made while the logits are computed (records.cuh).
//
// Given at compile time: LAYERS D HEADS KV_HEADS HEAD FF VOCAB ROPE NEOX POSITIONS (places of the cache) BLOCKS SPLITS.

#include "attention.cuh"
#include "columns.cuh"
#include "logits.cuh"

// One warp hears from all blocks; it takes the largest logit of all (of equal ones the smallest id) and advances the state.
__device__ void choose(const Model& m, State now, unsigned step) {
    constexpr int EACH = (BLOCKS + 31) / 32;
    const int lane = this_thread();
    if (blockIdx.x || lane >= 32) return;
    float2 others[EACH];
    hear_pairs([&](int i) { return lane + 32 * i < BLOCKS ? m.best + 2 * (lane + 32 * i) : nullptr; }, step, others);
    float best = -INFINITY;
    int at = 0x7fffffff;
    #pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int id = __float_as_int(others[i].y);
        if (lane + 32 * i < BLOCKS && (others[i].x > best || (others[i].x == best && id < at))) { best = others[i].x; at = id; }
    }
    for (int far = 16; far; far >>= 1) {
        const float other = __shfl_xor_sync(~0u, best, far);
        const int id = __shfl_xor_sync(~0u, at, far);
        if (other > best || (other == best && id < at)) { best = other; at = id; }
    }
    if (lane) return;
    if (at < 0 || at >= VOCAB) at = 0;                       // every logit NaN
    m.tokens[now.position + 1] = at;
    *m.state = State{at, now.position + 1, now.position + 1, now.step + 1};
}

// Part of a layer, on its way to the L2 cache, by three warps: what this block needs until the feed-forward.
//
// This block's share of a layer's words is fetched again: a step's weights evict from the L2 cache what the last step left there.
__device__ __forceinline__ void prefetch_layer(const Layer& l) {
    if (this_thread() / 32 == 2) prefetch_qkv(l);
    if (this_thread() == 96) prefetch_mine(l.o, D, QW);
    if (this_thread() == 128) prefetch(l.words, first_of(WORDS) * sizeof(Word), (last_of(WORDS) - first_of(WORDS)) * sizeof(Word));
}

// A layer's pointers, in two steps: requested, and, once they have arrived, stored in shared memory.
__device__ __forceinline__ long long fetch_layer(const Model& m, int i) {
    return i < LAYERS && this_thread() < sizeof(Layer) / 8 ? __ldg((const long long*)(m.layers + i) + this_thread()) : 0;
}
__device__ __forceinline__ void keep_layer(Shared& s, int i, long long word) {
    if (i < LAYERS && this_thread() < sizeof(Layer) / 8) ((long long*)(s.layer + (i & 1)))[this_thread()] = word;
}

// Steps are launched one behind the other (`engine.device.launch_behind`): a block of the next step starts where one of this step has ended,
// brings its first weights, and waits until all of this step is done and its memory can be read.
__device__ __forceinline__ void next_step_may_start() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void await_last_step() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1) decode(
        const Model* model, float eps, float scale, const Point* work, int count, int size, int slice, int bytes, int logits_at,
        double* chunks, unsigned* counters, char* records) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& s = *(Shared*)memory;
    const Model& m = *model;     // a copy in shared memory was slower: 0.588 instead of 0.556 ms a step
    const Wanted wanted = {work, count, size, slice, bytes, logits_at, chunks, counters, records};
    [[maybe_unused]] int mark = 0;

    next_step_may_start();
    if (this_thread() == 0) s.lines_taken = 0;
    if (STAGED) {
        if (this_thread() == 0) {
            for (int i = 0; i < 2; i++) {
                asm volatile("mbarrier.init.shared.b64 [%0], 1;" :: "r"(near_address(&s.full[i])));
                asm volatile("mbarrier.init.shared.b64 [%0], 1;" :: "r"(near_address(&s.used[i])));
            }
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        }
    }
    prepare_rounds(s);
    if (LOGITS_NEAR) prepare_rows(s);
    __syncthreads();
    if (STAGED && this_thread() == THREADS) produce(s, m);       // weights are the same in every step
    const State* state = m.state;
    await_last_step();
    const State now = *state;
    const int seen = now.position + 1, splits = min(SPLITS, (seen + SPLIT_ROWS - 1) / SPLIT_ROWS);
    const unsigned step = now.step + 1;   // words begin as zeros: the first step is 1
    if (this_thread() >= THREADS) {
        const bool brings = this_thread() < THREADS + 32;
        if (!brings) Norm::find_scales(s, eps, seen, splits);
        __syncwarp();
        await_block_settled();
        if (brings) tell_settled(m);
        if (brings && logits_at >= 0) record_logits(s, wanted);
        if (!brings && count) make_records(s, m, wanted, seen, step * BLOCKS);
        return;
    }
    keep_layer(s, 0, fetch_layer(m, 0));
    Projection::prepare(s, m, now.position);
    Norm norm;
    norm.read_values(m.embedding, now.token);
    norm.keep(1.f, m.embd);
    const int mine = first_of(D) + this_thread();
    if (mine < last_of(D)) s.rest[this_thread()] = element(m.embedding, now.token, D, mine);
    block_sync();
    Projection qkv;
    qkv.load(s.layer[0]);
    norm.load(s.layer[0].attn_norm);
    if (this_thread() == 0) prefetch_mine(s.layer[0].o, D, QW);
    norm.leave(s);
    MARK
    for (int i = 0; i < LAYERS; i++) {
        const Layer &l = s.layer[i & 1], &next = s.layer[(i + 1) & 1];
        if (i) norm.run(s, next.words + OUT_WORDS, step);          // `next` still is the layer before
        MARK
        qkv.run(s, l, now.position, step);
        norm.keep(s.scale, l.attn_norm_out);
        MARK
        if (this_thread() == 32 && !STAGED) { prefetch_mine(l.gate, FF, D); prefetch_mine(l.up, FF, D); }
        #pragma unroll 1
        for (int u = blockIdx.x; u < HEADS * splits; u += BLOCKS) {
            if (u != blockIdx.x) block_sync();                 // the sums of the last one have been read
            attend(s, l, u / splits, u % splits, splits, seen, scale, step);
        }
        MARK
        ProjectionBack<QW, OUT_WARPS, OUT_ROWS, OUT_TYPES, false> out;
        out.load(l.o);
        const long long word = fetch_layer(m, i + 1);
        merge(s, l, splits, step);
        keep_layer(s, i + 1, word);                            // read behind the next barriers of the block
        MARK
        out.run(s, l.o, l.attn_out, l.ffn_inp, l.words + INP_WORDS, step);
        MARK
        GateUp gate_up;
        gate_up.load(l);
        norm.load(l.ffn_norm);
        if (this_thread() == 32 && !STAGED) prefetch_mine(l.down, D, FF);
        __nanosleep(FIRST_PAUSE);
        norm.run(s, l.words + INP_WORDS, step);
        if (STAGED) await(&s.full[0], i & 1);
        MARK
        gate_up.run(s, l, step);
        norm.keep(s.scale, l.ffn_norm_out);
        MARK
        Down<DOWN_TYPES, DOWN_BY_COLUMNS> down;
        down.load(l.down);
        if (i + 1 < LAYERS) {
            if (STAGED && this_thread() == 32) leave(&s.used[0]);
            prefetch_layer(next);
        }
        down.take(s, l, step);
        if (STAGED) await(&s.full[1], i & 1);
        MARK
        down.run(s, l, step);
        if (STAGED && i + 1 < LAYERS && this_thread() == 32) leave(&s.used[1]);
        norm.load(i + 1 < LAYERS ? next.attn_norm : m.norm);
        if (i + 1 < LAYERS) qkv.load(next);
        MARK
    }
    if constexpr (LOGITS_NEAR) NearLogits::ask_for_first(s, m, 0, 1);   // more would slow down the words of the last layer
    norm.run(s, s.layer[(LAYERS - 1) & 1].words + OUT_WORDS, step);
    if constexpr (LOGITS_NEAR) NearLogits::ask_for_first(s, m, 1, LOGIT_SLOTS);
    sync_scale();
    const float last_scale = s.scale;
    norm.keep(last_scale, m.output_norm);
    settle();
    if constexpr (LOGITS_NEAR) NearLogits::run(s, m, last_scale, logits_at >= 0, step);
    else logits(s, m, last_scale, logits_at >= 0, step);
    prefetch_layer(m.layers[0]);                               // for the next step
    MARK
    choose(m, now, step);
    if (count > BLOCKS) make_records(s, m, wanted, seen, step * BLOCKS);   // with fewer lines, the other warps do them all
}

// Sets the token at `position`: a given one, or the largest of logits [VOCAB] made elsewhere (of equal ones the smallest id).
// One block of 1024.
extern "C" __global__ void place_token(State* state, int token, int position) { *state = State{token, position, position, state->step}; }
extern "C" __global__ void __launch_bounds__(1024) place_best(State* state, const float* logits, int position, int* tokens) {
    __shared__ float bests[32];
    __shared__ int ids[32];
    float best = -INFINITY;
    int at = 0x7fffffff;
    for (int i = threadIdx.x; i < VOCAB; i += 1024) if (logits[i] > best || at == 0x7fffffff) { best = logits[i]; at = i; }
    for (int far = 16; far; far >>= 1) {
        const float other = __shfl_xor_sync(~0u, best, far);
        const int id = __shfl_xor_sync(~0u, at, far);
        if (other > best || (other == best && id < at)) { best = other; at = id; }
    }
    if (threadIdx.x % 32 == 0) { bests[threadIdx.x / 32] = best; ids[threadIdx.x / 32] = at; }
    __syncthreads();
    if (threadIdx.x) return;
    for (int w = 1; w < 32; w++) if (bests[w] > best || (bests[w] == best && ids[w] < at)) { best = bests[w]; at = ids[w]; }
    if (at < 0 || at >= VOCAB) at = 0;                       // every logit NaN
    tokens[position] = at;
    *state = State{at, position, position, state->step};
}
extern "C" __global__ void shared_bytes(int* out) { *out = sizeof(Shared); }
