/* The memory backends that memory_open() looks up, one file each.  Only agent/memory.c includes this. */
#ifndef EEP_AGENT_MEMORY_BACKEND_H
#define EEP_AGENT_MEMORY_BACKEND_H

#include "agent/memory.h"

struct memory_backend *memory_host_open(struct err *err); /* memory_host.c: memfd */
struct memory_backend *memory_cuda_open(struct err *err); /* memory_cuda_stub.c: not in this build */

#endif
