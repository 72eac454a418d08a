/* What the names of tensors say: no model family is known here.
 *
 *   <stack>layers.L.<anything>.experts.E.<tail>   a tensor of expert E
 *   <stack>layers.L.<anything>.experts.<tail>     one of all experts of the layer, its first dimension counts them
 *   a component that begins with "mtp"            multi-token prediction: not part of the model that is served
 *   everything else without "experts"             dense; shared experts are that ("shared_experts" is another word)
 *   anything else with a component "experts"      refused: a layout that this loader would get wrong
 *
 * And the fuse recipes: of gate and up projections that separate tensors hold, one part is made.  Pure. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent/checkpoint_internal.h"

/* ---- one name ---- */

struct word {
    const char *at;
    size_t len;
};

static bool word_is(struct word w, const char *text)
{
    return w.len == strlen(text) && memcmp(w.at, text, w.len) == 0;
}

static bool word_number(struct word w, uint32_t *ret_number)
{
    if (w.len == 0 || w.len > 6 || (w.len > 1 && w.at[0] == '0'))
        return false;
    uint32_t number = 0;
    for (size_t i = 0; i < w.len; i++) {
        if (w.at[i] < '0' || w.at[i] > '9')
            return false;
        number = number * 10 + (uint32_t)(w.at[i] - '0');
    }
    *ret_number = number;
    return true;
}

#define WORDS_MAX 32

static size_t words_split(const char *name, struct word *ret_words)
{
    size_t n = 0;
    while (n < WORDS_MAX) {
        size_t len = strcspn(name, ".");
        ret_words[n++] = (struct word){name, len};
        if (name[len] == '\0')
            break;
        name += len + 1;
    }
    return n;
}

struct name name_parse(const struct safetensors_tensor *t)
{
    struct name name = {.tensor = t, .kind = NAME_DENSE};
    struct word words[WORDS_MAX];
    size_t n = words_split(t->name, words), experts = n;
    for (size_t i = 0; i < n; i++) {
        if (i + 1 < n && !name.has_layer && word_is(words[i], "layers") && word_number(words[i + 1], &name.layer)) {
            name.has_layer = true;
            name.stack = (size_t)(words[i + 1].at - t->name);
        }
        if (words[i].len >= 3 && memcmp(words[i].at, "mtp", 3) == 0)
            name.kind = NAME_APART;
        if (word_is(words[i], "experts"))
            experts = i;
    }
    if (experts == n || name.kind == NAME_APART)
        return name;
    name.kind = NAME_STRANGE;
    if (!name.has_layer || experts + 1 >= n || words[experts].at < t->name + name.stack)
        return name;
    name.prefix = (size_t)(words[experts + 1].at - t->name);
    bool numbered = word_number(words[experts + 1], &name.expert);
    if (numbered && experts + 2 >= n)
        return name;
    name.tail = words[experts + (numbered ? 2 : 1)].at;
    if (*name.tail != '\0')
        name.kind = numbered ? NAME_EXPERT : NAME_FUSED;
    return name;
}

/* ---- tails and parts ---- */

/* What checkpoints call the projections. */
enum role { ROLE_GATE, ROLE_UP, ROLE_DOWN, ROLE_OTHER };
static const struct {
    const char *word;
    enum role role;
} roles[] = {
    {"gate_proj", ROLE_GATE}, {"w1", ROLE_GATE},        {"up_proj", ROLE_UP},
    {"w3", ROLE_UP},          {"down_proj", ROLE_DOWN}, {"w2", ROLE_DOWN},
};

/* The first word's role, and what comes after it ("" or "weight", "weight_scale_inv", "bias"). */
static enum role tail_role(const struct tail *tail, const char **ret_suffix)
{
    size_t len = strcspn(tail->text, ".");
    *ret_suffix = tail->text[len] == '.' ? tail->text + len + 1 : tail->text + len;
    for (size_t i = 0; i < sizeof roles / sizeof roles[0] && !tail->fused; i++)
        if (len == strlen(roles[i].word) && memcmp(roles[i].word, tail->text, len) == 0)
            return roles[i].role;
    return ROLE_OTHER;
}

/* Weights first, then the rest by what they are, and of these gate, up, down. */
static int tail_compare(const void *a, const void *b)
{
    const struct tail *x = a, *y = b;
    const char *u, *v;
    enum role p = tail_role(x, &u), q = tail_role(y, &v);
    bool plain_x = !*u || strcmp(u, "weight") == 0, plain_y = !*v || strcmp(v, "weight") == 0;
    if (plain_x != plain_y)
        return plain_x ? -1 : 1;
    int order = plain_x ? 0 : strcmp(u, v);
    if (order == 0)
        order = (int)p - (int)q;
    return order ? order : strcmp(x->text, y->text);
}

void checkpoint_tails_sort(struct checkpoint *c)
{
    qsort(c->tails, c->n_tails, sizeof c->tails[0], tail_compare);
}

/* "weight" is not said, "weight_scale_inv" is "_scale_inv", "bias" is "_bias". */
static int part_name(const struct checkpoint *c, const char *word, size_t len, const char *suffix, struct part *part,
                     struct err *err)
{
    const char *rest = strncmp(suffix, "weight", 6) == 0 && (suffix[6] == '_' || !suffix[6]) ? suffix + 6 : suffix;
    int n = snprintf(part->name, sizeof part->name, "%.*s%s%s", (int)len, word, *rest && *rest != '_' ? "_" : "", rest);
    if (n < 0 || (size_t)n >= sizeof part->name)
        return err_set(err, ERR_LIMIT, "%s: the name of an expert's part \"%.*s.%.64s\" is longer than %zu bytes",
                       c->dir, (int)len, word, suffix, sizeof part->name - 1);
    return 0;
}

/* Gate and up become one part, and then the down projection is called w2; all else keeps its name. */
int checkpoint_parts_make(struct checkpoint *c, struct err *err)
{
    bool fuses = false;
    for (uint32_t i = 0; i < c->n_tails; i++) {
        const char *suffix, *next;
        enum role role = tail_role(&c->tails[i], &suffix);
        bool pair = role == ROLE_GATE && i + 1 < c->n_tails && tail_role(&c->tails[i + 1], &next) == ROLE_UP &&
                    strcmp(suffix, next) == 0;
        fuses = fuses || pair;
        if (c->n_parts == SLOT_EXTENTS_MAX)
            return err_set(err, ERR_UNSUPPORTED, "%s: an expert has more than %d parts, which cannot be moved", c->dir,
                           SLOT_EXTENTS_MAX);
        struct part *part = &c->parts[c->n_parts++];
        const char *word = c->tails[i].text;
        size_t len = strcspn(word, ".");
        if (pair)
            word = "w13", len = 3;
        else if (role == ROLE_DOWN && fuses)
            word = "w2", len = 2;
        *part = (struct part){.tails = {i, i + 1}, .n = pair ? 2 : 1};
        int rc = part_name(c, word, len, suffix, part, err);
        if (rc < 0)
            return rc;
        i += pair;
    }
    return 0;
}
