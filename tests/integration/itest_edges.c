/* The table of wrong use: what an operator, a stranger, a checkpoint or a disk can get wrong while a cluster serves.
 *
 * Each row is one mistake: it gets one sentence that says what, where and what to do, and its exit code.  Requests are
 * served all along with the right tokens, no row changes the ranks, and at the end no daemon has one descriptor more.
 */
#include "tests/integration/itest.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

#include "tests/harness/caller.h"

static struct cluster c;
static char said[65536];
static int port; /* held by us: in use */

/* A command line with %D = the cluster's folder, %A = its coordinator's address, %P = a port in use, %B = the programs'
 * folder; not quoted otherwise. */
static void expand(const char *text, char *out, size_t size)
{
    size_t n = 0;
    for (; *text && n + 1 < size; text++) {
        if (*text != '%') {
            out[n++] = *text;
            continue;
        }
        switch (*++text) {
        case 'D':
            n += (size_t)snprintf(out + n, size - n, "%s", c.dir);
            break;
        case 'A':
            n += (size_t)snprintf(out + n, size - n, "%s", c.address);
            break;
        case 'P':
            n += (size_t)snprintf(out + n, size - n, "%d", port);
            break;
        default:
            n += (size_t)snprintf(out + n, size - n, "%s", c.bin);
            break;
        }
    }
    out[n < size ? n : size - 1] = '\0';
}

/* The exit code, or -1 when the program had to be ended: it had found nothing wrong, or goes on trying. */
static int run(const char *command)
{
    char text[1024], line[1600];
    expand(command, text, sizeof(text));
    bool shell = strncmp(text, "sh ", 3) == 0;
    snprintf(line, sizeof(line), "EEP_COORDINATOR=%s exec timeout -k 5 2 %s%s%s 2>&1 </dev/null", c.address,
             shell ? "" : c.bin, shell ? "" : "/", text);
    FILE *p = popen(line, "r");
    ck_assert_ptr_nonnull(p);
    said[fread(said, 1, sizeof(said) - 1, p)] = '\0';
    char *to = said;
    for (const char *from = said; *from; from++) /* a log quotes */
        if (*from != '\\')
            *to++ = *from;
    *to = '\0';
    int status = pclose(p), code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    return code == 124 ? -1 : code;
}

struct row {
    const char *mistake, *command;
    int code;
    const char *says;
};

static void rows_run(const struct row *rows, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        int code = run(rows[i].command);
        ck_assert_msg(code == rows[i].code, "%s: %s: exit %d, not %d: %s", rows[i].mistake, rows[i].command, code,
                      rows[i].code, said);
        ck_assert_msg(strstr(said, rows[i].says) != NULL, "%s: %s: not said: \"%s\", but: %s", rows[i].mistake,
                      rows[i].command, rows[i].says, said);
        /* eepctl says it in one line; a usage error may point to --help in a second one */
        char *first = strchr(said, '\n');
        if (strncmp(rows[i].command, "eepctl", 6) == 0 && code != 0)
            ck_assert_msg(first && (first[1] == '\0' || (code == 2 && !strchr(first + 1, '\n')[1])), "%s: %s",
                          rows[i].mistake, said);
    }
}
#define ROWS(rows) rows_run(rows, sizeof(rows) / sizeof((rows)[0]))

/* ---- checkpoints: a good one of one tensor an expert, and what can be wrong with it ---- */

static FILE *checkpoint_file(const char *folder, const char *name)
{
    char path[256];
    snprintf(path, sizeof(path), "%s/%s", c.dir, folder);
    (void)mkdir(path, 0700);
    snprintf(path, sizeof(path), "%s/%s/%s", c.dir, folder, name);
    FILE *f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    return f;
}

static void checkpoint_write(const char *folder, const char *header, uint64_t header_len, size_t data)
{
    FILE *f = checkpoint_file(folder, "config.json");
    fputs("{\"num_experts\": 2, \"num_hidden_layers\": 1}", f);
    fclose(f);
    f = checkpoint_file(folder, "model.safetensors");
    fwrite(&header_len, sizeof(header_len), 1, f);
    fputs(header, f);
    for (size_t i = 0; i < data; i++)
        fputc((int)i, f);
    fclose(f);
}

#define TENSOR(name, dtype, shape, from, to)                                                                           \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #from "," #to "]}"
#define EXPERT(e, dtype, shape, from, to) TENSOR("m.layers.0.mlp.experts." #e ".w1.weight", dtype, shape, from, to)

static const struct damage {
    const char *name, *header;
    uint64_t header_len; /* 0: the true one */
    size_t data;
    const char *says;
} damages[] = {
    {"truncated", "{" EXPERT(0, "U8", "[2]", 0, 2) "," EXPERT(1, "U8", "[2]", 2, 4) "}", 0, 3, "the file is truncated"},
    {"cut-in-header", "{" EXPERT(0, "U8", "[2]", 0, 2), 5000, 0, "it is truncated"},
    {"huge-length", "{}", UINT64_MAX, 0, "this is no safetensors file"},
    {"overlap", "{" EXPERT(0, "U8", "[2]", 0, 2) "," EXPERT(1, "U8", "[2]", 1, 3) "}", 0, 3, "overlap at byte 1"},
    {"out-of-range", "{" EXPERT(0, "U8", "[2]", 0, 2) "," EXPERT(1, "U8", "[2]", 900, 902) "}", 0, 4,
     "ends at byte 902"},
    {"unknown-dtype", "{" EXPERT(0, "U9", "[2]", 0, 2) "}", 0, 2, "has unknown dtype \"U9\""},
    {"duplicate-keys", "{" EXPERT(0, "U8", "[2]", 0, 2) "," EXPERT(0, "U8", "[2]", 0, 2) "}", 0, 2,
     "duplicate object key"},
    {"invalid-utf8", "{" TENSOR("\xc3\x28", "U8", "[2]", 0, 2) "}", 0, 2, "unable to decode byte 0xc3"},
    {"expert-lacks",
     "{" EXPERT(0, "U8", "[2]", 0, 2) "," EXPERT(1, "U8", "[2]", 2, 4) "," TENSOR(
         "m.layers.0.mlp.experts.0.w2.weight", "U8", "[2]", 4,
         6) "," TENSOR("m.layers.0.mlp.experts.2.w1.weight", "U8", "[2]", 6,
                       8) "," TENSOR("m.layers.0.mlp.experts.2.w2.weight", "U8", "[2]", 8, 10) "}",
     0, 10, "layer 0: expert 1 has no tensor \"m.layers.0.mlp.experts.1.w2.weight\""},
    {"unequal", "{" EXPERT(0, "U8", "[2]", 0, 2) "," EXPERT(1, "U8", "[2,1]", 2, 4) "}", 0, 4,
     "the experts of a layer must be alike"},
    {"config-differs", "{" EXPERT(0, "U8", "[2]", 0, 2) "}", 0, 2, "num_experts is 2, but the layers have 1"},
};

static void damaged_checkpoints(void)
{
    char command[512];
    for (size_t i = 0; i < sizeof(damages) / sizeof(damages[0]); i++) {
        const struct damage *d = &damages[i];
        checkpoint_write(d->name, d->header, d->header_len ? d->header_len : strlen(d->header), d->data);
        const struct row rows[] = {{d->name, command, 1, d->says}, {d->name, command, 1, d->name}};
        snprintf(command, sizeof(command), "eep-agent --id gpu9 --engine-socket %%D/nine.sock --checkpoint %%D/%s",
                 d->name);
        ROWS(rows);
        snprintf(command, sizeof(command), "eepctl model inspect %%D/%s", d->name);
        ROWS(rows);
    }
    checkpoint_write("good", "{" EXPERT(0, "U8", "[2]", 0, 2) "," EXPERT(1, "U8", "[2]", 2, 4) "}",
                     strlen("{" EXPERT(0, "U8", "[2]", 0, 2) "," EXPERT(1, "U8", "[2]", 2, 4) "}"), 4);
    static const struct row good[] = {{"none", "eepctl model inspect %D/good", 0, "2 in each of 1 MoE layers"}};
    ROWS(good);
}

/* ---- commands ---- */

static const struct row commands[] = {
    {"beyond the spare agents", "eepctl scale --to 9", 1, "spare"},
    {"below the experts' capacity", "eepctl scale --to 1", 1, "cannot hold"},
    {"to the present size", "eepctl scale --to 2", 0, "nothing to do"},
    {"an unknown agent leaves", "eepctl drain gpu7", 1, "gpu7"},
    {"an agent leaves a growing view", "eepctl scale --to 3 --remove gpu1", 2, "when the number of ranks goes down"},
    {"nothing to abort", "eepctl abort", 1, "no such operation is running"},
    {"an unknown operation", "eepctl watch 4711", 1, "4711"},
    {"an unknown option", "eepctl scale --too 3", 2, "--too"},
    {"a number that is none", "eepctl scale --to 3x", 2, "whole number"},
    {"a missing argument", "eepctl drain", 2, "`eepctl agents` lists them"},
    {"a misspelt command", "eepctl statsu", 2, "did you mean 'status'?"},
    {"no coordinator there", "eepctl -c unix:%D/nobody.sock status", 3, "is eep-coordinator running there?"},
    {"a bad address", "eepctl -c nonsense status", 2, "host:port"},
    {"a folder that is not there", "eepctl model inspect %D/nowhere", 1, "No such file or directory"},
    {"a folder without a checkpoint", "eepctl model inspect %D", 1, "has neither model.safetensors nor"},
};

/* ---- places that are taken, or cannot be written ---- */

static const struct row places[] = {
    {"a socket in use", "eep-coordinator --state %D/other --listen %A", 1, "is in use by a running process"},
    {"a port in use", "eep-coordinator --state %D/other --listen 127.0.0.1:%P", 1,
     "it is in use; port 0 picks a free one"},
    {"a port in use", "eep-agent --id gpu9 --engine-socket %D/nine.sock --listen 127.0.0.1:%P", 1, "it is in use"},
    {"a port in use", "eep-agent --id gpu9 --engine-socket %D/nine.sock --data-listen 127.0.0.1:%P", 1, "it is in use"},
    {"an engine socket in use", "eep-agent --id gpu9 --engine-socket %D/engine-0.sock", 1,
     "is in use by a running process"},
    {"a file where the socket should be", "eep-agent --id gpu9 --engine-socket %D/file", 1,
     "exists and is no socket: choose another path"},
    {"a folder that is not there", "eep-agent --id gpu9 --engine-socket %D/nowhere/a.sock", 1, "choose another path"},
    {"the state of another", "eep-coordinator --state %D/state --listen 127.0.0.1:0", 1,
     "in use by another coordinator"},
    {"a state folder that is a file", "eep-coordinator --state %D/file --listen 127.0.0.1:0", 1,
     "--state names another"},
    {"an option that is none", "eep-coordinator --lease 5s", 2, "--lease"},
    {"a number out of range", "eep-agent --id a --slots 70000", 2, "from 0 to 65536"},
    {"a bad configuration line",
     "sh -c 'printf \"[coordinator]\\nlease-ms = soon\\n\" >%D/bad.conf; exec %B/eep-coordinator --config %D/bad.conf'", 2,
     "bad.conf:2: --lease-ms must be a whole number"},
    {"an unknown configuration key",
     "sh -c 'printf \"[coordinator]\\nlease = 5\\n\" >%D/bad.conf; exec %B/eep-coordinator --config %D/bad.conf'", 2,
     "bad.conf:2:"},
    {"a cluster of another name", "eep-agent --id gpu9 --cluster other --coordinator %A --engine-socket %D/nine.sock",
     -1, "this is cluster"},
    {"an id that is taken", "eep-agent --id gpu0 --coordinator %A --engine-socket %D/nine.sock", -1,
     "every agent needs an --id of its own"},
    {"another model", "eep-agent --id gpu9 --coordinator %A --engine-socket %D/nine.sock --checkpoint %D/good", -1,
     "event=coordinator-connected"},
};

/* A folder of its own that is read-only, or full: in a mount namespace, where one can be made. */
static const struct row disks[] = {
    {"a read-only state folder",
     "sh -c 'exec unshare -rm sh -c \"mount -t tmpfs -o ro none %D/disk && exec %B/eep-coordinator --state %D/disk "
     "--listen 127.0.0.1:0\"'",
     1, "Read-only file system; --state names another"},
    {"a full state folder",
     "sh -c 'exec unshare -rm sh -c \"mount -t tmpfs -o size=16k none %D/disk && exec %B/eep-coordinator --state "
     "%D/disk "
     "--listen 127.0.0.1:0\"'",
     1, "No space left on device; make room in the state folder"},
};

/* ---- peers ---- */

static int stranger(void)
{
    struct sockaddr_un un = {.sun_family = AF_UNIX};
    snprintf(un.sun_path, sizeof(un.sun_path), "%.100s", c.address + strlen("unix:"));
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(connect(fd, (struct sockaddr *)&un, sizeof(un)), 0);
    return fd;
}

/* Sends this and reads until the other end closes, at most 10 s; `said` holds what came. */
static void tell(const void *bytes, size_t len)
{
    int fd = stranger();
    size_t n = 0;
    ck_assert_int_eq(write(fd, bytes, len), (int)len);
    struct pollfd p = {.fd = fd, .events = POLLIN};
    while (poll(&p, 1, 10000) > 0) {
        ssize_t got = read(fd, said + n, sizeof(said) - 1 - n);
        if (got <= 0)
            break;
        n += (size_t)got;
    }
    close(fd);
    for (size_t i = 0; i < n; i++) /* the sentence in the frame */
        said[i] = said[i] ? said[i] : ' ';
    said[n] = '\0';
}

static const struct peer {
    const char *mistake;
    uint32_t protocol;
    int role;
    const char *cluster, *agent, *says;
} peers[] = {
    {"another protocol version", 99, PB__ROLE__OPERATOR, "", "", "protocol version 99 is not spoken here, but 1"},
    {"another cluster", 1, PB__ROLE__AGENT, "other", "gpu9", "this is cluster"},
    {"an agent without a name", 1, PB__ROLE__AGENT, "eep", "", ""},
};

static void wrong_peers(void)
{
    for (size_t i = 0; i < sizeof(peers) / sizeof(peers[0]); i++) {
        Pb__Hello hello = PB__HELLO__INIT;
        hello.protocol = peers[i].protocol;
        hello.role = (Pb__Role)peers[i].role;
        hello.cluster = (char *)(uintptr_t)peers[i].cluster;
        hello.agent = (char *)(uintptr_t)peers[i].agent;
        hello.software = (char *)(uintptr_t) "stranger";
        hello.incarnation = 7;
        size_t len;
        uint8_t *frame = caller_frame(FRAME_HANDSHAKE, 0, 0, &hello.base, &len);
        tell(frame, len);
        free(frame);
        ck_assert_msg(strstr(said, peers[i].says) != NULL, "%s: %s", peers[i].mistake, said);
    }
    static const char garbage[] = "\xff\xff\xff\xff garbage as the first frame, long enough for a header";
    tell(garbage, sizeof(garbage));
    ck_assert_msg(!strstr(said, "eep-coordinator"), "%s", said);
}

/* ---- one operation at a time ---- */

static void another_operation(void)
{
    static const struct row rows[] = {
        {"another operation runs", "eepctl scale --to 2", 7, "is running"},
        {"another operation runs", "eepctl scale --to 1 --remove gpu1", 7, "is running"},
    };
    kill(c.agent[2], SIGSTOP);
    pid_t scale = cluster_ctl_start(&c, "scale", (const char *[]){"scale", "--to", "3", NULL});
    itest_wait_status(&c, "running", 10000);
    ROWS(rows);
    CTL(&c, 0, "abort");
    kill(c.agent[2], SIGCONT);
    ck_assert_int_eq(cluster_wait(&scale, 20000), 6);
    cluster_wait_agents(&c, 3, 20000);
}

/* ---- all of it ---- */

static void port_take(void)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof(a);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    ck_assert_int_eq(bind(fd, (struct sockaddr *)&a, sizeof(a)) | listen(fd, 1), 0);
    ck_assert_int_eq(getsockname(fd, (struct sockaddr *)&a, &len), 0);
    port = ntohs(a.sin_port); /* stays open until the test ends */
}

static void descriptors(int fds[3])
{
    fds[0] = cluster_fds(c.coordinator);
    fds[1] = cluster_fds(c.agent[0]);
    fds[2] = cluster_fds(c.agent[1]);
}

START_TEST(every_mistake_gets_its_sentence_and_harms_nobody)
{
    int before[3], after[3];
    char path[192];
    itest_start(&c, (struct cluster_options){.agents = 3, .loaders = 3, .step_ms = 2});
    port_take();
    snprintf(path, sizeof(path), "%s/disk", c.dir);
    ck_assert_int_eq(mkdir(path, 0700), 0);
    snprintf(path, sizeof(path), "%s/file", c.dir);
    close(open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "4");
    another_operation(); /* first: what one round of it needs stays open */
    descriptors(before);

    damaged_checkpoints();
    ROWS(commands);
    ROWS(places);
    if (run("sh -c 'unshare -rm mount -t tmpfs none %D/disk'") == 0)
        ROWS(disks);
    else
        printf("full and read-only state folders are not tested: no mount namespace can be made here\n");
    wrong_peers();
    char *log = cluster_read(&c, "coordinator.log");
    ck_assert_msg(log && strstr(log, "agent gpu9: its checkpoint (1 layers of 2 experts) is not the model that serves"),
                  "%s", log);
    free(log);

    ck_assert_int_eq(itest_ranks(&c), 2);
    for (int i = 0; i < 50; i++) { /* connections end a moment later */
        descriptors(after);
        if (memcmp(before, after, sizeof(before)) == 0)
            break;
        cluster_sleep_ms(100);
    }
    for (int i = 0; i < 3; i++)
        ck_assert_msg(after[i] <= before[i], "daemon %d has %d descriptors, had %d", i, after[i], before[i]);
    CTL(&c, 0, "verify");
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* What an agent that was killed leaves behind is no obstacle. */
START_TEST(a_stale_socket_is_taken_over)
{
    struct stat st;
    char path[192];
    itest_start(&c, (struct cluster_options){.agents = 1, .loaders = 1, .step_ms = 2});
    snprintf(path, sizeof(path), "%s/engine-0.sock", c.dir);
    cluster_signal(&c.engine[0], SIGKILL);
    cluster_signal(&c.agent[0], SIGKILL);
    cluster_signal(&c.coordinator, SIGKILL);
    ck_assert(stat(path, &st) == 0 && S_ISSOCK(st.st_mode));
    ck_assert_int_eq(cluster_coordinator_start(&c), 0);
    ck_assert_int_eq(cluster_agent_start(&c, 0), 0);
    ck_assert_int_eq(cluster_engine_start(&c, 0), 0);
    ck_assert_int_eq(cluster_wait_agents(&c, 1, 20000), 0);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* Two agents that would load different models: the start ends with a sentence, and one of them can be left out. */
START_TEST(a_checkpoint_of_another_model_cannot_start_with_the_others)
{
    itest_start(&c, (struct cluster_options){.agents = 1, .loaders = 1, .step_ms = 2});
    c.options.model = MIXTRAL;
    c.options.loaders = 2;
    ck_assert_int_eq(cluster_agent_start(&c, 1), 0);
    ck_assert_int_eq(cluster_engine_start(&c, 1), 0);
    ck_assert_int_eq(cluster_wait_agents(&c, 2, 20000), 0);
    CTL(&c, 7, "scale", "--to", "2");
    CTL_SAYS("agents gpu0 and gpu1 would load different models");
    CTL_SAYS("--checkpoint");
    ck_assert_int_eq(itest_ranks(&c), 0);

    /* the same shapes, but another config.json: seen when both have loaded */
    char command[1200], copy[192];
    snprintf(copy, sizeof(copy), "%s/copy", c.dir);
    snprintf(command, sizeof(command),
             "mkdir %s && ln -s \"$PWD\"/%s/model.safetensors %s && sed 's/{/{\"note\": 1,/;q' %s/config.json "
             ">%s/config.json "
             "&& sed 1d %s/config.json >>%s/config.json",
             copy, QWEN, copy, QWEN, copy, QWEN, copy);
    ck_assert_int_eq(system(command), 0);
    cluster_signal(&c.engine[1], SIGKILL);
    cluster_signal(&c.agent[1], SIGKILL);
    c.options.model = copy;
    ck_assert_int_eq(cluster_agent_start(&c, 1), 0);
    ck_assert_int_eq(cluster_engine_start(&c, 1), 0);
    ck_assert_int_eq(cluster_wait_agents(&c, 2, 20000), 0);
    CTL(&c, 6, "scale", "--to", "2", "--wait-for-agents=20");
    CTL_SAYS("has loaded something else");
    CTL_SAYS("all need the same --checkpoint");
    ck_assert_int_eq(itest_ranks(&c), 0);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

static void add(TCase *t)
{
    tcase_add_test(t, every_mistake_gets_its_sentence_and_harms_nobody);
    tcase_add_test(t, a_stale_socket_is_taken_over);
    tcase_add_test(t, a_checkpoint_of_another_model_cannot_start_with_the_others);
}

int main(void)
{
    return suite_main("edges", add, 180);
}
