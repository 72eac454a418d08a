/* Edges that the daemons share.  Loop thread. */
#include "common/daemon.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "common/address.h"
#include "common/clock.h"

#define ALIVE_MS         2000
#define LISTEN_FDS_START 3

void daemon_signals_hold(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    sigaddset(&set, SIGUSR1);
    sigprocmask(SIG_BLOCK, &set, NULL);
}

bool daemon_notify_address(struct sockaddr_un *ret_address, socklen_t *ret_len)
{
    const char *path = getenv("NOTIFY_SOCKET");
    if (!path || (path[0] != '/' && path[0] != '@') || strlen(path) >= sizeof ret_address->sun_path)
        return false;
    size_t len = strlen(path);
    memset(ret_address, 0, sizeof *ret_address);
    ret_address->sun_family = AF_UNIX;
    memcpy(ret_address->sun_path, path, len);
    if (path[0] == '@')
        ret_address->sun_path[0] = '\0'; /* abstract */
    *ret_len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len);
    return true;
}

void daemon_notify(const char *state)
{
    struct sockaddr_un to;
    socklen_t len;
    if (!daemon_notify_address(&to, &len))
        return;
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return;
    ssize_t sent = sendto(fd, state, strlen(state), MSG_NOSIGNAL, (struct sockaddr *)&to, len);
    (void)sent; /* nobody to tell */
    close(fd);
}

void daemon_notify_reloading(void)
{
    char text[96];
    snprintf(text, sizeof text, "RELOADING=1\nMONOTONIC_USEC=%llu", (unsigned long long)(clock_now_ns() / 1000));
    daemon_notify(text);
}

void daemon_notify_alive(struct log *log, bool *stuck, const char *why, const char *status)
{
    char text[512];
    if (why && !*stuck)
        log_event(log, LOG_LEVEL_ERROR, "stuck", "why=%s what=%s", why,
                  "the watchdog is not fed any more, so that systemd starts this process again");
    else if (!why && *stuck)
        log_event(log, LOG_LEVEL_WARN, "unstuck", "what=%s", "it goes on, the watchdog is fed again");
    *stuck = why != NULL;
    snprintf(text, sizeof text, "%sSTATUS=%s", why ? "" : "WATCHDOG=1\n", why ? why : status);
    daemon_notify(text);
}

unsigned daemon_alive_ms(void)
{
    const char *usec = getenv("WATCHDOG_USEC"), *pid = getenv("WATCHDOG_PID");
    unsigned long long limit_ms = usec ? strtoull(usec, NULL, 10) / 1000 : 0;
    bool ours = limit_ms && (!pid || strtoll(pid, NULL, 10) == (long long)getpid());
    return !ours || limit_ms > 3 * ALIVE_MS ? ALIVE_MS : limit_ms < 30 ? 10 : (unsigned)(limit_ms / 3);
}

static void socket_address(int fd, char *ret_address, size_t size)
{
    union {
        struct sockaddr_storage any;
        struct sockaddr_un un;
        struct sockaddr_in in;
        struct sockaddr_in6 in6;
    } a = {0};
    socklen_t len = sizeof a;
    char host[INET6_ADDRSTRLEN];
    *ret_address = '\0';
    if (getsockname(fd, (struct sockaddr *)&a, &len) < 0)
        return;
    if (a.any.ss_family == AF_UNIX && a.un.sun_path[0] == '/')
        snprintf(ret_address, size, ADDRESS_UNIX "%.*s", (int)sizeof a.un.sun_path, a.un.sun_path);
    else if (a.any.ss_family == AF_INET && inet_ntop(AF_INET, &a.in.sin_addr, host, sizeof host))
        snprintf(ret_address, size, "%s:%u", host, ntohs(a.in.sin_port));
    else if (a.any.ss_family == AF_INET6 && inet_ntop(AF_INET6, &a.in6.sin6_addr, host, sizeof host))
        snprintf(ret_address, size, "[%s]:%u", host, ntohs(a.in6.sin6_port));
}

size_t daemon_listen_fds(struct daemon_socket *ret_sockets, size_t max)
{
    const char *pid = getenv("LISTEN_PID"), *count = getenv("LISTEN_FDS");
    size_t n = 0, have = count ? strtoul(count, NULL, 10) : 0;
    if (pid && strtoll(pid, NULL, 10) == (long long)getpid())
        for (; n < have && n < max; n++) {
            ret_sockets[n].fd = LISTEN_FDS_START + (int)n;
            fcntl(ret_sockets[n].fd, F_SETFD, FD_CLOEXEC);
            fcntl(ret_sockets[n].fd, F_SETFL, fcntl(ret_sockets[n].fd, F_GETFL) | O_NONBLOCK); /* systemd's blocks */
            socket_address(ret_sockets[n].fd, ret_sockets[n].address, sizeof ret_sockets[n].address);
        }
    unsetenv("LISTEN_PID");
    unsetenv("LISTEN_FDS");
    unsetenv("LISTEN_FDNAMES");
    return n;
}

bool daemon_address_is_local(const char *text)
{
    struct address a;
    if (address_parse(text, &a, NULL) < 0)
        return false;
    if (a.is_unix)
        return true;
    struct in_addr v4;
    struct in6_addr v6;
    if (inet_pton(AF_INET, a.host, &v4) == 1)
        return ntohl(v4.s_addr) >> 24 == 127;
    if (inet_pton(AF_INET6, a.host, &v6) == 1)
        return IN6_IS_ADDR_LOOPBACK(&v6);
    return strcmp(a.host, "localhost") == 0;
}

int daemon_write_addresses(const char *path, const char *const *addresses, size_t n, struct err *err)
{
    char temporary[4096];
    if (snprintf(temporary, sizeof temporary, "%s.%ld", path, (long)getpid()) >= (int)sizeof temporary)
        return err_set(err, ERR_INVALID, "the path of the port file is too long: %s", path);
    FILE *f = fopen(temporary, "we");
    if (!f)
        return err_set(err, ERR_IO, "could not write the port file %s: %s", temporary, strerror(errno));
    for (size_t i = 0; i < n; i++)
        fprintf(f, "%s\n", addresses[i]);
    bool bad = ferror(f) != 0;
    if (fclose(f) != 0 || bad || rename(temporary, path) != 0) {
        int why = errno;
        unlink(temporary);
        return err_set(err, ERR_IO, "could not write the port file %s: %s", path, strerror(why));
    }
    return 0;
}

void daemon_timer_in(struct event *timer, unsigned ms)
{
    struct timeval t = {.tv_sec = ms / 1000, .tv_usec = (suseconds_t)(ms % 1000) * 1000};
    event_add(timer, &t);
}

void daemon_retry_in(struct event *timer, unsigned *wait_ms, unsigned last_ms)
{
    daemon_timer_in(timer, *wait_ms);
    *wait_ms = *wait_ms < last_ms / 2 ? *wait_ms * 2 : last_ms;
}

void daemon_timer_set(struct event *timer, uint64_t deadline_ns, uint64_t now_ns)
{
    if (deadline_ns == UINT64_MAX) {
        event_del(timer);
        return;
    }
    uint64_t left_us = deadline_ns > now_ns ? (deadline_ns - now_ns + 999) / 1000 : 0;
    struct timeval t = {.tv_sec = (time_t)(left_us / 1000000), .tv_usec = (suseconds_t)(left_us % 1000000)};
    event_add(timer, &t);
}
