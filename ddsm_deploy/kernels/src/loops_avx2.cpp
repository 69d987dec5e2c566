#if defined(__x86_64__)
#define DDSM_SET "avx2"
#define DDSM_LANES 8
#define DDSM_TABLE avx2_loops
#include "loops.inc"
#endif
