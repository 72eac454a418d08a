/* Options from configuration files, and from files and command line together: see options.h.  Main thread.
 *
 * libinih reads the lines.  What is read is kept as a list of (name, value, line), so that a later source can replace
 * an earlier one's before anything is parsed, and a reload can tell what has changed. */
#include "common/options.h"

#include <errno.h>
#include <getopt.h>
#include <ini.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "common/options_parts.h"

#define OPTIONS_MAX 128
#define LINE_BYTES  200 /* of libinih: longer lines would be taken for two */
#define WHERE_BYTES 512

struct entry {
    const struct argp_option *option;
    char *value; /* "" of an option without a value */
    char where[WHERE_BYTES];
    struct entry *prev, *next;
};

struct options_sources {
    int argc;
    char **argv; /* borrowed */
    struct entry *entries;
};

static void entry_drop(struct options_sources *s, struct entry *e)
{
    DL_DELETE(s->entries, e);
    free(e->value);
    free(e);
}

void options_free(struct options_sources *s)
{
    struct entry *e, *next;
    if (!s)
        return;
    DL_FOREACH_SAFE(s->entries, e, next) entry_drop(s, e);
    free(s);
}

/* ---- names ---- */

static bool option_is_key(const struct argp_option *o)
{
    return o->name && !(o->flags & OPTIONS_COMMAND_LINE);
}

static bool table_end(const struct argp_option *o)
{
    return !o->name && !o->key && !o->doc && !o->group;
}

static size_t smallest(size_t a, size_t b, size_t c)
{
    size_t ab = a < b ? a : b;
    return ab < c ? ab : c;
}

/* Levenshtein's distance. */
static size_t distance(const char *a, const char *b)
{
    size_t row[64], n = strlen(b);
    if (n >= sizeof row / sizeof row[0])
        return SIZE_MAX;
    for (size_t j = 0; j <= n; j++)
        row[j] = j;
    for (size_t i = 0; a[i]; i++) {
        size_t diagonal = row[0];
        row[0] = i + 1;
        for (size_t j = 0; j < n; j++) {
            size_t above = row[j + 1];
            row[j + 1] = smallest(above + 1, row[j] + 1, diagonal + (a[i] != b[j]));
            diagonal = above;
        }
    }
    return row[n];
}

static const struct argp_option *option_find(const struct argp_option *table, const char *name,
                                             const char **ret_nearest)
{
    size_t best = SIZE_MAX;
    *ret_nearest = NULL;
    for (const struct argp_option *o = table; !table_end(o); o++) {
        if (!option_is_key(o))
            continue;
        if (strcmp(o->name, name) == 0)
            return o;
        /* a name that was cut short is nearer than one that looks alike */
        size_t d = *name && strncmp(name, o->name, strlen(name)) == 0 ? 1 : distance(name, o->name);
        if (d < best) {
            best = d;
            *ret_nearest = o->name;
        }
    }
    return NULL;
}

/* ---- one file ---- */

struct reading {
    const struct options_program *program;
    struct options_sources *sources;
    FILE *file;
    const char *path;
    unsigned line;
    struct entry *first; /* of this file; those before are of earlier ones */
    struct err *err;     /* code 0 until there is a mistake */
};

#define SAY(r, ...) (r->err->code ? 0 : err_set(r->err, ERR_INVALID, __VA_ARGS__))

/* Lines for libinih, whole or not at all. */
static char *read_line(char *buffer, int size, void *user)
{
    struct reading *r = user;
    if (r->err->code || !fgets(buffer, size, r->file))
        return NULL;
    r->line++;
    if (!strchr(buffer, '\n') && !feof(r->file)) {
        SAY(r, "%s:%u: the line is longer than %d characters", r->path, r->line, size - 2);
        return NULL;
    }
    return buffer;
}

static int boolean(const char *value)
{
    static const char *const words[2][4] = {{"no", "false", "off", "0"}, {"yes", "true", "on", "1"}};
    for (int b = 0; b < 2; b++)
        for (size_t i = 0; i < 4; i++)
            if (strcmp(value, words[b][i]) == 0)
                return b;
    return -1;
}

/* Values of earlier files go; a second one of this file is a mistake unless the option is repeatable. */
static bool replace(struct reading *r, const struct argp_option *option)
{
    struct entry *e, *next;
    bool here = false;
    DL_FOREACH_SAFE(r->sources->entries, e, next)
    {
        here = here || e == r->first;
        if (e->option != option)
            continue;
        if (!here) {
            entry_drop(r->sources, e);
        } else if (!(option->flags & OPTIONS_REPEATABLE)) {
            SAY(r, "%s:%u: '%s' stands twice in this file, also in %s", r->path, r->line, option->name, e->where);
            return false;
        }
    }
    return true;
}

/* A key of libinih; 0 is an error there. */
static int on_key(void *user, const char *section, const char *name, const char *value)
{
    struct reading *r = user;
    const char *nearest;
    if (r->err->code)
        return 0;
    if (strcmp(section, r->program->section) != 0) {
        SAY(r,
            *section ? "%s:%u: the section [%s] is unknown: use [%s]"
                     : "%s:%u: '%s' stands before any section: begin the file with [%s]",
            r->path, r->line, *section ? section : name, r->program->section);
        return 0;
    }
    const struct argp_option *option = option_find(r->program->argp->options, name, &nearest);
    if (!option) {
        SAY(r, "%s:%u: there is no option '%s'; the nearest one is '%s'", r->path, r->line, name,
            nearest ? nearest : "");
        return 0;
    }
    int yes = option->arg ? 1 : boolean(value);
    if (yes < 0) {
        SAY(r, "%s:%u: '%s' is yes or no, not '%s'", r->path, r->line, name, value);
        return 0;
    }
    if (!replace(r, option))
        return 0;
    struct entry *e = calloc(1, sizeof *e);
    if (!e || !(e->value = strdup(option->arg ? value : yes ? "yes" : "no"))) {
        free(e);
        SAY(r, "out of memory");
        return 0;
    }
    e->option = option;
    snprintf(e->where, sizeof e->where, "%s:%u", r->path, r->line);
    DL_APPEND(r->sources->entries, e);
    if (!r->first)
        r->first = e;
    return 1;
}

/* path: "-FILE" may be missing. */
static int file_read(const struct options_program *program, struct options_sources *sources, const char *path,
                     struct err *err)
{
    bool may_miss = path[0] == '-';
    struct reading r = {.program = program, .sources = sources, .path = path + may_miss, .err = err};
    err->code = 0;
    r.file = fopen(r.path, "re");
    if (!r.file) {
        if (may_miss && errno == ENOENT)
            return 0;
        return err_set(err, ERR_INVALID, "cannot read the configuration file %s: %s", r.path, strerror(errno));
    }
    int bad_line = ini_parse_stream(read_line, &r, on_key, &r);
    if (!err->code && bad_line)
        SAY((&r), "%s:%d: neither [section] nor key = value", r.path, bad_line);
    if (!err->code && ferror(r.file))
        SAY((&r), "cannot read the configuration file %s: %s", r.path, strerror(EIO));
    fclose(r.file);
    return err->code;
}

/* ---- files and command line ---- */

/* What the command line says: files are read, and options that it has are dropped from them. */
static int sources_scan(const struct options_program *program, struct options_sources *s, struct err *err)
{
    struct option longs[OPTIONS_MAX + 1];
    const struct argp_option *of[OPTIONS_MAX];
    bool said[OPTIONS_MAX] = {false};
    int n = 0, at, key, rc = 0;
    memset(longs, 0, sizeof longs);
    for (const struct argp_option *o = program->argp->options; !table_end(o) && n < OPTIONS_MAX; o++) {
        if (!o->name)
            continue;
        of[n] = o;
        longs[n++] = (struct option){.name = o->name, .has_arg = o->arg ? required_argument : no_argument};
    }
    char **copy = calloc((size_t)s->argc + 1, sizeof *copy); /* getopt moves them about */
    if (!copy)
        return err_set(err, ERR_NOMEM, "out of memory");
    memcpy(copy, s->argv, (size_t)s->argc * sizeof *copy);
    optind = 0;
    opterr = 0; /* argp complains, afterwards */
    while (rc == 0 && (key = getopt_long(s->argc, copy, "h", longs, &at)) != -1) {
        if (key != 0)
            continue;
        said[at] = true;
        if (of[at]->key == OPTIONS_KEY_CONFIG)
            rc = file_read(program, s, optarg, err);
    }
    free(copy);
    struct entry *e, *next;
    DL_FOREACH_SAFE(s->entries, e, next)
    for (int i = 0; i < n; i++)
        if (said[i] && of[i] == e->option) {
            entry_drop(s, e);
            break;
        }
    return rc;
}

struct wrapped {
    const struct options_program *program;
    const struct options_sources *sources;
    void *input;
    struct options_place place;
    bool check;
};

/* What files say comes first; without a value there is only "yes" to be told. */
static error_t entries_parse(struct wrapped *w, struct argp_state *state)
{
    const struct entry *e;
    DL_FOREACH(w->sources->entries, e)
    {
        if (!e->option->arg && boolean(e->value) == 0)
            continue;
        w->place.where = e->where;
        error_t rc = w->program->argp->parser(e->option->key, e->option->arg ? e->value : NULL, state);
        if (rc && w->place.err && !w->place.err->code)
            err_set(w->place.err, ERR_INVALID, "%s: '%s' cannot be parsed: %s", e->where, e->option->name, strerror(rc));
        if (rc && w->place.err)
            break; /* told there: argp does not free what it has when its beginning fails */
        if (rc)
            return rc;
    }
    w->place.where = "";
    return 0;
}

static error_t wrapped_parse(int key, char *arg, struct argp_state *state)
{
    struct wrapped *w = state->input;
    error_t rc = 0;
    state->hook = &w->place;
    state->input = w->input;
    if (key == OPTIONS_KEY_CHECK)
        w->check = true;
    else if (key == ARGP_KEY_INIT)
        rc = entries_parse(w, state);
    else if (key != OPTIONS_KEY_CONFIG)
        rc = w->program->argp->parser(key, arg, state);
    state->input = w;
    return rc;
}

static int sources_parse(const struct options_program *program, const struct options_sources *s, unsigned flags,
                         void *input, bool *ret_check, struct err *err)
{
    struct wrapped w = {.program = program, .sources = s, .input = input, .place = {.where = "", .err = err}};
    struct argp argp = *program->argp;
    argp.parser = wrapped_parse;
    error_t rc = argp_parse(&argp, s->argc, s->argv, flags | ARGP_NO_HELP, NULL, &w);
    if (err && err->code)
        return err->code;
    if (rc)
        return err_set(err, ERR_INVALID, "the options cannot be parsed: %s", strerror(rc));
    *ret_check = w.check;
    return 0;
}

static int sources_new(const struct options_program *program, int argc, char **argv,
                       struct options_sources **ret_sources, struct err *err)
{
    struct options_sources *s = calloc(1, sizeof *s);
    if (!s)
        return err_set(err, ERR_NOMEM, "out of memory");
    s->argc = argc;
    s->argv = argv;
    int rc = sources_scan(program, s, err);
    if (rc < 0)
        options_free(s);
    else
        *ret_sources = s;
    return rc;
}

void options_parse(const struct options_program *program, int argc, char **argv, void *input,
                   struct options_sources **ret_sources, bool *ret_check)
{
    struct err err = {0};
    argp_err_exit_status = 2;
    if (sources_new(program, argc, argv, ret_sources, &err) < 0) {
        fprintf(stderr, "%s: %s\n", program_invocation_short_name, err.text);
        exit(2);
    }
    if (sources_parse(program, *ret_sources, 0, input, ret_check, NULL) < 0)
        exit(2);
}

/* ---- reload ---- */

static const struct entry *entry_nth(const struct options_sources *s, const struct argp_option *option, unsigned nth)
{
    const struct entry *e;
    DL_FOREACH(s->entries, e)
    {
        bool no = !option->arg && boolean(e->value) == 0; /* the same as nothing */
        if (e->option == option && !no && nth-- == 0)
            return e;
    }
    return NULL;
}

static bool option_same(const struct options_sources *a, const struct options_sources *b,
                        const struct argp_option *option)
{
    for (unsigned i = 0;; i++) {
        const struct entry *x = entry_nth(a, option, i), *y = entry_nth(b, option, i);
        if (!x || !y)
            return !x && !y;
        if (strcmp(x->value, y->value) != 0)
            return false;
    }
}

static char *restart_names(const struct options_program *program, const struct options_sources *first,
                           const struct options_sources *now)
{
    char *text = NULL;
    size_t size;
    FILE *f = open_memstream(&text, &size);
    if (!f)
        return NULL;
    const char *before = "";
    for (const struct argp_option *o = program->argp->options; !table_end(o); o++) {
        if (!option_is_key(o) || (o->flags & OPTIONS_RELOADABLE) || option_same(first, now, o))
            continue;
        fprintf(f, "%s%s", before, o->name);
        before = ",";
    }
    fclose(f);
    return text;
}

int options_reload(const struct options_program *program, const struct options_sources *first, void *input,
                   struct options_sources **ret_sources, char **ret_restart, struct err *err)
{
    struct options_sources *s = NULL;
    bool check;
    err->code = 0;
    int rc = sources_new(program, first->argc, first->argv, &s, err);
    if (rc < 0)
        return rc;
    rc = sources_parse(program, s, ARGP_NO_EXIT | ARGP_NO_ERRS, input, &check, err);
    char *restart = rc < 0 ? NULL : restart_names(program, first, s);
    if (rc == 0 && !restart)
        rc = err_set(err, ERR_NOMEM, "out of memory");
    if (rc < 0) {
        options_free(s);
        return rc;
    }
    *ret_sources = s;
    *ret_restart = restart;
    return 0;
}
