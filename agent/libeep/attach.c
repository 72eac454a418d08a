/* Attaching to the agent and letting go of it, errors, and the short answers to events.
 * Attach and detach run on the engine's thread that calls them; libeep's thread lives in between. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "agent/libeep/internal.h"
#include "common/clock.h"
#include "common/rpc.h"

#define ATTACH_TIMEOUT_MS 5000
#define DEFAULT_MAX_RANKS 64u

static _Thread_local char last_error[ERR_TEXT_MAX];

int eep_fail(int code, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    vsnprintf(last_error, sizeof last_error, fmt, args);
    va_end(args);
    return code;
}

int eep_fail_err(const struct err *err)
{
    return eep_fail(err->code, "%s", err->text);
}

int eep_fail_dead(struct eep *eep)
{
    pthread_mutex_lock(&eep->lock);
    eep_fail(ERR_UNREACHABLE, "not attached any more: %s", eep->dead_why);
    pthread_mutex_unlock(&eep->lock);
    return ERR_UNREACHABLE;
}

const char *eep_strerror(int code)
{
    return err_code_name(code);
}

const char *eep_last_error(void)
{
    return last_error;
}

/* ---- sending ---- */

int link_send_locked(struct eep *eep, Eep__Engine__EngineUp *up, struct err *err)
{
    int rc = engine_writer_push(&eep->writer, ENGINE_FRAME_UP, &up->base, NULL, 0, err);
    if (!rc) {
        rc = engine_writer_flush(&eep->writer, eep->sock, err);
        if (rc == 0)
            rc = err_set(err, ERR_TIMEOUT, "the agent does not read its engine socket");
        if (rc < 0)
            shutdown(eep->sock, SHUT_RDWR); /* half a message may be out: libeep's thread sees the end */
    }
    return rc < 0 ? rc : 0;
}

/* While the agent is away nothing needs it: answers are to an operation that is aborted, and what still counts when it
 * is back is said again then. */
int link_send(struct eep *eep, Eep__Engine__EngineUp *up, struct err *err)
{
    if (atomic_load(&eep->dead))
        return err_set(err, ERR_UNREACHABLE, "the agent is gone");
    pthread_mutex_lock(&eep->send_lock);
    int rc = atomic_load(&eep->orphan) ? 0 : link_send_locked(eep, up, err);
    pthread_mutex_unlock(&eep->send_lock);
    /* Its process may have died just now; libeep's thread finds out. */
    return rc == ERR_UNREACHABLE && eep->incarnation && !atomic_load(&eep->leaving) ? 0 : rc;
}

int eep_prepared(struct eep *eep, uint64_t op, uint64_t attempt, int code, const char *why)
{
    Eep__Engine__Prepared body = EEP__ENGINE__PREPARED__INIT;
    body.op = op;
    body.attempt = attempt;
    body.has_code = true;
    body.code = code;
    body.why = (char *)(uintptr_t)why; /* protobuf-c does not say const; packing only reads */
    Eep__Engine__EngineUp up = EEP__ENGINE__ENGINE_UP__INIT;
    up.body_case = EEP__ENGINE__ENGINE_UP__BODY_PREPARED;
    up.prepared = &body;
    struct err err;
    return link_send(eep, &up, &err) ? eep_fail_err(&err) : 0;
}

int eep_drained(struct eep *eep)
{
    Eep__Engine__Drained body = EEP__ENGINE__DRAINED__INIT;
    Eep__Engine__EngineUp up = EEP__ENGINE__ENGINE_UP__INIT;
    up.body_case = EEP__ENGINE__ENGINE_UP__BODY_DRAINED;
    up.drained = &body;
    struct err err;
    return link_send(eep, &up, &err) ? eep_fail_err(&err) : 0;
}

int eep_set_endpoint(struct eep *eep, const char *endpoint)
{
    char *copy = endpoint ? strdup(endpoint) : NULL;
    if (!copy)
        return eep_fail(ERR_INVALID, "no endpoint");
    pthread_mutex_lock(&eep->lock);
    free(eep->endpoint);
    eep->endpoint = copy; /* an agent that comes back is told, too */
    pthread_mutex_unlock(&eep->lock);
    Eep__Engine__Endpoint body = EEP__ENGINE__ENDPOINT__INIT;
    body.endpoint = (char *)(uintptr_t)endpoint;
    Eep__Engine__EngineUp up = EEP__ENGINE__ENGINE_UP__INIT;
    up.body_case = EEP__ENGINE__ENGINE_UP__BODY_ENDPOINT;
    up.endpoint = &body;
    struct err err;
    return link_send(eep, &up, &err) ? eep_fail_err(&err) : 0;
}

void eep_wake(struct eep *eep)
{
    int saved = errno;
    atomic_store(&eep->user_wake, true);
    wake_stepping(eep);
    errno = saved;
}

int eep_revoke_fd(struct eep *eep)
{
    return eep->revoke_fd;
}

bool eep_revoked(struct eep *eep)
{
    uint64_t view = atomic_load(&eep->page->cur_view);
    return atomic_load(&eep->dead) || (view != 0 && view <= atomic_load(&eep->page->revoked));
}

void eep_stats_get(struct eep *eep, struct eep_stats *ret_stats)
{
    *ret_stats = (struct eep_stats){.steps = atomic_load(&eep->steps),
                                    .flips = atomic_load(&eep->flips),
                                    .holds = atomic_load(&eep->holds),
                                    .longest_hold_ns = atomic_load(&eep->longest_hold_ns),
                                    .boundary_syscalls = atomic_load(&eep->boundary_syscalls)};
    for (unsigned i = 0; i < PAGE_HISTOGRAM; i++)
        ret_stats->hold_histogram[i] = atomic_load(&eep->hold_histogram[i]);
}

/* ---- handshake ---- */

int link_open(const char *path, int *ret_sock, struct err *err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        return err_set(err, ERR_INVALID, "the engine socket's path is longer than %zu bytes: %s",
                       sizeof address.sun_path - 1, path);
    memcpy(address.sun_path, path, strlen(path));
    int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (sock < 0)
        return err_set(err, ERR_IO, "cannot make a socket: %s", strerror(errno));
    struct timeval limit = {.tv_sec = ATTACH_TIMEOUT_MS / 1000};
    setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    if (connect(sock, (struct sockaddr *)&address, sizeof address) < 0) {
        int saved = errno;
        close(sock);
        return err_set(err, ERR_UNREACHABLE, "cannot connect to the agent at %s: %s; is eep-agent running?", path,
                       strerror(saved));
    }
    fcntl(sock, F_SETFL, 0); /* sending waits, for at most the limit */
    *ret_sock = sock;
    return 0;
}

void attach_fill(const struct eep *eep, Eep__Engine__Attach *ret_body)
{
    eep__engine__attach__init(ret_body);
    ret_body->protocol = ENGINE_PROTOCOL;
    ret_body->endpoint = eep->endpoint;
    ret_body->dispatch = eep->dispatch;
    ret_body->kv_bytes = eep->kv_bytes;
    ret_body->seals = eep->seals;
    ret_body->has_masks = ret_body->masks = eep->masks;
    if (eep->seals) {
        ret_body->has_layers = ret_body->has_logical = true;
        ret_body->layers = eep->moe_layers;
        ret_body->logical = eep->logical_experts;
    }
}

static int attach_send(struct eep *eep, struct err *err)
{
    Eep__Engine__Attach body;
    attach_fill(eep, &body); /* there is no other thread yet */
    Eep__Engine__EngineUp up = EEP__ENGINE__ENGINE_UP__INIT;
    up.body_case = EEP__ENGINE__ENGINE_UP__BODY_ATTACH;
    up.attach = &body;
    return link_send(eep, &up, err);
}

static int frame_wait(struct eep *eep, struct engine_frame *ret_frame, struct err *err)
{
    uint64_t deadline_ms = clock_now_ms() + ATTACH_TIMEOUT_MS;
    for (;;) {
        int rc = engine_reader_next(&eep->reader, ENGINE_FRAME_DOWN, ret_frame, err);
        if (rc != 0)
            return rc < 0 ? rc : 0;
        int left = clock_left_ms(deadline_ms);
        struct pollfd p = {.fd = eep->sock, .events = POLLIN};
        int n = left > 0 ? poll(&p, 1, left) : 0;
        if (n == 0)
            return err_set(err, ERR_TIMEOUT, "the agent did not answer within %d ms", ATTACH_TIMEOUT_MS);
        if (n < 0 && errno != EINTR)
            return err_set(err, ERR_IO, "cannot wait for the agent: %s", strerror(errno));
        rc = n > 0 ? engine_reader_fill(&eep->reader, eep->sock, err) : 0;
        if (rc < 0)
            return rc;
    }
}

static int page_map(struct eep *eep, uint64_t bytes, int fd, struct err *err)
{
    struct stat st;
    if (bytes < sizeof(struct control_page) || fstat(fd, &st) < 0 || (uint64_t)st.st_size < bytes)
        return err_set(err, ERR_PROTOCOL, "the agent's control page is too small: libeep and agent do not match");
    void *page = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (page == MAP_FAILED)
        return err_set(err, ERR_IO, "cannot map the control page: %s", strerror(errno));
    eep->page = page;
    eep->page_bytes = bytes;
    if (eep->page->magic != PAGE_MAGIC)
        return err_set(err, ERR_PROTOCOL, "the agent's control page has another layout than libeep's");
    return 0;
}

static int attached_take(struct eep *eep, const Eep__Engine__EngineDown *down, struct engine_frame *frame, struct err *err)
{
    if (down && down->body_case == EEP__ENGINE__ENGINE_DOWN__BODY_REFUSED)
        return err_set(err, ERR_CONFLICT, "the agent refused: %s", down->refused->why);
    if (!down || down->body_case != EEP__ENGINE__ENGINE_DOWN__BODY_ATTACHED || frame->n_fds != 4)
        return err_set(err, ERR_PROTOCOL, "the agent's first message is not an answer to attach");
    snprintf(eep->agent, sizeof eep->agent, "%s", down->attached->agent);
    eep->incarnation = down->attached->has_incarnation ? down->attached->incarnation : 0;
    eep->wake_fd = engine_frame_take(frame, 1);
    eep->bell_fd = engine_frame_take(frame, 2);
    eep->load_fd = engine_frame_take(frame, 3);
    int rc = page_map(eep, down->attached->page_bytes, frame->fds[0], err);
    if (!rc && down->attached->gpu)
        rc = device_open(down->attached->gpu, eep->page, eep->page_bytes, &eep->device, err);
    return rc;
}

static int handshake(struct eep *eep, struct err *err)
{
    struct engine_frame frame = {.n_fds = 0};
    int sent = attach_send(eep, err);
    if (sent && sent != ERR_UNREACHABLE)
        return sent;
    int rc = frame_wait(eep, &frame, err); /* also when the send failed: why we are refused may lie there */
    if (rc)
        return rc;
    Eep__Engine__EngineDown *down =
        (Eep__Engine__EngineDown *)engine_frame_unpack(&eep__engine__engine_down__descriptor, &frame);
    rc = attached_take(eep, down, &frame, err);
    rpc_unpack_free(down ? &down->base : NULL);
    engine_frame_done(&frame);
    return rc;
}

/* ---- life ---- */

static int options_check(const struct eep_options *o, const char **ret_path)
{
    const char *path = o->socket ? o->socket : getenv("EEP_SOCKET");
    if (!path || !*path)
        return eep_fail(ERR_INVALID, "no engine socket: set options.socket or EEP_SOCKET");
    if (o->dispatch != EEP_DISPATCH_SOURCE_ROUTED && o->dispatch != EEP_DISPATCH_REPLICATED)
        return eep_fail(ERR_INVALID, "options.dispatch must say how the engine reads the expert map");
    if (!o->on_event)
        return eep_fail(ERR_INVALID, "options.on_event is needed: a view change asks the engine to prepare");
    if (o->seals && (o->moe_layers == 0 || o->logical_experts == 0))
        return eep_fail(ERR_INVALID, "an engine that seals its layout must say moe_layers and logical_experts");
    if (o->max_ranks > RANKS_MAX)
        return eep_fail(ERR_INVALID, "options.max_ranks is %u; at most %d", o->max_ranks, RANKS_MAX);
    *ret_path = path;
    return 0;
}

/* The thread must not take signals that the engine handles. */
static int thread_start(struct eep *eep, struct err *err)
{
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int rc = pthread_create(&eep->thread, NULL, receive_main, eep);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return rc ? err_set(err, ERR_NOMEM, "cannot start libeep's thread: %s", strerror(rc)) : 0;
}

static void fd_close(int fd)
{
    if (fd >= 0)
        close(fd);
}

/* Everything but the thread. */
static void eep_dispose(struct eep *eep)
{
    while (eep->commits) {
        struct commit *c = eep->commits;
        eep->commits = c->next;
        view_release(c->view);
        free(c);
    }
    update_free(update_take(eep, UINT64_MAX));
    view_release(eep->step.view);
    view_release(eep->step.previous);
    regions_free(eep->regions);
    regions_free(eep->building);
    maps_free_all(eep);
    if (eep->incoming.manifest)
        blob_unref(eep->incoming.manifest);
    if (eep->sealing)
        blob_unref(eep->sealing);
    for (uint32_t i = 0; i < eep->incoming.got; i++)
        close(eep->incoming.fds[i]);
    free(eep->incoming.fds);
    engine_reader_done(&eep->reader);
    engine_writer_done(&eep->writer);
    fd_close(eep->answer_fd);
    fd_close(eep->sock);
    fd_close(eep->wake_fd);
    fd_close(eep->bell_fd);
    fd_close(eep->load_fd);
    fd_close(eep->revoke_fd);
    fd_close(eep->stop_fd);
    device_close(eep->device); /* it has the page pinned */
    if (eep->page)
        munmap(eep->page, eep->page_bytes);
    pthread_mutex_destroy(&eep->lock);
    pthread_mutex_destroy(&eep->send_lock);
    pthread_cond_destroy(&eep->cond);
    free(eep->seals);
    free(eep->path);
    free(eep->endpoint);
    free(eep);
}

static struct eep *eep_new(const struct eep_options *options, const char *path)
{
    struct eep *eep = calloc(1, sizeof *eep);
    if (!eep)
        return NULL;
    eep->sock = eep->wake_fd = eep->bell_fd = eep->load_fd = eep->answer_fd = -1;
    eep->max_ranks = options->max_ranks ? options->max_ranks : DEFAULT_MAX_RANKS;
    eep->moe_layers = options->moe_layers;
    eep->logical_experts = options->logical_experts;
    eep->dispatch = (uint32_t)options->dispatch;
    eep->kv_bytes = options->kv_bytes;
    eep->masks = options->masks;
    eep->on_event = options->on_event;
    eep->user = options->user;
    eep->step.state = PAGE_ENGINE_IDLE;
    pthread_mutex_init(&eep->lock, NULL);
    pthread_mutex_init(&eep->send_lock, NULL);
    pthread_cond_init(&eep->cond, NULL);
    eep->revoke_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    eep->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    eep->seals = options->seals ? strdup(options->seals) : NULL;
    eep->path = strdup(path);
    eep->endpoint = options->endpoint ? strdup(options->endpoint) : NULL;
    if (eep->revoke_fd < 0 || eep->stop_fd < 0 || (options->seals && !eep->seals) || !eep->path ||
        (options->endpoint && !eep->endpoint)) {
        eep_dispose(eep);
        return NULL;
    }
    return eep;
}

int eep_attach(const struct eep_options *options, struct eep **ret_eep)
{
    const char *path = NULL;
    int rc = options_check(options, &path);
    if (rc)
        return rc;
    struct eep *eep = eep_new(options, path);
    if (!eep)
        return eep_fail(ERR_NOMEM, "no memory or descriptors to attach");
    struct err err;
    rc = link_open(path, &eep->sock, &err);
    if (!rc)
        rc = handshake(eep, &err);
    if (rc) {
        eep_dispose(eep);
        return eep_fail_err(&err);
    }
    gate_attach(eep->page, &eep->step.gate);
    struct eep *before = *ret_eep;
    *ret_eep = eep; /* before the first event, whose callback may want it */
    rc = thread_start(eep, &err);
    if (rc) {
        *ret_eep = before;
        eep_dispose(eep);
        return eep_fail_err(&err);
    }
    return 0;
}

void eep_detach(struct eep *eep)
{
    if (!eep)
        return;
    atomic_store(&eep->leaving, true);
    /* Steps that have not ended by then may never end, and device_close leaves what they use.  Nobody waits for them: the
     * agent takes an engine that is gone for one that reads nothing any more. */
    bool ended = !eep->device || device_drain(eep->device, DRAIN_MS);
    (void)ended;
    Eep__Engine__Goodbye body = EEP__ENGINE__GOODBYE__INIT;
    Eep__Engine__EngineUp up = EEP__ENGINE__ENGINE_UP__INIT;
    up.body_case = EEP__ENGINE__ENGINE_UP__BODY_GOODBYE;
    up.goodbye = &body;
    struct err err;
    int rc = link_send(eep, &up, &err); /* fails when the agent has gone first */
    (void)rc;
    uint64_t one = 1;
    ssize_t wrote = write(eep->stop_fd, &one, sizeof one); /* cannot fail: the counter is 0 */
    (void)wrote;
    pthread_join(eep->thread, NULL);
    eep_dispose(eep);
}
