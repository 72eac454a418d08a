/* Look-up of memory backends by name.  Any thread. */
#include "agent/memory.h"

#include <string.h>

#include "agent/memory_backend.h"

static const struct {
    const char *name;
    struct memory_backend *(*open)(const char *device, struct err *err);
} memory_table[] = {
    {"host", memory_host_open},
    {"cuda", memory_cuda_open},
};

struct memory_backend *memory_open(const char *name, struct err *err)
{
    size_t len = strcspn(name, ":");
    const char *device = name[len] ? name + len + 1 : "";
    for (size_t i = 0; i < sizeof memory_table / sizeof memory_table[0]; i++)
        if (strncmp(memory_table[i].name, name, len) == 0 && memory_table[i].name[len] == '\0')
            return memory_table[i].open(device, err);
    err_set(err, ERR_INVALID, "no memory backend is called \"%s\"; there are \"host\" and \"cuda\"", name);
    return NULL;
}
