/* AMX's tiles in plain C, for a build whose kernels of them run where no processor has any:
 * -DTILES_EMULATED='"this file"'. As Intel's manual has them (volume 2, TDPBSUD): 16 rows of 64 bytes.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static __thread struct tile {
    unsigned char row[16][64];
} *tiles_; /* eight, of a thread that started them: NULL, and a use is a fault, elsewhere */

static void start_tiles_(void) { tiles_ = calloc(8, sizeof *tiles_); }
static void end_tiles_(void)
{
    free(tiles_);
    tiles_ = NULL;
}
static void clear_tile_(int t) { memset(&tiles_[t], 0, sizeof tiles_[t]); }
static void load_tile_(int t, const void *p, long stride)
{
    for (int i = 0; i < 16; i++)
        memcpy(tiles_[t].row[i], (const char *)p + i * stride, 64);
}
static void store_tile_(int t, void *p, long stride)
{
    for (int i = 0; i < 16; i++)
        memcpy((char *)p + i * stride, tiles_[t].row[i], 64);
}
static void add_tiles_(int c, int a, int b)
{
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            int32_t sum;
            memcpy(&sum, tiles_[c].row[m] + 4 * n, 4);
            for (int k = 0; k < 64; k++)
                sum += (int8_t)tiles_[a].row[m][k] * tiles_[b].row[k / 4][4 * n + k % 4];
            memcpy(tiles_[c].row[m] + 4 * n, &sum, 4);
        }
}
