/* Stands in for kernels_image.c in a build without nvcc.  Any thread. */
#include "tests/engine/kernels.h"

#include <stddef.h>

const void *kernels_image(void)
{
    return NULL;
}
