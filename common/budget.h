/* A budget of memory that many holders share: who holds most when it is exceeded has to go.
 *
 * Each holder (a connection) says what it holds; when all of them together hold more than the limit, the one with the
 * most is cut, and the next one, until they fit again.  So what a few hoard does not harm the others.  Pure; one
 * thread. */
#ifndef EEP_COMMON_BUDGET_H
#define EEP_COMMON_BUDGET_H

#include <stddef.h>
#include <stdint.h>

struct budget;

/* All zero: holds nothing, in no budget. */
struct budget_holder {
    struct budget *budget;
    size_t bytes;
    /* It has left the budget, with the bytes that it held.  Frees what it can at once, the rest soon. */
    void (*cut)(void *user, size_t bytes);
    void *user;
    struct budget_holder *prev, *next;
};

struct budget {
    size_t limit, used;
    uint64_t cuts;
    struct budget_holder *holders;
};

/* budget NULL: nothing is counted.  Borrowed until the holder has left. */
void budget_join(struct budget *budget, struct budget_holder *holder, void (*cut)(void *user, size_t bytes),
                 void *user);
void budget_leave(struct budget_holder *holder); /* takes one that is in none */
/* It holds more, or less; nobody is cut. */
void budget_add(struct budget_holder *holder, size_t more, size_t less);
/* Cuts who holds most until the rest fits.  Where no holder's memory is in use up the stack, but what its `cut` leaves.
 */
void budget_keep(struct budget *budget);

#endif
