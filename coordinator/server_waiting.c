/* Says in the log who is awaited, when it takes long: an operation that stays in a phase, or a view that does not serve
 * everything.  Once after a few seconds, then at ever longer intervals; with nothing to wait for no timer runs. */
#include <event2/event.h>

#include "common/clock.h"
#include "coordinator/server_internal.h"

#define FIRST_MS   5000u
#define LONGEST_MS 300000u

static void timer_set(struct server *s, uint32_t ms)
{
    const struct timeval in = {.tv_sec = ms / 1000, .tv_usec = (suseconds_t)(ms % 1000) * 1000};
    s->waiting.interval_ms = ms;
    (void)event_add(s->waiting.timer, &in);
}

static unsigned long long seconds_since(uint64_t ns)
{
    uint64_t now = clock_now_ns();
    return ns && ns < now ? (now - ns) / 1000000000u : 0;
}

static void on_timer(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    struct server *s = user;
    struct coordinator_status status;
    coordinator_status(s->core, clock_now_ns(), &status);
    if (status.op_running)
        log_event(s->log, LOG_LEVEL_WARN, "waiting", "op=%llu epoch=%llu phase=%s seconds=%llu for=%s",
                  (unsigned long long)status.op.record.op, (unsigned long long)status.epoch, status.op.phase,
                  seconds_since(status.op.phase_since_ns), status.op.awaited);
    else if (status.degraded[0])
        log_event(s->log, LOG_LEVEL_WARN, "waiting", "op=0 epoch=%llu why=%s seconds=%llu for=%s",
                  (unsigned long long)status.epoch, status.degraded, seconds_since(status.degraded_since_ns), status.missing);
    else
        return;
    uint32_t next = s->waiting.interval_ms * 2;
    timer_set(s, next < LONGEST_MS ? next : LONGEST_MS);
}

int server_waiting_open(struct server *s)
{
    s->waiting.timer = event_new(s->base, -1, 0, on_timer, s);
    return s->waiting.timer ? 0 : ERR_NOMEM;
}

/* Since when it has been waiting for what it waits for now. */
static uint64_t wait_since_ns(const struct server *s)
{
    struct coordinator_status status;
    coordinator_status(s->core, clock_now_ns(), &status);
    return status.op_running ? status.op.phase_since_ns : status.degraded_since_ns;
}

void server_waiting_begin(struct server *s)
{
    s->waiting.since_ns = wait_since_ns(s);
    timer_set(s, FIRST_MS);
}

void server_waiting_warned(struct server *s)
{
    if (!event_pending(s->waiting.timer, EV_TIMEOUT, NULL) || s->waiting.since_ns != wait_since_ns(s))
        server_waiting_begin(s);
}

void server_waiting_close(struct server *s)
{
    if (s->waiting.timer)
        event_free(s->waiting.timer);
}
