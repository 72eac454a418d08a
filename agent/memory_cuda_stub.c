/* Stands in for GPU memory in a build without it: one clear sentence, nothing else. */
#include "agent/memory_backend.h"

struct memory_backend *memory_cuda_open(const char *device, struct err *err)
{
    (void)device;
    err_set(err, ERR_UNSUPPORTED, "memory backend \"cuda\" is not in this build; use \"host\"");
    return NULL;
}
