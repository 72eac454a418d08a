/* Experts that lost their last copy are read again by the ranks that are left - from the checkpoint, out of the memory of an
 * agent without an engine, from another agent's checkpoint - and the view serves on with every token right.  With the real daemons under load; nobody starts again what was killed. */
#include <fcntl.h>
#include <unistd.h>

#include "tests/integration/itest.h"

/* A copy of the checkpoint that a test may spoil, on a disk that can be taken away. */
struct disk {
    char dir[64], path[128], away[160];
};

static void disk_make(struct disk *d)
{
    char command[600];
    strcpy(d->dir, "/tmp/eep-reload-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(d->dir));
    snprintf(d->path, sizeof d->path, "%s/model", d->dir);
    snprintf(d->away, sizeof d->away, "%s.away", d->path);
    snprintf(command, sizeof command, "cp -r %s %s && chmod -R u+w %s", QWEN, d->path, d->path);
    ck_assert_int_eq(system(command), 0);
}

static void disk_done(const struct disk *d)
{
    char command[256];
    snprintf(command, sizeof command, "rm -r %s", d->dir);
    ck_assert_int_eq(system(command), 0);
}

static void serves_all_from(struct cluster *c, int ranks, const char *from)
{
    itest_wait_ranks(c, ranks, 20000);
    CTL(c, 0, "verify");
    cluster_sleep_ms(300);
    itest_fed(c);
    CTL(c, 0, "history", "--phases");
    CTL_SAYS("serving again with");
    CTL_SAYS("RELOAD");
    char *log = cluster_read(c, "coordinator.log");
    char said[128];
    snprintf(said, sizeof said, "that lost their last copy are read again %s", from);
    ck_assert_msg(log && strstr(log, said), "logs in %s", c->dir);
    snprintf(said, sizeof said, "experts again %s", from);
    ck_assert(strstr(log, said));
    free(log);
}

static void serves_all(struct cluster *c, int ranks)
{
    serves_all_from(c, ranks, "from the checkpoint");
}

START_TEST(what_two_dead_ranks_held_is_read_again)
{
    struct cluster c;
    itest_serve_four(&c, (struct cluster_options){0});
    itest_kill_two(&c);
    serves_all(&c, 2);
    CTL(&c, 0, "status");
    ck_assert_msg(!strstr(ctl_out, "degraded"), "%s", ctl_out);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* The agent has the bytes, but no engine comes.  There is no checkpoint any more that anybody could read. */
START_TEST(out_of_the_memory_of_an_agent_whose_engine_does_not_come_back)
{
    struct cluster c;
    struct disk disk;
    disk_make(&disk);
    itest_serve_four(&c, (struct cluster_options){.model = disk.path, .coordinator_args = {"--reload-after-ms", "1000", NULL}});
    disk_done(&disk);
    kill(c.agent[1], SIGSTOP);
    itest_kill_rank(&c, 3);
    cluster_signal(&c.engine[1], SIGKILL);
    kill(c.agent[1], SIGCONT);
    serves_all_from(&c, 2, "out of the memory of agents that do not serve");
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* The rank with the checkpoint has no room for all of them, the one with room has no checkpoint. */
START_TEST(from_the_checkpoint_of_another_agent)
{
    struct cluster c;
    itest_serve_four(&c, (struct cluster_options){.loaders = 2});
    itest_kill_two(&c);
    serves_all(&c, 2);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* A certificate that is good for every agent. */
static void issue(const char *dir)
{
    char command[1024];
    snprintf(command, sizeof command,
             "systemd/eep-ca init %s && cd %s && openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout key "
             "-out csr -subj /CN=agents 2>/dev/null && printf 'subjectAltName=URI:eep://eep/agent/gpu0,URI:eep://eep/agent/gpu1,"
             "URI:eep://eep/agent/gpu2,URI:eep://eep/agent/gpu3' >ext && openssl x509 -req -in csr -CA ca.crt -CAkey ca.key "
             "-CAcreateserial -days 2 -extfile ext -out crt 2>/dev/null", dir, dir);
    ck_assert_int_eq(system(command), 0);
}

START_TEST(from_another_agent_by_tls)
{
    struct cluster c;
    char dir[64] = "/tmp/eep-reload-XXXXXX", cert[128], key[128], ca[128], command[128];
    ck_assert_ptr_nonnull(mkdtemp(dir));
    issue(dir);
    snprintf(cert, sizeof cert, "%s/crt", dir);
    snprintf(key, sizeof key, "%s/key", dir);
    snprintf(ca, sizeof ca, "%s/ca.crt", dir);
    itest_serve_four(&c, (struct cluster_options){.loaders = 2, .agent_args = {"--tls-cert", cert, "--tls-key", key, "--tls-ca", ca, NULL}});
    itest_kill_two(&c);
    serves_all(&c, 2);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
    snprintf(command, sizeof command, "rm -r %s", dir);
    ck_assert_int_eq(system(command), 0);
}
END_TEST

/* Requests answered so far, right or wrong. */
static double answered(struct cluster *c)
{
    char *text = cluster_read(c, "feeder.json");
    json_t *r = text ? json_loads(text, 0, NULL) : NULL;
    double n = json_number_value(json_object_get(r, "completed")) + json_number_value(json_object_get(r, "wrong"));
    free(text);
    json_decref(r);
    return n;
}

static void wait_answers(struct cluster *c, double more)
{
    double before = answered(c);
    for (int i = 0; i < 200 && answered(c) < before + more; i++)
        cluster_sleep_ms(50);
    ck_assert_msg(answered(c) >= before + more, "%.0f answers, %.0f before; logs in %s", answered(c), before, c->dir);
}

static void wait_restored(struct cluster *c)
{
    for (int i = 0; i < 200; i++) {
        CTL(c, 0, "history");
        if (strstr(ctl_out, "masked experts are served again"))
            break;
        cluster_sleep_ms(50);
    }
    CTL_SAYS("masked experts are served again");
    CTL(c, 0, "status");
    ck_assert_msg(!strstr(ctl_out, "degraded"), "%s; logs in %s", ctl_out, c->dir);
}

/* What was answered meanwhile is not the reference's; from now on everything is. */
static void right_again(struct cluster *c)
{
    CTL(c, 0, "verify");
    (void)cluster_feeder_stop(c, 60000);
    itest_feed(c, "4");
    cluster_sleep_ms(500);
    itest_fed(c);
    ck_assert_int_eq(cluster_stop(c, false), 0);
}

/* 2 ranks of 4 are left, and serve without experts: the disk is away. */
static void serve_masked(struct cluster *c, const struct disk *d, const char *dispatch)
{
    itest_serve_four(c, (struct cluster_options){
                 .model = d->path,
                 .dispatch = dispatch,
                 .coordinator_args = {"--on-lost-experts", "mask", "--lease-ms", "3000", NULL}});
    ck_assert_int_eq(rename(d->path, d->away), 0);
    itest_kill_two(c);
    itest_wait_ranks(c, 2, 20000);
    itest_wait_status(c, "experts (of all layers), which are masked", 10000);
}

/* The disk with the checkpoint is away: until it is back, also over a restart of the coordinator, the others are served; also
 * where every rank routes every token, and an engine is lost and comes back meanwhile. */
START_TEST(by_policy_the_view_serves_on_without_them)
{
    struct cluster c;
    struct disk disk;
    disk_make(&disk);
    serve_masked(&c, &disk, _i ? "replicated" : "source");
    wait_answers(&c, 8);
    CTL(&c, 7, "scale", "--to", "1");
    CTL_SAYS("until they have been read again");
    cluster_signal(&c.engine[2], SIGKILL);
    ck_assert_int_eq(cluster_engine_start(&c, 2), 0);
    wait_answers(&c, 8);
    itest_wait_status(&c, "experts (of all layers), which are masked", 10000);
    cluster_signal(&c.coordinator, SIGKILL);
    ck_assert_int_eq(rename(disk.away, disk.path), 0);
    ck_assert_int_eq(cluster_coordinator_start(&c), 0);
    wait_restored(&c);
    wait_answers(&c, 8);
    right_again(&c);
    disk_done(&disk);
}
END_TEST

/* While they are read, which takes long because an agent stands still, an operator aborts, or pauses operations and the
 * coordinator is lost: a pause is for what operators ask for, as with a repair. */
START_TEST(masked_experts_come_back_whatever_happens_meanwhile)
{
    struct cluster c;
    struct disk disk;
    disk_make(&disk);
    serve_masked(&c, &disk, NULL);
    kill(c.agent[0], SIGSTOP);
    itest_wait_status(&c, "awaited: gpu0", 10000);
    CTL_SAYS("masked until they have been read again");
    ck_assert_int_eq(rename(disk.away, disk.path), 0);
    if (_i) {
        CTL(&c, 0, "pause", "--reason", "a try");
        cluster_signal(&c.coordinator, SIGKILL);
        ck_assert_int_eq(cluster_coordinator_start(&c), 0);
    } else {
        CTL(&c, 0, "abort");
    }
    kill(c.agent[0], SIGCONT);
    wait_restored(&c);
    if (_i) {
        CTL(&c, 7, "scale", "--to", "1");
        CTL_SAYS("operations are paused");
        CTL(&c, 0, "resume");
    }
    right_again(&c);
    disk_done(&disk);
}
END_TEST

/* It is held, and with it the view, until nothing is masked any more; it never gets a token wrong. */
START_TEST(an_engine_that_cannot_do_without_is_not_given_a_masked_view)
{
    struct cluster c;
    struct disk disk;
    disk_make(&disk);
    serve_masked(&c, &disk, NULL);
    cluster_signal(&c.engine[0], SIGKILL);
    c.options.engine_args[0] = "--no-masks";
    ck_assert_int_eq(cluster_engine_start(&c, 0), 0);
    itest_wait_status(&c, "no copy on the 2 ranks that are left", 20000);
    double before = answered(&c);
    cluster_sleep_ms(1500);
    ck_assert_msg(answered(&c) <= before + 8, "%.0f answers, %.0f before: it serves", answered(&c), before);
    ck_assert_int_eq(rename(disk.away, disk.path), 0);
    itest_wait_ranks(&c, 2, 20000);
    CTL(&c, 0, "status");
    ck_assert_msg(!strstr(ctl_out, "masked"), "%s", ctl_out);
    right_again(&c);
    disk_done(&disk);
}
END_TEST

/* The option that waits for whoever had them, however long. */
START_TEST(by_policy_nothing_is_read_again)
{
    struct cluster c;
    itest_serve_four(&c, (struct cluster_options){.coordinator_args = {"--reload-after-ms", "0", NULL}});
    itest_kill_two(&c);
    itest_wait_status(&c, "no copy on the 2 ranks that are left", 10000);
    cluster_sleep_ms(500);
    ck_assert_int_eq(itest_ranks(&c), 4);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

START_TEST(without_room_the_view_waits_and_says_so)
{
    struct cluster c;
    itest_serve_four(&c, (struct cluster_options){0});
    kill(c.agent[1], SIGSTOP);
    kill(c.agent[2], SIGSTOP);
    itest_kill_rank(&c, 3);
    itest_kill_rank(&c, 2);
    itest_kill_rank(&c, 1);
    itest_wait_status(&c, "there is no room for", 10000);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* The file is another one meanwhile: that is seen by the digests, said, and nothing of it is served. */
START_TEST(a_checkpoint_that_was_changed_is_not_read_again)
{
    struct cluster c;
    struct disk disk;
    char command[512];
    disk_make(&disk);
    itest_serve_four(&c, (struct cluster_options){.model = disk.path});
    snprintf(command, sizeof command,
             "for f in %s/*.safetensors; do s=$(stat -c %%s $f); "
             "dd if=/dev/urandom of=$f bs=4096 seek=$((s / 8192)) count=$((s / 8192)) conv=notrunc status=none; done",
             disk.path);
    ck_assert_int_eq(system(command), 0);
    itest_kill_two(&c);
    for (int i = 0; i < 100; i++) {
        CTL(&c, 0, "history");
        if (strstr(ctl_out, "is not what the model was started with"))
            break;
        cluster_sleep_ms(100);
    }
    CTL_SAYS("cannot read experts again");
    CTL_SAYS("is not what the model was started with");
    itest_wait_status(&c, "no copy on the 2 ranks that are left", 10000);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
    disk_done(&disk);
}
END_TEST

static void add(TCase *t)
{
    tcase_add_test(t, what_two_dead_ranks_held_is_read_again);
    tcase_add_test(t, out_of_the_memory_of_an_agent_whose_engine_does_not_come_back);
    tcase_add_test(t, from_the_checkpoint_of_another_agent);
    tcase_add_test(t, from_another_agent_by_tls);
    tcase_add_loop_test(t, by_policy_the_view_serves_on_without_them, 0, 2);
    tcase_add_loop_test(t, masked_experts_come_back_whatever_happens_meanwhile, 0, 2);
    tcase_add_test(t, an_engine_that_cannot_do_without_is_not_given_a_masked_view);
    tcase_add_test(t, by_policy_nothing_is_read_again);
    tcase_add_test(t, without_room_the_view_waits_and_says_so);
    tcase_add_test(t, a_checkpoint_that_was_changed_is_not_read_again);
}

int main(void)
{
    return suite_main("reload", add, 120);
}
