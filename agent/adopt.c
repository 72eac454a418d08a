/* Re-adoption, the edge's part.  See adopt.h.
 *
 *   names in the store: record; page, wake, bell, load; region-0 ...; engine, peer, data (listeners) */
#include "agent/adopt.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "agent/manifest.h"
#include "agent/record_memory.h"
#include "agent/weights.h"
#include "agent/worker.h"
#include "common/address.h"
#include "common/clock.h"

#define REGION_PREFIX "region-"

struct adopt {
    struct adopt_config config;
    struct record_memory *memory; /* NULL: nothing is kept */
    struct agent_record record;   /* while it may be, or is, re-adopted */
    bool found, settled;
    struct engine_socket_fds page; /* taken out of the store, not handed on yet */
};

static void fd_close(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void page_close(struct adopt *a)
{
    fd_close(&a->page.page);
    fd_close(&a->page.wake);
    fd_close(&a->page.bell);
    fd_close(&a->page.load);
}

static void say_not(struct adopt *a, enum log_level level, const char *why)
{
    log_event(a->config.log, level, "not-re-adopted", "why=%s", why);
}

/* Listeners stay: they are as good for a new incarnation. */
static void give_up(struct adopt *a)
{
    static const char *const names[] = {"record", "page", "wake", "bell", "load"};
    record_memory_close(a->memory);
    a->memory = NULL;
    agent_record_done(&a->record);
    a->found = false;
    page_close(a);
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        keep_remove(a->config.keep, names[i]);
    keep_remove_all(a->config.keep, REGION_PREFIX);
}

static int record_open(struct adopt *a, int fd, struct err *err)
{
    int rc = record_memory_adopt(fd, a->config.cluster, a->config.memory, &a->memory, err);
    if (rc == 0)
        rc = record_memory_read(a->memory, &a->record, err);
    if (rc == 0 && strcmp(a->record.id, a->config.id) != 0)
        rc = err_set(err, ERR_CONFLICT, "the state record is of agent %s, this is %s", a->record.id, a->config.id);
    return rc;
}

static void page_take(struct adopt *a)
{
    struct keep *keep = a->config.keep;
    a->page = (struct engine_socket_fds){.listen = -1,
                                         .page = keep_take(keep, "page"),
                                         .wake = keep_take(keep, "wake"),
                                         .bell = keep_take(keep, "bell"),
                                         .load = keep_take(keep, "load")};
}

int adopt_new(const struct adopt_config *config, struct adopt **ret_adopt, struct err *err)
{
    struct adopt *a = calloc(1, sizeof *a);
    if (!a)
        return err_set(err, ERR_NOMEM, "out of memory");
    a->config = *config;
    page_take(a);
    int fd = keep_take(config->keep, "record");
    struct err why = {0};
    int rc = fd >= 0 ? record_open(a, fd, &why) : ERR_NOTFOUND;
    if (rc == 0 && a->record.held)
        rc = engine_socket_kept_check(&a->page, &why);
    a->found = rc == 0 && a->record.held;
    if (fd < 0 && keep_left(config->keep) > 0)
        say_not(a, LOG_LEVEL_WARN, "the state record was not kept");
    else if (fd >= 0 && !a->found)
        say_not(a, rc == 0 || rc == ERR_NOTFOUND ? LOG_LEVEL_INFO : LOG_LEVEL_ERROR,
                rc == 0 || rc == ERR_NOTFOUND ? "the last process was no rank of a view" : why.text);
    if (!a->found)
        give_up(a);
    *ret_adopt = a;
    return 0;
}

void adopt_free(struct adopt *a)
{
    if (!a)
        return;
    page_close(a);
    record_memory_close(a->memory);
    agent_record_done(&a->record);
    free(a);
}

void adopt_forget(struct adopt *a)
{
    if (a)
        keep_remove_all(a->config.keep, "");
}

const struct agent_record *adopt_record(const struct adopt *a)
{
    return a->found ? &a->record : NULL;
}

static size_t regions_of(const struct model *model, struct err *err)
{
    struct manifest manifest;
    if (!model->manifest || manifest_decode(model->manifest, &manifest, err) < 0)
        return 0;
    size_t n = manifest.n_regions;
    manifest_done(&manifest);
    return n;
}

void adopt_weights(struct adopt *a, struct worker *worker)
{
    struct err err = {.text = "its model has no manifest"};
    struct agent_record *r = &a->record;
    uint64_t bytes = 0, began_ns = clock_now_ns();
    if (!a->found)
        return;
    size_t n = regions_of(r->model, &err);
    int *fds = n ? calloc(n, sizeof *fds) : NULL;
    for (size_t i = 0; fds && i < n; i++) {
        char name[KEEP_NAME_MAX];
        snprintf(name, sizeof name, REGION_PREFIX "%zu", i);
        fds[i] = keep_take(a->config.keep, name);
    }
    int rc = fds ? worker_adopt(worker, r->model, fds, n, r->map, r->map_rank, &bytes, &err) : ERR_CORRUPT;
    free(fds);
    if (rc < 0) {
        say_not(a, LOG_LEVEL_ERROR, err.text);
        give_up(a);
        return;
    }
    log_event(a->config.log, LOG_LEVEL_INFO, "weights-re-adopted", "regions=%zu bytes=%llu us=%llu", n,
              (unsigned long long)bytes, (unsigned long long)((clock_now_ns() - began_ns) / 1000));
}

int adopt_settle(struct adopt *a, struct err *err)
{
    int rc = 0;
    if (!a->memory && keep_active(a->config.keep)) {
        rc = record_memory_new(a->config.cluster, a->config.memory, &a->memory, err);
        if (rc == 0)
            rc = keep_push(a->config.keep, "record", record_memory_fd(a->memory), err);
    }
    a->settled = true;
    return rc;
}

int adopt_listen(struct adopt *a, const char *name, const char *address, unsigned unix_mode, int *ret_fd,
                 char *ret_actual, struct err *err)
{
    int fd = keep_take(a->config.keep, name);
    if (fd >= 0 && address_adopt(address, fd, ret_actual, NULL) == 0) {
        *ret_fd = fd;
        return 0;
    }
    if (fd >= 0) { /* of another address: nobody shall wait there */
        shutdown(fd, SHUT_RDWR);
        close(fd);
        keep_remove(a->config.keep, name);
    }
    int rc = address_listen(address, unix_mode, &fd, ret_actual, err);
    if (rc == 0 && (rc = keep_push(a->config.keep, name, fd, err)) < 0) {
        address_unlink(address, fd);
        close(fd);
    }
    if (rc == 0)
        *ret_fd = fd;
    return rc;
}

struct engine_socket_fds adopt_page(struct adopt *a, int listen_fd)
{
    struct engine_socket_fds fds = a->page;
    a->page = (struct engine_socket_fds){.listen = -1, .page = -1, .wake = -1, .bell = -1, .load = -1};
    fds.listen = listen_fd;
    return fds;
}

int adopt_keep_page(struct adopt *a, const struct engine_socket_fds *fds, struct err *err)
{
    struct keep *keep = a->config.keep;
    int rc;
    if (a->found)
        return 0; /* it is there */
    if ((rc = keep_push(keep, "page", fds->page, err)) < 0 || (rc = keep_push(keep, "wake", fds->wake, err)) < 0 ||
        (rc = keep_push(keep, "bell", fds->bell, err)) < 0)
        return rc;
    return keep_push(keep, "load", fds->load, err);
}

bool adopt_keeps(const struct adopt *a)
{
    return a->memory != NULL;
}

void adopt_save(struct adopt *a, const struct agent_core *core)
{
    struct agent_record record;
    struct err err;
    if (!a->memory)
        return;
    agent_core_save(core, &record);
    if (record_memory_write(a->memory, &record, &err) < 0) {
        log_event(a->config.log, LOG_LEVEL_ERROR, "not-kept", "why=%s", err.text);
        give_up(a); /* the next process starts as a new incarnation */
    }
}

void adopt_on_weights(void *user, const struct weights *weights)
{
    struct adopt *a = user;
    struct err err;
    if (!keep_active(a->config.keep) || !a->settled)
        return; /* not while they are being re-adopted: they are in the store */
    keep_remove_all(a->config.keep, REGION_PREFIX);
    for (uint32_t i = 0; weights && i < weights->manifest.n_regions; i++) {
        char name[KEEP_NAME_MAX];
        snprintf(name, sizeof name, REGION_PREFIX "%u", i);
        if (keep_push(a->config.keep, name, weights->regions[i].fd, &err) == 0)
            continue;
        log_event(a->config.log, LOG_LEVEL_ERROR, "not-kept", "what=%s why=%s", name, err.text);
        keep_remove_all(a->config.keep, REGION_PREFIX);
        return;
    }
}
