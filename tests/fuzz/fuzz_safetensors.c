/* Fuzz target: the reader of safetensors files, on a file in memory.  What it takes is whole: tensors in order, each
 * inside the file, of the bytes that its shape says, without holes or overlap; what it refuses gets one sentence with
 * the path. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "agent/dtype.h"
#include "agent/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(const struct safetensors *file, size_t size)
{
    uint64_t sum = 0;
    const uint8_t *low = NULL, *high = NULL;
    for (size_t i = 0; i < safetensors_count(file); i++) {
        const struct safetensors_tensor *t = safetensors_at(file, i);
        uint64_t bytes;
        if (!dtype_bytes(dtype_bits(t->dtype), t->dims, t->shape, &bytes) || bytes != t->bytes)
            abort();
        if (i > 0 && strcmp(safetensors_at(file, i - 1)->name, t->name) >= 0)
            abort();
        if (safetensors_find(file, t->name) != t)
            abort();
        low = !low || t->data < low ? t->data : low;
        high = !high || t->data + t->bytes > high ? t->data + t->bytes : high;
        sum += bytes;
        uint8_t ends[2] = {0};
        struct err err;
        if (bytes > 0 &&
            (safetensors_read(t, 0, &ends[0], 1, &err) < 0 || safetensors_read(t, bytes - 1, &ends[1], 1, &err) < 0 ||
             ends[0] != t->data[0] || ends[1] != t->data[bytes - 1]))
            abort();
    }
    if ((uint64_t)(high - low) != sum || sum > size)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int fd = -1; /* one file for all runs: what is measured is the reader */
    static char path[32];
    if (fd < 0) {
        fd = memfd_create("safetensors", MFD_CLOEXEC);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    }
    if (fd < 0 || ftruncate(fd, 0) != 0 || pwrite(fd, data, size, 0) != (ssize_t)size)
        abort();
    struct safetensors *file;
    struct err err = {0};
    int rc = safetensors_open(path, &file, &err);
    if (rc == 0) {
        check(file, size);
        safetensors_close(file);
    } else if (strncmp(err.text, path, strlen(path)) != 0 || strchr(err.text, '\n')) {
        abort();
    }
    return 0;
}
