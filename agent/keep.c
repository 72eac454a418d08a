/* The descriptor store, by its own few words over a datagram socket: libsystemd has no static library.  See keep.h. */
#include "agent/keep.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "common/daemon.h"

#define LISTEN_FDS_START 3 /* sd_listen_fds(3) */
#define SEND_TIMEOUT_S 2

struct kept {
    char name[KEEP_NAME_MAX];
    int fd; /* of the last process and not taken; else -1 */
};

struct keep {
    pthread_mutex_t lock;
    int socket; /* -1: no store */
    struct kept *v;
    size_t n, cap;
};

/* ---- the list of what the store has; with the lock held ---- */

static struct kept *kept_find(struct keep *keep, const char *name)
{
    for (size_t i = 0; i < keep->n; i++)
        if (strcmp(keep->v[i].name, name) == 0)
            return &keep->v[i];
    return NULL;
}

static bool kept_add(struct keep *keep, const char *name, int fd)
{
    if (keep->n == keep->cap) {
        size_t cap = keep->cap ? keep->cap * 2 : 64;
        struct kept *v = realloc(keep->v, cap * sizeof *v);
        if (!v)
            return false;
        keep->v = v;
        keep->cap = cap;
    }
    struct kept *k = &keep->v[keep->n++];
    snprintf(k->name, sizeof k->name, "%s", name);
    k->fd = fd;
    return true;
}

static void kept_drop(struct keep *keep, struct kept *k)
{
    if (k->fd >= 0)
        close(k->fd);
    *k = keep->v[--keep->n];
}

/* ---- what came ---- */

static bool number_of(const char *name, long *ret_value)
{
    const char *text = getenv(name);
    char *end;
    if (!text || !*text)
        return false;
    *ret_value = strtol(text, &end, 10);
    return *end == '\0';
}

/* They are ours only if they were meant for this very process. */
static void receive(struct keep *keep)
{
    long n = 0, pid = 0;
    const char *names = getenv("LISTEN_FDNAMES");
    if (number_of("LISTEN_PID", &pid) && pid == (long)getpid() && number_of("LISTEN_FDS", &n))
        for (long i = 0; i < n; i++) {
            int fd = LISTEN_FDS_START + (int)i;
            char name[KEEP_NAME_MAX] = "";
            size_t len = names ? strcspn(names, ":") : 0;
            if (fcntl(fd, F_SETFD, FD_CLOEXEC) < 0)
                continue; /* no such descriptor */
            if (len > 0 && len < sizeof name) {
                memcpy(name, names, len);
                name[len] = '\0';
            }
            if (!*name || kept_find(keep, name) || !kept_add(keep, name, fd))
                close(fd); /* not of ours */
            if (names)
                names = names[len] ? names + len + 1 : NULL;
        }
    unsetenv("LISTEN_PID");
    unsetenv("LISTEN_FDS");
    unsetenv("LISTEN_FDNAMES");
}

static int store_connect(void)
{
    long max = 0;
    struct sockaddr_un to;
    socklen_t len;
    if (!number_of("FDSTORE", &max) || max <= 0 || !daemon_notify_address(&to, &len))
        return -1;
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct timeval limit = {.tv_sec = SEND_TIMEOUT_S};
    if (fd >= 0 && (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit) < 0 ||
                    connect(fd, (struct sockaddr *)&to, len) < 0)) {
        close(fd);
        return -1;
    }
    return fd;
}

struct keep *keep_open(void)
{
    struct keep *keep = calloc(1, sizeof *keep);
    if (!keep)
        return NULL;
    pthread_mutex_init(&keep->lock, NULL);
    receive(keep);
    keep->socket = store_connect();
    return keep;
}

void keep_close(struct keep *keep)
{
    if (!keep)
        return;
    while (keep->n > 0)
        kept_drop(keep, &keep->v[keep->n - 1]);
    if (keep->socket >= 0)
        close(keep->socket);
    pthread_mutex_destroy(&keep->lock);
    free(keep->v);
    free(keep);
}

bool keep_active(const struct keep *keep)
{
    return keep && keep->socket >= 0;
}

int keep_take(struct keep *keep, const char *name)
{
    if (!keep)
        return -1;
    pthread_mutex_lock(&keep->lock);
    struct kept *k = kept_find(keep, name);
    int fd = k ? k->fd : -1;
    if (k)
        k->fd = -1;
    pthread_mutex_unlock(&keep->lock);
    return fd;
}

size_t keep_left(const struct keep *keep)
{
    size_t n = 0;
    for (size_t i = 0; keep && i < keep->n; i++)
        n += keep->v[i].fd >= 0;
    return n;
}

/* ---- what goes ---- */

static int say(struct keep *keep, const char *text, int fd, struct err *err)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec iov = {.iov_base = (char *)(uintptr_t)text, .iov_len = strlen(text)}; /* sending only reads */
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (fd >= 0) {
        memset(&control, 0, sizeof control);
        msg.msg_control = control.bytes;
        msg.msg_controllen = sizeof control.bytes;
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(c), &fd, sizeof fd);
    }
    ssize_t sent;
    do
        sent = sendmsg(keep->socket, &msg, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    if (sent < 0)
        return err_set(err, ERR_IO, "the descriptor store does not take a descriptor: %s", strerror(errno));
    return 0;
}

static void say_remove(struct keep *keep, const char *name)
{
    char text[KEEP_NAME_MAX + 64];
    snprintf(text, sizeof text, "FDSTOREREMOVE=1\nFDNAME=%s", name);
    if (keep->socket >= 0 && say(keep, text, -1, NULL) < 0)
        return; /* nobody to tell: a store that is gone holds nothing */
}

int keep_push(struct keep *keep, const char *name, int fd, struct err *err)
{
    char text[KEEP_NAME_MAX + 64];
    if (!keep_active(keep))
        return 0;
    if (!*name || strlen(name) >= KEEP_NAME_MAX || strchr(name, ':'))
        return err_set(err, ERR_INVALID, "'%s' cannot name a descriptor that is kept", name);
    pthread_mutex_lock(&keep->lock);
    struct kept *k = kept_find(keep, name);
    if (k) {
        say_remove(keep, name);
        kept_drop(keep, k);
    }
    /* FDPOLL=0: the store shall not drop a listener or an eventfd because something happened on it */
    snprintf(text, sizeof text, "FDSTORE=1\nFDPOLL=0\nFDNAME=%s", name);
    int rc = kept_add(keep, name, -1) ? say(keep, text, fd, err) : err_set(err, ERR_NOMEM, "out of memory");
    pthread_mutex_unlock(&keep->lock);
    return rc;
}

void keep_remove(struct keep *keep, const char *name)
{
    if (!keep)
        return;
    pthread_mutex_lock(&keep->lock);
    struct kept *k = kept_find(keep, name);
    if (k) {
        say_remove(keep, name);
        kept_drop(keep, k);
    }
    pthread_mutex_unlock(&keep->lock);
}

void keep_remove_all(struct keep *keep, const char *prefix)
{
    if (!keep)
        return;
    pthread_mutex_lock(&keep->lock);
    for (size_t i = keep->n; i-- > 0;)
        if (strncmp(keep->v[i].name, prefix, strlen(prefix)) == 0) {
            say_remove(keep, keep->v[i].name);
            kept_drop(keep, &keep->v[i]);
        }
    pthread_mutex_unlock(&keep->lock);
}
