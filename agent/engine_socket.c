/* The listener of the engine socket, the control page, the bell, and the coming and going of the engine.
 * Loop thread.  What is said on the connection is in engine_socket_up.c and engine_socket_down.c. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "agent/engine_socket_internal.h"
#include "common/address.h"
#include "common/daemon.h"

#define ATTACH_LIMIT_S 5
#define QUEUE_BYTES_MAX ((size_t)256 << 20)
#define ACCEPT_PAUSE_MS 100

void engine_socket_raise(struct engine_socket *s, struct agent_event event)
{
    s->on_event(s->user, &event);
}

/* ---- the engine's connection ---- */

void engine_conn_fail(struct engine_socket *s, const char *why, ...)
{
    struct engine_conn *c = s->conn;
    if (!c || c->failed)
        return;
    va_list args;
    va_start(args, why);
    vsnprintf(c->why, sizeof c->why, why, args);
    va_end(args);
    c->failed = true;
    event_del(c->readable);
    event_del(c->writable);
    event_active(s->later, EV_TIMEOUT, 0);
}

static void conn_free(struct engine_conn *c)
{
    if (c->readable)
        event_free(c->readable);
    if (c->writable)
        event_free(c->writable);
    if (c->impatient)
        event_free(c->impatient);
    engine_reader_done(&c->reader);
    engine_writer_done(&c->writer);
    if (c->pidfd >= 0)
        close(c->pidfd);
    close(c->fd);
    free(c);
}

void engine_socket_discard(struct engine_socket *s)
{
    if (s->allocated && !s->sealing) {
        worker_seal_discard(s->worker);
        s->allocated = false;
    }
}

bool engine_socket_predecessor_lives(struct engine_socket *s, pid_t successor)
{
    struct pollfd p = {.fd = s->predecessor, .events = POLLIN};
    if (s->predecessor < 0)
        return false;
    if (successor != s->predecessor_pid && poll(&p, 1, 0) == 0)
        return true;
    close(s->predecessor);
    s->predecessor = -1;
    return false;
}

static void predecessor_note(struct engine_socket *s, struct engine_conn *c)
{
    if (!c->attached || c->goodbye || c->pidfd < 0 || !worker_gpu(s->worker))
        return;
    if (s->predecessor >= 0)
        close(s->predecessor);
    s->predecessor = c->pidfd;
    s->predecessor_pid = c->pid;
    c->pidfd = -1;
}

static void on_later(evutil_socket_t fd, short what, void *user)
{
    (void)fd;
    (void)what;
    struct engine_socket *s = user;
    struct engine_conn *c = s->conn;
    if (!c || !c->failed)
        return;
    s->conn = NULL;
    bool attached = c->attached;
    char why[sizeof c->why];
    memcpy(why, c->why, sizeof why);
    predecessor_note(s, c);
    conn_free(c);
    if (!attached)
        return;
    engine_socket_discard(s);
    page_store(s->page, PAGE_ENGINE_STATE, PAGE_ENGINE_NONE);
    engine_socket_raise(s, (struct agent_event){.type = AE_ENGINE_DETACHED, .text = why});
}

static void conn_flush(struct engine_socket *s)
{
    struct engine_conn *c = s->conn;
    struct err err;
    int rc = engine_writer_flush(&c->writer, c->fd, &err);
    if (rc < 0)
        engine_conn_fail(s, "%s", err.text);
    else if (rc == 0)
        event_add(c->writable, NULL);
}

void engine_conn_send(struct engine_socket *s, Eep__Engine__EngineDown *down, const int *fds, unsigned n_fds)
{
    struct engine_conn *c = s->conn;
    struct err err;
    if (!c || c->failed)
        return;
    if (engine_writer_push(&c->writer, ENGINE_FRAME_DOWN, &down->base, fds, n_fds, &err))
        engine_conn_fail(s, "cannot send: %s", err.text);
    else if (c->writer.bytes > QUEUE_BYTES_MAX)
        engine_conn_fail(s, "the engine does not read: %zu bytes wait for it", c->writer.bytes);
    else
        conn_flush(s);
}

void engine_conn_refuse(struct engine_socket *s, const char *why)
{
    Eep__Engine__Refused body = EEP__ENGINE__REFUSED__INIT;
    body.why = (char *)(uintptr_t)why; /* protobuf-c does not say const; packing only reads */
    Eep__Engine__EngineDown down = EEP__ENGINE__ENGINE_DOWN__INIT;
    down.body_case = EEP__ENGINE__ENGINE_DOWN__BODY_REFUSED;
    down.refused = &body;
    engine_conn_send(s, &down, NULL, 0);
    engine_conn_fail(s, "refused: %s", why);
}

static void on_writable(evutil_socket_t fd, short what, void *user)
{
    (void)fd;
    (void)what;
    struct engine_socket *s = user;
    if (s->conn && !s->conn->failed)
        conn_flush(s);
}

/* Reads what there is.  Frames that came before the end of the connection count. */
static void conn_read(struct engine_socket *s)
{
    struct engine_conn *c = s->conn;
    struct err fill_err, err;
    int filled = engine_reader_fill(&c->reader, c->fd, &fill_err);
    while (!c->failed) {
        struct engine_frame frame = {.n_fds = 0};
        int rc = engine_reader_next(&c->reader, ENGINE_FRAME_UP, &frame, &err);
        if (rc < 0)
            engine_conn_fail(s, "protocol error: %s", err.text);
        if (rc <= 0)
            break;
        engine_socket_up(s, &frame);
        engine_frame_done(&frame);
    }
    if (filled < 0)
        engine_conn_fail(s, "%s", filled == ERR_UNREACHABLE ? "connection closed: the engine process ended" : fill_err.text);
}

static void on_readable(evutil_socket_t fd, short what, void *user)
{
    (void)fd;
    (void)what;
    struct engine_socket *s = user;
    if (s->conn && !s->conn->failed)
        conn_read(s);
}

static void on_impatient(evutil_socket_t fd, short what, void *user)
{
    (void)fd;
    (void)what;
    struct engine_socket *s = user;
    if (s->conn && !s->conn->attached)
        engine_conn_fail(s, "it did not attach within %d s", ATTACH_LIMIT_S);
}

static void on_bell(evutil_socket_t fd, short what, void *user)
{
    (void)what;
    struct engine_socket *s = user;
    uint64_t count;
    if (read(fd, &count, sizeof count) < 0)
        return;
    if (s->conn && s->conn->attached)
        engine_socket_raise(s, (struct agent_event){.type = AE_BELL});
}

/* ---- accepting ---- */

static void refuse_second(struct engine_socket *s, int fd)
{
    char why[224];
    snprintf(why, sizeof why, "another engine (%s) is attached to agent %s; one at a time", s->conn->peer, s->agent_id);
    Eep__Engine__Refused body = EEP__ENGINE__REFUSED__INIT;
    body.why = why;
    Eep__Engine__EngineDown down = EEP__ENGINE__ENGINE_DOWN__INIT;
    down.body_case = EEP__ENGINE__ENGINE_DOWN__BODY_REFUSED;
    down.refused = &body;
    struct engine_writer writer = {.bytes = 0};
    int rc = engine_writer_push(&writer, ENGINE_FRAME_DOWN, &down.base, NULL, 0, NULL);
    if (!rc)
        rc = engine_writer_flush(&writer, fd, NULL); /* it fits an empty socket buffer */
    (void)rc;
    engine_writer_done(&writer);
    close(fd);
}

static struct engine_conn *conn_new(struct engine_socket *s, int fd)
{
    struct engine_conn *c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    c->fd = fd;
    c->pidfd = -1;
    c->readable = event_new(s->base, fd, EV_READ | EV_PERSIST, on_readable, s);
    c->writable = event_new(s->base, fd, EV_WRITE, on_writable, s);
    c->impatient = event_new(s->base, -1, EV_TIMEOUT, on_impatient, s);
    struct timeval limit = {.tv_sec = ATTACH_LIMIT_S};
    if (!c->readable || !c->writable || !c->impatient || event_add(c->readable, NULL) < 0 ||
        event_add(c->impatient, &limit) < 0) {
        c->fd = -1;
        conn_free(c);
        return NULL;
    }
    struct ucred cred;
    socklen_t len = sizeof cred;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len) == 0) {
        snprintf(c->peer, sizeof c->peer, "pid %ld uid %lu", (long)cred.pid, (unsigned long)cred.uid);
        c->pid = cred.pid;
        c->pidfd = cred.pid > 0 ? (int)syscall(SYS_pidfd_open, cred.pid, 0) : -1; /* glibc 2.36 has it as a function */
    }
    return c;
}

/* An engine that restarts quickly connects before we have read its predecessor's end. */
static void conn_check_end(struct engine_socket *s)
{
    struct pollfd p = {.fd = s->conn->fd, .events = POLLRDHUP};
    if (!s->conn->failed && poll(&p, 1, 0) > 0 && (p.revents & (POLLRDHUP | POLLHUP | POLLERR)))
        while (!s->conn->failed)
            conn_read(s);
    if (s->conn->failed)
        on_later(-1, 0, s);
}

static void on_acceptable(evutil_socket_t listen_fd, short what, void *user)
{
    (void)what;
    struct engine_socket *s = user;
    int fd = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
        if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
            /* The connection still waits: without a pause the loop would spin. */
            event_del(s->acceptable);
            daemon_timer_in(s->accept_again, ACCEPT_PAUSE_MS);
        }
        return;
    }
    if (s->conn)
        conn_check_end(s);
    if (s->conn) {
        refuse_second(s, fd);
        return;
    }
    s->conn = conn_new(s, fd);
    if (!s->conn)
        close(fd);
}

static void on_accept_again(evutil_socket_t fd, short what, void *user)
{
    (void)fd;
    (void)what;
    struct engine_socket *s = user;
    event_add(s->acceptable, NULL);
}

static void eventfd_drain(int fd)
{
    uint64_t count;
    ssize_t got = read(fd, &count, sizeof count);
    (void)got;
}

void engine_socket_attached(struct engine_socket *s)
{
    eventfd_drain(s->wake_fd); /* they were meant for its predecessor */
    eventfd_drain(s->bell_fd);
    Eep__Engine__Attached body = EEP__ENGINE__ATTACHED__INIT;
    body.agent = s->agent_id;
    body.page_bytes = s->page->size;
    body.gpu = (char *)(uintptr_t)worker_gpu(s->worker); /* protobuf-c does not say const; packing only reads */
    Eep__Engine__EngineDown down = EEP__ENGINE__ENGINE_DOWN__INIT;
    down.body_case = EEP__ENGINE__ENGINE_DOWN__BODY_ATTACHED;
    down.attached = &body;
    int fds[4] = {s->page_fd, s->wake_fd, s->bell_fd, s->load_fd};
    event_del(s->conn->impatient);
    engine_conn_send(s, &down, fds, 4);
}

/* ---- open and close ---- */

/* Shared memory that the engine cannot shrink under us. */
static int memfd_make(const char *name, size_t bytes, int seals, int *ret_fd, struct err *err)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || ftruncate(fd, (off_t)bytes) < 0 || fcntl(fd, F_ADD_SEALS, seals) < 0) {
        int saved = errno;
        if (fd >= 0)
            close(fd);
        return err_set(err, ERR_NOMEM, "cannot make shared memory \"%s\": %s", name, strerror(saved));
    }
    *ret_fd = fd;
    return 0;
}

static int page_make(struct engine_socket *s, struct err *err)
{
    size_t unit = (size_t)sysconf(_SC_PAGESIZE);
    size_t bytes = (sizeof(struct control_page) + unit - 1) / unit * unit;
    int rc = memfd_make("eep-page", bytes, F_SEAL_SHRINK | F_SEAL_GROW, &s->page_fd, err);
    if (rc)
        return rc;
    void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, s->page_fd, 0);
    if (base == MAP_FAILED)
        return err_set(err, ERR_NOMEM, "cannot map the control page: %s", strerror(errno));
    s->page = base;
    page_init(s->page);
    s->page->size = bytes;
    s->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    s->bell_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (s->wake_fd < 0 || s->bell_fd < 0)
        return err_set(err, ERR_NOMEM, "cannot make an eventfd: %s", strerror(errno));
    return memfd_make("eep-load", 0, F_SEAL_SHRINK, &s->load_fd, err);
}

int engine_socket_load_size(struct engine_socket *s, uint32_t layers, uint32_t slots, struct err *err)
{
    if (s->load && s->load_layers == layers && s->load_slots == slots)
        return 0;
    size_t bytes = (size_t)layers * slots * sizeof(uint64_t);
    struct stat st;
    if (fstat(s->load_fd, &st) < 0 || ((uint64_t)st.st_size < bytes && ftruncate(s->load_fd, (off_t)bytes) < 0))
        return err_set(err, ERR_NOMEM, "cannot make room for load counters: %s", strerror(errno));
    void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, s->load_fd, 0);
    if (base == MAP_FAILED)
        return err_set(err, ERR_NOMEM, "cannot map the load counters: %s", strerror(errno));
    if (s->load)
        munmap(s->load, (size_t)s->load_layers * s->load_slots * sizeof(uint64_t));
    memset(base, 0, bytes); /* those of another shape mean nothing */
    s->load = base;
    s->load_layers = layers;
    s->load_slots = slots;
    return 0;
}

const uint64_t *engine_socket_load(struct engine_socket *s, uint32_t *ret_layers, uint32_t *ret_slots)
{
    *ret_layers = s->load_layers;
    *ret_slots = s->load_slots;
    return s->load;
}

static int listen_make(struct engine_socket *s, const char *path, struct err *err)
{
    char actual[ADDRESS_TEXT_MAX];
    if (asprintf(&s->address, ADDRESS_UNIX "%s", path) < 0) {
        s->address = NULL;
        return err_set(err, ERR_NOMEM, "out of memory");
    }
    int rc = address_listen(s->address, 0660, &s->listen_fd, actual, err);
    return rc < 0 ? err_wrap(err, "the engine socket") : 0;
}

static int events_make(struct engine_socket *s, struct err *err)
{
    s->acceptable = event_new(s->base, s->listen_fd, EV_READ | EV_PERSIST, on_acceptable, s);
    s->accept_again = event_new(s->base, -1, 0, on_accept_again, s);
    s->rung = event_new(s->base, s->bell_fd, EV_READ | EV_PERSIST, on_bell, s);
    s->later = event_new(s->base, -1, 0, on_later, s);
    if (!s->acceptable || !s->accept_again || !s->rung || !s->later || event_add(s->acceptable, NULL) < 0 ||
        event_add(s->rung, NULL) < 0)
        return err_set(err, ERR_NOMEM, "cannot make the engine socket's events");
    return 0;
}

int engine_socket_open(const struct engine_socket_config *config, struct engine_socket **ret_socket, struct err *err)
{
    struct engine_socket *s = calloc(1, sizeof *s);
    if (!s)
        return err_set(err, ERR_NOMEM, "out of memory");
    s->base = config->base;
    s->worker = config->worker;
    s->on_event = config->on_event;
    s->user = config->user;
    s->listen_fd = s->page_fd = s->wake_fd = s->bell_fd = s->load_fd = s->predecessor = -1;
    snprintf(s->agent_id, sizeof s->agent_id, "%s", config->agent_id);
    int rc = page_make(s, err);
    if (!rc)
        rc = listen_make(s, config->path, err);
    if (!rc)
        rc = events_make(s, err);
    if (rc) {
        engine_socket_close(s);
        return rc;
    }
    *ret_socket = s;
    return 0;
}

static void fd_close(int fd)
{
    if (fd >= 0)
        close(fd);
}

void engine_socket_close(struct engine_socket *s)
{
    if (!s)
        return;
    if (s->conn)
        conn_free(s->conn);
    if (s->acceptable)
        event_free(s->acceptable);
    if (s->accept_again)
        event_free(s->accept_again);
    if (s->rung)
        event_free(s->rung);
    if (s->later)
        event_free(s->later);
    if (s->listen_fd >= 0)
        address_unlink(s->address, s->listen_fd); /* not the file of an agent that has taken our place */
    fd_close(s->listen_fd);
    expert_map_unref(s->load_map);
    if (s->load)
        munmap(s->load, (size_t)s->load_layers * s->load_slots * sizeof(uint64_t));
    if (s->page)
        munmap(s->page, s->page->size);
    fd_close(s->page_fd);
    fd_close(s->wake_fd);
    fd_close(s->bell_fd);
    fd_close(s->load_fd);
    fd_close(s->predecessor);
    free(s->address);
    free(s);
}

struct control_page *engine_socket_page(struct engine_socket *s)
{
    return s->page;
}
