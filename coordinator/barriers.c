/* Named barriers.  Pure; the loop thread. */
#include "coordinator/barriers.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <uthash.h>
#include <utlist.h>

#include "common/deadlines.h"

#define NAMES_IN_TEXT 300 /* bytes of names in a sentence */

struct barrier;
/* A member who has arrived. */
struct member {
    uint64_t request;
    struct deadline deadline;
    struct barrier *barrier;
    UT_hash_handle hh;         /* barrier.members by name */
    UT_hash_handle hh_request; /* barriers.by_request */
    char name[];
};
struct expected {
    UT_hash_handle hh;
    const char *name; /* into barrier.names */
};
/* Invariant: less than `size` members, and at least one; a full barrier has been released. */
struct barrier {
    struct member *members; /* hash, in order of arrival */
    struct expected *expected; /* [size], hashed; NULL = nobody has said who comes */
    struct expected *expected_hash;
    char *names;
    uint32_t size;
    uint64_t since_ns;
    bool ranks; /* every member so far is a number below size */
    UT_hash_handle hh;
    char name[];
};
struct answer {
    struct barrier_wake wake;
    struct answer *prev, *next;
};
struct barriers {
    struct barrier *by_name;
    struct member *by_request;
    struct deadlines deadlines;
    struct answer *answers; /* in order */
    uint64_t rounds;
};

struct barriers *barriers_new(void)
{
    return calloc(1, sizeof(struct barriers));
}

/* ---- members ---- */

static void member_free(struct barriers *b, struct member *m)
{
    HASH_DELETE(hh, m->barrier->members, m);
    HASH_DELETE(hh_request, b->by_request, m);
    deadlines_remove(&b->deadlines, &m->deadline);
    free(m);
}

static void barrier_free(struct barriers *b, struct barrier *barrier)
{
    struct member *m, *next;
    HASH_ITER(hh, barrier->members, m, next)
        member_free(b, m);
    HASH_CLEAR(hh, barrier->expected_hash);
    free(barrier->expected);
    free(barrier->names);
    HASH_DEL(b->by_name, barrier);
    free(barrier);
}

static void barrier_settle(struct barriers *b, struct barrier *barrier)
{
    if (!barrier->members)
        barrier_free(b, barrier);
}

void barriers_free(struct barriers *b)
{
    if (!b)
        return;
    struct barrier *barrier, *next;
    HASH_ITER(hh, b->by_name, barrier, next)
        barrier_free(b, barrier);
    struct answer *a, *next_answer;
    DL_FOREACH_SAFE(b->answers, a, next_answer)
        free(a);
    deadlines_done(&b->deadlines);
    free(b);
}

static struct answer *answer(struct barriers *b, uint64_t request, int code)
{
    struct answer *a = calloc(1, sizeof *a);
    if (!a)
        abort(); /* who waits must not be forgotten */
    a->wake.request = request;
    a->wake.code = code;
    DL_APPEND(b->answers, a);
    return a;
}

/* ---- who may come ---- */

/* A rank in decimal without leading zeros; -1 for any other name. */
static long rank_of(const char *name)
{
    if (!name[0] || strlen(name) > 6 || (name[0] == '0' && name[1]))
        return -1;
    for (const char *c = name; *c; c++)
        if (*c < '0' || *c > '9')
            return -1;
    return atol(name);
}

static int arrival_check(const struct barrier_arrival *a, struct err *err)
{
    size_t name_len = strlen(a->name), member_len = strlen(a->member);
    if (!name_len || name_len > BARRIER_NAME_MAX)
        return err_set(err, ERR_INVALID, "a barrier's name must have 1 to %d bytes, not %zu", BARRIER_NAME_MAX,
                       name_len);
    if (!member_len || member_len >= BARRIER_MEMBER_MAX)
        return err_set(err, ERR_INVALID, "barrier '%.100s': a member's name must have 1 to %d bytes, not %zu", a->name,
                       BARRIER_MEMBER_MAX - 1, member_len);
    if (!a->size || a->size > BARRIER_SIZE_MAX)
        return err_set(err, ERR_INVALID, "barrier '%.100s': the size must be 1 to %d, not %u", a->name,
                       BARRIER_SIZE_MAX, a->size);
    if (a->n_expected && a->n_expected != a->size)
        return err_set(err, ERR_INVALID, "barrier '%.100s': %zu members are named, but its size is %u", a->name,
                       a->n_expected, a->size);
    for (size_t i = 0; i < a->n_expected; i++)
        if (!a->expected[i][0] || strlen(a->expected[i]) >= BARRIER_MEMBER_MAX)
            return err_set(err, ERR_INVALID, "barrier '%.100s': member %zu has no name, or one above %d bytes", a->name,
                           i, BARRIER_MEMBER_MAX - 1);
    return 0;
}

static bool is_expected(const struct barrier *barrier, const char *name)
{
    struct expected *e;
    HASH_FIND_STR(barrier->expected_hash, name, e);
    return e != NULL;
}

/* Keeps the names of those who shall come.  ERR_INVALID: a name twice. */
static int expected_keep(struct barrier *barrier, const struct barrier_arrival *a, struct err *err)
{
    size_t bytes = 0;
    for (size_t i = 0; i < a->n_expected; i++)
        bytes += strlen(a->expected[i]) + 1;
    barrier->expected = calloc(a->n_expected, sizeof *barrier->expected);
    barrier->names = malloc(bytes);
    if (!barrier->expected || !barrier->names)
        return err_set(err, ERR_NOMEM, "no memory for the members of barrier '%.100s'", a->name);
    char *at = barrier->names;
    for (size_t i = 0; i < a->n_expected; i++) {
        size_t len = strlen(a->expected[i]) + 1;
        if (is_expected(barrier, a->expected[i]))
            return err_set(err, ERR_INVALID, "barrier '%.100s': member '%s' is named twice", a->name, a->expected[i]);
        memcpy(at, a->expected[i], len);
        struct expected *e = &barrier->expected[i];
        e->name = at;
        HASH_ADD_KEYPTR(hh, barrier->expected_hash, e->name, len - 1, e);
        at += len;
    }
    return 0;
}

static int expected_check(struct barrier *barrier, const struct barrier_arrival *a, struct err *err)
{
    if (a->n_expected && !barrier->expected) {
        int rc = expected_keep(barrier, a, err);
        struct member *m, *next;
        HASH_ITER(hh, barrier->members, m, next)
            if (rc == 0 && !is_expected(barrier, m->name))
                rc = err_set(err, ERR_CONFLICT, "barrier '%.100s': '%s' has arrived and is not among the members named",
                             a->name, m->name);
        if (rc < 0) {
            HASH_CLEAR(hh, barrier->expected_hash);
            free(barrier->expected);
            free(barrier->names);
            barrier->expected = NULL;
            barrier->names = NULL;
            return rc;
        }
    }
    for (size_t i = 0; i < a->n_expected; i++)
        if (!is_expected(barrier, a->expected[i]))
            return err_set(err, ERR_CONFLICT, "barrier '%.100s': others wait for other members than '%s'", a->name,
                           a->expected[i]);
    if (barrier->expected && !is_expected(barrier, a->member))
        return err_set(err, ERR_CONFLICT, "barrier '%.100s': '%s' is one too many: it is not among its %u members",
                       a->name, a->member, barrier->size);
    long rank = rank_of(a->member);
    if (!barrier->expected && barrier->ranks && rank >= (long)barrier->size)
        return err_set(err, ERR_CONFLICT, "barrier '%.100s': rank %ld is one too many: it has ranks 0 to %u", a->name,
                       rank, barrier->size - 1);
    return 0;
}

/* ---- arriving ---- */

static struct barrier *barrier_new(struct barriers *b, const struct barrier_arrival *a)
{
    size_t len = strlen(a->name) + 1;
    struct barrier *barrier = calloc(1, sizeof *barrier + len);
    if (!barrier)
        return NULL;
    memcpy(barrier->name, a->name, len);
    barrier->size = a->size;
    barrier->since_ns = a->now_ns;
    barrier->ranks = true;
    HASH_ADD_STR(b->by_name, name, barrier);
    return barrier;
}

static int member_new(struct barriers *b, struct barrier *barrier, const struct barrier_arrival *a)
{
    size_t len = strlen(a->member) + 1;
    struct member *m = calloc(1, sizeof *m + len);
    if (!m)
        return ERR_NOMEM;
    memcpy(m->name, a->member, len);
    m->request = a->request;
    m->barrier = barrier;
    if (deadlines_set(&b->deadlines, &m->deadline, a->deadline_ns) < 0) {
        free(m);
        return ERR_NOMEM;
    }
    HASH_ADD_STR(barrier->members, name, m);
    HASH_ADD(hh_request, b->by_request, request, sizeof m->request, m);
    if (rank_of(m->name) < 0 || rank_of(m->name) >= (long)barrier->size)
        barrier->ranks = false;
    return 0;
}

static void release(struct barriers *b, struct barrier *barrier)
{
    struct member *m, *next;
    b->rounds++;
    HASH_ITER(hh, barrier->members, m, next)
        answer(b, m->request, 0)->wake.round = b->rounds;
    barrier_free(b, barrier);
}

int barriers_arrive(struct barriers *b, const struct barrier_arrival *a, struct err *err)
{
    int rc = arrival_check(a, err);
    if (rc < 0)
        return rc;
    struct barrier *barrier;
    HASH_FIND_STR(b->by_name, a->name, barrier);
    if (barrier && barrier->size != a->size)
        return err_set(err, ERR_CONFLICT, "barrier '%.100s' waits for %u members, not for %u: use one size", a->name,
                       barrier->size, a->size);
    if (!barrier && HASH_COUNT(b->by_name) >= BARRIERS_MAX)
        return err_set(err, ERR_LIMIT, "barrier '%.100s': %u barriers are in use already", a->name, BARRIERS_MAX);
    if (!barrier && !(barrier = barrier_new(b, a)))
        return err_set(err, ERR_NOMEM, "no memory for barrier '%.100s'", a->name);
    rc = expected_check(barrier, a, err);
    if (rc < 0) {
        barrier_settle(b, barrier);
        return rc;
    }
    struct member *before;
    HASH_FIND_STR(barrier->members, a->member, before);
    if (before) {
        struct answer *told = answer(b, before->request, ERR_STALE);
        snprintf(told->wake.text, sizeof told->wake.text,
                 "barrier '%.100s': '%s' has arrived again by another call, which waits now; retry if this one is it",
                 a->name, a->member);
        member_free(b, before);
    }
    if (member_new(b, barrier, a) < 0) {
        barrier_settle(b, barrier);
        return err_set(err, ERR_NOMEM, "no memory for a member of barrier '%.100s'", a->name);
    }
    if (HASH_COUNT(barrier->members) == barrier->size)
        release(b, barrier);
    return 0;
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
    struct member *m;
    HASH_FIND(hh_request, b->by_request, &request, sizeof request, m);
    if (m) {
        struct barrier *barrier = m->barrier;
        member_free(b, m);
        barrier_settle(b, barrier);
    }
}

/* ---- deadlines ---- */

struct names {
    char text[NAMES_IN_TEXT];
    size_t len;
    bool more;
};

static void names_add(struct names *names, const char *name)
{
    int n = snprintf(names->text + names->len, sizeof names->text - names->len, "%s%s", names->len ? ", " : "", name);
    if (n < 0 || names->len + (size_t)n >= sizeof names->text) {
        names->text[names->len] = '\0';
        names->more = true;
        return;
    }
    names->len += (size_t)n;
}

static bool member_there(const struct barrier *barrier, const char *name)
{
    struct member *m;
    HASH_FIND_STR(barrier->members, name, m);
    return m != NULL;
}

/* Calls each for those who are missing, as far as it is known who shall come.  false: it is not. */
static bool missing_each(const struct barrier *barrier, bool (*each)(void *user, const char *member, bool arrived),
                         void *user)
{
    if (!barrier->expected && !barrier->ranks)
        return false;
    char rank[16];
    for (uint32_t i = 0; i < barrier->size; i++) {
        snprintf(rank, sizeof rank, "%u", i);
        const char *name = barrier->expected ? barrier->expected[i].name : rank;
        if (!member_there(barrier, name) && !each(user, name, false))
            break;
    }
    return true;
}

static bool names_each(void *user, const char *member, bool arrived)
{
    (void)arrived;
    names_add(user, member);
    return !((struct names *)user)->more;
}

static void timeout_text(const struct barrier *barrier, char *text, size_t size)
{
    struct names names = {0};
    bool known = missing_each(barrier, names_each, &names);
    if (!known) {
        struct member *m, *next;
        HASH_ITER(hh, barrier->members, m, next)
            names_add(&names, m->name);
    }
    uint32_t arrived = HASH_COUNT(barrier->members);
    snprintf(text, size, "barrier '%.100s': %u of %u members are missing at the deadline; %s: %s%s", barrier->name,
             barrier->size - arrived, barrier->size, known ? "missing" : "arrived", names.text,
             names.more ? ", ..." : "");
}

static struct member *member_of(struct deadline *deadline)
{
    return (struct member *)((char *)deadline - offsetof(struct member, deadline));
}

bool barriers_next_wake(struct barriers *b, uint64_t now_ns, struct barrier_wake *ret_wake)
{
    while (!b->answers && deadlines_next_ns(&b->deadlines) <= now_ns) {
        struct barrier *barrier = member_of(deadlines_first(&b->deadlines))->barrier;
        char text[ERR_TEXT_MAX];
        timeout_text(barrier, text, sizeof text); /* before anyone is withdrawn: all are told the same */
        struct member *m, *next;
        HASH_ITER(hh, barrier->members, m, next) {
            if (m->deadline.ns > now_ns)
                continue;
            struct answer *a = answer(b, m->request, ERR_TIMEOUT);
            memcpy(a->wake.text, text, sizeof text);
            member_free(b, m);
        }
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
    return b->answers ? 0 : deadlines_next_ns(&b->deadlines);
}

/* ---- looking ---- */

size_t barriers_count(const struct barriers *b)
{
    return HASH_COUNT(b->by_name);
}

static struct barrier_info info_of(const struct barrier *barrier)
{
    struct barrier_info info = {.name = barrier->name, .size = barrier->size, .since_ns = barrier->since_ns,
                                .arrived = HASH_COUNT(barrier->members), .deadline_ns = UINT64_MAX};
    struct member *m, *next;
    HASH_ITER(hh, barrier->members, m, next)
        if (m->deadline.ns < info.deadline_ns)
            info.deadline_ns = m->deadline.ns;
    return info;
}

void barriers_list(const struct barriers *b, bool (*each)(void *user, const struct barrier_info *info), void *user)
{
    struct barrier *barrier, *next;
    HASH_ITER(hh, b->by_name, barrier, next) {
        struct barrier_info info = info_of(barrier);
        if (!each(user, &info))
            break;
    }
}

int barriers_show(const struct barriers *b, const char *name, struct barrier_info *ret_info,
                  bool (*each)(void *user, const char *member, bool arrived), void *user, struct err *err)
{
    struct barrier *barrier;
    HASH_FIND_STR(b->by_name, name, barrier);
    if (!barrier)
        return err_set(err, ERR_NOTFOUND, "nobody waits at a barrier '%.200s'", name);
    *ret_info = info_of(barrier);
    struct member *m, *next;
    HASH_ITER(hh, barrier->members, m, next)
        if (!each(user, m->name, true))
            return 0;
    (void)missing_each(barrier, each, user);
    return 0;
}
