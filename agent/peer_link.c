/* Links between agents.  Loop thread. */
#include "agent/peer_link.h"

#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "common/daemon.h"
#include "peer.pb-c.h"

#define RETRY_FIRST_MS 50
#define RETRY_LAST_MS  1000

struct peer_link {
    struct peer_links *all;
    struct member member;
    struct rpc_conn *conn;
    bool up, said, wanted;
    uint64_t epoch, step; /* the last wave to tell; epoch 0 = none */
    unsigned retry_ms;
    struct event *retry;
    struct peer_link *next;
};

/* A call of another agent that is not answered yet. */
struct peer_read {
    uint64_t id, call;
    struct rpc_conn *conn; /* NULL: gone */
    struct peer_read *next;
};
#define READS_MAX (RANKS_MAX * EXPERT_READS_AHEAD) /* open at a time */

struct peer_links {
    struct peer_links_config config;
    struct rpc_identity self;
    struct rpc_listener *listener;
    struct view *view;
    struct peer_link *peers;
    struct peer_read *reads;
    unsigned n_reads;
    uint64_t last_read;
};

/* ---- towards a peer ---- */

static void tell(struct peer_link *peer)
{
    Pb__PeerMessage message = PB__PEER_MESSAGE__INIT;
    Pb__StartWave wave = PB__START_WAVE__INIT;
    if (!peer->up || !peer->epoch)
        return;
    wave.epoch = peer->epoch;
    wave.step = peer->step;
    message.body_case = PB__PEER_MESSAGE__BODY_START_WAVE;
    message.start_wave = &wave;
    (void)rpc_conn_send(peer->conn, FRAME_MESSAGE, 0, 0, &message.base); /* failures come as on_close */
}

static void say_lost(struct peer_link *peer, const char *reason)
{
    if (!peer->said)
        log_event(peer->all->config.log, LOG_LEVEL_WARN, "peer-unreachable", "peer=%s address=%s why=%s",
                  peer->member.id, peer->member.address, reason);
    peer->said = true;
}

static void out_ready(void *user, struct rpc_conn *conn)
{
    (void)conn;
    struct peer_link *peer = user;
    peer->up = true;
    peer->said = false;
    peer->retry_ms = RETRY_FIRST_MS;
    log_event(peer->all->config.log, LOG_LEVEL_DEBUG, "peer-connected", "peer=%s address=%s", peer->member.id,
              peer->member.address);
    tell(peer);
}

static void out_close(void *user, struct rpc_conn *conn, int code, const char *reason)
{
    (void)conn, (void)code;
    struct peer_link *peer = user;
    peer->conn = NULL;
    peer->up = false;
    say_lost(peer, reason);
    daemon_retry_in(peer->retry, &peer->retry_ms, RETRY_LAST_MS);
}

static void out_frame(void *user, struct rpc_conn *conn, const struct frame *frame)
{
    (void)user, (void)conn, (void)frame; /* nothing is answered on these; what a newer version says is not for us */
}

static const struct rpc_handlers out_handlers = {.on_ready = out_ready, .on_frame = out_frame, .on_close = out_close};

static void peer_connect(struct peer_link *peer)
{
    struct err err;
    char who[AGENT_ID_MAX + 8];
    snprintf(who, sizeof who, "agent/%s", peer->member.id);
    const struct rpc_options options = {.handlers = &out_handlers,
                                        .user = peer,
                                        .self = &peer->all->self,
                                        .tls = peer->all->config.tls,
                                        .tls_peer = who};
    if (rpc_connect(peer->all->config.rpc, peer->member.address, &options, &peer->conn, &err) < 0) {
        peer->conn = NULL;
        say_lost(peer, err.text);
        daemon_retry_in(peer->retry, &peer->retry_ms, RETRY_LAST_MS);
    }
}

static void on_retry(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    struct peer_link *peer = user;
    if (!peer->conn)
        peer_connect(peer);
}

static void peer_free(struct peer_link *peer)
{
    if (peer->conn)
        rpc_conn_close(peer->conn);
    if (peer->retry)
        event_free(peer->retry);
    free(peer);
}

static void peer_add(struct peer_links *links, const struct member *member)
{
    struct peer_link *peer = calloc(1, sizeof *peer);
    struct event *retry = peer ? event_new(links->config.base, -1, 0, on_retry, peer) : NULL;
    if (!retry)
        abort(); /* a member that is never told of a wave would stall the view */
    peer->all = links;
    peer->member = *member;
    peer->retry = retry;
    peer->retry_ms = RETRY_FIRST_MS;
    peer->wanted = true;
    LL_PREPEND(links->peers, peer);
    peer_connect(peer);
}

/* ---- from a peer ---- */

static int in_hello(void *user, struct rpc_conn *conn, const struct rpc_identity *peer, struct err *err)
{
    (void)user, (void)conn;
    if (peer->role != RPC_ROLE_PEER)
        return err_set(err, ERR_DENIED, "this is an agent's port for other agents, not the coordinator");
    return 0;
}

static void in_ready(void *user, struct rpc_conn *conn)
{
    struct peer_links *links = user;
    log_event(links->config.log, LOG_LEVEL_DEBUG, "peer-accepted", "peer=%s", rpc_conn_name(conn));
}

static void read_begin(struct peer_links *links, struct rpc_conn *conn, uint64_t call, const struct expert_read *read)
{
    struct peer_read *r = calloc(1, sizeof *r);
    if (!r) {
        (void)rpc_conn_send_error(conn, 0, call, ERR_NOMEM, "out of memory"); /* failures come as on_close */
        return;
    }
    r->id = ++links->last_read;
    r->call = call;
    r->conn = conn;
    LL_PREPEND(links->reads, r);
    links->n_reads++;
    links->config.on_read(links->config.user, r->id, read);
}

static void in_call(struct peer_links *links, struct rpc_conn *conn, const struct frame *frame)
{
    const struct frame_header *h = &frame->header;
    ProtobufCMessage *message;
    struct err err;
    int rc;
    if (h->method >= pb__peer__descriptor.n_methods)
        rc = err_set(&err, ERR_UNSUPPORTED, "this agent knows no call %u", h->method);
    else if (links->n_reads == READS_MAX)
        rc = err_set(&err, ERR_LIMIT, "this agent answers at most %d reads at a time", READS_MAX);
    else
        rc = rpc_unpack(pb__peer__descriptor.methods[h->method].input, frame->payload, h->length, 0, &message, &err);
    if (rc < 0) {
        (void)rpc_conn_send_error(conn, h->method, h->call, rc, err.text);
        return;
    }
    const Pb__ReadExpertRequest *m = (const Pb__ReadExpertRequest *)message;
    const struct expert_read read = {
        .manifest = m->manifest, .slots = m->slots, .layer = m->layer, .expert = m->expert,
        .offset = m->offset, .length = m->length, .memory_only = m->memory_only,
    };
    rpc_unpack_free(message);
    if (read.length == 0 || read.length > EXPERT_READ_MAX)
        (void)rpc_conn_send_error(conn, h->method, h->call, ERR_INVALID, "a read is of 1 byte to 4 MiB");
    else
        read_begin(links, conn, h->call, &read);
}

void peer_links_answer(struct peer_links *links, uint64_t id, int code, const char *text, const struct blob *data)
{
    struct peer_read *r = links->reads;
    while (r && r->id != id)
        r = r->next;
    if (!r)
        return;
    LL_DELETE(links->reads, r);
    links->n_reads--;
    Pb__ReadExpertReply reply = PB__READ_EXPERT_REPLY__INIT;
    if (r->conn && code == 0) {
        reply.data.data = (uint8_t *)(uintptr_t)data->data; /* packing only reads */
        reply.data.len = data->len;
        (void)rpc_conn_send(r->conn, FRAME_REPLY, 0, r->call, &reply.base);
    } else if (r->conn) {
        (void)rpc_conn_send_error(r->conn, 0, r->call, code, text);
    }
    free(r);
}

static void reads_forget(struct peer_links *links, const struct rpc_conn *conn)
{
    struct peer_read *r;
    LL_FOREACH(links->reads, r)
    {
        if (r->conn == conn)
            r->conn = NULL;
    }
}

static void in_frame(void *user, struct rpc_conn *conn, const struct frame *frame)
{
    struct peer_links *links = user;
    ProtobufCMessage *message;
    struct err err;
    if (frame->header.kind == FRAME_CALL) {
        in_call(links, conn, frame);
        return;
    }
    if (frame->header.kind != FRAME_MESSAGE ||
        rpc_unpack(&pb__peer_message__descriptor, frame->payload, frame->header.length, 0, &message, &err) < 0) {
        log_event(links->config.log, LOG_LEVEL_WARN, "peer-dropped", "peer=%s why=%s", rpc_conn_name(conn),
                  "it sent what is no message between agents");
        reads_forget(links, conn);
        rpc_conn_close(conn);
        return;
    }
    const Pb__PeerMessage *m = (const Pb__PeerMessage *)message;
    uint64_t epoch = 0, step = 0;
    bool wave = m->body_case == PB__PEER_MESSAGE__BODY_START_WAVE;
    if (wave) {
        epoch = m->start_wave->epoch;
        step = m->start_wave->step;
    }
    rpc_unpack_free(message);
    if (wave)
        links->config.on_wave(links->config.user, epoch, step);
}

static void in_close(void *user, struct rpc_conn *conn, int code, const char *reason)
{
    (void)code;
    struct peer_links *links = user;
    reads_forget(links, conn);
    log_event(links->config.log, LOG_LEVEL_DEBUG, "peer-gone", "peer=%s why=%s", rpc_conn_name(conn), reason);
}

static const struct rpc_handlers in_handlers = {
    .on_hello = in_hello, .on_ready = in_ready, .on_frame = in_frame, .on_close = in_close};

/* ---- all of them ---- */

int peer_links_open(const struct peer_links_config *config, struct peer_links **ret_links, struct err *err)
{
    struct peer_links *links = calloc(1, sizeof *links);
    if (!links)
        return err_set(err, ERR_NOMEM, "out of memory");
    links->config = *config;
    links->self = *config->self;
    const struct rpc_options options = {
        .handlers = &in_handlers, .user = links, .self = &links->self, .fds = &config->listen_fd, .tls = config->tls};
    int rc = rpc_listen(config->rpc, &config->listen, 1, &options, &links->listener, err);
    if (rc < 0) {
        free(links);
        return rc;
    }
    *ret_links = links;
    return 0;
}

void peer_links_close(struct peer_links *links)
{
    if (!links)
        return;
    rpc_listener_close(links->listener);
    struct peer_link *peer, *next;
    LL_FOREACH_SAFE(links->peers, peer, next)
    peer_free(peer);
    while (links->reads) {
        struct peer_read *r = links->reads;
        links->reads = r->next;
        free(r);
    }
    view_unref(links->view);
    free(links);
}

int peer_links_fd(const struct peer_links *links)
{
    return rpc_listener_fd(links->listener, 0);
}

const char *peer_links_address(const struct peer_links *links)
{
    return rpc_listener_address(links->listener, 0);
}

static bool same_place(const struct member *a, const struct member *b)
{
    return strcmp(a->id, b->id) == 0 && a->incarnation == b->incarnation && strcmp(a->address, b->address) == 0;
}

void peer_links_view(struct peer_links *links, struct view *view)
{
    if (view == links->view)
        return;
    view_unref(links->view);
    links->view = view ? view_ref(view) : NULL;
    struct peer_link *peer, *next;
    LL_FOREACH(links->peers, peer)
    {
        peer->wanted = false;
        if (!view || peer->epoch != view->epoch)
            peer->epoch = 0; /* a wave of a view that is past concerns nobody */
    }
    for (uint32_t r = 0; view && r < view->n; r++) {
        if (strcmp(view->members[r].id, links->self.agent) == 0)
            continue;
        LL_FOREACH(links->peers, peer)
        {
            if (same_place(&peer->member, &view->members[r]))
                break;
        }
        if (peer)
            peer->wanted = true;
        else
            peer_add(links, &view->members[r]);
    }
    LL_FOREACH_SAFE(links->peers, peer, next)
    {
        if (peer->wanted)
            continue;
        LL_DELETE(links->peers, peer);
        peer_free(peer);
    }
}

void peer_links_wave(struct peer_links *links, uint64_t epoch, uint64_t step)
{
    struct peer_link *peer;
    LL_FOREACH(links->peers, peer)
    {
        if (peer->epoch == epoch && peer->step >= step)
            continue;
        peer->epoch = epoch;
        peer->step = step;
        tell(peer);
    }
}
