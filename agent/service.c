/* One incarnation of an agent: turns what happens around it into events of the core, and performs the core's actions in
 * order.  Nothing here blocks, but the start; what blocks is the worker's.  Loop thread. */
#include "agent/service.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent/adopt.h"
#include "agent/checkpoint.h"
#include "agent/coordinator_link.h"
#include "agent/engine_socket.h"
#include "agent/gpu_share.h"
#include "agent/load_window.h"
#include "agent/peer_link.h"
#include "agent/transport_gpu.h"
#include "agent/transport_nccl.h"
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
    struct adopt *adopt;
    struct agent_config agent;
    struct agent_core *core;
    struct rpc *rpc;
    struct rpc_identity peer; /* what it says of itself to other agents */
    struct coordinator_link *coordinator;
    struct peer_links *peers;
    struct worker *worker;
    struct event *worker_event, *tick, *load_tick;
    struct load_window load;
    uint32_t load_window_ms; /* as the coordinator wants it; 0: not at all */
    struct engine_socket *engine;
    struct agent_actions actions[DEPTH];
    unsigned depth;
    int gpu_fd; /* holds the GPU for us; -1: none */
    bool exited;
    bool leaves; /* what is kept stays */
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
    service_metrics_transition(s->config.metrics, a->role, a->to);
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
        if (a->msg.type == MSG_FLIPPED)
            service_metrics_flipped(s->config.metrics, &a->msg.flipped);
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
        log_event(s->log, (enum log_level)a->level, "note", "epoch=%llu op=%llu what=%s", (unsigned long long)a->epoch,
                  (unsigned long long)a->op, a->text);
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
    adopt_save(s->adopt, s->core);
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
    ((struct service *)user)->config.metrics->coordinator_losses++;
    struct agent_event event = {.type = AE_LINK_DOWN};
    service_event(user, &event);
}

/* What the engine's counters have grown by goes to the coordinator, which may lose it. */
static void on_load_tick(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    struct service *s = user;
    struct agent_status status;
    struct load_counters now = {0};
    struct msg msg = {.type = MSG_LOAD};
    agent_core_status(s->core, &status);
    now.tokens = engine_socket_load(s->engine, &now.layers, &now.slots);
    now.map_version = status.map_version;
    now.epoch = status.view && !status.flip_pending ? status.view->epoch : 0;
    if (load_window_next(&s->load, &now, clock_now_ns(), &msg.load) && status.welcomed)
        coordinator_link_send(s->coordinator, &msg);
    msg_done(&msg);
    if (s->load_window_ms && !s->exited)
        daemon_timer_in(s->load_tick, s->load_window_ms);
}

static void load_wanted(struct service *s, uint32_t window_ms)
{
    bool first = !s->load_window_ms && window_ms;
    s->load_window_ms = window_ms;
    if (first)
        daemon_timer_in(s->load_tick, window_ms);
}

static void on_msg(void *user, const struct msg *msg)
{
    struct service *s = user;
    if (msg->type == MSG_WELCOME)
        load_wanted(s, msg->welcome.load_window_ms);
    if (msg->type != MSG_VERIFY)
        log_event(s->log, LOG_LEVEL_DEBUG, "received", "message=%s", msg_type_name(msg->type));
    struct agent_event event = {.type = AE_MSG, .msg = msg};
    service_event(s, &event);
    if (msg->type == MSG_WELCOME && !s->exited && s->config.on_welcome)
        s->config.on_welcome(s->config.user);
}

static void on_wave(void *user, uint64_t epoch, uint64_t step)
{
    struct agent_event event = {.type = AE_PEER_WAVE, .epoch = epoch, .value = step};
    service_event(user, &event);
}

static void on_read(void *user, uint64_t id, const struct expert_read *read)
{
    struct service *s = user;
    int32_t slot = agent_core_slot(s->core, read->manifest, read->layer, read->expert);
    if (slot < 0 && read->memory_only)
        peer_links_answer(s->peers, id, ERR_NOTFOUND, "it does not hold that expert", NULL);
    else
        worker_expert_read(s->worker, id, read, slot);
}

/* What the worker did: how much, how fast; aborted work is the operation's story, told there. */
static void log_work(struct service *s, const struct worker_result *r)
{
    unsigned long long us = r->ns / 1000, rate = r->ns ? (unsigned long long)((double)r->bytes * 1e9 / (double)r->ns) : 0;
    if (r->code < 0 && r->code != ERR_ABORTED)
        log_event(s->log, LOG_LEVEL_WARN, "work-failed", "work=%s op=%llu round=%u us=%llu code=%s why=%s",
                  work_kind_name(r->kind), (unsigned long long)r->op, r->round, us, err_code_name(r->code), r->text);
    else if (r->kind == WORK_GROUP_ID)
        return; /* no news, and nothing of it belongs into a log */
    else
        log_event(s->log, LOG_LEVEL_INFO, "work", "work=%s op=%llu round=%u us=%llu bytes=%llu bytes_per_s=%llu why=%s",
                  work_kind_name(r->kind), (unsigned long long)r->op, r->round, us, (unsigned long long)r->bytes, rate,
                  r->code < 0 ? r->text : "done");
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
        event.bytes = result->value;
    } else if (result->kind == WORK_LOAD && result->id == 0) { /* no work of the core: the engine's seal */
        engine_socket_sealed(s->engine, result->code, result->text);
        event.type = AE_ENGINE_SEALED;
    }
    if (!result->progress) {
        log_work(s, result);
        service_metrics_work(s->config.metrics, result);
    }
    service_event(s, &event);
}

/* This process cannot go on, what it holds can: it ends, and the next one takes that over. */
static void service_fatal(struct service *s, const char *why)
{
    if (s->exited)
        return;
    log_event(s->log, LOG_LEVEL_ERROR, "fatal", "exit_status=%d why=%s", AGENT_EXIT_READOPT, why);
    s->config.on_exit(s->config.user, AGENT_EXIT_READOPT);
    s->exited = true;
}

static void on_worker(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    struct service *s = user;
    struct worker_result result;
    while (worker_next_result(s->worker, &result)) {
        if (result.fatal)
            service_fatal(s, result.text);
        else if (result.expert)
            peer_links_answer(s->peers, result.id, result.code, result.text, result.blob);
        else
            work_ended(s, &result);
        worker_result_done(&result);
    }
}

/* ---- start ---- */

/* The device of "cuda" or "cuda:DEVICE"; NULL for other memory. */
static const char *memory_device(const char *memory)
{
    size_t len = strlen("cuda");
    if (strncmp(memory, "cuda", len) != 0 || (memory[len] != '\0' && memory[len] != ':'))
        return NULL;
    return memory[len] == ':' ? memory + len + 1 : "";
}

int service_check(const struct service_config *c, struct err *err)
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
        if (a.is_unix)
            return err_set(err, ERR_INVALID, "'%s': --listen and --data-listen take HOST:PORT", addresses[i]);
        if (!c->insecure && !(i == 0 ? c->tls != NULL : c->data_insecure) && !daemon_address_is_local(addresses[i]))
            return err_set(err, ERR_DENIED,
                           "will not listen on %s: connections are neither encrypted nor authenticated; use the "
                           "loopback, %s in a network that you trust", addresses[i],
                           i == 0 ? "give --tls-cert, --tls-key and --tls-ca, or --insecure"
                                  : "or --data-insecure (weights; --listen is another matter)");
        bool any = !a.host[0] || strcmp(a.host, "0.0.0.0") == 0 || strcmp(a.host, "::") == 0;
        if (any && !c->advertise)
            return err_set(err, ERR_INVALID, "%s is every interface: say with --advertise HOST how the other agents "
                           "reach this one", addresses[i]);
    }
    if (daemon_address_is_local(c->listen) != daemon_address_is_local(c->data_listen))
        return err_set(err, ERR_INVALID, "--listen %s and --data-listen %s: the one on the loopback cannot be reached "
                       "from other hosts; give both", c->listen, c->data_listen);
    if (c->shared_gpu && !memory_device(c->memory))
        return err_set(err, ERR_INVALID, "--shared-gpu needs weights on a GPU: give --memory cuda as well");
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

static struct transport *open_host(const char *device, int listen_fd, struct err *err)
{
    (void)device;
    return transport_host_open(listen_fd, err);
}

static struct transport *open_cuda_peer(const char *device, int listen_fd, struct err *err)
{
    (void)listen_fd;
    return transport_cuda_peer_open(device, err);
}

static struct transport *open_nccl(const char *device, int listen_fd, struct err *err)
{
    return transport_nccl_open(&(struct transport_nccl_options){.listen_fd = listen_fd, .gpu = device,
                                                                 .keep_ms = TRANSPORT_NCCL_KEEP_MS}, err);
}

static const struct {
    const char *name;
    bool on_gpu;  /* which memory it moves */
    bool listens; /* the parties of cuda_peer meet by the group id */
    struct transport *(*open)(const char *device, int listen_fd, struct err *err);
} transport_table[] = {
    {"host", false, true, open_host},
    {"auto", true, true, transport_gpu_auto_open},
    {"cuda_peer", true, false, open_cuda_peer},
    {"nccl", true, true, open_nccl},
};

static int open_transport(struct service *s, struct transport **ret_transport, struct err *err)
{
    const char *device = memory_device(s->config.memory);
    const char *name = s->config.transport ? s->config.transport : device ? "auto" : "host";
    char actual[ADDRESS_TEXT_MAX];
    int fd = -1, rc = 0;
    size_t i = 0, n = sizeof transport_table / sizeof transport_table[0];
    while (i < n && strcmp(transport_table[i].name, name) != 0)
        i++;
    if (i == n)
        return err_set(err, ERR_INVALID, "there is no transport '%s': use host, auto, cuda_peer or nccl", name);
    if (transport_table[i].on_gpu != (device != NULL))
        return err_set(err, ERR_INVALID, "transport '%s' does not reach the memory of --memory %s: use --%s", name,
                       s->config.memory, device ? "transport auto, cuda_peer or nccl" : "memory cuda with it");
    if (transport_table[i].listens) {
        rc = adopt_listen(s->adopt, "data", s->config.data_listen, 0600, &fd, actual, err);
        if (rc == 0)
            rc = advertise(&s->config, actual, s->agent.data_address, err);
    }
    if (rc == 0 && !(*ret_transport = transport_table[i].open(device, fd, err)))
        rc = err->code;
    if (rc < 0 && fd >= 0)
        close(fd); /* owned by the transport only once it is open */
    return rc;
}

/* Before anything is made on the GPU. */
static int lock_gpu(struct service *s, struct err *err)
{
    const char *device = memory_device(s->config.memory);
    struct gpu gpu;
    if (!device)
        return 0;
    int rc = gpu_find(device, &gpu, err);
    return rc < 0 ? rc : gpu_share_lock(&gpu, s->config.shared_gpu, &s->gpu_fd, err);
}

static int open_worker(struct service *s, struct err *err)
{
    struct worker_config config = {
        .checkpoint = s->config.checkpoint,
        .slots = s->config.slots,
        .transfer_timeout_ms = s->config.transfer_timeout_ms,
        .stuck_ms = s->config.stuck_ms,
        .on_weights = adopt_on_weights,
        .user = s->adopt,
        .peer = &s->peer,
        .tls = s->config.tls,
    };
    if (config.checkpoint) {
        struct checkpoint *checkpoint;
        int rc = checkpoint_open(config.checkpoint, &checkpoint, err);
        if (rc == ERR_INVALID) /* what is in the files is no mistake in our options */
            return err->code = ERR_UNSUPPORTED;
        if (rc < 0)
            return rc;
        s->agent.can_load = true;
        s->agent.layers = checkpoint_layers(checkpoint);
        s->agent.logical = checkpoint_experts(checkpoint);
        checkpoint_close(checkpoint);
    }
    int rc = lock_gpu(s, err);
    if (rc < 0)
        return rc;
    config.memory = memory_open(s->config.memory, err);
    if (!config.memory)
        return err->code;
    rc = open_transport(s, &config.transport, err);
    if (rc == 0) {
        rc = worker_start(&config, &s->worker, err);
        if (rc < 0)
            config.transport->close(config.transport);
    }
    if (rc < 0)
        config.memory->close(config.memory);
    return rc;
}

static int open_links(struct service *s, const struct rpc_identity *self, struct err *err)
{
    char actual[ADDRESS_TEXT_MAX];
    s->peer = *self;
    s->peer.role = RPC_ROLE_PEER;
    struct peer_links_config peers = {
        .base = s->config.base, .rpc = s->rpc, .log = s->log, .tls = s->config.tls, .listen = s->config.listen, .self = &s->peer,
        .on_wave = on_wave, .on_read = on_read, .user = s,
    };
    int rc = adopt_listen(s->adopt, "peer", s->config.listen, 0600, &peers.listen_fd, actual, err);
    if (rc < 0 || (rc = peer_links_open(&peers, &s->peers, err)) < 0 || (rc = advertise(&s->config, peer_links_address(s->peers), s->agent.address, err)) < 0)
        return rc;
    const struct coordinator_link_config link = {
        .base = s->config.base, .rpc = s->rpc, .log = s->log, .tls = s->config.tls, .address = s->config.coordinator, .self = self,
        .on_up = on_link_up, .on_down = on_link_down, .on_msg = on_msg, .user = s,
    };
    return coordinator_link_new(&link, &s->coordinator, err);
}

static int open_engine_socket(struct service *s, struct err *err)
{
    char address[ADDRESS_TEXT_MAX + sizeof ADDRESS_UNIX + 512], actual[ADDRESS_TEXT_MAX];
    int fd, n = snprintf(address, sizeof address, ADDRESS_UNIX "%s", s->config.engine_socket);
    if (n < 0 || (size_t)n >= sizeof address)
        return err_set(err, ERR_INVALID, "the engine socket's path is too long: %s", s->config.engine_socket);
    int rc = adopt_listen(s->adopt, "engine", address, 0660, &fd, actual, err);
    if (rc < 0)
        return err_wrap(err, "the engine socket");
    const struct engine_socket_fds kept = adopt_page(s->adopt, fd);
    const struct engine_socket_config config = {
        .base = s->config.base, .path = s->config.engine_socket, .agent_id = s->config.id, .worker = s->worker,
        .incarnation = adopt_keeps(s->adopt) ? s->agent.incarnation : 0, .kept = &kept, .on_event = on_engine, .user = s,
    };
    rc = engine_socket_open(&config, &s->engine, err);
    if (rc < 0)
        return rc;
    const struct engine_socket_fds fds = engine_socket_fds(s->engine);
    return adopt_keep_page(s->adopt, &fds, err);
}

static int open_core(struct service *s, struct err *err)
{
    const struct agent_record *record = adopt_record(s->adopt);
    s->core = record ? agent_core_restore(&s->agent, record, clock_now_ns()) : agent_core_new(&s->agent, clock_now_ns());
    s->tick = event_new(s->config.base, -1, 0, on_tick, s);
    s->load_tick = event_new(s->config.base, -1, 0, on_load_tick, s);
    s->worker_event = event_new(s->config.base, worker_fd(s->worker), EV_READ | EV_PERSIST, on_worker, s);
    if (!s->core || !s->tick || !s->load_tick || !s->worker_event || event_add(s->worker_event, NULL) != 0)
        return err_set(err, ERR_NOMEM, "out of memory");
    return 0;
}

static int open_adopt(struct service *s, struct err *err)
{
    const struct adopt_config config = {.keep = s->config.keep, .log = s->log, .id = s->config.id,
                                        .cluster = s->config.cluster, .memory = s->config.memory};
    return adopt_new(&config, &s->adopt, err);
}

/* The one of the last process, if what it held can be re-adopted; else a new one. */
static int open_incarnation(struct service *s, struct rpc_identity *self, struct err *err)
{
    adopt_weights(s->adopt, s->worker);
    const struct agent_record *record = adopt_record(s->adopt);
    int rc = record ? 0 : rand_u64(&s->agent.incarnation, err);
    if (record)
        s->agent.incarnation = record->incarnation;
    self->incarnation = s->agent.incarnation;
    return rc < 0 ? rc : adopt_settle(s->adopt, err);
}

int service_open(const struct service_config *config, struct service **ret_service, struct err *err)
{
    int rc = service_check(config, err);
    if (rc < 0)
        return rc;
    struct service *s = calloc(1, sizeof *s);
    if (!s)
        return err_set(err, ERR_NOMEM, "out of memory");
    s->config = *config;
    s->gpu_fd = -1;
    s->log = config->log;
    s->agent = (struct agent_config){.node = config->node, .slots = config->slots};
    s->agent.lead_steps_min = 2;
    s->agent.step_limit_ns = UINT64_C(5000000000);
    s->agent.hang_ns = UINT64_C(1000000) * config->step_limit_ms;
    memcpy(s->agent.id, config->id, strlen(config->id) + 1);
    struct rpc_identity self = {.role = RPC_ROLE_AGENT};
    snprintf(self.cluster, sizeof self.cluster, "%s", config->cluster);
    snprintf(self.agent, sizeof self.agent, "%s", config->id);
    snprintf(self.software, sizeof self.software, "eep-agent %s", EEP_SOFTWARE);

    s->rpc = rpc_new(config->base);
    rc = s->rpc ? open_adopt(s, err) : err_set(err, ERR_NOMEM, "out of memory");
    if (rc < 0 || (rc = open_worker(s, err)) < 0 || (rc = open_incarnation(s, &self, err)) < 0 ||
        (rc = open_engine_socket(s, err)) < 0 || (rc = open_links(s, &self, err)) < 0 || (rc = open_core(s, err)) < 0) {
        s->leaves = s->adopt && adopt_record(s->adopt); /* the next process may have more luck with it */
        service_close(s);
        return rc;
    }
    daemon_timer_set(s->tick, agent_core_deadline(s->core), clock_now_ns());
    log_event(s->log, LOG_LEVEL_INFO, "incarnation", "incarnation=%016llx address=%s data=%s socket=%s readopted=%s",
              (unsigned long long)s->agent.incarnation, s->agent.address, s->agent.data_address,
              s->config.engine_socket, adopt_record(s->adopt) ? "yes" : "no");
    s->config.metrics->incarnations++;
    *ret_service = s;
    return 0;
}

void service_close(struct service *s)
{
    if (!s)
        return;
    s->exited = true; /* no event reaches the core any more */
    if (!s->leaves)
        adopt_forget(s->adopt);
    coordinator_link_free(s->coordinator);
    peer_links_close(s->peers);
    engine_socket_close(s->engine);
    if (s->worker_event)
        event_free(s->worker_event);
    if (s->tick)
        event_free(s->tick);
    if (s->load_tick)
        event_free(s->load_tick);
    load_window_done(&s->load);
    if (s->worker)
        worker_stop(s->worker);
    if (s->gpu_fd >= 0)
        close(s->gpu_fd);
    for (size_t i = 0; i < DEPTH; i++)
        agent_actions_done(&s->actions[i]);
    agent_core_free(s->core);
    adopt_free(s->adopt);
    rpc_free(s->rpc);
    free(s);
}

bool service_has_engine(const struct service *s)
{
    struct agent_status status;
    agent_core_status(s->core, &status);
    return status.engine;
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
             (unsigned long long)status.applied_epoch,
             status.engine && status.resuming ? "awaited after a re-adoption" : status.engine ? "attached" : "none",
             status.welcomed ? "coordinator connected" : "no coordinator");
}

bool service_stuck(const struct service *s, char *text, size_t size)
{
    return worker_stuck(s->worker, text, size);
}

bool service_is_welcome(const struct service *s)
{
    struct agent_status status = {0};
    if (s)
        agent_core_status(s->core, &status);
    return status.welcomed;
}

void service_metrics_write(const struct service *s, const struct service_metrics *metrics, struct metrics_text *t)
{
    struct agent_status status = {0};
    if (s)
        agent_core_status(s->core, &status);
    service_metrics_write_present(&status, t);
    service_metrics_write_counts(metrics, t);
}
