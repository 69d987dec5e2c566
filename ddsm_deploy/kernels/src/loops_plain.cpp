// Four floats a vector: SSE2 on x86-64, NEON on Arm, whatever the compiler makes of it elsewhere.
#define DDSM_SET "plain"
#define DDSM_LANES 4
#define DDSM_TABLE plain_loops
#include "loops.inc"
