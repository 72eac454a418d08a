/* Stands in for device_cuda.c and device_steps.c in a build without CUDA's headers: an agent whose weights lie in GPU
 * memory is refused when the engine attaches, so that nothing else here is ever called. */
#include "agent/libeep/device.h"

int device_open(const char *gpu, struct control_page *page, size_t page_bytes, struct device **ret_device,
                struct err *err)
{
    (void)page, (void)page_bytes, (void)ret_device;
    return err_set(err, ERR_UNSUPPORTED,
                   "the agent's weights lie on GPU %s, and this libeep was built without cuda.h: use one that was built "
                   "with it",
                   gpu);
}

void device_close(struct device *d)
{
    (void)d;
}

int device_ordinal(const struct device *d)
{
    (void)d;
    return -1;
}

int device_map(struct device *d, int fd, size_t bytes, void **ret_base, size_t *ret_mapped, struct err *err)
{
    (void)d, (void)fd, (void)bytes, (void)ret_base, (void)ret_mapped;
    return err_set(err, ERR_UNSUPPORTED, "no GPU memory in this build");
}

void device_unmap(struct device *d, void *base, size_t mapped)
{
    (void)d, (void)base, (void)mapped;
}

bool device_drain(struct device *d, int limit_ms)
{
    (void)d, (void)limit_ms;
    return true;
}

int device_maps_new(struct device *d, struct eep_maps *maps, struct device_maps **ret_maps, struct err *err)
{
    (void)d, (void)maps, (void)ret_maps;
    return err_set(err, ERR_UNSUPPORTED, "no GPU memory in this build");
}

void device_maps_free(struct device *d, struct device_maps *m)
{
    (void)d, (void)m;
}

int device_maps_write(struct device *d, struct device_maps *m, const struct eep_maps *maps, void *stream,
                      struct err *err)
{
    (void)d, (void)m, (void)maps, (void)stream;
    return err_set(err, ERR_UNSUPPORTED, "no GPU memory in this build");
}

bool device_step_room(struct device *d)
{
    (void)d;
    return true;
}

int device_step_begin(struct device *d, void *stream, struct err *err)
{
    (void)d, (void)stream;
    return err_set(err, ERR_UNSUPPORTED, "no GPU memory in this build");
}

int device_step_end(struct device *d, struct device_maps *m, const struct eep_maps *maps, void *stream, struct err *err)
{
    (void)d, (void)m, (void)maps, (void)stream;
    return err_set(err, ERR_UNSUPPORTED, "no GPU memory in this build");
}

int device_step_done(struct device *d, void *stream, uint64_t step, struct err *err)
{
    (void)d, (void)stream, (void)step;
    return err_set(err, ERR_UNSUPPORTED, "no GPU memory in this build");
}

bool device_step_ns(struct device *d, uint64_t *ret_ns)
{
    (void)d, (void)ret_ns;
    return false;
}
