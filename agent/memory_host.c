/* Region memory on the host: one memfd a region, mapped shared, so that an engine in another process maps the same
 * pages.  The size is sealed: nobody who holds the descriptor can cut pages from under the others.
 *
 * Pages are reserved at allocation, so that running out is an error here and not a SIGBUS in a transfer.  Worker
 * thread. */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent/memory_backend.h"
#include "common/digest.h"

#define HOST_GRANULARITY 4096u
#define HOST_SEALS       (F_SEAL_SHRINK | F_SEAL_GROW)
#define HOST_NAME_MAX    200 /* memfd_create takes 249 bytes */

static bool host_round(size_t bytes, size_t *ret_mapped)
{
    if (bytes == 0 || bytes > SIZE_MAX / 2)
        return false;
    *ret_mapped = (bytes + HOST_GRANULARITY - 1) / HOST_GRANULARITY * HOST_GRANULARITY;
    return true;
}

/* Memory that the kernel thinks can be had without swapping; SIZE_MAX when it does not say. */
static size_t host_available(void)
{
    FILE *file = fopen("/proc/meminfo", "re");
    char line[128];
    unsigned long long kib;
    size_t available = SIZE_MAX;
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1 && kib < SIZE_MAX / 1024)
            available = (size_t)kib * 1024;
    if (file)
        fclose(file);
    return available;
}

static int host_map(int fd, const char *label, size_t bytes, size_t mapped, struct memory_region *ret_region,
                    struct err *err)
{
    void *base = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED)
        return err_set(err, ERR_NOMEM, "cannot map %zu bytes for region \"%s\": %s", mapped, label, strerror(errno));
    *ret_region = (struct memory_region){.base = base, .bytes = bytes, .mapped = mapped, .fd = fd};
    return 0;
}

static int host_alloc(struct memory_backend *self, const char *label, size_t bytes, struct memory_region *ret_region,
                      struct err *err)
{
    (void)self;
    size_t mapped;
    if (!host_round(bytes, &mapped))
        return err_set(err, ERR_INVALID, "region \"%s\" cannot have %zu bytes", label, bytes);
    /* Reserving more than there is would not fail: it would call the OOM killer. */
    size_t available = host_available();
    if (mapped > available)
        return err_set(err, ERR_NOMEM, "cannot allocate %zu bytes for region \"%s\": %zu are available", bytes, label,
                       available);
    char name[HOST_NAME_MAX];
    strncpy(name, label, sizeof name - 1);
    name[sizeof name - 1] = '\0';
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return err_set(err, ERR_NOMEM, "cannot create memory for region \"%s\" (%zu bytes): %s", label, bytes,
                       strerror(errno));
    int rc = posix_fallocate(fd, 0, (off_t)mapped);
    if (rc != 0) {
        rc = err_set(err, ERR_NOMEM, "cannot allocate %zu bytes for region \"%s\": %s", bytes, label, strerror(rc));
        goto close_fd;
    }
    if (fcntl(fd, F_ADD_SEALS, HOST_SEALS) < 0) {
        rc = err_set(err, ERR_IO, "cannot seal the size of region \"%s\": %s", label, strerror(errno));
        goto close_fd;
    }
    rc = host_map(fd, label, bytes, mapped, ret_region, err);
    if (rc == 0)
        return 0;
close_fd:
    close(fd);
    return rc;
}

/* On failure the descriptor stays the caller's. */
static int host_adopt(struct memory_backend *self, int fd, size_t bytes, struct memory_region *ret_region,
                      struct err *err)
{
    (void)self;
    size_t mapped;
    struct stat st;
    if (!host_round(bytes, &mapped))
        return err_set(err, ERR_INVALID, "a region cannot have %zu bytes", bytes);
    if (fstat(fd, &st) < 0)
        return err_set(err, ERR_INVALID, "descriptor %d cannot be adopted as a region: %s", fd, strerror(errno));
    if (st.st_size < 0 || (size_t)st.st_size < bytes)
        return err_set(err, ERR_INVALID, "descriptor %d holds %lld bytes, but the region has %zu", fd,
                       (long long)st.st_size, bytes);
    /* Whoever gave it to us could truncate it later, which would be a SIGBUS here: its size must be sealed. */
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0)
        return err_set(err, ERR_INVALID, "descriptor %d is no memfd that can be sealed: %s", fd, strerror(errno));
    if ((seals & F_SEAL_WRITE) != 0)
        return err_set(err, ERR_INVALID, "descriptor %d is sealed against writing", fd);
    if ((seals & HOST_SEALS) != HOST_SEALS && fcntl(fd, F_ADD_SEALS, HOST_SEALS) < 0)
        return err_set(err, ERR_INVALID, "the size of descriptor %d cannot be sealed: %s", fd, strerror(errno));
    /* Read again: it may have been cut before the seal. */
    if (fstat(fd, &st) < 0 || (size_t)st.st_size < bytes)
        return err_set(err, ERR_INVALID, "descriptor %d changed its size while it was adopted", fd);
    if (fcntl(fd, F_SETFD, FD_CLOEXEC) < 0)
        return err_set(err, ERR_IO, "cannot set descriptor %d close-on-exec: %s", fd, strerror(errno));
    return host_map(fd, "adopted", bytes, mapped, ret_region, err);
}

static void host_release(struct memory_backend *self, struct memory_region *region)
{
    (void)self;
    if (!region->base)
        return;
    munmap(region->base, region->mapped);
    close(region->fd);
    *region = (struct memory_region){.fd = -1};
}

static int host_check(const struct memory_region *region, size_t offset, size_t len, struct err *err)
{
    if (offset > region->bytes || len > region->bytes - offset)
        return err_set(err, ERR_INVALID, "range %zu + %zu lies outside of a region of %zu bytes", offset, len,
                       region->bytes);
    return 0;
}

static int host_write(struct memory_backend *self, struct memory_region *region, size_t offset, const void *data,
                      size_t len, struct err *err)
{
    (void)self;
    int rc = host_check(region, offset, len, err);
    if (rc == 0 && len > 0)
        memcpy((uint8_t *)region->base + offset, data, len);
    return rc;
}

static int host_read(struct memory_backend *self, const struct memory_region *region, size_t offset, void *ret_data,
                     size_t len, struct err *err)
{
    (void)self;
    int rc = host_check(region, offset, len, err);
    if (rc == 0 && len > 0)
        memcpy(ret_data, (const uint8_t *)region->base + offset, len);
    return rc;
}

/* The region itself is host memory, so a stage is a place in it. */
static int host_stage_take(struct memory_backend *self, struct memory_region *region, size_t offset, size_t len,
                           struct memory_stage *ret_stage, struct err *err)
{
    (void)self;
    int rc = host_check(region, offset, len, err);
    if (rc < 0)
        return rc;
    if (len > MEMORY_STAGE_BYTES)
        return err_set(err, ERR_INVALID, "a stage has at most %zu bytes, not %zu", MEMORY_STAGE_BYTES, len);
    *ret_stage = (struct memory_stage){
        .region = region,
        .offset = offset,
        .len = len,
        .data = (uint8_t *)region->base + offset,
    };
    return 0;
}

static int host_stage_write(struct memory_backend *self, const struct memory_stage *stage, struct err *err)
{
    (void)self, (void)stage, (void)err;
    return 0;
}

static void host_stages_free(struct memory_backend *self)
{
    (void)self;
}

static int host_digest(struct memory_backend *self, const struct memory_region *region, size_t offset, size_t len,
                       uint64_t first_word, uint64_t *ret_digest, struct err *err)
{
    (void)self;
    int rc = host_check(region, offset, len, err);
    if (rc == 0)
        *ret_digest = digest_bytes((const uint8_t *)region->base + offset, len, first_word);
    return rc;
}

static int host_digests(struct memory_backend *self, const struct memory_range *ranges, size_t n, uint64_t *ret_digests,
                        struct err *err)
{
    int rc = 0;
    for (size_t i = 0; i < n && rc == 0; i++)
        rc = host_digest(self, ranges[i].region, ranges[i].offset, ranges[i].len, ranges[i].first_word, &ret_digests[i],
                         err);
    return rc;
}

static int host_copy(struct memory_backend *self, struct memory_region *dst, size_t dst_offset,
                     const struct memory_region *src, size_t src_offset, size_t len, struct err *err)
{
    (void)self;
    int rc = host_check(dst, dst_offset, len, err);
    if (rc == 0)
        rc = host_check(src, src_offset, len, err);
    if (rc == 0 && len > 0)
        memmove((uint8_t *)dst->base + dst_offset, (const uint8_t *)src->base + src_offset, len);
    return rc;
}

static void host_close(struct memory_backend *self)
{
    free(self);
}

struct memory_backend *memory_host_open(const char *device, struct err *err)
{
    if (*device) {
        err_set(err, ERR_INVALID, "memory backend \"host\" has no devices, so \"host:%s\" is none", device);
        return NULL;
    }
    struct memory_backend *self = malloc(sizeof *self);
    if (!self) {
        err_set(err, ERR_NOMEM, "out of memory");
        return NULL;
    }
    *self = (struct memory_backend){
        .name = "host",
        .in_place = true,
        .alloc = host_alloc,
        .adopt = host_adopt,
        .release = host_release,
        .write = host_write,
        .read = host_read,
        .stage_take = host_stage_take,
        .stage_write = host_stage_write,
        .stages_free = host_stages_free,
        .digest = host_digest,
        .digests = host_digests,
        .copy = host_copy,
        .close = host_close,
    };
    return self;
}
