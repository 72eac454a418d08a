/* Carries digest_kernel.cu, compiled by nvcc to the file DIGEST_FATBIN, inside the program.  Any thread. */
#include "agent/digest_kernel.h"

__asm__(".pushsection .rodata\n"
        ".balign 16\n"
        ".local digest_kernel_fatbin\n"
        "digest_kernel_fatbin:\n"
        ".incbin \"" DIGEST_FATBIN "\"\n"
        ".popsection\n");
extern const unsigned char digest_kernel_fatbin[] __attribute__((visibility("hidden")));

const void *digest_kernel_image(void)
{
    return digest_kernel_fatbin;
}
