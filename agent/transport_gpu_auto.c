/* The transport for GPUs that nobody chose: copies between GPUs of one host, NCCL between the others.  Worker thread,
 * but for the opening. */
#include <stdio.h>
#include <stdlib.h>

#include "agent/transport_auto.h"
#include "agent/transport_gpu.h"
#include "agent/transport_nccl.h"

struct gpu_auto {
    struct transport *near, *mesh;
    char device[128];
};

static struct transport *far_open(void *user, struct err *err)
{
    struct gpu_auto *g = user;
    return transport_nccl_open(&(struct transport_nccl_options){.listen_fd = -1, .mesh = g->mesh, .gpu = g->device},
                               err);
}

static int near_card(void *user, uint8_t ret_card[TRANSPORT_CARD_BYTES], struct err *err)
{
    return transport_cuda_peer_card(((struct gpu_auto *)user)->near, ret_card, err);
}

static bool near_reaches(void *user, const uint8_t card[TRANSPORT_CARD_BYTES])
{
    return transport_cuda_peer_reaches(((struct gpu_auto *)user)->near, card);
}

struct transport *transport_gpu_auto_open(const char *device, int listen_fd, struct err *err)
{
    struct gpu_auto *g = calloc(1, sizeof *g);
    struct transport *t = NULL;
    if (!g) {
        err_set(err, ERR_NOMEM, "out of memory");
        return NULL;
    }
    snprintf(g->device, sizeof g->device, "%s", device);
    g->near = transport_cuda_peer_open(device, err);
    if (!g->near)
        goto free_auto;
    g->mesh = transport_host_open(listen_fd, err);
    if (!g->mesh)
        goto close_near;
    t = transport_auto_open(&(struct transport_auto_options){.near = g->near,
                                                             .mesh = g->mesh,
                                                             .far_open = far_open,
                                                             .card = near_card,
                                                             .reaches = near_reaches,
                                                             .done = free,
                                                             .user = g},
                            err);
    if (t)
        return t;
    g->mesh->close(g->mesh);
close_near:
    g->near->close(g->near);
free_auto:
    free(g);
    return NULL;
}
