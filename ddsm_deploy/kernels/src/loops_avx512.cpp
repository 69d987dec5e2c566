#if defined(__x86_64__)
#define DDSM_SET "avx512"
#define DDSM_LANES 16
#define DDSM_TABLE avx512_loops
#include "loops.inc"
#endif
