/* See store.h. */
#include "agent/keeper/store.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "common/rand.h"

#define FIRST_FD 3
#define FDS_MAX 253 /* of one message; SCM_MAX_FD of the kernel */
#define TEXT_MAX 4096

struct held {
    char name[STORE_NAME_MAX];
    int fd;
};

struct store {
    int socket;
    char address[64];
    struct held *v;
    size_t n;
};

/* In the abstract namespace: it leaves nothing behind, however we end. */
int store_new(struct store **ret_store, struct err *err)
{
    uint64_t tag;
    int rc = rand_u64(&tag, err), on = 1;
    if (rc < 0)
        return rc;
    struct store *s = calloc(1, sizeof *s);
    if (s)
        s->v = calloc(STORE_MAX, sizeof *s->v);
    if (!s || !s->v) {
        free(s);
        return err_set(err, ERR_NOMEM, "out of memory");
    }
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    int n = snprintf(s->address, sizeof s->address, "@eep-keeper-%016llx", (unsigned long long)tag);
    memcpy(at.sun_path + 1, s->address + 1, (size_t)n - 1);
    s->socket = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (s->socket < 0 || setsockopt(s->socket, SOL_SOCKET, SO_PASSCRED, &on, sizeof on) < 0 ||
        bind(s->socket, (struct sockaddr *)&at, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + (size_t)n)) < 0) {
        rc = err_set(err, ERR_IO, "cannot make the socket for the child's messages: %s", strerror(errno));
        store_free(s);
        return rc;
    }
    *ret_store = s;
    return 0;
}

void store_free(struct store *s)
{
    if (!s)
        return;
    for (size_t i = 0; i < s->n; i++)
        close(s->v[i].fd);
    if (s->socket >= 0)
        close(s->socket);
    free(s->v);
    free(s);
}

int store_fd(const struct store *s)
{
    return s->socket;
}

const char *store_address(const struct store *s)
{
    return s->address;
}

size_t store_count(const struct store *s)
{
    return s->n;
}

/* ---- messages ---- */

struct message {
    char text[TEXT_MAX];
    int fds[FDS_MAX];
    size_t n_fds;
    bool ours; /* sent by our user, or root */
};

static void message_parts(struct msghdr *msg, struct message *m)
{
    for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
            m->n_fds = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            memcpy(m->fds, CMSG_DATA(c), m->n_fds * sizeof(int));
        } else if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_CREDENTIALS) {
            struct ucred cred;
            memcpy(&cred, CMSG_DATA(c), sizeof cred);
            m->ours = cred.uid == geteuid() || cred.uid == 0;
        }
    }
}

static bool message_receive(struct store *s, struct message *m)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(FDS_MAX * sizeof(int)) + CMSG_SPACE(sizeof(struct ucred))];
    } control;
    struct iovec iov = {.iov_base = m->text, .iov_len = sizeof m->text - 1};
    struct msghdr msg = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    ssize_t got;
    do
        got = recvmsg(s->socket, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    if (got < 0)
        return false;
    m->text[got] = '\0';
    m->n_fds = 0;
    m->ours = false;
    message_parts(&msg, m);
    return true;
}

static void held_remove(struct store *s, const char *name)
{
    for (size_t i = s->n; i-- > 0;)
        if (strcmp(s->v[i].name, name) == 0) {
            close(s->v[i].fd);
            s->v[i] = s->v[--s->n];
        }
}

static void held_add(struct store *s, const char *name, int *fd)
{
    if (s->n == STORE_MAX)
        return; /* closed by the caller: the child is told nothing, like by systemd */
    struct held *h = &s->v[s->n++];
    snprintf(h->name, sizeof h->name, "%s", name);
    h->fd = *fd;
    *fd = -1;
}

static bool about_descriptors(const char *line)
{
    return strncmp(line, "FD", 2) == 0 || strncmp(line, "MAINPID=", 8) == 0 || strncmp(line, "BARRIER=", 8) == 0;
}

static void message_take(struct store *s, struct message *m, void (*pass_on)(void *user, const char *line), void *user)
{
    bool add = false, drop = false;
    const char *name = "stored";
    char *rest = m->text, *line;
    while ((line = strsep(&rest, "\n"))) {
        if (strcmp(line, "FDSTORE=1") == 0)
            add = true;
        else if (strcmp(line, "FDSTOREREMOVE=1") == 0)
            drop = true;
        else if (strncmp(line, "FDNAME=", 7) == 0 && line[7] && strlen(line + 7) < STORE_NAME_MAX && !strchr(line, ':'))
            name = line + 7;
        else if (*line && !about_descriptors(line))
            pass_on(user, line);
    }
    for (size_t i = 0; add && i < m->n_fds; i++)
        held_add(s, name, &m->fds[i]);
    if (drop)
        held_remove(s, name);
}

void store_read(struct store *s, void (*pass_on)(void *user, const char *line), void *user)
{
    static struct message m; /* too large for a stack, and there is one thread */
    while (message_receive(s, &m)) {
        if (m.ours)
            message_take(s, &m, pass_on, user);
        for (size_t i = 0; i < m.n_fds; i++)
            if (m.fds[i] >= 0)
                close(m.fds[i]);
    }
}

/* ---- to the next child ---- */

int store_hand_over(const struct store *s, struct err *err)
{
    char number[32];
    char *names = calloc(s->n + 1, STORE_NAME_MAX + 1), *end = names;
    int *high = calloc(s->n + 1, sizeof *high);
    bool bad = !names || !high;
    /* Out of the way first: they must not overwrite one another. */
    for (size_t i = 0; i < s->n && !bad; i++) {
        high[i] = fcntl(s->v[i].fd, F_DUPFD_CLOEXEC, FIRST_FD + (int)s->n);
        bad = high[i] < 0;
    }
    for (size_t i = 0; i < s->n && !bad; i++) {
        bad = dup2(high[i], FIRST_FD + (int)i) < 0;
        end += sprintf(end, "%s%s", i ? ":" : "", s->v[i].name);
    }
    snprintf(number, sizeof number, "%zu", s->n);
    bad = bad || setenv("LISTEN_FDS", number, 1) < 0 || setenv("LISTEN_FDNAMES", names, 1) < 0;
    snprintf(number, sizeof number, "%ld", (long)getpid());
    bad = bad || setenv("LISTEN_PID", number, 1) < 0;
    snprintf(number, sizeof number, "%d", STORE_MAX);
    bad = bad || setenv("FDSTORE", number, 1) < 0 || setenv("NOTIFY_SOCKET", s->address, 1) < 0;
    free(names);
    free(high);
    return bad ? err_set(err, ERR_IO, "cannot hand %zu descriptors over: %s", s->n, strerror(errno)) : 0;
}
