/* The descriptors that eep-keeper holds for its child, and the socket on which the child hands them over: the part of
 * sd_notify(3) that agents use.  Only processes of our own user are heard.  Single thread. */
#ifndef EEP_AGENT_KEEPER_STORE_H
#define EEP_AGENT_KEEPER_STORE_H

#include <stdbool.h>
#include <stddef.h>

#include "common/err.h"

#define STORE_MAX 8192
#define STORE_NAME_MAX 64

struct store;

int store_new(struct store **ret_store, struct err *err) MUST_CHECK;
void store_free(struct store *store); /* takes NULL */
int store_fd(const struct store *store);              /* readable when the child has said something */
const char *store_address(const struct store *store); /* for $NOTIFY_SOCKET */
size_t store_count(const struct store *store);
/* Takes everything that was said.  What is not about descriptors (READY=1, STATUS=...) goes to `pass_on`, a line each. */
void store_read(struct store *store, void (*pass_on)(void *user, const char *line), void *user);
/* In the child, after fork: puts the descriptors at 3 and up and says so in the environment. */
int store_hand_over(const struct store *store, struct err *err) MUST_CHECK;

#endif
