/* What an operator at three in the morning has: the log of one daemon, and eepctl.
 *
 * A scale up, a scale down, an aborted join and an engine's death are read back from the log of each agent alone (the
 * four machines, state by state) and from the coordinator's alone (phases, who was awaited, the decision); every line
 * is logfmt; a quiet cluster writes nothing; nothing secret is written. */
#include <ctype.h>

#include "tests/integration/itest.h"

#define STATES_MAX 64

/* The value of a key in a logfmt line, unquoted; "" when it is not there. */
static const char *log_value(const char *line, const char *key, char *out, size_t size)
{
    char find[64];
    size_t n = 0;
    out[0] = '\0';
    snprintf(find, sizeof(find), " %s=", key);
    const char *p = strstr(line, find);
    if (!p)
        return out;
    p += strlen(find);
    bool quoted = *p == '"';
    for (p += quoted; *p && *p != (quoted ? '"' : ' ') && n + 1 < size; p++)
        out[n++] = *p;
    out[n] = '\0';
    return out;
}

static bool bare(char c)
{
    return c && c != ' ' && c != '"' && c != '=' && (unsigned char)c > ' ';
}

/* key=value pairs, one space between them; NULL, or what is wrong. */
static const char *logfmt_wrong(const char *p)
{
    static const char *const first[] = {"time=", " level=", " daemon="};
    for (size_t i = 0; i < 3; i++)
        if (!strstr(p, first[i]))
            return "time, level and daemon come with every line";
    if (!strstr(p, " event="))
        return "no event";
    char level[16];
    log_value(p, "level", level, sizeof(level));
    if (strcmp(level, "debug") && strcmp(level, "info") && strcmp(level, "warn") && strcmp(level, "error"))
        return "unknown level";
    while (*p) {
        const char *key = p;
        while (islower((unsigned char)*p) || isdigit((unsigned char)*p) || *p == '_')
            p++;
        if (p == key || *p++ != '=')
            return "a key is missing";
        if (*p == '"') {
            for (p++; *p && *p != '"'; p++)
                if (*p == '\\' && !*++p)
                    return "a quote is not closed";
            if (*p++ != '"')
                return "a quote is not closed";
        } else {
            while (bare(*p) || *p == '=')
                p++;
        }
        if (*p && *p != ' ')
            return "something follows a value";
        if (*p && !p[1])
            return "a space at the end";
        p += *p == ' ';
    }
    return NULL;
}

/* Calls each line of a log; the text is cut into lines. */
static void log_lines(const struct cluster *c, const char *name, void (*each)(void *user, char *line), void *user)
{
    char *text = cluster_read(c, name), *save = NULL;
    ck_assert_msg(text && *text, "%s/%s is empty", c->dir, name);
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
        each(user, line);
    free(text);
}

static void line_is_logfmt(void *user, char *line)
{
    const char *wrong = logfmt_wrong(line);
    ck_assert_msg(!wrong, "%s: %s: %s", (const char *)user, wrong, line);
    /* an id of a group is random bytes: nothing like it, and no name of it, may be there */
    size_t run = 0;
    for (const char *p = line; *p; p++) {
        run = isxdigit((unsigned char)*p) ? run + 1 : 0;
        ck_assert_msg(run < 17, "more than a u64 in hex: %s", line);
    }
    ck_assert_msg(!strstr(line, "blob") && !strstr(line, "group_id="), "%s", line);
}

/* ---- the way of a machine, or of the phases ---- */

struct way {
    const char *op;              /* of this operation */
    char states[STATES_MAX][48]; /* each state once, in the order of its first appearance */
    unsigned n;
    char last[48];
    bool holds_together; /* each line begins where the one before ended */
    char role[16];
};

static void way_add(struct way *w, const char *from, const char *to)
{
    if (w->n == 0)
        w->holds_together = strcmp(from, "NONE") == 0;
    else
        w->holds_together &= strcmp(from, w->last) == 0;
    snprintf(w->last, sizeof(w->last), "%s", to);
    for (unsigned i = 0; i < w->n; i++)
        if (strcmp(w->states[i], to) == 0)
            return;
    if (w->n < STATES_MAX)
        snprintf(w->states[w->n++], sizeof(w->states[0]), "%s", to);
}

static void line_of_machine(void *user, char *line)
{
    struct way *w = user;
    char v[256], from[48], by[48], to[48], id[32];
    if (strcmp(log_value(line, "event", v, sizeof(v)), "transition") ||
        strcmp(log_value(line, "op", v, sizeof(v)), w->op))
        return;
    log_value(line, "what", v, sizeof(v));
    ck_assert_msg(sscanf(v, "agent %31[^:]: %47s --%47[A-Z_]--> %47s", id, from, by, to) == 4, "%s", line);
    ck_assert_msg(log_value(line, "epoch", v, sizeof(v))[0], "%s", line);
    log_value(line, "role", w->role, sizeof(w->role));
    way_add(w, from, to);
}

static void line_of_phases(void *user, char *line)
{
    struct way *w = user;
    char v[512], from[48], to[48];
    if (strcmp(log_value(line, "event", v, sizeof(v)), "phase") || strcmp(log_value(line, "op", v, sizeof(v)), w->op))
        return;
    ck_assert_msg(log_value(line, "epoch", v, sizeof(v))[0] && log_value(line, "why", v, sizeof(v))[0], "%s", line);
    log_value(line, "from", from, sizeof(from));
    way_add(w, from, log_value(line, "to", to, sizeof(to)));
}

static void went(const struct cluster *c, const char *log, const char *op, const char *role, const char *expected)
{
    struct way w = {.op = op};
    char got[1024] = "";
    log_lines(c, log, role ? line_of_machine : line_of_phases, &w);
    for (unsigned i = 0; i < w.n; i++) {
        size_t used = strlen(got);
        snprintf(got + used, sizeof(got) - used, "%s%s", i ? " " : "", w.states[i]);
    }
    ck_assert_msg(strcmp(got, expected) == 0, "%s, operation %s: %s, expected %s", log, op, got, expected);
    ck_assert_msg(w.holds_together, "%s, operation %s: a transition is missing between two lines", log, op);
    ck_assert_msg(!role || strcmp(w.role, role) == 0, "%s, operation %s: role %s, expected %s", log, op, w.role, role);
}

static void says(const struct cluster *c, const char *log, const char *text)
{
    char *all = cluster_read(c, log);
    ck_assert_msg(all && strstr(all, text), "%s/%s does not say \"%s\"", c->dir, log, text);
    free(all);
}

static void waits_to_say(const struct cluster *c, const char *log, const char *text, int timeout_ms)
{
    for (uint64_t end = cluster_now_ms() + (uint64_t)timeout_ms; cluster_now_ms() < end; cluster_sleep_ms(50)) {
        char *all = cluster_read(c, log);
        bool there = all && strstr(all, text);
        free(all);
        if (there)
            return;
    }
    says(c, log, text);
}

static const char *const daemons[] = {"coordinator.log", "agent-0.log", "agent-1.log", "agent-2.log"};

static size_t lines_in_all(const struct cluster *c)
{
    size_t n = 0;
    for (size_t i = 0; i < 4; i++) {
        char *text = cluster_read(c, daemons[i]);
        for (const char *p = text; p && *p; p++)
            n += *p == '\n';
        free(text);
    }
    return n;
}

static void all_is_logfmt(const struct cluster *c)
{
    for (size_t i = 0; i < 4; i++)
        log_lines(c, daemons[i], line_is_logfmt, (void *)(uintptr_t)daemons[i]);
}

#define PHASES_UP                                                                                                      \
    "OPEN PENDING ALLOCATE GROUP_ID GROUP PLAN MAPPING WEIGHTS KV ENGINE_PREPARE PROMISE DECIDE GO RETIRE GRACE FILL "      \
    "FINISH"
#define PHASES_DOWN                                                                                                    \
    "OPEN PENDING GROUP_ID GROUP PLAN MAPPING RETIRE GRACE FILL DRAIN ENGINE_PREPARE PROMISE DECIDE GO LET_GO FINISH"

START_TEST(an_operation_can_be_followed_in_the_log_of_either_daemon)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 3, .loaders = 2, .step_ms = 4});
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "4");
    cluster_sleep_ms(200);
    CTL(&c, 0, "scale", "--to", "3"); /* operation 2 */
    cluster_sleep_ms(500);
    size_t before = lines_in_all(&c);
    cluster_sleep_ms(1500);
    ck_assert_msg(lines_in_all(&c) == before, "serving, and nothing happens, but %zu lines were written; logs in %s",
                  lines_in_all(&c) - before, c.dir);
    CTL(&c, 0, "drain", "gpu0"); /* operation 3: its experts have to move */
    itest_fed(&c);

    went(&c, "agent-0.log", "2", "existing",
         "WAIT_NEW_CORE_ENGINES_INIT CREATE_STANDBY_GROUPS TRANSFER_EXPERT_MAPPING WAIT_NEW_CORE_ENGINES_WEIGHTS_INIT "
         "TRANSFER_WEIGHTS SYNC_KV_CACHE_MEMORY_SIZE SWITCH_AND_PREPARE EPLB_RESHUFFLE COMPLETE");
    went(&c, "agent-2.log", "2", "new", "PRE_KV_INIT PREPARE EPLB_RESHUFFLE COMPLETE");
    went(&c, "agent-1.log", "3", "remaining", "PREPARE EPLB_RESHUFFLE SWITCH_AND_PREPARE COMPLETE");
    went(&c, "agent-2.log", "3", "remaining", "PREPARE EPLB_RESHUFFLE SWITCH_AND_PREPARE COMPLETE");
    went(&c, "agent-0.log", "3", "removing", "PREPARE EPLB_RESHUFFLE COMPLETE");
    went(&c, "coordinator.log", "2", NULL, PHASES_UP);
    went(&c, "coordinator.log", "3", NULL, PHASES_DOWN);

    /* either side tells of the promise, the decision, the bytes */
    says(&c, "agent-0.log", "PROMISE epoch 2 op 2: no step from ");
    says(&c, "agent-0.log", "GO epoch 2 op 2: ");
    says(&c, "agent-0.log", "FLIPPED epoch 2 op 2: ");
    says(&c, "agent-2.log", "work=WEIGHTS op=2 ");
    says(&c, "agent-1.log", "work=FILL op=3 ");
    says(&c, "coordinator.log", "memory for the weights: awaits gpu2\"");
    says(&c, "coordinator.log", "PREPARE epoch 2: lead ");
    says(&c, "coordinator.log", "agent gpu2 promises for epoch 2 to begin no step from 0 on");
    says(&c, "coordinator.log", "epoch 2 is decided: step ");
    says(&c, "coordinator.log", "agent gpu0 has flipped to epoch 2; its engine was held ");
    says(&c, "coordinator.log", "longest hold ");
    all_is_logfmt(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* An engine that never answers `prepare`, and one that dies without a copy elsewhere. */
START_TEST(who_is_awaited_is_said_and_why_it_ended)
{
    struct cluster c;
    struct cluster_options o = {.agents = 3,
                                .loaders = 2,
                                .step_ms = 4,
                                .coordinator_args = {"--slots", "8", "--lead-ms", "100", "--lease-ms", "1500",
                                                     "--heartbeat-ms", "200", "--stage-ms", "2000", NULL}};
    itest_start(&c, o);
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "4");
    kill(c.engine[2], SIGSTOP);
    pid_t scale = cluster_ctl_start(&c, "scale", (const char *[]){"scale", "--to", "3", NULL});
    cluster_sleep_ms(600);
    CTL(&c, 0, "status");
    CTL_SAYS("phase ENGINE_PREPARE for ");
    CTL_SAYS("gpu2, since "); /* its peers as well: they cannot build the communicators without it */
    CTL_SAYS(", for at most 1.");
    ck_assert_int_eq(cluster_wait(&scale, 15000), 6);
    kill(c.engine[2], SIGCONT);
    says(&c, "scale.log",
         "eepctl: operation 2 was aborted and rolled back: no answer from gpu2 in ENGINE_PREPARE by its "
         "deadline");
    char *data = cluster_read(&c, "scale.out");
    ck_assert_msg(data && strstr(data, "operation 2: scale-up to 3 ranks, aborted in "), "%s", data);
    free(data);
    went(&c, "coordinator.log", "2", NULL,
         "OPEN PENDING ALLOCATE GROUP_ID GROUP PLAN MAPPING WEIGHTS KV ENGINE_PREPARE FINISH");
    /* the agents hear of it when eepctl does */
    waits_to_say(&c, "agent-2.log", "operation 2 is aborted: ", 5000);
    waits_to_say(&c, "agent-2.log", "ABORTED", 5000);
    went(&c, "agent-2.log", "2", "new", "PRE_KV_INIT PREPARE ABORTED");
    waits_to_say(&c, "agent-0.log", "operation 2 is aborted: no answer from gpu2 in ENGINE_PREPARE by its deadline",
                 5000);

    cluster_signal(&c.engine[1], SIGKILL);
    waits_to_say(&c, "coordinator.log", "waits for gpu1 (no engine)", 5000);
    for (int i = 0; i < 16; i++) { /* warnings meanwhile do not put it off */
        CTL(&c, 0, "pause");
        CTL(&c, 0, "resume");
        cluster_sleep_ms(500);
    }
    says(&c, "coordinator.log", "event=waiting op=0 "); /* five seconds later, once more */
    says(&c, "coordinator.log", "for=\"gpu1 (no engine)\"");
    says(&c, "agent-1.log", "engine gone: ");
    cluster_engine_start(&c, 1);
    waits_to_say(&c, "coordinator.log", "serving again, ", 10000);
    itest_fed(&c);
    all_is_logfmt(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* A coordinator that has just come back names those it waits for, and until when. */
START_TEST(a_coordinator_that_restarted_says_who_is_away)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 3, .loaders = 2, .step_ms = 4});
    CTL(&c, 0, "scale", "--to", "2");
    kill(c.agent[1], SIGSTOP);
    cluster_signal(&c.coordinator, SIGKILL);
    cluster_coordinator_start(&c);
    cluster_sleep_ms(300);
    CTL(&c, 0, "status");
    CTL_SAYS("serving, away: lost in ");
    kill(c.agent[1], SIGCONT);
    for (int i = 0; i < 100 && strstr(ctl_out, "away"); i++) {
        cluster_sleep_ms(50);
        CTL(&c, 0, "status");
    }
    ck_assert_msg(!strstr(ctl_out, "away"), "%s", ctl_out);
    says(&c, "agent-0.log", "event=coordinator-lost");
    says(&c, "agent-0.log", "event=coordinator-connected");
    all_is_logfmt(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

static void add(TCase *t)
{
    tcase_add_test(t, an_operation_can_be_followed_in_the_log_of_either_daemon);
    tcase_add_test(t, who_is_awaited_is_said_and_why_it_ended);
    tcase_add_test(t, a_coordinator_that_restarted_says_who_is_away);
}

int main(void)
{
    return suite_main("logs", add, 120);
}
