/* How fast this machine can read memory: sums a buffer again and again and prints the seconds of each pass.
 *
 * wall BYTES THREADS PASSES STREAMS AHEAD: each thread owns an equal part and reads it as STREAMS interleaved runs,
 * prefetching AHEAD bytes before use (0: leave it to the hardware). Built by wall.py with -march=native.
 */
#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { LINE = 64, MOST_THREADS = 64 };

typedef struct {
    const char *start;
    size_t bytes;
    int passes, streams, cpu;
    size_t ahead;
    double *began, *ended;
    uint64_t sum;
} Part;

static pthread_barrier_t gate;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

#if defined(__AVX512F__)
typedef __m512i Wide;
#define ZERO _mm512_setzero_si512()
#define LOAD(p) _mm512_load_si512((const void *)(p))
#define MIX(a, b) _mm512_add_epi64(a, b)
#else
typedef __m256i Wide;
#define ZERO _mm256_setzero_si256()
#define LOAD(p) _mm256_load_si256((const __m256i *)(p))
#define MIX(a, b) _mm256_add_epi64(a, b)
#endif

/* One pass over `streams` runs of `run` bytes each, a whole number of 4 lines. */
static uint64_t read_runs(const char *start, size_t run, int streams, size_t ahead) {
    Wide a = ZERO, b = ZERO, c = ZERO, d = ZERO;
    for (size_t at = 0; at < run; at += 4 * LINE)
        for (int s = 0; s < streams; s++) {
            const char *p = start + (size_t)s * run + at;
            if (ahead)
                for (int line = 0; line < 4; line++) _mm_prefetch(p + ahead + line * LINE, _MM_HINT_T0);
            for (size_t i = 0; i < 4 * LINE; i += 4 * sizeof(Wide)) {
                a = MIX(a, LOAD(p + i));
                b = MIX(b, LOAD(p + i + sizeof(Wide)));
                c = MIX(c, LOAD(p + i + 2 * sizeof(Wide)));
                d = MIX(d, LOAD(p + i + 3 * sizeof(Wide)));
            }
        }
    Wide all = MIX(MIX(a, b), MIX(c, d));
    uint64_t words[sizeof(Wide) / 8], sum = 0;
    memcpy(words, &all, sizeof all);
    for (size_t i = 0; i < sizeof(Wide) / 8; i++) sum += words[i];
    return sum;
}

static void *work(void *given) {
    Part *part = given;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(part->cpu, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set); /* where it fails, the scheduler decides */
    size_t run = part->bytes / part->streams / (4 * LINE) * (4 * LINE);
    for (int pass = 0; pass < part->passes; pass++) {
        pthread_barrier_wait(&gate);
        part->began[pass] = now();
        part->sum += read_runs(part->start, run, part->streams, part->ahead);
        part->ended[pass] = now();
    }
    return NULL;
}

int main(int argc, char **argv) {
    if (argc != 6) return 2;
    size_t bytes = strtoull(argv[1], NULL, 10), huge = 2u << 20;
    int threads = atoi(argv[2]), passes = atoi(argv[3]), streams = atoi(argv[4]);
    size_t ahead = strtoull(argv[5], NULL, 10);
    if (threads < 1 || threads > MOST_THREADS || passes < 1 || streams < 1) return 2;
    size_t room = (bytes + 2 * huge) / huge * huge;
    char *buffer = aligned_alloc(huge, room);
    if (!buffer) return 3;
    madvise(buffer, room, MADV_HUGEPAGE);
    for (size_t i = 0; i < room; i += 8) *(uint64_t *)(buffer + i) = i * 0x9e3779b97f4a7c15u;
    Part parts[MOST_THREADS];
    pthread_t ids[MOST_THREADS];
    size_t each = bytes / threads / 4096 * 4096;
    pthread_barrier_init(&gate, NULL, threads);
    for (int t = 0; t < threads; t++) {
        parts[t] = (Part){buffer + t * each, each, passes, streams, t, ahead, calloc(passes, 8), calloc(passes, 8), 0};
        if (pthread_create(&ids[t], NULL, work, &parts[t])) return 3;
    }
    uint64_t sum = 0;
    for (int t = 0; t < threads; t++) {
        pthread_join(ids[t], NULL);
        sum += parts[t].sum;
    }
    size_t read = each / streams / (4 * LINE) * (4 * LINE) * streams * threads;
    for (int pass = 0; pass < passes; pass++) {
        double began = parts[0].began[pass], ended = parts[0].ended[pass];
        for (int t = 1; t < threads; t++) {
            if (parts[t].began[pass] < began) began = parts[t].began[pass];
            if (parts[t].ended[pass] > ended) ended = parts[t].ended[pass];
        }
        printf("%zu %.9f\n", read, ended - began);
    }
    fprintf(stderr, "%llu\n", (unsigned long long)sum); /* so that the reading is not optimised away */
    return 0;
}
