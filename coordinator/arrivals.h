/* Arrival sets: who has arrived at a phase, by rank and incarnation, with MIN and MAX over what they brought.
 *
 * These are the engine counts of the phases, the sets of PROMISE and FLIPPED.  An arrival
 * is idempotent: a retry, a duplicate or a reconnect never counts twice; another incarnation of a member does not
 * count for it.  Pure. */
#ifndef EEP_COORDINATOR_ARRIVALS_H
#define EEP_COORDINATOR_ARRIVALS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct arrival {
    uint32_t id;
    uint64_t incarnation;
    uint64_t value;
    bool arrived;
};
struct arrivals {
    struct arrival *v;
    size_t n, cap, missing;
};
enum arrival_result {
    ARRIVAL_COUNTED,   /* first time */
    ARRIVAL_AGAIN,     /* already counted; nothing changed */
    ARRIVAL_STRANGER,  /* not expected, or another incarnation */
};
void arrivals_init(struct arrivals *set);
void arrivals_done(struct arrivals *set);
void arrivals_reset(struct arrivals *set); /* expects nobody */
/* Expects id with this incarnation.  0 or ERR_NOMEM; expecting twice is one expectation. */
int arrivals_expect(struct arrivals *set, uint32_t id, uint64_t incarnation) __attribute__((warn_unused_result));
enum arrival_result arrivals_add(struct arrivals *set, uint32_t id, uint64_t incarnation, uint64_t value);
bool arrivals_complete(const struct arrivals *set); /* true for an empty set */
bool arrivals_has(const struct arrivals *set, uint32_t id);
uint64_t arrivals_max(const struct arrivals *set);  /* over those who arrived; 0 when none */
uint64_t arrivals_min(const struct arrivals *set);  /* over those who arrived; UINT64_MAX when none */

#endif
