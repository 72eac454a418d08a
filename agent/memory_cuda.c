/* Region memory on a GPU: one allocation of CUDA's virtual memory management a region, exported as a descriptor, so
 * that an engine in another process maps the same memory.  Sizes are rounded up to the device's granularity (2 MiB) for
 * each region, and the address stays for the life of the region.
 *
 * Everything goes over one stream.  write() and stage_write() send pinned buffers (at most MEMORY_STAGES of
 * MEMORY_STAGE_BYTES, 64 MiB) and return while they are still on their way, so that reading files and copying overlap;
 * what follows on the stream - digest(), copy(), release() - comes after it, and digest() and copy() return when all of
 * it is done.  So bytes that are handed to anybody else have to be digested first, as every loaded weight is.  Worker
 * thread, whose current context is the device's from the first call on. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent/cuda_driver.h"
#include "agent/digest_kernel.h"
#include "agent/memory_backend.h"
#include "common/digest.h"

#define WRITE_STAGES 4u /* write() and digests on the CPU make no more buffers than that */

/* Of digests: a launch has so many pieces at most (640 KiB of tables here and there), and so large that each block has
 * several of them, but not so small that adding up costs more than reading. */
#define PIECES_MAX      16384u
#define PIECE_BYTES_MIN ((size_t)64 << 10)
#define PIECE_BYTES_MAX ((size_t)1 << 20)
#define PIECES_A_BLOCK  16u

/* A pinned buffer of MEMORY_STAGE_BYTES; `busy` is passed on the stream when it is free again. */
struct stage {
    void *data;
    CUevent busy;
    bool lent;
    uint64_t sent; /* when, counted in copies */
};

struct memory_cuda {
    struct memory_backend base; /* first: the pointers are exchanged */
    struct cuda_device *device;
    CUstream stream;
    struct stage stages[MEMORY_STAGES];
    unsigned n_stages; /* that have been made */
    uint64_t sent;
    size_t granularity;
    CUmodule module; /* NULL: digests on the CPU */
    CUfunction digest;
    CUdeviceptr pieces, sums;         /* [PIECES_MAX] each, on the device */
    struct digest_piece *pieces_host; /* pinned, as is the next */
    uint64_t *sums_host;
    unsigned blocks_max; /* that run at once */
};

static CUdeviceptr region_at(const struct memory_region *region, size_t offset)
{
    return (CUdeviceptr)(uintptr_t)region->base + offset;
}

static int cuda_range_check(const struct memory_region *region, size_t offset, size_t len, struct err *err)
{
    if (offset > region->bytes || len > region->bytes - offset)
        return err_set(err, ERR_INVALID, "range %zu + %zu lies outside of a region of %zu bytes", offset, len,
                       region->bytes);
    return 0;
}

static int cuda_settle(struct memory_cuda *m, const char *what, struct err *err)
{
    const struct cuda_driver *cu = &m->device->driver;
    return cuda_check(cu, cu->cuStreamSynchronize(m->stream), err, "%s on GPU %d", what, m->device->gpu.index);
}

/* ---- allocations ---- */

static int cuda_export(struct memory_cuda *m, CUmemGenericAllocationHandle handle, int *ret_fd, struct err *err)
{
    const struct cuda_driver *cu = &m->device->driver;
    int fd = -1;
    int rc = cuda_check(cu, cu->cuMemExportToShareableHandle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
                        err, "export GPU memory as a descriptor");
    if (rc < 0)
        return rc;
    if (fcntl(fd, F_SETFD, FD_CLOEXEC) < 0) {
        close(fd);
        return err_set(err, ERR_IO, "cannot set descriptor %d close-on-exec", fd);
    }
    *ret_fd = fd;
    return 0;
}

static int cuda_create(struct memory_cuda *m, const char *label, size_t bytes, size_t mapped,
                       CUmemGenericAllocationHandle *ret_handle, struct err *err)
{
    const struct cuda_driver *cu = &m->device->driver;
    size_t available = 0, total = 0;
    int rc = cuda_check(cu, cu->cuMemGetInfo(&available, &total), err, "ask for free GPU memory");
    if (rc < 0)
        return rc;
    CUresult result = CUDA_ERROR_OUT_OF_MEMORY;
    if (mapped <= total) { /* free memory may grow at any moment; what cannot fit is not tried */
        CUmemAllocationProp properties = cuda_properties(m->device, m->device->rdma);
        result = cu->cuMemCreate(ret_handle, mapped, &properties, 0);
        if (result == CUDA_ERROR_NOT_SUPPORTED && m->device->rdma) {
            properties = cuda_properties(m->device, false); /* the device could, this system cannot */
            result = cu->cuMemCreate(ret_handle, mapped, &properties, 0);
        }
    }
    if (result == CUDA_ERROR_OUT_OF_MEMORY)
        return err_set(err, ERR_NOMEM, "cannot allocate %zu bytes for region \"%s\" on GPU %d: %zu of %zu are free",
                       bytes, label, m->device->gpu.index, available, total);
    return cuda_check(cu, result, err, "allocate %zu bytes for region \"%s\" on GPU %d", bytes, label,
                      m->device->gpu.index);
}

static void cuda_release(struct memory_backend *self, struct memory_region *region)
{
    struct memory_cuda *m = (struct memory_cuda *)self;
    const struct cuda_driver *cu = &m->device->driver;
    if (!region->base || cuda_device_use(m->device, NULL) < 0)
        return;
    (void)cu->cuStreamSynchronize(m->stream);
    cuda_unmap(m->device, region_at(region, 0), region->mapped);
    close(region->fd);
    *region = (struct memory_region){.fd = -1};
}

static int cuda_alloc(struct memory_backend *self, const char *label, size_t bytes, struct memory_region *ret_region,
                      struct err *err)
{
    struct memory_cuda *m = (struct memory_cuda *)self;
    const struct cuda_driver *cu = &m->device->driver;
    struct memory_region region = {.bytes = bytes, .fd = -1};
    CUmemGenericAllocationHandle handle;
    CUdeviceptr at = 0;
    if (!cuda_round(m->granularity, bytes, &region.mapped))
        return err_set(err, ERR_INVALID, "region \"%s\" cannot have %zu bytes", label, bytes);
    int rc = cuda_device_use(m->device, err);
    if (rc == 0)
        rc = cuda_create(m, label, bytes, region.mapped, &handle, err);
    if (rc < 0)
        return rc;
    rc = cuda_export(m, handle, &region.fd, err);
    if (rc == 0)
        rc = cuda_map(m->device, handle, region.mapped, &at, err);
    (void)cu->cuMemRelease(handle);
    if (rc < 0) {
        if (region.fd >= 0)
            close(region.fd);
        return err_wrap(err, "region \"%s\"", label);
    }
    region.base = (void *)(uintptr_t)at;
    rc = cuda_check(cu, cu->cuMemsetD8Async(at, 0, region.mapped, m->stream), err, "clear region \"%s\"", label);
    if (rc == 0)
        rc = cuda_settle(m, "clear memory", err);
    if (rc < 0)
        cuda_release(self, &region);
    else
        *ret_region = region;
    return rc;
}

/* On failure the descriptor stays the caller's. */
static int cuda_adopt(struct memory_backend *self, int fd, size_t bytes, struct memory_region *ret_region,
                      struct err *err)
{
    struct memory_cuda *m = (struct memory_cuda *)self;
    CUdeviceptr at = 0;
    size_t mapped;
    if (!cuda_round(m->granularity, bytes, &mapped))
        return err_set(err, ERR_INVALID, "a region cannot have %zu bytes", bytes);
    int rc = cuda_device_use(m->device, err);
    if (rc == 0)
        rc = cuda_import(m->device, fd, mapped, true, &at, err);
    if (rc < 0)
        return rc;
    (void)fcntl(fd, F_SETFD, FD_CLOEXEC);
    *ret_region = (struct memory_region){.base = (void *)(uintptr_t)at, .bytes = bytes, .mapped = mapped, .fd = fd};
    return 0;
}

/* ---- bytes ---- */

/* The buffer that was sent away first, and so comes back first; NULL when all of them are lent. */
static struct stage *stage_oldest(struct memory_cuda *m)
{
    struct stage *oldest = NULL;
    for (unsigned i = 0; i < m->n_stages; i++)
        if (!m->stages[i].lent && (!oldest || m->stages[i].sent < oldest->sent))
            oldest = &m->stages[i];
    return oldest;
}

static int stage_make(struct memory_cuda *m, struct stage **ret_stage, struct err *err)
{
    const struct cuda_driver *cu = &m->device->driver;
    struct stage *stage = &m->stages[m->n_stages];
    *stage = (struct stage){0};
    int rc = cuda_check(cu, cu->cuMemHostAlloc(&stage->data, MEMORY_STAGE_BYTES, 0), err,
                        "pin %zu bytes of host memory", MEMORY_STAGE_BYTES);
    if (rc < 0)
        return rc;
    rc = cuda_check(cu, cu->cuEventCreate(&stage->busy, CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC), err,
                    "create an event");
    if (rc < 0) {
        (void)cu->cuMemFreeHost(stage->data);
        return rc;
    }
    m->n_stages++;
    *ret_stage = stage;
    return 0;
}

/* A pinned buffer that no copy uses any more; a new one while there are fewer than `most` and none is free at once. */
static int stage_next(struct memory_cuda *m, unsigned most, struct stage **ret_stage, struct err *err)
{
    const struct cuda_driver *cu = &m->device->driver;
    struct stage *stage = stage_oldest(m);
    if (stage && cu->cuEventQuery(stage->busy) == CUDA_SUCCESS) {
        *ret_stage = stage;
        return 0;
    }
    if (m->n_stages < most)
        return stage_make(m, ret_stage, err);
    if (!stage)
        return err_set(err, ERR_LIMIT, "all %u pinned buffers are lent", m->n_stages);
    int rc =
        cuda_check(cu, cu->cuEventSynchronize(stage->busy), err, "wait for a copy to GPU %d", m->device->gpu.index);
    if (rc == 0)
        *ret_stage = stage;
    return rc;
}

static int stage_send(struct memory_cuda *m, struct stage *stage, CUdeviceptr to, size_t len, struct err *err)
{
    const struct cuda_driver *cu = &m->device->driver;
    int rc = cuda_check(cu, cu->cuMemcpyHtoDAsync(to, stage->data, len, m->stream), err, "copy %zu bytes to GPU %d",
                        len, m->device->gpu.index);
    if (rc == 0)
        rc = cuda_check(cu, cu->cuEventRecord(stage->busy, m->stream), err, "mark a copy");
    stage->sent = ++m->sent;
    return rc;
}

static int cuda_write(struct memory_backend *self, struct memory_region *region, size_t offset, const void *data,
                      size_t len, struct err *err)
{
    struct memory_cuda *m = (struct memory_cuda *)self;
    int rc = cuda_range_check(region, offset, len, err);
    if (rc == 0)
        rc = cuda_device_use(m->device, err);
    for (size_t done = 0; done < len && rc == 0;) {
        struct stage *stage;
        size_t part = len - done < MEMORY_STAGE_BYTES ? len - done : MEMORY_STAGE_BYTES;
        rc = stage_next(m, WRITE_STAGES, &stage, err);
        if (rc < 0)
            return rc;
        memcpy(stage->data, (const uint8_t *)data + done, part);
        rc = stage_send(m, stage, region_at(region, offset + done), part, err);
        done += part;
    }
    return rc;
}

static int cuda_stage_take(struct memory_backend *self, struct memory_region *region, size_t offset, size_t len,
                           struct memory_stage *ret_stage, struct err *err)
{
    struct memory_cuda *m = (struct memory_cuda *)self;
    struct stage *stage;
    int rc = cuda_range_check(region, offset, len, err);
    if (rc == 0 && len > MEMORY_STAGE_BYTES)
        rc = err_set(err, ERR_INVALID, "a stage has at most %zu bytes, not %zu", MEMORY_STAGE_BYTES, len);
    if (rc == 0)
        rc = cuda_device_use(m->device, err);
    if (rc == 0)
        rc = stage_next(m, MEMORY_STAGES, &stage, err);
    if (rc < 0)
        return rc;
    stage->lent = true;
    *ret_stage = (struct memory_stage){
        .region = region,
        .offset = offset,
        .len = len,
        .data = stage->data,
        .index = (unsigned)(stage - m->stages),
    };
    return 0;
}

static int cuda_stage_write(struct memory_backend *self, const struct memory_stage *stage, struct err *err)
{
    struct memory_cuda *m = (struct memory_cuda *)self;
    struct stage *buffer = &m->stages[stage->index];
    int rc = cuda_device_use(m->device, err);
    buffer->lent = false;
    if (rc == 0 && stage->len > 0)
        rc = stage_send(m, buffer, region_at(stage->region, stage->offset), stage->len, err);
    return rc;
}

static void cuda_stages_free(struct memory_backend *self)
{
    struct memory_cuda *m = (struct memory_cuda *)self;
    const struct cuda_driver *cu = &m->device->driver;
    if (m->n_stages == 0 || cuda_device_use(m->device, NULL) < 0)
        return;
    (void)cu->cuStreamSynchronize(m->stream); /* copies may still read them */
    for (; m->n_stages > 0; m->n_stages--) {
        (void)cu->cuEventDestroy(m->stages[m->n_stages - 1].busy);
        (void)cu->cuMemFreeHost(m->stages[m->n_stages - 1].data);
    }
}

static int cuda_copy(struct memory_backend *self, struct memory_region *dst, size_t dst_offset,
                     const struct memory_region *src, size_t src_offset, size_t len, struct err *err)
{
    struct memory_cuda *m = (struct memory_cuda *)self;
    const struct cuda_driver *cu = &m->device->driver;
    int rc = cuda_range_check(dst, dst_offset, len, err);
    if (rc == 0)
        rc = cuda_range_check(src, src_offset, len, err);
    if (rc == 0)
        rc = cuda_device_use(m->device, err);
    if (rc < 0 || len == 0)
        return rc;
    rc = cuda_check(cu, cu->cuMemcpyDtoDAsync(region_at(dst, dst_offset), region_at(src, src_offset), len, m->stream),
                    err, "copy %zu bytes inside GPU %d", len, m->device->gpu.index);
    return rc < 0 ? rc : cuda_settle(m, "copy memory", err);
}

/* The next piece of [at + done, at + len), at most a stage, back into a pinned buffer. */
static int stage_fetch(struct memory_cuda *m, CUdeviceptr at, size_t done, size_t len, struct stage **ret_stage,
                       size_t *ret_part, struct err *err)
{
    const struct cuda_driver *cu = &m->device->driver;
    *ret_part = len - done < MEMORY_STAGE_BYTES ? len - done : MEMORY_STAGE_BYTES;
    int rc = stage_next(m, WRITE_STAGES, ret_stage, err);
    if (rc == 0)
        rc = cuda_check(cu, cu->cuMemcpyDtoHAsync((*ret_stage)->data, at + done, *ret_part, m->stream), err,
                        "copy %zu bytes from GPU %d", *ret_part, m->device->gpu.index);
    return rc < 0 ? rc : cuda_settle(m, "read memory", err);
}

static int cuda_read(struct memory_backend *self, const struct memory_region *region, size_t offset, void *ret_data,
                     size_t len, struct err *err)
{
    struct memory_cuda *m = (struct memory_cuda *)self;
    int rc = cuda_range_check(region, offset, len, err);
    if (rc == 0)
        rc = cuda_device_use(m->device, err);
    for (size_t done = 0, part; done < len && rc == 0; done += part) {
        struct stage *stage;
        rc = stage_fetch(m, region_at(region, offset), done, len, &stage, &part, err);
        if (rc == 0)
            memcpy((uint8_t *)ret_data + done, stage->data, part);
    }
    return rc;
}

/* Without the kernel: back through the pinned buffers, in pieces. */
static int cuda_digest_on_cpu(struct memory_cuda *m, CUdeviceptr at, size_t len, uint64_t first_word,
                              uint64_t *ret_digest, struct err *err)
{
    uint64_t digest = 0;
    for (size_t done = 0; done < len;) {
        struct stage *stage;
        size_t part;
        int rc = stage_fetch(m, at, done, len, &stage, &part, err);
        if (rc < 0)
            return rc;
        digest += digest_bytes(stage->data, part, first_word + done / 8);
        done += part;
    }
    int rc = len == 0 ? cuda_settle(m, "read memory", err) : 0;
    if (rc == 0)
        *ret_digest = digest;
    return rc;
}

/* One launch: `n` pieces into `sums` sums, which are in sums_host when this returns. */
static int digest_launch(struct memory_cuda *m, unsigned n, size_t sums, struct err *err)
{
    const struct cuda_driver *cu = &m->device->driver;
    size_t bytes = sums * sizeof *m->sums_host;
    void *arguments[] = {&m->pieces, &n, &m->sums};
    int rc = cuda_check(cu, cu->cuMemsetD8Async(m->sums, 0, bytes, m->stream), err, "clear %zu digests", sums);
    if (rc == 0)
        rc = cuda_check(cu, cu->cuMemcpyHtoDAsync(m->pieces, m->pieces_host, n * sizeof *m->pieces_host, m->stream),
                        err, "say what is to be digested");
    if (rc == 0)
        rc = cuda_check(cu,
                        cu->cuLaunchKernel(m->digest, n < m->blocks_max ? n : m->blocks_max, 1, 1,
                                           DIGEST_KERNEL_THREADS, 1, 1, 0, m->stream, arguments, NULL),
                        err, "start digests on GPU %d", m->device->gpu.index);
    if (rc == 0)
        rc = cuda_check(cu, cu->cuMemcpyDtoHAsync(m->sums_host, m->sums, bytes, m->stream), err, "fetch %zu digests",
                        sums);
    return rc == 0 ? cuda_settle(m, "digest memory", err) : rc;
}

static size_t piece_bytes(const struct memory_cuda *m, const struct memory_range *ranges, size_t n)
{
    uint64_t total = 0;
    for (size_t i = 0; i < n; i++)
        total += ranges[i].len;
    uint64_t size = total / (m->blocks_max * PIECES_A_BLOCK);
    return size < PIECE_BYTES_MIN ? PIECE_BYTES_MIN : size > PIECE_BYTES_MAX ? PIECE_BYTES_MAX : size / 4096 * 4096;
}

/* A range goes on in the next launch when the table is full; its sums are added up. */
static int digests_on_gpu(struct memory_cuda *m, const struct memory_range *ranges, size_t n, uint64_t *ret_digests,
                          struct err *err)
{
    const size_t size = piece_bytes(m, ranges, n);
    size_t range = 0, at = 0;
    memset(ret_digests, 0, n * sizeof *ret_digests);
    while (range < n) {
        unsigned pieces = 0;
        size_t first = range;
        for (; range < n && pieces < PIECES_MAX && range - first < PIECES_MAX; range++, at = 0) {
            const struct memory_range *r = &ranges[range];
            for (size_t len; at < r->len && pieces < PIECES_MAX; at += len) {
                len = r->len - at < size ? r->len - at : size;
                m->pieces_host[pieces++] = (struct digest_piece){region_at(r->region, r->offset + at), len,
                                                                 r->first_word + at / 8, range - first};
            }
            if (at < r->len)
                break;
        }
        size_t sums = range - first + (range < n && at > 0);
        int rc = pieces > 0 ? digest_launch(m, pieces, sums, err) : cuda_settle(m, "write memory", err);
        if (rc < 0)
            return rc;
        for (size_t i = 0; i < sums && pieces > 0; i++)
            ret_digests[first + i] += m->sums_host[i];
    }
    return 0;
}

static int cuda_digests(struct memory_backend *self, const struct memory_range *ranges, size_t n, uint64_t *ret_digests,
                        struct err *err)
{
    struct memory_cuda *m = (struct memory_cuda *)self;
    int rc = cuda_device_use(m->device, err);
    for (size_t i = 0; i < n && rc == 0; i++)
        rc = cuda_range_check(ranges[i].region, ranges[i].offset, ranges[i].len, err);
    if (rc == 0 && m->module)
        return digests_on_gpu(m, ranges, n, ret_digests, err);
    for (size_t i = 0; i < n && rc == 0; i++)
        rc = cuda_digest_on_cpu(m, region_at(ranges[i].region, ranges[i].offset), ranges[i].len, ranges[i].first_word,
                                &ret_digests[i], err);
    return rc;
}

static int cuda_digest(struct memory_backend *self, const struct memory_region *region, size_t offset, size_t len,
                       uint64_t first_word, uint64_t *ret_digest, struct err *err)
{
    const struct memory_range range = {region, offset, len, first_word};
    uint64_t digest;
    int rc = cuda_digests(self, &range, 1, &digest, err);
    if (rc == 0)
        *ret_digest = digest;
    return rc;
}

/* ---- open and close ---- */

static void cuda_close(struct memory_backend *self)
{
    struct memory_cuda *m = (struct memory_cuda *)self;
    const struct cuda_driver *cu = &m->device->driver;
    if (cuda_device_use(m->device, NULL) == 0) {
        if (m->stream)
            (void)cu->cuStreamSynchronize(m->stream);
        cuda_stages_free(self);
        if (m->module)
            (void)cu->cuModuleUnload(m->module);
        if (m->pieces)
            (void)cu->cuMemFree(m->pieces);
        if (m->sums)
            (void)cu->cuMemFree(m->sums);
        if (m->pieces_host)
            (void)cu->cuMemFreeHost(m->pieces_host);
        if (m->sums_host)
            (void)cu->cuMemFreeHost(m->sums_host);
        if (m->stream)
            (void)cu->cuStreamDestroy(m->stream);
    }
    cuda_device_close(m->device);
    free(m);
}

static int memory_cuda_health(struct memory_backend *self, struct err *err)
{
    (void)self;
    return cuda_health(err);
}

static int cuda_open_kernel(struct memory_cuda *m, struct err *err)
{
    const struct cuda_driver *cu = &m->device->driver;
    const void *image = digest_kernel_image();
    int processors = 0;
    if (!image)
        return 0;
    CUresult result = cu->cuModuleLoadData(&m->module, image);
    if (result == CUDA_ERROR_NO_BINARY_FOR_GPU || result == CUDA_ERROR_UNSUPPORTED_PTX_VERSION) {
        m->module = NULL; /* an old GPU or an old driver: digests on the CPU */
        return 0;
    }
    int rc = cuda_check(cu, result, err, "load the digest kernel");
    if (rc == 0)
        rc = cuda_check(cu, cu->cuModuleGetFunction(&m->digest, m->module, DIGEST_KERNEL_NAME), err,
                        "find the digest kernel");
    if (rc == 0)
        rc = cuda_check(
            cu, cu->cuDeviceGetAttribute(&processors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, m->device->device), err,
            "count the processors of GPU %d", m->device->gpu.index);
    const size_t pieces = PIECES_MAX * sizeof *m->pieces_host, sums = PIECES_MAX * sizeof *m->sums_host;
    if (rc == 0)
        rc = cuda_check(cu, cu->cuMemAlloc(&m->pieces, pieces), err, "allocate %zu bytes for digests", pieces);
    if (rc == 0)
        rc = cuda_check(cu, cu->cuMemAlloc(&m->sums, sums), err, "allocate %zu bytes for digests", sums);
    if (rc == 0)
        rc = cuda_check(cu, cu->cuMemHostAlloc((void **)&m->pieces_host, pieces, 0), err, "pin %zu bytes for digests",
                        pieces);
    if (rc == 0)
        rc =
            cuda_check(cu, cu->cuMemHostAlloc((void **)&m->sums_host, sums, 0), err, "pin %zu bytes for digests", sums);
    m->blocks_max = 8u * (unsigned)(processors > 0 ? processors : 1);
    return rc;
}

static int cuda_open(struct memory_cuda *m, struct err *err)
{
    const struct cuda_driver *cu = &m->device->driver;
    int rc = cuda_granularity(m->device, &m->granularity, err);
    if (rc == 0)
        rc = cuda_check(cu, cu->cuStreamCreate(&m->stream, CU_STREAM_NON_BLOCKING), err, "create a stream");
    return rc < 0 ? rc : cuda_open_kernel(m, err);
}

struct memory_backend *memory_cuda_open(const char *device, struct err *err)
{
    struct memory_cuda *m = calloc(1, sizeof *m);
    if (!m) {
        err_set(err, ERR_NOMEM, "out of memory");
        return NULL;
    }
    if (cuda_device_open(device, &m->device, err) < 0) {
        err_wrap(err, "memory backend \"cuda\"");
        free(m);
        return NULL;
    }
    m->base = (struct memory_backend){
        .name = "cuda",
        .gpu = m->device->gpu.uuid,
        .alloc = cuda_alloc,
        .adopt = cuda_adopt,
        .release = cuda_release,
        .write = cuda_write,
        .read = cuda_read,
        .stage_take = cuda_stage_take,
        .stage_write = cuda_stage_write,
        .stages_free = cuda_stages_free,
        .digest = cuda_digest,
        .digests = cuda_digests,
        .copy = cuda_copy,
        .health = memory_cuda_health,
        .close = cuda_close,
    };
    if (cuda_open(m, err) < 0) {
        err_wrap(err, "memory backend \"cuda\"");
        cuda_close(&m->base);
        return NULL;
    }
    return &m->base;
}
