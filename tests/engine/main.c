/* eep-engine: the reference engine, on the host or on the GPU that its agent keeps the weights on.  A test instrument: it serves a small mixture-of-experts model over
 * libeep, slowly and exactly.  This file: options. */
#include <argp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "common/options.h"
#include "tests/engine/engine.h"

enum {
    KEY_SOCKET = 256,
    KEY_LISTEN,
    KEY_ADVERTISE,
    KEY_LAYOUT,
    KEY_CHECKPOINT,
    KEY_DISPATCH,
    KEY_STEP,
    KEY_BUSY,
    KEY_STALL,
    KEY_MUTE,
    KEY_NO_MASKS,
    KEY_ATTACH,
    KEY_BATCH,
    KEY_PREFILL,
    KEY_KV,
    KEY_LOG
};

static const struct argp_option option_table[] = {
    {"socket", KEY_SOCKET, "PATH", 0, "the agent's engine socket (default: $EEP_SOCKET)", 0},
    {"listen", KEY_LISTEN, "HOST:PORT", 0, "requests and peers; port 0 = any (default 127.0.0.1:0)", 0},
    {"advertise", KEY_ADVERTISE, "HOST", 0, "host to publish instead of the one listened on", 0},
    {"layout", KEY_LAYOUT, "loader|fused", 0,
     "whose layout: the agent's checkpoint loader's, or our own (default loader)", 0},
    {"checkpoint", KEY_CHECKPOINT, "DIR", 0, "fused: what a cold start reads; a joiner needs none", 0},
    {"dispatch", KEY_DISPATCH, "source|replicated", 0, "who maps experts to slots (default source)", 0},
    {"step-ms", KEY_STEP, "MS", 0, "a step takes at least this long, sleeping (default 0)", 0},
    {"busy-us", KEY_BUSY, "US", 0, "a step begins with this much spinning where it is computed (default 0)", 0},
    {"stall-ms", KEY_STALL, "MS", 0,
     "a step that waits longer for a peer, unrevoked, ends the engine (default 45000: an "
     "agent may hold its engine for 30 s)",
     0},
    {"mute", KEY_MUTE, "prepare|prepare-again|drain", 0, "never answer that, or not but the first time (for tests)", 0},
    {"no-masks", KEY_NO_MASKS, NULL, 0, "not able to serve without masked experts (for tests)", 0},
    {"attach-ms", KEY_ATTACH, "MS", 0, "how long to try to attach (default 10000)", 0},
    {"max-batch", KEY_BATCH, "N", 0, "sequences at once, at most 256 (default 8)", 0},
    {"prefill", KEY_PREFILL, "N", 0, "tokens of one prompt per step (default 16)", 0},
    {"kv-bytes", KEY_KV, "BYTES", 0, "available for keys and values (default: not profiled)", 0},
    {"log", KEY_LOG, "LEVEL", 0, "debug, info, warn or error (default info)", 0},
    {0},
};

/* Which of two words. */
static int word(struct argp_state *state, const char *text, const char *zero, const char *one)
{
    if (strcmp(text, zero) != 0 && strcmp(text, one) != 0)
        argp_error(state, "'%s' is neither %s nor %s", text, zero, one);
    return strcmp(text, one) == 0;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct engine_options *o = state->input;
    switch (key) {
    case KEY_SOCKET:
        o->socket = arg;
        return 0;
    case KEY_LISTEN:
        o->listen = arg;
        return 0;
    case KEY_ADVERTISE:
        o->advertise = arg;
        return 0;
    case KEY_CHECKPOINT:
        o->checkpoint = arg;
        return 0;
    case KEY_LAYOUT:
        o->fused = word(state, arg, "loader", "fused");
        return 0;
    case KEY_DISPATCH:
        o->dispatch = word(state, arg, "source", "replicated") ? EEP_DISPATCH_REPLICATED : EEP_DISPATCH_SOURCE_ROUTED;
        return 0;
    case KEY_STEP:
        o->step_ms = (uint32_t)options_number(state, "--step-ms", arg, 0, 60000);
        return 0;
    case KEY_BUSY:
        o->busy_us = (uint32_t)options_number(state, "--busy-us", arg, 0, 10000000);
        return 0;
    case KEY_MUTE:
        if (strcmp(arg, "prepare") != 0 && strcmp(arg, "prepare-again") != 0 && strcmp(arg, "drain") != 0)
            argp_error(state, "--mute is '%s': it must be prepare, prepare-again or drain", arg);
        o->mute_prepare |= strcmp(arg, "prepare") == 0;
        o->mute_prepare_again |= strcmp(arg, "prepare-again") == 0;
        o->mute_drain |= strcmp(arg, "drain") == 0;
        return 0;
    case KEY_STALL:
        o->stall_ms = (uint32_t)options_number(state, "--stall-ms", arg, 100, 3600000);
        return 0;
    case KEY_NO_MASKS:
        o->no_masks = true;
        return 0;
    case KEY_ATTACH:
        o->attach_ms = (uint32_t)options_number(state, "--attach-ms", arg, 0, 3600000);
        return 0;
    case KEY_BATCH:
        o->max_batch = (uint32_t)options_number(state, "--max-batch", arg, 1, BATCH_MAX);
        return 0;
    case KEY_PREFILL:
        o->prefill = (uint32_t)options_number(state, "--prefill", arg, 1, 4096);
        return 0;
    case KEY_KV:
        o->kv_bytes = options_number(state, "--kv-bytes", arg, 1, UINT64_MAX - 1);
        return 0;
    case KEY_LOG:
        if (log_level_parse(arg, &o->log_level))
            argp_error(state, "'%s' is no log level", arg);
        return 0;
    case ARGP_KEY_END:
        if (!o->socket)
            argp_error(state, "no engine socket: give --socket or set EEP_SOCKET");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

int main(int argc, char **argv)
{
    static const struct argp argp = {
        .options = option_table, .parser = parse, .doc = "Serves a mixture-of-experts model over libeep, on the host or on the GPU of its agent."};
    struct engine_options o = {.socket = getenv("EEP_SOCKET"),
                               .listen = "127.0.0.1:0",
                               .dispatch = EEP_DISPATCH_SOURCE_ROUTED,
                               .stall_ms = 45000,
                               .attach_ms = 10000,
                               .max_batch = 8,
                               .prefill = 16,
                               .kv_bytes = UINT64_MAX,
                               .log_level = LOG_LEVEL_INFO};
    argp_err_exit_status = 2;
    argp_parse(&argp, argc, argv, 0, NULL, &o);
    signal(SIGPIPE, SIG_IGN);
    return engine_run(&o);
}
