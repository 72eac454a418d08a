/* Look-up of memory backends by name.  Any thread. */
#include "agent/memory.h"

#include <string.h>

#include "agent/memory_backend.h"

static const struct {
    const char *name;
    struct memory_backend *(*open)(struct err *err);
} memory_table[] = {
    {"host", memory_host_open},
    {"cuda", memory_cuda_open},
};

struct memory_backend *memory_open(const char *name, struct err *err)
{
    for (size_t i = 0; i < sizeof memory_table / sizeof memory_table[0]; i++)
        if (strcmp(memory_table[i].name, name) == 0)
            return memory_table[i].open(err);
    err_set(err, ERR_INVALID, "no memory backend is called \"%s\"; there are \"host\" and \"cuda\"", name);
    return NULL;
}
