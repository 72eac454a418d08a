/* Who can be reached by imported descriptors: processes of one user on one host, whose GPUs reach each other.
 *
 * A party's card says where it is: host, network namespace (the parties meet by abstract sockets), user, GPU.  Worker
 * thread. */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent/transport_cuda_peer_internal.h"

struct card {
    char boot[40]; /* the kernel's boot id: another one is another host, or another time */
    uint64_t net_dev, net_ino;
    uint32_t user, zero;
    unsigned char gpu[16];
};
_Static_assert(sizeof(struct card) == TRANSPORT_CARD_BYTES, "the card as it is sent");

int peer_gpu_reach(const struct cuda_device *device, const unsigned char uuid[16], int *ret_index, bool *ret_reaches,
                   struct err *err)
{
    const struct cuda_driver *cu = &device->driver;
    int n = 0, can = 0;
    int rc = cuda_check(cu, cu->cuDeviceGetCount(&n), err, "count the GPUs");
    *ret_index = -1;
    *ret_reaches = false;
    for (int i = 0; i < n && rc == 0; i++) {
        CUdevice other;
        CUuuid its;
        if (cu->cuDeviceGet(&other, i) != CUDA_SUCCESS || cu->cuDeviceGetUuid(&its, other) != CUDA_SUCCESS ||
            memcmp(its.bytes, uuid, sizeof its.bytes) != 0)
            continue;
        *ret_index = i;
        if (other != device->device)
            rc = cuda_check(cu, cu->cuDeviceCanAccessPeer(&can, device->device, other), err,
                            "ask whether GPU %d reaches GPU %d", device->gpu.index, i);
        *ret_reaches = other == device->device || can;
        return rc;
    }
    return rc;
}

int transport_cuda_peer_card(struct transport *transport, uint8_t ret_card[TRANSPORT_CARD_BYTES], struct err *err)
{
    const struct cuda_device *device = ((struct transport_cuda_peer *)transport)->device;
    struct card card = {.user = geteuid()};
    struct stat net;
    CUuuid uuid;
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    ssize_t got = fd >= 0 ? read(fd, card.boot, sizeof card.boot) : -1;
    if (fd >= 0)
        close(fd);
    if (got < 36 || stat("/proc/self/ns/net", &net) < 0)
        return err_set(err, ERR_IO, "cannot tell which host this is: /proc is not as usual");
    card.net_dev = net.st_dev;
    card.net_ino = net.st_ino;
    int rc = cuda_device_use(device, err);
    if (rc == 0)
        rc = cuda_check(&device->driver, device->driver.cuDeviceGetUuid(&uuid, device->device), err,
                        "ask GPU %d for its UUID", device->gpu.index);
    if (rc < 0)
        return rc;
    memcpy(card.gpu, uuid.bytes, sizeof card.gpu);
    memcpy(ret_card, &card, sizeof card);
    return 0;
}

bool transport_cuda_peer_reaches(struct transport *transport, const uint8_t card_bytes[TRANSPORT_CARD_BYTES])
{
    const struct cuda_device *device = ((struct transport_cuda_peer *)transport)->device;
    struct card own, card;
    int index;
    bool reaches;
    memcpy(&card, card_bytes, sizeof card);
    if (transport_cuda_peer_card(transport, (uint8_t *)&own, NULL) < 0 ||
        memcmp(&own, &card, offsetof(struct card, gpu)) != 0)
        return false;
    return peer_gpu_reach(device, card.gpu, &index, &reaches, NULL) == 0 && reaches;
}
