/* What the cores can do at most: GFLOP/s of multiply-adds on registers alone, with nothing to read and nothing to wait for.

    cc -O2 -march=native -ffp-contract=fast peak.c -o peak -lpthread && ./peak THREADS

One line a type: its name and the rate of all threads, each thread's best of many bursts of less than a millisecond, which
a busy machine leaves undisturbed now and then. bfloat16 where the processor has tiles (AMX). */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
#include <sys/syscall.h>

#ifdef __AVX512F__
enum { WIDTH = 16 };
#elif defined(__AVX2__)
enum { WIDTH = 8 };
#else
enum { WIDTH = 4 };
#endif
typedef float vector __attribute__((vector_size(4*WIDTH)));

#define ALL(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9)   /* enough to hide how long one takes */
#define START(i) vector s##i = a + i;
#if defined(__x86_64__)                                            /* keeps a compiler from leaving out a turn */
#define STEP(i) s##i = s##i*a + b; __asm__ volatile("" : "+x"(s##i));
#else
#define STEP(i) s##i = s##i*a + b; __asm__ volatile("" : "+w"(s##i));
#endif

static double floats(void) {
    enum { TURNS = 100000 };
    vector a = {0}, b = {0};
    a += 0.999f; b += 0.001f;
    ALL(START)
    for (int t = 0; t < TURNS; t++) { ALL(STEP) }
    return 2.0*WIDTH*10*TURNS;
}

#ifdef __AMX_BF16__
#include <immintrin.h>
static void configure(void) {                 /* eight tiles of 16 rows of 64 bytes, all zero */
    struct { unsigned char palette, start, zero[14]; unsigned short bytes[16]; unsigned char rows[16]; }
        c = { .palette = 1, .bytes = {64,64,64,64,64,64,64,64}, .rows = {16,16,16,16,16,16,16,16} };
    syscall(SYS_arch_prctl, 0x1023, 18);      /* Linux lends the tiles to whoever asks */
    _tile_loadconfig(&c);
    _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);
}
static double tiles(void) {
    enum { TURNS = 10000 };
    configure();
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int t = 0; t < TURNS; t++) {
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    }
    return 2.0*16*16*32*4*TURNS;
}
#endif

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9*t.tv_nsec;
}

enum { MOST = 256, BURSTS = 2000 };
static double (*job)(void), best[MOST];

static void *bursts(void *who) {
    double *mine = who;
    for (int i = 0; i < BURSTS; i++) {
        double start = now(), done = job(), rate = done/(now()-start)/1e9;
        if (rate > *mine) *mine = rate;
    }
    return 0;
}

static void measure(const char *name, double (*what)(void), int threads) {
    pthread_t t[MOST];
    double sum = 0;
    job = what;
    for (int i = 0; i < threads; i++) { best[i] = 0; pthread_create(t+i, 0, bursts, best+i); }
    for (int i = 0; i < threads; i++) { pthread_join(t[i], 0); sum += best[i]; }
    printf("%s %.1f\n", name, sum);
}

int main(int argc, char **argv) {
    int threads = argc > 1 ? atoi(argv[1]) : 1;
    if (threads < 1 || threads > MOST) return 1;
    measure("float32", floats, threads);
#ifdef __AMX_BF16__
    measure("bfloat16", tiles, threads);
#endif
    return 0;
}
