/* The agent's connection to the coordinator.  Loop thread. */
#include "agent/coordinator_link.h"

#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/daemon.h"
#include "common/msg_wire.h"

#define RETRY_FIRST_MS  50
#define RETRY_LAST_MS   1000
#define RETRY_STEADY_MS 30000 /* after a loss: no slower than the first retry; an engine may be held meanwhile */

struct coordinator_link {
    struct coordinator_link_config config;
    struct rpc_identity self;
    char address[ADDRESS_MAX];
    struct rpc_conn *conn; /* NULL between two attempts */
    bool up;               /* the handshake is done */
    bool said;             /* that it cannot be reached has been logged, with `reason` */
    char reason[256];
    unsigned retry_ms;
    uint64_t lost_ns;  /* when it was lost; 0 = it never was up */
    uint32_t lease_ms; /* of the last WELCOME: a coordinator that restarted expects us within it */
    struct event *retry;
};

static void link_connect(struct coordinator_link *link);

static void retry_later(struct coordinator_link *link)
{
    daemon_timer_in(link->retry, link->retry_ms);
    if (link->lost_ns && clock_now_ns() - link->lost_ns < RETRY_STEADY_MS * UINT64_C(1000000))
        return;
    unsigned last = link->lease_ms && link->lease_ms / 4 < RETRY_LAST_MS ? link->lease_ms / 4 : RETRY_LAST_MS;
    link->retry_ms = link->retry_ms * 2 < last ? link->retry_ms * 2 : last > RETRY_FIRST_MS ? last : RETRY_FIRST_MS;
}

static void say_unreachable(struct coordinator_link *link, const char *reason)
{
    if (link->said && strncmp(reason, link->reason, sizeof link->reason - 1) == 0)
        return;
    link->said = true;
    snprintf(link->reason, sizeof link->reason, "%s", reason);
    log_event(link->config.log, LOG_LEVEL_WARN, "coordinator-unreachable", "address=%s why=%s", link->address, reason);
}

static void on_ready(void *user, struct rpc_conn *conn)
{
    struct coordinator_link *link = user;
    link->up = true;
    link->said = false;
    link->retry_ms = RETRY_FIRST_MS;
    log_event(link->config.log, LOG_LEVEL_INFO, "coordinator-connected", "address=%s software=%s", link->address,
              rpc_conn_peer(conn)->software);
    link->config.on_up(link->config.user);
}

static void on_close(void *user, struct rpc_conn *conn, int code, const char *reason)
{
    (void)conn, (void)code;
    struct coordinator_link *link = user;
    bool was_up = link->up;
    link->conn = NULL;
    link->up = false;
    if (was_up) {
        link->lost_ns = clock_now_ns();
        log_event(link->config.log, LOG_LEVEL_WARN, "coordinator-lost", "address=%s why=%s", link->address, reason);
    } else {
        say_unreachable(link, reason);
    }
    retry_later(link);
    if (was_up)
        link->config.on_down(link->config.user);
}

static void on_frame(void *user, struct rpc_conn *conn, const struct frame *frame)
{
    struct coordinator_link *link = user;
    struct msg msg;
    struct err err;
    int rc = frame->header.kind == FRAME_MESSAGE
                 ? msg_unpack_down(frame->payload, frame->header.length, 0, &msg, &err)
                 : err_set(&err, ERR_PROTOCOL, "a coordinator sends messages only, not a %s",
                           frame_kind_name(frame->header.kind));
    if (rc < 0) {
        rpc_conn_close(conn);
        on_close(link, conn, rc, err.text);
        return;
    }
    if (msg.type == MSG_WELCOME)
        link->lease_ms = msg.welcome.lease_ms;
    link->config.on_msg(link->config.user, &msg);
    msg_done(&msg);
}

static const struct rpc_handlers handlers = {.on_ready = on_ready, .on_frame = on_frame, .on_close = on_close};

static void link_connect(struct coordinator_link *link)
{
    struct err err;
    const struct rpc_options options = {
        .handlers = &handlers, .user = link, .self = &link->self, .tls = link->config.tls};
    if (rpc_connect(link->config.rpc, link->address, &options, &link->conn, &err) < 0) {
        link->conn = NULL;
        say_unreachable(link, err.text);
        retry_later(link);
    }
}

static void on_retry(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    struct coordinator_link *link = user;
    if (!link->conn)
        link_connect(link);
}

int coordinator_link_new(const struct coordinator_link_config *config, struct coordinator_link **ret_link,
                         struct err *err)
{
    struct coordinator_link *link = calloc(1, sizeof *link);
    if (!link)
        return err_set(err, ERR_NOMEM, "out of memory");
    link->config = *config;
    link->self = *config->self;
    link->retry_ms = RETRY_FIRST_MS;
    link->retry = event_new(config->base, -1, 0, on_retry, link);
    if (!link->retry || strlen(config->address) >= sizeof link->address) {
        coordinator_link_free(link);
        return err_set(err, ERR_INVALID, "the coordinator's address '%s' is too long", config->address);
    }
    memcpy(link->address, config->address, strlen(config->address) + 1);
    event_active(link->retry, EV_TIMEOUT, 0);
    *ret_link = link;
    return 0;
}

void coordinator_link_free(struct coordinator_link *link)
{
    if (!link)
        return;
    if (link->conn)
        rpc_conn_finish(link->conn, 200); /* the last words */
    if (link->retry)
        event_free(link->retry);
    free(link);
}

void coordinator_link_send(struct coordinator_link *link, const struct msg *msg)
{
    uint8_t *data;
    size_t len;
    struct err err;
    if (!link->up)
        return;
    if (msg_pack(msg, &data, &len, &err) < 0) {
        log_event(link->config.log, LOG_LEVEL_ERROR, "pack-failed", "message=%s why=%s", msg_type_name(msg->type),
                  err.text);
        return;
    }
    log_event(link->config.log, LOG_LEVEL_DEBUG, "sent", "message=%s", msg_type_name(msg->type));
    (void)rpc_conn_send_bytes(link->conn, FRAME_MESSAGE, 0, 0, data, len); /* failures come as on_close */
    free(data);
}

void coordinator_link_reconnect(struct coordinator_link *link, const char *why)
{
    log_event(link->config.log, LOG_LEVEL_WARN, "coordinator-dropped", "address=%s why=%s", link->address, why);
    if (link->conn)
        rpc_conn_close(link->conn);
    link->conn = NULL;
    link->up = false;
    retry_later(link);
}
