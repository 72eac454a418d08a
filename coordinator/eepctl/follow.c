/* Waiting for an operation: a progress line on stderr, the result on stdout.
 *
 * Ctrl-C ends the waiting, never the operation.  A coordinator that goes away is looked for again: it recovers the
 * operation from its journal, or agents settle it. */
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>

#include "common/clock.h"
#include "coordinator/eepctl/client.h"

struct follow {
    struct ctl *ctl;
    uint64_t op;
    uint64_t deadline_ms; /* UINT64_MAX = none */
    uint64_t lost_ms;     /* since when there is no coordinator; 0 = there is one */
    int signals;          /* signalfd of SIGINT and SIGTERM; -1 = none */
    bool live;            /* stderr is a terminal: rewrite one line */
    char shown[512];      /* what was written last, when it is not */
    uint64_t received_ms; /* when the last state came */
};

void ctl_sleep_ms(unsigned ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};
    nanosleep(&t, NULL);
}

static void progress_clear(const struct follow *f)
{
    if (f->live)
        fputs("\r\033[K", stderr);
}

static void progress_note(struct follow *f, const char *text)
{
    progress_clear(f);
    fprintf(stderr, "%s\n", text);
}

#define AWAITED_LATE_MS 1000 /* who is missing is news only when a phase takes long */

static void progress_show(struct follow *f, const Pb__Operation *op)
{
    char done[32], planned[32], age[32], left[32];
    char *line = NULL;
    size_t size = 0;
    uint64_t waited_ms = clock_now_ms() - f->received_ms, age_ms = op->phase_age_ms + waited_ms;
    FILE *out = open_memstream(&line, &size);
    if (!out)
        return;
    fprintf(out, "operation %llu: %s to %u ranks: %s", (unsigned long long)op->op, ctl_kind(op->kind), op->target,
            op->phase);
    if (op->rounds)
        fprintf(out, ", round %u of %u", op->round, op->rounds);
    if (!f->live && op->bytes_planned) /* what changes all the time would be a line each here */
        fprintf(out, ", %llu %%", (unsigned long long)(op->bytes_done * 4 / op->bytes_planned * 25));
    if (f->live) {
        if (op->bytes_planned)
            fprintf(out, ", %s of %s", ctl_bytes(op->bytes_done, done, sizeof done),
                    ctl_bytes(op->bytes_planned, planned, sizeof planned));
        fprintf(out, ", %s", ctl_duration(age_ms * 1000000, age, sizeof age));
    }
    if (*op->awaited && (f->live || age_ms >= AWAITED_LATE_MS)) {
        fprintf(out, ", awaiting %s", op->awaited);
        if (op->has_deadline_in_ms && f->live)
            fprintf(out, " for at most %s",
                    ctl_duration((op->deadline_in_ms > waited_ms ? op->deadline_in_ms - waited_ms : 0) * 1000000, left, sizeof left));
        else if (op->has_deadline_in_ms) /* a line that stays: no number that runs */
            fprintf(out, " until its deadline, %s after the phase began",
                    ctl_duration((op->phase_age_ms + op->deadline_in_ms + 50) / 100 * 100000000, left, sizeof left));
    }
    fclose(out);
    if (f->live) {
        fprintf(stderr, "\r\033[K%.120s", line);
        fflush(stderr);
    } else if (strcmp(line, f->shown) != 0) {
        snprintf(f->shown, sizeof f->shown, "%.511s", line);
        progress_note(f, line);
    }
    free(line);
}

static int follow_ended(struct follow *f, const Pb__Operation *op)
{
    progress_clear(f);
    if (f->ctl->output == CTL_JSON)
        ctl_print_json(ctl_json(&op->base));
    else
        ctl_print_operation(op, stdout);
    if (op->outcome == PB__OP_OUTCOME__ABORTED)
        fprintf(stderr, "eepctl: operation %llu was aborted and rolled back: %s\n", (unsigned long long)op->op, op->why);
    else if (op->outcome != PB__OP_OUTCOME__DONE)
        fprintf(stderr, "eepctl: operation %llu failed: %s\n", (unsigned long long)op->op, op->why);
    switch (op->outcome) {
    case PB__OP_OUTCOME__DONE: return CTL_OK;
    case PB__OP_OUTCOME__ABORTED: return CTL_ABORTED;
    default: return CTL_FAILED;
    }
}

static void say_how_to_go_on(const struct follow *f)
{
    if (f->op)
        fprintf(stderr, "operation %llu goes on; `eepctl watch %llu` follows it again\n", (unsigned long long)f->op,
                (unsigned long long)f->op);
}

/* Waits for a frame, a signal or the deadline.  0 to go on, otherwise an exit code. */
static int follow_wait(struct follow *f, int fd, unsigned at_most_ms)
{
    uint64_t now = clock_now_ms();
    int wait = (int)at_most_ms;
    if (f->deadline_ms != UINT64_MAX) {
        uint64_t left = f->deadline_ms > now ? f->deadline_ms - now : 0;
        if (left < at_most_ms)
            wait = (int)left;
    }
    struct pollfd fds[2] = {{.fd = f->signals, .events = POLLIN}, {.fd = fd, .events = POLLIN}};
    if (poll(fds, 2, wait) > 0 && (fds[0].revents & POLLIN)) {
        progress_clear(f);
        fputs("eepctl: detached\n", stderr);
        say_how_to_go_on(f);
        return CTL_STILL_RUNNING;
    }
    if (clock_now_ms() >= f->deadline_ms) {
        progress_clear(f);
        fputs("eepctl: stopped waiting: the time given by --timeout is over\n", stderr);
        say_how_to_go_on(f);
        return CTL_STILL_RUNNING;
    }
    return 0;
}

/* One connection's worth of the stream.  Returns an exit code, or -1 when the coordinator was lost. */
static int follow_stream(struct follow *f, struct err *err)
{
    int rc = client_connect(f->ctl, err);
    if (rc < 0)
        return rc == ERR_UNREACHABLE ? -1 : ctl_fail(err);
    Pb__WatchOperationRequest request = PB__WATCH_OPERATION_REQUEST__INIT;
    request.op = f->op;
    uint64_t call;
    rc = rpc_client_start(f->ctl->client, CONTROL_WATCH_OPERATION, &request.base, &call, err);
    Pb__Operation *last = NULL;
    int status = -1;
    while (rc >= 0) {
        Pb__Operation *op = NULL;
        rc = rpc_client_next(f->ctl->client, call, 0, (ProtobufCMessage **)&op, err);
        if (rc == ERR_TIMEOUT) {
            status = follow_wait(f, rpc_client_fd(f->ctl->client), 1000);
            if (status)
                break;
            status = -1;
            rc = 0;
            if (last)
                progress_show(f, last);
            continue;
        }
        if (rc == 1) {
            rpc_unpack_free(last ? &last->base : NULL);
            last = op;
            f->received_ms = clock_now_ms();
            f->op = op->op;
            if (f->lost_ms)
                progress_note(f, "eepctl: the coordinator is back");
            f->lost_ms = 0;
            if (op->outcome == PB__OP_OUTCOME__RUNNING)
                progress_show(f, op);
        } else if (rc == 0) {
            if (last && last->outcome != PB__OP_OUTCOME__RUNNING)
                status = follow_ended(f, last);
            else
                rc = err_set(err, ERR_UNREACHABLE, "the coordinator ended the watch early");
            break;
        }
    }
    rpc_unpack_free(last ? &last->base : NULL);
    if (status < 0 && rc < 0 && rc != ERR_UNREACHABLE) {
        progress_clear(f);
        return ctl_fail(err);
    }
    return status;
}

int ctl_follow(struct ctl *ctl, uint64_t op, uint32_t timeout_ms)
{
    const char *term = getenv("TERM");
    struct follow f = {.ctl = ctl, .op = op, .deadline_ms = UINT64_MAX};
    f.live = isatty(STDERR_FILENO) && term && strcmp(term, "dumb") != 0;
    if (timeout_ms)
        f.deadline_ms = clock_now_ms() + timeout_ms;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    sigprocmask(SIG_BLOCK, &set, NULL);
    f.signals = signalfd(-1, &set, SFD_CLOEXEC);

    struct err err = {0};
    int status;
    bool had = ctl->client != NULL;
    while ((status = follow_stream(&f, &err)) < 0) {
        client_drop(ctl);
        uint64_t now = clock_now_ms();
        if (!had && !f.op) { /* never had a connection: nothing to wait for */
            status = ctl_fail(&err);
            break;
        }
        if (!f.lost_ms) {
            f.lost_ms = now;
            progress_note(&f, "eepctl: lost the coordinator, looking for it again");
        } else if (now - f.lost_ms >= CTL_LOST_MS) {
            progress_clear(&f);
            status = ctl_fail(&err);
            say_how_to_go_on(&f);
            break;
        }
        if ((status = follow_wait(&f, -1, CTL_RETRY_MS)) != 0)
            break;
    }
    if (f.signals >= 0)
        close(f.signals);
    return status;
}
