/* eepctl: the table of commands, and the choice of one. */
#include "common/options.h"
#include "coordinator/eepctl/client.h"

#include <locale.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

const struct ctl_command ctl_commands[] = {
    {"status", cmd_status, "the committed view, its members, and the operation"},
    {"health", cmd_health, "whether the cluster serves, for readiness probes"},
    {"agents", cmd_agents, "every agent that the coordinator knows"},
    {"scale", cmd_scale, "change the number of ranks while serving"},
    {"drain", cmd_drain, "take one agent out of the view"},
    {"abort", cmd_abort, "abort the running operation and roll it back"},
    {"pause", cmd_pause, "let no operation begin or go on"},
    {"resume", cmd_resume, "end a pause"},
    {"restart", cmd_restart, "give up a view that has lost experts"},
    {"watch", cmd_watch, "follow an operation to its end"},
    {"history", cmd_history, "operations that have ended"},
    {"verify", cmd_verify, "compare all weights with their digests"},
    {"load", cmd_load, "what the experts were asked for of late, and the balance"},
    {"rebalance", cmd_rebalance, "place the experts anew by the load, while serving"},
    {"plan", cmd_plan, "run a placement planner on a file, offline"},
    {"model", cmd_model, "what is in a checkpoint folder, offline"},
    {"kv", cmd_kv, "the key-value store: get, put, add, cas, del, list, watch, queue, stat"},
    {"barrier", cmd_barrier, "the store's barriers: list, show"},
    {"version", cmd_version, "versions of eepctl and the coordinator"},
    {0},
};

struct choice {
    struct ctl ctl;
    const struct ctl_command *command;
    int first; /* index of the command in argv */
    bool help; /* of the command, and not its work */
};

/* How many single changes make one word of the other; most + 1 for more.  A change is an insertion, an omission, a wrong letter, or two
 * letters that have changed places. */
static unsigned distance(const char *a, const char *b, unsigned most)
{
    while (*a && *a == *b)
        a++, b++;
    if (!*a && !*b)
        return 0;
    if (most == 0)
        return 1;
    unsigned best = most;
    const struct {
        bool can;
        size_t a, b;
    } ways[] = {{*a, 1, 0}, {*b, 0, 1}, {*a && *b, 1, 1}, {*a && *b && a[0] == b[1] && a[1] == b[0], 2, 2}};
    for (size_t i = 0; i < sizeof ways / sizeof ways[0]; i++) {
        unsigned rest = ways[i].can ? distance(a + ways[i].a, b + ways[i].b, most - 1) : most;
        best = rest < best ? rest : best;
    }
    return best + 1;
}

static void command_unknown(struct argp_state *state, const char *arg)
{
    const char *nearest = NULL;
    unsigned best = 3; /* of three changes nobody would think of the word */
    for (const struct ctl_command *c = ctl_commands; c->name; c++) {
        unsigned d = distance(arg, c->name, 2);
        if (d < best && d < strlen(arg))
            best = d, nearest = c->name;
    }
    if (nearest)
        argp_error(state, "unknown command '%s'; did you mean '%s'?", arg, nearest);
    else
        argp_error(state, "unknown command '%s'", arg);
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct choice *choice = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &choice->ctl;
        return 0;
    case ARGP_KEY_ARG:
        if (strcmp(arg, "help") == 0 && state->next == state->argc)
            return options_help(OPTIONS_KEY_HELP, state);
        if (strcmp(arg, "help") == 0) {
            choice->help = true;
            arg = state->argv[state->next++];
        }
        for (const struct ctl_command *c = ctl_commands; c->name; c++) {
            if (strcmp(c->name, arg) == 0)
                choice->command = c;
        }
        if (!choice->command)
            command_unknown(state, arg);
        choice->first = state->next - 1;
        state->next = state->argc; /* the rest belongs to the command */
        return 0;
    case ARGP_KEY_NO_ARGS:
        argp_error(state, "a command is missing");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static char *help_filter(int key, const char *text, void *input)
{
    if (key != ARGP_KEY_HELP_EXTRA)
        return ctl_help_filter(key, text, input);
    char *out = NULL;
    size_t size;
    FILE *f = open_memstream(&out, &size);
    if (!f)
        return NULL;
    fputs("Commands:\n", f);
    for (const struct ctl_command *c = ctl_commands; c->name; c++)
        fprintf(f, "  %-10s %s\n", c->name, c->description);
    fputs("\n`eepctl COMMAND -h`, or `eepctl help COMMAND`, explains a command with examples.\n"
          "\n"
          "Exit status: 0 done, 1 failed, 2 usage, 3 the coordinator cannot be reached, 4 denied, 5 we stopped waiting "
          "while the operation goes on, 6 the operation was rolled back, 7 conflict.\n", f);
    fclose(f);
    return out;
}

int main(int argc, char **argv)
{
    const struct argp_child children[] = {{&ctl_global_argp, 0, "Global options:", -1}, {0}};
    const struct argp argp = {
        .parser = parse,
        .args_doc = "COMMAND [ARGUMENT...]",
        .doc = "Looks at and changes the topology of an eep cluster.\v",
        .children = children,
        .help_filter = help_filter,
    };
    setlocale(LC_CTYPE, "");
    signal(SIGPIPE, SIG_IGN);
    argp_err_exit_status = CTL_USAGE;

    const char *env = getenv("EEP_COORDINATOR");
    struct choice choice = {.ctl.coordinator = env && *env ? env : "unix:/run/eep/coordinator.sock"};
    choice.ctl.tls = (struct tls_files){.cert = getenv("EEP_TLS_CERT"), .key = getenv("EEP_TLS_KEY"),
                                        .ca = getenv("EEP_TLS_CA")};
    argv[0] = (char *)"eepctl";
    if (argp_parse(&argp, argc, argv, ARGP_IN_ORDER | ARGP_NO_HELP, NULL, &choice))
        return CTL_USAGE;

    char name[64];
    snprintf(name, sizeof name, "eepctl %s", choice.command->name);
    argv[choice.first] = name;
    char *help[] = {name, (char *)"-h", NULL};
    int status = choice.help ? choice.command->run(&choice.ctl, 2, help)
                             : choice.command->run(&choice.ctl, argc - choice.first, argv + choice.first);
    client_drop(&choice.ctl);
    if (fflush(stdout) != 0 || ferror(stdout)) {
        fprintf(stderr, "eepctl: could not write the output: disk full or closed pipe\n");
        if (status == CTL_OK)
            status = CTL_FAILED;
    }
    return status;
}
