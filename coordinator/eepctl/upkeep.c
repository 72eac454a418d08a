/* eepctl pause, resume and restart: operations stand still or go on; a view that is lost is given up. */
#include <string.h>

#include "coordinator/eepctl/client.h"

static int upkeep_call(struct ctl *ctl, enum control_method method, const ProtobufCMessage *request)
{
    struct err err;
    Pb__OperationReply *reply;
    if (client_call(ctl, method, request, CLIENT_CALL_MS, (ProtobufCMessage **)&reply, &err) < 0)
        return ctl_fail(&err);
    if (ctl->output == CTL_JSON)
        ctl_print_json(ctl_json(&reply->base));
    else
        printf("%s\n", reply->text);
    rpc_unpack_free(&reply->base);
    return CTL_OK;
}

static error_t pause_parse(int key, char *arg, struct argp_state *state)
{
    const char **why = state->input;
    if (key != 'r')
        return ARGP_ERR_UNKNOWN;
    if (strlen(arg) > 127)
        argp_error(state, "--reason must have at most 127 bytes");
    *why = arg;
    return 0;
}

int cmd_pause(struct ctl *ctl, int argc, char **argv)
{
    const char *why = "";
    const struct argp_option own[] = {{"reason", 'r', "TEXT", 0, "shown to whoever is refused", 0}, {0}};
    const struct argp argp = {
        .options = own,
        .parser = pause_parse,
        .doc = "Pauses operations: none begins (exit status 7), and one that runs stands still before its next phase, "
               "while "
               "the engines serve on.  Repairs, and the drain of an agent that is stopped, are not paused.  It lasts "
               "until "
               "`eepctl resume`, also over a restart of the coordinator.\v"
               "Examples:\n"
               "  eepctl pause --reason 'switches are being replaced'\n"
               "  eepctl resume\n",
    };
    ctl_parse(ctl, &argp, argc, argv, &why);
    Pb__PauseRequest request = PB__PAUSE_REQUEST__INIT;
    request.pause = 1;
    request.why = (char *)why;
    return upkeep_call(ctl, CONTROL_PAUSE, &request.base);
}

int cmd_resume(struct ctl *ctl, int argc, char **argv)
{
    const struct argp argp = {.doc = "Ends `eepctl pause`: an operation that stands still goes on.\v"
                                     "Example:\n"
                                     "  eepctl resume\n"};
    ctl_parse(ctl, &argp, argc, argv, NULL);
    Pb__PauseRequest request = PB__PAUSE_REQUEST__INIT;
    request.why = (char *)"";
    return upkeep_call(ctl, CONTROL_PAUSE, &request.base);
}

static error_t restart_parse(int key, char *arg, struct argp_state *state)
{
    bool *force = state->input;
    (void)arg;
    if (key != 'f')
        return ARGP_ERR_UNKNOWN;
    *force = true;
    return 0;
}

int cmd_restart(struct ctl *ctl, int argc, char **argv)
{
    bool force = false;
    const struct argp_option own[] = {{"force", 'f', 0, 0, "also when the view serves every expert", 0}, {0}};
    const struct argp argp = {
        .options = own,
        .parser = restart_parse,
        .doc = "Gives up a view that has lost experts and waits for ranks that will not come back.  Its agents begin "
               "anew as "
               "spares, requests in flight are lost, and the next scale starts from the checkpoint.\v"
               "Example:\n"
               "  eepctl restart && eepctl scale --to 4 --wait-for-agents=60\n",
    };
    ctl_parse(ctl, &argp, argc, argv, &force);
    Pb__RestartRequest request = PB__RESTART_REQUEST__INIT;
    request.force = force;
    return upkeep_call(ctl, CONTROL_RESTART, &request.base);
}
