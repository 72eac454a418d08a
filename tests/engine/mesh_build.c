/* The parking lot and the building of a mesh.  See mesh.h. */
#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <netdb.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "common/address.h"
#include "common/clock.h"
#include "tests/engine/mesh_private.h"

#define LOT_MAX    1024   /* parked connections */
#define LOT_AGE_MS 120000 /* nobody came for it */
#define SLICE_MS   100    /* how often a builder asks whether it is cancelled */
#define RETRY_MS   20

/* ---- the lot ---- */

struct parked {
    struct mesh_key key;
    uint64_t from_id, since_ms;
    int fd;
};
struct mesh_lot {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct parked *v;
    size_t n;
};

struct mesh_lot *mesh_lot_new(void)
{
    struct mesh_lot *lot = calloc(1, sizeof *lot);
    struct parked *v = calloc(LOT_MAX, sizeof *v);
    if (!lot || !v) {
        free(lot);
        free(v);
        return NULL;
    }
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&lot->changed, &attr);
    pthread_condattr_destroy(&attr);
    pthread_mutex_init(&lot->lock, NULL);
    lot->v = v;
    return lot;
}

static void lot_remove(struct mesh_lot *lot, size_t i)
{
    lot->v[i] = lot->v[--lot->n];
}

void mesh_lot_free(struct mesh_lot *lot)
{
    if (!lot)
        return;
    for (size_t i = 0; i < lot->n; i++)
        close(lot->v[i].fd);
    pthread_cond_destroy(&lot->changed);
    pthread_mutex_destroy(&lot->lock);
    free(lot->v);
    free(lot);
}

static bool key_equal(const struct mesh_key *a, const struct mesh_key *b)
{
    return a->op == b->op && a->attempt == b->attempt && a->epoch == b->epoch;
}

static bool parked_dead(const struct parked *p)
{
    char byte;
    ssize_t n = recv(p->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    return n == 0 || (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
}

/* A newer connection of the same peer for the same key replaces the older one; dead and very old ones make room. */
static bool lot_park(struct mesh_lot *lot, const struct parked *p)
{
    pthread_mutex_lock(&lot->lock);
    for (size_t i = lot->n; i-- > 0;) {
        bool same = key_equal(&lot->v[i].key, &p->key) && lot->v[i].from_id == p->from_id;
        if (same || parked_dead(&lot->v[i]) || p->since_ms - lot->v[i].since_ms > LOT_AGE_MS) {
            close(lot->v[i].fd);
            lot_remove(lot, i);
        }
    }
    bool room = lot->n < LOT_MAX;
    if (room)
        lot->v[lot->n++] = *p;
    pthread_cond_broadcast(&lot->changed);
    pthread_mutex_unlock(&lot->lock);
    return room;
}

/* Ids are random u64 and JSON integers are signed: they travel as text. */
static uint64_t greeting_u64(const json_t *o, const char *key)
{
    const char *text = json_string_value(json_object_get(o, key));
    return text ? strtoull(text, NULL, 16) : 0;
}

bool mesh_lot_greet(struct mesh_lot *lot, const char *line, uint64_t own_id, int fd)
{
    json_t *o = json_loads(line, 0, NULL);
    if (!o)
        return false;
    struct parked p = {.key = {greeting_u64(o, "op"), greeting_u64(o, "attempt"), greeting_u64(o, "epoch")},
                       .from_id = greeting_u64(o, "from"),
                       .since_ms = clock_now_ms(),
                       .fd = fd};
    bool right = greeting_u64(o, "mesh") == own_id && p.from_id != 0;
    json_decref(o);
    /* one byte into the empty buffer of a fresh socket: it does not block.  Answered before it is parked: once it is,
     * the descriptor belongs to whoever takes it. */
    if (!right || send(fd, "+", 1, MSG_NOSIGNAL | MSG_DONTWAIT) != 1)
        return false;
    return lot_park(lot, &p);
}

void mesh_lot_drop(struct mesh_lot *lot, uint64_t op)
{
    pthread_mutex_lock(&lot->lock);
    for (size_t i = lot->n; i-- > 0;) {
        if (op != 0 && lot->v[i].key.op == op) {
            close(lot->v[i].fd);
            lot_remove(lot, i);
        }
    }
    pthread_mutex_unlock(&lot->lock);
}

/* What was meant for an earlier attempt or an earlier repair: nobody will come for it. */
static void lot_drop_older(struct mesh_lot *lot, const struct mesh_key *key)
{
    pthread_mutex_lock(&lot->lock);
    for (size_t i = lot->n; i-- > 0;) {
        const struct mesh_key *k = &lot->v[i].key;
        if (key->op ? k->op == key->op && k->attempt < key->attempt : k->op == 0 && k->epoch < key->epoch) {
            close(lot->v[i].fd);
            lot_remove(lot, i);
        }
    }
    pthread_mutex_unlock(&lot->lock);
}

void mesh_lot_kick(struct mesh_lot *lot)
{
    pthread_mutex_lock(&lot->lock);
    pthread_cond_broadcast(&lot->changed);
    pthread_mutex_unlock(&lot->lock);
}

static struct timespec slice_end(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_nsec += SLICE_MS * 1000000L;
    t.tv_sec += t.tv_nsec / 1000000000L;
    t.tv_nsec %= 1000000000L;
    return t;
}

static bool build_over(const struct mesh_build *b, uint64_t deadline_ms, int *ret_rc)
{
    if (b->cancelled && b->cancelled(b->user))
        *ret_rc = ERR_ABORTED;
    else if (clock_now_ms() >= deadline_ms)
        *ret_rc = ERR_TIMEOUT;
    else
        return false;
    return true;
}

static int lot_take(const struct mesh_build *b, uint64_t from_id, uint64_t deadline_ms, int *ret_fd)
{
    struct mesh_lot *lot = b->lot;
    int rc = 0, fd = -1;
    for (bool over = false; fd < 0 && !over;) {
        /* Without the lock, for `cancelled` may take locks of its own; and before the search, for what is parked
         * between the search and the wait would be missed. */
        over = build_over(b, deadline_ms, &rc);
        pthread_mutex_lock(&lot->lock);
        for (size_t i = 0; i < lot->n && fd < 0; i++) {
            if (key_equal(&lot->v[i].key, &b->key) && lot->v[i].from_id == from_id) {
                fd = lot->v[i].fd;
                lot_remove(lot, i);
            }
        }
        struct timespec until = slice_end();
        if (fd < 0 && !over)
            pthread_cond_timedwait(&lot->changed, &lot->lock, &until);
        pthread_mutex_unlock(&lot->lock);
    }
    if (fd >= 0)
        *ret_fd = fd;
    return fd >= 0 ? 0 : rc;
}

/* ---- connecting ---- */

static int resolve(const char *text, struct sockaddr_storage *ret_addr, socklen_t *ret_len)
{
    struct address address;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = NULL;
    if (address_parse(text, &address, NULL) || address.is_unix ||
        getaddrinfo(address.host, address.port, &hints, &found) != 0)
        return ERR_INVALID;
    memcpy(ret_addr, found->ai_addr, found->ai_addrlen);
    *ret_len = found->ai_addrlen;
    freeaddrinfo(found);
    return 0;
}

/* Waits for events on fd; ERR_TIMEOUT or ERR_ABORTED when the build is over. */
static int await(const struct mesh_build *b, int fd, short events, uint64_t deadline_ms)
{
    int rc;
    while (!build_over(b, deadline_ms, &rc)) {
        struct pollfd p = {.fd = fd, .events = events};
        int n = poll(&p, 1, SLICE_MS);
        if (n > 0)
            return 0;
        if (n < 0 && errno != EINTR)
            return ERR_IO;
    }
    return rc;
}

static int greet(const struct mesh_build *b, int fd, const struct mesh_peer *to, uint64_t deadline_ms)
{
    char line[256], answer;
    int len = snprintf(line, sizeof line,
                       "{\"mesh\":\"%" PRIx64 "\",\"from\":\"%" PRIx64 "\",\"op\":\"%" PRIx64
                       "\",\"attempt\":\"%" PRIx64 "\",\"epoch\":\"%" PRIx64 "\"}\n",
                       to->id, b->peers[b->self].id, b->key.op, b->key.attempt, b->key.epoch);
    if (send(fd, line, (size_t)len, MSG_NOSIGNAL) != len)
        return ERR_UNREACHABLE;
    int rc = await(b, fd, POLLIN, deadline_ms);
    if (rc)
        return rc;
    return recv(fd, &answer, 1, 0) == 1 && answer == '+' ? 0 : ERR_UNREACHABLE;
}

/* One attempt.  ERR_UNREACHABLE: try again. */
static int connect_once(const struct mesh_build *b, const struct mesh_peer *to, uint64_t deadline_ms, int *ret_fd)
{
    struct sockaddr_storage addr;
    socklen_t len;
    if (resolve(to->address, &addr, &len))
        return ERR_INVALID;
    int fd = socket(addr.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return ERR_NOMEM;
    int rc = 0, failed = 0;
    socklen_t failed_len = sizeof failed;
    if (connect(fd, (struct sockaddr *)&addr, len) != 0) {
        rc = errno == EINPROGRESS ? await(b, fd, POLLOUT, deadline_ms) : ERR_UNREACHABLE;
        if (rc == 0 && (getsockopt(fd, SOL_SOCKET, SO_ERROR, &failed, &failed_len) != 0 || failed != 0))
            rc = ERR_UNREACHABLE;
    }
    if (rc == 0)
        rc = greet(b, fd, to, deadline_ms);
    if (rc) {
        close(fd);
        return rc;
    }
    *ret_fd = fd;
    return 0;
}

static int connect_peer(const struct mesh_build *b, const struct mesh_peer *to, uint64_t deadline_ms, int *ret_fd)
{
    for (;;) {
        int rc = connect_once(b, to, deadline_ms, ret_fd);
        if (rc != ERR_UNREACHABLE)
            return rc;
        if (build_over(b, deadline_ms, &rc))
            return rc;
        nanosleep(&(struct timespec){.tv_nsec = RETRY_MS * 1000000L}, NULL);
    }
}

int mesh_build(const struct mesh_build *b, struct mesh **ret_mesh, struct err *err)
{
    struct mesh *mesh = calloc(1, sizeof *mesh);
    if (mesh) {
        mesh->link = calloc(b->n, sizeof *mesh->link);
        mesh->peers = calloc(b->n, sizeof *mesh->peers);
    }
    if (!mesh || !mesh->link || !mesh->peers) {
        mesh_free(mesh);
        return err_set(err, ERR_NOMEM, "out of memory for a mesh of %u ranks", b->n);
    }
    mesh->n = b->n;
    mesh->self = b->self;
    memcpy(mesh->peers, b->peers, b->n * sizeof *b->peers);
    for (uint32_t r = 0; r < b->n; r++)
        mesh->link[r].fd = -1;
    uint64_t deadline_ms = clock_now_ms() + b->limit_ms;
    lot_drop_older(b->lot, &b->key);
    for (uint32_t r = 0; r < b->n; r++) {
        if (r == b->self || !b->peers[r].serving)
            continue;
        int rc = r < b->self ? connect_peer(b, &b->peers[r], deadline_ms, &mesh->link[r].fd)
                             : lot_take(b, b->peers[r].id, deadline_ms, &mesh->link[r].fd);
        if (rc) {
            mesh_free(mesh);
            return err_set(err, rc, "no connection %s rank %u at %s: %s", r < b->self ? "to" : "from", r,
                           b->peers[r].address, err_code_name(rc));
        }
        address_tune(mesh->link[r].fd);
    }
    *ret_mesh = mesh;
    return 0;
}

void mesh_free(struct mesh *mesh)
{
    if (!mesh)
        return;
    for (uint32_t r = 0; r < mesh->n; r++) {
        if (mesh->link[r].fd >= 0)
            close(mesh->link[r].fd);
    }
    free(mesh->link);
    free(mesh->peers);
    free(mesh);
}
