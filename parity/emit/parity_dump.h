/* parity_dump.h: write checkpoints of an engine for `parity diff` and `parity lint`. One header, C99 or C++, no dependency.
 *
 *   parity_dump *d = parity_open("ours.jsonl");
 *   parity_header(d, "my engine", "model.gguf", 24, tokens, n_tokens, "f32"); // the arithmetic your kernels compute in
 *   parity_only(d, argv[4]);                                                  // what {points} gives; without it, all
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
 * A replay is written to the file while the next one runs, the last one by parity_flush or parity_close: call one of them before you
 * reset the device. What cannot be captured is an error of the call, at the time of capture.
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
#include <cuda_runtime.h>
#endif

#ifndef PARITY_SLICE
#define PARITY_SLICE 16 /* leading values in a record; define it before the #include for more */
#endif
#define PARITY_SKETCH 32 /* projections of the whole row */

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

#ifdef PARITY_CUDA
#ifndef PARITY_WAITING
#define PARITY_WAITING (64u << 20) /* bytes of captured values that may wait to be written; beyond that, replays wait for the writers */
#endif
#ifndef PARITY_ARENA
#define PARITY_ARENA (4u << 20) /* bytes that are allocated at a time for a graph's checkpoints, three times: a graph has an arena or two */
#endif
#ifndef PARITY_WRITERS
#define PARITY_WRITERS 8 /* threads that turn captured rows into lines in parallel; the lines are written in the order of the replays */
#endif

/* Memory of a graph's checkpoints. A replay copies their rows to `staged`, in line, and then all of it to `kept`, in parallel with its
 * further work; the next replay begins with the copy from `kept` to `pinned`, also in parallel. Nothing waits for the host. */
struct parity_arena {
    struct parity_arena *next;
    unsigned char *staged, *kept, *pinned;
    size_t size, used;
    cudaGraphNode_t keep, bring;
};

/* A checkpoint of a captured graph, or, without a name, the position and step of its pass. */
struct parity_slot {
    struct parity_slot *next, *place;
    struct parity_row *spare; /* memory of rows that have been written */
    struct parity_arena *arena;
    size_t at, size, n; /* size: in bytes, rounded up to a multiple of 8 */
    parity_type type;
    char point[64];
};

/* One capture. It outlives the dump if the graph does: a replay after parity_close finds no dump and records nothing. */
struct parity_graph {
    struct parity_graph *next;
    struct parity_dump *dump;
    struct parity_slot *slots, *place; /* place: the position of the pass that is being captured */
    struct parity_arena *arenas;
    unsigned long long id;
    long long replays, written; /* replays that have begun; the replay whose rows were last handed to the writers */
    cudaGraphNode_t hand_over;
    int device, step, decode, counted; /* counted: the step is that of the capture and one more for each replay */
    volatile int gone;                 /* the graph and all that was instantiated from it have been destroyed */
};

/* A row on its way to the file; its values follow it in memory. */
struct parity_row {
    struct parity_row *next;
    struct parity_slot *slot; /* whose memory it is */
    char *line; /* when it is made */
    int made;
    size_t size, n;
    parity_type type;
    int position, step, decode;
    char point[64];
};

struct parity_queue {
    parity__mutex lock;
    parity__condition change;
    parity__thread writers[PARITY_WRITERS];
    struct parity_row *first, *last; /* in the order of the replays, until they are written */
    struct parity_row *next;         /* the first that no writer has taken yet */
    size_t size;                     /* bytes of the rows */
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
    parity__mutex device; /* of the fields below; a replay may wait for the writers, which take the other lock: never take both */
    void *slab; /* pinned */
    size_t slab_size;
    const int *position, *pass; /* device memory that captured checkpoints read */
    struct parity_graph *graphs;
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
    parity__new_mutex(&d->device);
    parity__new_mutex(&d->queue.lock);
#if defined(_WIN32)
    InitializeConditionVariable(&d->queue.change);
#else
    pthread_cond_init(&d->queue.change, NULL);
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

/* The first line: which engine, which model file's name, how many layers, the prompt's token ids, and the arithmetic of its products
 * ("f32", "tf32", "f16", "bf16", or "q8" if activations are rounded to 8 bits): the limits of the comparison follow from it. NULL,
 * if it really is not known, makes the limits loose. Other unknown numbers are 0, unknown texts NULL. */
static inline int parity_header(parity_dump *d, const char *engine, const char *model, int layers, const int *tokens,
                                int n_tokens, const char *compute) {
    int i, result;
    if (!d) return -1;
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
#else
typedef struct {
    double of[4];
} parity__four;
#endif

static inline void parity__sum_up(struct parity_sums *s, const void *values, parity_type type, size_t n) {
    /* Signs from four bits of the hash, without branches, since they are random. */
    static const parity__four signs_of[16] = {
        {-1, -1, -1, -1}, {1, -1, -1, -1}, {-1, 1, -1, -1}, {1, 1, -1, -1}, {-1, -1, 1, -1}, {1, -1, 1, -1},
        {-1, 1, 1, -1},   {1, 1, 1, -1},   {-1, -1, -1, 1}, {1, -1, -1, 1}, {-1, 1, -1, 1},  {1, 1, -1, 1},
        {-1, -1, 1, 1},   {1, -1, 1, 1},   {-1, 1, 1, 1},   {1, 1, 1, 1}};
    parity__four sketch[PARITY_SKETCH / 4];
    size_t i;
    float largest = -1;
    int j, some = 0;
    memset(s, 0, sizeof *s);
    memset(sketch, 0, sizeof sketch);
    for (i = 0; i < n; i++) {
        float value = parity__value(values, type, i);
        double x = value;
        uint32_t signs = parity__fmix32((uint32_t)(i + 1));
        if (!isfinite(value)) {
            s->nonfinite++;
            if (largest < 0) largest = 0, s->largest_at = i;
            continue;
        }
        if (fabsf(value) > largest) largest = fabsf(value), s->largest_at = i;
        s->least = some ? (x < s->least ? x : s->least) : x;
        s->most = some ? (x > s->most ? x : s->most) : x;
        some = 1;
        s->sum += x;
        s->squares += x * x;
        for (j = 0; j < PARITY_SKETCH / 4; j++) {
#if defined(__GNUC__)
            sketch[j] += signs_of[signs >> 4 * j & 15] * x;
#else
            int k;
            for (k = 0; k < 4; k++) sketch[j].of[k] += signs_of[signs >> 4 * j & 15].of[k] * x;
#endif
        }
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
    if (!point || !values || !n || position < 0)
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
    parity__enter(&d->device);
    d->position = position;
    d->pass = step;
    parity__leave(&d->device);
    return 0;
}

static inline void parity__queue_wait(struct parity_queue *q) {
#if defined(_WIN32)
    SleepConditionVariableCS(&q->change, &q->lock, INFINITE);
#else
    pthread_cond_wait(&q->change, &q->lock);
#endif
}

static inline void parity__queue_tell(struct parity_queue *q) {
#if defined(_WIN32)
    WakeAllConditionVariable(&q->change);
#else
    pthread_cond_broadcast(&q->change);
#endif
}

/* Write the finished lines at the queue's head; the caller holds the queue's lock. */
static inline void parity__write_made(parity_dump *d, struct parity_queue *q) {
    struct parity_row *row;
    if (q->writing) return; /* the thread that does will reach these rows, too */
    q->writing = 1;
    while ((row = q->first) != NULL && row->made) {
        parity__leave(&q->lock);
        if (d->error[0]) free(row->line);
        else parity__write(d, row->point, row->line);
        parity__enter(&q->lock);
        q->first = row->next;
        if (!q->first) q->last = NULL;
        q->size -= row->size;
        row->next = row->slot->spare;
        row->slot->spare = row;
        parity__queue_tell(q);
    }
    q->writing = 0;
}

#if defined(_WIN32)
static inline DWORD WINAPI parity__run_writer(void *dump) {
#else
static inline void *parity__run_writer(void *dump) {
#endif
    parity_dump *d = (parity_dump *)dump;
    struct parity_queue *q = &d->queue;
    struct parity_row *row;
    struct parity_sums sums;
    parity__enter(&q->lock);
    for (;;) {
        while (!q->next && !q->closing) parity__queue_wait(q);
        row = q->next;
        if (!row) break;
        q->next = row->next;
        parity__leave(&q->lock);
        parity__sum_up(&sums, row + 1, row->type, row->n);
        row->line = parity__line(d->seq, row->point, row->position, row->step, row->decode, row + 1, row->type, row->n, &sums);
        parity__enter(&q->lock);
        row->made = 1;
        parity__write_made(d, q);
    }
    parity__leave(&q->lock);
    return 0;
}

static inline int parity__start_writers(struct parity_queue *q, parity_dump *d) {
    if (q->running) return 0;
    for (; q->running < PARITY_WRITERS; q->running++) {
#if defined(_WIN32)
        q->writers[q->running] = CreateThread(NULL, 0, parity__run_writer, d, 0, NULL);
        if (!q->writers[q->running]) break;
#else
        if (pthread_create(&q->writers[q->running], NULL, parity__run_writer, d) != 0) break;
#endif
    }
    return q->running ? 0 : -1;
}

static inline void parity__end_writers(struct parity_queue *q) {
    int i;
    if (!q->running) return;
    parity__enter(&q->lock);
    q->closing = 1;
    parity__queue_tell(q);
    parity__leave(&q->lock);
    for (i = 0; i < q->running; i++) {
#if defined(_WIN32)
        WaitForSingleObject(q->writers[i], INFINITE);
        CloseHandle(q->writers[i]);
#else
        pthread_join(q->writers[i], NULL);
#endif
    }
}

/* Hand the rows that replay number `replay` of a graph left in pinned memory to the writers, once; waits for room. */
static inline void parity__hand_over(struct parity_graph *g, long long replay) {
    parity_dump *d = g->dump;
    struct parity_queue *q = &d->queue;
    struct parity_slot *slot;
    struct parity_row *row;
    int32_t where[2];
    if (g->written >= replay) return;
    g->written = replay;
    for (slot = g->slots; slot; slot = slot->next) {
        if (!slot->place) continue;
        parity__enter(&q->lock);
        while (q->size && q->size + slot->size > PARITY_WAITING) parity__queue_wait(q);
        row = slot->spare;
        if (row) slot->spare = row->next;
        parity__leave(&q->lock);
        if (!row) row = (struct parity_row *)malloc(sizeof *row + slot->size);
        if (!row) {
            parity__refuse(d, slot->point, "out of memory");
            return;
        }
        memcpy(row + 1, slot->arena->pinned + slot->at, slot->size);
        memcpy(where, slot->place->arena->pinned + slot->place->at, sizeof where);
        row->next = NULL;
        row->slot = slot;
        row->made = 0;
        row->size = slot->size;
        row->n = slot->n;
        row->type = slot->type;
        row->position = where[0];
        row->step = g->counted ? g->step + (int)(replay - 1) : where[1];
        row->decode = g->decode;
        memcpy(row->point, slot->point, sizeof row->point);
        parity__enter(&q->lock);
        q->size += row->size;
        if (q->last) q->last->next = row;
        else q->first = row;
        q->last = row;
        if (!q->next) q->next = row;
        parity__queue_tell(q);
        parity__leave(&q->lock);
    }
}

/* The host node of a graph: at the beginning of replay r the pinned rows are those of replay r − 1. */
static inline void CUDART_CB parity__replayed(void *graph) {
    struct parity_graph *g = (struct parity_graph *)graph;
    if (!g->dump) return;
    parity__hand_over(g, g->replays);
    g->replays++;
}

static inline void CUDART_CB parity__graph_gone(void *graph) { ((struct parity_graph *)graph)->gone = 1; }

/* Write the rows of each graph's last replay; waits for the device. */
static inline int parity_flush(parity_dump *d) {
    struct parity_graph *g;
    struct parity_arena *arena;
    cudaError_t status = cudaSuccess;
    int device;
    if (!d) return -1;
    if (!d->queue.running) return d->error[0] ? -1 : 0;
    parity__enter(&d->device);
    cudaGetDevice(&device);
    for (g = d->graphs; g && status == cudaSuccess; g = g->next) {
        cudaSetDevice(g->device);
        status = cudaDeviceSynchronize();
        if (g->written >= g->replays) continue;
        for (arena = g->arenas; arena && status == cudaSuccess; arena = arena->next)
            status = cudaMemcpy(arena->pinned, arena->kept, arena->used, cudaMemcpyDeviceToHost);
        if (status == cudaSuccess) parity__hand_over(g, g->replays);
    }
    cudaSetDevice(device);
    parity__leave(&d->device);
    if (status != cudaSuccess) return parity__refuse(d, "what the last replay staged is lost", cudaGetErrorString(status));
    parity__enter(&d->queue.lock);
    while (d->queue.first) parity__queue_wait(&d->queue);
    parity__leave(&d->queue.lock);
    return d->error[0] ? -1 : 0;
}

/* Free a graph's memory, if it can't be replayed any more. */
static inline void parity__free_graph(struct parity_graph *g) {
    struct parity_slot *slot;
    struct parity_arena *arena;
    struct parity_row *row;
    if (!g->gone) return;
    while ((slot = g->slots) != NULL) {
        g->slots = slot->next;
        while ((row = slot->spare) != NULL) {
            slot->spare = row->next;
            free(row);
        }
        free(slot);
    }
    while ((arena = g->arenas) != NULL) {
        g->arenas = arena->next;
        cudaFree(arena->staged);
        cudaFree(arena->kept);
        cudaFreeHost(arena->pinned);
        free(arena);
    }
    free(g);
}

#if CUDART_VERSION >= 11030
/* CUDA 13 adds data about edges to these calls. */
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

static inline cudaError_t parity__goes_on(cudaStream_t stream, cudaGraphNode_t *nodes, size_t n) {
#if CUDART_VERSION >= 13000
    return cudaStreamUpdateCaptureDependencies(stream, nodes, NULL, n, cudaStreamSetCaptureDependencies);
#else
    return cudaStreamUpdateCaptureDependencies(stream, nodes, n, cudaStreamSetCaptureDependencies);
#endif
}

/* The record of this capture, made with its host node at the first checkpoint. */
static inline struct parity_graph *parity__graph_of(parity_dump *d, cudaGraph_t graph, unsigned long long id, cudaError_t *status) {
    struct cudaHostNodeParams call;
    cudaUserObject_t object;
    struct parity_graph *g;
    for (g = d->graphs; g; g = g->next)
        if (g->id == id) return g;
    g = (struct parity_graph *)calloc(1, sizeof *g);
    if (!g) return NULL;
    g->dump = d;
    g->id = id;
    g->step = d->step;
    g->decode = d->decode;
    g->counted = !d->pass;
    cudaGetDevice(&g->device);
    memset(&call, 0, sizeof call);
    call.fn = parity__replayed;
    call.userData = g;
    *status = cudaGraphAddHostNode(&g->hand_over, graph, NULL, 0, &call);
    if (*status == cudaSuccess) *status = cudaUserObjectCreate(&object, g, parity__graph_gone, 1, cudaUserObjectNoDestructorSync);
    if (*status == cudaSuccess) *status = cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
    g->next = d->graphs;
    d->graphs = g;
    return *status == cudaSuccess ? g : NULL;
}

/* An arena of the graph with room for so many bytes: its last one, that of a destroyed graph of the same device whose last replay
 * has been written, or a new one. It gets the nodes that copy it to the host. */
static inline struct parity_arena *parity__arena(parity_dump *d, struct parity_graph *g, cudaGraph_t graph, size_t size,
                                                 cudaError_t *status) {
    struct parity_graph *other;
    struct parity_arena **link, *arena = g->arenas;
    if (arena && arena->size - arena->used >= size) return arena;
    arena = NULL;
    for (other = d->graphs; other && !arena; other = other->next) {
        if (!other->gone || other->written < other->replays || other->device != g->device) continue;
        for (link = &other->arenas; *link; link = &(*link)->next)
            if ((*link)->size >= size) {
                arena = *link;
                *link = arena->next;
                break;
            }
    }
    if (!arena) {
        arena = (struct parity_arena *)calloc(1, sizeof *arena);
        if (!arena) return NULL;
        arena->size = size > PARITY_ARENA ? size : PARITY_ARENA;
        *status = cudaMalloc((void **)&arena->staged, arena->size);
        if (*status == cudaSuccess) *status = cudaMalloc((void **)&arena->kept, arena->size);
        if (*status == cudaSuccess) *status = cudaMallocHost((void **)&arena->pinned, arena->size);
    }
    arena->used = 0;
    if (*status == cudaSuccess)
        *status = cudaGraphAddMemcpyNode1D(&arena->bring, graph, NULL, 0, arena->pinned, arena->kept, size, cudaMemcpyDeviceToHost);
    if (*status == cudaSuccess)
        *status = cudaGraphAddMemcpyNode1D(&arena->keep, graph, &arena->bring, 1, arena->kept, arena->staged, size,
                                           cudaMemcpyDeviceToDevice);
    if (*status == cudaSuccess) *status = parity__follows(graph, arena->bring, g->hand_over);
    if (*status == cudaSuccess) {
        arena->next = g->arenas;
        g->arenas = arena;
        return arena;
    }
    if (arena->staged) cudaFree(arena->staged);
    if (arena->kept) cudaFree(arena->kept);
    if (arena->pinned) cudaFreeHost(arena->pinned);
    free(arena);
    return NULL;
}

/* A place in an arena, which is copied to the host with the rest of it. */
static inline struct parity_slot *parity__slot(parity_dump *d, struct parity_graph *g, cudaGraph_t graph, size_t bytes,
                                               cudaError_t *status) {
    size_t size = (bytes + 7) & ~(size_t)7;
    struct parity_slot *slot, **end = &g->slots;
    struct parity_arena *arena = parity__arena(d, g, graph, size, status);
    if (!arena) return NULL;
    slot = (struct parity_slot *)calloc(1, sizeof *slot);
    if (!slot) return NULL;
    slot->arena = arena;
    slot->at = arena->used;
    slot->size = size;
    arena->used += size;
    *status = cudaGraphMemcpyNodeSetParams1D(arena->bring, arena->pinned, arena->kept, arena->used, cudaMemcpyDeviceToHost);
    if (*status == cudaSuccess)
        *status = cudaGraphMemcpyNodeSetParams1D(arena->keep, arena->kept, arena->staged, arena->used, cudaMemcpyDeviceToDevice);
    while (*end) end = &(*end)->next;
    *end = slot;
    return slot;
}

/* Write the last replay of destroyed graphs, so that their slots can be reused; a copy in parallel with the capture. */
static inline cudaError_t parity__collect(parity_dump *d) {
    struct parity_graph *g;
    struct parity_arena *arena;
    cudaStream_t beside = NULL;
    cudaError_t status = cudaSuccess;
    for (g = d->graphs; g && status == cudaSuccess; g = g->next) {
        if (!g->gone || g->written >= g->replays) continue;
        if (!beside) status = cudaStreamCreateWithFlags(&beside, cudaStreamNonBlocking);
        for (arena = g->arenas; arena && status == cudaSuccess; arena = arena->next)
            status = cudaMemcpyAsync(arena->pinned, arena->kept, arena->used, cudaMemcpyDeviceToHost, beside);
        if (status == cudaSuccess) status = cudaStreamSynchronize(beside);
        if (status == cudaSuccess) parity__hand_over(g, g->replays);
    }
    if (beside) cudaStreamDestroy(beside);
    return status;
}

/* Add a copy in line to a slot, behind the `n` nodes `before`. */
static inline cudaError_t parity__stage(cudaGraph_t graph, const struct parity_slot *slot, size_t offset, const void *from, size_t size,
                                        const cudaGraphNode_t *before, size_t n, cudaGraphNode_t *stage) {
    cudaError_t status = cudaGraphAddMemcpyNode1D(stage, graph, before, n, slot->arena->staged + slot->at + offset, from, size,
                                                  cudaMemcpyDeviceToDevice);
    return status == cudaSuccess ? parity__follows(graph, *stage, slot->arena->keep) : status;
}

/* Add a checkpoint after what the stream has captured so far, with the position of its pass if it is the first one of it. */
static inline cudaError_t parity__put_in_line(parity_dump *d, const struct parity_slot *slot, const struct parity_slot *place,
                                              const void *values, size_t bytes, cudaStream_t stream) {
    cudaGraph_t graph;
    const cudaGraphNode_t *so_far;
    cudaGraphNode_t *before, stage[3];
    unsigned long long id;
    size_t n, staged = 0;
    cudaError_t status = parity__capture(stream, &id, &graph, &so_far, &n);
    if (status != cudaSuccess) return status;
    before = (cudaGraphNode_t *)malloc((n + 1) * sizeof *before); /* the driver's own array moves with the next node */
    if (!before) return cudaErrorMemoryAllocation;
    if (n) memcpy(before, so_far, n * sizeof *before);
    status = parity__stage(graph, slot, 0, values, bytes, before, n, &stage[staged++]);
    if (place && status == cudaSuccess) status = parity__stage(graph, place, 0, d->position, 4, before, n, &stage[staged++]);
    if (place && d->pass && status == cudaSuccess) status = parity__stage(graph, place, 4, d->pass, 4, before, n, &stage[staged++]);
    if (status == cudaSuccess) status = parity__goes_on(stream, stage, staged);
    free(before);
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
    cudaError_t status;
    if (strlen(point) >= sizeof slot->point) return parity__refuse(d, point, "names of captured checkpoints have at most 63 characters");
    parity__enter(&d->device);
    if (!d->position) {
        parity__leave(&d->device);
        return parity__refuse(d, point,
                              "this stream is being captured into a graph: give parity_position_device the device memory "
                              "from which each replay reads its position");
    }
    if (parity__start_writers(&d->queue, d)) {
        parity__leave(&d->device);
        return parity__refuse(d, point, "no thread could be started");
    }
    cudaThreadExchangeStreamCaptureMode(&mode);
    status = parity__collect(d);
    if (status == cudaSuccess) status = parity__capture(stream, &id, &graph, &nodes, &before);
    if (status == cudaSuccess) g = parity__graph_of(d, graph, id, &status);
    /* A point that occurs again belongs to another pass in the same graph, which has a position of its own. */
    for (slot = g ? g->slots : NULL; slot; slot = slot->next)
        if (slot->place == g->place && strcmp(slot->point, point) == 0) g->place = NULL;
    if (g && !g->place) g->place = place = parity__slot(d, g, graph, 8, &status);
    if (g && g->place && status == cudaSuccess) slot = parity__slot(d, g, graph, bytes, &status);
    if (slot && status == cudaSuccess) status = parity__put_in_line(d, slot, place, values, bytes, stream);
    if (slot && status == cudaSuccess) { /* a slot with a place is a row */
        slot->n = n;
        slot->type = type;
        strcpy(slot->point, point);
        slot->place = g->place;
    }
    parity__leave(&d->device);
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (status != cudaSuccess) {
        cudaGetLastError();
        return parity__refuse(d, point, cudaGetErrorString(status));
    }
    return slot ? 0 : parity__refuse(d, point, "out of memory");
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
    parity__enter(&d->device); /* the slab belongs to one thread until its values have been taken out */
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
    parity__leave(&d->device);
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
#endif
    if (!d) return -1;
#ifdef PARITY_CUDA
    parity_flush(d);
    parity__end_writers(&d->queue);
    for (g = d->graphs; g; g = next) {
        next = g->next;
        g->dump = NULL; /* a graph that still exists may be replayed: it keeps its memory */
        parity__free_graph(g);
    }
#endif
    if (!d->error[0])
        fprintf(d->file, "{\"type\":\"end\",\"checkpoints\":%lld,\"tokens\":%lld}\n", d->checkpoints, d->tokens);
    result = d->error[0] ? -1 : 0;
    if (fclose(d->file) != 0) result = -1;
#ifdef PARITY_CUDA
    if (d->slab) cudaFreeHost(d->slab);
    parity__end_mutex(&d->device);
    parity__end_mutex(&d->queue.lock);
#if !defined(_WIN32)
    pthread_cond_destroy(&d->queue.change);
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
