/* eepctl against a real cluster: what it says, and with which exit code. */
#include "tests/integration/itest.h"

#include <poll.h>
#include <pty.h>

START_TEST(wrong_use_gets_a_sentence_and_its_exit_code)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 3, .loaders = 3, .step_ms = 2});
    CTL(&c, 2, "scale");
    CTL(&c, 2, "scale", "--to", "many");
    CTL(&c, 2, "frobnicate");
    CTL(&c, 1, "scale", "--to", "9");
    CTL_SAYS("spare");
    CTL(&c, 0, "scale", "--to", "2");
    CTL(&c, 0, "scale", "--to", "2");
    CTL_SAYS("nothing to do");
    CTL(&c, 1, "scale", "--to", "1");
    CTL_SAYS("cannot hold");
    CTL(&c, 1, "drain", "gpu7");
    CTL_SAYS("gpu7");
    CTL(&c, 1, "abort");
    CTL(&c, 0, "scale", "--to", "3", "--dry-run");
    ck_assert_int_eq(itest_ranks(&c), 2);
    CTL(&c, 0, "version");
    CTL(&c, 0, "agents");
    CTL_SAYS("gpu2");
    CTL(&c, 0, "-o", "json", "status");
    json_t *root = json_loads(ctl_out, JSON_DISABLE_EOF_CHECK, NULL);
    ck_assert(json_is_object(root));
    json_decref(root);
    cluster_signal(&c.coordinator, SIGTERM);
    (void)cluster_wait(&c.coordinator, 5000);
    CTL(&c, 3, "status");
    cluster_coordinator_start(&c);
    cluster_wait_agents(&c, 3, 10000);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

START_TEST(one_operation_at_a_time_and_ctrl_c_detaches)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 3, .loaders = 3, .step_ms = 2});
    CTL(&c, 0, "scale", "--to", "2");
    kill(c.agent[2], SIGSTOP);
    pid_t scale = cluster_ctl_start(&c, "scale", (const char *[]){"scale", "--to", "3", NULL});
    cluster_sleep_ms(300);
    CTL(&c, 7, "scale", "--to", "3");
    CTL_SAYS("is running");
    cluster_signal(&scale, SIGINT);
    (void)cluster_wait(&scale, 5000);
    char *text = cluster_read(&c, "scale.log");
    ck_assert_msg(text && strstr(text, "eepctl watch"), "%s", text);
    free(text);
    CTL(&c, 0, "abort");
    kill(c.agent[2], SIGCONT);
    ck_assert_int_eq(itest_ranks(&c), 2);
    CTL(&c, 0, "scale", "--to", "3", "--wait-for-agents=20");
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* What a script does that is started twice, or that has no time. */
START_TEST(an_operation_can_be_joined_by_its_id_and_waited_for_in_vain)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 3, .loaders = 3, .step_ms = 2});
    CTL(&c, 0, "scale", "--to", "2");
    kill(c.agent[2], SIGSTOP);
    CTL(&c, 5, "scale", "--to", "3", "--operation-id", "night", "--timeout", "0.3");
    CTL_SAYS("stopped waiting");
    CTL(&c, 7, "scale", "--to", "2", "--operation-id", "night");
    CTL_SAYS("belongs to operation 2, a scale to 3");
    CTL(&c, 5, "scale", "--to", "3", "--operation-id", "night", "--timeout", "0.3"); /* the same one, still running */
    CTL(&c, 5, "watch", "2", "--timeout", "0.3");
    kill(c.agent[2], SIGCONT);
    CTL(&c, 0, "scale", "--to", "3", "--operation-id", "night");
    CTL(&c, 0, "scale", "--to", "3", "--operation-id", "night"); /* it has ended */
    CTL_SAYS("operation 2");
    cluster_signal(&c.coordinator, SIGKILL);
    cluster_coordinator_start(&c);
    cluster_wait_agents(&c, 3, 10000);
    CTL(&c, 0, "scale", "--to", "3", "--operation-id", "night"); /* known by the journal */
    CTL_SAYS("operation 2");
    CTL(&c, 7, "scale", "--to", "2", "--operation-id", "night");
    kill(c.agent[1], SIGSTOP);
    CTL(&c, 6, "scale", "--to", "2", "--deadline", "0.3");
    CTL_SAYS("its time-out passed in ");
    kill(c.agent[1], SIGCONT);
    ck_assert_int_eq(itest_ranks(&c), 3);
    CTL(&c, 0, "history");
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

START_TEST(the_store)
{
    struct cluster c;
    struct cluster_options o = {.agents = 0};
    itest_start(&c, o);
    CTL(&c, 0, "kv", "put", "run/lr", "0.1");
    CTL(&c, 0, "kv", "get", "run/lr");
    CTL_SAYS("0.1");
    CTL(&c, 0, "kv", "put", "run/steps", "7");
    CTL(&c, 0, "kv", "list", "run/");
    CTL_SAYS("run/steps");
    CTL(&c, 0, "kv", "del", "run/lr");
    CTL(&c, 1, "kv", "get", "run/lr");
    CTL_SAYS("run/lr");
    CTL(&c, 0, "kv", "add", "run/steps", "35", "--request", "r1");
    CTL(&c, 0, "kv", "add", "run/steps", "35", "--request", "r1");
    CTL_SAYS("42");
    CTL(&c, 7, "kv", "cas", "run/steps", "0", "--missing");
    CTL_SAYS("it is 42");
    CTL(&c, 0, "kv", "cas", "run/steps", "43", "--expect", "42");
    CTL(&c, 2, "kv", "cas", "run/steps", "43");
    CTL(&c, 2, "kv", "add", "run/steps", "many");
    CTL(&c, 0, "kv", "add", "run/down", "-5", "--request", "d1"); /* no option */
    CTL(&c, 0, "kv", "add", "run/down", "--request", "d2", "-3");
    CTL_SAYS("-8");
    CTL(&c, 0, "kv", "add", "run/down", "--", "-1");
    CTL_SAYS("-9");
    CTL(&c, 2, "kv", "add", "run/down", "-5x");
    CTL(&c, 0, "kv", "queue", "push", "q", "item");
    CTL(&c, 0, "kv", "queue", "len", "q");
    CTL(&c, 0, "kv", "queue", "pop", "q");
    CTL_SAYS("item");
    CTL(&c, 1, "kv", "queue", "pop", "q", "--wait", "0.1");
    CTL_SAYS("by the deadline");
    CTL(&c, 2, "kv", "queue", "pop");
    CTL(&c, 0, "kv", "stat");
    CTL_SAYS("durability fsync");
    CTL(&c, 0, "barrier", "list");
    CTL(&c, 1, "barrier", "show", "nobody");
    CTL_SAYS("nobody waits");
    CTL(&c, 0, "kv", "put", "run/e", "1", "--ephemeral");
    /* durable keys come back after kill -9, ephemeral ones do not */
    cluster_signal(&c.coordinator, SIGKILL);
    ck_assert_int_eq(cluster_coordinator_start(&c), 0);
    CTL(&c, 0, "kv", "get", "run/steps");
    CTL_SAYS("43");
    CTL(&c, 1, "kv", "get", "run/e");
    CTL(&c, 1, "kv", "watch", "--from", "1");
    CTL_SAYS("compacted");
    /* a second coordinator on the same state */
    pid_t first = c.coordinator;
    cluster_coordinator_start(&c);
    int code = cluster_wait(&c.coordinator, 5000);
    ck_assert_int_ne(code, 0);
    ck_assert_int_ne(code, -1);
    c.coordinator = first;
    CTL(&c, 0, "kv", "get", "run/steps");
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* ---- what docs/eepctl.md promises of -o json ---- */

static const struct promise {
    const char *args[8];
    const char *keys; /* of the object, or of the first element of the array; separated by blanks */
} promises[] = {
    {{"version"}, "eepctl coordinator"},
    {{"scale", "--to", "2", "--dry-run"}, "op outcome text parties"},
    {{"scale", "--to", "2"},
     "op kind outcome target why epoch bytes_done bytes_planned hold_ns_max phases started_ms ended_ms parties"},
    {{"scale", "--to", "3", "--dry-run"}, "op outcome text parties summary plan"},
    {{"status"}, "cluster view op op_running spares layers logical slots commit_state members"},
    {{"health"}, "ready why"},
    {{"agents"}, "agents"},
    {{"watch"}, "op kind outcome target why epoch bytes_done bytes_planned phases"},
    {{"history"}, "operations"},
    {{"load"},
     "load current dormant entries uneven physical gpus slots_per_rank nodes expert_bytes samples balance balance_samples horizon_ms "
     "window_ms"},
    {{"rebalance", "--dry-run"}, "op outcome text summary plan"},
    {{"rebalance"}, "op kind outcome target why bytes_done bytes_planned hold_ns_max phases started_ms ended_ms parties"},
    {{"drain", "gpu2"}, "op outcome text"}, /* a spare */
    {{"pause", "--reason", "a test"}, "op outcome text"},
    {{"status"}, "paused paused_ms wanted"},
    {{"resume"}, "op outcome text"},
    {{"load"}, "load current dormant entries uneven physical gpus slots_per_rank nodes expert_bytes samples"},
    {{"rebalance"}, "op outcome"},
    {{"verify"}, "slots dense bytes bad text"},
    {{"model", "inspect", QWEN},
     "model_type moe_layers logical_experts expert_bytes dense_bytes parts hidden_layers moe_layer_numbers dense_tensors "
     "mtp_layers mtp_tensors mtp_bytes files bytes ranks"},
    {{"kv", "put", "a/b", "v"}, "revision"},
    {{"kv", "get", "a/b"}, "key value revision"},
    {{"kv", "add", "a/n", "3"}, "value revision"},
    {{"kv", "cas", "a/b", "w", "--expect", "v"}, "swapped value revision"},
    {{"kv", "list", "a/", "--values"}, "key revision size value"},
    {{"kv", "queue", "push", "q", "x"}, "length"},
    {{"kv", "queue", "len", "q"}, "length"},
    {{"kv", "queue", "pop", "q"}, "value left"},
    {{"kv", "stat"}, "keys used_bytes budget_bytes revision first_revision durability disk_waiting_bytes connections"},
    {{"barrier", "list"}, "barriers"},
};

static void promise_keep(struct cluster *c, const struct promise *p)
{
    const char *args[12] = {"-o", "json"};
    size_t n = 2;
    for (size_t i = 0; i < 8 && p->args[i]; i++)
        args[n++] = p->args[i];
    pid_t pid = cluster_ctl_start(c, "json", args);
    int code = cluster_wait(&pid, 30000);
    char *text = cluster_read(c, "json.out");
    json_t *root = text ? json_loads(text, 0, NULL) : NULL; /* one value and nothing else */
    ck_assert_msg(code == 0 && root, "%s %s: exit %d: %s", p->args[0], p->args[1], code, text);
    const json_t *object = json_is_array(root) ? json_array_get(root, 0) : root;
    char keys[512], *save;
    snprintf(keys, sizeof(keys), "%s", p->keys);
    for (char *key = strtok_r(keys, " ", &save); key; key = strtok_r(NULL, " ", &save))
        ck_assert_msg(json_object_get(object, key), "%s %s has no \"%s\": %s", p->args[0], p->args[1], key, text);
    json_decref(root);
    free(text);
}

START_TEST(json_has_the_keys_that_are_documented)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 3, .loaders = 3, .step_ms = 2});
    for (size_t i = 0; i < sizeof(promises) / sizeof(promises[0]); i++)
        promise_keep(&c, &promises[i]);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* ---- terminals ---- */

/* Runs eepctl on a terminal of its own (or not, fd 1 and 2 being a pipe) and reads what it writes for at most 3 s. */
static void on_terminal(struct cluster *c, bool terminal, const char *no_color, const char *arg)
{
    int fds[2] = {-1, -1};
    size_t n = 0;
    ck_assert(terminal || pipe(fds) == 0);
    pid_t pid = terminal ? forkpty(&fds[0], NULL, NULL, NULL) : fork();
    if (pid == 0) {
        char path[320];
        snprintf(path, sizeof(path), "%s/eepctl", c->bin);
        setenv("TERM", "xterm", 1);
        unsetenv("NO_COLOR");
        if (no_color)
            setenv("NO_COLOR", no_color, 1);
        if (!terminal) {
            dup2(fds[1], 1);
            dup2(fds[1], 2);
        }
        execl(path, "eepctl", "-c", c->address, "status", arg, (char *)NULL);
        _exit(127);
    }
    ck_assert_int_gt(pid, 0);
    if (!terminal)
        close(fds[1]);
    struct pollfd p = {.fd = fds[0], .events = POLLIN};
    for (uint64_t end = cluster_now_ms() + 3000; cluster_now_ms() < end && n + 1 < sizeof(ctl_out);) {
        ssize_t got = poll(&p, 1, 100) > 0 ? read(fds[0], ctl_out + n, sizeof(ctl_out) - 1 - n) : 0;
        if (got < 0 || (got == 0 && p.revents))
            break;
        n += (size_t)got;
    }
    ctl_out[n] = '\0';
    kill(pid, SIGKILL);
    (void)cluster_wait(&pid, 5000);
    close(fds[0]);
}

START_TEST(colours_and_watching)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 1, .loaders = 1, .step_ms = 2, .coordinator_args = {"--slots", "16"}});
    CTL(&c, 0, "scale", "--to", "1");
    on_terminal(&c, true, NULL, NULL);
    CTL_SAYS("\033[32mserving\033[0m");
    on_terminal(&c, true, "", NULL); /* set, but empty: not meant */
    CTL_SAYS("\033[32mserving");
    on_terminal(&c, true, "1", NULL);
    CTL_SAYS("serving");
    ck_assert_ptr_null(strchr(ctl_out, '\033'));
    on_terminal(&c, false, NULL, NULL);
    CTL_SAYS("serving");
    ck_assert_ptr_null(strchr(ctl_out, '\033'));
    on_terminal(&c, false, NULL, "--watch=0.2"); /* several times, and no control characters */
    char *first = strstr(ctl_out, "cluster eep:");
    ck_assert_msg(first && strstr(first + 1, "cluster eep:"), "%s", ctl_out);
    ck_assert_ptr_null(strchr(ctl_out, '\033'));

    /* through a restart of the coordinator */
    pid_t watch = cluster_ctl_start(&c, "watch", (const char *[]){"status", "--watch=0.1", NULL});
    cluster_sleep_ms(500);
    cluster_signal(&c.coordinator, SIGKILL);
    cluster_sleep_ms(500);
    ck_assert_int_eq(cluster_coordinator_start(&c), 0);
    cluster_wait_agents(&c, 1, 20000);
    cluster_sleep_ms(500);
    ck_assert_int_eq(cluster_wait(&watch, 0), -1); /* it goes on */
    cluster_signal(&watch, SIGKILL);
    char *lost = cluster_read(&c, "watch.log");
    ck_assert_msg(lost && strstr(lost, "lost the coordinator"), "%s", lost);
    free(lost);
    CTL(&c, 2, "status", "--watch=-1");
    CTL(&c, 0, "help");
    CTL_SAYS("Commands:");
    CTL(&c, 0, "help", "drain");
    CTL_SAYS("eepctl drain gpu1");
    CTL(&c, 2, "help", "drian");
    CTL_SAYS("did you mean 'drain'?");
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

static void add(TCase *t)
{
    tcase_add_test(t, wrong_use_gets_a_sentence_and_its_exit_code);
    tcase_add_test(t, one_operation_at_a_time_and_ctrl_c_detaches);
    tcase_add_test(t, an_operation_can_be_joined_by_its_id_and_waited_for_in_vain);
    tcase_add_test(t, the_store);
    tcase_add_test(t, json_has_the_keys_that_are_documented);
    tcase_add_test(t, colours_and_watching);
}

int main(void)
{
    return suite_main("eepctl", add, 120);
}
