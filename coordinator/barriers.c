/* Named barriers.  Pure; the arrivals themselves are an arrival set, whose ids are places in the list of members. */
#include "coordinator/barriers.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <uthash.h>
#include <utlist.h>

#include "coordinator/arrivals.h"

#define BARRIERS_MAX 4096

struct waiter {
    uint64_t request, deadline_ns;
    uint32_t member; /* index in the barrier's members */
    struct waiter *prev, *next;
};
struct answer {
    struct barrier_wake wake;
    struct answer *prev, *next;
};
/* Invariant: a member is in the arrival set exactly while it has a waiter; `size` places, unused ones are "". */
struct barrier {
    char name[BARRIER_NAME_MAX + 1];
    uint32_t size;
    char (*members)[BARRIER_MEMBER_MAX];
    struct arrivals set;
    struct waiter *waiters;
    UT_hash_handle hh;
};
struct barriers {
    struct barrier *by_name;
    struct answer *answers; /* waiters that are through, in order */
};

struct barriers *barriers_new(void)
{
    return calloc(1, sizeof(struct barriers));
}

static void waiters_free(struct waiter *list)
{
    struct waiter *w, *next;
    DL_FOREACH_SAFE(list, w, next)
        free(w);
}

static void barrier_remove(struct barriers *b, struct barrier *barrier)
{
    HASH_DEL(b->by_name, barrier);
    waiters_free(barrier->waiters);
    arrivals_done(&barrier->set);
    free(barrier->members);
    free(barrier);
}

void barriers_free(struct barriers *b)
{
    if (!b)
        return;
    struct barrier *barrier, *next;
    HASH_ITER(hh, b->by_name, barrier, next)
        barrier_remove(b, barrier);
    struct answer *a, *next_answer;
    DL_FOREACH_SAFE(b->answers, a, next_answer)
        free(a);
    free(b);
}

static int barrier_new(struct barriers *b, const char *name, uint32_t size, struct barrier **ret, struct err *err)
{
    if (HASH_COUNT(b->by_name) >= BARRIERS_MAX)
        return err_set(err, ERR_LIMIT, "barrier '%s': %u barriers are in use already", name, BARRIERS_MAX);
    struct barrier *barrier = calloc(1, sizeof *barrier);
    if (!barrier)
        return err_set(err, ERR_NOMEM, "out of memory");
    arrivals_init(&barrier->set);
    barrier->members = calloc(size, sizeof *barrier->members);
    int rc = barrier->members ? 0 : ERR_NOMEM;
    for (uint32_t i = 0; rc == 0 && i < size; i++)
        rc = arrivals_expect(&barrier->set, i, 0);
    if (rc < 0) {
        arrivals_done(&barrier->set);
        free(barrier->members);
        free(barrier);
        return err_set(err, ERR_NOMEM, "out of memory for a barrier of %u", size);
    }
    barrier->size = size;
    memcpy(barrier->name, name, strlen(name) + 1);
    HASH_ADD_STR(b->by_name, name, barrier);
    *ret = barrier;
    return 0;
}

/* The place of a member, or a free one.  There is always one: a full barrier has been released. */
static uint32_t member_place(struct barrier *barrier, const char *member)
{
    uint32_t place = barrier->size;
    for (uint32_t i = 0; i < barrier->size; i++) {
        if (strcmp(barrier->members[i], member) == 0)
            return i;
        if (!barrier->members[i][0] && place == barrier->size)
            place = i;
    }
    return place;
}

/* Answers everyone whose deadline is at or before `until`; the barrier may be left without waiters. */
static void barrier_answer(struct barriers *b, struct barrier *barrier, uint64_t until, int code, const char *text)
{
    struct waiter *w, *next;
    DL_FOREACH_SAFE(barrier->waiters, w, next) {
        if (w->deadline_ns > until)
            continue;
        struct answer *a = calloc(1, sizeof *a);
        if (!a)
            abort(); /* a waiter must not be forgotten */
        a->wake.request = w->request;
        a->wake.code = code;
        snprintf(a->wake.text, sizeof a->wake.text, "%s", text);
        DL_APPEND(b->answers, a);
        DL_DELETE(barrier->waiters, w);
        free(w);
    }
}

int barriers_arrive(struct barriers *b, uint64_t request, const char *name, uint32_t size, const char *member,
                    uint64_t deadline_ns, struct err *err)
{
    size_t name_len = strlen(name), member_len = strlen(member);
    if (!name_len || name_len > BARRIER_NAME_MAX)
        return err_set(err, ERR_INVALID, "a barrier's name must have 1 to %d bytes, not %zu", BARRIER_NAME_MAX,
                       name_len);
    if (!member_len || member_len >= BARRIER_MEMBER_MAX)
        return err_set(err, ERR_INVALID, "barrier '%s': a member's name must have 1 to %d bytes, not %zu", name,
                       BARRIER_MEMBER_MAX - 1, member_len);
    if (!size || size > BARRIER_SIZE_MAX)
        return err_set(err, ERR_INVALID, "barrier '%s': the size must be 1 to %d, not %u", name, BARRIER_SIZE_MAX,
                       size);
    struct barrier *barrier;
    HASH_FIND_STR(b->by_name, name, barrier);
    if (barrier && barrier->size != size)
        return err_set(err, ERR_CONFLICT, "barrier '%s' waits for %u members, not for %u: use one size", name,
                       barrier->size, size);
    struct waiter *w = calloc(1, sizeof *w);
    if (!w)
        return err_set(err, ERR_NOMEM, "out of memory");
    if (!barrier) {
        int rc = barrier_new(b, name, size, &barrier, err);
        if (rc < 0) {
            free(w);
            return rc;
        }
    }
    w->request = request;
    w->deadline_ns = deadline_ns;
    w->member = member_place(barrier, member);
    memcpy(barrier->members[w->member], member, member_len + 1);
    DL_APPEND(barrier->waiters, w);
    arrivals_add(&barrier->set, w->member, 0, 0);
    if (arrivals_complete(&barrier->set)) {
        barrier_answer(b, barrier, UINT64_MAX, 0, "");
        barrier_remove(b, barrier);
    }
    return 0;
}

/* Arrival sets only grow: after a withdrawal the set is counted anew. */
static void barrier_recount(struct barrier *barrier)
{
    arrivals_reset(&barrier->set);
    for (uint32_t i = 0; i < barrier->size; i++) {
        if (arrivals_expect(&barrier->set, i, 0) < 0)
            abort(); /* its memory is there already */
    }
    bool *there = calloc(barrier->size, sizeof *there);
    if (!there)
        abort();
    struct waiter *w;
    DL_FOREACH(barrier->waiters, w) {
        arrivals_add(&barrier->set, w->member, 0, 0);
        there[w->member] = true;
    }
    for (uint32_t i = 0; i < barrier->size; i++) {
        if (!there[i])
            barrier->members[i][0] = '\0';
    }
    free(there);
}

static void barrier_settle(struct barriers *b, struct barrier *barrier)
{
    if (barrier->waiters)
        barrier_recount(barrier);
    else
        barrier_remove(b, barrier);
}

void barriers_cancel(struct barriers *b, uint64_t request)
{
    struct answer *a, *next_answer;
    DL_FOREACH_SAFE(b->answers, a, next_answer) {
        if (a->wake.request == request) {
            DL_DELETE(b->answers, a);
            free(a);
        }
    }
    struct barrier *barrier, *next;
    HASH_ITER(hh, b->by_name, barrier, next) {
        struct waiter *w;
        DL_FOREACH(barrier->waiters, w) {
            if (w->request == request) {
                DL_DELETE(barrier->waiters, w);
                free(w);
                barrier_settle(b, barrier);
                return;
            }
        }
    }
}

static void timeout_text(const struct barrier *barrier, char *text, size_t size)
{
    uint32_t arrived = 0;
    char names[256] = "";
    size_t len = 0;
    for (uint32_t i = 0; i < barrier->size; i++) {
        if (!barrier->members[i][0])
            continue;
        arrived++;
        int n = snprintf(names + len, sizeof names - len, "%s%s", len ? ", " : "", barrier->members[i]);
        if (n > 0)
            len = len + (size_t)n < sizeof names ? len + (size_t)n : sizeof names - 1;
    }
    snprintf(text, size, "barrier '%.100s': %u of %u members are missing at the deadline; arrived: %s%s",
             barrier->name, barrier->size - arrived, barrier->size, names, len == sizeof names - 1 ? "..." : "");
}

static bool barrier_expired(const struct barrier *barrier, uint64_t now_ns)
{
    const struct waiter *w;
    DL_FOREACH(barrier->waiters, w) {
        if (w->deadline_ns <= now_ns)
            return true;
    }
    return false;
}

bool barriers_next_wake(struct barriers *b, uint64_t now_ns, struct barrier_wake *ret_wake)
{
    struct barrier *barrier, *next;
    HASH_ITER(hh, b->by_name, barrier, next) {
        if (!barrier_expired(barrier, now_ns))
            continue;
        char text[ERR_TEXT_MAX];
        timeout_text(barrier, text, sizeof text); /* before anyone is withdrawn: all are told the same */
        barrier_answer(b, barrier, now_ns, ERR_TIMEOUT, text);
        barrier_settle(b, barrier);
    }
    struct answer *a = b->answers;
    if (!a)
        return false;
    *ret_wake = a->wake;
    DL_DELETE(b->answers, a);
    free(a);
    return true;
}

uint64_t barriers_deadline(const struct barriers *b)
{
    if (b->answers)
        return 0;
    uint64_t deadline = UINT64_MAX;
    const struct barrier *barrier, *next;
    const struct waiter *w;
    HASH_ITER(hh, b->by_name, barrier, next) {
        DL_FOREACH(barrier->waiters, w) {
            if (w->deadline_ns < deadline)
                deadline = w->deadline_ns;
        }
    }
    return deadline;
}

size_t barriers_count(const struct barriers *b)
{
    return HASH_COUNT(b->by_name);
}
