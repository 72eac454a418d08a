/* Requests: issued, continued elsewhere when an engine lets go of them, verified token for token.  Loop thread.
 *
 * A request goes on from the tokens it has: they become part of the prompt.  Greedy decoding makes that the same
 * computation, so the tokens must still be the reference's. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "tests/feeder/feeder.h"

#define REFUSED_BACK_OFF_MS 20

static const int32_t *reference_rows(const struct safetensors *file, const char *name, uint32_t *ret_rows,
                                     uint32_t *ret_cols)
{
    const struct safetensors_tensor *t = safetensors_find(file, name);
    if (!t || strcmp(t->dtype, "I32") != 0 || t->dims != 2 || t->shape[0] == 0 || t->shape[1] == 0 ||
        t->shape[0] > UINT32_MAX || t->shape[1] > UINT32_MAX || (uintptr_t)t->data % 4 != 0)
        return NULL;
    *ret_rows = (uint32_t)t->shape[0];
    *ret_cols = (uint32_t)t->shape[1];
    return (const int32_t *)(const void *)t->data;
}

int jobs_open(struct feeder *f, struct err *err)
{
    char path[4096];
    uint32_t rows = 0;
    snprintf(path, sizeof path, "%s/reference.safetensors", f->options.data);
    int rc = safetensors_open(path, &f->reference, err);
    if (rc)
        return rc;
    f->input = reference_rows(f->reference, "input_ids", &f->prompts, &f->prompt_tokens);
    f->greedy = reference_rows(f->reference, "greedy_tokens", &rows, &f->greedy_tokens);
    if (!f->input || !f->greedy || rows != f->prompts)
        return err_set(err, ERR_INVALID, "%s: input_ids and greedy_tokens are not two I32 tables of as many rows",
                       path);
    if (f->options.max_tokens > f->greedy_tokens)
        return err_set(err, ERR_INVALID, "--max-tokens %u, but %s knows %u", f->options.max_tokens, path,
                       f->greedy_tokens);
    f->jobs = calloc(f->options.concurrency, sizeof *f->jobs);
    return f->jobs ? 0 : err_set(err, ERR_NOMEM, "out of memory for %u requests", f->options.concurrency);
}

static char *job_line(const struct feeder *f, const struct job *job)
{
    char id[64];
    snprintf(id, sizeof id, "%llu.%u", (unsigned long long)job->number, job->attempt);
    json_t *prompt = json_array();
    for (uint32_t i = 0; i < f->prompt_tokens; i++)
        json_array_append_new(prompt, json_integer(f->input[(size_t)job->prompt * f->prompt_tokens + i]));
    for (uint32_t i = 0; i < job->got; i++)
        json_array_append_new(prompt, json_integer(f->greedy[(size_t)job->prompt * f->greedy_tokens + i]));
    json_t *o =
        json_pack("{s:s, s:o, s:i}", "id", id, "prompt", prompt, "max_tokens", (int)(f->options.max_tokens - job->got));
    char *line = o ? json_dumps(o, JSON_COMPACT) : NULL;
    json_decref(o);
    return line;
}

static void job_detach(struct job *job)
{
    if (job->target)
        job->target->outstanding--;
    job->target = NULL;
}

/* False: nobody can take it now. */
static bool job_send(struct feeder *f, struct job *job)
{
    struct target *t = target_pick(f);
    if (!t)
        return false;
    job->attempt++;
    job->base = job->got;
    char *line = job_line(f, job);
    if (line && target_send(t, line) == 0) {
        job->target = t;
        t->outstanding++;
    }
    free(line);
    return job->target != NULL;
}

static bool issuing(const struct feeder *f)
{
    return f->stopped_ns == 0 && (f->options.requests == 0 || f->figures.issued < f->options.requests);
}

/* All in turn; drifting: a quarter of them, and another quarter after a while. */
static uint32_t next_prompt(const struct feeder *f)
{
    uint64_t quarter = f->prompts > 4 ? f->prompts / 4 : 1, drift_ms = f->options.drift_ms;
    if (!drift_ms)
        return (uint32_t)(f->figures.issued % f->prompts);
    return (uint32_t)((clock_now_ms() / drift_ms * quarter + f->figures.issued % quarter) % f->prompts);
}

void jobs_pump(struct feeder *f)
{
    for (uint32_t i = 0; i < f->options.concurrency; i++) {
        struct job *job = &f->jobs[i];
        if (!job->active) {
            /* A request counts as issued when there is somebody to send it to. */
            if (!issuing(f))
                continue;
            *job = (struct job){.number = f->figures.issued,
                                .prompt = next_prompt(f),
                                .issued_ns = clock_now_ns()};
            if (!job_send(f, job))
                return;
            job->active = true;
            f->figures.issued++;
        } else if (!job->target && !job_send(f, job)) {
            return;
        }
    }
}

static void job_end(struct feeder *f, struct job *job, uint64_t *counter, const char *why)
{
    ++*counter;
    if (why && !f->figures.first_error[0]) {
        snprintf(f->figures.first_error, sizeof f->figures.first_error, "request %llu (prompt %u) on %s: %s",
                 (unsigned long long)job->number, job->prompt, job->target ? job->target->address : "no engine", why);
        fprintf(stderr, "eep-feeder: %s\n", f->figures.first_error);
    }
    job_detach(job);
    if (job->got > 1)
        figures_request(&f->figures, job);
    job->active = false;
}

/* The engine has let go of it. */
static void job_retry(struct job *job, uint64_t *counter)
{
    ++*counter;
    job_detach(job);
}

static void job_token(struct feeder *f, struct job *job, const json_t *o)
{
    const json_t *token = json_object_get(o, "token"), *index = json_object_get(o, "index");
    uint64_t now = clock_now_ns();
    char why[128];
    int32_t want = job->got < f->options.max_tokens ? f->greedy[(size_t)job->prompt * f->greedy_tokens + job->got] : -1;
    if (!json_is_integer(token) || json_integer_value(token) != want || !json_is_integer(index) ||
        json_integer_value(index) != (json_int_t)(job->got - job->base)) {
        snprintf(why, sizeof why, "token %u is %lld (index %lld), the reference has %d", job->got,
                 (long long)json_integer_value(token), (long long)json_integer_value(index), want);
        job_end(f, job, &f->figures.wrong, why);
        return;
    }
    f->figures.tokens++;
    if (job->got++ > 0) {
        uint64_t gap = now - job->last_ns;
        job->longest_ns = gap > job->longest_ns ? gap : job->longest_ns;
        figures_gap(&f->figures, job, gap);
    } else if (now - job->issued_ns > f->figures.longest_first_ns) {
        f->figures.longest_first_ns = now - job->issued_ns;
    }
    job->last_ns = now;
}

/* What is handed back must be what was sent before. */
static bool handback_right(const struct feeder *f, const struct job *job, const json_t *tokens)
{
    if (json_array_size(tokens) != job->got - job->base)
        return false;
    for (uint32_t i = job->base; i < job->got; i++) {
        if (json_integer_value(json_array_get(tokens, i - job->base)) !=
            f->greedy[(size_t)job->prompt * f->greedy_tokens + i])
            return false;
    }
    return true;
}

static bool refusal_passes(const char *why)
{
    return !strcmp(why, "draining") || !strcmp(why, "starting") || !strcmp(why, "leaving") || !strcmp(why, "ending");
}

static void job_reply(struct feeder *f, struct job *job, const json_t *o)
{
    const char *refused = json_string_value(json_object_get(o, "refused"));
    if (json_object_get(o, "token")) {
        job_token(f, job, o);
    } else if (json_is_true(json_object_get(o, "done"))) {
        if (job->got == f->options.max_tokens)
            job_end(f, job, &f->figures.completed, NULL);
        else
            job_end(f, job, &f->figures.wrong, "ended too early");
    } else if (json_is_true(json_object_get(o, "handback"))) {
        if (handback_right(f, job, json_object_get(o, "tokens")))
            job_retry(job, &f->figures.handed_back);
        else
            job_end(f, job, &f->figures.wrong, "handed back other tokens than it had sent");
    } else if (refused && refusal_passes(refused)) {
        target_back_off(job->target, REFUSED_BACK_OFF_MS);
        job_retry(job, &f->figures.refused);
    } else {
        job_end(f, job, &f->figures.failed, refused ? refused : "a reply that means nothing");
    }
}

void jobs_line(struct feeder *f, struct target *t, const char *line)
{
    unsigned long long number;
    unsigned attempt;
    json_t *o = json_loads(line, 0, NULL);
    const char *id = json_string_value(json_object_get(o, "id"));
    if (id && sscanf(id, "%llu.%u", &number, &attempt) == 2) {
        for (uint32_t i = 0; i < f->options.concurrency; i++) {
            struct job *job = &f->jobs[i];
            if (job->active && job->number == number && job->attempt == attempt && job->target == t) {
                job_reply(f, job, o);
                break;
            }
        }
    }
    json_decref(o);
}

void jobs_lost(struct feeder *f, struct target *t)
{
    for (uint32_t i = 0; i < f->options.concurrency; i++) {
        if (f->jobs[i].active && f->jobs[i].target == t)
            job_retry(&f->jobs[i], &f->figures.lost);
    }
}

uint32_t jobs_active(const struct feeder *f)
{
    uint32_t n = 0;
    for (uint32_t i = 0; f->jobs && i < f->options.concurrency; i++)
        n += f->jobs[i].active;
    return n;
}

void jobs_close(struct feeder *f)
{
    free(f->jobs);
    safetensors_close(f->reference);
}
