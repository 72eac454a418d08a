/* Carries kernels.cu, compiled by nvcc to the file KERNELS_FATBIN, inside the program.  Any thread. */
#include "tests/engine/kernels.h"

__asm__(".pushsection .rodata\n"
        ".balign 16\n"
        ".local engine_kernels_fatbin\n"
        "engine_kernels_fatbin:\n"
        ".incbin \"" KERNELS_FATBIN "\"\n"
        ".popsection\n");
extern const unsigned char engine_kernels_fatbin[] __attribute__((visibility("hidden")));

const void *kernels_image(void)
{
    return engine_kernels_fatbin;
}
