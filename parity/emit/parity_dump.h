/* parity_dump.h: write checkpoints of an engine for `parity diff` and `parity lint`. One header, C99 or C++, no dependency.
 *
 *   parity_dump *d = parity_open("ours.jsonl");
 *   parity_header(d, "my engine", "model.gguf", 24, tokens, n_tokens, "f32"); // the arithmetic your kernels compute in
 *   parity_only(d, argv[4]);                                                  // what {points} gives; without it, all
 *   parity_pass(d, step, decode);                                             // before each forward pass, from 0: for `consistency`
 *   parity_sequence(d, seq);                                                  // where several prompts are computed together, from 0
 *   parity_checkpoint(d, "blk.5.l_out", position, hidden, PARITY_F32, n);     // n values of one position, HOST memory
 *   parity_token(d, position, id, "text");
 *   parity_close(d);
 *
 * Call parity_checkpoint right where the value is computed: it copies before it returns, no pointer is kept. Every function may
 * be called from several threads. Functions return 0, or -1 with the reason in parity_error(d); after an error all calls fail.
 *
 * With PARITY_CUDA defined before the #include, a separate function takes device pointers:
 *
 *   parity_checkpoint_device(d, "blk.5.l_out", position, device_pointer, PARITY_F16, n, stream);
 *
 * It copies in that stream, into pinned memory of its own, and waits for the copy before it returns. Passing a device pointer to
 * parity_checkpoint is then an error, not a crash or garbage.
 *
 * In a stream that is being captured into a CUDA graph, the same call becomes part of the graph and records at every replay. The
 * position is then read from device memory, at the first checkpoint of a pass; the graph itself, or a copy before each replay, must
 * keep it up to date:
 *
 *   parity_position_device(d, device_position, NULL);                          // before the first checkpoint of the capture
 *
 * Replays leave their rows in device memory, in turns; threads bring them to the file beside later ones, the last by parity_flush or
 * parity_close: call one of them before you reset the device. A replay waits where no turn is free, ten seconds at most; then rows are
 * lost, which is an error. What cannot be captured is an error of the call, at the time of capture.
 *
 * For `parity run --exec … --bisect`, which finds the layers that are wrong given right inputs, add one line after the checkpoints of
 * the embedding and of each layer's output; it replaces the row if $PARITY_INJECT names a file that has it, and otherwise does nothing:
 *
 *   parity_inject(d, "blk.5.l_out", position, hidden, PARITY_F32, n);   // or parity_inject_device(…, stream) */
#ifndef PARITY_DUMP_H
#define PARITY_DUMP_H

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(_WIN32)
#include <windows.h>
#else
#include <pthread.h>
#endif
#ifdef PARITY_CUDA
#if !defined(_WIN32)
#include <dlfcn.h>
#include <time.h>
#endif
#include <cuda_runtime.h>
#endif

#ifndef PARITY_SLICE
#define PARITY_SLICE 16 /* leading values in a record; define it before the #include for more */
#endif
#define PARITY_SKETCH 32 /* projections of the whole row, as many as a hash has bits */

typedef enum { PARITY_F32 = 0, PARITY_F16 = 1, PARITY_BF16 = 2 } parity_type;

/* Values in $PARITY_INJECT: positions first … first + rows − 1 of a point, and where they begin in the file. */
struct parity_injected {
    char point[64];
    long long first, rows, width, at;
};

/* Statistics and sketch of a row. Non-finite elements are counted, and count as zero in everything else. */
struct parity_sums {
    double sum, squares, least, most, sketch[PARITY_SKETCH];
    size_t nonfinite, largest_at;
};

#if defined(_WIN32)
typedef CRITICAL_SECTION parity__mutex;
typedef CONDITION_VARIABLE parity__condition;
typedef HANDLE parity__thread;
#else
typedef pthread_mutex_t parity__mutex;
typedef pthread_cond_t parity__condition;
typedef pthread_t parity__thread;
#endif

#ifndef PARITY_RING
#define PARITY_RING (256u << 20) /* bytes of device memory, at most, that a graph's replays take turns in, unless eight of them need more */
#endif

/* How many replays of `size` bytes take turns in each of `rings` rings: a power of two, 8 to 1,024. Replays must not wait where a thread of
 * ours loses its core for a while (tens of milliseconds on a busy host), so there are many; fewer where there are several graphs. */
static inline uint32_t parity__places(size_t size, uint32_t rings) {
    uint32_t places = 1024;
    while (places > 8 && places * size > PARITY_RING / rings) places /= 2;
    return places;
}

#ifdef PARITY_CUDA
#ifndef PARITY_WAITING
#define PARITY_WAITING (1u << 30) /* bytes of captured values that may wait to be written; then replays wait for the writers */
#endif
#ifndef PARITY_WRITERS
#define PARITY_WRITERS 8 /* threads that turn captured rows into lines in parallel; the lines are written in the order of the replays */
#endif
#define PARITY__DEVICES 64
#define PARITY__SEGMENTS 8 /* rows that one kernel can copy */

/* What a graph's kernels read, and write, in device memory. Replay r writes to place r % places of the ring, which has room for the
 * replays before `room`. Without places nothing is recorded. */
struct parity_control {
    uint32_t begun, room, places, size, ticket, lost;
    uint64_t ring, now; /* now: where the present replay writes */
};

/* The kernel's argument: rows that it copies to the present replay's place. The first kernel of a replay finds that place. */
struct parity_segments {
    uint64_t control;
    uint32_t first, n;
    struct {
        uint64_t from;
        uint32_t at, bytes;
    } of[PARITY__SEGMENTS];
};

/* Memory of a graph's checkpoints. `seen` is pinned: each replay begins with the copy of the control there. So is `brought`, for a
 * eighth of the places: few large copies disturb the device less than many small ones. What a ring outgrows, half of it each time,
 * is kept until the end: to free memory is to wait for the device. */
struct parity_ring {
    struct parity_control *control, *seen;
    unsigned char *memory, *brought, *outgrown[64][2];
    size_t size;
    int n_outgrown;
};

/* A checkpoint of a captured graph, or, without a name, the position and step of its pass, 16 bytes apart. */
struct parity_slot {
    struct parity_slot *next, *place;
    size_t at, n;
    parity_type type;
    char point[64];
};

/* What one capture made. It outlives the dump where the graph does: a replay after parity_close records nothing. */
struct parity_graph {
    struct parity_graph *next;
    struct parity_slot *slots, *place; /* place: of the pass that is being captured */
    struct parity_replay *spare;       /* memory of replays that are written */
    struct parity_ring ring;
    unsigned long long id;
    size_t size; /* bytes of a replay's rows */
    long long collected; /* replays whose rows were brought to the host */
    uint32_t places;
    cudaStream_t stream;
    cudaGraphNode_t first, last; /* its kernels */
    struct parity_segments rows; /* of the last kernel */
    int device, step, decode, counted; /* counted: the step is that of the capture and one more for each replay */
    volatile int gone;                 /* the graph and all that was instantiated from it have been destroyed */
    int emptied;                       /* it is gone, and the rows of its last replays were brought to the host */
};

/* A replay on its way to the file; its rows lie behind it. */
struct parity_replay {
    struct parity_replay *next;
    struct parity_graph *graph;
    long long number;
    char *text; /* its lines, when they are made */
    long long lines;
    int made;
};

struct parity_queue {
    parity__mutex lock;
    parity__condition work, room;
    parity__thread writers[PARITY_WRITERS], collector;
    struct parity_replay *first, *last; /* until they are written */
    struct parity_replay *next;         /* the first that nobody makes lines of yet */
    size_t size;                        /* bytes of the rows */
    int running, writing, closing;
};
#endif

typedef struct parity_dump {
    FILE *file;
    char error[256];
    long long checkpoints, tokens;
    int step, decode, seq;
    char *only; /* ",name,name," or NULL for all */
    FILE *inject; /* $PARITY_INJECT, NULL without it */
    struct parity_injected *injected;
    int n_injected;
    parity__mutex lock; /* of the file and the fields above */
#ifdef PARITY_CUDA
    parity__mutex copying; /* of the slab; another one, since replays in a stream that is waited for may need room, made under the next lock */
    void *slab; /* pinned */
    size_t slab_size;
    parity__mutex capturing; /* of the three fields below. Memory for a capture is allocated under it alone: that may wait for
                                replays of other graphs, and these for room, which is made under the next lock. Taken before that one */
    const int *position, *pass; /* device memory that captured checkpoints read */
    void *kernels[PARITY__DEVICES]; /* by the number of the device, as `beside` */
    parity__mutex device; /* of the fields below; a replay may wait for the writers, which take the first lock: never take both */
    struct parity_graph *graphs;
    cudaStream_t beside[PARITY__DEVICES];
    struct parity_queue queue;
#endif
} parity_dump;

static inline void parity__enter(parity__mutex *mutex) {
#if defined(_WIN32)
    EnterCriticalSection(mutex);
#else
    pthread_mutex_lock(mutex);
#endif
}

static inline void parity__leave(parity__mutex *mutex) {
#if defined(_WIN32)
    LeaveCriticalSection(mutex);
#else
    pthread_mutex_unlock(mutex);
#endif
}

static inline void parity__new_mutex(parity__mutex *mutex) {
#if defined(_WIN32)
    InitializeCriticalSection(mutex);
#else
    pthread_mutex_init(mutex, NULL);
#endif
}

static inline void parity__end_mutex(parity__mutex *mutex) {
#if defined(_WIN32)
    DeleteCriticalSection(mutex);
#else
    pthread_mutex_destroy(mutex);
#endif
}

static inline void parity__lock(parity_dump *d) { parity__enter(&d->lock); }
static inline void parity__unlock(parity_dump *d) { parity__leave(&d->lock); }

static inline int parity__fail(parity_dump *d, const char *format, ...) {
    if (!d->error[0]) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(d->error, sizeof d->error, format, arguments);
        va_end(arguments);
    }
    return -1;
}

/* The same from outside the lock. Only one caller writes the text. */
static inline int parity__refuse(parity_dump *d, const char *point, const char *why) {
    parity__lock(d);
    parity__fail(d, "%s: %s", point, why);
    parity__unlock(d);
    return -1;
}

/* The first thing that went wrong, or an empty text. */
static inline const char *parity_error(const parity_dump *d) { return d ? d->error : "the dump could not be opened"; }

/* Read which rows $PARITY_INJECT has, and where: a line "PARITY-INJECT 1", then for each point a line "name first rows width" and
 * rows × width float32, little-endian. */
static inline void parity__index(parity_dump *d, const char *path) {
    char line[128], point[64];
    long long first, rows, width;
    struct parity_injected *more;
    d->inject = fopen(path, "rb");
    if (!d->inject || !fgets(line, sizeof line, d->inject) || strcmp(line, "PARITY-INJECT 1\n") != 0) {
        parity__fail(d, "%.150s: not a file of values to inject", path);
        return;
    }
    while (fgets(line, sizeof line, d->inject)) {
        if (sscanf(line, "%63s %lld %lld %lld", point, &first, &rows, &width) != 4 || first < 0 || rows < 1 || width < 1 ||
            rows > 1 << 24 || width > 1 << 28) {
            parity__fail(d, "%.150s: damaged", path);
            return;
        }
        more = (struct parity_injected *)realloc(d->injected, (size_t)(d->n_injected + 1) * sizeof *more);
        if (!more) {
            parity__fail(d, "out of memory");
            return;
        }
        d->injected = more;
        more += d->n_injected++;
        strcpy(more->point, point);
        more->first = first;
        more->rows = rows;
        more->width = width;
        more->at = (long long)ftell(d->inject);
        if (fseek(d->inject, (long)(4 * rows * width), SEEK_CUR) != 0) parity__fail(d, "%.150s: cut short", path);
    }
}

/* Create a dump; NULL if the file cannot be created or memory is short. */
static inline parity_dump *parity_open(const char *path) {
    parity_dump *d = (parity_dump *)calloc(1, sizeof *d);
    if (!d) return NULL;
    d->file = fopen(path, "wb");
    if (!d->file) {
        free(d);
        return NULL;
    }
    parity__new_mutex(&d->lock);
#ifdef PARITY_CUDA
    parity__new_mutex(&d->copying);
    parity__new_mutex(&d->capturing);
    parity__new_mutex(&d->device);
    parity__new_mutex(&d->queue.lock);
#if defined(_WIN32)
    InitializeConditionVariable(&d->queue.work);
    InitializeConditionVariable(&d->queue.room);
#else
    pthread_cond_init(&d->queue.work, NULL);
    pthread_cond_init(&d->queue.room, NULL);
#endif
#endif
    if (getenv("PARITY_INJECT") && *getenv("PARITY_INJECT")) parity__index(d, getenv("PARITY_INJECT"));
    return d;
}

/* One character of a JSON text, at most six bytes; returns where it ends. */
static inline char *parity__escaped(char *at, unsigned char c) {
    if (c < 0x20) return at + sprintf(at, "\\u%04x", c);
    if (c == '"' || c == '\\') *at++ = '\\';
    *at++ = (char)c;
    return at;
}

/* JSON text: quotes, backslashes and control characters escaped. Bytes above 127 must be UTF-8. */
static inline void parity__text(FILE *file, const char *text) {
    char one[8];
    putc('"', file);
    for (; text && *text; text++) fwrite(one, 1, (size_t)(parity__escaped(one, (unsigned char)*text) - one), file);
    putc('"', file);
}

#define PARITY__DIGITS 28 /* most characters of a number in a line, with its comma */

/* A number with `digits` significant digits, with a decimal point in any locale; returns where it ends. */
static inline char *parity__number(char *at, double x, int digits) {
    char *point = at;
    if (isnan(x)) return at + sprintf(at, "\"NaN\"");
    if (isinf(x)) return at + sprintf(at, x > 0 ? "\"Infinity\"" : "\"-Infinity\"");
    at += sprintf(at, "%.*g", digits, x);
    for (; point < at; point++)
        if (*point == ',') *point = '.';
    return at;
}

static inline int parity__written(parity_dump *d) {
    if (fflush(d->file) != 0 || ferror(d->file)) return parity__fail(d, "the dump could not be written: is the disk full?");
    return 0;
}

/* Whether an ASCII word is `known`, which is in small letters, in letters of any size. */
static inline int parity__same_word(const char *word, const char *known) {
    for (; *word && *known; word++, known++)
        if (*word != *known && (*word < 'A' || *word > 'Z' || *word - 'A' + 'a' != *known)) return 0;
    return *word == *known;
}

/* The first line: which engine, which model file's name, how many layers, the prompt's token ids, and the arithmetic of its products
 * ("f32", "tf32", "f16", "bf16", or "q8" if activations are rounded to 8 bits): the limits of the comparison follow from it. NULL,
 * if it really is not known, makes the limits loose. Other unknown numbers are 0, unknown texts NULL. */
static inline int parity_header(parity_dump *d, const char *engine, const char *model, int layers, const int *tokens,
                                int n_tokens, const char *compute) {
    static const char *const known[] = {"f64", "f32", "tf32", "f16", "bf16", "q8", "float64", "fp64", "double", "float32", "fp32", "float",
                                        "single", "tensorfloat32", "float16", "fp16", "half", "bfloat16", "int8", "i8"};
    const int words = (int)(sizeof known / sizeof known[0]);
    int i, result;
    if (!d) return -1;
    if (!tokens && n_tokens > 0) return parity__refuse(d, "parity_header", "a number of tokens, but no tokens");
    for (i = 0; compute && i < words && !parity__same_word(compute, known[i]); i++);
    if (compute && i == words) return parity__refuse(d, "parity_header", "compute is not known: write f64, f32, tf32, f16, bf16, q8, or NULL");
    parity__lock(d);
    fputs("{\"type\":\"header\",\"format\":1,\"source\":", d->file);
    parity__text(d->file, engine ? engine : "unknown");
    fputs(",\"model\":{", d->file);
    fputs("\"name\":", d->file);
    parity__text(d->file, model);
    if (layers > 0) fprintf(d->file, ",\"layers\":%d", layers);
    fputs("},\"tokens\":[", d->file);
    for (i = 0; i < n_tokens; i++) fprintf(d->file, i ? ",%d" : "%d", tokens[i]);
    fputs("]", d->file);
    if (compute) {
        fputs(",\"compute\":", d->file);
        parity__text(d->file, compute);
    }
    fprintf(d->file, ",\"slice\":%d}\n", PARITY_SLICE);
    result = parity__written(d);
    parity__unlock(d);
    return result;
}

/* Record these points only: names with commas, as {points} of `parity run --exec` gives them; NULL or "" for all. */
static inline int parity_only(parity_dump *d, const char *names) {
    size_t length = names ? strlen(names) : 0;
    char *only = NULL;
    if (!d) return -1;
    if (length) {
        only = (char *)malloc(length + 3);
        if (!only) return parity__refuse(d, "parity_only", "out of memory");
        only[0] = ',';
        memcpy(only + 1, names, length);
        memcpy(only + 1 + length, ",", 2);
    }
    parity__lock(d);
    free(d->only);
    d->only = only;
    parity__unlock(d);
    return 0;
}

/* Whether a point is recorded, so that an engine need not copy values that are not wanted. */
static inline int parity_wants(parity_dump *d, const char *point) {
    const char *at;
    size_t length;
    int wanted;
    if (!d || !point) return 0;
    length = strlen(point);
    parity__lock(d);
    for (at = d->only ? d->only + 1 : NULL; at && (at = strstr(at, point)) != NULL; at++)
        if (at[-1] == ',' && at[length] == ',') break;
    wanted = !d->only || at;
    parity__unlock(d);
    return wanted;
}

/* Call before each forward pass: its number (from 0) and whether it decodes a single token. */
static inline void parity_pass(parity_dump *d, int step, int decode) {
    if (!d) return;
    parity__lock(d);
    d->step = step;
    d->decode = decode;
    parity__unlock(d);
}

/* Call before the checkpoints of another prompt, where several are computed together: its number, from 0. Checkpoints that are captured
 * into a CUDA graph are those of prompt 0. */
static inline void parity_sequence(parity_dump *d, int number) {
    if (!d) return;
    parity__lock(d);
    d->seq = number;
    parity__unlock(d);
}

/* MurmurHash3's finaliser: the sketch's signs. */
static inline uint32_t parity__fmix32(uint32_t h) {
    h ^= h >> 16;
    h *= 0x85EBCA6Bu;
    h ^= h >> 13;
    h *= 0xC2B2AE35u;
    return h ^ (h >> 16);
}

static inline float parity__f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half >> 15) << 31, exponent = (half >> 10) & 31, mantissa = half & 1023, bits;
    float value;
    if (exponent == 31) bits = sign | 0x7F800000u | mantissa << 13;
    else if (exponent) bits = sign | (exponent + 112) << 23 | mantissa << 13;
    else { /* zero or subnormal: mantissa · 2^-24 */
        value = (float)mantissa * 5.9604644775390625e-8f;
        return sign ? -value : value;
    }
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float parity__value(const void *values, parity_type type, size_t i) {
    const unsigned char *at = (const unsigned char *)values;
    uint16_t half;
    uint32_t bits;
    float value;
    if (type == PARITY_F32) {
        memcpy(&value, at + 4 * i, sizeof value);
        return value;
    }
    memcpy(&half, at + 2 * i, sizeof half);
    if (type == PARITY_F16) return parity__f16(half);
    bits = (uint32_t)half << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Four projections at a time, with the compiler's vectors if it has them: without, a row takes twice as long. */
#if defined(__GNUC__)
typedef double parity__four __attribute__((vector_size(4 * sizeof(double))));
#define PARITY__INLINE static inline __attribute__((always_inline))
#else
typedef struct {
    double of[4];
} parity__four;
#define PARITY__INLINE static inline
#endif
#define PARITY__BLOCK 256 /* values that are converted, then projected */

/* Add a block's projections: value i of it is element first + i of the row. */
PARITY__INLINE void parity__add_projections(parity__four *sketch, const double *x, size_t first, size_t n) {
    /* Signs by four bits of the hash: no branch, since they are random. */
    static const parity__four signs_of[16] = {
        {-1, -1, -1, -1}, {1, -1, -1, -1}, {-1, 1, -1, -1}, {1, 1, -1, -1}, {-1, -1, 1, -1}, {1, -1, 1, -1},
        {-1, 1, 1, -1},   {1, 1, 1, -1},   {-1, -1, -1, 1}, {1, -1, -1, 1}, {-1, 1, -1, 1},  {1, 1, -1, 1},
        {-1, -1, 1, 1},   {1, -1, 1, 1},   {-1, 1, 1, 1},   {1, 1, 1, 1}};
    size_t i;
#if defined(__GNUC__)
    /* Eight names, not an array: these stay in registers. */
    parity__four a = sketch[0], b = sketch[1], c = sketch[2], d = sketch[3], e = sketch[4], f = sketch[5], g = sketch[6], h = sketch[7];
    for (i = 0; i < n; i++) {
        uint32_t signs = parity__fmix32((uint32_t)(first + i + 1));
        a += signs_of[signs & 15] * x[i];
        b += signs_of[signs >> 4 & 15] * x[i];
        c += signs_of[signs >> 8 & 15] * x[i];
        d += signs_of[signs >> 12 & 15] * x[i];
        e += signs_of[signs >> 16 & 15] * x[i];
        f += signs_of[signs >> 20 & 15] * x[i];
        g += signs_of[signs >> 24 & 15] * x[i];
        h += signs_of[signs >> 28] * x[i];
    }
    sketch[0] = a, sketch[1] = b, sketch[2] = c, sketch[3] = d, sketch[4] = e, sketch[5] = f, sketch[6] = g, sketch[7] = h;
#else
    int j;
    for (i = 0; i < n; i++) {
        uint32_t signs = parity__fmix32((uint32_t)(first + i + 1));
        for (j = 0; j < PARITY_SKETCH; j++) sketch[j / 4].of[j % 4] += signs_of[signs >> 4 * (j / 4) & 15].of[j % 4] * x[i];
    }
#endif
}

static inline void parity__project(parity__four *sketch, const double *x, size_t first, size_t n) {
    parity__add_projections(sketch, x, first, n);
}

#if defined(__GNUC__) && defined(__x86_64__)
/* The same sums in registers of four, whatever the engine is compiled for: a quarter of the time. */
__attribute__((target("avx2,fma"))) static inline void parity__project_wide(parity__four *sketch, const double *x, size_t first,
                                                                           size_t n) {
    parity__add_projections(sketch, x, first, n);
}
#endif

static inline void parity__sum_up(struct parity_sums *s, const void *values, parity_type type, size_t n) {
    parity__four sketch[PARITY_SKETCH / 4];
    double block[PARITY__BLOCK];
    size_t i, first, count;
    float largest = -1;
    int some = 0;
    memset(s, 0, sizeof *s);
    memset(sketch, 0, sizeof sketch);
    for (first = 0; first < n; first += count) {
        count = n - first < PARITY__BLOCK ? n - first : PARITY__BLOCK;
        for (i = 0; i < count; i++) {
            float value = parity__value(values, type, first + i);
            double x = value;
            block[i] = 0;
            if (!isfinite(value)) {
                s->nonfinite++;
                if (largest < 0) largest = 0, s->largest_at = first + i;
                continue;
            }
            block[i] = x;
            if (fabsf(value) > largest) largest = fabsf(value), s->largest_at = first + i;
            s->least = some ? (x < s->least ? x : s->least) : x;
            s->most = some ? (x > s->most ? x : s->most) : x;
            some = 1;
            s->sum += x;
            s->squares += x * x;
        }
#if defined(__GNUC__) && defined(__x86_64__)
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) parity__project_wide(sketch, block, first, count);
        else
#endif
            parity__project(sketch, block, first, count);
    }
    memcpy(s->sketch, sketch, sizeof sketch);
}

/* The line of a checkpoint, to be freed by the caller; NULL if memory is short. */
static inline char *parity__line(int seq, const char *point, int position, int step, int decode, const void *values, parity_type type,
                                 size_t n, const struct parity_sums *s) {
    static const char *const names[] = {"f32", "f16", "bf16"};
    size_t i, slice = n < PARITY_SLICE ? n : PARITY_SLICE;
    int j;
    char *line = (char *)malloc(512 + 6 * strlen(point) + (slice + PARITY_SKETCH + 4) * PARITY__DIGITS), *at = line;
    if (!line) return NULL;
    at += sprintf(at, "{\"type\":\"checkpoint\",\"checkpoint\":\"");
    for (; *point; point++) at = parity__escaped(at, (unsigned char)*point);
    at += sprintf(at, "\",\"seq\":%d,\"token_idx\":%d,\"step\":%d,\"phase\":\"%s\",\"dtype\":\"%s\",\"shape\":[%llu],\"values\":[", seq, position,
                  step, decode ? "decode" : "prefill", names[type], (unsigned long long)n);
    for (i = 0; i < slice; i++) {
        if (i) *at++ = ',';
        at = parity__number(at, parity__value(values, type, i), 9); /* 9 digits reproduce every float32 */
    }
    at += sprintf(at, "],\"stats\":{\"n\":%llu,\"sum\":", (unsigned long long)n);
    at = parity__number(at, s->sum, 17);
    at += sprintf(at, ",\"l2\":");
    at = parity__number(at, sqrt(s->squares), 17);
    at += sprintf(at, ",\"min\":");
    at = parity__number(at, s->least, 17);
    at += sprintf(at, ",\"max\":");
    at = parity__number(at, s->most, 17);
    at += sprintf(at, ",\"nonfinite\":%llu,\"absmax_at\":%llu},\"sketch\":[", (unsigned long long)s->nonfinite,
                  (unsigned long long)s->largest_at);
    for (j = 0; j < PARITY_SKETCH; j++) {
        if (j) *at++ = ',';
        at = parity__number(at, (float)s->sketch[j], 9);
    }
    sprintf(at, "]}\n");
    return line;
}

/* Write a checkpoint's line and free it. */
static inline int parity__write(parity_dump *d, const char *point, char *line) {
    int result;
    if (!line) return parity__refuse(d, point, "out of memory");
    parity__lock(d);
    fputs(line, d->file);
    free(line);
    d->checkpoints++;
    result = parity__written(d);
    parity__unlock(d);
    return result;
}

static inline int parity__checkpoint(parity_dump *d, const char *point, int position, const void *values, parity_type type,
                                     size_t n) {
    struct parity_sums sums;
    int step, decode, seq;
    parity__sum_up(&sums, values, type, n);
    parity__lock(d);
    step = d->step;
    decode = d->decode;
    seq = d->seq;
    parity__unlock(d);
    return parity__write(d, point, parity__line(seq, point, position, step, decode, values, type, n, &sums));
}

static inline int parity__arguments(parity_dump *d, const char *point, int position, const void *values, parity_type type,
                                    size_t n) {
    int failed;
    if (!d) return -1;
    if (!point || !values || !n || n > (size_t)-1 / 8 || position < 0) /* a negative number of values is a huge size_t */
        return parity__refuse(d, point ? point : "checkpoint", "needs a name, a position from 0, and values");
    if ((int)type < PARITY_F32 || (int)type > PARITY_BF16) return parity__refuse(d, point, "unknown type");
    parity__lock(d);
    failed = d->error[0] ? -1 : 0;
    parity__unlock(d);
    return failed;
}

/* One position's row of an activation: n values in HOST memory, all of them (statistics and sketch see the whole row). */
static inline int parity_checkpoint(parity_dump *d, const char *point, int position, const void *values, parity_type type,
                                    size_t n) {
    if (parity__arguments(d, point, position, values, type, n)) return -1;
    if (!parity_wants(d, point)) return 0;
#ifdef PARITY_CUDA
    {
        struct cudaPointerAttributes at;
        if (cudaPointerGetAttributes(&at, values) == cudaSuccess && at.type == cudaMemoryTypeDevice)
            return parity__refuse(d, point, "this is a device pointer; give it to parity_checkpoint_device");
        cudaGetLastError(); /* plain host memory is not an error */
    }
#endif
    return parity__checkpoint(d, point, position, values, type, n);
}

#ifdef PARITY_CUDA
/* Where captured checkpoints find, in DEVICE memory, the position of the row and the number of the pass. `step` may be NULL: then
 * passes are counted from that of parity_pass before the capture. Call it before the capture, and again when the addresses
 * change. */
static inline int parity_position_device(parity_dump *d, const int *position, const int *step) {
    if (!d) return -1;
    parity__enter(&d->capturing);
    d->position = position;
    d->pass = step;
    parity__leave(&d->capturing);
    return 0;
}

static inline void parity__wait(struct parity_queue *q, parity__condition *condition) {
#if defined(_WIN32)
    SleepConditionVariableCS(condition, &q->lock, INFINITE);
#else
    pthread_cond_wait(condition, &q->lock);
#endif
}

static inline void parity__wake(parity__condition *condition, int all) {
#if defined(_WIN32)
    if (all) WakeAllConditionVariable(condition);
    else WakeConditionVariable(condition);
#else
    if (all) pthread_cond_broadcast(condition);
    else pthread_cond_signal(condition);
#endif
}

/* Write the replays at the queue's head whose lines are made; called and left with the queue's lock. */
static inline void parity__write_made(parity_dump *d, struct parity_queue *q) {
    struct parity_replay *replay;
    if (q->writing) return; /* whoever does comes to these, too */
    q->writing = 1;
    while ((replay = q->first) != NULL && replay->made) {
        parity__leave(&q->lock);
        parity__lock(d);
        if (!d->error[0] && replay->text) {
            fputs(replay->text, d->file);
            d->checkpoints += replay->lines;
            parity__written(d);
        }
        parity__unlock(d);
        free(replay->text);
        parity__enter(&q->lock);
        q->first = replay->next;
        if (!q->first) q->last = NULL;
        q->size -= replay->graph->size;
        replay->next = replay->graph->spare;
        replay->graph->spare = replay;
        parity__wake(&q->room, 1);
    }
    q->writing = 0;
}

/* The lines of a replay's rows. */
static inline void parity__make_lines(parity_dump *d, struct parity_replay *replay) {
    const struct parity_graph *g = replay->graph;
    const unsigned char *rows = (const unsigned char *)(replay + 1);
    const struct parity_slot *slot;
    struct parity_sums sums;
    int32_t position, step;
    size_t length = 0, more;
    char *line, *text;
    replay->text = NULL;
    replay->lines = 0;
    for (slot = g->slots; slot; slot = slot->next) {
        if (!slot->place) continue;
        memcpy(&position, rows + slot->place->at, 4);
        memcpy(&step, rows + slot->place->at + 16, 4);
        if (g->counted) step = g->step + (int32_t)replay->number;
        parity__sum_up(&sums, rows + slot->at, slot->type, slot->n);
        line = parity__line(0, slot->point, position, step, g->decode, rows + slot->at, slot->type, slot->n, &sums);
        more = line ? strlen(line) : 0;
        text = line ? (char *)realloc(replay->text, length + more + 1) : NULL;
        if (!text) {
            free(line);
            parity__refuse(d, slot->point, "out of memory");
            return;
        }
        memcpy(text + length, line, more + 1);
        free(line);
        replay->text = text;
        replay->lines++;
        length += more;
    }
}

#if defined(_WIN32)
static inline DWORD WINAPI parity__run_writer(void *dump) {
#else
static inline void *parity__run_writer(void *dump) {
#endif
    parity_dump *d = (parity_dump *)dump;
    struct parity_queue *q = &d->queue;
    struct parity_replay *replay;
    parity__enter(&q->lock);
    for (;;) {
        while (!q->next && !q->closing) parity__wait(q, &q->work);
        replay = q->next;
        if (!replay) break;
        q->next = replay->next;
        parity__leave(&q->lock);
        parity__make_lines(d, replay);
        parity__enter(&q->lock);
        replay->made = 1;
        parity__write_made(d, q);
    }
    parity__leave(&q->lock);
    return 0;
}

/* A stream of ours on the current device, which nothing else waits for. */
static inline cudaStream_t parity__beside(parity_dump *d, int device) {
    if (!d->beside[device] && cudaStreamCreateWithFlags(&d->beside[device], cudaStreamNonBlocking) != cudaSuccess) d->beside[device] = NULL;
    return d->beside[device];
}

/* Copy and wait, beside what the device computes and what is being captured. */
static inline cudaError_t parity__bring(parity_dump *d, int device, void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    cudaStream_t beside = parity__beside(d, device);
    cudaError_t status = beside ? cudaMemcpyAsync(to, from, size, kind, beside) : cudaErrorMemoryAllocation;
    return status == cudaSuccess ? cudaStreamSynchronize(beside) : status;
}

/* Memory for a replay's rows; waits for room. */
static inline struct parity_replay *parity__new_replay(parity_dump *d, struct parity_graph *g) {
    struct parity_queue *q = &d->queue;
    struct parity_replay *replay;
    parity__enter(&q->lock);
    while (q->size && q->size + g->size > PARITY_WAITING) parity__wait(q, &q->room);
    replay = g->spare;
    if (replay) g->spare = replay->next;
    parity__leave(&q->lock);
    return replay ? replay : (struct parity_replay *)malloc(sizeof *replay + g->size);
}

/* Give the writers the rows of a graph's replays before number `complete`, and their places to further ones. */
static inline cudaError_t parity__collect(parity_dump *d, struct parity_graph *g, long long complete) {
    struct parity_queue *q = &d->queue;
    struct parity_replay *replay;
    cudaError_t status = cudaSuccess;
    long long i, n;
    uint32_t room, start;
    while (g->collected < complete) {
        start = (uint32_t)(g->collected % g->places);
        n = complete - g->collected;
        if (n > g->places - start) n = g->places - start;
        if (n > g->places / 8) n = g->places / 8;
        status = parity__bring(d, g->device, g->ring.brought, g->ring.memory + start * g->size, (size_t)n * g->size, cudaMemcpyDeviceToHost);
        room = (uint32_t)(g->collected + n) + g->places;
        if (status == cudaSuccess) status = parity__bring(d, g->device, &g->ring.control->room, &room, sizeof room, cudaMemcpyHostToDevice);
        if (status != cudaSuccess) return status;
        for (i = 0; i < n; i++) {
            replay = parity__new_replay(d, g);
            if (!replay) return cudaErrorMemoryAllocation;
            memcpy(replay + 1, g->ring.brought + (size_t)i * g->size, g->size);
            replay->next = NULL;
            replay->graph = g;
            replay->number = g->collected++;
            replay->made = 0;
            parity__enter(&q->lock);
            q->size += g->size;
            if (q->last) q->last->next = replay;
            else q->first = replay;
            q->last = replay;
            if (!q->next) q->next = replay;
            parity__wake(&q->work, 0);
            parity__leave(&q->lock);
        }
    }
    return status;
}

/* All replays of a graph that have begun, which must be complete. */
static inline cudaError_t parity__collect_all(parity_dump *d, struct parity_graph *g) {
    struct parity_control now;
    cudaError_t status;
    if (!g->ring.control || !g->places) return cudaSuccess; /* without places its first checkpoint is being captured */
    status = parity__bring(d, g->device, &now, g->ring.control, sizeof now, cudaMemcpyDeviceToHost);
    if (status != cudaSuccess) return status;
    if (now.lost) parity__refuse(d, "a replay", "found no room for its rows for ten seconds; they are lost");
    return parity__collect(d, g, g->collected + (uint32_t)(now.begun - (uint32_t)g->collected));
}

static inline void parity__rest(unsigned microseconds) {
#if defined(_WIN32)
    Sleep((microseconds + 999) / 1000);
#else
    struct timespec time;
    time.tv_sec = 0;
    time.tv_nsec = 1000 * (long)microseconds;
    nanosleep(&time, NULL);
#endif
}

/* Brings what replays have left to the host, until the dump is closed: what `seen` counts, but for the last one, is complete. */
#if defined(_WIN32)
static inline DWORD WINAPI parity__run_collector(void *dump) {
#else
static inline void *parity__run_collector(void *dump) {
#endif
    parity_dump *d = (parity_dump *)dump;
    struct parity_queue *q = &d->queue;
    struct parity_graph *g;
    enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed; /* others may be capturing */
    cudaError_t status = cudaSuccess;
    unsigned rest = 2000;
    int closing = 0, device = -1;
    long long before, after;
    cudaThreadExchangeStreamCaptureMode(&mode);
    while (!closing && status == cudaSuccess) {
        before = after = 0;
        parity__enter(&d->device);
        for (g = d->graphs; g && status == cudaSuccess; g = g->next) {
            uint32_t begun = g->ring.control ? *(volatile uint32_t *)&g->ring.seen->begun - (uint32_t)g->collected : 0;
            if (begun < 2 || begun > g->places + 1) continue; /* more cannot have begun: `seen` is of before */
            if (g->device != device) status = cudaSetDevice(device = g->device);
            before += g->collected;
            if (status == cudaSuccess) status = parity__collect(d, g, g->collected + begun - 1);
            after += g->collected;
        }
        parity__leave(&d->device);
        rest = after > before ? 2000 : 4000; /* microseconds */
        parity__rest(rest);
        parity__enter(&q->lock);
        closing = q->closing;
        parity__leave(&q->lock);
    }
    if (status != cudaSuccess) parity__refuse(d, "what replays have left is lost", cudaGetErrorString(status));
    return 0;
}

static inline int parity__start(parity__thread *thread, parity_dump *d, int collects) {
#if defined(_WIN32)
    *thread = CreateThread(NULL, 0, collects ? parity__run_collector : parity__run_writer, d, 0, NULL);
    return *thread ? 0 : -1;
#else
    return pthread_create(thread, NULL, collects ? parity__run_collector : parity__run_writer, d);
#endif
}

static inline void parity__end(parity__thread thread) {
#if defined(_WIN32)
    WaitForSingleObject(thread, INFINITE);
    CloseHandle(thread);
#else
    pthread_join(thread, NULL);
#endif
}

/* The collector, and as many writers as can be started. */
static inline int parity__start_threads(parity_dump *d) {
    struct parity_queue *q = &d->queue;
    if (q->running) return 0;
    while (q->running < PARITY_WRITERS && parity__start(&q->writers[q->running], d, 0) == 0) q->running++;
    if (!q->running) return -1;
    if (parity__start(&q->collector, d, 1) == 0) return 0;
    parity__enter(&q->lock);
    q->closing = 1;
    parity__wake(&q->work, 1);
    parity__leave(&q->lock);
    while (q->running) parity__end(q->writers[--q->running]);
    q->closing = 0;
    return -1;
}

static inline void parity__end_threads(parity_dump *d) {
    struct parity_queue *q = &d->queue;
    if (!q->running) return;
    parity__enter(&q->lock);
    q->closing = 1;
    parity__wake(&q->work, 1);
    parity__leave(&q->lock);
    parity__end(q->collector);
    while (q->running) parity__end(q->writers[--q->running]);
}

static inline void CUDART_CB parity__graph_gone(void *graph) { ((struct parity_graph *)graph)->gone = 1; }

/* Write what all replays so far have left: waits for the device. */
static inline int parity_flush(parity_dump *d) {
    struct parity_graph *g;
    cudaError_t status = cudaSuccess;
    int device;
    if (!d) return -1;
    if (!d->queue.running) return d->error[0] ? -1 : 0;
    cudaGetDevice(&device);
    parity__enter(&d->device);
    g = d->graphs;
    parity__leave(&d->device);
    for (; g && status == cudaSuccess; g = g->next) { /* graphs are put in front of these */
        cudaSetDevice(g->device);
        status = cudaDeviceSynchronize(); /* without the lock: the collector makes room meanwhile */
        parity__enter(&d->device);
        if (status == cudaSuccess) status = parity__collect_all(d, g);
        parity__leave(&d->device);
    }
    cudaSetDevice(device);
    if (status != cudaSuccess) return parity__refuse(d, "what replays have left is lost", cudaGetErrorString(status));
    parity__enter(&d->queue.lock);
    while (d->queue.first) parity__wait(&d->queue, &d->queue.room);
    parity__leave(&d->queue.lock);
    return d->error[0] ? -1 : 0;
}

static inline void parity__free_outgrown(struct parity_ring *ring) {
    for (; ring->n_outgrown; ring->n_outgrown--) {
        cudaFree(ring->outgrown[ring->n_outgrown - 1][0]);
        cudaFreeHost(ring->outgrown[ring->n_outgrown - 1][1]);
    }
}

static inline void parity__free_ring(struct parity_ring *ring) {
    parity__free_outgrown(ring);
    cudaFree(ring->memory);
    cudaFree(ring->control);
    cudaFreeHost(ring->seen);
    cudaFreeHost(ring->brought);
}

/* Free a graph's memory; of one that may be replayed still, what such a replay reads: that it records nothing. */
static inline void parity__free_graph(struct parity_graph *g) {
    struct parity_slot *slot;
    struct parity_replay *replay;
    while ((slot = g->slots) != NULL) {
        g->slots = slot->next;
        free(slot);
    }
    while ((replay = g->spare) != NULL) {
        g->spare = replay->next;
        free(replay);
    }
    if (g->gone) {
        parity__free_ring(&g->ring);
        free(g);
    } else if (g->ring.control) {
        const uint32_t none = 0;
        if (cudaMemcpy(&g->ring.control->places, &none, sizeof none, cudaMemcpyHostToDevice) == cudaSuccess) cudaFree(g->ring.memory);
        parity__free_outgrown(&g->ring);
        cudaFreeHost(g->ring.brought);
        cudaGetLastError();
    }
}

#if CUDART_VERSION >= 11030
/* The kernel that copies rows to the present replay's place, 16 bytes per thread. PTX, since this header may be compiled by any compiler.
 * Its blocks may start when those of the kernel before it end (griddepcontrol, on devices that have it), and look up the place
 * meanwhile; and the next kernel may start when all rows are read, as parity__let_overlap says. The first kernel of a replay waits where the ring is full, ten seconds at most, and counts the replay when all of its
 * blocks have read the count. */
static const char parity__ptx[] =
    ".version 7.8\n"
    ".target sm_90\n"
    ".address_size 64\n"
    ".visible .entry parity_record(.param .align 8 .b8 rows[144]) {\n"
    ".reg .pred %p, %q, %whole, %first;\n"
    ".reg .b16 %h;\n"
    ".reg .b32 %a, %b, %i, %at, %bytes, %begun, %room, %slots, %looks, %thread, %v<4>;\n"
    ".reg .b64 %x, %y, %control, %from, %to, %now, %size;\n"
    "ld.param.u64 %control, [rows];\n"
    "ld.param.u32 %a, [rows+8];\n"
    "ld.param.u32 %b, [rows+12];\n"
    "setp.ne.u32 %first, %a, 0;\n"
    "mov.u32 %a, %ctaid.x;\n"
    "mov.u32 %thread, %tid.x;\n"
    "mad.lo.u32 %i, %a, 256, %thread;\n"
    "mov.b64 %x, rows;\n"
    "ROW:\n"
    "ld.param.u64 %from, [%x+16];\n"
    "ld.param.u32 %at, [%x+24];\n"
    "ld.param.u32 %bytes, [%x+28];\n"
    "add.u32 %a, %bytes, 15;\n"
    "shr.u32 %a, %a, 4;\n"
    "setp.lt.u32 %p, %i, %a;\n"
    "@%p bra HERE;\n"
    "sub.u32 %i, %i, %a;\n"
    "add.u64 %x, %x, 16;\n"
    "sub.u32 %b, %b, 1;\n"
    "setp.ne.u32 %p, %b, 0;\n"
    "@%p bra ROW;\n"
    "mov.u32 %bytes, 0;\n"
    "HERE:\n"
    "shl.b32 %i, %i, 4;\n"
    "ld.volatile.global.u64 %now, [%control+32];\n"
    "@!%first bra WAIT;\n"
    "ld.volatile.global.u32 %begun, [%control];\n"
    "ld.volatile.global.u32 %room, [%control+4];\n"
    "ld.volatile.global.u32 %slots, [%control+8];\n"
    "ld.volatile.global.u32 %size, [%control+12];\n"
    "ld.volatile.global.u64 %now, [%control+24];\n"
    "WAIT:\n"
    "griddepcontrol.wait;\n"
    "cvt.u64.u32 %y, %i;\n"
    "add.u64 %from, %from, %y;\n"
    "cvt.u64.u32 %to, %at;\n"
    "add.u64 %to, %to, %y;\n"
    "cvt.u64.u32 %y, %bytes;\n"
    "or.b64 %y, %y, %from;\n"
    "and.b64 %y, %y, 15;\n"
    "setp.eq.u64 %whole, %y, 0;\n"
    "setp.lt.u32 %p, %i, %bytes;\n"
    "and.pred %whole, %whole, %p;\n"
    "@%whole ld.global.v4.u32 {%v0, %v1, %v2, %v3}, [%from];\n"
    "@%first bra LOOK;\n"
    "bar.sync 0;\n"
    "@%whole griddepcontrol.launch_dependents;\n"
    "@!%p griddepcontrol.launch_dependents;\n"
    "bra STORE;\n"
    "LOOK:\n"
    "mov.u32 %looks, 0;\n"
    "ROOM:\n"
    "setp.eq.u32 %q, %slots, 0;\n"
    "@%q bra CLOSED;\n"
    "sub.u32 %a, %begun, %room;\n"
    "setp.lt.s32 %q, %a, 0;\n"
    "@%q bra FOUND;\n"
    "nanosleep.u32 2000;\n"
    "ld.volatile.global.u32 %room, [%control+4];\n"
    "add.u32 %looks, %looks, 1;\n"
    "setp.ne.u32 %q, %looks, 5000000;\n"
    "@%q bra ROOM;\n"
    "mov.u32 %a, 1;\n"
    "st.volatile.global.u32 [%control+20], %a;\n"
    "CLOSED:\n"
    "mov.u64 %now, 0;\n"
    "bra STORE;\n"
    "FOUND:\n"
    "rem.u32 %a, %begun, %slots;\n"
    "cvt.u64.u32 %y, %a;\n"
    "mad.lo.u64 %now, %y, %size, %now;\n"
    "STORE:\n"
    "setp.eq.u64 %q, %now, 0;\n"
    "@%q bra END;\n"
    "add.u64 %to, %to, %now;\n"
    "@%whole st.global.v4.u32 [%to], {%v0, %v1, %v2, %v3};\n"
    "@%whole bra END;\n"
    "add.u32 %b, %i, 16;\n"
    "min.u32 %b, %b, %bytes;\n"
    "NEXT:\n"
    "setp.ge.u32 %q, %i, %b;\n"
    "@%q bra END;\n"
    "ld.global.u16 %h, [%from];\n"
    "st.global.u16 [%to], %h;\n"
    "add.u64 %from, %from, 2;\n"
    "add.u64 %to, %to, 2;\n"
    "add.u32 %i, %i, 2;\n"
    "bra NEXT;\n"
    "END:\n"
    "@!%first bra DONE;\n"
    "bar.sync 0;\n"
    "setp.ne.u32 %q, %thread, 0;\n"
    "@%q bra DONE;\n"
    "mov.u32 %a, %nctaid.x;\n"
    "sub.u32 %a, %a, 1;\n"
    "setp.eq.u32 %q, %a, 0;\n"
    "@%q bra COUNT;\n"
    "atom.global.inc.u32 %b, [%control+16], %a;\n"
    "setp.ne.u32 %q, %b, %a;\n"
    "@%q bra DONE;\n"
    "COUNT:\n"
    "st.volatile.global.u64 [%control+32], %now;\n"
    "setp.eq.u64 %q, %now, 0;\n"
    "add.u32 %begun, %begun, 1;\n"
    "@!%q st.volatile.global.u32 [%control], %begun;\n"
    "mov.u32 %a, 0;\n"
    "@%q st.volatile.global.u32 [%control+8], %a;\n"
    "DONE:\n"
    "ret;\n"
    "}\n";

/* A function of the driver, whose binary interface does not change, in *function. */
static inline int parity__driver(const char *name, void *function) {
#if defined(_WIN32)
    HMODULE library = LoadLibraryA("nvcuda.dll");
    FARPROC found = library ? GetProcAddress(library, name) : NULL;
#else
    void *library = dlopen("libcuda.so.1", RTLD_NOW), *found = library ? dlsym(library, name) : NULL;
#endif
    memcpy(function, &found, sizeof found);
    return found ? 0 : -1;
}

/* CUlaunchAttribute, CUlaunchConfig and the first CUDA_KERNEL_NODE_PARAMS of cuda.h. */
struct parity__attribute {
    int id, unused, value[16];
};
struct parity__config {
    unsigned grid[3], block[3], shared;
    cudaStream_t stream;
    struct parity__attribute *attributes;
    unsigned n_attributes;
};
struct parity__node_params {
    void *function;
    unsigned grid[3], block[3], shared;
    void **arguments, **extra;
};

/* Whether a device's kernels can start before the one that they follow has ended. */
static inline int parity__overlaps(int device) {
    int major = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    return major >= 9;
}

/* The kernel for the current device, or NULL. */
static inline void *parity__kernel(parity_dump *d, int device) {
    int (*load)(void **, const void *), (*get)(void **, void *, const char *);
    char *text, *at, *end;
    void *module;
    if (d->kernels[device]) return d->kernels[device];
    if (parity__driver("cuModuleLoadData", &load) || parity__driver("cuModuleGetFunction", &get)) return NULL;
    text = (char *)malloc(sizeof parity__ptx);
    if (!text) return NULL;
    memcpy(text, parity__ptx, sizeof parity__ptx);
    if (!parity__overlaps(device)) {
        memcpy(strstr(text, "sm_90"), "sm_70", 5);
        for (at = text; (at = strstr(at, "griddepcontrol")) != NULL;) { /* with its predicate */
            end = strchr(at, '\n');
            while (at[-1] != '\n') at--;
            while (at < end) *at++ = ' ';
        }
    }
    if (load(&module, text) || get(&d->kernels[device], module, "parity_record")) d->kernels[device] = NULL;
    free(text);
    return d->kernels[device];
}

/* CUDA 13 puts data about edges into these calls. */
static inline cudaError_t parity__capture(cudaStream_t stream, unsigned long long *id, cudaGraph_t *graph,
                                          const cudaGraphNode_t **before, size_t *n) {
    enum cudaStreamCaptureStatus state;
#if CUDART_VERSION >= 13000
    const cudaGraphEdgeData *edges;
    return cudaStreamGetCaptureInfo(stream, &state, id, graph, before, &edges, n);
#else
    return cudaStreamGetCaptureInfo_v2(stream, &state, id, graph, before, n);
#endif
}

static inline cudaError_t parity__follows(cudaGraph_t graph, cudaGraphNode_t before, cudaGraphNode_t node) {
#if CUDART_VERSION >= 13000
    return cudaGraphAddDependencies(graph, &before, &node, NULL, 1);
#else
    return cudaGraphAddDependencies(graph, &before, &node, 1);
#endif
}

/* The record of this capture, made at the first checkpoint with the copy that each replay begins with. That copy is beside the
 * kernels, and lets them overlap: in a graph that is one line they would not. */
static inline struct parity_graph *parity__graph_of(parity_dump *d, cudaGraph_t graph, unsigned long long id, cudaError_t *status) {
    struct parity_graph *g, *other;
    cudaUserObject_t object;
    cudaGraphNode_t node;
    for (g = d->graphs; g; g = g->next) /* only captures put graphs there */
        if (g->id == id) return g;
    g = (struct parity_graph *)calloc(1, sizeof *g);
    if (!g) return NULL;
    g->id = id;
    g->step = d->step;
    g->decode = d->decode;
    g->counted = !d->pass;
    cudaGetDevice(&g->device);
    parity__enter(&d->device);
    for (other = d->graphs; other && !g->ring.control; other = other->next)
        if (other->emptied && other->device == g->device) {
            g->ring = other->ring;
            memset(&other->ring, 0, sizeof other->ring);
        }
    parity__leave(&d->device);
    if (!g->ring.control) {
        *status = cudaMalloc((void **)&g->ring.control, sizeof *g->ring.control);
        if (*status == cudaSuccess) *status = cudaMallocHost((void **)&g->ring.seen, sizeof *g->ring.seen);
    }
    if (*status == cudaSuccess) {
        memset(g->ring.seen, 0, sizeof *g->ring.seen);
        *status = cudaGraphAddMemcpyNode1D(&node, graph, NULL, 0, g->ring.seen, g->ring.control, sizeof *g->ring.seen, cudaMemcpyDeviceToHost);
    }
    if (*status == cudaSuccess) *status = cudaUserObjectCreate(&object, g, parity__graph_gone, 1, cudaUserObjectNoDestructorSync);
    if (*status == cudaSuccess) *status = cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
    if (*status == cudaSuccess) {
        parity__enter(&d->device);
        g->next = d->graphs;
        d->graphs = g;
        parity__leave(&d->device);
        return g;
    }
    parity__free_ring(&g->ring);
    free(g);
    return NULL;
}

/* A place in each replay's rows. */
static inline struct parity_slot *parity__slot(struct parity_graph *g, size_t bytes) {
    struct parity_slot *slot = (struct parity_slot *)calloc(1, sizeof *slot), **end = &g->slots;
    if (!slot) return NULL;
    slot->at = g->size;
    g->size += (bytes + 15) & ~(size_t)15;
    while (*end) end = &(*end)->next;
    *end = slot;
    return slot;
}

/* Memory of so many bytes for a ring. */
static inline cudaError_t parity__allocate_ring(struct parity_ring *ring, size_t size) {
    cudaError_t status = cudaMalloc((void **)&ring->memory, size);
    if (status == cudaSuccess) status = cudaMallocHost((void **)&ring->brought, size / 8);
    if (status != cudaSuccess && ring->memory) cudaFree(ring->memory);
    if (status != cudaSuccess) ring->memory = ring->brought = NULL;
    ring->size = status == cudaSuccess ? size : 0;
    return status;
}

/* Fit the ring to the size of a replay: as many places as there may be, or fewer where the device has no room; none of them is in use
 * before the capture ends. */
static inline cudaError_t parity__fit_ring(parity_dump *d, struct parity_graph *g) {
    struct parity_ring *ring = &g->ring;
    struct parity_control control;
    const struct parity_graph *other;
    cudaError_t status = cudaSuccess;
    uint32_t places, rings = 1;
    size_t size;
    for (other = d->graphs; other; other = other->next) rings += other != g && other->ring.memory;
    places = parity__places(g->size, rings);
    if (ring->size < places * g->size) {
        if (ring->memory) {
            ring->outgrown[ring->n_outgrown][0] = ring->memory;
            ring->outgrown[ring->n_outgrown++][1] = ring->brought;
        }
        ring->memory = ring->brought = NULL;
        size = 2 * ring->size > (size_t)1 << 20 ? 2 * ring->size : (size_t)1 << 20;
        status = parity__allocate_ring(ring, size > places * g->size ? size : places * g->size);
        while (status == cudaErrorMemoryAllocation && places > 8) {
            cudaGetLastError();
            places /= 2;
            status = parity__allocate_ring(ring, places * g->size);
        }
    }
    memset(&control, 0, sizeof control);
    control.places = control.room = places;
    control.size = (uint32_t)g->size;
    control.ring = (uint64_t)(uintptr_t)ring->memory;
    if (status != cudaSuccess) return status;
    parity__enter(&d->device);
    g->places = places;
    status = parity__bring(d, g->device, ring->control, &control, sizeof control, cudaMemcpyHostToDevice);
    parity__leave(&d->device);
    return status;
}

/* The last replays of graphs that are gone, so that their memory can serve again. */
static inline cudaError_t parity__collect_gone(parity_dump *d) {
    struct parity_graph *g;
    cudaError_t status = cudaSuccess;
    parity__enter(&d->device);
    for (g = d->graphs; g && status == cudaSuccess; g = g->next)
        if (g->gone && !g->emptied) {
            status = parity__collect_all(d, g);
            g->emptied = status == cudaSuccess;
        }
    parity__leave(&d->device);
    return status;
}

/* Add rows to the last kernel where nothing came behind it: returns what the driver does. */
static inline int parity__join(parity_dump *d, struct parity_graph *g, unsigned blocks, void **arguments) {
    int (*set)(cudaGraphNode_t, const struct parity__node_params *);
    struct parity__node_params params;
    if (parity__driver("cuGraphKernelNodeSetParams", &set)) return -1;
    memset(&params, 0, sizeof params);
    params.function = parity__kernel(d, g->device);
    params.grid[0] = blocks;
    params.block[0] = 256;
    params.grid[1] = params.grid[2] = params.block[1] = params.block[2] = 1;
    params.arguments = arguments;
    return set(g->last, &params);
}

/* Launch the kernel for the graph's present rows into the stream: returns what the driver does. */
static inline int parity__launch(parity_dump *d, struct parity_graph *g, unsigned blocks, void **arguments, cudaStream_t stream, int overlaps) {
    int (*launch)(const struct parity__config *, void *, void **, void **);
    int (*plain)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, cudaStream_t, void **, void **);
    struct parity__config config;
    struct parity__attribute attribute;
    void *kernel = parity__kernel(d, g->device);
    if (!overlaps || parity__driver("cuLaunchKernelEx", &launch))
        return parity__driver("cuLaunchKernel", &plain) ? -1
                                                        : plain(kernel, blocks, 1, 1, 256, 1, 1, 0, stream, arguments, NULL);
    memset(&config, 0, sizeof config);
    memset(&attribute, 0, sizeof attribute);
    attribute.id = 6; /* programmatic stream serialization */
    attribute.value[0] = 1;
    config.grid[0] = blocks;
    config.block[0] = 256;
    config.grid[1] = config.grid[2] = config.block[1] = config.block[2] = 1;
    config.stream = stream;
    config.attributes = &attribute;
    config.n_attributes = 1;
    return launch(&config, kernel, arguments, NULL);
}

/* Let the one kernel that follows the last one of ours start when all rows have been read, before they are written: it may change what
 * was copied, and reads nothing that ours writes. What made the rows must be complete before it, which is now said by an edge of its
 * own. */
static inline void parity__let_overlap(const struct parity_graph *g, cudaGraph_t graph) {
#if CUDART_VERSION >= 13000
    const cudaGraphNode_t *last = &g->last;
    cudaGraphNode_t next[2], maker[2], before[2];
    cudaGraphEdgeData edges[2], plain, programmatic;
    union cudaLaunchAttributeValue cooperative;
    enum cudaGraphNodeType type;
    size_t n = 2;
    memset(&plain, 0, sizeof plain);
    memset(&programmatic, 0, sizeof programmatic);
    programmatic.from_port = cudaGraphKernelNodePortProgrammatic;
    programmatic.type = cudaGraphDependencyTypeProgrammatic;
    if (!g->last || g->last == g->first || !parity__overlaps(g->device)) return; /* later kernels read what the first one wrote */
    if (cudaGraphNodeGetDependentNodes(*last, next, edges, &n) != cudaSuccess || n != 1 || edges[0].type || edges[0].from_port) return;
    if (cudaGraphNodeGetType(next[0], &type) != cudaSuccess || type != cudaGraphNodeTypeKernel) return;
    memset(&cooperative, 0, sizeof cooperative);
    if (cudaGraphKernelNodeGetAttribute(next[0], cudaLaunchAttributeCooperative, &cooperative) != cudaSuccess || cooperative.cooperative)
        return;
    n = 2;
    if (cudaGraphNodeGetDependencies(next[0], before, edges, &n) != cudaSuccess || n != 1) return;
    n = 2;
    if (cudaGraphNodeGetDependencies(*last, maker, edges, &n) != cudaSuccess || n != 1) return;
    if (cudaGraphAddDependencies(graph, maker, next, &plain, 1) != cudaSuccess) return;
    if (cudaGraphRemoveDependencies(graph, last, next, &plain, 1) != cudaSuccess) return;
    if (cudaGraphAddDependencies(graph, last, next, &programmatic, 1) != cudaSuccess)
        cudaGraphAddDependencies(graph, last, next, &plain, 1);
#else
    (void)g, (void)graph;
#endif
}

/* Put a checkpoint behind what the stream has captured so far, with the place of its pass where it is the first of one. */
static inline cudaError_t parity__put_in_line(parity_dump *d, struct parity_graph *g, const struct parity_slot *slot,
                                              const struct parity_slot *place, const void *values, size_t bytes, cudaStream_t stream) {
    const cudaGraphNode_t *before;
    struct parity_segments *rows = &g->rows;
    enum cudaGraphNodeType type = cudaGraphNodeTypeEmpty;
    cudaGraph_t graph;
    unsigned long long id;
    unsigned chunks = 0;
    size_t n;
    uint32_t i, more = place ? d->pass ? 3 : 2 : 1;
    int joins, overlaps, behind = 0;
    void *arguments[1];
    cudaError_t status = parity__capture(stream, &id, &graph, &before, &n);
    if (status != cudaSuccess) return status;
    for (i = 0; i < n; i++) behind |= before[i] == g->first;
    joins = g->last && n == 1 && before[0] == g->last && rows->n + more <= PARITY__SEGMENTS;
    if (!joins) {
        parity__let_overlap(g, graph);
        cudaGetLastError(); /* what cannot overlap stays as it is */
        status = parity__capture(stream, &id, &graph, &before, &n);
        if (status != cudaSuccess) return status;
        if (n == 1 && before[0] != g->last) cudaGraphNodeGetType(before[0], &type);
        memset(rows, 0, sizeof *rows);
        rows->control = (uint64_t)(uintptr_t)g->ring.control;
        rows->first = !g->first;
    }
    rows->of[rows->n].from = (uint64_t)(uintptr_t)values;
    rows->of[rows->n].at = (uint32_t)slot->at;
    rows->of[rows->n++].bytes = (uint32_t)bytes;
    for (i = 0; place && i < more - 1; i++) {
        rows->of[rows->n].from = (uint64_t)(uintptr_t)(i ? d->pass : d->position);
        rows->of[rows->n].at = (uint32_t)place->at + 16 * i;
        rows->of[rows->n++].bytes = 4;
    }
    for (i = 0; i < rows->n; i++) chunks += (rows->of[i].bytes + 15) / 16;
    arguments[0] = rows;
    if (joins) return parity__join(d, g, (chunks + 255) / 256, arguments) ? cudaErrorUnknown : cudaSuccess;
    overlaps = type == cudaGraphNodeTypeKernel && (!g->first || stream == g->stream) && parity__overlaps(g->device);
    if (parity__launch(d, g, (chunks + 255) / 256, arguments, stream, overlaps)) return cudaErrorLaunchFailure;
    status = parity__capture(stream, &id, &graph, &before, &n);
    if (status != cudaSuccess) return status;
    g->last = before[0];
    if (!g->first) {
        g->first = g->last;
        g->stream = stream;
    } else if (stream != g->stream && !behind) /* a branch that may be ahead of the first kernel */
        status = parity__follows(graph, g->first, g->last);
    return status;
}

/* A checkpoint in a stream that is being captured. Memory may be allocated during that: it is not part of the capture. */
static inline int parity__captured(parity_dump *d, const char *point, const void *values, parity_type type, size_t n,
                                   cudaStream_t stream) {
    enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    size_t bytes = n * (type == PARITY_F32 ? 4 : 2), before;
    const cudaGraphNode_t *nodes;
    cudaGraph_t graph;
    unsigned long long id;
    struct parity_graph *g = NULL;
    struct parity_slot *slot = NULL, *place = NULL;
    const char *why = NULL;
    cudaError_t status = cudaSuccess;
    int device = 0;
    if (strlen(point) >= sizeof slot->point) return parity__refuse(d, point, "names of captured checkpoints have at most 63 characters");
    if (bytes > (size_t)1 << 31) return parity__refuse(d, point, "a captured row has at most 2 GiB");
    parity__enter(&d->capturing);
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaGetDevice(&device);
    if (!d->position)
        why = "this stream is being captured into a graph: give parity_position_device the device memory from which each replay reads "
              "its position";
    else if (device >= PARITY__DEVICES) why = "captured checkpoints are for the first 64 devices";
    else if (parity__start_threads(d)) why = "no thread could be started";
    else if (!parity__kernel(d, device)) why = "the driver does not take the kernel that records in graphs; run without graphs";
    if (!why) {
        status = parity__collect_gone(d);
        if (status == cudaSuccess) status = parity__capture(stream, &id, &graph, &nodes, &before);
        if (status == cudaSuccess) g = parity__graph_of(d, graph, id, &status);
        /* A point that comes again is of another pass in the same graph, which has a position of its own. */
        for (slot = g ? g->slots : NULL; slot; slot = slot->next)
            if (slot->place == g->place && strcmp(slot->point, point) == 0) g->place = NULL;
        if (g && !g->place) g->place = place = parity__slot(g, 32);
        slot = g && g->place ? parity__slot(g, bytes) : NULL;
        if (g && g->size > (size_t)1 << 31) why = "a replay's rows have at most 2 GiB";
        else if (slot) {
            status = parity__fit_ring(d, g);
            if (status == cudaSuccess) status = parity__put_in_line(d, g, slot, place, values, bytes, stream);
            if (status == cudaSuccess) { /* with a place it is a row */
                slot->n = n;
                slot->type = type;
                strcpy(slot->point, point);
                slot->place = g->place;
            }
        }
        if (!why && status != cudaSuccess) why = cudaGetErrorString(status);
        else if (!why && !slot) why = "out of memory";
    }
    cudaThreadExchangeStreamCaptureMode(&mode);
    parity__leave(&d->capturing);
    if (why) cudaGetLastError();
    return why ? parity__refuse(d, point, why) : 0;
}
#endif

/* Whether a stream is being captured: 1, 0, or −1 if this call cannot be intended. */
static inline int parity__is_captured(parity_dump *d, const char *point, cudaStream_t stream) {
    enum cudaStreamCaptureStatus state = cudaStreamCaptureStatusNone, other;
    cudaError_t status = cudaStreamIsCapturing(stream, &state);
    if (status == cudaSuccess && state == cudaStreamCaptureStatusNone) status = cudaStreamIsCapturing(cudaStreamLegacy, &other);
    if (status == cudaErrorStreamCaptureImplicit) {
        cudaGetLastError();
        return parity__refuse(d, point, "another stream is being captured into a graph: give the captured stream");
    }
    if (state == cudaStreamCaptureStatusInvalidated) return parity__refuse(d, point, "the capture of this stream has already failed");
    return state == cudaStreamCaptureStatusActive;
}

/* The same for DEVICE memory: copied in `stream`, after what it computed, into pinned memory; waits for the copy. In a stream that is
 * being captured it records at every replay instead, at the position of parity_position_device, and `position` (any from 0) is not used. */
static inline int parity_checkpoint_device(parity_dump *d, const char *point, int position, const void *device_values,
                                           parity_type type, size_t n, cudaStream_t stream) {
    struct cudaPointerAttributes at;
    size_t size = n * (type == PARITY_F32 ? 4 : 2);
    cudaError_t status;
    void *copy;
    int result;
    if (parity__arguments(d, point, position, device_values, type, n)) return -1;
    if (!parity_wants(d, point)) return 0;
    if (cudaPointerGetAttributes(&at, device_values) != cudaSuccess ||
        (at.type != cudaMemoryTypeDevice && at.type != cudaMemoryTypeManaged)) {
        cudaGetLastError();
        return parity__refuse(d, point, "this is host memory; give it to parity_checkpoint");
    }
    result = parity__is_captured(d, point, stream);
    if (result < 0) return -1;
#if CUDART_VERSION >= 11030
    if (result) return parity__captured(d, point, device_values, type, n, stream);
#else
    if (result) return parity__refuse(d, point, "graphs can be recorded from CUDA 11.3 on; run without graphs");
#endif
    parity__enter(&d->copying); /* the slab belongs to one thread until its values have been taken out */
    if (d->slab_size < size) {
        if (d->slab) cudaFreeHost(d->slab);
        d->slab = NULL;
        d->slab_size = 0;
        status = cudaMallocHost(&d->slab, size);
        if (status == cudaSuccess) d->slab_size = size;
    } else status = cudaSuccess;
    if (status == cudaSuccess) status = cudaMemcpyAsync(d->slab, device_values, size, cudaMemcpyDeviceToHost, stream);
    if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
    copy = status == cudaSuccess ? malloc(size) : NULL;
    if (copy) memcpy(copy, d->slab, size);
    parity__leave(&d->copying);
    if (!copy) return parity__refuse(d, point, status == cudaSuccess ? "out of memory" : cudaGetErrorString(status));
    result = parity__checkpoint(d, point, position, copy, type, n);
    free(copy);
    return result;
}
#endif

/* A float32 as F16 or BF16, rounded to nearest, ties to even. */
static inline uint16_t parity__half(float value, parity_type type) {
    uint32_t bits, sign, shift, mantissa, rest, halfway;
    int exponent;
    uint16_t result;
    memcpy(&bits, &value, sizeof bits);
    if (type == PARITY_BF16) {
        if (isnan(value)) return (uint16_t)(bits >> 16 | 64);
        return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
    }
    sign = bits >> 16 & 0x8000u;
    if (isnan(value)) return (uint16_t)(sign | 0x7E00u);
    exponent = (int)(bits >> 23 & 255) - 112;
    if (exponent >= 31) return (uint16_t)(sign | 0x7C00u);
    if (exponent < -10) return (uint16_t)sign;
    mantissa = (bits & 0x7FFFFFu) | 0x800000u;
    shift = exponent > 0 ? 13 : (uint32_t)(14 - exponent);
    rest = mantissa & ((1u << shift) - 1);
    halfway = 1u << (shift - 1);
    mantissa >>= shift;
    /* The implicit bit adds one to the exponent, and so does a carry out of the mantissa: 65520 becomes infinity. */
    result = (uint16_t)(exponent > 0 ? ((uint32_t)(exponent - 1) << 10) + mantissa : mantissa);
    if (rest > halfway || (rest == halfway && (mantissa & 1))) result++;
    return (uint16_t)(sign | result);
}

/* Replace one position's row, n values in HOST memory, by the reference's, if $PARITY_INJECT names a file that has it; call it
 * right after parity_checkpoint. Returns 1 if it was replaced, 0 if not, -1 for an error. */
static inline int parity_inject(parity_dump *d, const char *point, int position, void *values, parity_type type, size_t n) {
    struct parity_injected *found = NULL;
    float *row;
    size_t i;
    int j;
    if (!d) return -1;
    if (!d->inject) return 0;
    if (parity__arguments(d, point, position, values, type, n)) return -1;
    for (j = 0; j < d->n_injected && !found; j++)
        if (strcmp(d->injected[j].point, point) == 0 && position >= d->injected[j].first &&
            position < d->injected[j].first + d->injected[j].rows)
            found = &d->injected[j];
    if (!found) return 0;
    if ((size_t)found->width != n) return parity__refuse(d, point, "the reference's row has another number of values");
    row = (float *)malloc(4 * n);
    if (!row) return parity__refuse(d, point, "out of memory");
    parity__lock(d);
    if (fseek(d->inject, (long)(found->at + 4 * (position - found->first) * found->width), SEEK_SET) != 0 ||
        fread(row, 4, n, d->inject) != n)
        parity__fail(d, "%s: the values to inject are cut short", point);
    j = d->error[0] ? -1 : 1;
    parity__unlock(d);
    for (i = 0; i < n && j == 1; i++) {
        uint16_t half;
        if (type == PARITY_F32) {
            memcpy((unsigned char *)values + 4 * i, row + i, 4);
            continue;
        }
        half = parity__half(row[i], type);
        memcpy((unsigned char *)values + 2 * i, &half, 2);
    }
    free(row);
    return j;
}

#ifdef PARITY_CUDA
/* The same for DEVICE memory, in `stream`, after the kernels that computed it; waits for the copy. */
static inline int parity_inject_device(parity_dump *d, const char *point, int position, void *device_values, parity_type type,
                                       size_t n, cudaStream_t stream) {
    size_t size = n * (type == PARITY_F32 ? 4 : 2);
    cudaError_t status = cudaSuccess;
    void *row;
    int result;
    if (!d) return -1;
    if (!d->inject) return 0;
    result = parity__is_captured(d, point ? point : "inject", stream);
    if (result < 0) return -1;
    if (result) return parity__refuse(d, point, "values cannot be injected into a captured graph; run without graphs");
    row = malloc(size ? size : 1);
    if (!row) return parity__refuse(d, point, "out of memory");
    result = parity_inject(d, point, position, row, type, n);
    if (result == 1) {
        status = cudaMemcpyAsync(device_values, row, size, cudaMemcpyHostToDevice, stream);
        if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
    }
    free(row);
    return status == cudaSuccess ? result : parity__refuse(d, point, cudaGetErrorString(status));
}
#endif

/* A generated token: the position that it will have, its id, its text (or NULL). */
static inline int parity_token(parity_dump *d, int position, int id, const char *text) {
    int result;
    if (!d) return -1;
    parity__lock(d);
    fprintf(d->file, "{\"type\":\"token\",\"seq\":%d,\"token_idx\":%d,\"id\":%d,\"text\":", d->seq, position, id);
    parity__text(d->file, text ? text : "");
    fputs(",\"top\":[]}\n", d->file);
    d->tokens++;
    result = parity__written(d);
    parity__unlock(d);
    return result;
}

/* Write the end record and close. A dump without it was cut short, and parity says so. */
static inline int parity_close(parity_dump *d) {
    int result;
#ifdef PARITY_CUDA
    struct parity_graph *g, *next;
    int device;
#endif
    if (!d) return -1;
#ifdef PARITY_CUDA
    parity_flush(d);
    parity__end_threads(d);
    for (g = d->graphs; g; g = next) {
        next = g->next;
        parity__free_graph(g);
    }
    for (device = 0; device < PARITY__DEVICES; device++)
        if (d->beside[device]) cudaStreamDestroy(d->beside[device]);
#endif
    if (!d->error[0])
        fprintf(d->file, "{\"type\":\"end\",\"checkpoints\":%lld,\"tokens\":%lld}\n", d->checkpoints, d->tokens);
    result = d->error[0] ? -1 : 0;
    if (fclose(d->file) != 0) result = -1;
#ifdef PARITY_CUDA
    if (d->slab) cudaFreeHost(d->slab);
    parity__end_mutex(&d->copying);
    parity__end_mutex(&d->capturing);
    parity__end_mutex(&d->device);
    parity__end_mutex(&d->queue.lock);
#if !defined(_WIN32)
    pthread_cond_destroy(&d->queue.work);
    pthread_cond_destroy(&d->queue.room);
#endif
#endif
    parity__end_mutex(&d->lock);
    if (d->inject) fclose(d->inject);
    free(d->injected);
    free(d->only);
    free(d);
    return result;
}

#endif
