/* Descriptors that outlive the process: systemd's descriptor store, or eep-keeper in its place.
 *
 * What is pushed is handed to the next process of the service when this one dies (sd_notify(3): FDSTORE=1, FDNAME=;
 * sd_listen_fds(3)).  There is a store where $NOTIFY_SOCKET is set and $FDSTORE is more than 0, which systemd says from
 * version 254 on, eep-keeper always, and the unit file for older ones.  Without a store nothing is kept, and no call fails.
 *
 * Thread safe: the worker pushes regions.  Calls may block for as long as the store does not read (at most 2 s). */
#ifndef EEP_AGENT_KEEP_H
#define EEP_AGENT_KEEP_H

#include <stdbool.h>
#include <stddef.h>

#include "common/err.h"

struct keep;

#define KEEP_NAME_MAX 64

/* Takes what the last process left out of the environment ($LISTEN_FDS), once per process.  NULL: out of memory. */
struct keep *keep_open(void);
void keep_close(struct keep *keep); /* closes what nobody took; the store keeps it.  Takes NULL */
bool keep_active(const struct keep *keep); /* there is a store; takes NULL */

/* The descriptor of the last process under this name, the caller's from now on; -1: none.  It stays in the store. */
int keep_take(struct keep *keep, const char *name);
size_t keep_left(const struct keep *keep); /* how many have not been taken */

/* Puts a descriptor into the store; it stays the caller's.  A name that is there already is replaced. */
int keep_push(struct keep *keep, const char *name, int fd, struct err *err) MUST_CHECK;
/* Takes them out of the store again: that name; those that begin like that; all of them. */
void keep_remove(struct keep *keep, const char *name);
void keep_remove_all(struct keep *keep, const char *prefix); /* "" = everything, also what nobody took */

#endif
