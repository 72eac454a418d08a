/* Connects a group: one connection for each pair, from the lower party to the higher.
 *
 *   lower                                             higher
 *     connect (again and again until the deadline)
 *     hello: magic, from, to, from's incarnation, n,
 *            first half of the group id          --->  finds the group by it
 *     link is up                                 <---  answer: magic, second half of the id
 *
 * Each half proves to the other side that the group id is known (compared in constant time).  A higher party that is
 * late leaves the hello waiting in its backlog, or keeps it as a guest when it comes during another group; a lower
 * party whose connection was dropped tries again.  So it does not matter in which order the parties begin.  Worker
 * thread. */
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "agent/transport_host_internal.h"
#include "common/address.h"
#include "common/clock.h"

#define HELLO_MAGIC    "EEPDATA1"
#define ANSWER_MAGIC   "EEPDATA2"
#define MAGIC_BYTES    8u
#define HALF_BYTES     (GROUP_ID_BYTES / 2)
#define RETRY_FIRST_NS 10000000u   /* 10 ms, doubled ... */
#define RETRY_LAST_NS  200000000u  /* ... up to 200 ms */
#define GUEST_HELLO_NS 5000000000u /* a guest that has not said hello by then is shown out */
#define UNIX_BUFFER    (4 << 20)   /* TCP sizes its own buffers; a fixed size would switch that off */

enum mesh_state {
    MESH_UP,      /* connected, or ourselves */
    MESH_AWAITED, /* it connects to us */
    MESH_RETRY,   /* to be connected at `at_ns` */
    MESH_CONNECTING,
    MESH_ANSWER, /* our hello is sent */
};

struct mesh_peer {
    enum mesh_state state;
    int fd;
    struct addrinfo *addresses, *address; /* address: the next one to try */
    struct sockaddr_un un;
    bool is_unix;
    uint64_t at_ns, backoff_ns;
    uint8_t answer[ANSWER_BYTES];
    size_t got;
    char why[96]; /* the last failure */
};

struct mesh {
    struct transport_host *host;
    struct transport_group *group;
    const struct blob *id;
    const struct member *parties;
    struct mesh_peer *peers; /* [n] */
    struct pollfd *polls;    /* [n] peers, [GUESTS_MAX] guests, the listener, the cancel descriptor */
    uint32_t n, self;
};

static bool same_secret(const uint8_t *a, const uint8_t *b, size_t len)
{
    volatile uint8_t difference = 0;
    for (size_t i = 0; i < len; i++)
        difference = (uint8_t)(difference | (a[i] ^ b[i]));
    return difference == 0;
}

/* ---- hello ---- */

static void hello_write(const struct mesh *m, uint32_t to, uint8_t hello[HELLO_BYTES])
{
    uint32_t words[4] = {htole32(m->self), htole32(to), htole32(m->n), 0};
    uint64_t incarnation = htole64(m->parties[m->self].incarnation);
    memcpy(hello, HELLO_MAGIC, MAGIC_BYTES);
    memcpy(hello + 8, words, 12);
    memcpy(hello + 20, &incarnation, 8);
    memcpy(hello + 28, &words[3], 4);
    memcpy(hello + 32, m->id->data, HALF_BYTES);
}

/* The lower party that says this hello to us, or -1: another group's, or nonsense. */
static int64_t hello_check(const struct mesh *m, const uint8_t hello[HELLO_BYTES])
{
    uint32_t words[3];
    uint64_t incarnation;
    memcpy(words, hello + 8, sizeof words);
    memcpy(&incarnation, hello + 20, sizeof incarnation);
    uint32_t from = le32toh(words[0]);
    if (!same_secret(hello + 32, m->id->data, HALF_BYTES) || memcmp(hello, HELLO_MAGIC, MAGIC_BYTES) != 0)
        return -1;
    if (from >= m->self || le32toh(words[1]) != m->self || le32toh(words[2]) != m->n ||
        le64toh(incarnation) != m->parties[from].incarnation)
        return -1;
    return from;
}

/* ---- connecting to higher parties ---- */

static void peer_retry(struct mesh_peer *peer, const char *why)
{
    if (peer->fd >= 0)
        close(peer->fd);
    peer->fd = -1;
    peer->state = MESH_RETRY;
    peer->backoff_ns = peer->backoff_ns == 0 ? RETRY_FIRST_NS : peer->backoff_ns * 2;
    if (peer->backoff_ns > RETRY_LAST_NS)
        peer->backoff_ns = RETRY_LAST_NS;
    peer->at_ns = clock_now_ns() + peer->backoff_ns;
    snprintf(peer->why, sizeof peer->why, "%s", why);
}

static void peer_hello(struct mesh *m, uint32_t i)
{
    struct mesh_peer *peer = &m->peers[i];
    uint8_t hello[HELLO_BYTES];
    hello_write(m, i, hello);
    ssize_t sent = send(peer->fd, hello, sizeof hello, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent != (ssize_t)sizeof hello) { /* an empty socket buffer takes it whole */
        peer_retry(peer, sent < 0 ? strerror(errno) : "it does not take a hello");
        return;
    }
    peer->state = MESH_ANSWER;
    peer->got = 0;
    snprintf(peer->why, sizeof peer->why, "it is connected but does not answer");
}

static void peer_connect(struct mesh *m, uint32_t i)
{
    struct mesh_peer *peer = &m->peers[i];
    const struct sockaddr *sa = (const struct sockaddr *)&peer->un;
    socklen_t len = sizeof peer->un;
    int family = AF_UNIX;
    if (!peer->is_unix) {
        const struct addrinfo *a = peer->address;
        peer->address = a->ai_next ? a->ai_next : peer->addresses;
        family = a->ai_family;
        sa = a->ai_addr;
        len = a->ai_addrlen;
    }
    peer->fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (peer->fd < 0) {
        peer_retry(peer, strerror(errno));
    } else if (connect(peer->fd, sa, len) == 0) {
        peer_hello(m, i);
    } else if (errno == EINPROGRESS) {
        peer->state = MESH_CONNECTING;
        snprintf(peer->why, sizeof peer->why, "the connection is not accepted");
    } else {
        peer_retry(peer, strerror(errno));
    }
}

static void link_up(struct mesh *m, uint32_t i, int fd)
{
    struct group_link *link = &m->group->links[i];
    if (link->fd >= 0)
        close(link->fd); /* the peer gave that one up and came again */
    address_tune(fd);
    int domain = AF_UNSPEC;
    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &(socklen_t){sizeof domain}) == 0 && domain == AF_UNIX)
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &(int){UNIX_BUFFER}, sizeof(int));
    link->fd = fd;
    m->peers[i].state = MESH_UP;
    m->peers[i].fd = -1;
}

static void peer_ready(struct mesh *m, uint32_t i)
{
    struct mesh_peer *peer = &m->peers[i];
    if (peer->state == MESH_CONNECTING) {
        int error = 0;
        socklen_t len = sizeof error;
        if (getsockopt(peer->fd, SOL_SOCKET, SO_ERROR, &error, &len) < 0)
            error = errno;
        if (error)
            peer_retry(peer, strerror(error));
        else
            peer_hello(m, i);
        return;
    }
    ssize_t got = recv(peer->fd, peer->answer + peer->got, ANSWER_BYTES - peer->got, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0) {
        peer_retry(peer, got < 0 ? strerror(errno) : "it closed the connection instead of answering");
        return;
    }
    peer->got += (size_t)got;
    if (peer->got < ANSWER_BYTES)
        return;
    if (memcmp(peer->answer, ANSWER_MAGIC, MAGIC_BYTES) != 0 ||
        !same_secret(peer->answer + MAGIC_BYTES, m->id->data + HALF_BYTES, HALF_BYTES))
        peer_retry(peer, "it does not know the group");
    else
        link_up(m, i, peer->fd);
}

/* ---- guests: who connects to us ---- */

static void guest_remove(struct transport_host *host, size_t k, bool shut)
{
    if (shut)
        close(host->guests[k].fd);
    host->guests[k] = host->guests[--host->n_guests];
}

void host_guests_sweep(struct transport_host *host, bool all)
{
    for (size_t k = host->n_guests; k-- > 0;) {
        struct pollfd p = {.fd = host->guests[k].fd, .events = POLLRDHUP};
        bool gone = poll(&p, 1, 0) > 0;
        if (all || gone ||
            (host->guests[k].got < HELLO_BYTES && clock_now_ns() - host->guests[k].since_ns > GUEST_HELLO_NS))
            guest_remove(host, k, true);
    }
}

static void guests_accept(struct transport_host *host)
{
    for (;;) {
        int fd = accept4(host->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0)
            return; /* nothing more, or a connection that is gone already */
        if (host->n_guests == GUESTS_MAX) {
            size_t oldest = 0;
            for (size_t k = 1; k < host->n_guests; k++)
                if (host->guests[k].since_ns < host->guests[oldest].since_ns)
                    oldest = k;
            guest_remove(host, oldest, true); /* if it was one of ours, it will come again */
        }
        host->guests[host->n_guests++] = (struct guest){.fd = fd, .since_ns = clock_now_ns()};
    }
}

/* Gives a guest with a complete hello to its link, if it belongs to this group.  True when it is no guest any more. */
static bool guest_admit(struct mesh *m, size_t k)
{
    struct guest *guest = &m->host->guests[k];
    int64_t from = hello_check(m, guest->hello);
    if (from < 0)
        return false;
    uint8_t answer[ANSWER_BYTES];
    memcpy(answer, ANSWER_MAGIC, MAGIC_BYTES);
    memcpy(answer + MAGIC_BYTES, m->id->data + HALF_BYTES, HALF_BYTES);
    bool sent = send(guest->fd, answer, sizeof answer, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)sizeof answer;
    if (sent)
        link_up(m, (uint32_t)from, guest->fd);
    guest_remove(m->host, k, !sent);
    return true;
}

/* Reads a guest's hello.  True when it is no guest any more. */
static bool guest_ready(struct mesh *m, size_t k)
{
    struct guest *guest = &m->host->guests[k];
    if (guest->got == HELLO_BYTES) { /* polled for its end only */
        guest_remove(m->host, k, true);
        return true;
    }
    ssize_t got = recv(guest->fd, guest->hello + guest->got, HELLO_BYTES - guest->got, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return false;
    if (got <= 0) {
        guest_remove(m->host, k, true);
        return true;
    }
    guest->got += (size_t)got;
    return guest->got == HELLO_BYTES && guest_admit(m, k);
}

/* ---- the loop ---- */

static bool mesh_complete(const struct mesh *m)
{
    for (uint32_t i = 0; i < m->n; i++)
        if (m->peers[i].state != MESH_UP)
            return false;
    return true;
}

/* Starts what is due and fills in what is waited for; *until_ns comes down to the next retry. */
static void mesh_wants(struct mesh *m, int cancel_fd, uint64_t *until_ns)
{
    uint64_t now = clock_now_ns();
    for (uint32_t i = 0; i < m->n; i++) {
        struct mesh_peer *peer = &m->peers[i];
        if (peer->state == MESH_RETRY && peer->at_ns <= now)
            peer_connect(m, i);
        m->polls[i] = (struct pollfd){.fd = -1};
        if (peer->state == MESH_CONNECTING)
            m->polls[i] = (struct pollfd){.fd = peer->fd, .events = POLLOUT};
        else if (peer->state == MESH_ANSWER)
            m->polls[i] = (struct pollfd){.fd = peer->fd, .events = POLLIN};
        else if (peer->state == MESH_RETRY && peer->at_ns < *until_ns)
            *until_ns = peer->at_ns;
    }
    for (size_t k = 0; k < GUESTS_MAX; k++) {
        const struct guest *guest = &m->host->guests[k];
        m->polls[m->n + k] = (struct pollfd){.fd = -1};
        if (k < m->host->n_guests)
            m->polls[m->n + k] =
                (struct pollfd){.fd = guest->fd, .events = guest->got < HELLO_BYTES ? POLLIN : POLLRDHUP};
    }
    m->polls[m->n + GUESTS_MAX] = (struct pollfd){.fd = m->host->listen_fd, .events = POLLIN};
    m->polls[m->n + GUESTS_MAX + 1] = (struct pollfd){.fd = cancel_fd, .events = POLLIN};
}

static void mesh_events(struct mesh *m)
{
    for (uint32_t i = 0; i < m->n; i++)
        if (m->polls[i].revents != 0)
            peer_ready(m, i);
    /* From the end: removing a guest puts the last one in its place, which has had its turn by then. */
    for (size_t k = m->host->n_guests; k-- > 0;)
        if (m->polls[m->n + k].revents != 0)
            guest_ready(m, k);
    if (m->polls[m->n + GUESTS_MAX].revents != 0)
        guests_accept(m->host);
}

static int mesh_late(const struct mesh *m, struct err *err)
{
    char names[384] = "";
    size_t len = 0;
    for (uint32_t i = 0; i < m->n && len < sizeof names - 1; i++) {
        const struct mesh_peer *peer = &m->peers[i];
        if (peer->state == MESH_UP)
            continue;
        int more =
            snprintf(names + len, sizeof names - len, "%s%s (%s: %s)", len ? ", " : "", m->parties[i].id,
                     m->parties[i].data_address, peer->state == MESH_AWAITED ? "it did not connect to us" : peer->why);
        len += more > 0 ? (size_t)more : 0;
    }
    return err_set(err, ERR_TIMEOUT, "the group of %u parties is not complete; missing: %s", m->n, names);
}

static int mesh_run(struct mesh *m, const struct transport_call *call, struct err *err)
{
    for (size_t k = m->host->n_guests; k-- > 0;)
        if (m->host->guests[k].got == HELLO_BYTES)
            guest_admit(m, k);
    while (!mesh_complete(m)) {
        uint64_t until = call->deadline_ns;
        mesh_wants(m, call->cancel_fd, &until);
        nfds_t n = m->n + GUESTS_MAX + 2u;
        int got = poll(m->polls, n, host_poll_ms(until));
        if (got < 0 && errno != EINTR)
            return err_set(err, ERR_IO, "cannot wait for the parties: %s", strerror(errno));
        if (got > 0 && m->polls[n - 1].revents != 0)
            return err_set(err, ERR_ABORTED, "creating the group was cancelled");
        if (got > 0)
            mesh_events(m);
        if (clock_now_ns() >= call->deadline_ns && !mesh_complete(m))
            return mesh_late(m, err);
    }
    return 0;
}

/* ---- a group ---- */

/* Name resolution may block; numeric addresses do not. */
static int peer_resolve(struct mesh_peer *peer, const struct member *party, struct err *err)
{
    struct address a;
    int rc = address_parse(party->data_address, &a, err);
    if (rc < 0)
        return err_wrap(err, "party %s", party->id);
    peer->is_unix = a.is_unix;
    if (a.is_unix) {
        peer->un.sun_family = AF_UNIX;
        snprintf(peer->un.sun_path, sizeof peer->un.sun_path, "%.107s", a.host);
        if (peer->un.sun_path[0] == '@') /* an abstract name, padded with zeros */
            peer->un.sun_path[0] = '\0';
        return 0;
    }
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV};
    rc = getaddrinfo(a.host[0] ? a.host : NULL, a.port, &hints, &peer->addresses);
    if (rc != 0)
        return err_set(err, ERR_UNREACHABLE, "party %s: data address %s: %s", party->id, party->data_address,
                       gai_strerror(rc));
    peer->address = peer->addresses;
    return 0;
}

static int mesh_begin(struct mesh *m, struct err *err)
{
    m->peers = calloc(m->n, sizeof *m->peers);
    m->polls = calloc(m->n + GUESTS_MAX + 2u, sizeof *m->polls);
    m->group = calloc(1, sizeof *m->group);
    struct group_link *links = calloc(m->n, sizeof *links);
    if (!m->peers || !m->polls || !m->group || !links) {
        free(links);
        return err_set(err, ERR_NOMEM, "out of memory");
    }
    *m->group = (struct transport_group){.host = m->host, .n = m->n, .self = m->self, .links = links};
    for (uint32_t i = 0; i < m->n; i++) {
        links[i].fd = -1;
        snprintf(links[i].name, sizeof links[i].name, "%s", m->parties[i].id);
        m->peers[i].fd = -1;
        m->peers[i].state = i < m->self ? MESH_AWAITED : i == m->self ? MESH_UP : MESH_RETRY;
    }
    for (uint32_t i = m->self + 1; i < m->n; i++) {
        int rc = peer_resolve(&m->peers[i], &m->parties[i], err);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static void mesh_end(struct mesh *m)
{
    for (uint32_t i = 0; m->peers && i < m->n; i++) {
        if (m->peers[i].fd >= 0)
            close(m->peers[i].fd);
        if (m->peers[i].addresses)
            freeaddrinfo(m->peers[i].addresses);
    }
    free(m->peers);
    free(m->polls);
    host_guests_sweep(m->host, false);
}

int host_group_create(struct transport *self, const struct blob *id, const struct member *parties, uint32_t n,
                      uint32_t self_party, const struct transport_call *call, struct transport_group **ret_group,
                      struct err *err)
{
    if (!id || id->len != GROUP_ID_BYTES)
        return err_set(err, ERR_INVALID, "a group id has %d bytes", GROUP_ID_BYTES);
    if (n == 0 || n > RANKS_MAX || self_party >= n)
        return err_set(err, ERR_INVALID, "a group cannot have %u parties, of which this is %u", n, self_party);
    struct mesh m = {
        .host = (struct transport_host *)self,
        .id = id,
        .parties = parties,
        .n = n,
        .self = self_party,
    };
    int rc = mesh_begin(&m, err);
    if (rc == 0)
        rc = mesh_run(&m, call, err);
    mesh_end(&m);
    if (rc < 0)
        host_group_destroy(m.group);
    else
        *ret_group = m.group;
    return rc;
}

void host_group_destroy(struct transport_group *group)
{
    if (!group)
        return;
    struct transport_host *host = group->host;
    for (uint32_t i = 0; i < group->n; i++)
        if (group->links[i].fd >= 0)
            close(group->links[i].fd);
    free(group->links);
    free(group);
    if (host)
        host_guests_sweep(host, false);
}
