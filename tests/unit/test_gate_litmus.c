/* Litmus test of the page protocol in two processes: the agent promises, the engine steps, on one shared page.
 *
 * The child is an engine that passes boundaries as fast as it can and writes down every step it begins.  The parent is
 * an agent: it raises the gate, promises, watches, opens the gate again, many times.  No step at or above the promised
 * one may ever have begun.  Without the second read of `intent` the same loop must be caught: the test can fail. */
#include <check.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "agent/libeep/gate.h"
#include "common/clock.h"
#include "tests/harness/suite.h"

struct shared {
    struct control_page page;
    _Alignas(64) _Atomic uint64_t begun; /* highest step the engine has begun */
    _Atomic uint64_t stop;
};

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void engine_main(struct shared *s)
{
    struct gate_local local;
    uint64_t seed = 88172645463325252ULL;
    bool flip, wave_start;

    gate_attach(&s->page, &local);
    while (!atomic_load(&s->stop)) {
        /* Often idle for a moment: that is when the agent promises the present step. */
        if (gate_announce(&s->page, &local, next_random(&seed) % 4 != 0) != GATE_RUN)
            continue;
        if (gate_check(&s->page, &local, &flip, &wave_start) != GATE_RUN) {
            sched_yield();
            continue;
        }
        atomic_store(&s->begun, local.next);
        gate_complete(&s->page, &local, next_random(&seed) % 8 != 0);
    }
}

static struct shared *start(pid_t *ret_child)
{
    int fd = memfd_create("litmus", MFD_CLOEXEC);
    struct shared *s;

    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(ftruncate(fd, sizeof *s), 0);
    s = mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ck_assert_ptr_ne(s, MAP_FAILED);
    close(fd);
    page_init(&s->page);
    page_store(&s->page, PAGE_FLIP_STEP, 1);
    page_store(&s->page, PAGE_FLIP_VIEW, 1);
    page_store(&s->page, PAGE_RUN_TO, 2);
    *ret_child = fork();
    ck_assert_int_ge(*ret_child, 0);
    if (*ret_child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        engine_main(s);
        _exit(0);
    }
    return s;
}

static void stop(struct shared *s, pid_t child)
{
    int status = 0;

    atomic_store(&s->stop, 1);
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    ck_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    munmap(s, sizeof *s);
}

/* One promise, as the agent makes it; K = 0, which leaves the least room. */
static uint64_t promise(struct shared *s, bool reread)
{
    struct page_snapshot snap;
    uint64_t limit;

    page_read(&s->page, &snap);
    do {
        limit = snap.intent + 1;
        page_store(&s->page, PAGE_GATE, limit);
        page_read(&s->page, &snap);
    } while (reread && snap.intent >= limit);
    return limit;
}

/* Rounds for duration_ms, or until a broken promise.  Returns how many were broken. */
static uint64_t rounds(struct shared *s, bool reread, uint64_t duration_ms, uint64_t *ret_held)
{
    uint64_t end = clock_now_ms() + duration_ms, seed = 1234567, broken = 0, held = 0;

    while (clock_now_ms() < end && !broken) {
        uint64_t limit = promise(s, reread), last = 0;
        struct page_snapshot snap;

        for (uint64_t i = next_random(&seed) % 200; i; i--)
            last |= atomic_load(&s->begun) >= limit;
        page_read(&s->page, &snap);
        held += snap.engine_state == PAGE_ENGINE_HELD;
        broken += last || atomic_load(&s->begun) >= limit;
        page_store(&s->page, PAGE_GATE, GATE_OPEN);
        for (uint64_t i = next_random(&seed) % 100; i; i--)
            atomic_load(&s->begun);
    }
    *ret_held = held;
    return broken;
}

START_TEST(promise_is_kept)
{
    pid_t child;
    struct shared *s = start(&child);
    uint64_t held, broken = rounds(s, true, 1500, &held), steps = atomic_load(&s->begun);

    stop(s, child);
    ck_assert_uint_eq(broken, 0);
    ck_assert_uint_gt(steps, 1000);
    ck_assert_uint_gt(held, 0); /* the gate was met, not only passed */
}
END_TEST

START_TEST(without_the_second_read_it_breaks)
{
    cpu_set_t cpus;
    pid_t child;
    struct shared *s;
    uint64_t held, broken;

    ck_assert_int_eq(sched_getaffinity(0, sizeof cpus, &cpus), 0);
    if (CPU_COUNT(&cpus) < 2)
        return; /* one processor interleaves too rarely to show it */
    s = start(&child);
    broken = rounds(s, false, 10000, &held);
    stop(s, child);
    ck_assert_uint_gt(broken, 0);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("gate_litmus");
    TCase *tc = tcase_create("litmus");

    tcase_set_timeout(tc, 30);
    tcase_add_test(tc, promise_is_kept);
    tcase_add_test(tc, without_the_second_read_it_breaks);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
