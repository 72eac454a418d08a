/* Crowds at the real coordinator: barriers of 1,024 members who retry, reconnect and come again at once, and TCPStore's
 * port under half commands, resets, mass disconnects and without descriptors. */
#include <check.h>
#include <stdio.h>
#include <sys/resource.h>

#include "common/control_methods.h"
#include "tests/harness/caller.h"
#include "tests/harness/daemon.h"
#include "tests/harness/suite.h"
#include "tests/harness/tcpclient.h"

enum { MEMBERS = 1024 };

static struct daemon_process d;

static void setup(void)
{
    struct rlimit files;
    signal(SIGPIPE, SIG_IGN);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    daemon_process_init(&d);
    const char *extra[] = {"--tcpstore-listen", "127.0.0.1:0/crowd", "--tcpstore-grace-ms", "300"};
    memcpy(d.extra, extra, sizeof extra);
    ck_assert(daemon_process_start(&d));
}

static void teardown(void)
{
    ck_assert_int_eq(daemon_process_stop(&d, SIGTERM), 0);
    daemon_process_done(&d);
}

/* ---- one call on a connection of its own ---- */

static int member_connect(void)
{
    int fd = caller_connect(d.address);
    ck_assert_int_ge(fd, 0);
    return fd;
}

static void arrive(int fd, uint64_t call, uint32_t size, unsigned member, uint32_t deadline_ms)
{
    char name[16];
    Pb__BarrierRequest request = PB__BARRIER_REQUEST__INIT;
    snprintf(name, sizeof name, "%u", member);
    request.name = (char *)"crowd";
    request.size = size;
    request.member = name;
    request.deadline_ms = deadline_ms;
    size_t len;
    uint8_t *frame = caller_frame(FRAME_CALL, CONTROL_BARRIER_ARRIVE, call, &request.base, &len);
    ck_assert_int_eq(send(fd, frame, len, MSG_NOSIGNAL), (ssize_t)len);
    free(frame);
}

static void receive(int fd, void *data, size_t len)
{
    for (size_t have = 0; have < len;) {
        struct pollfd p = {.fd = fd, .events = POLLIN};
        ck_assert_int_eq(poll(&p, 1, 30000), 1);
        ssize_t n = recv(fd, (uint8_t *)data + have, len - have, 0);
        ck_assert_int_gt(n, 0);
        have += (size_t)n;
    }
}

static bool readable(int fd, int ms)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    return poll(&p, 1, ms) == 1;
}

/* The next frame, which answers `call`.  0, and *ret_round of the release; or the error's code, and its text. */
static int answer(int fd, uint64_t call, uint64_t *ret_round, char text[ERR_TEXT_MAX])
{
    static uint8_t bytes[FRAME_HEADER_BYTES + 65536];
    struct frame frame;
    size_t need;
    int code = 0;
    receive(fd, bytes, FRAME_HEADER_BYTES);
    ck_assert_int_eq(frame_parse(bytes, FRAME_HEADER_BYTES, 65536, &frame, &need, NULL), need == FRAME_HEADER_BYTES);
    receive(fd, bytes + FRAME_HEADER_BYTES, need - FRAME_HEADER_BYTES);
    ck_assert_int_eq(frame_parse(bytes, need, 65536, &frame, &need, NULL), 1);
    ck_assert_uint_eq(frame.header.call, call);
    if (frame.header.kind == FRAME_REPLY) {
        Pb__BarrierReply *reply = pb__barrier_reply__unpack(NULL, frame.header.length, frame.payload);
        ck_assert_ptr_nonnull(reply);
        *ret_round = reply->round;
        pb__barrier_reply__free_unpacked(reply, NULL);
    } else {
        ck_assert_int_eq(frame.header.kind, FRAME_ERROR);
        Pb__Error *error = pb__error__unpack(NULL, frame.header.length, frame.payload);
        ck_assert_ptr_nonnull(error);
        code = error->code;
        snprintf(text, ERR_TEXT_MAX, "%s", error->text);
        pb__error__free_unpacked(error, NULL);
    }
    return code;
}

static uint32_t arrived(int asker)
{
    static uint8_t bytes[FRAME_HEADER_BYTES + (1 << 20)];
    Pb__BarrierShowRequest request = PB__BARRIER_SHOW_REQUEST__INIT;
    struct frame frame;
    size_t len, need;
    uint32_t n = 0;
    request.name = (char *)"crowd";
    uint8_t *out = caller_frame(FRAME_CALL, CONTROL_BARRIER_SHOW, 1, &request.base, &len);
    ck_assert_int_eq(send(asker, out, len, MSG_NOSIGNAL), (ssize_t)len);
    free(out);
    receive(asker, bytes, FRAME_HEADER_BYTES);
    ck_assert_int_ge(frame_parse(bytes, FRAME_HEADER_BYTES, 1 << 20, &frame, &need, NULL), 0);
    receive(asker, bytes + FRAME_HEADER_BYTES, need - FRAME_HEADER_BYTES);
    ck_assert_int_eq(frame_parse(bytes, need, 1 << 20, &frame, &need, NULL), 1);
    if (frame.header.kind == FRAME_REPLY) { /* else nobody waits there */
        Pb__BarrierInfo *info = pb__barrier_info__unpack(NULL, frame.header.length, frame.payload);
        n = info->arrived;
        ck_assert_uint_eq(info->n_members, n < 1000 ? n : 1000); /* more names are not shown */
        ck_assert_uint_eq(info->n_missing, info->size - n);
        pb__barrier_info__free_unpacked(info, NULL);
    }
    return n;
}

static void arrived_becomes(int asker, uint32_t n)
{
    uint32_t now = 0;
    for (int i = 0; i < 3000 && (now = arrived(asker)) != n; i++)
        usleep(10000);
    ck_assert_uint_eq(now, n);
}

/* ---- barriers ---- */

static const char *eepctl(const char *args)
{
    static char text[65536];
    char command[512];
    const char *bin = getenv("EEP_BIN");
    snprintf(command, sizeof command, "'%s/eepctl' -c %s %s", bin && *bin ? bin : "build", d.address, args);
    FILE *f = popen(command, "r");
    ck_assert_ptr_nonnull(f);
    text[fread(text, 1, sizeof text - 1, f)] = '\0';
    ck_assert_int_eq(pclose(f), 0);
    return text;
}

/* As the operator sees it: who is missing is named, though not everybody who is there. */
static void shown(void)
{
    const char *text = eepctl("barrier show crowd");
    ck_assert_msg(strstr(text, "crowd: 1023 of 1024 have arrived") && strstr(text, "missing  1023\n"), "%s", text);
    ck_assert_msg(strstr(text, "arrived  and 23 more\n") != NULL, "%s", text);
}

/* All but the last arrive; some come twice, some reconnect, and two come who do not belong. */
static void gather(int fds[MEMBERS], uint64_t calls[MEMBERS], int asker, int stranger)
{
    char text[ERR_TEXT_MAX];
    uint64_t round;
    for (unsigned i = 0; i < MEMBERS - 1; i++)
        arrive(fds[i], calls[i] = 1, MEMBERS, i, 600000);
    arrived_becomes(asker, MEMBERS - 1);
    shown();
    for (unsigned i = 0; i < MEMBERS - 1; i += 10) { /* again by the same connection: the earlier call is told so */
        arrive(fds[i], calls[i] = 2, MEMBERS, i, 600000);
        ck_assert_int_eq(answer(fds[i], 1, &round, text), ERR_STALE);
        ck_assert_msg(strstr(text, "retry") != NULL, "%s", text);
    }
    ck_assert_uint_eq(arrived(asker), MEMBERS - 1);
    unsigned gone = 0;
    for (unsigned i = 3; i < MEMBERS - 1; i += 16, gone++) {
        const struct linger now = {.l_onoff = 1, .l_linger = 0};
        setsockopt(fds[i], SOL_SOCKET, SO_LINGER, &now, sizeof now);
        close(fds[i]);
    }
    arrived_becomes(asker, MEMBERS - 1 - gone); /* who is gone has not arrived */
    for (unsigned i = 3; i < MEMBERS - 1; i += 16)
        arrive(fds[i] = member_connect(), calls[i] = 1, MEMBERS, i, 600000);
    arrived_becomes(asker, MEMBERS - 1);
    arrive(stranger, 7, MEMBERS, MEMBERS, 600000);
    ck_assert_int_eq(answer(stranger, 7, &round, text), ERR_CONFLICT);
    ck_assert_msg(strstr(text, "one too many") != NULL, "%s", text);
    arrive(stranger, 8, MEMBERS + 1, MEMBERS - 1, 600000);
    ck_assert_int_eq(answer(stranger, 8, &round, text), ERR_CONFLICT);
    for (unsigned i = 0; i < MEMBERS - 1; i++)
        ck_assert_msg(!readable(fds[i], 0), "member %u was told something before the last one came", i);
}

START_TEST(a_thousand_members_arrive_once_each)
{
    static int fds[MEMBERS];
    static uint64_t calls[MEMBERS];
    int asker = member_connect(), stranger = member_connect();
    uint64_t last_round = 0;
    for (int i = 0; i < MEMBERS; i++)
        fds[i] = member_connect();
    for (int turn = 0; turn < 3; turn++) { /* the same name, at once */
        char text[ERR_TEXT_MAX];
        uint64_t round = 0, first = 0;
        gather(fds, calls, asker, stranger);
        arrive(fds[MEMBERS - 1], calls[MEMBERS - 1] = 1, MEMBERS, MEMBERS - 1, 600000);
        for (unsigned i = 0; i < MEMBERS; i++) {
            ck_assert_msg(answer(fds[i], calls[i], &round, text) == 0, "member %u: %s", i, text);
            first = i ? first : round;
            ck_assert_uint_eq(round, first);
        }
        ck_assert_uint_gt(first, last_round);
        last_round = first;
        for (unsigned i = 0; i < MEMBERS; i++)
            ck_assert(!readable(fds[i], 0)); /* one message each */
        ck_assert_uint_eq(arrived(asker), 0);
    }
    for (int i = 0; i < MEMBERS; i++)
        close(fds[i]);
    close(asker);
    close(stranger);
}
END_TEST

START_TEST(a_thousand_members_are_told_at_the_deadline_who_is_missing)
{
    static int fds[MEMBERS];
    char text[ERR_TEXT_MAX];
    uint64_t round;
    for (unsigned i = 0; i < MEMBERS - 3; i++)
        fds[i] = member_connect();
    for (unsigned i = 0; i < MEMBERS - 3; i++)
        arrive(fds[i], 1, MEMBERS, i, 3000); /* the first deadline names those who come after it, too */
    for (unsigned i = 0; i < MEMBERS - 3; i++) {
        ck_assert_int_eq(answer(fds[i], 1, &round, text), ERR_TIMEOUT);
        ck_assert_msg(strstr(text, "of 1024 members are missing at the deadline; missing: ") != NULL, "%s", text);
        ck_assert_msg(i || strstr(text, "missing: 1021, 1022, 1023"), "%s", text);
    }
    arrive(fds[0], 2, 2, 0, 60000); /* the name is free, also for another size */
    arrive(fds[1], 2, 2, 1, 60000);
    ck_assert_int_eq(answer(fds[0], 2, &round, text), 0);
    ck_assert_int_eq(answer(fds[1], 2, &round, text), 0);
    for (unsigned i = 0; i < MEMBERS - 3; i++)
        close(fds[i]);
}
END_TEST

/* ---- TCPStore's port ---- */

static void reset(struct tcpclient *c)
{
    const struct linger now = {.l_onoff = 1, .l_linger = 0};
    setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    tcpclient_close(c);
}

static void command(struct tcpclient *c, unsigned query)
{
    static const char *const fields[TCPSTORE_QUERIES] = {"",   "kv",  "kvv", "k", "k8", "8k", "8k", "", "k", "kv",
                                                         "8k", "8kv", "",    "",  "kv", "k",  "k",  "", "k8"};
    tcpclient_begin(c, (uint8_t)query);
    for (const char *f = fields[query]; *f; f++) {
        if (*f == '8')
            tcpclient_u64(c, 1);
        else
            tcpclient_text(c, *f == 'k' ? "half" : "value");
    }
}

/* Every command broken off at every few bytes, and whole ones whose answer nobody waits for. */
START_TEST(half_commands_and_resets_harm_nobody)
{
    struct tcpclient good, c;
    ck_assert(tcpclient_open(&good, d.tcpstore));
    tcpclient_set(&good, "here", "1");
    for (unsigned query = TCPSTORE_SET; query < TCPSTORE_QUERIES; query++) {
        if (query == TCPSTORE_PING)
            continue;
        for (size_t cut = 1;; cut += 5) {
            ck_assert(tcpclient_open(&c, d.tcpstore));
            command(&c, query);
            bool whole = cut >= c.len;
            c.len = whole ? c.len : cut;
            tcpclient_flush(&c);
            if (cut % 2)
                reset(&c);
            else
                tcpclient_close(&c);
            if (whole)
                break;
        }
        ck_assert_msg(tcpclient_check(&good, "here") && !good.broken, "after command %u", query);
    }
    static struct tcpclient many[500];
    for (int i = 0; i < 500; i++) {
        ck_assert(tcpclient_open(&many[i], d.tcpstore));
        tcpclient_wait_start(&many[i], "never");
    }
    for (int i = 0; i < 500; i++)
        i % 2 ? reset(&many[i]) : tcpclient_close(&many[i]);
    ck_assert(tcpclient_check(&good, "here"));
    tcpclient_close(&good);
    bool empty = false;
    for (int i = 0; i < 100 && !empty; i++) { /* all of them were counted out: the namespace empties itself */
        usleep(600000);
        ck_assert(tcpclient_open(&good, d.tcpstore));
        empty = tcpclient_number(&good, TCPSTORE_GETNUMKEYS, NULL) == 0;
        tcpclient_close(&good);
    }
    ck_assert(empty);
    const char *stat = eepctl("kv stat");
    ck_assert_msg(strncmp(stat, "0 keys, 0 B of ", 15) == 0, "%s", stat); /* their waits are gone, too */
}
END_TEST

START_TEST(out_of_descriptors_at_the_tcpstore_port)
{
    struct tcpclient good, c;
    ck_assert(tcpclient_open(&good, d.tcpstore));
    struct rlimit limit = {.rlim_cur = 64, .rlim_max = 64};
    prlimit(d.pid, RLIMIT_NOFILE, &limit, NULL);
    int fds[120];
    for (int i = 0; i < 120; i++) /* the kernel takes them, the coordinator cannot */
        ck_assert_int_eq(address_connect(d.tcpstore, 5000, &fds[i], NULL), 0);
    tcpclient_set(&good, "served", "1");
    ck_assert(tcpclient_check(&good, "served") && !good.broken);
    for (int i = 0; i < 120; i++)
        close(fds[i]);
    ck_assert(tcpclient_open(&c, d.tcpstore));
    ck_assert(tcpclient_check(&c, "served"));
    tcpclient_close(&c);
    tcpclient_close(&good);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("crowd");
    TCase *tc = tcase_create("crowd");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_set_timeout(tc, 180);
    tcase_add_test(tc, a_thousand_members_arrive_once_each);
    tcase_add_test(tc, a_thousand_members_are_told_at_the_deadline_who_is_missing);
    tcase_add_test(tc, half_commands_and_resets_harm_nobody);
    tcase_add_test(tc, out_of_descriptors_at_the_tcpstore_port);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
