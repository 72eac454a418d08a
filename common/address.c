/* Addresses: parsing, listening, blocking connects.  Any thread. */
#include "common/address.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/topology.h"

_Static_assert(ADDRESS_TEXT_MAX == ADDRESS_MAX, "addresses are as long as in messages");

#define BACKLOG 256

int address_parse(const char *text, struct address *ret_address, struct err *err)
{
    struct address a = {0};
    size_t len = strlen(text);
    if (len == 0 || len >= ADDRESS_TEXT_MAX)
        return err_set(err, ERR_INVALID, "address '%.200s': 1 to %d characters are allowed", text,
                       ADDRESS_TEXT_MAX - 1);
    if (strncmp(text, ADDRESS_UNIX, strlen(ADDRESS_UNIX)) == 0) {
        const char *path = text + strlen(ADDRESS_UNIX);
        if (path[0] == '\0' || strlen(path) >= sizeof((struct sockaddr_un *)0)->sun_path)
            return err_set(err, ERR_INVALID, "address '%s': the path of a unix socket has 1 to %zu characters", text,
                           sizeof((struct sockaddr_un *)0)->sun_path - 1);
        a.is_unix = true;
        strcpy(a.host, path);
        *ret_address = a;
        return 0;
    }

    const char *colon = strrchr(text, ':');
    if (!colon)
        return err_set(err, ERR_INVALID, "address '%s': host:port or unix:/path is expected", text);
    const char *host = text;
    size_t host_len = (size_t)(colon - text);
    if (text[0] == '[') {
        if (host_len < 2 || text[host_len - 1] != ']')
            return err_set(err, ERR_INVALID, "address '%s': [host]:port is expected", text);
        host++;
        host_len -= 2;
    } else if (memchr(text, ':', host_len)) {
        return err_set(err, ERR_INVALID, "address '%s': write an IPv6 address as [host]:port", text);
    }
    char *end;
    errno = 0;
    unsigned long port = strtoul(colon + 1, &end, 10);
    if (colon[1] < '0' || colon[1] > '9' || *end != '\0' || errno != 0 || port > 65535)
        return err_set(err, ERR_INVALID, "address '%s': '%s' is no port number", text, colon + 1);
    memcpy(a.host, host, host_len);
    snprintf(a.port, sizeof a.port, "%hu", (unsigned short)port);
    *ret_address = a;
    return 0;
}

void address_tune(int fd)
{
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
}

void address_probe(int fd)
{
    int idle = 5, interval = 2, count = 3; /* idle + count * interval = ADDRESS_PROBE_S */
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof count);
}

/* ---- unix sockets ---- */

static void unix_sockaddr(const struct address *a, struct sockaddr_un *ret_sun)
{
    memset(ret_sun, 0, sizeof *ret_sun);
    ret_sun->sun_family = AF_UNIX;
    strcpy(ret_sun->sun_path, a->host);
}

/* Two daemons that start at once must not each take the other's fresh socket for a stale one: check, unlink, bind
 * and listen happen under a lock of the folder, which leaves no file behind. */
static int unix_folder_lock(const char *path, struct err *err)
{
    char copy[ADDRESS_TEXT_MAX];
    strcpy(copy, path);
    const char *folder = dirname(copy);
    int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return err_set(err, ERR_IO, "cannot open the folder of %s: %s; make it, or choose another path", path,
                       strerror(errno));
    if (flock(fd, LOCK_EX) < 0) {
        int saved = errno;
        close(fd);
        return err_set(err, ERR_IO, "cannot lock the folder %s: %s", folder, strerror(saved));
    }
    return fd;
}

/* 0: the path is free now. */
static int unix_clear(const struct address *a, const struct sockaddr_un *sun, struct err *err)
{
    struct stat st;
    if (lstat(a->host, &st) < 0) {
        if (errno == ENOENT)
            return 0;
        return err_set(err, ERR_IO, "cannot look at %s: %s", a->host, strerror(errno));
    }
    if (!S_ISSOCK(st.st_mode))
        return err_set(err, ERR_CONFLICT, "%s exists and is no socket: choose another path", a->host);
    int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (probe < 0)
        return err_set(err, ERR_NOMEM, "cannot make a socket: %s", strerror(errno));
    int rc = connect(probe, (const struct sockaddr *)sun, sizeof *sun);
    int saved = errno;
    close(probe);
    /* EAGAIN: a full backlog, so somebody listens. */
    if (rc == 0 || saved == EAGAIN || saved == EINPROGRESS)
        return err_set(err, ERR_CONFLICT, "%s is in use by a running process", a->host);
    if (saved != ECONNREFUSED && saved != ENOENT)
        return err_set(err, ERR_IO, "cannot tell whether %s is in use: %s", a->host, strerror(saved));
    if (unlink(a->host) < 0 && errno != ENOENT)
        return err_set(err, ERR_IO, "cannot remove the stale socket %s: %s", a->host, strerror(errno));
    return 0;
}

static int unix_listen(const struct address *a, unsigned mode, int *ret_fd, struct err *err)
{
    struct sockaddr_un sun;
    unix_sockaddr(a, &sun);
    int lock = unix_folder_lock(a->host, err);
    if (lock < 0)
        return lock;
    int fd = -1;
    int rc = unix_clear(a, &sun, err);
    if (rc < 0)
        goto unlock;
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) {
        rc = err_set(err, ERR_NOMEM, "cannot make a socket: %s", strerror(errno));
        goto unlock;
    }
    if (bind(fd, (struct sockaddr *)&sun, sizeof sun) < 0) {
        rc = err_set(err, ERR_IO, "cannot make the socket %s: %s", a->host, strerror(errno));
        goto close_fd;
    }
    if ((mode != 0 && chmod(a->host, mode) < 0) || listen(fd, BACKLOG) < 0) {
        rc = err_set(err, ERR_IO, "cannot listen on %s: %s", a->host, strerror(errno));
        unlink(a->host);
        goto close_fd;
    }
    *ret_fd = fd;
    close(lock);
    return 0;
close_fd:
    close(fd);
unlock:
    close(lock);
    return rc;
}

void address_unlink(const char *text, int fd)
{
    struct address a;
    if (address_parse(text, &a, NULL) < 0 || !a.is_unix)
        return;
    /* Once this listener is shut, a connect is refused exactly when the file is still ours. */
    shutdown(fd, SHUT_RDWR);
    struct sockaddr_un sun;
    unix_sockaddr(&a, &sun);
    int lock = unix_folder_lock(a.host, NULL);
    if (lock < 0)
        return;
    int rc = unix_clear(&a, &sun, NULL); /* fails when it is somebody else's by now: left alone */
    (void)rc;
    close(lock);
}

/* ---- tcp ---- */

static int tcp_resolve(const char *text, const struct address *a, int flags, struct addrinfo **ret_list,
                       struct err *err)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = flags | AI_NUMERICSERV};
    int rc = getaddrinfo(a->host[0] ? a->host : NULL, a->port, &hints, ret_list);
    if (rc != 0)
        return err_set(err, rc == EAI_MEMORY ? ERR_NOMEM : ERR_NOTFOUND, "address '%s': %s", text, gai_strerror(rc));
    return 0;
}

static int tcp_listen(const char *text, const struct address *a, int *ret_fd, struct err *err)
{
    struct addrinfo *list;
    int rc = tcp_resolve(text, a, AI_PASSIVE, &list, err);
    if (rc < 0)
        return rc;
    int fd = -1;
    for (struct addrinfo *ai = list; ai; ai = ai->ai_next) {
        fd = socket(ai->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, ai->ai_protocol);
        int on = 1;
        if (fd >= 0 && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) == 0 &&
            bind(fd, ai->ai_addr, ai->ai_addrlen) == 0 && listen(fd, BACKLOG) == 0)
            break;
        rc = err_set(err, errno == EADDRINUSE ? ERR_CONFLICT : ERR_IO, "cannot listen on %s: %s", text,
                     errno == EADDRINUSE ? "it is in use; port 0 picks a free one" : strerror(errno));
        if (fd >= 0)
            close(fd);
        fd = -1;
    }
    freeaddrinfo(list);
    if (fd < 0)
        return rc < 0 ? rc : err_set(err, ERR_NOTFOUND, "address '%s' stands for no address", text);
    *ret_fd = fd;
    return 0;
}

static void tcp_actual(int fd, const struct address *a, char ret_actual[ADDRESS_TEXT_MAX])
{
    struct sockaddr_storage ss;
    socklen_t len = sizeof ss;
    unsigned port = 0;
    if (getsockname(fd, (struct sockaddr *)&ss, &len) == 0) {
        if (ss.ss_family == AF_INET)
            port = ntohs(((struct sockaddr_in *)&ss)->sin_port);
        else if (ss.ss_family == AF_INET6)
            port = ntohs(((struct sockaddr_in6 *)&ss)->sin6_port);
    }
    bool v6 = strchr(a->host, ':') != NULL;
    snprintf(ret_actual, ADDRESS_TEXT_MAX, "%s%.110s%s:%u", v6 ? "[" : "", a->host, v6 ? "]" : "", port);
}

/* Bound to where the address says; any port will do for port 0. */
static bool tcp_is(const struct address *a, const struct sockaddr_storage *ss)
{
    struct addrinfo *list;
    bool same = false;
    if (tcp_resolve("kept", a, AI_PASSIVE, &list, NULL) < 0)
        return false;
    for (struct addrinfo *ai = list; ai && !same; ai = ai->ai_next) {
        if (ai->ai_family != ss->ss_family)
            continue;
        const struct sockaddr_in *w4 = (const void *)ai->ai_addr, *h4 = (const void *)ss;
        const struct sockaddr_in6 *w6 = (const void *)ai->ai_addr, *h6 = (const void *)ss;
        if (ai->ai_family == AF_INET)
            same = w4->sin_addr.s_addr == h4->sin_addr.s_addr && (!w4->sin_port || w4->sin_port == h4->sin_port);
        else if (ai->ai_family == AF_INET6)
            same = memcmp(&w6->sin6_addr, &h6->sin6_addr, sizeof w6->sin6_addr) == 0 &&
                   (!w6->sin6_port || w6->sin6_port == h6->sin6_port);
    }
    freeaddrinfo(list);
    return same;
}

int address_adopt(const char *text, int fd, char ret_actual[ADDRESS_TEXT_MAX], struct err *err)
{
    struct address a;
    struct sockaddr_storage ss = {0};
    socklen_t len = sizeof ss;
    int listening = 0;
    socklen_t size = sizeof listening;
    int rc = address_parse(text, &a, err);
    if (rc < 0)
        return rc;
    bool same = getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) == 0 && listening &&
                getsockname(fd, (struct sockaddr *)&ss, &len) == 0;
    if (same && a.is_unix)
        same = ss.ss_family == AF_UNIX && strcmp(((struct sockaddr_un *)&ss)->sun_path, a.host) == 0;
    else if (same)
        same = tcp_is(&a, &ss);
    if (!same)
        return err_set(err, ERR_CONFLICT, "a socket that was kept does not listen on %s", text);
    if (a.is_unix)
        snprintf(ret_actual, ADDRESS_TEXT_MAX, "%s", text);
    else
        tcp_actual(fd, &a, ret_actual);
    return 0;
}

int address_listen(const char *text, unsigned unix_mode, int *ret_fd, char ret_actual[ADDRESS_TEXT_MAX],
                   struct err *err)
{
    struct address a;
    int rc = address_parse(text, &a, err);
    if (rc < 0)
        return rc;
    int fd = -1;
    rc = a.is_unix ? unix_listen(&a, unix_mode, &fd, err) : tcp_listen(text, &a, &fd, err);
    if (rc < 0)
        return rc;
    if (a.is_unix)
        snprintf(ret_actual, ADDRESS_TEXT_MAX, "%s", text);
    else
        tcp_actual(fd, &a, ret_actual);
    *ret_fd = fd;
    return 0;
}

/* ---- blocking connect ---- */

/* One address; the descriptor, or a negative errno. */
static int connect_one(int family, const struct sockaddr *sa, socklen_t len, uint64_t until_ms)
{
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    int error = connect(fd, sa, len) == 0 ? 0 : errno;
    while (error == EINPROGRESS) {
        struct pollfd p = {.fd = fd, .events = POLLOUT};
        int n = poll(&p, 1, clock_left_ms(until_ms));
        if (n < 0 && errno == EINTR)
            continue;
        if (n == 0) {
            error = ETIMEDOUT;
            break;
        }
        socklen_t size = sizeof error;
        if (n < 0 || getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0)
            error = errno;
        break;
    }
    if (error != 0) {
        close(fd);
        return -error;
    }
    return fd;
}

int address_connect(const char *text, int timeout_ms, int *ret_fd, struct err *err)
{
    struct address a;
    int rc = address_parse(text, &a, err);
    if (rc < 0)
        return rc;
    uint64_t until_ms = clock_now_ms() + (uint64_t)(timeout_ms > 0 ? timeout_ms : 0);
    int fd = -EADDRNOTAVAIL;
    if (a.is_unix) {
        struct sockaddr_un sun;
        unix_sockaddr(&a, &sun);
        fd = connect_one(AF_UNIX, (struct sockaddr *)&sun, sizeof sun, until_ms);
    } else {
        struct addrinfo *list;
        rc = tcp_resolve(text, &a, 0, &list, err);
        if (rc < 0)
            return rc;
        for (struct addrinfo *ai = list; ai && fd < 0; ai = ai->ai_next)
            fd = connect_one(ai->ai_family, ai->ai_addr, ai->ai_addrlen, until_ms);
        freeaddrinfo(list);
    }
    if (fd < 0)
        return err_set(err, fd == -ETIMEDOUT ? ERR_TIMEOUT : ERR_UNREACHABLE, "cannot connect to %s: %s", text,
                       strerror(-fd));
    address_tune(fd);
    *ret_fd = fd;
    return 0;
}
