/* x86-64 with AMX's tiles of bytes besides AVX-512 BF16: Sapphire Rapids and later. Sums of integers
 * are exact, so the bits are every set's. Tiles of bfloat16 add up in another order than few rows
 * do, whose bits a row must have in any batch: those products stay AVX-512's. */
#if defined(__AMX_INT8__) || defined(TILES_EMULATED)
#include <stdint.h>

#define NAME amx
#define BYTE_TILES multiply_tiles

/* Tiles 0 to 3 are sums of 16 rows and 16 columns, 4 and 5 rows of x, 6 and 7 columns of w; all have
 * 16 rows of 64 bytes. */
#ifdef TILES_EMULATED /* tests/portable/tiles.h */
#include TILES_EMULATED
#define CLEAR_TILE clear_tile_
#define LOAD_TILE load_tile_
#define STORE_TILE store_tile_
#define ADD_TILES add_tiles_
#define START_TILES start_tiles_
#define END_TILES end_tiles_
#else
/* By assembly: gcc's intrinsics do not say that they read memory, so what was stored may come late. */
#define CLEAR_TILE(t) __asm__ volatile("tilezero %%tmm" #t ::)
#define LOAD_TILE(t, p, stride)                                                                    \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"((const void *)(p)), "r"((long)(stride)) \
                     : "memory")
#define STORE_TILE(t, p, stride)                                                                 \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"((void *)(p)), "r"((long)(stride)) \
                     : "memory")
/* tile c += signed bytes of a times unsigned ones of b */
#define ADD_TILES(c, a, b) __asm__ volatile("tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)
#define END_TILES() __asm__ volatile("tilerelease" ::)
#define START_TILES start_tiles
static inline void start_tiles(void)
{
    const struct {
        uint8_t palette, start_row, none[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {
        .palette = 1,
        .bytes = {64, 64, 64, 64, 64, 64, 64, 64},
        .rows = {16, 16, 16, 16, 16, 16, 16, 16},
    };
    __asm__ volatile("ldtilecfg %0" ::"m"(shape) : "memory");
}
#endif

/* sums (32, 32) of x (32, 2,048) times w (units, 32), 16 units at a time: what is past `units` in w
 * meets zeros of x */
static inline void multiply_tiles(int32_t *sums, const char *x, const char *w, int units)
{
    CLEAR_TILE(0);
    CLEAR_TILE(1);
    CLEAR_TILE(2);
    CLEAR_TILE(3);
    for (int k = 0; k < units; k += 16, x += 64, w += 16 * 128) {
        LOAD_TILE(4, x, 2048);
        LOAD_TILE(6, w, 128);
        LOAD_TILE(7, w + 64, 128);
        ADD_TILES(0, 4, 6);
        ADD_TILES(1, 4, 7);
        LOAD_TILE(5, x + 16 * 2048, 2048);
        ADD_TILES(2, 5, 6);
        ADD_TILES(3, 5, 7);
    }
    STORE_TILE(0, sums, 128);
    STORE_TILE(1, sums + 16, 128);
    STORE_TILE(2, sums + 16 * 32, 128);
    STORE_TILE(3, sums + 16 * 32 + 16, 128);
}
#include "kernels_avx512bf16.c"
#endif
