/* How eepctl shows things: errors with their exit codes, numbers with units, any message as JSON. */
#include <ctype.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "coordinator/eepctl/ctl.h"

static int exit_code(int code)
{
    switch (code) {
    case ERR_OK: return CTL_OK;
    case ERR_INVALID: return CTL_USAGE;
    case ERR_UNREACHABLE: return CTL_UNREACHABLE;
    case ERR_DENIED: return CTL_DENIED;
    case ERR_ABORTED: return CTL_ABORTED;
    case ERR_CONFLICT: return CTL_CONFLICT;
    default: return CTL_FAILED;
    }
}

int ctl_fail(const struct err *err)
{
    fprintf(stderr, "%seepctl:%s %s\n", ctl_paint(stderr, PAINT_BAD), ctl_paint(stderr, PAINT_END), err->text);
    return exit_code(err->code);
}

void ctl_print_json(json_t *value)
{
    json_dumpf(value, stdout, JSON_INDENT(2));
    fputc('\n', stdout);
    json_decref(value);
}

static json_t *bytes_json(const ProtobufCBinaryData *bytes)
{
    json_t *text = json_stringn((const char *)bytes->data, bytes->len); /* NULL when this is no UTF-8 */
    if (text)
        return text;
    static const char digits[] = "0123456789abcdef";
    char *hex = malloc(bytes->len * 2 + 1);
    if (!hex)
        return json_null();
    for (size_t i = 0; i < bytes->len; i++) {
        hex[2 * i] = digits[bytes->data[i] >> 4];
        hex[2 * i + 1] = digits[bytes->data[i] & 15];
    }
    text = json_pack("{s:s#}", "hex", hex, (int)(bytes->len * 2));
    free(hex);
    return text;
}

/* SCALE_UP becomes "scale-up", the word that people read elsewhere. */
static json_t *word_json(const char *name)
{
    char word[64];
    size_t n = 0;
    for (; name[n] && n + 1 < sizeof word; n++)
        word[n] = name[n] == '_' ? '-' : (char)tolower((unsigned char)name[n]);
    return json_stringn(word, n);
}

/* Fingerprints (fixed64) become hex strings: no JSON number holds them.  "No limit" becomes null. */
static json_t *field_json(const ProtobufCFieldDescriptor *field, const void *at)
{
    switch (field->type) {
    case PROTOBUF_C_TYPE_INT32:
    case PROTOBUF_C_TYPE_SINT32:
    case PROTOBUF_C_TYPE_SFIXED32:
        return json_integer(*(const int32_t *)at);
    case PROTOBUF_C_TYPE_UINT32:
    case PROTOBUF_C_TYPE_FIXED32:
        return json_integer(*(const uint32_t *)at);
    case PROTOBUF_C_TYPE_INT64:
    case PROTOBUF_C_TYPE_SINT64:
    case PROTOBUF_C_TYPE_SFIXED64:
        return json_integer(*(const int64_t *)at);
    case PROTOBUF_C_TYPE_UINT64: {
        uint64_t value = *(const uint64_t *)at;
        return value > INT64_MAX ? json_null() : json_integer((json_int_t)value);
    }
    case PROTOBUF_C_TYPE_FIXED64:
        return json_sprintf("%016llx", (unsigned long long)*(const uint64_t *)at);
    case PROTOBUF_C_TYPE_BOOL:
        return json_boolean(*(const protobuf_c_boolean *)at);
    case PROTOBUF_C_TYPE_ENUM: {
        const ProtobufCEnumValue *value = protobuf_c_enum_descriptor_get_value(field->descriptor, *(const int *)at);
        return word_json(value ? value->name : "?");
    }
    case PROTOBUF_C_TYPE_STRING: {
        json_t *text = json_string(*(char *const *)at);
        return text ? text : json_string("");
    }
    case PROTOBUF_C_TYPE_BYTES:
        return bytes_json(at);
    case PROTOBUF_C_TYPE_MESSAGE:
        return ctl_json(*(ProtobufCMessage *const *)at);
    case PROTOBUF_C_TYPE_FLOAT:
        return json_real((double)*(const float *)at);
    case PROTOBUF_C_TYPE_DOUBLE:
        return json_real(*(const double *)at);
    default:
        return json_null();
    }
}

static size_t element_size(ProtobufCType type)
{
    switch (type) {
    case PROTOBUF_C_TYPE_STRING:
    case PROTOBUF_C_TYPE_MESSAGE:
        return sizeof(void *);
    case PROTOBUF_C_TYPE_BYTES:
        return sizeof(ProtobufCBinaryData);
    case PROTOBUF_C_TYPE_BOOL:
        return sizeof(protobuf_c_boolean);
    case PROTOBUF_C_TYPE_INT64:
    case PROTOBUF_C_TYPE_SINT64:
    case PROTOBUF_C_TYPE_SFIXED64:
    case PROTOBUF_C_TYPE_UINT64:
    case PROTOBUF_C_TYPE_FIXED64:
    case PROTOBUF_C_TYPE_DOUBLE:
        return 8;
    default:
        return 4;
    }
}

json_t *ctl_json(const ProtobufCMessage *message)
{
    json_t *object = json_object();
    for (unsigned i = 0; i < message->descriptor->n_fields; i++) {
        const ProtobufCFieldDescriptor *field = &message->descriptor->fields[i];
        const char *at = (const char *)message + field->offset;
        if (field->label == PROTOBUF_C_LABEL_REPEATED) {
            size_t n = *(const size_t *)((const char *)message + field->quantifier_offset);
            const char *element = *(const char *const *)at;
            json_t *array = json_array();
            for (size_t k = 0; k < n; k++)
                json_array_append_new(array, field_json(field, element + k * element_size(field->type)));
            json_object_set_new(object, field->name, array);
            continue;
        }
        if (field->label == PROTOBUF_C_LABEL_OPTIONAL) {
            bool pointer = field->type == PROTOBUF_C_TYPE_STRING || field->type == PROTOBUF_C_TYPE_MESSAGE;
            bool present = pointer ? *(const void *const *)at != NULL
                                   : *(const protobuf_c_boolean *)((const char *)message + field->quantifier_offset);
            if (!present)
                continue;
        }
        json_object_set_new(object, field->name, field_json(field, at));
    }
    return object;
}

static json_t *round_json(const char *kind, uint32_t round, uint32_t before)
{
    return json_pack("{s:s, s:i, s:b}", "what", kind, "round", (int)round, "before_commit", round < before);
}

json_t *ctl_plan_json(const struct plan *plan)
{
    json_t *moves = json_array();
    for (uint32_t i = 0; i < plan->n_retires; i++) {
        const struct retire *r = &plan->retires[i];
        json_t *item = round_json("retire", r->round, plan->rounds_before);
        json_object_update_new(item, json_pack("{s:i, s:i, s:i}", "layer", (int)r->layer, "party", (int)r->party,
                                               "slot", (int)r->slot));
        json_array_append_new(moves, item);
    }
    for (uint32_t i = 0; i < plan->n_moves; i++) {
        const struct move *m = &plan->moves[i];
        json_t *item = round_json("move", m->round, plan->rounds_before);
        json_object_update_new(item, json_pack("{s:i, s:i, s:i, s:i, s:i, s:i}", "layer", (int)m->layer, "expert",
                                               (int)m->expert, "from", (int)m->src, "from_slot", (int)m->src_slot,
                                               "to", (int)m->dst, "to_slot", (int)m->dst_slot));
        json_array_append_new(moves, item);
    }
    return moves;
}

const char *ctl_bytes(uint64_t bytes, char *buffer, size_t size)
{
    static const char *const unit[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double value = (double)bytes;
    unsigned u = 0;
    for (; value >= 1024 && u < 6; u++)
        value /= 1024;
    snprintf(buffer, size, u == 0 ? "%.0f %s" : "%.1f %s", value, unit[u]);
    return buffer;
}

const char *ctl_duration(uint64_t ns, char *buffer, size_t size)
{
    if (ns < 1000)
        snprintf(buffer, size, "%llu ns", (unsigned long long)ns);
    else if (ns < 1000000)
        snprintf(buffer, size, "%.1f us", (double)ns / 1e3);
    else if (ns < 1000000000)
        snprintf(buffer, size, "%.1f ms", (double)ns / 1e6);
    else
        snprintf(buffer, size, "%.2f s", (double)ns / 1e9);
    return buffer;
}

void ctl_wall_time(uint64_t ms, char *text, size_t size)
{
    time_t seconds = (time_t)(ms / 1000);
    struct tm tm;
    if (!gmtime_r(&seconds, &tm) || !strftime(text, size, "%Y-%m-%dT%H:%M:%SZ", &tm))
        snprintf(text, size, "?");
}

const char *ctl_kind(Pb__OpKind kind)
{
    switch (kind) {
    case PB__OP_KIND__START: return "start";
    case PB__OP_KIND__SCALE_UP: return "scale-up";
    case PB__OP_KIND__SCALE_DOWN: return "scale-down";
    case PB__OP_KIND__REPAIR: return "repair";
    case PB__OP_KIND__REBALANCE: return "rebalance";
    default: return "?";
    }
}

const char *ctl_outcome(Pb__OpOutcome outcome)
{
    switch (outcome) {
    case PB__OP_OUTCOME__RUNNING: return "running";
    case PB__OP_OUTCOME__DONE: return "done";
    case PB__OP_OUTCOME__ABORTED: return "aborted";
    case PB__OP_OUTCOME__FAILED: return "failed";
    default: return "?";
    }
}

void ctl_print_operation(const Pb__Operation *op, FILE *out)
{
    char a[32], b[32];
    fprintf(out, "operation %llu: %s %s %u ranks, %s", (unsigned long long)op->op, ctl_kind(op->kind),
            op->kind == PB__OP_KIND__REBALANCE ? "of" : "to", op->target, ctl_outcome(op->outcome));
    if (op->outcome == PB__OP_OUTCOME__RUNNING) {
        fprintf(out, ", phase %s for %s", op->phase, ctl_duration(op->phase_age_ms * 1000000, a, sizeof a));
        if (op->rounds)
            fprintf(out, ", round %u of %u", op->round, op->rounds);
    } else if (op->ended_ms >= op->started_ms) {
        fprintf(out, " in %s", ctl_duration((op->ended_ms - op->started_ms) * 1000000, a, sizeof a));
    }
    if (*op->why)
        fprintf(out, ": %s", op->why);
    fputc('\n', out);
    const char *verb = op->kind == PB__OP_KIND__START ? "loaded" : "moved";
    if (op->bytes_planned > op->bytes_done || (op->bytes_planned && op->kind != PB__OP_KIND__START))
        fprintf(out, "  %s %s of %s\n", verb, ctl_bytes(op->bytes_done, a, sizeof a),
                ctl_bytes(op->bytes_planned, b, sizeof b));
    else if (op->bytes_done)
        fprintf(out, "  %s %s\n", verb, ctl_bytes(op->bytes_done, a, sizeof a));
    if (op->outcome != PB__OP_OUTCOME__RUNNING && op->epoch)
        fprintf(out, "  longest pause of an engine: %s\n",
                op->hold_ns_max ? ctl_duration(op->hold_ns_max, a, sizeof a) : "none was held");
    if (op->n_phases) {
        fputs("  phases:", out);
        for (size_t i = 0; i < op->n_phases; i++)
            fprintf(out, "%s %s %s", i ? "," : "", op->phases[i]->phase, ctl_duration(op->phases[i]->ns, a, sizeof a));
        fputc('\n', out);
    }
    if (*op->awaited && op->outcome == PB__OP_OUTCOME__RUNNING) {
        fprintf(out, "  awaited: %s, since %s ago", op->awaited, ctl_duration(op->phase_age_ms * 1000000, a, sizeof a));
        if (op->has_deadline_in_ms)
            fprintf(out, ", for at most %s more", ctl_duration(op->deadline_in_ms * 1000000, a, sizeof a));
        fputc('\n', out);
    }
}

void ctl_print_plan(const Pb__PlanSummary *plan, FILE *out)
{
    char a[32];
    uint64_t arrivals = plan->arrivals_before + plan->arrivals_after;
    fprintf(out, "plan: %u rounds before the commit, %u after it; %u moves, %u of them inside one rank\n",
            plan->rounds_before, plan->rounds_after, plan->moves, plan->local_copies);
    fprintf(out, "  arrivals: %llu before the commit, %llu after it, %s in all\n",
            (unsigned long long)plan->arrivals_before, (unsigned long long)plan->arrivals_after,
            ctl_bytes(arrivals * plan->expert_bytes, a, sizeof a));
    fprintf(out, "  bounds: hard %llu arrivals, fill %llu arrivals\n", (unsigned long long)plan->bound_hard,
            (unsigned long long)plan->bound_fill);
    if (plan->has_balance_after)
        fprintf(out, "  balance: %.3f now, %.3f at the commit, %.3f after it (at most %.3f)\n", plan->balance_before,
                plan->balance_at_commit, plan->balance_after, plan->balance_ceiling);
    if (plan->has_samples_after)
        fprintf(out, "  balance of single samples: %.3f now, %.3f after it, planned for %s\n", plan->samples_before,
                plan->samples_after, plan->joint ? "them jointly" : "their mean");
    fprintf(out, "  dense weights: %s to each rank that joins\n", ctl_bytes(plan->dense_bytes, a, sizeof a));
}
