/* The memory backends that memory_open() looks up, one file each.  Only agent/memory.c includes this. */
#ifndef EEP_AGENT_MEMORY_BACKEND_H
#define EEP_AGENT_MEMORY_BACKEND_H

#include "agent/memory.h"

/* device: what follows the colon of the backend's name, "" when there is none. */
struct memory_backend *memory_host_open(const char *device, struct err *err); /* memory_host.c: memfd */
struct memory_backend *memory_cuda_open(const char *device, struct err *err); /* memory_cuda.c, or its stub */

#endif
