/* The journal's file at every edge of its writing, and damaged: a process of its own writes epochs with the faults of
 * tests/harness/fault_disk.c preloaded, and says which of them are durable; here the file is opened again.  What was
 * acknowledged is there, every write is there as a whole or not at all, and a file that is broken is refused with a
 * sentence. */
#include <check.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "coordinator/journal.h"
#include "tests/harness/suite.h"

#define EPOCHS 12 /* of one run */
#define EXIT_REFUSED 3 /* of the writer: the journal says that it cannot write */

static char dir[64], self[256], library[320];

static void setup(void)
{
    strcpy(dir, "/tmp/eep-journal-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
}

static void teardown(void)
{
    char command[96];
    snprintf(command, sizeof command, "rm -rf '%s'", dir);
    ck_assert_int_eq(system(command), 0);
}

/* ---- the writer: this program, started again ---- */

static int durable_of(uint64_t epoch, struct durable *ret_durable)
{
    *ret_durable = (struct durable){.epoch = epoch, .map_version = epoch, .view = view_new(2)};
    if (!ret_durable->view)
        return ERR_NOMEM;
    ret_durable->view->epoch = epoch;
    for (uint32_t i = 0; i < 2; i++) {
        snprintf(ret_durable->view->members[i].id, sizeof ret_durable->view->members[i].id, "gpu%u", i);
        ret_durable->view->members[i].incarnation = epoch;
    }
    return 0;
}

/* Each epoch that is durable goes to standard output. */
static int writer_main(const char *state)
{
    struct journal *j;
    struct durable found;
    struct err err = {0};
    bool any;
    if (journal_open(state, "test", &j, &err) < 0 || journal_load(j, &found, &any, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        return EXIT_REFUSED;
    }
    uint64_t epoch = found.epoch, last = epoch + EPOCHS;
    durable_done(&found);
    while (epoch++ < last) {
        struct durable d;
        if (durable_of(epoch, &d) < 0)
            return 1;
        int rc = journal_write(j, &d, DURABLE_META | DURABLE_VIEW, &err);
        if (rc < 0 && journal_write(j, &d, DURABLE_META | DURABLE_VIEW, NULL) == 0)
            return 1; /* after a failure nothing more may be written */
        durable_done(&d);
        if (rc < 0) {
            fprintf(stderr, "%s\n", err.text);
            return EXIT_REFUSED;
        }
        if (write(1, &epoch, sizeof epoch) != sizeof epoch)
            return 1;
    }
    journal_close(j);
    return 0;
}

/* The highest epoch that it said is durable, `acked` when none.  fault: of fault_disk.c; NULL = none. */
static uint64_t writer_run(const char *fault, uint64_t acked, int *ret_status)
{
    int fds[2];
    ck_assert_int_eq(pipe(fds), 0);
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        char options[512];
        const char *asan = getenv("ASAN_OPTIONS"); /* a sanitizer wants to be first */
        snprintf(options, sizeof options, "%s:verify_asan_link_order=0", asan ? asan : "");
        setenv("ASAN_OPTIONS", options, 1);
        if (fault) {
            setenv("LD_PRELOAD", library, 1);
            setenv("EEP_FAULT", fault, 1);
        }
        dup2(fds[1], 1);
        int null = open("/dev/null", O_WRONLY);
        dup2(null, 2);
        execl(self, self, "write", dir, (char *)NULL);
        _exit(1);
    }
    close(fds[1]);
    while (read(fds[0], &acked, sizeof acked) == sizeof acked)
        ;
    close(fds[0]);
    ck_assert_int_eq(waitpid(child, ret_status, 0), child);
    return acked;
}

/* ---- every edge ---- */

/* The epoch that the file has; it opens, and its parts are of one write. */
static uint64_t reopened(const char *fault)
{
    struct journal *j;
    struct durable d;
    struct err err = {0};
    bool found;
    int rc = journal_open(dir, "test", &j, &err);
    if (rc == 0)
        rc = journal_load(j, &d, &found, &err);
    ck_assert_msg(rc == 0, "%s: %s", fault, err.text);
    uint64_t epoch = d.epoch;
    if (found) {
        ck_assert_ptr_nonnull(d.view);
        ck_assert_msg(d.view->epoch == epoch && d.map_version == epoch && d.view->members[1].incarnation == epoch,
                      "%s: parts of epochs %llu and %llu", fault, (unsigned long long)epoch,
                      (unsigned long long)d.view->epoch);
    }
    durable_done(&d);
    journal_close(j);
    return epoch;
}

START_TEST(every_edge_of_the_file)
{
    static const struct {
        const char *call, *what;
        bool dies;
    } edges[] = {{"write", "kill-before", true}, {"write", "kill-after", true}, {"write", "short", false},
                 {"write", "torn", true},        {"write", "enospc", false},    {"write", "eio", false},
                 {"sync", "kill-before", true},  {"sync", "kill-after", true},  {"sync", "eio", false}};
    unsigned hits = 0;
    uint64_t acked = 0;
    for (unsigned n = 1; n <= 14; n++) {
        char fault[64];
        int status;
        uint64_t before = acked;
        snprintf(fault, sizeof fault, "journal.mdb:%s:%u:%s", edges[_i].call, n, edges[_i].what);
        acked = writer_run(fault, acked, &status);
        bool killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
        bool refused = WIFEXITED(status) && WEXITSTATUS(status) == EXIT_REFUSED;
        bool through = WIFEXITED(status) && WEXITSTATUS(status) == 0; /* fewer calls than that were made */
        ck_assert_msg(through || (edges[_i].dies ? killed : refused), "%s: status %x", fault, status);
        hits += !through;
        uint64_t there = reopened(fault);
        ck_assert_msg(there >= acked, "%s: epoch %llu was acknowledged, the file has %llu", fault, (unsigned long long)acked,
                      (unsigned long long)there);
        ck_assert_msg(there <= before + EPOCHS, "%s: epoch %llu was never written", fault, (unsigned long long)there);
        acked = there;
    }
    ck_assert_uint_ge(hits, 10);
    int status; /* and it goes on */
    ck_assert_uint_eq(writer_run(NULL, acked, &status), acked + EPOCHS);
}
END_TEST

/* ---- damage ---- */

/* Opens and loads in a process of its own.  0: it was served; 1: refused with a sentence; else it crashed. */
static int opened_apart(void)
{
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        struct journal *j;
        struct durable d;
        struct err err = {0};
        bool found;
        int rc = journal_open(dir, "test", &j, &err);
        if (rc == 0)
            rc = journal_load(j, &d, &found, &err);
        _exit(rc == 0 ? 0 : err.text[0] ? 1 : 2);
    }
    int status;
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 100 + WTERMSIG(status);
}

START_TEST(damaged_files)
{
    char path[96];
    int status;
    (void)writer_run(NULL, 0, &status);
    ck_assert_int_eq(status, 0);
    snprintf(path, sizeof path, "%s/journal.mdb", dir);
    int fd = open(path, O_RDWR);
    struct stat st;
    ck_assert_int_eq(fstat(fd, &st), 0);
    size_t size = (size_t)st.st_size;
    uint8_t *whole = malloc(size);
    ck_assert_int_eq(pread(fd, whole, size, 0), (ssize_t)size);
    ck_assert_uint_gt(size, 4 * 4096);

    /* a torn tail: LMDB's two meta pages and nothing of the data, then half a page of it */
    for (size_t keep = 2 * 4096; keep < 4 * 4096; keep += 2048) {
        ck_assert_int_eq(ftruncate(fd, (off_t)keep), 0);
        ck_assert_msg(opened_apart() == 1, "cut to %zu bytes", keep);
        ck_assert_int_eq(pwrite(fd, whole, size, 0), (ssize_t)size);
    }
    /* any byte anywhere: refused with a sentence or served, never a crash */
    uint64_t state = 4711;
    for (int i = 0; i < 120; i++) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        size_t place = (size_t)(state >> 20) % size;
        uint8_t flipped = whole[place] ^ (uint8_t)(1u << i % 8);
        ck_assert_int_eq(pwrite(fd, &flipped, 1, (off_t)place), 1);
        int rc = opened_apart();
        ck_assert_msg(rc == 0 || rc == 1, "byte %zu flipped: %d", place, rc);
        ck_assert_int_eq(ftruncate(fd, 0), 0);
        ck_assert_int_eq(pwrite(fd, whole, size, 0), (ssize_t)size);
    }
    ck_assert_int_eq(opened_apart(), 0);
    /* every place that has a member's name: one of them is what is read, the others are of pages that are free */
    int refused = 0;
    for (uint8_t *at = whole; (at = memmem(at, size - (size_t)(at - whole), "gpu1", 4)); at += 4) {
        ck_assert_int_eq(pwrite(fd, "gpX1", 4, at - whole), 4);
        int rc = opened_apart();
        ck_assert_msg(rc == 0 || rc == 1, "byte %zd: %d", at - whole, rc);
        refused += rc == 1;
        ck_assert_int_eq(pwrite(fd, whole, size, 0), (ssize_t)size);
    }
    ck_assert_int_ge(refused, 1);
    close(fd);
    free(whole);
}
END_TEST

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "write") == 0)
        return writer_main(argv[2]);
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n < 0)
        return 1;
    self[n] = '\0';
    snprintf(library, sizeof library, "%.*s/fault_disk.so", (int)(strrchr(self, '/') - self), self);
    Suite *suite = suite_create("journal-faults");
    TCase *tc = tcase_create("faults");
    tcase_set_timeout(tc, 120);
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_loop_test(tc, every_edge_of_the_file, 0, 9);
    tcase_add_test(tc, damaged_files);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
