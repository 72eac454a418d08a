/* eepctl kv: the key-value store by hand. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "coordinator/eepctl/client.h"
#include "coordinator/eepctl/table.h"
#include "coordinator/store.h"

struct kv_options {
    const char *verb, *arg[3]; /* after the verb */
    int n;
    uint32_t wait_ms, max_length;
    uint64_t lease, from;
    bool values, ephemeral, missing;
    const char *request, *expected;
};

enum { KEY_EPHEMERAL = 256, KEY_LEASE, KEY_FROM, KEY_REQUEST, KEY_EXPECT, KEY_MISSING, KEY_MAX };

static int kv_get(struct ctl *ctl, const struct kv_options *o)
{
    struct err err;
    Pb__KvGetRequest request = PB__KV_GET_REQUEST__INIT;
    Pb__KvValue *reply;
    request.key = (char *)o->arg[0];
    request.wait_ms = o->wait_ms;
    int timeout = o->wait_ms ? -1 : CLIENT_CALL_MS;
    if (client_call(ctl, CONTROL_KV_GET, &request.base, timeout, (ProtobufCMessage **)&reply, &err) < 0)
        return ctl_fail(&err);
    if (ctl->output == CTL_JSON) {
        json_t *value = ctl_json(&reply->base);
        json_object_set_new(value, "key", json_string(o->arg[0]));
        ctl_print_json(value);
    } else {
        fwrite(reply->value.data, 1, reply->value.len, stdout); /* the very bytes */
        if (isatty(STDOUT_FILENO))
            putchar('\n');
    }
    rpc_unpack_free(&reply->base);
    return CTL_OK;
}

static int read_all(FILE *in, char **ret_data, size_t *ret_len, struct err *err)
{
    char *data = NULL;
    size_t len = 0, cap = 0;
    for (;;) {
        if (len == cap) {
            cap = cap ? cap * 2 : 65536;
            char *more = realloc(data, cap);
            if (!more) {
                free(data);
                return err_set(err, ERR_NOMEM, "out of memory while reading the value");
            }
            data = more;
        }
        size_t got = fread(data + len, 1, cap - len, in);
        len += got;
        if (!got)
            break;
        if (len > STORE_VALUE_MAX) {
            free(data);
            return err_set(err, ERR_INVALID, "the value is too long: at most %u bytes fit", STORE_VALUE_MAX);
        }
    }
    *ret_data = data;
    *ret_len = len;
    return 0;
}

static int kv_put(struct ctl *ctl, const struct kv_options *o)
{
    struct err err;
    Pb__KvSetRequest request = PB__KV_SET_REQUEST__INIT;
    Pb__KvSetReply *reply;
    char *data = NULL;
    size_t len = strlen(o->arg[1]);
    request.key = (char *)o->arg[0];
    request.has_ephemeral = request.ephemeral = o->ephemeral || o->lease;
    request.has_lease = o->lease != 0;
    request.lease = o->lease;
    request.value.data = (uint8_t *)o->arg[1];
    if (strcmp(o->arg[1], "-") == 0) {
        if (read_all(stdin, &data, &len, &err) < 0)
            return ctl_fail(&err);
        request.value.data = (uint8_t *)data;
    }
    request.value.len = len;
    int rc = client_call(ctl, CONTROL_KV_SET, &request.base, CLIENT_CALL_MS, (ProtobufCMessage **)&reply, &err);
    free(data);
    if (rc < 0)
        return ctl_fail(&err);
    if (ctl->output == CTL_JSON)
        ctl_print_json(ctl_json(&reply->base));
    else
        printf("revision %llu\n", (unsigned long long)reply->revision);
    rpc_unpack_free(&reply->base);
    return CTL_OK;
}

static int kv_del(struct ctl *ctl, const struct kv_options *o)
{
    struct err err;
    Pb__KvDeleteRequest request = PB__KV_DELETE_REQUEST__INIT;
    ProtobufCMessage *reply;
    request.key = (char *)o->arg[0];
    if (client_call(ctl, CONTROL_KV_DELETE, &request.base, CLIENT_CALL_MS, &reply, &err) < 0)
        return ctl_fail(&err);
    rpc_unpack_free(reply);
    return CTL_OK;
}

static void list_value(struct table *table, const Pb__KvEntry *entry)
{
    char text[64];
    size_t n = entry->value.len < sizeof text - 1 ? entry->value.len : sizeof text - 1;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = entry->value.data[i];
        text[i] = (char)(c >= 32 && c < 127 ? c : '.');
    }
    text[n] = '\0';
    table_cell(table, "%s%s", text, n < entry->value.len ? "..." : "");
}

static int kv_list(struct ctl *ctl, const struct kv_options *o)
{
    struct err err;
    struct table table;
    json_t *all = json_array();
    char *after = NULL;
    bool more = true;
    int status = CTL_OK;
    table_init(&table, o->values ? (const char *const[]){"KEY", "REVISION", "SIZE", "VALUE", NULL}
                                 : (const char *const[]){"KEY", "REVISION", "SIZE", NULL});
    while (more) {
        Pb__KvListRequest request = PB__KV_LIST_REQUEST__INIT;
        Pb__KvListReply *reply;
        request.prefix = (char *)(o->n > 0 ? o->arg[0] : "");
        request.after = after;
        request.max = 1000;
        request.values = o->values;
        if (client_call(ctl, CONTROL_KV_LIST, &request.base, CLIENT_CALL_MS, (ProtobufCMessage **)&reply, &err) < 0) {
            status = ctl_fail(&err);
            break;
        }
        for (size_t i = 0; i < reply->n_entries; i++) {
            const Pb__KvEntry *e = reply->entries[i];
            json_array_append_new(all, ctl_json(&e->base));
            table_cell(&table, "%s", e->key);
            table_cell(&table, "%llu", (unsigned long long)e->revision);
            table_cell(&table, "%llu", (unsigned long long)e->size);
            if (o->values)
                list_value(&table, e);
        }
        more = reply->more && reply->n_entries;
        if (more) {
            free(after);
            after = strdup(reply->entries[reply->n_entries - 1]->key);
        }
        rpc_unpack_free(&reply->base);
    }
    free(after);
    if (status == CTL_OK && ctl->output == CTL_JSON)
        ctl_print_json(json_incref(all));
    else if (status == CTL_OK)
        table_print(&table, stdout);
    json_decref(all);
    table_done(&table);
    return status;
}

static int kv_add(struct ctl *ctl, const struct kv_options *o)
{
    struct err err;
    Pb__KvAddRequest request = PB__KV_ADD_REQUEST__INIT;
    Pb__KvAddReply *reply;
    char *end;
    errno = 0;
    request.key = (char *)o->arg[0];
    request.amount = strtoll(o->n > 1 ? o->arg[1] : "1", &end, 10);
    if (errno || *end || end == o->arg[1]) {
        fprintf(stderr, "eepctl: kv add: '%s' is not a whole number of 64 bits\n", o->arg[1]);
        return CTL_USAGE;
    }
    request.has_ephemeral = request.ephemeral = o->ephemeral;
    request.request = (char *)o->request;
    if (client_call(ctl, CONTROL_KV_ADD, &request.base, CLIENT_CALL_MS, (ProtobufCMessage **)&reply, &err) < 0)
        return ctl_fail(&err);
    if (ctl->output == CTL_JSON)
        ctl_print_json(ctl_json(&reply->base));
    else
        printf("%lld\n", (long long)reply->value);
    rpc_unpack_free(&reply->base);
    return CTL_OK;
}

static int kv_cas(struct ctl *ctl, const struct kv_options *o)
{
    struct err err;
    Pb__KvCasRequest request = PB__KV_CAS_REQUEST__INIT;
    Pb__KvCasReply *reply;
    if (o->missing == (o->expected != NULL)) {
        fprintf(stderr, "eepctl: kv cas needs either --expect VALUE or --missing\n");
        return CTL_USAGE;
    }
    request.key = (char *)o->arg[0];
    request.value.data = (uint8_t *)o->arg[1];
    request.value.len = strlen(o->arg[1]);
    request.has_ephemeral = request.ephemeral = o->ephemeral || o->lease;
    request.has_lease = o->lease != 0;
    request.lease = o->lease;
    if (o->expected) {
        request.has_expected = 1;
        request.expected.data = (uint8_t *)o->expected;
        request.expected.len = strlen(o->expected);
    }
    if (client_call(ctl, CONTROL_KV_CAS, &request.base, CLIENT_CALL_MS, (ProtobufCMessage **)&reply, &err) < 0)
        return ctl_fail(&err);
    if (ctl->output == CTL_JSON)
        ctl_print_json(ctl_json(&reply->base));
    else if (reply->swapped)
        printf("swapped, revision %llu\n", (unsigned long long)reply->revision);
    else if (!reply->has_value)
        printf("not swapped: the key is missing\n");
    else
        printf("not swapped: it is %.*s\n", (int)reply->value.len, (const char *)reply->value.data);
    int status = reply->swapped ? CTL_OK : CTL_CONFLICT;
    rpc_unpack_free(&reply->base);
    return status;
}

/* ---- watching ---- */

static void change_print(struct ctl *ctl, const Pb__KvChange *change)
{
    if (ctl->output == CTL_JSON) {
        ctl_print_json(ctl_json(&change->base));
    } else {
        printf("%llu %s %s%s", (unsigned long long)change->revision, change->deleted ? "del" : "put", change->key,
               change->has_value ? " " : "");
        fwrite(change->value.data, 1, change->has_value ? change->value.len : 0, stdout);
        putchar('\n');
    }
    fflush(stdout);
}

/* Until it is interrupted, or the changes wanted are no longer remembered. */
static int kv_watch(struct ctl *ctl, const struct kv_options *o)
{
    struct err err;
    Pb__KvWatchRequest request = PB__KV_WATCH_REQUEST__INIT;
    ProtobufCMessage *reply;
    uint64_t id;
    request.prefix = (char *)(o->n ? o->arg[0] : "");
    request.from = o->from;
    request.has_values = request.values = o->values;
    int rc = client_connect(ctl, &err);
    if (rc == 0)
        rc = rpc_client_start(ctl->client, CONTROL_KV_WATCH, &request.base, &id, &err);
    while (rc >= 0 && (rc = rpc_client_next(ctl->client, id, -1, &reply, &err)) == 1) {
        const Pb__KvChanges *changes = (const Pb__KvChanges *)reply;
        for (size_t i = 0; i < changes->n_changes; i++)
            change_print(ctl, changes->changes[i]);
        rpc_unpack_free(reply);
    }
    return rc < 0 ? ctl_fail(&err) : CTL_OK;
}

/* ---- queues ---- */

static int kv_queue(struct ctl *ctl, const struct kv_options *o)
{
    struct err err;
    ProtobufCMessage *reply;
    int rc;
    if (strcmp(o->arg[0], "push") == 0) {
        Pb__QueuePushRequest request = PB__QUEUE_PUSH_REQUEST__INIT;
        request.queue = (char *)o->arg[1];
        request.value.data = (uint8_t *)o->arg[2];
        request.value.len = strlen(o->arg[2]);
        request.has_max_length = o->max_length != 0;
        request.max_length = o->max_length;
        rc = client_call(ctl, CONTROL_QUEUE_PUSH, &request.base, CLIENT_CALL_MS, &reply, &err);
    } else if (strcmp(o->arg[0], "pop") == 0) {
        Pb__QueuePopRequest request = PB__QUEUE_POP_REQUEST__INIT;
        request.queue = (char *)o->arg[1];
        request.wait_ms = o->wait_ms;
        rc = client_call(ctl, CONTROL_QUEUE_POP, &request.base, o->wait_ms ? -1 : CLIENT_CALL_MS, &reply, &err);
    } else {
        Pb__QueueLengthRequest request = PB__QUEUE_LENGTH_REQUEST__INIT;
        request.queue = (char *)o->arg[1];
        rc = client_call(ctl, CONTROL_QUEUE_LENGTH, &request.base, CLIENT_CALL_MS, &reply, &err);
    }
    if (rc < 0)
        return ctl_fail(&err);
    if (ctl->output == CTL_JSON) {
        ctl_print_json(ctl_json(reply));
    } else if (strcmp(o->arg[0], "pop") == 0) {
        const Pb__QueueValue *value = (const Pb__QueueValue *)reply;
        fwrite(value->value.data, 1, value->value.len, stdout); /* the very bytes */
        if (isatty(STDOUT_FILENO))
            putchar('\n');
    } else {
        printf("%llu\n", (unsigned long long)((const Pb__QueueLengthReply *)reply)->length);
    }
    rpc_unpack_free(reply);
    return CTL_OK;
}

static int kv_stat(struct ctl *ctl, const struct kv_options *o)
{
    (void)o;
    struct err err;
    ProtobufCMessage *reply;
    if (client_ask(ctl, CONTROL_KV_STAT, &reply, &err) < 0)
        return ctl_fail(&err);
    const Pb__KvStatReply *stat = (const Pb__KvStatReply *)reply;
    char used[32], budget[32];
    if (ctl->output == CTL_JSON)
        ctl_print_json(ctl_json(reply));
    else
        printf("%llu keys, %s of %s, revision %llu, changes kept from %llu, durability %s\n",
               (unsigned long long)stat->keys, ctl_bytes(stat->used_bytes, used, sizeof used),
               ctl_bytes(stat->budget_bytes, budget, sizeof budget), (unsigned long long)stat->revision,
               (unsigned long long)stat->first_revision, stat->durability);
    rpc_unpack_free(reply);
    return CTL_OK;
}

/* ---- the command ---- */

static const struct form {
    const char *verb;
    int min, max; /* arguments after it */
    const char *takes;
    int (*run)(struct ctl *ctl, const struct kv_options *o);
} forms[] = {
    {"get", 1, 1, "KEY", kv_get},
    {"put", 2, 2, "KEY VALUE", kv_put},
    {"add", 1, 2, "KEY [AMOUNT]", kv_add},
    {"cas", 2, 2, "KEY VALUE", kv_cas},
    {"del", 1, 1, "KEY", kv_del},
    {"list", 0, 1, "[PREFIX]", kv_list},
    {"watch", 0, 1, "[PREFIX]", kv_watch},
    {"queue", 2, 3, "push QUEUE VALUE, pop QUEUE, or len QUEUE", kv_queue},
    {"stat", 0, 0, "nothing", kv_stat},
};

static const struct form *form_of(const char *verb)
{
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++)
        if (strcmp(verb, forms[i].verb) == 0)
            return &forms[i];
    return NULL;
}

static bool queue_wrong(const struct kv_options *o)
{
    bool push = strcmp(o->arg[0], "push") == 0, other = !strcmp(o->arg[0], "pop") || !strcmp(o->arg[0], "len");
    return !((push && o->n == 3) || (other && o->n == 2));
}

static error_t kv_parse(int key, char *arg, struct argp_state *state)
{
    struct kv_options *o = state->input;
    switch (key) {
    case 'w': o->wait_ms = ctl_parse_seconds_ms(state, "--wait", arg); return 0;
    case 'v': o->values = true; return 0;
    case KEY_EPHEMERAL: o->ephemeral = true; return 0;
    case KEY_LEASE: o->lease = ctl_parse_u64(state, "--lease", arg); return 0;
    case KEY_FROM: o->from = ctl_parse_u64(state, "--from", arg); return 0;
    case KEY_REQUEST: o->request = arg; return 0;
    case KEY_EXPECT: o->expected = arg; return 0;
    case KEY_MISSING: o->missing = true; return 0;
    case KEY_MAX: o->max_length = ctl_parse_u32(state, "--max", arg, 1, UINT32_MAX); return 0;
    case ARGP_KEY_ARG:
        if (!o->verb)
            o->verb = arg;
        else if (o->n == 3)
            return ARGP_ERR_UNKNOWN;
        else
            o->arg[o->n++] = arg;
        return 0;
    case ARGP_KEY_END: {
        const struct form *form = o->verb ? form_of(o->verb) : NULL;
        if (!form)
            argp_error(state, "kv needs one of get, put, add, cas, del, list, watch, queue, stat");
        else if (o->n < form->min || o->n > form->max || (form->run == kv_queue && queue_wrong(o)))
            argp_error(state, "kv %s takes %s", form->verb, form->takes);
        return 0;
    }
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* A negative amount is no option: it goes behind a "--", at the end.  argv has room for one more. */
static int amount_last(int argc, char **argv)
{
    for (int i = 3; i < argc && strcmp(argv[1], "add") == 0; i++) {
        char *amount = argv[i];
        if (strcmp(amount, "--") == 0)
            break;
        if (amount[0] != '-' || amount[1] < '0' || amount[1] > '9' || argv[i - 1][0] == '-')
            continue;
        memmove(&argv[i], &argv[i + 1], (size_t)(argc - 1 - i) * sizeof *argv);
        argv[argc - 1] = (char *)"--";
        argv[argc] = amount;
        return argc + 1;
    }
    return argc;
}

int cmd_kv(struct ctl *ctl, int argc, char **argv)
{
    struct kv_options options = {0};
    const struct argp_option own[] = {
        {"wait", 'w', "SECONDS", 0, "get, queue pop: wait so long", 0},
        {"values", 'v', 0, 0, "list, watch: show the values, too", 0},
        {"ephemeral", KEY_EPHEMERAL, 0, 0, "put, add, cas: never on disk, gone with the coordinator", 0},
        {"lease", KEY_LEASE, "ID", 0, "put, cas: ephemeral, and gone when this lease ends", 0},
        {"request", KEY_REQUEST, "ID", 0, "add: a repetition under the same id adds nothing", 0},
        {"expect", KEY_EXPECT, "VALUE", 0, "cas: only if this is the value", 0},
        {"missing", KEY_MISSING, 0, 0, "cas: only if there is no such key", 0},
        {"from", KEY_FROM, "REVISION", 0, "watch: changes from this one on (default: from now)", 0},
        {"max", KEY_MAX, "N", 0, "queue push: fail when it is that long", 0},
        {0},
    };
    const struct argp argp = {
        .options = own,
        .parser = kv_parse,
        .args_doc = "get KEY\nput KEY VALUE\nadd KEY [AMOUNT]\ncas KEY VALUE\ndel KEY\nlist [PREFIX]\nwatch [PREFIX]\n"
                    "queue push QUEUE VALUE\nqueue pop QUEUE\nqueue len QUEUE\nstat",
        .doc = "Reads and writes the coordinator's key-value store.\v"
               "Examples:\n"
               "  eepctl kv put job/7/state ready\n"
               "  eepctl kv put job/7/blob - <file       the value comes from standard input\n"
               "  eepctl kv get job/7/state --wait 10\n"
               "  eepctl kv add job/7/count 5 --request a1\n"
               "  eepctl kv add job/7/count -5\n"
               "  eepctl kv cas job/7/leader me --missing    exit code 7 when it is there\n"
               "  eepctl kv list job/ --values\n"
               "  eepctl kv watch job/ --values\n"
               "  eepctl kv queue pop work --wait 60\n"
               "  eepctl kv del job/7/state\n",
    };
    char **args = calloc((size_t)argc + 2, sizeof *args);
    if (!args)
        abort();
    memcpy(args, argv, (size_t)argc * sizeof *args);
    ctl_parse(ctl, &argp, amount_last(argc, args), args, &options);
    int status = form_of(options.verb)->run(ctl, &options);
    free(args);
    return status;
}
