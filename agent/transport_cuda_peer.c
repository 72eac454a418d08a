/* The transport over GPU memory: agents of one host map each other's regions, and the receiver copies.  No
 * communicator, no kernels of ours: copies only, by the copy engines where the GPUs differ.
 *
 * A group's parties find each other by abstract unix sockets named after the first half of the group id; the second
 * half is the secret by which the mesh of transport_host_mesh.c lets them in, and only processes of the same user are
 * taken.  This file: the table and groups.  Worker thread. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "agent/transport_cuda_peer_internal.h"
#include "agent/transport_gpu.h"

#define NAME_BYTES    16u /* of the group id: not secret */
#define PEER_ID_BYTES (NAME_BYTES + GROUP_ID_BYTES)

/* what agents use */
#define STREAMS     4u
#define IN_FLIGHT   24u /* a millisecond of the fastest GPU, so that this thread may sleep */
#define BATCH_BYTES (UINT64_C(64) << 20)
#define CHUNK_BYTES (UINT64_C(16) << 20)

static int peer_group_id(struct transport *self, struct blob **ret_id, struct err *err)
{
    (void)self;
    return transport_secret(PEER_ID_BYTES, ret_id, err);
}

/* ---- groups ---- */

static void peer_group_destroy(struct transport_group *group)
{
    if (!group)
        return;
    struct peer_group *g = (struct peer_group *)group;
    const struct cuda_driver *cu = &g->transport->device->driver;
    bool usable = cuda_device_use(g->transport->device, NULL) == 0; /* else there is nothing that could still run */
    if (usable)
        peer_copies_drop(g);
    for (uint32_t i = 0; i < g->base.n; i++)
        peer_link_done(g, i);
    for (unsigned i = 0; i < PEER_BATCHES && usable; i++)
        if (g->batches[i].done)
            (void)cu->cuEventDestroy(g->batches[i].done);
    for (unsigned i = 0; i < PEER_STREAMS && usable; i++)
        if (g->streams[i])
            (void)cu->cuStreamDestroy(g->streams[i]);
    for (uint32_t i = 0; i < g->base.n; i++)
        if (g->base.links[i].fd >= 0)
            close(g->base.links[i].fd);
    free(g->base.links);
    free(g->links);
    free(g);
}

/* "unix:@eep-<hex of the id's first half>-<party>" */
static void party_address(const struct blob *id, uint32_t party, char address[ADDRESS_MAX])
{
    size_t at = (size_t)snprintf(address, ADDRESS_MAX, "unix:@eep-");
    for (size_t i = 0; i < NAME_BYTES; i++)
        at += (size_t)snprintf(address + at, ADDRESS_MAX - at, "%02x", id->data[i]);
    snprintf(address + at, ADDRESS_MAX - at, "-%u", party);
}

static int party_listen(const char *address, int *ret_fd, struct err *err)
{
    struct sockaddr_un un = {.sun_family = AF_UNIX};
    memcpy(un.sun_path + 1, address + strlen("unix:@"), strlen(address) - strlen("unix:@"));
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return err_set(err, ERR_NOMEM, "cannot make a socket: %s", strerror(errno));
    if (bind(fd, (const struct sockaddr *)&un, sizeof un) < 0 || listen(fd, (int)GUESTS_MAX) < 0) {
        int rc = err_set(err, ERR_CONFLICT, "cannot listen for the other parties of a group: %s", strerror(errno));
        close(fd);
        return rc;
    }
    *ret_fd = fd;
    return 0;
}

/* Anybody on this host can connect to an abstract name: the other end must be ours as well. */
static int group_peers_check(const struct transport_group *mesh, struct err *err)
{
    for (uint32_t i = 0; i < mesh->n; i++) {
        struct ucred cred;
        if (i == mesh->self)
            continue;
        if (getsockopt(mesh->links[i].fd, SOL_SOCKET, SO_PEERCRED, &cred, &(socklen_t){sizeof cred}) < 0)
            return err_set(err, ERR_IO, "cannot tell who party %s is: %s", mesh->links[i].name, strerror(errno));
        if (cred.uid != geteuid() && cred.uid != 0)
            return err_set(err, ERR_DENIED, "party %s is a process of another user (%u)", mesh->links[i].name,
                           (unsigned)cred.uid);
    }
    return 0;
}

/* The sockets of the group, as the host transport connects them. */
static int group_connect(const struct blob *id, const struct member *parties, uint32_t n, uint32_t self,
                         const struct transport_call *call, struct transport_group **ret_mesh, struct err *err)
{
    struct member *here = calloc(n, sizeof *here);
    struct transport_host *host = calloc(1, sizeof *host);
    struct blob *secret = blob_new(id->data + NAME_BYTES, GROUP_ID_BYTES);
    struct transport_group *mesh = NULL;
    int rc = 0;
    if (!here || !host || !secret) {
        rc = err_set(err, ERR_NOMEM, "out of memory");
        goto out;
    }
    for (uint32_t i = 0; i < n; i++) {
        here[i] = parties[i];
        party_address(id, i, here[i].data_address);
    }
    rc = party_listen(here[self].data_address, &host->listen_fd, err);
    if (rc < 0)
        goto out;
    rc = host_group_create(&host->base, secret, here, n, self, call, &mesh, err);
    host_guests_sweep(host, true);
    close(host->listen_fd);
    if (rc < 0)
        goto out;
    mesh->host = NULL;
    rc = group_peers_check(mesh, err);
    if (rc < 0)
        host_group_destroy(mesh);
    else
        *ret_mesh = mesh;
out:
    if (secret)
        blob_unref(secret);
    free(host);
    free(here);
    return rc;
}

static int group_gpu(struct peer_group *g, struct err *err)
{
    const struct cuda_driver *cu = &g->transport->device->driver;
    int rc = cuda_device_use(g->transport->device, err);
    for (unsigned i = 0; i < PEER_STREAMS && rc == 0; i++)
        rc = cuda_check(cu, cu->cuStreamCreate(&g->streams[i], CU_STREAM_NON_BLOCKING), err, "create a stream");
    for (unsigned i = 0; i < PEER_BATCHES && rc == 0; i++)
        rc = cuda_check(cu, cu->cuEventCreate(&g->batches[i].done, CU_EVENT_DISABLE_TIMING), err, "create an event");
    return rc;
}

static int group_hello(struct peer_group *g, const struct transport_call *call, struct err *err)
{
    const struct cuda_device *device = g->transport->device;
    struct call_job job = {.g = g, .call = call};
    CUuuid uuid;
    uint64_t words[2];
    int rc = cuda_check(&device->driver, device->driver.cuDeviceGetUuid(&uuid, device->device), err,
                        "ask GPU %d for its UUID", device->gpu.index);
    memcpy(words, uuid.bytes, sizeof words);
    const struct note_head head = {.kind = NOTE_HELLO, .a = le64toh(words[0]), .b = le64toh(words[1])};
    for (uint32_t i = 0; i < g->base.n && rc == 0; i++) {
        if (i == g->base.self)
            continue;
        g->links[i].want_hello = true;
        rc = peer_note(g, i, &head, NULL, -1, err);
    }
    return rc < 0 ? rc : peer_call_run(&job, err);
}

static int peer_group_create(struct transport *self, const struct blob *id, const struct member *parties, uint32_t n,
                             uint32_t self_party, const struct transport_call *call, struct transport_group **ret_group,
                             struct err *err)
{
    struct transport_group *mesh = NULL;
    if (!id || id->len != PEER_ID_BYTES)
        return err_set(err, ERR_INVALID, "a group id has %u bytes", PEER_ID_BYTES);
    if (n == 0 || n > RANKS_MAX || self_party >= n)
        return err_set(err, ERR_INVALID, "a group cannot have %u parties, of which this is %u", n, self_party);
    for (uint32_t i = 0; i < n; i++)
        if (parties[i].node != parties[self_party].node)
            return err_set(err, ERR_UNSUPPORTED,
                           "party %s is on another host (node %u, this is %u), where transport cuda_peer does not "
                           "reach; use another one",
                           parties[i].id, parties[i].node, parties[self_party].node);
    int rc = group_connect(id, parties, n, self_party, call, &mesh, err);
    if (rc < 0)
        return rc;
    struct peer_group *g = calloc(1, sizeof *g);
    struct peer_link *links = calloc(n, sizeof *links);
    if (!g || !links) {
        free(g);
        free(links);
        host_group_destroy(mesh);
        return err_set(err, ERR_NOMEM, "out of memory");
    }
    g->base = *mesh; /* its sockets are ours now */
    free(mesh);
    g->transport = (struct transport_cuda_peer *)self;
    g->links = links;
    for (uint32_t i = 0; i < n; i++)
        links[i].in_fd = -1;
    rc = group_gpu(g, err);
    if (rc == 0)
        rc = group_hello(g, call, err);
    if (rc < 0)
        peer_group_destroy(&g->base);
    else
        *ret_group = &g->base;
    return rc;
}

/* ---- the table ---- */

static int peer_health(struct transport *self, struct err *err)
{
    (void)self;
    return cuda_health(err);
}

static void peer_close(struct transport *self)
{
    cuda_device_close(((struct transport_cuda_peer *)self)->device);
    free(self);
}

bool transport_cuda_peer_tune(struct transport *transport, const struct peer_tuning *tuning)
{
    struct transport_cuda_peer *t = (struct transport_cuda_peer *)transport;
    if (tuning->streams == 0 || tuning->streams > PEER_STREAMS || tuning->in_flight > PEER_BATCHES ||
        (tuning->batched && !cuda_copies_batched(&t->device->driver)))
        return false;
    t->tuning = *tuning;
    t->tuning.in_flight = tuning->in_flight ? tuning->in_flight : IN_FLIGHT;
    t->tuning.batch_bytes = tuning->batch_bytes ? tuning->batch_bytes : BATCH_BYTES;
    t->tuning.chunk_bytes = tuning->chunk_bytes ? tuning->chunk_bytes : CHUNK_BYTES;
    return true;
}

struct peer_tuning transport_cuda_peer_tuned(const struct transport *transport)
{
    return ((const struct transport_cuda_peer *)transport)->tuning;
}

struct transport *transport_cuda_peer_open(const char *device, struct err *err)
{
    struct transport_cuda_peer *t = calloc(1, sizeof *t);
    if (!t) {
        err_set(err, ERR_NOMEM, "out of memory");
        return NULL;
    }
    if (cuda_device_open(device, &t->device, err) < 0) {
        err_wrap(err, "transport \"cuda_peer\"");
        free(t);
        return NULL;
    }
    (void)transport_cuda_peer_tune(
        &t->base, &(struct peer_tuning){.streams = STREAMS, .batched = cuda_copies_batched(&t->device->driver)});
    t->base = (struct transport){
        .name = "cuda_peer",
        .group_id = peer_group_id,
        .group_create = peer_group_create,
        .move = peer_move,
        .broadcast = peer_broadcast,
        .destroy = peer_group_destroy,
        .health = peer_health,
        .close = peer_close,
    };
    return &t->base;
}
