/* Which agents use a GPU, by abstract unix sockets named after its UUID: bound names that vanish with their process.
 *
 *     @eep-gpu-UUID       the agent that has it alone
 *     @eep-gpu-UUID-K     one of those that share it
 *
 * Each binds its own name first and then looks for the other kind, so that of two that start at the same moment at
 * least one sees the other.  Abstract names are those of a network namespace: containers with networks of their own do
 * not see each other here.  Any thread. */
#include "agent/gpu_share.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define SHARERS_MAX 64

static socklen_t name_write(const struct gpu *gpu, int sharer, struct sockaddr_un *ret_name)
{
    char suffix[16] = "";
    *ret_name = (struct sockaddr_un){.sun_family = AF_UNIX};
    if (sharer >= 0)
        snprintf(suffix, sizeof suffix, "-%d", sharer);
    int len = snprintf(ret_name->sun_path + 1, sizeof ret_name->sun_path - 1, "eep-gpu-%s%s", gpu->uuid, suffix);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)len);
}

/* 0, 1 when the name is taken, or an error. */
static int name_bind(int fd, const struct gpu *gpu, int sharer, struct err *err)
{
    struct sockaddr_un name;
    socklen_t len = name_write(gpu, sharer, &name);
    if (bind(fd, (const struct sockaddr *)&name, len) == 0)
        return 0;
    return errno == EADDRINUSE ? 1
                               : err_set(err, ERR_IO, "cannot mark GPU %d as used: %s", gpu->index, strerror(errno));
}

static bool name_taken(const struct gpu *gpu, int sharer)
{
    struct sockaddr_un name;
    socklen_t len = name_write(gpu, sharer, &name);
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    bool taken = fd >= 0 && connect(fd, (const struct sockaddr *)&name, len) == 0;
    if (fd >= 0)
        close(fd);
    return taken;
}

static int lock_refuse(const struct gpu *gpu, bool shared, struct err *err)
{
    return err_set(err, ERR_CONFLICT,
                   shared ? "GPU %d (%s) belongs to an agent that does not share it: start that one with --shared-gpu "
                            "as well, or use another GPU"
                          : "GPU %d (%s) is used by another agent: one agent for each GPU, or --shared-gpu for all of "
                            "them (development and tests only)",
                   gpu->index, gpu->uuid);
}

static int lock_alone(int fd, const struct gpu *gpu, struct err *err)
{
    int rc = name_bind(fd, gpu, -1, err);
    if (rc != 0)
        return rc < 0 ? rc : lock_refuse(gpu, false, err);
    for (int k = 0; k < SHARERS_MAX; k++)
        if (name_taken(gpu, k))
            return lock_refuse(gpu, false, err);
    return 0;
}

static int lock_shared(int fd, const struct gpu *gpu, struct err *err)
{
    int rc = 1;
    for (int k = 0; k < SHARERS_MAX && rc > 0; k++)
        rc = name_bind(fd, gpu, k, err);
    if (rc > 0)
        return err_set(err, ERR_LIMIT, "GPU %d is shared by %d agents already", gpu->index, SHARERS_MAX);
    if (rc == 0 && name_taken(gpu, -1))
        rc = lock_refuse(gpu, true, err);
    return rc;
}

int gpu_share_lock(const struct gpu *gpu, bool shared, int *ret_fd, struct err *err)
{
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return err_set(err, ERR_NOMEM, "cannot make a socket: %s", strerror(errno));
    int rc = shared ? lock_shared(fd, gpu, err) : lock_alone(fd, gpu, err);
    if (rc < 0)
        close(fd);
    else
        *ret_fd = fd;
    return rc;
}

int gpu_share_host_id(struct err *err)
{
    uint64_t random = 0;
    char id[64];
    if (getrandom(&random, sizeof random, 0) != (ssize_t)sizeof random)
        return err_set(err, ERR_IO, "cannot get random bytes for NCCL_HOSTID: %s", strerror(errno));
    snprintf(id, sizeof id, "eep-%d-%016llx", (int)getpid(), (unsigned long long)random);
    if (setenv("NCCL_HOSTID", id, 0) != 0)
        return err_set(err, ERR_NOMEM, "cannot set NCCL_HOSTID: %s", strerror(errno));
    return 0;
}
