/* Fuzz target: TCPStore's commands as a real server carries them out.  A stranger sends the bytes; whatever becomes of it,
 * somebody else's set and get work afterwards, and the store stays within its budget. */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/loop.h"
#include "coordinator/server.h"
#include "coordinator/store_edge.h"
#include "tests/harness/tcpclient.h"

#define STORE_BYTES ((size_t)1 << 20)
#define TURNS       200 /* of the loop; then an answer is taken as missing */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct event_base *base;
static struct server *server;
static char dir[64], port[128];
static struct tcpclient witness;

static void on_fatal(void *user, const struct err *err)
{
    (void)user;
    fprintf(stderr, "fatal: %s\n", err->text);
    abort();
}

static void finish(void)
{
    char command[80];
    tcpclient_close(&witness);
    server_close(server);
    loop_free(base);
    libevent_global_shutdown();
    snprintf(command, sizeof command, "rm -rf '%s'", dir);
    (void)!system(command);
}

static void turn(void)
{
    event_base_loop(base, EVLOOP_NONBLOCK);
}

/* What has come, up to len bytes. */
static size_t take(int fd, void *data, size_t len)
{
    ssize_t n = recv(fd, data, len, MSG_DONTWAIT);
    return n > 0 ? (size_t)n : 0;
}

static int connected(const char *address)
{
    const uint32_t magic = TCPSTORE_MAGIC;
    const uint8_t validate[5] = {TCPSTORE_VALIDATE, magic & 0xff, magic >> 8 & 0xff, magic >> 16 & 0xff, magic >> 24};
    int fd = -1;
    if (address_connect(address, 5000, &fd, NULL) < 0 || send(fd, validate, sizeof validate, MSG_NOSIGNAL) != sizeof validate)
        abort();
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    return fd;
}

static void start(void)
{
    struct err err;
    char state[80], address[96];
    signal(SIGPIPE, SIG_IGN);
    snprintf(dir, sizeof dir, "/tmp/eep-fuzz-XXXXXX");
    if (!mkdtemp(dir))
        abort();
    snprintf(address, sizeof address, "unix:%s/c.sock", dir);
    snprintf(state, sizeof state, "%s/state", dir);
    base = event_base_new();
    const char *listen[] = {address}, *tcp[] = {"127.0.0.1:0/strangers", "127.0.0.1:0/witness"};
    struct server_config config = {.base = base, .cluster = "c1", .state = state, .listen = listen, .n_listen = 1,
                                   .on_fatal = on_fatal, .durability = STORE_NONE, .tcpstore = tcp, .n_tcpstore = 2,
                                   .tcpstore_grace_ms = 1, .store_bytes = STORE_BYTES};
    coordinator_config_default(&config.core);
    if (server_open(&config, &server, &err) < 0)
        on_fatal(NULL, &err);
    snprintf(port, sizeof port, "%s", server_tcpstore_address(server, 0));
    witness = (struct tcpclient){.fd = connected(server_tcpstore_address(server, 1))};
    atexit(finish);
}

/* A value that is another one each time comes back. */
static void witness_works(void)
{
    static uint64_t number;
    uint8_t answer[16];
    size_t have = 0;
    number++;
    tcpclient_begin(&witness, TCPSTORE_SET);
    tcpclient_text(&witness, "k");
    tcpclient_bytes(&witness, &number, sizeof number);
    const uint8_t get = TCPSTORE_GET;
    tcpclient_put(&witness, &get, 1);
    tcpclient_text(&witness, "k");
    tcpclient_flush(&witness);
    for (int i = 0; i < TURNS && have < sizeof answer; i++) {
        turn();
        have += take(witness.fd, answer + have, sizeof answer - have);
    }
    if (have < sizeof answer || memcmp(answer + 8, &number, sizeof number) != 0)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t answers[65536];
    if (!server)
        start();
    int fd = connected(port);
    for (size_t done = 0, i = 0; i < 32; i++) {
        ssize_t n = done < size ? send(fd, data + done, size - done, MSG_NOSIGNAL) : 0;
        if (n > 0)
            done += (size_t)n;
        else if (n < 0 && errno != EAGAIN)
            break; /* it was cut off */
        turn();
        (void)take(fd, answers, sizeof answers);
        if (done == size && i >= 4)
            break;
    }
    witness_works();
    if (store_used(server->edge->store) > STORE_BYTES)
        abort();
    close(fd);
    turn();
    return 0;
}
