/* Addresses of daemons: "host:port", "[v6]:port", ":port" (any interface; listeners only), "unix:/path".
 * Listening and blocking connects.  Any thread; listening may block in name resolution. */
#ifndef EEP_COMMON_ADDRESS_H
#define EEP_COMMON_ADDRESS_H

#include <stdbool.h>
#include <stddef.h>

#include "common/err.h"

#define ADDRESS_TEXT_MAX 128 /* = ADDRESS_MAX of common/topology.h */
#define ADDRESS_UNIX "unix:"

struct address {
    bool is_unix;
    char host[ADDRESS_TEXT_MAX]; /* without brackets, "" for any; or the path of a unix socket */
    char port[8];
};

int address_parse(const char *text, struct address *ret_address, struct err *err) MUST_CHECK;

/* A listening socket, non-blocking and close-on-exec.  *ret_actual: the same address with the real port (for port 0).
 *
 * unix: a socket file that is left over from a dead process (nobody answers) is replaced; one that answers is
 * ERR_CONFLICT "in use"; a path that is no socket is left alone.  unix_mode: permissions of the file, 0 = by umask. */
int address_listen(const char *text, unsigned unix_mode, int *ret_fd, char ret_actual[ADDRESS_TEXT_MAX],
                   struct err *err) MUST_CHECK;

/* Is fd a listening socket for this address (as address_listen made it, maybe in another process)?  ERR_CONFLICT if not. */
int address_adopt(const char *text, int fd, char ret_actual[ADDRESS_TEXT_MAX], struct err *err) MUST_CHECK;

/* Ends a unix listener: fd accepts nothing more, and its file is removed unless another process has replaced it.
 * Nothing for other addresses.  fd is still to be closed. */
void address_unlink(const char *text, int fd);

/* Connects, blocking at most timeout_ms (name resolution apart).  The socket is non-blocking and close-on-exec. */
int address_connect(const char *text, int timeout_ms, int *ret_fd, struct err *err) MUST_CHECK;

/* Options that every connected socket of ours has: no delay, keep-alive.  No effect on unix sockets. */
void address_tune(int fd);
/* For a connection on which the other end may rightly be silent for long: one whose host has vanished is noticed within
 * ADDRESS_PROBE_S, instead of hours.  No effect on unix sockets. */
#define ADDRESS_PROBE_S 11
void address_probe(int fd);

#endif
