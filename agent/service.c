/* One incarnation of an agent: turns what happens around it into events of the core, and performs the core's actions in
 * order.  Nothing here blocks, but the start; what blocks is the worker's.  Loop thread. */
#include "agent/service.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent/checkpoint.h"
#include "agent/coordinator_link.h"
#include "agent/engine_socket.h"
#include "agent/peer_link.h"
#include "agent/worker.h"
#include "common/address.h"
#include "common/clock.h"
#include "common/daemon.h"
#include "common/rand.h"
#include "common/topology_wire.h"
#include "common/version.h"

#define DEPTH 64 /* AE_PAGE upon AE_PAGE: each one means that the engine began a step between two instructions of ours */

struct service {
    struct service_config config;
    struct log *log;
    struct agent_config agent;
    struct agent_core *core;
    struct rpc *rpc;
    struct coordinator_link *coordinator;
    struct peer_links *peers;
    struct worker *worker;
    struct event *worker_event, *tick;
    struct engine_socket *engine;
    struct agent_actions actions[DEPTH];
    unsigned depth;
    bool exited;
};

static void service_event(struct service *s, struct agent_event *event);

/* ---- actions ---- */

static void perform_page(struct service *s, const struct agent_action *a)
{
    engine_socket_perform(s->engine, a);
    if (a->want_page) {
        struct agent_event event = {.type = AE_PAGE};
        service_event(s, &event); /* before anything else: its snapshot is taken after the store */
    }
}

static void follow_view(struct service *s)
{
    struct agent_status status;
    agent_core_status(s->core, &status);
    peer_links_view(s->peers, (struct view *)status.view);
}

static void log_transition(struct service *s, const struct agent_action *a)
{
    char what[256];
    snprintf(what, sizeof what, "agent %s: %s --%s--> %s", s->config.id, machine_state_name(a->from),
             machine_event_name(a->event), machine_state_name(a->to));
    log_event(s->log, LOG_LEVEL_INFO, "transition", "what=%s role=%s epoch=%llu op=%llu", what, op_role_name(a->role),
              (unsigned long long)a->epoch, (unsigned long long)a->op);
}

static void perform(struct service *s, struct agent_action *a)
{
    switch (a->type) {
    case AA_SEND:
        coordinator_link_send(s->coordinator, &a->msg);
        return;
    case AA_PAGE:
        perform_page(s, a);
        return;
    case AA_WORK: {
        struct work work = a->work;
        memset(&a->work, 0, sizeof a->work); /* the worker's now */
        worker_submit(s->worker, &work);
        return;
    }
    case AA_WORK_CANCEL:
        worker_cancel(s->worker, a->op);
        return;
    case AA_PEER_WAVE:
        follow_view(s);
        peer_links_wave(s->peers, a->epoch, a->value);
        return;
    case AA_TRANSITION:
        log_transition(s, a);
        return;
    case AA_LOG:
        log_event(s->log, (enum log_level)a->level, "note", "what=%s", a->text);
        return;
    case AA_RECONNECT:
        coordinator_link_reconnect(s->coordinator, a->text[0] ? a->text : "it broke the protocol");
        return;
    case AA_EXIT:
        if (!s->exited)
            s->config.on_exit(s->config.user, (enum agent_exit)a->value);
        s->exited = true;
        return;
    default:
        engine_socket_perform(s->engine, a);
        return;
    }
}

static void service_event(struct service *s, struct agent_event *event)
{
    if (s->exited)
        return;
    if (s->depth == DEPTH)
        abort(); /* the gate loop does not converge: a bug, and running on would break a promise */
    struct agent_actions *actions = &s->actions[s->depth++];
    page_read(engine_socket_page(s->engine), &event->page);
    agent_core_step(s->core, clock_now_ns(), event, actions);
    for (size_t i = 0; i < actions->n; i++)
        perform(s, &actions->v[i]);
    agent_actions_clear(actions);
    if (--s->depth > 0)
        return;
    follow_view(s);
    daemon_timer_set(s->tick, agent_core_deadline(s->core), clock_now_ns());
}

/* ---- events ---- */

static void on_tick(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    struct agent_event event = {.type = AE_TICK};
    service_event(user, &event);
}

static void on_engine(void *user, struct agent_event *event)
{
    service_event(user, event);
}

static void on_link_up(void *user)
{
    struct agent_event event = {.type = AE_LINK_UP};
    service_event(user, &event);
}

static void on_link_down(void *user)
{
    struct agent_event event = {.type = AE_LINK_DOWN};
    service_event(user, &event);
}

static void on_msg(void *user, const struct msg *msg)
{
    struct service *s = user;
    if (msg->type != MSG_VERIFY)
        log_event(s->log, LOG_LEVEL_DEBUG, "received", "message=%s", msg_type_name(msg->type));
    struct agent_event event = {.type = AE_MSG, .msg = msg};
    service_event(s, &event);
}

static void on_wave(void *user, uint64_t epoch, uint64_t step)
{
    struct agent_event event = {.type = AE_PEER_WAVE, .epoch = epoch, .value = step};
    service_event(user, &event);
}

static void work_ended(struct service *s, const struct worker_result *result)
{
    struct agent_event event = {
        .type = AE_WORK_DONE, .work_id = result->id, .code = result->code, .text = result->text,
        .bytes = result->bytes, .value = result->value, .bad = result->bad, .blob = result->blob,
        .model = result->model,
    };
    if (result->progress) {
        event.type = AE_WORK_PROGRESS;
        event.value = result->bytes;
    } else if (result->kind == WORK_LOAD && result->id == 0) { /* no work of the core: the engine's seal */
        engine_socket_sealed(s->engine, result->code, result->text);
        event.type = AE_ENGINE_SEALED;
    }
    if (result->code < 0 && !result->progress)
        log_event(s->log, LOG_LEVEL_WARN, "work-failed", "code=%s why=%s",
                  err_code_name(result->code), result->text);
    service_event(s, &event);
}

static void on_worker(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    struct service *s = user;
    struct worker_result result;
    while (worker_next_result(s->worker, &result)) {
        work_ended(s, &result);
        worker_result_done(&result);
    }
}

/* ---- start ---- */

static int check_config(const struct service_config *c, struct err *err)
{
    const char *addresses[] = {c->listen, c->data_listen};
    if (!name_valid(c->id))
        return err_set(err, ERR_INVALID, "the agent's id '%s' must be 1 to %d of [A-Za-z0-9._-]", c->id,
                       AGENT_ID_MAX - 1);
    if (!name_valid(c->cluster))
        return err_set(err, ERR_INVALID, "the cluster's name '%s' must be 1 to %d of [A-Za-z0-9._-]", c->cluster,
                       AGENT_ID_MAX - 1);
    for (size_t i = 0; i < 2; i++) {
        struct address a;
        int rc = address_parse(addresses[i], &a, err);
        if (rc < 0)
            return rc;
        if (!c->insecure && !daemon_address_is_local(addresses[i]))
            return err_set(err, ERR_DENIED,
                           "will not listen on %s: connections are neither encrypted nor authenticated; use the "
                           "loopback, or --insecure in a network that you trust", addresses[i]);
        bool any = !a.is_unix && (!a.host[0] || strcmp(a.host, "0.0.0.0") == 0 || strcmp(a.host, "::") == 0);
        if (any && !c->advertise)
            return err_set(err, ERR_INVALID, "%s is every interface: say with --advertise HOST how the other agents "
                           "reach this one", addresses[i]);
    }
    struct address coordinator;
    return address_parse(c->coordinator, &coordinator, err);
}

/* The address that others are told: the advertised host with the real port. */
static int advertise(const struct service_config *c, const char *actual, char *ret, struct err *err)
{
    struct address a;
    int rc = address_parse(actual, &a, err), n;
    if (rc < 0)
        return rc;
    if (!c->advertise || a.is_unix)
        n = snprintf(ret, ADDRESS_MAX, "%s", actual);
    else
        n = snprintf(ret, ADDRESS_MAX, strchr(c->advertise, ':') ? "[%s]:%s" : "%s:%s", c->advertise, a.port);
    if (n < 0 || n >= ADDRESS_MAX)
        return err_set(err, ERR_INVALID, "the address %s is too long to be told to others", actual);
    return 0;
}

static int open_transport(struct service *s, struct transport **ret_transport, struct err *err)
{
    char actual[ADDRESS_TEXT_MAX];
    int fd;
    if (strcmp(s->config.transport, "host") != 0)
        return err_set(err, ERR_UNSUPPORTED, "transport '%s' is not in this build: use --transport host",
                       s->config.transport);
    int rc = address_listen(s->config.data_listen, 0600, &fd, actual, err);
    if (rc < 0)
        return rc;
    rc = advertise(&s->config, actual, s->agent.data_address, err);
    if (rc < 0) {
        close(fd);
        return rc;
    }
    *ret_transport = transport_host_open(fd, err);
    return *ret_transport ? 0 : err->code;
}

static int open_worker(struct service *s, struct err *err)
{
    struct worker_config config = {
        .checkpoint = s->config.checkpoint,
        .slots = s->config.slots,
        .transfer_timeout_ms = s->config.transfer_timeout_ms,
    };
    if (config.checkpoint) {
        struct checkpoint *checkpoint;
        int rc = checkpoint_open(config.checkpoint, &checkpoint, err);
        if (rc < 0)
            return rc;
        s->agent.can_load = true;
        s->agent.layers = checkpoint_layers(checkpoint);
        s->agent.logical = checkpoint_experts(checkpoint);
        checkpoint_close(checkpoint);
    }
    config.memory = memory_open(s->config.memory, err);
    if (!config.memory)
        return err->code;
    int rc = open_transport(s, &config.transport, err);
    if (rc < 0) {
        config.memory->close(config.memory);
        return rc;
    }
    return worker_start(&config, &s->worker, err); /* owns both from now on */
}

static int open_links(struct service *s, const struct rpc_identity *self, struct err *err)
{
    struct rpc_identity peer = *self;
    peer.role = RPC_ROLE_PEER;
    const struct peer_links_config peers = {
        .base = s->config.base, .rpc = s->rpc, .log = s->log, .listen = s->config.listen, .self = &peer,
        .on_wave = on_wave, .user = s,
    };
    int rc = peer_links_open(&peers, &s->peers, err);
    if (rc < 0 || (rc = advertise(&s->config, peer_links_address(s->peers), s->agent.address, err)) < 0)
        return rc;
    const struct coordinator_link_config link = {
        .base = s->config.base, .rpc = s->rpc, .log = s->log, .address = s->config.coordinator, .self = self,
        .on_up = on_link_up, .on_down = on_link_down, .on_msg = on_msg, .user = s,
    };
    return coordinator_link_new(&link, &s->coordinator, err);
}

static int open_engine_socket(struct service *s, struct err *err)
{
    const struct engine_socket_config config = {
        .base = s->config.base, .path = s->config.engine_socket, .agent_id = s->config.id, .worker = s->worker,
        .on_event = on_engine, .user = s,
    };
    return engine_socket_open(&config, &s->engine, err);
}

static int open_core(struct service *s, struct err *err)
{
    s->core = agent_core_new(&s->agent, clock_now_ns());
    s->tick = event_new(s->config.base, -1, 0, on_tick, s);
    s->worker_event = event_new(s->config.base, worker_fd(s->worker), EV_READ | EV_PERSIST, on_worker, s);
    if (!s->core || !s->tick || !s->worker_event || event_add(s->worker_event, NULL) != 0)
        return err_set(err, ERR_NOMEM, "out of memory");
    return 0;
}

int service_open(const struct service_config *config, struct service **ret_service, struct err *err)
{
    int rc = check_config(config, err);
    if (rc < 0)
        return rc;
    struct service *s = calloc(1, sizeof *s);
    if (!s)
        return err_set(err, ERR_NOMEM, "out of memory");
    s->config = *config;
    s->log = config->log;
    s->agent = (struct agent_config){.node = config->node, .slots = config->slots};
    s->agent.lead_steps_min = 2;
    s->agent.step_limit_ns = UINT64_C(5000000000);
    memcpy(s->agent.id, config->id, strlen(config->id) + 1);
    struct rpc_identity self = {.role = RPC_ROLE_AGENT};
    snprintf(self.cluster, sizeof self.cluster, "%s", config->cluster);
    snprintf(self.agent, sizeof self.agent, "%s", config->id);
    snprintf(self.software, sizeof self.software, "eep-agent %s", EEP_SOFTWARE);

    s->rpc = rpc_new(config->base);
    rc = s->rpc ? rand_u64(&s->agent.incarnation, err) : err_set(err, ERR_NOMEM, "out of memory");
    self.incarnation = s->agent.incarnation;
    if (rc < 0 || (rc = open_worker(s, err)) < 0 || (rc = open_engine_socket(s, err)) < 0 ||
        (rc = open_links(s, &self, err)) < 0 || (rc = open_core(s, err)) < 0) {
        service_close(s);
        return rc;
    }
    daemon_timer_set(s->tick, agent_core_deadline(s->core), clock_now_ns());
    log_event(s->log, LOG_LEVEL_INFO, "incarnation", "incarnation=%016llx address=%s data=%s socket=%s",
              (unsigned long long)s->agent.incarnation, s->agent.address, s->agent.data_address,
              s->config.engine_socket);
    *ret_service = s;
    return 0;
}

void service_close(struct service *s)
{
    if (!s)
        return;
    s->exited = true; /* no event reaches the core any more */
    coordinator_link_free(s->coordinator);
    peer_links_close(s->peers);
    engine_socket_close(s->engine);
    if (s->worker_event)
        event_free(s->worker_event);
    if (s->tick)
        event_free(s->tick);
    if (s->worker)
        worker_stop(s->worker);
    for (size_t i = 0; i < DEPTH; i++)
        agent_actions_done(&s->actions[i]);
    agent_core_free(s->core);
    rpc_free(s->rpc);
    free(s);
}

void service_stop(struct service *s)
{
    struct agent_event event = {.type = AE_STOP};
    service_event(s, &event);
}

const char *service_address(const struct service *s)
{
    return s->agent.address;
}

const char *service_data_address(const struct service *s)
{
    return s->agent.data_address;
}

void service_status_text(const struct service *s, char *text, size_t size)
{
    struct agent_status status;
    agent_core_status(s->core, &status);
    snprintf(text, size, "%s, epoch %llu, engine %s, %s", status.view ? "serving" : "spare",
             (unsigned long long)status.applied_epoch, status.engine ? "attached" : "none",
             status.welcomed ? "coordinator connected" : "no coordinator");
}
