/* What every daemon of ours does at its edges: tell systemd how it stands, keep to the loopback unless told otherwise,
 * publish the ports that were picked, arm a timer for a deadline. */
#ifndef EEP_COMMON_DAEMON_H
#define EEP_COMMON_DAEMON_H

#include <event2/event.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

#include "common/err.h"
#include "common/log.h"

/* Where $NOTIFY_SOCKET leads; false: nowhere. */
struct sockaddr_un;
bool daemon_notify_address(struct sockaddr_un *ret_address, socklen_t *ret_len);

/* "READY=1", "STATUS=...", "STOPPING=1" to $NOTIFY_SOCKET (sd_notify(3)); nothing when systemd did not start us. */
void daemon_notify(const char *state);

/* A reload has begun; READY=1 ends it. */
void daemon_notify_reloading(void);
/* The loop turns: the watchdog is fed, and told in a sentence how things stand.  why: a thread is stuck, so that the
 * watchdog is told only and will end us; the first time, and when it is over, this is logged.  NULL: all is well. */
void daemon_notify_alive(struct log *log, bool *stuck, const char *why, const char *status);
/* How often to say so: every 2 s, or three times within the watchdog's limit. */
unsigned daemon_alive_ms(void);

/* From here on SIGTERM, SIGINT and SIGHUP wait for ever: a second one must not cut the closing short. */
void daemon_signals_hold(void);

/* Listening sockets that systemd has made for us (sd_listen_fds(3)): their addresses, and which descriptors they are.
 * The environment is cleared of them, so that the next call and children find none.  Returns how many, at most max. */
struct daemon_socket {
    int fd;
    char address[128]; /* "unix:/path", "127.0.0.1:7420"; "" = of no kind that we use */
};
size_t daemon_listen_fds(struct daemon_socket *ret_sockets, size_t max);

/* A unix socket, or a host that names the loopback only.  An address that cannot be parsed is not local. */
bool daemon_address_is_local(const char *address);

/* A certificate that ends within 30 days is told (warn; error within 3 days), an expired one too.  NULL tls: nothing.
 */
struct tls;
void daemon_log_certificate(struct log *log, const struct tls *tls);
/* The end of a reload, which says how it went.  rc, restart, err: of options_reload; with rc < 0, or when the certificate
 * files (NULL tls: not asked for) cannot be taken over, nothing changes. */
struct tls_files;
void daemon_reloaded(struct log *log, struct tls *tls, const struct tls_files *files, enum log_level level, int rc,
                     const char *restart, struct err *err);

/* Writes one address a line, in place of the file at once (write, then rename). */
int daemon_write_addresses(const char *path, const char *const *addresses, size_t n, struct err *err) MUST_CHECK;

/* Arms the timer for ms from now. */
void daemon_timer_in(struct event *timer, unsigned ms);
/* The same for *wait_ms, which is doubled for the next time, up to last_ms: attempts that grow rarer. */
void daemon_retry_in(struct event *timer, unsigned *wait_ms, unsigned last_ms);
/* Arms the timer for a monotonic deadline (UINT64_MAX: disarms it); one that has passed fires in the next loop turn. */
void daemon_timer_set(struct event *timer, uint64_t deadline_ns, uint64_t now_ns);

#endif
