// The NEON kernels for processors with the dot-product extension (ARMv8.2 with asimddp).
#define AUTOGLM_NEON neon_dot
#include "path_neon.cpp"
