/* Stands in for digest_kernel.c in a build without nvcc.  Any thread. */
#include "agent/digest_kernel.h"

#include <stddef.h>

const void *digest_kernel_image(void)
{
    return NULL;
}
