/* eepctl verify and eepctl version. */
#include "common/version.h"
#include "coordinator/eepctl/client.h"

int cmd_verify(struct ctl *ctl, int argc, char **argv)
{
    const struct argp argp = {
        .doc = "Compares every expert slot and every dense region of every rank with the digests taken when the "
               "weights were loaded or sealed.  Exit status 1 when something differs.\v"
               "Examples:\n"
               "  eepctl verify\n",
    };
    ctl_parse(ctl, &argp, argc, argv, NULL);
    struct err err;
    Pb__Empty empty = PB__EMPTY__INIT;
    Pb__VerifyReply *reply;
    if (client_call(ctl, CONTROL_VERIFY, &empty.base, -1, (ProtobufCMessage **)&reply, &err) < 0)
        return ctl_fail(&err);
    if (ctl->output == CTL_JSON)
        ctl_print_json(ctl_json(&reply->base));
    else
        printf("%s\n", reply->text);
    int status = reply->bad ? CTL_FAILED : CTL_OK;
    rpc_unpack_free(&reply->base);
    return status;
}

int cmd_version(struct ctl *ctl, int argc, char **argv)
{
    const struct argp argp = {.doc = "Shows the versions of eepctl and of the coordinator.\v"
                                     "Examples:\n"
                                     "  eepctl version\n"};
    ctl_parse(ctl, &argp, argc, argv, NULL);
    struct err err;
    Pb__VersionReply *reply = NULL;
    int rc = client_ask(ctl, CONTROL_VERSION, (ProtobufCMessage **)&reply, &err);
    if (ctl->output == CTL_JSON) {
        ctl_print_json(json_pack("{s:{s:s,s:i}, s:o}", "eepctl", "software", EEP_SOFTWARE, "protocol",
                                 RPC_PROTOCOL_VERSION, "coordinator", reply ? ctl_json(&reply->base) : json_null()));
    } else {
        printf("eepctl %s, protocol %d\n", EEP_SOFTWARE, RPC_PROTOCOL_VERSION);
        if (reply)
            printf("coordinator %s, protocol %u, cluster %s\n", reply->software, reply->protocol, reply->cluster);
    }
    if (rc < 0)
        return ctl_fail(&err);
    rpc_unpack_free(&reply->base);
    return CTL_OK;
}
